import math

import pytest
import torch
from torch import nn

from bayespass import InvalidInput
from bayespass.posterior.mixture import Mixture
from bayespass.posterior.score_mixture import ScoreVIMixture
from bayespass.posterior.score_sgd import ScoreVISGD

FLAT = 1e-12  # a prior that adds nothing


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


INPUTS = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).double()
TARGETS = INPUTS.sum(1, keepdim=True)


def data_loss(model):
    return (model(INPUTS) - TARGETS).square().mean()


@pytest.mark.parametrize("apart", [0.02, 10.0])
def test_gradients_are_those_of_the_loss(apart):
    """Autograd through q's parameters alone, samples and scores frozen: components that overlap and that do not."""
    model = network()
    starts = [{name: p.detach() + apart * k for name, p in model.named_parameters()} for k in range(3)]
    settings = {"components": 3, "starts": starts, "weights": [0.2, 0.5, 0.3], "init_sd": 0.05, "prior_precision": 2.0}
    method = ScoreVIMixture(model.named_parameters(), lr=1e-3, n_data=20, **settings)
    for component in range(3):
        with method.sampled():
            theta = [p.detach().clone() for p in model.parameters()]
            data_loss(model).backward()
            gradients = [p.grad.clone() for p in model.parameters()]
        found = {p: method._drawn.pop(p) for p in model.parameters()}
        states = [method.state[p] for p in model.parameters()]
        means = [s["means"].clone().requires_grad_() for s in states]
        log_sds = [s["log_sds"].clone().requires_grad_() for s in states]
        points = [t.clone().requires_grad_() for t in theta]
        logits = torch.tensor([0.2, 0.5, 0.3]).double().log()
        for point, mean, log_sd in zip(points, means, log_sds, strict=True):
            logits = logits - (((point - mean) / log_sd.exp()).square() / 2 + log_sd).flatten(1).sum(1)
        scores = torch.autograd.grad(logits.logsumexp(0), points, create_graph=True)
        loss = 0.0
        for score, gradient, t, state in zip(scores, gradients, theta, states, strict=True):
            target = -(20 * gradient + 2.0 * t)
            loss = loss + (state["log_sds"][component].exp().square() * (score - target).square()).sum() / 2
        expected = torch.autograd.grad(loss / 20, [*means, *log_sds])
        for index, parameter in enumerate(model.parameters()):
            _, by_mean, by_sd = found[parameter]
            torch.testing.assert_close(by_mean, expected[index], rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(by_sd, expected[index + 4], rtol=1e-6, atol=1e-8)


class Bimodal(nn.Module):
    """-log (.3 N(-3, .5^2) + .7 N(3, .5^2)), as a mean loss over one datum."""

    def __init__(self, start):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([start]))

    def forward(self):
        logits = torch.stack(
            [-2 * (self.weight + 3).square() + math.log(0.3), -2 * (self.weight - 3).square() + math.log(0.7)]
        )
        return -logits.logsumexp(0).sum()


def train(method, model, steps):
    for _ in range(steps):
        with method.sampled():
            model().backward()
        method.step()
    return method.posterior()


def test_two_components_find_both_modes_and_one_finds_one():
    """One Gaussian keeps to a mode; two cover both with the right widths, each mode's mass being given, not learned."""
    model = Bimodal(0.2)
    starts = [{"weight": torch.tensor([-1.5])}, {"weight": torch.tensor([1.0])}]
    both = ScoreVIMixture(model.named_parameters(), lr=5e-3, n_data=1, starts=starts, init_sd=0.5, prior_precision=FLAT)
    posterior = train(both, model, 4000)
    assert isinstance(posterior, Mixture)
    means = sorted(float(part.mean["weight"]) for part in posterior.components)
    assert means == pytest.approx([-3, 3], abs=0.1)
    for part in posterior.components:
        assert float(part.variance["weight"]) == pytest.approx(0.25, rel=0.15)
    assert list(posterior.weights) == [0.5, 0.5]
    model = Bimodal(1.0)
    one = ScoreVISGD(model.named_parameters(), lr=5e-3, n_data=1, init_sd=0.5, prior_precision=FLAT, inner=1)
    alone = train(one, model, 4000)
    assert float(alone.mean["weight"]) == pytest.approx(3, abs=0.2)
    assert float(alone.variance["weight"]) == pytest.approx(0.25, rel=0.2)


def test_resumes_bit_for_bit():
    straight, half = network(), network()
    settings = {"lr": 1e-3, "n_data": 20, "components": 3}
    method, other = (ScoreVIMixture(model.named_parameters(), **settings) for model in (straight, half))

    def steps(model, method, count):
        for _ in range(count):
            with method.sampled():
                data_loss(model).backward()
            method.step()

    steps(straight, method, 10)
    steps(half, other, 5)
    resumed = network(seed=3)
    again = ScoreVIMixture(resumed.named_parameters(), **{**settings, "seed": 5})
    resumed.load_state_dict(half.state_dict())
    again.load_state_dict(other.state_dict())
    steps(resumed, again, 5)
    for one, two in zip(method.posterior().components, again.posterior().components, strict=True):
        assert all(torch.equal(one.mean[name], two.mean[name]) for name in one.names)
        assert all(torch.equal(one.variance[name], two.variance[name]) for name in one.names)


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"components": 1}, "components"), ({"weights": [0.5, 0.6]}, "weights"), ({"starts": []}, "starts"), ({"starts": [{}, {}]}, r"starts\[0\]")],
)  # fmt: skip
def test_bad_settings_name_themselves(settings, match):
    with pytest.raises(InvalidInput, match=match):
        ScoreVIMixture(network().named_parameters(), lr=1e-3, n_data=20, **settings)
