import pytest
import torch
from problems import linear_regression
from torch import nn

from bayespass import InvalidInput, NotFitted
from bayespass.posterior.empirical import Empirical
from bayespass.posterior.sgld import SGLD, cyclical_lr

CURVATURE = torch.tensor([1.0, 4.0, 10.0])  # of the mean loss, N = 10
CENTRE = torch.tensor([0.5, -1.0, 2.0])


class Chains(nn.Module):
    """Many independent chains on one quadratic, as one parameter."""

    def __init__(self, copies=2000):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(copies, 3))

    def loss(self):
        return 0.5 * (CURVATURE * (self.weight - CENTRE).square()).sum()


def run(model, method, steps):
    for _ in range(steps):
        method.zero_grad()
        model.loss().backward()
        method.step()
        method.collect()
    return method


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_variance_on_a_quadratic(temperature):
    """Precision (10 h + a0) / T, times the stated discretisation 1 / (1 - lr lambda / 4): ratio 1 +- 0.05."""
    model, precision = Chains(), 10 * CURVATURE + 2
    lr = 0.4 / float(precision.max())
    method = SGLD(model.named_parameters(), lr, 10, 2.0, temperature, burn_in=600, thin=100)
    states = torch.cat([member["weight"] for member in run(model, method, 2600).posterior().members])
    expected = temperature / precision / (1 - lr * precision / 4)
    ratio = states.var(0) / expected
    assert states.shape == (40_000, 3)
    assert (ratio - 1).abs().max() < 0.05
    assert abs(ratio[2] * (1 / (1 - lr * precision[2] / 4)) - 1) > 0.05  # uncorrected, the last would not pass
    standard_error = (
        expected / len(states)
    ).sqrt() * 1.3  # states 100 steps apart are still correlated along the first
    assert ((states.mean(0) - 10 * CURVATURE * CENTRE / precision).abs() < 5 * standard_error).all()


def test_recovers_conjugate_regression():
    """One chain, its time average: mean within 0.3 sd and the true marginal variances, correlations included."""
    problem = linear_regression(n=100, d=3, dtype=torch.float64)
    model = problem.model()
    lr = 0.2 / float(torch.linalg.eigvalsh(problem.precision).max())
    method = SGLD(
        model.named_parameters(),
        lr,
        n_data=100,
        prior_precision=problem.prior_precision,
        likelihood="regression",
        sigma_noise=problem.sigma_noise,
        burn_in=500,
        thin=2,
    )
    for _ in range(15_000):
        method.zero_grad()
        problem.loss(model).backward()
        method.step()
        method.collect()
    posterior = method.posterior()
    covariance = torch.linalg.inv(problem.precision)
    sd = covariance.diagonal().sqrt()
    assert ((posterior.mean["weight"].squeeze() - problem.mean).abs() / sd).max() < 0.3
    ratio = posterior.variance["weight"].squeeze() / covariance.diagonal()
    assert (ratio > 0.8).all()
    assert (ratio < 1.25).all()
    assert isinstance(posterior, Empirical)
    assert posterior.info.sigma_noise == problem.sigma_noise


def test_momentum_is_refused():
    with pytest.raises(InvalidInput, match=r"1 / \(1 - momentum\), here 10"):
        SGLD(Chains(1).named_parameters(), 0.1, 10, momentum=0.9)


def test_burn_in_and_thinning():
    model = Chains(1)
    method = SGLD(model.named_parameters(), 1e-3, 10, burn_in=4, thin=3)
    kept = []
    for step in range(1, 15):
        method.zero_grad()
        model.loss().backward()
        method.step()
        if method.collect():
            kept.append(step)
        assert not method.collect()  # one state is kept once
    assert kept == [7, 10, 13]
    assert len(method.posterior().members) == 3


def test_a_centred_prior():
    """Without data the chain samples the prior, around its own centre."""
    centre = torch.tensor([5.0, 0.0, -5.0])
    model = Chains()
    method = SGLD(model.named_parameters(), 0.2, 10, 2.0, prior_mean={"weight": centre.expand(2000, 3)})
    for _ in range(150):
        model.weight.grad = torch.zeros_like(model.weight)
        method.step()
    expected = 0.5 / (1 - 0.2 * 2 / 4)
    assert ((model.weight.mean(0) - centre).abs() < 5 * (expected / 2000) ** 0.5).all()
    assert (model.weight.var(0) / expected - 1).abs().max() < 5 * (2 / 2000) ** 0.5


