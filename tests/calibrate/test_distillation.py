import math

import pytest
import torch
from torch import nn

from bayespass import (
    DiagonalGaussian,
    InvalidInput,
    MonteCarlo,
    PosteriorInfo,
    SinglePass,
    VarianceScales,
    agreement,
    load_scales,
)
from bayespass.calibrate.distillation import DAMPED, NONE, SEQUENTIAL, distill
from bayespass.calibrate.student import Student
from bayespass.calibrate.teacher import Teacher, distance
from bayespass.demo.models import SmallViT

REGRESSION = PosteriorInfo(likelihood="regression", sigma_noise=0.1)


def isotropic(model, sd, info=None):
    mean = {name: p.detach() for name, p in model.named_parameters()}
    return DiagonalGaussian(mean, {name: torch.full_like(p, sd**2) for name, p in mean.items()}, info)


class Overstated(DiagonalGaussian):
    """Says twice the variance that its draws have, so that the propagation is wrong by a factor of two."""

    @property
    def variance(self):
        return {name: 2 * value for name, value in super().variance.items()}


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 12), nn.GELU(), nn.Linear(12, 3)).eval()


@pytest.fixture
def saturating():
    torch.manual_seed(0)
    first, last = nn.Linear(5, 12), nn.Linear(12, 3)
    with torch.no_grad():
        first.weight.mul_(4)
        last.weight.mul_(4)
    return nn.Sequential(first, nn.Tanh(), last).eval()


@pytest.fixture
def inputs():
    return torch.randn(60, 5, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("approximation", ["cvp", "shared"])
def test_slopes_are_those_of_finite_differences(approximation):
    torch.manual_seed(0)
    model = SmallViT(width=8, depth=1, heads=2).double().eval()
    posterior, images = isotropic(model, 0.1), torch.randn(3, 1, 8, 8, dtype=torch.float64)
    student = Student(SinglePass(model, posterior, approximation), images)
    truth = Teacher(model, posterior, 20).taught(images, 1)

    def loss(logs, dampings):
        student.logs, student.dampings = logs, dampings
        return distance(student(images), truth).sum()

    start = 0.1 * torch.randn(2, len(student.places), dtype=torch.float64)
    assert torch.autograd.gradcheck(loss, tuple(row.clone().requires_grad_() for row in start), atol=1e-5)


def test_no_variance_anywhere_in_a_pool_leaves_slopes_finite():
    first = nn.Conv2d(1, 4, 3)
    with torch.no_grad():
        first.bias[:2] = -1e6  # type: ignore[index]  # channels that never fire
    model = nn.Sequential(first, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)).eval()
    posterior, images = isotropic(model, 0.1), torch.randn(8, 1, 8, 8)
    student = Student(SinglePass(model, posterior, "shared"), images)
    distance(student(images), Teacher(model, posterior, 20).taught(images, 1)).mean().backward()
    for parameter in (student.logs, student.dampings):
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()
        assert float(parameter.grad.abs().max()) > 0


def test_an_exact_network_is_left_as_it_is(inputs):
    model = nn.Sequential(nn.Linear(5, 4)).eval()
    scales = distill(model, isotropic(model, 0.4), inputs, n_samples=50, max_steps=30)
    scale = math.prod(scales.values())  # the layer's site and the output's are the same tensor
    assert scale == pytest.approx(1, abs=0.2)
    with torch.inference_mode():
        corrected = SinglePass(model, isotropic(model, 0.4), scales=scales).moments(inputs)[0]
        assert float((corrected - model(inputs)).abs().mean()) < 0.02


