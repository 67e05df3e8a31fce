"""Every kind of posterior: the contract, the file, every predictor, and the model it does not belong to."""

import pytest
import torch
from torch import nn

from bayespass import (
    DiagonalGaussian,
    InvalidInput,
    MeanNetwork,
    MonteCarlo,
    Posterior,
    PosteriorInfo,
    PosteriorMismatch,
    SinglePass,
)
from bayespass.posterior.dropout import DropoutPosterior
from bayespass.posterior.empirical import Empirical
from bayespass.posterior.full import FullGaussian
from bayespass.posterior.kronecker import KroneckerGaussian
from bayespass.posterior.low_rank import LowRankGaussian
from bayespass.posterior.mixture import Mixture
from bayespass.posterior.product import Product
from bayespass.posterior.sampled_gaussian import SampledGaussian
from bayespass.testing import check_posterior

NO_TEMPERATURE = {"dropout", "empirical", "mixture", "product"}  # a part of the last two is empirical
INFO = PosteriorInfo(n_data=9, prior_precision=0.5, temperature=0.1, method="test", settings={"lr": 0.1})


def network(hidden=4, middle=nn.Tanh):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, hidden), middle(), nn.Linear(hidden, 2)).eval()


def sample_of(kind, model):
    """A posterior of this kind over all weights and biases that it can hold."""
    generator = torch.Generator().manual_seed(1)
    mean = {name: p.detach() for name, p in model.named_parameters()}
    variance = {name: torch.rand(p.shape, generator=generator) + 0.1 for name, p in mean.items()}
    basis = torch.linalg.qr(torch.randn(4, 4, generator=generator))[0]
    diagonal = DiagonalGaussian(mean, variance, INFO)
    members = [dict(draw) for draw in diagonal.sample(40, 2)]
    size = sum(m.numel() for m in mean.values())
    return {
        "diagonal_gaussian": lambda: diagonal,
        "kronecker_gaussian": lambda: KroneckerGaussian(mean, variance, {"0.weight": basis}, {"2.weight": basis}, INFO),
        "low_rank_gaussian": lambda: LowRankGaussian(
            mean, variance, {n: torch.randn(3, *m.shape, generator=generator) for n, m in mean.items()}, INFO
        ),
        "full_gaussian": lambda: FullGaussian(mean, torch.randn(size, size, generator=generator) / size**0.5, INFO),
        "empirical": lambda: Empirical(members, INFO),
        "mixture": lambda: Mixture([diagonal, Empirical(members)], [3, 1], INFO),
        "sampled_gaussian": lambda: SampledGaussian(
            mean, {n: torch.randn(400, *m.shape, generator=generator) for n, m in mean.items()}, INFO
        ),
        "product": lambda: Product(
            [diagonal.subset(["0.weight", "2.weight"]), Empirical(members, INFO).subset(["0.bias", "2.bias"])], INFO
        ),
        "dropout": lambda: DropoutPosterior(
            {n: m for n, m in mean.items() if m.dim() == 2}, {"0.weight": 0.4, "2.weight": 0.25}, info=INFO
        ),
    }[kind]()


@pytest.fixture(params=sorted(Posterior._KINDS))
def posterior(request):
    return sample_of(request.param, network())


def test_the_contract(posterior):
    check_posterior(posterior, network(), n_samples=4000)


def test_a_file_gives_back_the_same_draws(posterior, tmp_path):
    posterior.save(tmp_path / "p.safetensors", network())
    loaded = Posterior.load(tmp_path / "p.safetensors", network())
    assert type(loaded) is type(posterior)
    assert loaded.info == INFO
    assert loaded.names == posterior.names
    for first, second in zip(loaded.sample(3, 5), posterior.sample(3, 5), strict=True):
        for name in posterior.names:
            assert torch.equal(loaded.mean[name], posterior.mean[name])
            assert torch.equal(loaded.variance[name], posterior.variance[name])
            assert torch.equal(first[name], second[name])


def test_another_architecture_is_refused_by_name_or_shape(posterior, tmp_path):
    posterior.save(tmp_path / "p.safetensors", network())
    with pytest.raises(PosteriorMismatch, match=r"parameter 0\.\w+ has shape \(4.*\) in the posterior and \(5"):
        Posterior.load(tmp_path / "p.safetensors", network(hidden=5))
    with pytest.raises(PosteriorMismatch, match=r"has parameters that Sequential lacks: 2\.weight"):
        Posterior.load(tmp_path / "p.safetensors", network()[:2])
    with pytest.raises(PosteriorMismatch, match=r"lacks: 0\.weight"):
        posterior.save(tmp_path / "q.safetensors", nn.Flatten())
    assert not (tmp_path / "q.safetensors").exists()


def test_tempered_or_a_reason_why_not(posterior, tmp_path):
    """The variance times T, also of 4,000 draws and of what comes back from a file."""
    if posterior.kind in NO_TEMPERATURE or type(posterior)._tempered is Posterior._tempered:
        with pytest.raises(NotImplementedError, match="temperature"):
            posterior.temper(0.25)
        return
    colder = posterior.temper(0.25)
    assert type(colder) is type(posterior)
    assert colder.info.temperature == 0.025
    for name in posterior.names:
        torch.testing.assert_close(colder.variance[name], 0.25 * posterior.variance[name])
        assert torch.equal(colder.mean[name], posterior.mean[name])
    check_posterior(colder, network(), n_samples=4000)


def test_merged_with_another_over_a_further_parameter(posterior, tmp_path):
    """Moments and files of both, in either order; draws of each keep the moments."""
    model = network()
    model.register_parameter("scale", nn.Parameter(torch.tensor([1.0, 2.0])))
    other = KroneckerGaussian({"scale": model.scale.detach()}, {"scale": torch.tensor([0.5, 2.0])}, info=INFO)
    for merged in (posterior.merge(other), other.merge(posterior)):
        assert isinstance(merged, Product)
        assert set(merged.names) == {*posterior.names, "scale"}
        assert all(not isinstance(part, Product) for part in merged.parts)
        for name in posterior.names:
            assert torch.equal(merged.variance[name], posterior.variance[name])
        check_posterior(merged, model, n_samples=4000)
    with pytest.raises(InvalidInput, match=r"would be in two"):
        posterior.merge(posterior)


def test_every_predictor_takes_it(posterior):
    model, inputs = network(), torch.randn(5, 3, generator=torch.Generator().manual_seed(3))
    many = MonteCarlo(model, posterior, n_samples=500)(inputs)
    single = SinglePass(model, posterior)(inputs)
    point = MeanNetwork(model, posterior)(inputs)
    assert many.logit_variance.min() > 0
    assert 0.2 < (single.logit_variance / many.logit_variance).log().mean().exp() < 5
    assert torch.equal(point.logit_variance, torch.zeros(5, 2))
    assert all(torch.isfinite(p.probs).all() for p in (many, single, point))


def test_equal_seeds_equal_draws_and_other_seeds_others(posterior):
    first, again, other = (next(iter(posterior.sample(1, seed))) for seed in (0, 0, 1))
    for name in posterior.names:
        assert torch.equal(first[name], again[name])
    assert any(not torch.equal(first[name], other[name]) for name in posterior.names)