def test_resuming_is_exact():
    whole, first, second = Chains(5), Chains(5), Chains(5)
    settings = {"lr": 1e-2, "n_data": 10, "burn_in": 3, "thin": 2}
    expected = run(whole, SGLD(whole.named_parameters(), prior_mean="initial", **settings), 20).posterior()
    half = run(first, SGLD(first.named_parameters(), prior_mean="initial", **settings), 10)
    second.load_state_dict(first.state_dict())
    resumed = SGLD(second.named_parameters(), **settings)
    resumed.load_state_dict(half.state_dict())
    found = run(second, resumed, 10).posterior()
    assert torch.equal(second.weight, whole.weight)
    assert len(found.members) == len(expected.members)
    assert torch.equal(found.variance["weight"], expected.variance["weight"])


def test_closures_groups_and_schedulers():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].bias.requires_grad_(False)
    groups = [
        {"params": list(model[0].named_parameters("0")), "lr": 1e-3},
        {"params": list(model[1].named_parameters("1")), "prior_precision": 5.0},
    ]
    method = SGLD(groups, 1e-4, 10)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(method, 0.5)

    def closure():
        method.zero_grad()
        loss = model(torch.ones(3, 2)).square().mean()
        loss.backward()
        return loss

    before = model[0].bias.clone()
    assert method.step(closure) >= 0
    scheduler.step()
    assert [group["lr"] for group in method.param_groups] == [5e-4, 5e-5]
    assert method.collect()
    assert method.posterior().names == ("0.weight", "1.weight", "1.bias")
    assert torch.equal(model[0].bias, before)


def test_mistakes_are_named():
    model = Chains(1)
    with pytest.raises(InvalidInput, match="needs names"):
        SGLD(model.parameters(), 0.1, 10)
    with pytest.raises(InvalidInput, match="no parameter requires a gradient"):
        SGLD(Chains(1).requires_grad_(False).named_parameters(), 0.1, 10)
    with pytest.raises(InvalidInput, match=r"weight by steps far below what torch\.bfloat16 resolves"):
        SGLD(Chains(1).bfloat16().named_parameters(), 0.1, 10)
    for bad in ({"lr": 0.0}, {"thin": 0}, {"burn_in": -1}, {"n_data": 0}, {"temperature": 0.0}):
        with pytest.raises(InvalidInput, match=next(iter(bad))):
            SGLD(model.named_parameters(), **({"lr": 0.1, "n_data": 10} | bad))
    with pytest.raises(InvalidInput, match="prior_mean of weight has shape"):
        SGLD(model.named_parameters(), 0.1, 10, prior_mean={"weight": torch.zeros(2)})
    method = SGLD(model.named_parameters(), 0.1, 10)
    with pytest.raises(NotFitted, match="no gradient to step on"):
        method.step()
    with pytest.raises(NotFitted, match="kept no state in 0 steps"):
        method.posterior()
    model.weight.grad = torch.full_like(model.weight, torch.nan)
    with pytest.raises(InvalidInput, match="gradient of weight is NaN"):
        method.step()


def two_modes(place, sd=0.5, mode=3.0):
    """Gradient of -log(N(-mode, sd^2) + N(mode, sd^2))."""
    share = torch.sigmoid(2 * mode * place / sd**2)
    return ((place + mode) * (1 - share) + (place - mode) * share) / sd**2


def wander(method, model, gradient, steps):
    for _ in range(steps):
        model.weight.grad = gradient(model.weight.detach())
        method.step()
        method.collect()
    return torch.stack([member["weight"] for member in method.posterior().members])


class Places(nn.Module):
    """500 independent chains in one dimension."""

    def __init__(self, start):
        super().__init__()
        self.weight = nn.Parameter(torch.full((500,), start))


