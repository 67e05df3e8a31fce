"""The shape that all training methods share, checked on every one of them."""

import copy
import io

import pytest
import torch
from methods import METHODS
from problems import linear_regression
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from bayespass import InvalidInput, NotFitted
from bayespass.posterior.draws import stream_seed

PROBLEM = linear_regression(n=60, d=4)
ALL = [name for name in METHODS if name != "ivon_pairs"]


def network(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).to(dtype)


def make(name, model, **settings):
    return METHODS[name](model.named_parameters(), **({"n_data": 60, "prior_precision": 2.0} | settings))


def loss(model):
    dtype = next(model.parameters()).dtype
    return (model(PROBLEM.inputs.to(dtype)) - PROBLEM.targets.to(dtype)).square().mean()


def steps(model, method, count, schedule=None):
    for _ in range(count):
        for _ in range(method.n_samples):
            with method.sampled():
                loss(model).backward()
        method.step()
        if schedule is not None:
            schedule.step()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def variances(method):
    return torch.cat([v.flatten() for v in method.posterior().variance.values()])


@pytest.mark.parametrize("name", ALL)
def test_resumes_bit_for_bit(name):
    """20 + 20 steps through a file equal 40: step counts, noise, moments, bases and schedules included."""
    straight = network()
    method = make(name, straight)
    steps(straight, method, 40, CosineAnnealingLR(method, 40))
    half = network()
    method_half = make(name, half)
    schedule = CosineAnnealingLR(method_half, 40)
    steps(half, method_half, 20, schedule)
    file = io.BytesIO()
    torch.save(
        {"model": half.state_dict(), "method": method_half.state_dict(), "schedule": schedule.state_dict()}, file
    )
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = network(seed=1)
    resumed.load_state_dict(saved["model"])
    again = make(name, resumed, seed=99)
    schedule = CosineAnnealingLR(again, 40)
    again.load_state_dict(saved["method"])
    schedule.load_state_dict(saved["schedule"])
    steps(resumed, again, 20, schedule)
    assert torch.equal(weights(resumed), weights(straight))
    assert torch.equal(variances(again), variances(method))


@pytest.mark.parametrize("name", ALL)
def test_an_exception_leaves_the_mean(name):
    model = network()
    method = make(name, model)
    steps(model, method, 2)
    before = weights(model)
    with pytest.raises(RuntimeError, match="boom"), method.sampled():
        assert not torch.equal(weights(model), before)
        loss(model).backward()
        raise RuntimeError("boom")
    assert torch.equal(weights(model), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(NotFitted, match="no gradient"):
        method.step()
    steps(model, method, 1)


@pytest.mark.parametrize("name", ALL)
def test_half_weights_keep_a_float32_mean(name):
    """Small updates are not lost to bfloat16, and the draws' rounding is part of the noise."""
    model = network(torch.bfloat16)
    method = make(name, model)
    start = method.posterior().mean["0.weight"]
    steps(model, method, 30)
    posterior = method.posterior()
    for state in method.state.values():
        assert all(value.dtype == torch.float32 for value in state.values())
    mean = posterior.mean["0.weight"]
    assert mean.dtype == posterior.variance["0.weight"].dtype == torch.float32
    assert not torch.equal(mean, start)
    assert not torch.equal(mean, mean.bfloat16().float())  # finer than the weights
    assert torch.equal(model[0].weight, mean.bfloat16())
    with torch.no_grad():
        model[0].weight.fill_(0.5)  # weights set from outside are the new mean
    assert torch.equal(method.posterior().mean["0.weight"], torch.full((6, 4), 0.5))


@pytest.mark.parametrize("name", ALL)
def test_parameters_without_gradient_and_frozen_ones(name):
    model = nn.ModuleDict({"used": network(), "unused": nn.Linear(2, 1)})
    model["used"][2].bias.requires_grad_(False)
    frozen = model["used"][2].bias.detach().clone()
    method = make(name, model)
    assert model["used"][2].bias not in method.state
    idle = model["unused"].weight.detach().clone()
    for _ in range(method.n_samples):
        with method.sampled():
            loss(model["used"]).backward()
    method.step()
    assert torch.equal(model["unused"].weight, idle)
    assert torch.equal(model["used"][2].bias, frozen)
    assert set(method.posterior().names) == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ALL)
