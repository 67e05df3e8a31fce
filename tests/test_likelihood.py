import math

import pytest
import torch
from torch.func import vmap
from torch.nn import functional as F

from bayespass import InvalidInput, PosteriorInfo
from bayespass.likelihood import (
    check_likelihood,
    check_targets,
    gaussian_log_losses,
    gaussian_nll,
    mean_and_log_variance,
    negative_log_likelihood,
)


def test_gaussian_nll_is_the_density_of_torch():
    outputs, targets = torch.randn(4, 3, 2, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    density = torch.distributions.Normal(outputs[..., 0], (outputs[..., 1] / 2).exp())
    torch.testing.assert_close(gaussian_nll(outputs, targets), -density.log_prob(targets).mean())
    total = negative_log_likelihood(outputs, targets, "regression", "predicted")
    torch.testing.assert_close(total, -density.log_prob(targets).sum())


def test_predicted_and_known_noise_agree_where_they_say_the_same():
    means, targets, sigma = torch.randn(5, 2), torch.randn(5, 2), 0.3
    outputs = torch.stack([means, torch.full_like(means, 2 * math.log(sigma))], -1)
    known = negative_log_likelihood(means, targets, "regression", sigma)
    torch.testing.assert_close(negative_log_likelihood(outputs, targets, "regression", "predicted"), known)


def test_the_loss_keeps_log_variances_whose_exponential_is_lost():
    """exp(-120) is zero and exp(120) infinite in float32; their logarithms are not."""
    outputs = torch.tensor([[1.0, -120.0], [1.0, 120.0]], requires_grad=True)
    losses = gaussian_log_losses(outputs, torch.ones(2))
    torch.testing.assert_close(losses, torch.tensor([-60.0, 60.0]) + 0.5 * math.log(2 * math.pi))
    losses.sum().backward()
    torch.testing.assert_close(outputs.grad[:, 1], torch.full((2,), 0.5))
    lost = F.gaussian_nll_loss(torch.ones(1), torch.ones(1), torch.tensor([-120.0]).exp(), eps=0.0)
    assert not lost.isfinite()


def test_the_loss_runs_under_vmap():
    outputs, targets = torch.randn(6, 3, 2), torch.randn(6, 3)
    torch.testing.assert_close(vmap(gaussian_log_losses)(outputs, targets), gaussian_log_losses(outputs, targets))


def test_a_fit_recovers_mean_and_noise():
    """Two groups of targets with their own mean and sd, the loss minimised over one output per group."""
    targets = torch.stack([1.0 + 0.5 * torch.randn(20_000), -2.0 + 3.0 * torch.randn(20_000)])
    outputs = torch.zeros(2, 1, 2, requires_grad=True)
    optimizer = torch.optim.LBFGS([outputs], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = gaussian_nll(outputs.expand(2, 20_000, 2), targets)
        loss.backward()
        return loss

    optimizer.step(closure)
    mean, log_variance = (value.detach().squeeze(-1) for value in mean_and_log_variance(outputs))
    torch.testing.assert_close(mean, targets.mean(1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(log_variance.exp(), targets.var(1, correction=0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("sigma_noise", [None, 0.0, -1.0, float("nan"), "learned"])
def test_regression_says_which_noise_it_takes(sigma_noise):
    with pytest.raises(InvalidInput, match=r"needs sigma_noise > 0.*'predicted'"):
        check_likelihood("regression", sigma_noise)
    with pytest.raises(InvalidInput, match="sigma_noise"):
        PosteriorInfo("regression", sigma_noise=sigma_noise)


def test_known_words_pass():
    check_likelihood("regression", "predicted")
    check_likelihood("regression", 0.1)
    check_likelihood("classification", None)
    with pytest.raises(InvalidInput, match="belongs to likelihood='regression'"):
        check_likelihood("classification", "predicted")
    with pytest.raises(InvalidInput, match="'classification' or 'regression'"):
        check_likelihood("poisson", None)


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 3), ()])
def test_an_output_without_its_two_entries_is_refused(shape):
    with pytest.raises(InvalidInput, match=r"axis of size 2, \(mean, log variance\)"):
        mean_and_log_variance(torch.zeros(shape))
    with pytest.raises(InvalidInput, match="axis of size 2"):
        check_targets(torch.zeros(shape), torch.zeros(5), "regression", "predicted")


def test_targets_have_the_shape_of_the_means():
    outputs = torch.zeros(5, 3, 2)
    assert check_targets(outputs, torch.ones(5, 3), "regression", "predicted").shape == (5, 3)
    with pytest.raises(InvalidInput, match=r"without their last axis, \(5, 3\); got \(5, 3, 2\)"):
        check_targets(outputs, torch.zeros(5, 3, 2), "regression", "predicted")
    with pytest.raises(InvalidInput, match=r"\(5, 3\)"):
        gaussian_nll(outputs, torch.zeros(5))  # would broadcast, silently
    with pytest.raises(InvalidInput, match="shape of the outputs"):
        check_targets(outputs, torch.zeros(5, 3), "regression", 0.5)
