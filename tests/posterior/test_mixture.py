import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

from bayespass import DiagonalGaussian, InvalidInput, InvalidPosteriorFile, MonteCarlo, Posterior, PosteriorInfo
from bayespass.posterior import store
from bayespass.posterior.empirical import Empirical
from bayespass.posterior.kronecker import KroneckerGaussian
from bayespass.posterior.mixture import Mixture
from bayespass.testing import check_posterior


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).eval()


def gaussian(model, seed, **info):
    generator = torch.Generator().manual_seed(seed)
    mean = {name: torch.randn(p.shape, generator=generator) * 0.5 for name, p in model.named_parameters()}
    variance = {name: torch.rand(p.shape, generator=generator) + 0.5 for name, p in model.named_parameters()}
    return DiagonalGaussian(mean, variance, PosteriorInfo(**{"n_data": seed + 1, **info}))


@pytest.fixture
def mixture(model):
    turned = gaussian(model, 2)
    basis = {"0.weight": torch.linalg.qr(torch.randn(2, 2))[0]}
    inner = Mixture([gaussian(model, 0), gaussian(model, 1)], [1, 2])
    return Mixture([inner, KroneckerGaussian(turned.mean, turned.variance, basis)], [0.7, 0.3], PosteriorInfo(n_data=9))


def test_the_contract(mixture, model):
    check_posterior(mixture, model, n_samples=4000)


def test_moments_by_hand(model):
    first, second = gaussian(model, 0), gaussian(model, 1)
    mixture = Mixture([first, second], [3, 1])
    for name in mixture.names:
        mean = 0.75 * first.mean[name] + 0.25 * second.mean[name]
        square = 0.75 * (first.variance[name] + first.mean[name] ** 2)
        square = square + 0.25 * (second.variance[name] + second.mean[name] ** 2)
        torch.testing.assert_close(mixture.mean[name], mean)
        torch.testing.assert_close(mixture.variance[name], square - mean**2)


def test_close_modes_of_large_means_do_not_cancel():
    at = [DiagonalGaussian({"w": torch.tensor([1e3 + g])}, {"w": torch.tensor([1e-4])}) for g in (-0.0625, 0.0625)]
    torch.testing.assert_close(Mixture(at).variance["w"], torch.tensor([1e-4 + 0.0625**2]))


def test_draws_come_from_components_by_weight():
    at = [DiagonalGaussian({"w": torch.tensor([float(k)])}, {"w": torch.tensor([1e-8])}) for k in range(3)]
    draws = torch.cat([draw["w"] for draw in Mixture(at, [1, 2, 7]).sample(4000, 0)]).round()
    for k, weight in enumerate((0.1, 0.2, 0.7)):
        assert abs((draws == k).float().mean() - weight) < 5 * (weight * (1 - weight) / 4000) ** 0.5


def test_log_prob_is_that_of_the_mixture(model):
    parts, weights = [gaussian(model, seed) for seed in range(2)], torch.tensor([0.2, 0.8])
    mixture = Mixture(parts, weights)
    draw = next(mixture.sample(1, 0))
    expected = torch.log(sum(w * part.log_prob(draw).double().exp() for w, part in zip(weights, parts, strict=True)))
    assert float(mixture.log_prob(draw)) == pytest.approx(float(expected), rel=1e-5)
    members = [Empirical([part.mean]) for part in parts]
    with pytest.raises(NotImplementedError, match="'empirical' has no log_prob"):
        Mixture(members).log_prob(draw)


def test_a_file_keeps_every_component(mixture, model, tmp_path):
    mixture.save(tmp_path / "m.safetensors", model)
    loaded = Posterior.load(tmp_path / "m.safetensors", model)
    assert isinstance(loaded, Mixture)
    assert [type(c) for c in loaded.components] == [Mixture, KroneckerGaussian]
    assert [c.info.n_data for c in loaded.components[0].components] == [1, 2]
    torch.testing.assert_close(loaded.weights, torch.tensor([0.7, 0.3], dtype=torch.float64))
    first, second = next(loaded.sample(1, 1)), next(mixture.sample(1, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("structure", "match"),
    [({}, "without its list of components"), ({"components": [{"kind": "new"}]}, "component 0 .* of kind 'new'")],
)
def test_foreign_components_are_refused(mixture, model, tmp_path, structure, match):
    path = tmp_path / "m.safetensors"
    mixture.save(path, model)
    with safe_open(path, framework="pt") as file:
        manifest = json.loads(file.metadata()["bayespass"])
    store.write(path, mixture._tensors(), manifest | {"structure": structure})
    with pytest.raises(InvalidPosteriorFile, match=match):
        Posterior.load(path, model)


def test_monte_carlo_sees_both_modes():
    """Two certain and opposite networks: the average is undecided, the network at the mean too, but it has no spread."""
    model = nn.Linear(1, 2, bias=False).eval()
    weight = torch.tensor([[8.0], [-8.0]])
    parts = [DiagonalGaussian({"weight": s * weight}, {"weight": torch.full((2, 1), 1e-6)}) for s in (1, -1)]
    prediction = MonteCarlo(model, Mixture(parts), n_samples=200)(torch.ones(1, 1))
    assert prediction.logit_variance.min() > 50
    torch.testing.assert_close(prediction.probs, torch.full((1, 2), 0.5), atol=0.15, rtol=0)


def test_bad_input_is_named(model):
    part = gaussian(model, 0)
    with pytest.raises(InvalidInput, match="at least one component"):
        Mixture([])
    with pytest.raises(InvalidInput, match=r"component 1 differs from component 0 in 0\.bias, 0\.weight"):
        Mixture([part, part.subset(["2.weight", "2.bias"])])
    with pytest.raises(InvalidInput, match=r"component 1 has 'regression' and 0\.5"):
        Mixture([part, gaussian(model, 0, likelihood="regression", sigma_noise=0.5)])
    for weights in ([1.0], [1.0, 0.0], [1.0, float("nan")]):
        with pytest.raises(InvalidInput, match="2 positive numbers"):
            Mixture([part, part], weights)
