import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import linear_regression
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from bayespass import IVON, DiagonalGaussian, InvalidInput, NotFitted

PROBLEM = linear_regression()
GOLDEN_MEAN = [-1.0980363656581027, -0.9303284342466941, 1.0237838281995377]
GOLDEN_VARIANCE = [0.005855190525016137, 0.005204006432234551, 0.005199121302986892]


def method_for(model, **settings):
    defaults = {"lr": 0.05, "n_data": len(PROBLEM.inputs), "prior_precision": PROBLEM.prior_precision, "hess_init": 5.0}
    defaults |= {"betas": (0.9, 0.999), "likelihood": "regression", "sigma_noise": PROBLEM.sigma_noise}
    return IVON(model.named_parameters(), **(defaults | settings))


def run(model, method, steps, batch=None, generator=None):
    for _ in range(steps):
        rows = slice(None) if batch is None else torch.randint(len(PROBLEM.inputs), (batch,), generator=generator)
        with method.sampled():
            PROBLEM.loss(model, rows).backward()
        method.step()


def test_one_step_matches_the_equations_by_hand():
    model = PROBLEM.model().double()
    problem = linear_regression(dtype=torch.float64)
    n, a0, h0, lr, (b1, b2), t = len(problem.inputs), 2.0, 5.0, 0.05, (0.9, 0.99), 0.5
    method = method_for(model, temperature=t, betas=(b1, b2), clip_radius=0.01)
    gradients, noises = [], []
    for _ in range(2):  # two samples, one step
        with method.sampled():
            noises.append(model.weight.detach().clone())  # the mean is zero
            problem.loss(model).backward()
            gradients.append(model.weight.grad.clone())
    method.step()
    delta, weight = a0 / n, n / t
    g = torch.stack(gradients).mean(0)
    price = weight * (h0 + delta) * (torch.stack(noises) * torch.stack(gradients)).mean(0)
    h = b2 * h0 + (1 - b2) * price + 0.5 * (1 - b2) ** 2 * (h0 - price) ** 2 / (h0 + delta)
    update = (((1 - b1) * g) / (1 - b1)) / (h + delta)
    expected = -lr * (h0 + delta) * update.clamp(-0.01, 0.01)
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(
        method.posterior().variance["weight"], (1 / (weight * (h + delta))).float(), rtol=1e-5, atol=0
    )


@given(hessian=st.floats(-0.9, 1e6), price=st.floats(-1e8, 1e8), beta=st.floats(0, 0.99999), delta=st.floats(1.0, 10.0))
def test_the_precision_never_halves(hessian, price, beta, delta):
    """H_new = H (1 - u + u^2 / 2) >= H / 2 for any estimate, so the variance stays positive."""
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    settings = {"lr": 1e-9, "n_data": 1, "prior_precision": delta, "betas": (0.9, beta)}
    method = IVON([("weight", parameter)], **settings)
    state = method.state[parameter]
    state["hessian"].fill_(hessian)
    state["step"] += 1
    before = hessian + delta
    method._update(
        method.param_groups[0], [parameter], [torch.zeros(1).double()], [torch.full((1,), price / before).double()]
    )
    assert float(state["hessian"]) + delta >= before / 2 * (1 - 1e-9)


