import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bayespass import DiagonalGaussian, SinglePass, distill
from bayespass.calibrate import student as student_module
from bayespass.calibrate.inside import FLOOR, MAX_CALLS, MAX_ENTRIES, Inside, inner_distance
from bayespass.calibrate.student import Student
from bayespass.calibrate.teacher import Teacher
from bayespass.demo.models import SmallViT


def isotropic(model, sd):
    mean = {name: p.detach() for name, p in model.named_parameters()}
    return DiagonalGaussian(mean, {name: torch.full_like(p, sd**2) for name, p in mean.items()})


def place(path):
    return path, 0, 0, torch.Size([5])


class Repeated(nn.Module):
    """One part that runs several times."""

    def __init__(self, times):
        super().__init__()
        self.part, self.times = nn.Sequential(nn.Linear(6, 6)), times

    def forward(self, x):
        for _ in range(self.times):
            x = self.part(x)
        return x


def test_what_the_teacher_says_of_a_linear_part_is_exact():
    model, inputs = nn.Sequential(nn.Sequential(nn.Linear(6, 4)), nn.Linear(4, 3)).eval(), torch.randn(20, 6)
    taught = Teacher(model, isotropic(model, 0.5), 2000, inside=True).taught(inputs, seed=1)
    assert list(taught.inner) == [("0", 0, 0, (20, 4))]
    mean, variance = taught.inner["0", 0, 0, (20, 4)]
    torch.testing.assert_close(mean, model[0](inputs).detach().flatten())
    exact = (0.25 * (inputs.square().sum(1, keepdim=True) + 1)).expand(-1, 4).flatten()
    torch.testing.assert_close(variance, exact, rtol=0.2, atol=0)  # 2,000 draws: sd 3 %
    assert float((variance / exact).mean()) == pytest.approx(1, abs=0.02)


def test_the_propagation_is_read_at_the_same_entries():
    model, inputs = nn.Sequential(nn.Sequential(nn.Linear(6, 800)), nn.Linear(800, 3)).eval(), torch.randn(20, 6)
    posterior = isotropic(model, 0.5)
    student = Student(SinglePass(model, posterior), inputs)
    student(inputs)
    mean, variance = student.inside.take()["0", 0, 0, (20, 800)]
    truth = Teacher(model, posterior, 200, inside=True).taught(inputs, seed=1).inner["0", 0, 0, (20, 800)]
    assert mean.shape == truth[0].shape == (MAX_ENTRIES,)
    torch.testing.assert_close(mean, truth[0])
    assert float((variance / truth[1]).mean().detach()) == pytest.approx(1, abs=0.05)


def test_a_teacher_that_is_not_asked_looks_at_outputs_only():
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 4)), nn.Linear(4, 3)).eval()
    assert Teacher(model, isotropic(model, 0.5), 20).taught(torch.randn(5, 6), 1).inner == {}


@pytest.mark.parametrize("times", [3, MAX_CALLS + 2])
def test_calls_of_one_part_are_told_apart_and_few(times):
    model = Repeated(times).eval()
    inside = Inside(model)
    x = torch.randn(2, 6)
    model(x)
    found = inside.take()
    assert list(found) == [("part", call, 0, (2, 6)) for call in range(min(times, MAX_CALLS))]
    torch.testing.assert_close(found["part", 1, 0, (2, 6)], model.part(model.part(x)).flatten())
    assert len(inside.take()) == 2  # the two calls by hand: what was taken before is gone
    assert inside.take() == {}


def test_random_control_flow_says_nothing():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.head = nn.Sequential(nn.Linear(6, 6)), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.part(x)) if float(self.head.bias.detach()[0]) > 0 else self.head(x)

    model = Sometimes().eval()
    assert Teacher(model, isotropic(model, 1.0), 20, inside=True).taught(torch.randn(5, 6), 1).inner == {}


def test_rows_that_draws_route_elsewhere_say_nothing():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.expert, self.head = nn.Linear(6, 1), nn.Sequential(nn.Linear(6, 6)), nn.Linear(6, 3)

        def forward(self, x):
            chosen = self.gate(x).squeeze(-1) > 0
            return self.head(torch.zeros_like(x).index_put((chosen,), self.expert(x[chosen])))

    model = Routed().eval()
    taught = Teacher(model, isotropic(model, 1.0), 20, inside=True).taught(torch.randn(30, 6), 1)
    assert taught.inner == {}
    assert taught.mean.shape == (30, 3)


