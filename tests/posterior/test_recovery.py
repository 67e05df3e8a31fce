"""Every training method finds the posterior that is known in closed form.

The reverse-KL mean-field optimum of a Gaussian target has the exact mean and precision Lambda_ii (not
1 / Sigma_ii). Averages over the second half of a run remove the noise of the last step, which is
what the tolerances are about: the bias of each method.
"""

import math
from dataclasses import replace

import pytest
import torch
from methods import METHODS, Chains, regression_method, run
from problems import linear_regression
from torch import nn

from bayespass import Laplace
from bayespass.posterior.elbo import MeanFieldVI
from bayespass.posterior.ivon import IVON
from bayespass.posterior.score_matching import ScoreVI, closed_form, precision_ratio
from bayespass.posterior.score_sgd import ScoreVISGD

MEAN_FIELD = [name for name in METHODS if name != "score_vi_kron"]
FULL = linear_regression(n=400, d=5)
BATCHED = linear_regression(n=1000, d=5)


ONES = torch.ones(5, dtype=torch.float64)


def in_sd(error, precision):
    """The largest error in standard deviations of the mean-field optimum."""
    return float((error * precision.sqrt()).abs().max())


@pytest.mark.parametrize("name", MEAN_FIELD)
def test_conjugate_regression_full_batch(name):
    chains = Chains(FULL, offset=0.01)
    precision, mean = run(chains, regression_method(name, chains, FULL), 3000)
    truth = FULL.precision.diagonal().double()
    torch.testing.assert_close(precision / truth, ONES, rtol=0, atol=0.07 if name.startswith("ivon") else 0.05)
    assert in_sd(mean - FULL.mean, truth) < 0.1


@pytest.mark.parametrize("name", MEAN_FIELD)
def test_conjugate_regression_in_minibatches(name):
    """N / B = 20. One draw per step of IVON leaves its upward bias of 1 %."""
    chains = Chains(BATCHED, offset=0.01)
    precision, mean = run(chains, regression_method(name, chains, BATCHED), 4000, batch=50)
    ratio = precision / BATCHED.precision.diagonal()
    low, high = (0.85, 1.2) if name == "ivon" else (0.9, 1.1)
    assert float(ratio.min()) > low
    assert float(ratio.max()) < high
    assert in_sd(mean - BATCHED.mean, BATCHED.precision.diagonal()) < 1


def test_kronecker_basis_finds_the_full_covariance():
    """The basis of the inputs' covariance diagonalises the posterior: the marginals are Sigma_ii, not 1 / Lambda_ii."""
    chains = Chains(FULL, 1)
    method = regression_method("score_vi_kron", chains, FULL, basis_every=50, lr=0.02, precision_lr=1e-3)
    run(chains, method, 6000)
    posterior = method.posterior()
    covariance = torch.linalg.inv(FULL.precision)
    assert float((covariance.diagonal() * FULL.precision.diagonal()).max()) > 1.5  # the two differ here
    draws = torch.cat([draw["weight"] for draw in posterior.sample(20_000, 0)])
    scale = covariance.diagonal().sqrt()
    torch.testing.assert_close(posterior.variance["weight"][0] / scale**2, torch.ones(5), rtol=0, atol=0.12)
    outer = scale * scale[:, None]
    torch.testing.assert_close(torch.cov(draws.T) / outer, covariance / outer, rtol=0, atol=0.12)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("name", [*MEAN_FIELD, "laplace"])
def test_one_scale_for_all(name, temperature):
    """The same (N, a0, T) is the same tempered posterior from every method: precision (N h + a0) / T."""
    problem = replace(FULL, prior_precision=40.0 if name == "ivon" else 1000.0)  # its price keeps the prior's noise
    if name == "laplace":
        model = problem.model().eval()
        with torch.no_grad():
            model.weight.copy_(problem.mean[None])
        scale = {"prior_precision": 1000.0, "temperature": temperature, "sigma_noise": problem.sigma_noise}
        posterior = Laplace(model, "regression", **scale).fit([(problem.inputs, problem.targets)]).posterior()
        precision, mean = 1 / posterior.variance["weight"][0].double(), posterior.mean["weight"][0]
    else:
        chains = Chains(problem)
        width = {"hess_init": 5.0} if name.startswith("ivon") else {"init_sd": 0.02 * temperature**0.5}
        method = regression_method(name, chains, problem, temperature=temperature, **width)
        precision, mean = run(chains, method, 3000)
    truth = problem.precision.diagonal().double() / temperature
    torch.testing.assert_close(precision / truth, ONES, rtol=0, atol=0.07)
    assert in_sd(mean - problem.mean, truth) < 0.15