def test_golden_trajectory():
    """Twenty steps with two draws each, frozen: any change of the update shows.

    Over 50 steps with equal noise the update agreed with ivon-opt 0.1.3 to 4e-15, once, by hand.
    """
    problem = linear_regression(n=40, d=3, seed=5, dtype=torch.float64)
    model = problem.model()
    settings = {"hess_init": 5.0, "betas": (0.9, 0.99), "clip_radius": 0.5, "n_samples": 2, "seed": 3}
    method = IVON(model.named_parameters(), lr=0.05, n_data=40, prior_precision=2.0, **settings)

    def closure():
        problem.loss(model).backward()

    for _ in range(20):
        method.step(closure)
    mean, variance = (
        model.weight.detach()[0],
        1 / method.data_weight / (method.state[model.weight]["hessian"][0] + 0.05),
    )
    torch.testing.assert_close(mean, torch.tensor(GOLDEN_MEAN, dtype=torch.float64), rtol=1e-9, atol=0)
    torch.testing.assert_close(variance, torch.tensor(GOLDEN_VARIANCE, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("setting", ["scratch", "fine_tuning", "lora"])
def test_settings_for_a_situation(setting):
    method = IVON.for_setting(setting, PROBLEM.model().named_parameters(), n_data=400, lr=0.2)
    assert method.param_groups[0]["lr"] == 0.2
    assert (method.info.temperature < 1) == (setting != "scratch")
    with pytest.raises(InvalidInput, match="scratch"):
        IVON.for_setting("pretraining", PROBLEM.model().named_parameters(), n_data=400)


def test_a_warm_start_needs_adam():
    model = PROBLEM.model()
    with pytest.raises(InvalidInput, match="Adam moments"):
        method_for(model).warm_start(torch.optim.SGD(model.parameters(), lr=0.1), batch_size=4)


def test_resumes_bit_for_bit():
    straight, resumed = PROBLEM.model(), PROBLEM.model()
    schedule = {"T_max": 40}
    first = method_for(straight)
    scheduler = CosineAnnealingLR(first, **schedule)
    for _ in range(40):
        run(straight, first, 1)
        scheduler.step()
    second = method_for(resumed)
    scheduler = CosineAnnealingLR(second, **schedule)
    for _ in range(20):
        run(resumed, second, 1)
        scheduler.step()
    file = io.BytesIO()
    torch.save({"model": resumed.state_dict(), "method": second.state_dict(), "schedule": scheduler.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh = PROBLEM.model()
    fresh.load_state_dict(state["model"])
    third = method_for(fresh, seed=99)
    scheduler = CosineAnnealingLR(third, **schedule)
    third.load_state_dict(state["method"])
    scheduler.load_state_dict(state["schedule"])
    for _ in range(20):
        run(fresh, third, 1)
        scheduler.step()
    assert torch.equal(fresh.weight, straight.weight)
    assert torch.equal(third.posterior().variance["weight"], first.posterior().variance["weight"])


def test_state_stays_in_float32_for_half_weights():
    model = PROBLEM.model().bfloat16()
    method = method_for(model)
    with method.sampled():
        model.weight.sum().backward()
    method.step()
    again = method_for(copy.deepcopy(model))
    again.load_state_dict(method.state_dict())
    for state in again.state.values():
        assert state["hessian"].dtype == state["momentum"].dtype == torch.float32
    assert method.posterior().variance["weight"].dtype == torch.float32


def test_an_exception_inside_leaves_clean_weights():
    model = PROBLEM.model()
    method = method_for(model)
    run(model, method, 3)
    before = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="boom"), method.sampled():
        assert not torch.equal(model.weight, before)
        raise RuntimeError("boom")
    assert torch.equal(model.weight, before)
    assert model.weight.grad is None
    with pytest.raises(NotFitted, match="no gradient"):
        method.step()
    run(model, method, 1)  # and it goes on


def test_weights_are_the_mean_outside_and_a_draw_inside():
    model = PROBLEM.model()
    method = method_for(model)
    with method.sampled():
        assert float(model.weight.detach().abs().min()) > 0
        with pytest.raises(NotFitted, match="nested"), method.sampled():
            pass
        with pytest.raises(NotFitted, match="inside"):
            method.posterior()
    assert torch.equal(model.weight, torch.zeros(1, 5))


def test_parameters_without_gradients_keep_their_state():
    model = nn.ModuleDict({"used": nn.Linear(5, 1), "unused": nn.Linear(5, 1)})
    model["used"].bias.requires_grad_(False)
    method = IVON(model.named_parameters(), lr=0.1, n_data=10, hess_init=2.0)
    frozen = model["used"].bias.detach().clone()
    with method.sampled():
        assert torch.equal(model["used"].bias, frozen)
        model["used"](PROBLEM.inputs).square().mean().backward()
    method.step()
    posterior = method.posterior()
    torch.testing.assert_close(posterior.variance["unused.weight"], torch.full((1, 5), 1 / (10 * (2.0 + 0.1))))
    assert set(posterior.names) == {"used.weight", "unused.weight", "unused.bias"}  # frozen is deterministic


def test_groups_have_their_own_prior():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    groups = [
        {"params": list(model[0].named_parameters(prefix="0")), "prior_precision": 5.0},
        {"params": list(model[1].named_parameters(prefix="1"))},
    ]
    posterior = IVON(groups, lr=0.1, n_data=10, prior_precision=1.0, hess_init=2.0).posterior()
    torch.testing.assert_close(posterior.variance["0.bias"], torch.full((2,), 1 / (10 * 2.5)))
    torch.testing.assert_close(posterior.variance["1.bias"], torch.full((1,), 1 / (10 * 2.1)))


def test_a_closure_runs_inside_sampled():
    model = PROBLEM.model()
    method = method_for(model)

    def closure():
        assert float(model.weight.detach().abs().min()) > 0
        loss = PROBLEM.loss(model)
        loss.backward()
        return loss

    assert method.step(closure).item() > 0


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"lr": 0.0}, "lr"), ({"hess_init": 0.0}, "hess_init"), ({"n_data": 0}, "n_data"), ({"temperature": -1}, "temperature"),
        ({"betas": (0.9, 1.0)}, "betas"), ({"prior_precision": 0}, "prior_precision"), ({"sigma_noise": None}, "sigma_noise"),
        ({"likelihood": "ordinal"}, "likelihood"),
    ],
)  # fmt: skip
def test_bad_settings_name_themselves(settings, match):
    with pytest.raises(InvalidInput, match=match):
        method_for(PROBLEM.model(), **settings)


def test_parameters_without_names_are_refused():
    with pytest.raises(InvalidInput, match="named_parameters"):
        IVON(PROBLEM.model().parameters(), lr=0.1, n_data=10)


def test_the_posterior_records_how_it_was_made():
    posterior = method_for(PROBLEM.model(), temperature=0.5).posterior()
    assert isinstance(posterior, DiagonalGaussian)
    assert (posterior.info.method, posterior.info.n_data, posterior.info.temperature) == ("ivon", 400, 0.5)
