import pytest
import torch
from torch import nn

from bayespass import InvalidInput, Posterior, PosteriorInfo
from bayespass.posterior.sampled_gaussian import SampledGaussian
from bayespass.testing import check_posterior


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).eval()


def posterior_of(model, size=20, **info):
    generator = torch.Generator().manual_seed(1)
    mean = {name: p.detach() for name, p in model.named_parameters()}
    return SampledGaussian(
        mean,
        {n: torch.randn(size, *m.shape, generator=generator) for n, m in mean.items()},
        PosteriorInfo(n_data=5, **info),
    )


@pytest.mark.parametrize("size", [1, 20, 64])
def test_the_contract(model, size):
    check_posterior(posterior_of(model, size), model)


def test_two_rounds_are_every_draw_with_both_signs_and_have_the_exact_moments(model):
    posterior = posterior_of(model, 5)
    draws = [draw["2.bias"] - posterior.mean["2.bias"] for draw in posterior.sample(10, 0)]
    stored = list(posterior.displacements["2.bias"])

    def which(draw, sign):
        return next(k for k, d in enumerate(stored) if torch.allclose(draw, sign * d))

    assert sorted(which(draw, 1) for draw in draws[:5]) == list(range(5))
    assert sorted(which(draw, -1) for draw in draws[5:]) == list(range(5))
    torch.testing.assert_close(torch.stack(draws).mean(0), torch.zeros(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.stack(draws).square().mean(0), posterior.variance["2.bias"])
    orders = {
        tuple(which(d["2.bias"] - posterior.mean["2.bias"], 1) for d in posterior.sample(5, seed)) for seed in range(6)
    }
    assert len(orders) > 1


def test_covariance_is_that_of_the_draws_and_of_the_gaussian_in_the_limit():
    generator = torch.Generator().manual_seed(2)
    root = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    draws = torch.randn(20_000, 4, generator=generator, dtype=torch.float64) @ root.mT
    mean = {"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros(1, 2, dtype=torch.float64)}
    posterior = SampledGaussian(mean, {"a": draws[:, :2], "b": draws[:, 2:].reshape(-1, 1, 2)})
    x = torch.randn(4, generator=generator, dtype=torch.float64)
    found = posterior.covariance_times({"a": x[:2], "b": x[None, 2:]})
    found = torch.cat([found["a"], found["b"].flatten()])
    torch.testing.assert_close(found, draws.mT @ (draws @ x) / 20_000)
    assert float((found - root @ root.mT @ x).norm() / (root @ root.mT @ x).norm()) < 0.05


def test_rescaling_is_another_prior_precision(model):
    posterior = posterior_of(model, prior_precision=2.0)
    wider = posterior.rescaled(3.0)
    torch.testing.assert_close(wider.variance["0.weight"], 9 * posterior.variance["0.weight"])
    assert wider.info.prior_precision == pytest.approx(2.0 / 9)
    assert torch.equal(wider.mean["0.weight"], posterior.mean["0.weight"])
    with pytest.raises(InvalidInput, match="factor must be a positive number"):
        posterior.rescaled(0.0)


def test_files_and_subsets_keep_the_draws(model, tmp_path):
    posterior = posterior_of(model)
    posterior.save(tmp_path / "p.safetensors", model)
    loaded = Posterior.load(tmp_path / "p.safetensors", model)
    assert isinstance(loaded, SampledGaussian)
    for first, second in zip(loaded.sample(25, 3), posterior.sample(25, 3), strict=True):
        assert all(torch.equal(first[name], second[name]) for name in posterior.names)
    part = posterior.subset(lambda name: name.startswith("2"))
    assert part.names == ("2.weight", "2.bias")
    assert part.n_draws == 20
    with pytest.raises(NotImplementedError, match="no log_prob"):
        posterior.log_prob(dict(posterior.mean))


def test_what_does_not_fit_is_named():
    zero = {"w": torch.zeros(2)}
    with pytest.raises(InvalidInput, match="need the same parameter names"):
        SampledGaussian(zero, {"v": torch.zeros(3, 2)})
    with pytest.raises(InvalidInput, match="at least one"):
        SampledGaussian({}, {})
    with pytest.raises(InvalidInput, match="at least one displacement"):
        SampledGaussian(zero, {"w": torch.zeros(0, 2)})
    with pytest.raises(InvalidInput, match=r"displacements of w must have shape \(3, 2\)"):
        SampledGaussian(zero, {"w": torch.zeros(3, 4)})
    with pytest.raises(InvalidInput, match="of w are NaN"):
        SampledGaussian(zero, {"w": torch.full((3, 2), torch.nan)})
    with pytest.raises(InvalidInput, match="missing w"):
        SampledGaussian(zero, {"w": torch.zeros(3, 2)}).covariance_times({})


def test_a_parameter_without_axes():
    posterior = SampledGaussian({"w": torch.tensor(1.0)}, {"w": torch.tensor([1.0, 3.0])})
    assert float(posterior.covariance_times({"w": torch.tensor(2.0)})["w"]) == pytest.approx(10)