def test_cycles_visit_both_modes():
    """No barrier of e^-18 is crossed at a constant small step; the restarts cross it, and sample inside a mode."""
    flat = {"n_data": 1, "prior_precision": 1e-9}
    model = Places(-3.0)
    plain = wander(SGLD(model.named_parameters(), 0.1, burn_in=10, thin=10, **flat), model, two_modes, 1000)
    assert (plain < 0).all()
    model = Places(-3.0)
    method = SGLD(model.named_parameters(), 1.2, cycle=100, exploration=0.3, thin=70, **flat)
    states = wander(method, model, two_modes, 1000)
    assert states.shape == (10, 500)
    right = states > 0
    assert (right.any(0) & (~right).any(0)).float().mean() > 0.9
    assert 0.3 < right.float().mean() < 0.7
    assert abs((states.abs() - 3).std() / 0.5 - 1) < 0.08  # 1% standard error; and a little of the finite step


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_cycles_sample_a_gaussian(temperature):
    """Ends of cycles have the variance T / lambda within 5%, the halves of the stage before them within 8%."""
    precision, n = 4.0, 10

    def gradient(place):
        return (precision - 2) / n * (place - 1)  # the prior adds 2 around its own centre

    for thin, tolerance in ((150, 0.05), (75, 0.08)):
        model = Places(0.0)
        method = SGLD(
            model.named_parameters(), 0.1, n, 2.0, temperature, {"weight": torch.ones(500)}, 200, thin,
            cycle=200, exploration=0.25,
        )  # fmt: skip
        states = wander(method, model, gradient, 4200)
        assert states.shape == (20 * 150 // thin, 500)
        assert abs((states - 1).square().mean() * precision / temperature - 1) < tolerance
        assert abs(states.mean() - 1) < 5 * (temperature / precision / states.numel()) ** 0.5


def test_exploration_is_without_noise_and_only_the_rest_is_kept():
    model = Places(0.0)
    method = SGLD(model.named_parameters(), 0.4, 1, 1e-9, burn_in=10, thin=2, cycle=10, exploration=0.5)
    kept = []
    for step in range(30):
        model.weight.grad = model.weight.detach() - 1
        before = model.weight.detach().clone()
        method.step()
        expected = before - 0.5 * cyclical_lr(step, 10, 0.4) * (before - 1)
        exact = torch.allclose(model.weight, expected, atol=1e-6)
        assert exact == (step % 10 < 5)
        if method.collect():
            kept.append(step)
    assert kept == [16, 18, 26, 28]
    assert method.posterior().info.settings["cycle"] == 10
    assert method.posterior().info.settings["exploration"] == 0.5


def test_the_learning_rate_restarts():
    rates = [cyclical_lr(step, 5, 2.0) for step in range(11)]
    assert rates[0] == rates[5] == rates[10] == 2.0
    assert rates[:5] == sorted(rates[:5], reverse=True)
    assert 0 < rates[4] < 0.2
    assert sum(cyclical_lr(step, 1000, 1.0) for step in range(1000)) == pytest.approx(500.5)


def test_resuming_inside_a_cycle_is_exact():
    whole, first, second = Chains(5), Chains(5), Chains(5)
    settings = {"lr": 1e-2, "n_data": 10, "burn_in": 3, "thin": 2, "cycle": 8, "exploration": 0.4}
    expected = run(whole, SGLD(whole.named_parameters(), **settings), 30).posterior()
    half = run(first, SGLD(first.named_parameters(), **settings), 13)
    second.load_state_dict(first.state_dict())
    resumed = SGLD(second.named_parameters(), **settings)
    resumed.load_state_dict(half.state_dict())
    found = run(second, resumed, 17).posterior()
    assert torch.equal(second.weight, whole.weight)
    assert len(found.members) == len(expected.members) > 4
    assert torch.equal(found.variance["weight"], expected.variance["weight"])


def test_mistakes_in_cycles_are_named():
    model = Chains(1)
    for bad, match in (
        ({"cycle": 0}, "cycle must be a whole number"),
        ({"cycle": 2.5}, "cycle must be a whole number"),
        ({"cycle": 10, "exploration": 1.0}, r"exploration must lie in \[0, 1\)"),
        ({"cycle": 10, "exploration": -0.1}, r"exploration must lie in \[0, 1\)"),
        ({"cycle": 10, "thin": 8}, "no state would be kept: thin=8, but 7 of the 10 steps of a cycle sample"),
    ):
        with pytest.raises(InvalidInput, match=match):
            SGLD(model.named_parameters(), 0.1, 10, **bad)