class Quadratic(nn.Module):
    """-log pi = (theta - mu)^T Lambda (theta - mu) / 2, as a mean loss over one datum without prior."""

    def __init__(self, precision, start):
        super().__init__()
        self.weight = nn.Parameter(start.clone())
        self.register_buffer("precision", precision)

    def forward(self):
        return (self.weight @ self.precision * self.weight).sum() / 2


RHO = torch.linalg.inv(torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64))
FLAT = 1e-12  # a prior that adds nothing


@pytest.mark.parametrize("name", ["score_vi_pairs", "score_vi_sgd", "elbo", "elbo_stl", "ivon_pairs"])
def test_samples_carry_no_gradient(name):
    """v Lambda_ii = 1. Differentiating through the samples (the Fisher divergence) would give 1 / sqrt((Lambda^2)_ii)."""
    model = Quadratic(RHO, torch.zeros(32, 2, dtype=torch.float64))
    settings = {} if "elbo" in name or "sgd" in name else {"lr": 0.01}
    start = {"hess_init": 3.0} if name.startswith("ivon") else {"init_sd": 0.5}
    method = METHODS[name](model.named_parameters(), n_data=1, prior_precision=FLAT, **(settings | start))
    total = 0.0
    for step in range(3000):
        for _ in range(method.n_samples):
            with method.sampled():
                model().backward()
        method.step()
        if step >= 1000:
            total = total - method.posterior().variance["weight"].log().mean(0) / 2000
    precision = total.double().exp()
    torch.testing.assert_close(precision / RHO.diagonal(), torch.ones(2, dtype=torch.float64), rtol=0, atol=0.03)
    wrong = (RHO @ RHO).diagonal().sqrt()
    assert float(((precision - wrong) / wrong).abs().min()) > 0.15


