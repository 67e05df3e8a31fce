import pytest
import torch
from torch import nn

from bayespass import InvalidInput, PosteriorInfo, propagate
from bayespass.posterior.low_rank import LowRankGaussian
from bayespass.testing import check_posterior


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).eval()


@pytest.fixture
def posterior(model):
    mean = {name: p.detach() for name, p in model.named_parameters()}
    diagonal = {name: 0.1 + torch.rand_like(p) for name, p in mean.items()}
    return LowRankGaussian(
        mean, diagonal, {n: torch.randn(3, *p.shape) for n, p in mean.items()}, PosteriorInfo(n_data=3)
    )


def flat(values):
    return torch.cat([value.flatten() for value in values.values()])


def dense(posterior):
    factors = torch.cat([f.flatten(1) for f in posterior._factors.values()], 1)
    return torch.diag(flat(posterior._diagonal)) + factors.T @ factors


def test_the_contract(posterior, model):
    check_posterior(posterior, model)


def test_variance_and_log_prob_are_those_of_the_dense_gaussian(posterior):
    covariance = dense(posterior).double()
    torch.testing.assert_close(flat(posterior.variance).double(), covariance.diagonal(), rtol=1e-5, atol=0)
    draw = next(posterior.sample(1, 0))
    expected = torch.distributions.MultivariateNormal(flat(posterior.mean).double(), covariance).log_prob(
        flat(draw).double()
    )
    assert float(posterior.log_prob(draw)) == pytest.approx(float(expected), rel=1e-4)


def test_draws_are_correlated_across_parameters(posterior):
    expected = dense(posterior)
    draws = torch.stack([flat(draw) for draw in posterior.sample(20_000, 0)])
    scale = expected.diagonal().sqrt()
    error = (draws.T.cov() - expected) / torch.outer(scale, scale)
    assert error.abs().max() < 5 * 2**0.5 / 20_000**0.5
    across = expected[:6, 8:].abs() / torch.outer(scale[:6], scale[8:])
    assert across.max() > 0.3  # between the first and the last layer


def test_a_single_pass_takes_the_marginals(posterior, model):
    assert propagate(model, posterior, torch.randn(4, 3)).logit_variance.min() > 0


def test_bad_input_is_named(posterior):
    mean, diagonal, factors = posterior.mean, posterior._diagonal, posterior._factors
    with pytest.raises(InvalidInput, match="same parameter names"):
        LowRankGaussian(mean, diagonal, {"0.bias": factors["0.bias"]})
    with pytest.raises(InvalidInput, match=r"factors of 0\.bias must have shape"):
        LowRankGaussian(mean, diagonal, factors | {"0.bias": torch.zeros(3, 5)})
    with pytest.raises(InvalidInput, match=r"factors of 2\.bias must have shape"):
        LowRankGaussian(mean, diagonal, factors | {"2.bias": torch.zeros(4, 2)})
    with pytest.raises(InvalidInput, match=r"factors of 2\.bias are NaN"):
        LowRankGaussian(mean, diagonal, factors | {"2.bias": torch.full((3, 2), torch.nan)})
    flat_diagonal = {name: torch.zeros_like(d) for name, d in diagonal.items()}
    with pytest.raises(InvalidInput, match="no density"):
        LowRankGaussian(mean, flat_diagonal, factors).log_prob(mean)