def test_a_wrong_propagation_is_repaired(network, inputs):
    plain = isotropic(network, 0.3)
    wrong = Overstated(plain.mean, plain.variance)
    scales = distill(network, wrong, inputs, "shared", n_samples=40, max_steps=150)
    test = torch.randn(100, 5, generator=torch.Generator().manual_seed(8))
    with torch.inference_mode():
        truth = MonteCarlo(network, plain, 400, seed=9)(test)
        before = agreement(SinglePass(network, wrong, "shared")(test), truth)
        after = agreement(SinglePass(network, wrong, "shared", scales)(test), truth)
    assert before.variance_ratio > 1.8
    assert after.variance_ratio == pytest.approx(1, abs=0.15)
    assert after.kl < 0.3 * before.kl


def test_wrong_means_are_repaired(saturating, inputs):
    """Streamlining never moves the mean, and E tanh(x) lies nearer to zero than tanh(E x): what damping can say."""
    posterior = isotropic(saturating, 0.5)
    scales = distill(saturating, posterior, inputs, "streamlined", n_samples=40, max_steps=150)
    test = torch.randn(100, 5, generator=torch.Generator().manual_seed(8))
    with torch.inference_mode():
        truth = MonteCarlo(saturating, posterior, 400, seed=9)(test)
        before = agreement(SinglePass(saturating, posterior, "streamlined")(test), truth)
        after = agreement(SinglePass(saturating, posterior, "streamlined", scales)(test), truth)
    assert scales.report.chosen.startswith(DAMPED)
    assert scales.dampings["0"] > 0.3
    assert after.mean_error < 0.75 * before.mean_error
    assert after.kl < 0.9 * before.kl


def test_held_out_rows_stop_the_training_and_choose(network, inputs):
    report = distill(network, isotropic(network, 0.3), inputs[:30], n_samples=10, max_steps=3000).report
    assert report.steps < 3000
    assert report.objectives[report.chosen] == min(report.objectives.values())
    assert {NONE, SEQUENTIAL, DAMPED} < set(report.objectives)
    assert (report.n_inputs, report.n_held_out, report.n_samples) == (30, 6, 10)
    assert report.chosen in str(report)
    assert f"{report.after.kl:.4f}" in str(report)


def test_nothing_is_scaled_where_nothing_helps(network, inputs, monkeypatch):
    monkeypatch.setattr("bayespass.calibrate.distillation.LEARNING_RATE", 100.0)
    monkeypatch.setattr(
        "bayespass.calibrate.distillation.fit_scales", lambda *args: VarianceScales({"0": 1e4, "2": 1e4}, "cvp")
    )
    scales = distill(network, isotropic(network, 0.05), inputs, n_samples=20, max_steps=20)
    assert scales.report.chosen == NONE
    assert (dict(scales), scales.dampings) == ({}, {})
    assert scales.report.after == scales.report.before
    assert "no site scaled" in repr(scales)


def test_equal_seeds_give_equal_scales(network, inputs):
    posterior = isotropic(network, 0.3)
    first, second, other = (distill(network, posterior, inputs, n_samples=10, seed=s, max_steps=20) for s in (1, 1, 2))
    assert (dict(first), first.dampings) == (dict(second), second.dampings)
    assert dict(first) != dict(other)


def test_they_are_kept_with_the_posterior(network, inputs, tmp_path):
    posterior = isotropic(network, 0.5)
    scales = distill(network, posterior, inputs, "streamlined", n_samples=20, max_steps=100)
    posterior.save(tmp_path / "posterior.safetensors", network, scales=scales)
    loaded = load_scales(tmp_path / "posterior.safetensors")
    assert loaded is not None
    assert (dict(loaded), loaded.dampings) == (dict(scales), scales.dampings)
    assert loaded.dampings
    with torch.inference_mode():
        mine, theirs = (SinglePass(network, posterior, "streamlined", s)(inputs) for s in (scales, loaded))
    assert torch.equal(mine.probs, theirs.probs)
    assert f"{len(scales.dampings)} damped" in mine.notes[-1]


