"""The row-by-row correction of the output's variance: planted truths, limits, and what is kept of it."""

import math
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bayespass import SinglePass, distill, load_scales, softmax_link
from bayespass.calibrate.output_variance import OutputVariance, fit_output_variance, output_features
from bayespass.calibrate.teacher import Answer, Taught, answers, distance, total_variance
from bayespass.errors import InvalidInput
from bayespass.posterior.base import PosteriorInfo
from bayespass.posterior.mean_field import DiagonalGaussian


def drawn(rows, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    mean = 2 * torch.randn(rows, classes, generator=generator)
    return mean, 0.1 + torch.rand(rows, classes, generator=generator)


def planted(mean, variance):
    gap = mean - mean.mean(-1, keepdim=True)
    return variance * (0.3 + 0.1 * gap.square()).exp()


def answer(mean, variance, probs):
    return Answer(mean, variance, probs, None)


def fit(mean, variance, truth):
    """From logits without correlation, or from outputs without noise."""
    classifies = truth.probs is not None
    return fit_output_variance(
        mean, variance, truth, lambda m, v: answer(m, v, softmax_link(m, v) if classifies else None)
    )


def taught(mean, variance, probs=None):
    return Taught(None, mean, variance, probs)


def sampled_probs(mean, variance):
    noise = torch.randn(2000, *mean.shape, generator=torch.Generator().manual_seed(8))
    return torch.softmax(mean + variance.sqrt() * noise, -1).mean(0)


def test_a_planted_dependence_on_the_row_is_found_on_other_rows():
    mean, variance = drawn(300, 6, 0)
    truth = planted(mean, variance)
    correction = fit(mean, variance, taught(mean, truth, sampled_probs(mean, truth)))
    other_mean, other_variance = drawn(200, 6, 1)
    log_ratio = (correction(other_mean, other_variance) / planted(other_mean, other_variance)).log()
    before = (other_variance / planted(other_mean, other_variance)).log()
    assert float(log_ratio.std()) < 0.15 * float(before.std())
    assert abs(float(log_ratio.mean())) < 0.05


def test_a_true_variance_is_left_alone():
    mean, variance = drawn(300, 5, 2)
    correction = fit(mean, variance, taught(mean, variance, sampled_probs(mean, variance)))
    torch.testing.assert_close(correction(mean, variance), variance, rtol=0.05, atol=0)


def test_regression_sees_variances_alone():
    mean, variance = drawn(200, 3, 3)
    correction = fit(mean, variance, taught(mean, 4 * variance.pow(1.5)))
    assert not correction.classifies
    assert output_features(mean, variance, False).shape == (200, 3, 3)
    torch.testing.assert_close(correction(mean, variance), 4 * variance.pow(1.5), rtol=0.1, atol=0)


def test_a_predicted_noise_has_a_level_of_its_own():
    """The variance of a log noise and that of the mean beside it are off by different factors."""
    mean, variance = drawn(200, 2, 10)
    info = PosteriorInfo("regression", sigma_noise="predicted")
    truth = variance * torch.tensor([0.5, 3.0])
    goal = Taught(None, mean, truth, None, total_variance(mean, truth, info))
    correction = fit_output_variance(mean, variance, goal, answers(info))
    assert correction.predicts_noise
    torch.testing.assert_close(correction(mean, variance), truth, rtol=0.1, atol=0)


def test_the_search_does_not_end_farther_from_the_teacher():
    mean, variance = drawn(200, 4, 4)
    truth = planted(mean, variance)
    probs = sampled_probs(mean, truth)
    goal = taught(mean, truth, probs)
    corrected = fit(mean, variance, goal)(mean, variance)
    before, after = (distance(answer(mean, v, sampled_probs(mean, v)), goal).mean() for v in (variance, corrected))
    assert float(after) < 0.2 * float(before)


@cache
def fitted():
    mean, variance = drawn(100, 4, 5)
    return mean, variance, fit(mean, variance, taught(mean, planted(mean, variance), mean.softmax(-1)))


@given(scale=st.floats(1e-6, 1e6), shift=st.floats(-1e4, 1e4))
def test_rows_unlike_those_seen_are_not_extrapolated_to(scale, shift):
    mean, variance, correction = fitted()
    low, high = correction.bounds
    log_ratio = (correction(scale * mean + shift, scale * variance) / (scale * variance)).log()
    assert float(log_ratio.min()) >= low - 1e-3
    assert float(log_ratio.max()) <= high + 1e-3


def test_no_variance_stays_none():
    mean, variance = drawn(100, 4, 6)
    correction = fit(mean, variance, taught(mean, variance, mean.softmax(-1)))
    assert torch.equal(correction(mean, torch.zeros_like(mean)), torch.zeros_like(mean))
    with pytest.raises(InvalidInput, match="no variance to correct"):
        fit(mean, torch.zeros_like(mean), taught(mean, variance))


def test_half_precision_keeps_its_dtype():
    mean, variance = drawn(100, 4, 7)
    correction = fit(mean, variance, taught(mean, 2 * variance, mean.softmax(-1)))
    assert correction(mean.bfloat16(), variance.bfloat16()).dtype == torch.bfloat16


def test_it_is_kept_with_the_posterior(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)).eval()
    mean = {name: p.detach() for name, p in model.named_parameters()}
    posterior = DiagonalGaussian(mean, {name: torch.full_like(p, 0.05) for name, p in mean.items()})
    scales = distill(model, posterior, torch.randn(60, 4), n_samples=40, max_steps=6)
    correction = fit(*drawn(50, 3, 8), taught(*drawn(50, 3, 9), drawn(50, 3, 9)[0].softmax(-1)))
    scales.output = correction
    posterior.save(tmp_path / "p.safetensors", model, scales=scales)
    loaded = load_scales(tmp_path / "p.safetensors")
    assert loaded.output == correction
    assert OutputVariance.from_dict(correction.as_dict()) == correction
    x = torch.randn(5, 4)
    kept, again = (SinglePass(model, posterior, scales=s)(x) for s in (scales, loaded))
    torch.testing.assert_close(kept.logit_variance, again.logit_variance)
    plain = SinglePass(model, posterior, scales=dict(scales))(x)
    assert not math.isclose(float(kept.logit_variance.sum()), float(plain.logit_variance.sum()), rel_tol=1e-3)