def test_what_the_propagation_takes_for_known_is_left_out():
    mean, variance = torch.randn(5), torch.rand(5) + 0.1
    truth = {place(at): (mean, variance) for at in "ab"}
    found = {place("a"): torch.zeros(5), place("b"): (mean + 1, variance)}
    alone = inner_distance({place("b"): found[place("b")]}, truth)
    assert float(alone) > 0
    torch.testing.assert_close(inner_distance(found, truth), alone)


def test_the_distance_is_the_mean_divergence_of_gaussians():
    generator = torch.Generator().manual_seed(0)
    true_mean, mean = torch.randn(2, 50, generator=generator)
    true_variance, variance = torch.rand(2, 50, generator=generator) + 0.1
    level = FLOOR * true_variance.mean()
    exact = torch.distributions.kl_divergence(
        torch.distributions.Normal(true_mean, (true_variance + level).sqrt()),
        torch.distributions.Normal(mean, (variance + level).sqrt()),
    ).mean()
    truth = {
        place("a"): (true_mean, true_variance),
        place("b"): (true_mean, torch.zeros(50)),
        place("c"): (true_mean, torch.full((50,), math.inf)),
    }
    torch.testing.assert_close(inner_distance(dict.fromkeys(truth, (mean, variance)), truth), exact)
    assert float(inner_distance(truth, truth)) == pytest.approx(0, abs=1e-6)
    assert float(inner_distance({}, truth)) == 0


@given(scale=st.floats(1e-12, 1e12), true=st.floats(0, 1e6), own=st.floats(0, 1e6))
def test_the_distance_is_finite_and_has_no_unit(scale, true, own):
    """Entries without variance, by either, are no reason for an infinite loss."""
    truth = {place("a"): (torch.zeros(3), torch.tensor([true, 1.0, 0.0]))}
    found = {place("a"): (torch.ones(3), torch.tensor([own, 0.0, 1.0]))}
    scaled = [
        {at: (scale**0.5 * mean, scale * variance) for at, (mean, variance) in each.items()} for each in (found, truth)
    ]
    value = float(inner_distance(found, truth))
    assert math.isfinite(value)
    assert value >= 0
    assert float(inner_distance(*scaled)) == pytest.approx(value, rel=1e-3)


def test_slopes_of_the_loss_are_those_of_finite_differences():
    torch.manual_seed(0)
    model = SmallViT(width=8, depth=1, heads=2).double().eval()
    posterior, images = isotropic(model, 0.1), torch.randn(3, 1, 8, 8, dtype=torch.float64)
    student = Student(SinglePass(model, posterior), images)
    truth = Teacher(model, posterior, 20, inside=True).taught(images, 1)
    assert [at[0] for at in truth.inner] == ["blocks.0.attention", "blocks.0.mlp", "blocks.0"]

    def loss(logs, dampings):
        student.logs, student.dampings = logs, dampings
        return student.loss(truth)

    start = 0.1 * torch.randn(2, len(student.places), dtype=torch.float64)
    assert torch.autograd.gradcheck(loss, tuple(row.clone().requires_grad_() for row in start), atol=1e-5)


def test_parts_stay_closer_to_monte_carlo_than_by_outputs_alone(monkeypatch):
    torch.manual_seed(0)
    model = SmallViT(width=16, depth=2, heads=2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    posterior, images = isotropic(model, 0.2), torch.randn(60, 1, 8, 8)
    truth = Teacher(model, posterior, 200, inside=True).taught(images[40:], 5)
    distances = []
    for weight in (0.0, student_module.INNER):
        monkeypatch.setattr(student_module, "INNER", weight)
        scales = distill(model, posterior, images[:40], n_samples=40, max_steps=40)
        student = Student(SinglePass(model, posterior, scales=scales), images[40:])
        student.inside.take()
        student(images[40:])
        distances.append(float(inner_distance(student.inside.take(), truth.inner).detach()))
    assert distances[1] < 0.9 * distances[0]