def test_regression_learns_moments_of_the_output(saturating, inputs):
    posterior = isotropic(saturating, 0.5, REGRESSION)
    scales = distill(
        saturating, posterior, [(inputs, torch.full((60,), math.nan))], "streamlined", n_samples=40, max_steps=150
    )
    test = torch.randn(100, 5, generator=torch.Generator().manual_seed(8))
    with torch.inference_mode():
        truth = MonteCarlo(saturating, posterior, 400, seed=9)(test)
        before = agreement(SinglePass(saturating, posterior, "streamlined")(test), truth)
        after = agreement(SinglePass(saturating, posterior, "streamlined", scales)(test), truth)
    assert after.kl < 0.8 * before.kl
    assert after.mean_error < 0.8 * before.mean_error


class Sentences(nn.Module):
    """Token labels of sentences of any length."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(11, 6), nn.Linear(6, 3)

    def forward(self, tokens, weights):
        return self.head(torch.tanh(self.words(tokens)) * weights.unsqueeze(-1))


def test_batches_of_any_form(inputs):
    torch.manual_seed(0)
    model = Sentences().eval()
    posterior = isotropic(model, 0.3)
    sentences = [(torch.randint(11, (rows, length)), torch.rand(rows, length)) for rows, length in ((6, 3), (7, 5))]
    as_dicts = distill(
        model, posterior, [{"tokens": t, "weights": w} for t, w in sentences], n_samples=10, max_steps=10
    )
    as_tuples = distill(model, posterior, [(pair,) for pair in sentences], n_samples=10, max_steps=10)
    assert as_dicts.report.objectives == as_tuples.report.objectives
    one_by_one = [(t[None], w[None]) for pair in sentences for t, w in zip(*pair, strict=True)]
    assert distill(model, posterior, [(p,) for p in one_by_one], n_samples=10, max_steps=4).report.n_held_out == 3


def test_under_inference_mode_it_still_learns(network):
    with torch.inference_mode():
        inputs = torch.randn(30, 5)
        scales = distill(network, isotropic(network, 0.3), inputs, n_samples=10, max_steps=10)
    assert scales.report.steps == 10


def test_the_damping_vanishes_with_the_variance(network, inputs):
    scales = VarianceScales({}, "cvp", dampings={"0": 3.0, "": -0.5})
    with torch.inference_mode():
        narrow = SinglePass(network, isotropic(network, 1e-6), "cvp", scales).moments(inputs)[0]
        torch.testing.assert_close(narrow, network(inputs))


def test_the_damping_has_the_closed_form(inputs):
    model = nn.Sequential(nn.Linear(5, 4)).eval()
    posterior = isotropic(model, 0.4)
    with torch.inference_mode():
        mean, variance = SinglePass(model, posterior, "cvp").moments(inputs)
        found, scaled = SinglePass(
            model, posterior, "cvp", scales=VarianceScales({"": 2.0}, "cvp", dampings={"": 0.7})
        ).moments(inputs)
    ratio = 2 * variance.mean(1) / (2 * variance.mean(1) + mean.square().mean(1))
    torch.testing.assert_close(found, mean * torch.exp(-0.7 * ratio).unsqueeze(1))
    torch.testing.assert_close(scaled, 2 * variance)


def test_mistakes(network, inputs):
    posterior = isotropic(network, 0.1)
    with pytest.raises(InvalidInput, match="n_samples must be at least 10"):
        distill(network, posterior, inputs, n_samples=5)
    with pytest.raises(InvalidInput, match="at least 10 inputs, some of them set apart; got 4"):
        distill(network, posterior, inputs[:4])
    with pytest.raises(InvalidInput, match="max_steps"):
        distill(network, posterior, inputs, max_steps=0)
    with pytest.raises(InvalidInput, match="no batch"):
        distill(network, posterior, [])
    with pytest.raises(InvalidInput, match="no site of this model"):
        SinglePass(network, posterior, "cvp", scales=VarianceScales({}, "cvp", dampings={"9": 1.0}))
    with pytest.raises(InvalidInput, match="must be finite; got nan"):
        SinglePass(network, posterior, "cvp", scales=VarianceScales({}, "cvp", dampings={"0": math.nan}))
