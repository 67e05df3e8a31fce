import pytest
import torch
from torch import nn

from bayespass import InvalidInput, PosteriorInfo, propagate
from bayespass.posterior.full import FullGaussian
from bayespass.testing import check_posterior


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).eval()


@pytest.fixture
def posterior(model):
    mean = {name: p.detach() for name, p in model.named_parameters()}
    return FullGaussian(mean, torch.randn(14, 14) * 0.5, PosteriorInfo(n_data=3))


def flat(values):
    return torch.cat([value.flatten() for value in values.values()])


def test_the_contract(posterior, model):
    check_posterior(posterior, model)


def test_draws_have_the_covariance(posterior):
    expected = posterior.covariance
    draws = torch.stack([flat(draw) for draw in posterior.sample(20_000, 0)])
    scale = expected.diagonal().sqrt()
    assert ((draws.T.cov() - expected) / torch.outer(scale, scale)).abs().max() < 5 * 2**0.5 / 20_000**0.5
    torch.testing.assert_close(flat(posterior.variance), expected.diagonal())


def test_log_prob_and_products(posterior):
    covariance = posterior.covariance.double()
    draw = next(posterior.sample(1, 0))
    expected = torch.distributions.MultivariateNormal(flat(posterior.mean).double(), covariance).log_prob(
        flat(draw).double()
    )
    assert float(posterior.log_prob(draw)) == pytest.approx(float(expected), rel=1e-2)
    torch.testing.assert_close(flat(posterior.covariance_times(draw)), posterior.covariance @ flat(draw))


def test_a_subset_is_the_marginal(posterior):
    part = posterior.subset(["2.bias", "0.bias"])
    assert part.names == ("0.bias", "2.bias")
    rows = [6, 7, 12, 13]
    torch.testing.assert_close(part.covariance, posterior.covariance[rows][:, rows])
    assert torch.isfinite(part.log_prob(part.mean))


def test_a_single_pass_takes_the_marginals(posterior, model):
    assert propagate(model, posterior, torch.randn(4, 3)).logit_variance.min() > 0


def test_bad_input_is_named(posterior):
    with pytest.raises(InvalidInput, match=r"14 entries of mean.*got shape \(3, 3\)"):
        FullGaussian(posterior.mean, torch.eye(3))
    with pytest.raises(InvalidInput, match="at least one"):
        FullGaussian({}, torch.eye(0))
    with pytest.raises(InvalidInput, match="root is NaN"):
        FullGaussian(posterior.mean, torch.full((14, 14), torch.nan))
    singular = FullGaussian(posterior.mean, torch.zeros(14, 1))
    with pytest.raises(InvalidInput, match="covariance is singular"):
        singular.log_prob(singular.mean)