def test_one_inner_step_is_sticking_the_landing():
    """Score matching with W = v_t is the STL gradient of the ELBO for m and twice it for log sigma, to 1e-12."""
    problem = linear_regression(dtype=torch.float64)
    gradients = {}
    for cls, options in ((MeanFieldVI, {"gradient": "stl"}), (ScoreVISGD, {"inner": 1}), (ScoreVISGD, {"inner": 5})):
        model = Chains(problem, 1, offset=0.05)
        scale = {"lr": 1e-3, "n_data": 400, "prior_precision": 2.0, "init_sd": 0.03, "seed": 7}
        method = cls(model.named_parameters(), **scale, **options)
        with method.sampled():
            model.loss().backward()
        _, first, second = method._drawn[model.weight]
        gradients[cls.__name__, options.get("inner", 1)] = first, second
    stl, one, lagged = gradients["MeanFieldVI", 1], gradients["ScoreVISGD", 1], gradients["ScoreVISGD", 5]
    for found in (one, lagged):  # the lagged copy is the present q in the first inner step
        torch.testing.assert_close(found[0], stl[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(found[1], 2 * stl[1], rtol=0, atol=1e-12)


def test_sticking_the_landing_matches_autograd():
    """The residual is the gradient of log q(theta) - log pi(theta) through the draw alone, over N / T."""
    problem = linear_regression(dtype=torch.float64)
    model = Chains(problem, 1, offset=0.05)
    scale = {"n_data": 400, "prior_precision": 2.0, "temperature": 0.5}
    method = MeanFieldVI(model.named_parameters(), lr=1e-3, init_sd=0.03, gradient="stl", **scale)
    state = method.state[model.weight]
    mean, log_sd = model.weight.detach().clone().requires_grad_(), state["log_sd"].clone().requires_grad_()
    standard = torch.randn(1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theta = mean + log_sd.exp() * standard
    data = (problem.inputs @ theta.T - problem.targets).square().sum() / (2 * problem.sigma_noise**2)
    energy = (data + problem.prior_precision * theta.square().sum() / 2) / 0.5
    log_q = torch.distributions.Normal(mean.detach(), log_sd.detach().exp()).log_prob(theta).sum()
    by_mean, by_sd = torch.autograd.grad(log_q + energy, [mean, log_sd])
    draw = theta.detach()
    method._move = lambda parameter, *_: parameter.copy_(draw)
    with method.sampled():
        model.loss().backward()
    _, first, second = method._drawn[model.weight]
    torch.testing.assert_close(first * 800, by_mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(second * 800, by_sd, rtol=1e-8, atol=1e-8)


def test_the_proximal_term_is_the_gradient_of_its_divergence():
    """Zero at the lagged copy, and elsewhere the autograd gradient of prox KL(q_t || q)."""
    problem = linear_regression(dtype=torch.float64)
    model = Chains(problem, 1)
    method = ScoreVISGD(model.named_parameters(), lr=1e-3, n_data=400, init_sd=0.03, prox=3.0, inner=5)
    state = method.state[model.weight]
    first, second = torch.zeros(1, 5, dtype=torch.float64), torch.zeros(1, 5, dtype=torch.float64)
    method._add_proximal(model.weight, first, second)
    torch.testing.assert_close(first, torch.zeros_like(first), rtol=0, atol=0)
    torch.testing.assert_close(second, torch.zeros_like(second), rtol=0, atol=1e-15)
    with torch.no_grad():
        model.weight.add_(0.02)
        state["log_sd"].add_(0.3)
    method._add_proximal(model.weight, first, second)
    mean, log_sd = model.weight.detach().clone().requires_grad_(), state["log_sd"].clone().requires_grad_()
    lagged = torch.distributions.Normal(state["lagged_mean"], state["lagged_log_sd"].exp())
    divergence = torch.distributions.kl_divergence(lagged, torch.distributions.Normal(mean, log_sd.exp())).sum()
    by_mean, by_sd = torch.autograd.grad(3.0 * divergence / 400, [mean, log_sd])
    torch.testing.assert_close(first, by_mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(second, by_sd, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eta", [1e-7, 2.5e-6, 1e-3, 0.1, 10.0])
def test_the_precision_stays_positive(eta, dtype):
    curvature = torch.cat([-torch.logspace(6, -6, 49), torch.zeros(1), torch.logspace(-6, 6, 49)]).to(dtype)
    ratio = precision_ratio(curvature, eta)
    assert torch.isfinite(ratio).all()
    assert (ratio > 0).all()
    exact = precision_ratio(curvature.double(), eta)
    torch.testing.assert_close(ratio.double(), exact, rtol=2e-6 if dtype == torch.float32 else 1e-12, atol=0)
    assert precision_ratio(torch.ones(1, dtype=dtype), eta).item() == 1.0


@pytest.mark.parametrize("pull", [1.0, 50.0])
@pytest.mark.parametrize("eta", [1e-6, 1e-3, 0.02, 0.3])
@pytest.mark.parametrize("coupled", [False, True])
def test_the_closed_form_is_the_minimiser(eta, coupled, pull):
    """Zero gradient of v (v (p - h)^2 + (delta - g)^2) + (v p - ln p + delta^2 / p) / (2 eta), by autograd."""
    generator = torch.Generator().manual_seed(3)
    score, variance = (
        pull * torch.randn(20, generator=generator).double(),
        torch.rand(20, generator=generator).double() + 0.1,
    )
    curvature = 1 + 2 * torch.randn(20, generator=generator).double()
    moved, ratio = closed_form(score, curvature, variance, eta, eta, coupled=coupled)
    step, precision = moved.clone().requires_grad_(), (ratio / variance).requires_grad_()
    delta = precision.detach() * step if coupled is False else precision * step
    match = variance * (variance * (precision - curvature / variance).square() + (precision * step - score).square())
    if not coupled:  # each of the two alone, the other's share of the terms left out
        by_mean = variance * (delta - score).square() + delta.square() / precision.detach() / (2 * eta)
        by_precision = (variance * precision - curvature).square() + (variance * precision - precision.log()) / (
            2 * eta
        )
        gradients = [*torch.autograd.grad(by_mean.sum(), step), *torch.autograd.grad(by_precision.sum(), precision)]
    else:
        penalty = (variance * precision - precision.log() + (precision * step).square() / precision) / (2 * eta)
        gradients = [g for g in torch.autograd.grad((match + penalty).sum(), [step, precision])]
    scale = 1 / (2 * eta) + float(match.detach().abs().max())
    bound = 1e-9
    for gradient in gradients:
        assert float(gradient.abs().max()) / scale < bound


@pytest.mark.parametrize(("eta", "temperature"), [(0.003, 1.0), (0.001, 1.0), (0.001, 0.2)])
def test_coupled_bias_law(eta, temperature):
    """v Lambda_ii = 1 / (1 + eta N / (T B)) under minibatch noise, within 5 %; N / B = 31."""
    problem = linear_regression(n=1000, d=10)
    chains = Chains(problem)
    scale = {"lr": eta, "batch_size": 32, "coupled": True, "antithetic": True}
    scale |= {"temperature": temperature, "init_sd": 0.015 * temperature**0.5}
    with pytest.warns(UserWarning, match="too small by"):
        method = regression_method("score_vi", chains, problem, **scale)
    ratios = []
    for step in range(3000):
        for _ in range(2):
            with method.sampled():
                chains.loss(32, torch.Generator().manual_seed(step)).backward()
        method.step()
        if step >= 1000:
            ratios.append(float((method.posterior().variance["weight"] * problem.precision.diagonal()).log().mean()))
    ratio = math.exp(sum(ratios) / len(ratios)) / temperature
    assert abs(ratio * (1 + eta * 1000 / 32 / temperature) - 1) < 0.05


def test_price_estimator_and_its_noise():
    """E[f] = diagonal Hessian of the mean loss; one draw's relative sd is sqrt(N / B + 2), pairs on one batch 4x less."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1000, 3, generator=generator)
    targets = inputs.sum(1, keepdim=True) + 0.5 * torch.randn(1000, 1, generator=generator)
    problem = replace(BATCHED, inputs=inputs, targets=targets, prior_precision=1e-3)
    spread = {}
    for antithetic in (False, True):
        chains = Chains(problem, 2000)
        method = regression_method("ivon", chains, problem, antithetic=antithetic)
        truth = inputs.square().mean(0) / problem.sigma_noise**2
        method.state[chains.weight]["hessian"].copy_(truth.expand(2000, 3))
        estimates = []
        for step in range(20):
            for draw in range(2):
                with method.sampled():
                    chains.loss(10, torch.Generator().manual_seed(2 * step + draw * (not antithetic))).backward()
            _, _, product = method._drawn.pop(chains.weight)
            estimates.append(1000 * (truth + 1e-6) * product)
        estimates = torch.cat(estimates)
        error = (estimates.mean(0) - truth) / (estimates.std(0) / math.sqrt(len(estimates)))
        assert float(error.abs().max()) < 3
        spread[antithetic] = float((estimates.std(0) / truth).mean())
    assert abs(spread[False] / math.sqrt((1000 / 10 + 2) / 2) - 1) < 0.1
    assert spread[True] < spread[False] / 4


@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_bias_law_of_ivon(temperature):
    """E[H] / Lambda = 1 + (1 - b2) / 2 (N / (T B) + 2) within 5 % at b2 = .99, N / B = 31."""
    problem = linear_regression(n=1000, d=10)
    chains = Chains(problem)
    method = regression_method("ivon", chains, problem, betas=(0.9, 0.99), lr=0.005, temperature=temperature)
    total = 0.0
    for step in range(3000):
        with method.sampled():
            chains.loss(32, torch.Generator().manual_seed(step)).backward()
        method.step()
        if step >= 1000:
            total += float((1 / method.posterior().variance["weight"] / problem.precision.diagonal()).mean()) / 2000
    assert abs(total * temperature / (1 + 0.01 / 2 * (1000 / 32 / temperature + 2)) - 1) < 0.05


def test_local_reparametrisation_has_the_same_expected_gradient_and_less_noise():
    """Independent weights seen row by row: equal means, on a batch far smaller spread of the log-sd gradient."""
    problem = linear_regression(n=200, d=5)
    found = {}
    for local in (False, True):
        model = problem.model()
        with torch.no_grad():
            model.weight.copy_(problem.mean + 0.05)
        scale = {"lr": 1e-3, "n_data": 200, "prior_precision": 2.0, "init_sd": 0.1}
        method = MeanFieldVI(model.named_parameters(), **scale, local=model if local else None)
        draws = []
        for _ in range(4000):
            with method.sampled():
                problem.loss(model).backward()
            _, first, second = method._drawn.pop(model.weight)
            draws.append(torch.cat([first[0], second[0]]))
        found[local] = torch.stack(draws)
    difference = found[True].mean(0) - found[False].mean(0)
    error = ((found[True].var(0) + found[False].var(0)) / 4000).sqrt()
    assert float((difference / error).abs().max()) < 4
    assert float((found[True].std(0) / found[False].std(0)).max()) < 0.5


def test_squared_gradients_estimate_the_empirical_fisher():
    """B times the squared mean gradient, at the optimum: the factor that turns it into per-example squares."""
    problem = BATCHED
    chains = Chains(problem, 2000)
    method = regression_method("ivon", chains, problem, hess_approx="gradsq", batch_size=20, hess_init=1e6)
    residual = (problem.inputs @ problem.mean[:, None] - problem.targets) / problem.sigma_noise**2
    fisher = (residual * problem.inputs).square().mean(0)
    with method.sampled():
        chains.loss(20, torch.Generator().manual_seed(0)).backward()
    _, _, square = method._drawn.pop(chains.weight)
    estimates = 20 * square
    error = (estimates.mean(0) - fisher) / (estimates.std(0) / math.sqrt(2000))
    assert float(error.abs().max()) < 3
    hessian = {}
    for approximation in ("price", "gradsq"):  # and h converges to it
        chains = Chains(problem)
        method = regression_method("ivon", chains, problem, hess_approx=approximation, batch_size=20, lr=1e-3)
        run(chains, method, 3000, batch=20)
        hessian[approximation] = method.state[chains.weight]["hessian"].mean(0)
    assert float((hessian["gradsq"] / fisher).sub(1).abs().max()) < 0.25
    assert (
        float((hessian["price"] * problem.sigma_noise**2 / problem.inputs.square().mean(0)).sub(1).abs().max()) < 0.25
    )


def test_a_warm_start_takes_adams_moments():
    """After Adam on an ill-scaled problem h is the empirical Fisher, which orders the axes right from the first step."""
    problem = linear_regression(n=1000, d=5)
    inputs = problem.inputs * torch.tensor([0.2, 0.5, 1.0, 2.0, 5.0])
    model = nn.Linear(5, 1, bias=False)
    adam = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        rows = torch.randint(1000, (20,), generator=generator)
        adam.zero_grad()
        ((model(inputs[rows]) - problem.targets[rows]).square().mean() / (2 * 0.25)).backward()
        adam.step()
    method = IVON(model.named_parameters(), lr=0.1, n_data=1000).warm_start(adam, batch_size=20)
    hessian = inputs.square().mean(0) / 0.25
    ratio = method.state[model.weight]["hessian"][0] / hessian
    assert 0.4 < float(ratio.min()) <= float(ratio.max()) < 2.5
    assert float(method.state[model.weight]["step"]) == 2000


@pytest.mark.parametrize("name", ["score_vi", "score_vi_sgd"])
def test_a_far_start_warns(name):
    chains = Chains(FULL, 1, offset=20.0)
    method = regression_method(name, chains, FULL, antithetic=False, n_samples=1)
    with method.sampled():
        chains.loss().backward()
    with pytest.warns(UserWarning, match="far from the optimum"):
        method.step()


def test_a_biased_rate_warns():
    with pytest.warns(UserWarning, match="biases the variance"):
        ScoreVI(FULL.model().named_parameters(), lr=0.01, n_data=400, precision_lr=0.01, batch_size=100)
    with pytest.warns(UserWarning, match="moves the precision by more than half"):
        ScoreVI(
            FULL.model().named_parameters(), lr=0.01, n_data=400, precision_lr=5e-3, batch_size=50, temperature=1e-3
        )
    with pytest.warns(UserWarning, match="holds the mean back"):
        ScoreVISGD(FULL.model().named_parameters(), lr=0.01, n_data=400, prox=1e6)