def test_groups_have_their_own_prior_and_rate(name):
    """Each group alone gives what it gives beside the other."""
    model = network()
    groups = [
        {"params": list(model[0].named_parameters(prefix="0")), "prior_precision": 500.0},
        {"params": list(model[2].named_parameters(prefix="2")), "lr": 1e-12},
    ]
    method = METHODS[name](groups, n_data=60, prior_precision=2.0)
    before = weights(model[2])
    steps(model, method, 3)
    torch.testing.assert_close(weights(model[2]), before, rtol=0, atol=1e-6)
    alone = network()
    both = make(name, alone, prior_precision=500.0)
    steps(alone, both, 3)  # same noise, so that the first layer differs by the other's fixed weights alone
    strong, weak = network(), network()
    for model, precision in ((strong, 500.0), (weak, 2.0)):
        group = {"params": list(model.named_parameters()), "prior_precision": precision}
        method = METHODS[name]([group], n_data=60, prior_precision=2.0)
        steps(model, method, 3)
    assert torch.equal(weights(strong), weights(alone))
    assert not torch.equal(weights(strong), weights(weak))


@pytest.mark.parametrize("name", ["ivon", "score_vi", "score_vi_sgd", "elbo", "elbo_stl"])
def test_accumulation_averages_over_blocks(name):
    """Two blocks on halves of the data are one block on the whole, where both see the same noise."""
    model = network()
    method = make(name, model, antithetic=False, n_samples=1)
    parameter = model[0].weight
    with method.sampled():
        loss(model).backward()
    whole = tuple(part.clone() for part in method._drawn[parameter][1:])
    method._discard()
    for rows in (slice(0, 30), slice(30, 60)):
        method._draws = 0
        with method.sampled():
            (model(PROBLEM.inputs[rows]) - PROBLEM.targets[rows]).square().mean().backward()
    count, *halves = method._drawn[parameter]
    assert count == 2
    for half, part in zip(halves, whole, strict=True):
        torch.testing.assert_close(half, part, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_a_closure_draws_as_often_as_asked(name):
    by_hand, by_closure = network(), network()
    one = make(name, by_hand, n_samples=4)
    steps(by_hand, one, 3)
    other = make(name, by_closure, n_samples=4)

    def closure():
        assert not torch.equal(by_closure[0].weight, mean)
        value = loss(by_closure)
        value.backward()
        return value

    for _ in range(3):
        mean = by_closure[0].weight.detach().clone()
        assert other.step(closure).item() > 0
    assert torch.equal(weights(by_hand), weights(by_closure))


@pytest.mark.parametrize("name", ["ivon", "score_vi", "elbo"])
def test_antithetic_draws_mirror_each_other(name):
    model = network()
    method = make(name, model, antithetic=True)
    mean, seen = weights(model), []
    for _ in range(2):
        with method.sampled():
            seen.append(weights(model) - mean)
            loss(model).backward()
    torch.testing.assert_close(seen[0], -seen[1], rtol=0, atol=1e-6)
    method.step()
    with method.sampled():
        loss(model).backward()
    with pytest.raises(InvalidInput, match="pairs"):
        method.step()
    with pytest.raises(InvalidInput, match="even"):
        make(name, network(), antithetic=True, n_samples=3)


@pytest.mark.parametrize("name", ["ivon", "score_vi", "elbo"])
def test_clipping_moves_the_mean_less_and_leaves_the_curvature(name):
    free, clipped = network(), network()
    results = {}
    for model, norm in ((free, None), (clipped, 1e-3)):
        method = make(name, model, max_grad_norm=norm)
        before = weights(model)
        steps(model, method, 1)
        results[norm] = (weights(model) - before).norm(), variances(method)
    if name != "elbo":  # Adam takes no notice of a gradient's size
        assert results[1e-3][0] < results[None][0]
    torch.testing.assert_close(results[1e-3][1], results[None][1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["ivon", "score_vi", "elbo"])
def test_gradients_that_are_not_finite_are_named_and_dropped(name):
    model = network()
    method = make(name, model, antithetic=False, n_samples=1)
    before = weights(model)
    with method.sampled():
        (loss(model) * float("nan")).backward()
    with pytest.raises(InvalidInput, match=r"0\.weight is NaN"):
        method.step()
    assert torch.equal(weights(model), before)
    steps(model, method, 1)
    assert torch.isfinite(weights(model)).all()


@pytest.mark.parametrize("name", ["ivon", "score_vi", "elbo"])
def test_a_gradient_scaler_changes_nothing(name):
    """AMP's loss scaling: unscale_ inside the block; an overflow skips the step and nothing of it stays."""
    plain, scaled = network(), network()
    one = make(name, plain, antithetic=False, n_samples=1)
    steps(plain, one, 3)
    other = make(name, scaled, antithetic=False, n_samples=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):  # the overflowed block's noise is drawn again
        with other.sampled():
            scaler.scale(loss(scaled) * (float("inf") if step == 0 else 1.0)).backward()
            scaler.unscale_(other)
        scaler.step(other)
        scaler.update()
    torch.testing.assert_close(weights(scaled), weights(plain), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(variances(other), variances(one), rtol=1e-5, atol=0)


def test_autocast_runs_and_keeps_float32_state():
    model = network()
    method = make("ivon", model)
    with method.sampled(), torch.autocast("cpu", dtype=torch.bfloat16):
        loss(model).backward()
    method.step()
    assert method.posterior().mean["0.weight"].dtype == torch.float32


@pytest.mark.parametrize("name", ["ivon", "score_vi", "elbo"])
def test_the_prior_has_a_centre(name):
    """Without a pull from the data the mean goes to the prior's: zero, the first weights, or given values."""
    for prior_mean, where in ((None, 0.0), ("initial", 0.3), ({"weight": torch.full((3,), -0.2)}, -0.2)):
        parameter = nn.Parameter(torch.full((3,), 0.3))
        options = {"lr": 0.1} if name != "elbo" else {"lr": 0.01}
        settings = {"n_data": 10, "prior_precision": 50.0, "prior_mean": prior_mean, "antithetic": True}
        method = METHODS[name]([("weight", parameter)], **settings, **options)
        for _ in range(600):
            for _ in range(2):
                with method.sampled():
                    (parameter.sum() * 0).backward()
            method.step()
        torch.testing.assert_close(parameter.detach(), torch.full((3,), where), rtol=0, atol=0.02)
    with pytest.raises(InvalidInput, match="prior_mean of weight"):
        METHODS[name]([("weight", parameter)], n_data=10, prior_mean={"weight": torch.zeros(2)})


def test_rounding_wider_than_the_posterior_warns():
    model = network(torch.bfloat16)
    method = make("ivon", model, n_data=10**9)
    with pytest.warns(UserWarning, match=r"0\.weight .* is below what"), method.sampled():
        loss(model).backward()


def test_a_state_is_that_of_the_last_step():
    """Draws since then are not in it, as gradients never are: resuming makes them again, the same."""
    model, resumed = network(), network(seed=1)
    method, again = make("ivon", model), make("ivon", resumed, seed=5)
    steps(model, method, 2)
    with method.sampled():
        loss(model).backward()
        with pytest.raises(NotFitted, match="inside"):
            method.state_dict()
    state = copy.deepcopy(method.state_dict())
    resumed.load_state_dict(model.state_dict())
    again.load_state_dict(state)
    method.step()
    steps(resumed, again, 1)
    assert torch.equal(weights(model), weights(resumed))


@pytest.mark.parametrize(
    "change", [{"n_data": 61}, {"temperature": 0.5}, {"antithetic": True}, {"hess_approx": "gradsq", "batch_size": 4}]
)
def test_a_state_of_other_settings_is_refused(change):
    state = make("ivon", network()).state_dict()
    with pytest.raises(InvalidInput, match=next(iter(change))):
        make("ivon", network(), **change).load_state_dict(state)
    with pytest.raises(InvalidInput, match="another optimizer"):
        make("ivon", network()).load_state_dict(torch.optim.AdamW(network().parameters()).state_dict())
    with pytest.raises(InvalidInput, match="class"):
        make("ivon", network()).load_state_dict(make("elbo", network(), antithetic=False).state_dict())


@pytest.mark.parametrize("name", ALL)
def test_after_an_interrupt_training_goes_on_as_if_nothing_had_happened(name):
    """In a block, between the halves of a pair, or in a closure: the next draws are the ones that were lost."""
    straight, interrupted = network(), network()
    method, other = make(name, straight), make(name, interrupted)
    steps(straight, method, 3)
    steps(interrupted, other, 1)
    with pytest.raises(KeyboardInterrupt), other.sampled():
        raise KeyboardInterrupt
    steps(interrupted, other, 1)
    calls = []

    def closure():
        calls.append(1)
        value = loss(interrupted)
        value.backward()
        if len(calls) == other.n_samples:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        other.step(closure)
    steps(interrupted, other, 1)
    assert torch.equal(weights(straight), weights(interrupted))
    assert torch.equal(variances(method), variances(other))


def test_parameters_are_named_once():
    one, two = nn.Linear(2, 1), nn.Linear(2, 1)
    with pytest.raises(InvalidInput, match="two parameters are called weight"):
        METHODS["ivon"]([{"params": list(one.named_parameters())}, {"params": list(two.named_parameters())}], n_data=3)
    two.weight = one.weight
    tied = nn.Sequential(one, two)
    with pytest.raises(InvalidInput, match="comes twice"):
        METHODS["ivon"](tied.named_parameters(remove_duplicate=False), n_data=3)
    method = METHODS["ivon"](one.named_parameters(), n_data=3)
    with pytest.raises(InvalidInput, match="comes twice"):
        method.add_param_group({"params": [("other", one.bias)]})
    with pytest.raises(InvalidInput, match="prior_precision"):
        method.add_param_group({"params": [("other", two.bias)], "prior_precision": -5.0})
    method.add_param_group({"params": [("other", two.bias)], "prior_precision": 7.0})
    assert method.posterior().names == ("weight", "bias", "other")


@pytest.mark.parametrize(
    ("params", "match"),
    [(nn.Linear(1, 1), "named_parameters"), ({"w": 1}, "dict"), ([], "no parameter"), ([nn.Parameter(torch.ones(1))], "names")],
)  # fmt: skip
def test_what_is_no_list_of_parameters_is_refused(params, match):
    with pytest.raises(InvalidInput, match=match):
        METHODS["ivon"](params, n_data=3)


def test_complex_and_sparse():
    with pytest.raises(InvalidInput, match="complex"):
        METHODS["ivon"]([("w", nn.Parameter(torch.ones(2, dtype=torch.cfloat)))], n_data=3)
    results = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Embedding(5, 3, sparse=sparse)
        method = make("ivon", model)
        with method.sampled():
            model(torch.tensor([1, 2, 2])).square().mean().backward()
        method.step()
        results.append((weights(model), variances(method)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("prior_mean", ["init", torch.zeros(2), {"typo": torch.zeros(2)}])
def test_a_prior_mean_that_means_nothing_is_refused(prior_mean):
    with pytest.raises(InvalidInput, match="prior_mean"):
        make("ivon", network(), prior_mean=prior_mean)


@pytest.mark.parametrize("name", ALL)
def test_state_follows_the_model(name):
    """To another dtype after the method was made."""
    model = network()
    method = make(name, model)
    steps(model, method, 1)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype)
        steps(model, method, 1)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        state = method.state[model[0].weight]
        assert all(value.dtype == exact for key, value in state.items() if key != "step")
        assert ("mean" in state) == (dtype == torch.bfloat16)


def test_copies_go_on_alone():
    model = network()
    method = make("ivon", model)
    steps(model, method, 1)
    twin, its_model = copy.deepcopy((method, model))
    steps(its_model, twin, 2)
    assert not torch.equal(weights(model), weights(its_model))
    steps(model, method, 2)
    assert torch.equal(weights(model), weights(its_model))


def test_gradients_in_memory_that_others_own_are_copied():
    """As DDP's buckets: a later backward pass writes over what an earlier draw left."""
    model = network()
    method, buffers = make("ivon", model), {}
    for scale in (1.0, 3.0):
        with method.sampled():
            (loss(model) * scale).backward()
            for parameter in model.parameters():
                buffer = buffers.setdefault(parameter, torch.zeros_like(parameter))
                buffer.copy_(parameter.grad)
                parameter.grad = buffer
        if scale == 1.0:
            first = method._drawn[model[0].weight][1].clone()
    other = network()
    second = make("ivon", other)
    second._draws = 1
    with second.sampled():
        (loss(other) * 3.0).backward()
    expected = (first + second._drawn[other[0].weight][1]) / 2
    torch.testing.assert_close(method._drawn[model[0].weight][1], expected)


def test_a_closure_may_skip_a_batch():
    model = network()
    method = make("ivon", model)
    before = weights(model)
    assert method.step(lambda: None) is None
    assert torch.equal(weights(model), before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, on compiling
def test_compiled_names_are_the_models_own():
    model = network()
    compiled = torch.compile(model)
    assert any("_orig_mod" in name for name, _ in compiled.named_parameters())
    make("ivon", compiled).posterior().check_model(model)


def test_equal_seeds_give_equal_noise_and_streams_differ():
    draws = []
    for seed in (0, 0, 1):
        model = network()
        method = make("ivon", model, seed=seed)
        with method.sampled():
            draws.append(weights(model))
            loss(model).backward()
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert len({stream_seed(seed, stream) & 0xFFFFFFFF for seed in range(40) for stream in range(50)}) == 2000


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "settings", [{"lr": 0.0}, {"n_data": 0}, {"temperature": -1.0}, {"prior_precision": 0.0}, {"n_samples": 0}]
)
def test_bad_settings_name_themselves(name, settings):
    with pytest.raises(InvalidInput, match=next(iter(settings))):
        make(name, network(), **settings)


def test_nothing_to_train_is_refused():
    model = network().requires_grad_(False)
    with pytest.raises(InvalidInput, match="requires a gradient"):
        make("ivon", model)
