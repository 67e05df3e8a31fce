"""Details of the training methods that their coarser tests would not miss, each against its own equation."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from methods import METHODS
from problems import linear_regression
from torch import nn

from bayespass import IVON, InvalidInput
from bayespass.posterior import draws
from bayespass.posterior.elbo import MeanFieldVI
from bayespass.posterior.score_matching import ScoreVI
from bayespass.posterior.score_mixture import ScoreVIMixture
from bayespass.posterior.score_sgd import ScoreVISGD

PROBLEM = linear_regression(n=60, d=4)
ROWS = 60


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


def steps(model, method, count=1, loss=PROBLEM.loss):
    for _ in range(count):
        for _ in range(method.n_samples):
            with method.sampled():
                loss(model).backward()
        method.step()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def variances(method):
    return torch.cat([v.flatten() for v in method.posterior().variance.values()])


@pytest.mark.parametrize(
    "make",
    [
        lambda named, **kw: IVON(named, lr=0.1, n_data=ROWS, hess_init=0.5, betas=(0.9, 0.9), **kw),
        lambda named, **kw: ScoreVI(named, lr=0.05, n_data=ROWS, precision_lr=1e-2, init_sd=0.2, **kw),
        lambda named, **kw: MeanFieldVI(named, lr=1e-2, n_data=ROWS, init_sd=0.2, **kw),
        lambda named, **kw: MeanFieldVI(named, lr=1e-2, n_data=ROWS, init_sd=0.2, gradient="stl", **kw),
        lambda named, **kw: ScoreVISGD(named, lr=1e-2, n_data=ROWS, init_sd=0.2, **kw),
        lambda named, **kw: ScoreVIMixture(named, lr=1e-2, n_data=ROWS, init_sd=0.2, **kw),
    ],
    ids=["ivon", "score_vi", "closed", "stl", "score_vi_sgd", "score_vi_mixture"],
)
@pytest.mark.filterwarnings("ignore:precision_lr", "ignore:the weights start far")
def test_a_prior_of_the_group_is_as_good_as_one_of_the_method(make):
    """Mean and variance, so that no term of the update may look at the method's own prior precision."""
    found = {}
    for kind in ("group", "method", "neither"):
        model = network()
        named = list(model.named_parameters())
        if kind == "group":
            method = make([{"params": named, "prior_precision": 50.0}], prior_precision=2.0)
        else:
            method = make(named, prior_precision=50.0 if kind == "method" else 2.0)
        steps(model, method, 3)
        found[kind] = weights(model), variances(method)
    for mine, same, other in zip(found["group"], found["method"], found["neither"], strict=True):
        assert torch.equal(mine, same)
        assert not torch.allclose(mine, other, rtol=1e-3)


@pytest.mark.parametrize("clip_radius", [float("inf"), 1e-2])
def test_rescaled_rates_differ_by_the_initial_precision(clip_radius):
    """A step at lr without rescaling, times h0 + delta, is a step at lr with it."""
    moves = {}
    for rescale in (True, False):
        model = network()
        start = weights(model)
        settings = {"hess_init": 0.3, "prior_precision": 6.0, "clip_radius": clip_radius, "rescale_lr": rescale}
        steps(model, IVON(model.named_parameters(), lr=0.1, n_data=ROWS, **settings))
        moves[rescale] = weights(model) - start
    assert float(moves[False].abs().max()) > 1e-4
    torch.testing.assert_close(moves[True], moves[False] * (0.3 + 6 / ROWS), rtol=1e-3, atol=1e-7)


def test_a_warm_start_takes_over_both_moments_without_their_bias():
    model = network()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.8, 0.95))
    for _ in range(3):
        adam.zero_grad()
        PROBLEM.loss(model).backward()
        adam.step()
    method = IVON(model.named_parameters(), lr=0.1, n_data=ROWS, betas=(0.9, 0.99)).warm_start(adam, batch_size=15)
    for parameter in model.parameters():
        state, theirs = method.state[parameter], adam.state[parameter]
        assert float(state["step"]) == 3
        momentum = state["momentum"] / (1 - 0.9**3)
        torch.testing.assert_close(momentum, theirs["exp_avg"] / (1 - 0.8**3), rtol=1e-5, atol=1e-9)
        hessian = 15 * theirs["exp_avg_sq"] / (1 - 0.95**3)
        torch.testing.assert_close(state["hessian"], hessian, rtol=1e-5, atol=1e-12)
        assert float(hessian.max()) > 0


class TwoRanks:
    """`torch.distributed.all_reduce` between two threads."""

    def __init__(self):
        self.barrier, self.tensors, self.local = threading.Barrier(2, timeout=60), [None, None], threading.local()

    def all_reduce(self, tensor):
        self.tensors[self.local.rank] = tensor.clone()
        self.barrier.wait()
        total = self.tensors[0] + self.tensors[1]
        self.barrier.wait()
        tensor.copy_(total)

    def run(self, function):
        def on_rank(rank):
            self.local.rank = rank
            return function(rank)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(on_rank, range(2)))


def test_ranks_count_by_their_draws(monkeypatch):
    """One draw on one rank and three on the other; a parameter without gradient on one, and one on both."""
    ranks = TwoRanks()
    monkeypatch.setattr(draws.dist, "all_reduce", ranks.all_reduce)
    values = torch.tensor([[1.0, 10.0], [5.0, 50.0]])

    def reduced(rank):
        both, alone, none = (torch.zeros(2) for _ in range(3))
        first, second = values[rank]
        drawn = {both: ((1, 3)[rank], first.expand(2).clone(), second.expand(2).clone())}
        if rank == 1:
            drawn[alone] = (2, torch.full((2,), 7.0), torch.full((2,), 8.0))
        result = draws.reduce_draws([both, alone, none], drawn)
        return [result.get(parameter) for parameter in (both, alone, none)]

    for both, alone, none in ranks.run(reduced):
        assert none is None
        assert both[0] == 4
        assert both[1].tolist() == [4.0, 4.0]  # (1 + 3 * 5) / 4
        assert both[2].tolist() == [40.0, 40.0]
        assert (alone[0], alone[1].tolist(), alone[2].tolist()) == (2, [7.0, 7.0], [8.0, 8.0])


def test_local_reparametrisation_spreads_outputs_by_the_variance_of_the_bias():
    """Weights without variance: what is left is that of the bias, and its gradient is that of the drawn outputs."""
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(2, 3)), torch.randn(4000, 2)
    layer = model[0]
    groups = [
        {"params": [("0.weight", layer.weight)], "init_sd": 1e-6},
        {"params": [("0.bias", layer.bias)], "init_sd": 0.3},
    ]
    method = MeanFieldVI(groups, lr=1e-3, n_data=ROWS, local=model)
    mean = model(inputs).detach()
    with method.sampled():
        outputs = model(inputs)
        (outputs.square().sum(1).mean() / 2).backward()
    spread = outputs.detach() - mean
    torch.testing.assert_close(spread.square().mean(0), torch.full((3,), 0.09), rtol=0.1, atol=0)
    _, _, log_sd_gradient = method._drawn[layer.bias]
    expected = (outputs.detach() * spread).mean(0)  # dL/d log sd of y = m + sd n is (dL/dy) sd n
    torch.testing.assert_close(log_sd_gradient, expected, rtol=1e-3, atol=1e-6)


def test_local_reparametrisation_refuses_tokens_by_name():
    torch.manual_seed(0)
    model = nn.ModuleDict({"head": nn.Linear(2, 3)})
    method = MeanFieldVI(model.named_parameters(), lr=1e-3, n_data=ROWS, local=model)
    start = weights(model)
    with pytest.raises(InvalidInput, match=r"layer 'head' sees inputs of shape \(4, 5, 2\)"), method.sampled():
        model["head"](torch.randn(4, 5, 2))
    assert torch.equal(weights(model), start)
    inputs = torch.randn(4, 5, 2)
    assert torch.equal(model["head"](inputs), model["head"](inputs))  # an ordinary layer again


def test_momentum_of_score_vi_starts_without_bias():
    """The first average is the first score itself; later ones remember it."""
    models, methods = [network(), network()], []
    for model, momentum in zip(models, (0.0, 0.9), strict=True):
        settings = {"precision_lr": 1e-3, "init_sd": 0.05, "momentum": momentum}
        methods.append(ScoreVI(model.named_parameters(), lr=0.02, n_data=ROWS, **settings))
    start = weights(models[0])
    for model, method in zip(models, methods, strict=True):
        with method.sampled():
            PROBLEM.loss(model).backward()
        method.warns_of_far_starts = False
        method.step()
    assert float((weights(models[0]) - start).abs().max()) > 1e-3
    torch.testing.assert_close(weights(models[0]), weights(models[1]), rtol=1e-5, atol=1e-6)
    for model, method in zip(models, methods, strict=True):
        steps(model, method, 2)
    assert not torch.allclose(weights(models[0]), weights(models[1]), rtol=1e-3)


@pytest.mark.parametrize(
    ("setting", "expected", "temperature", "delta"),
    [
        ("scratch", {"lr": 0.1, "hess_init": 0.5, "clip_radius": float("inf"), "rescale_lr": True}, 1.0, 2e-4),
        ("fine_tuning", {"lr": 0.05, "hess_init": 0.01, "clip_radius": 1e-2, "rescale_lr": True}, 1e-3, 1e-5),
        ("lora", {"lr": 0.03, "hess_init": 1e-3, "clip_radius": 1e-3, "rescale_lr": False}, 1e-3, 1e-6),
    ],
)
def test_presets_set_every_value(setting, expected, temperature, delta):
    n = 50_000
    method = IVON.for_setting(setting, network().named_parameters(), n_data=n)
    group = method.param_groups[0]
    assert {key: group[key] for key in expected} == expected
    assert tuple(group["betas"]) == (0.9, 0.99999)
    assert method.info.temperature == pytest.approx(temperature)
    assert method.info.prior_precision == group["prior_precision"] == pytest.approx(delta * n)
    assert method._weight_decay(group) == pytest.approx(delta)


@pytest.mark.parametrize(
    ("setting", "n_data", "changes", "sd"),
    [("scratch", 50_000, {}, 6.3e-3), ("lora", 10_000, {"hess_init": 3e-4}, 0.018)],
)
def test_presets_start_as_wide_as_published_runs(setting, n_data, changes, sd):
    """CIFAR from scratch, 5e4 images; LoRA on Llama-2-7B at an effective sample size of 1e7."""
    method = IVON.for_setting(setting, network().named_parameters(), n_data=n_data, **changes)
    assert float(variances(method).sqrt().mean()) == pytest.approx(sd, rel=0.02)


def mixture(model, **settings):
    return ScoreVIMixture(model.named_parameters(), **({"lr": 1e-2, "n_data": ROWS, "init_sd": 0.2} | settings))


def test_the_prior_of_a_mixture_has_a_centre():
    """delta (theta - m0) is delta theta and a loss that is linear in theta."""
    centre = {"0.weight": torch.full((6, 4), 3.0), "2.bias": torch.tensor([-2.0])}
    centred, plain = network(), network()
    method = mixture(centred, prior_mean=centre, prior_precision=30.0)
    by_loss = mixture(plain, prior_precision=30.0)

    def tilted(model):
        tilt = sum((p * centre[name]).sum() for name, p in model.named_parameters() if name in centre)
        return PROBLEM.loss(model) - 30.0 / ROWS * tilt

    steps(centred, method, 4)
    steps(plain, by_loss, 4, tilted)
    for one, two in zip(method.posterior().components, by_loss.posterior().components, strict=True):
        for name in one.names:
            torch.testing.assert_close(one.mean[name], two.mean[name], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(one.variance[name], two.variance[name], rtol=1e-4, atol=0)
    without = network()
    other = mixture(without, prior_precision=30.0)
    steps(without, other, 4)
    mine, theirs = (m.posterior().components[0].mean["0.weight"] for m in (method, other))
    assert not torch.allclose(mine, theirs, rtol=1e-2)


class Scalar(nn.Module):
    def __init__(self, shape, dtype=torch.float32):
        super().__init__()
        self.vector = nn.Parameter(torch.tensor([0.5, -1.0, 2.0], dtype=dtype))
        self.scale = nn.Parameter(torch.full(shape, 0.5, dtype=dtype))

    def loss(self):
        return ((self.vector.float() - 1).square().sum() + (self.scale.float() + 1).square().sum()) / 2


def test_a_mixture_of_scalars_and_of_half_weights():
    found = {}
    for shape, dtype in (((), torch.float32), ((1,), torch.float32), ((), torch.bfloat16)):
        model = Scalar(shape, dtype)
        method = mixture(model, lr=1e-4, sd_lr=1e-4, components=3)
        starts = [component.mean["scale"].clone() for component in method.posterior().components]
        steps(model, method, 6, Scalar.loss)
        components = method.posterior().components
        assert all(c.mean[name].dtype == torch.float32 for c in components for name in c.names)
        assert all(c.mean["scale"].shape == shape for c in components)
        for start, component in zip(starts, components, strict=True):
            moved = float((component.mean["scale"] - start).abs().max())
            assert 1e-5 < moved < 1e-2  # less than bfloat16 could hold
        assert torch.equal(model.scale, components[0].mean["scale"].to(dtype))
        found[shape, dtype] = [(c.mean["scale"].reshape(1), c.variance["scale"].reshape(1)) for c in components]
    for one, two in zip(found[(), torch.float32], found[(1,), torch.float32], strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("option", ["antithetic", "distributed"])
def test_a_mixture_refuses_what_its_turns_rule_out(option):
    with pytest.raises(InvalidInput, match=f"{option}=True does not go with a mixture"):
        mixture(network(), **{option: True})


def test_a_mixture_refuses_weights_that_were_changed_behind_its_back():
    model = network()
    method = mixture(model)
    model.load_state_dict(network(seed=1).state_dict())
    with pytest.raises(InvalidInput, match=r"0\.weight was changed after the mixture was made"), method.sampled():
        pass
    assert torch.equal(weights(model), weights(network(seed=1)))


@pytest.mark.parametrize("gradient", ["closed", "stl"])
def test_adam_gets_the_clipped_gradient(monkeypatch, gradient):
    """Adam forgets the scale of its gradients, so that the step itself would not show it."""
    seen = {}
    for limit in (1e-3, 1e6, None):
        model = network()
        method = MeanFieldVI(model.named_parameters(), lr=1e-3, n_data=ROWS, gradient=gradient, max_grad_norm=limit)
        calls = []

        def spy(group, parameters, first, second, calls=calls):
            del group, parameters
            calls += [(mean.clone(), sd.clone()) for mean, sd in zip(first, second, strict=True)]

        monkeypatch.setattr(method, "_update", spy)
        for _ in range(2):
            with method.sampled():
                PROBLEM.loss(model).backward()
        method.step()
        seen[limit] = [torch.cat([pair[part].flatten() for pair in calls]) for part in range(2)]
    free, curvature = seen[None]
    assert float(free.norm()) > 1e-2
    torch.testing.assert_close(seen[1e-3][0], free * (1e-3 / free.norm()), rtol=1e-4, atol=0)
    assert torch.equal(seen[1e6][0], free)
    assert torch.equal(seen[1e-3][1], curvature)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore:the weights start far")
def test_a_parameter_frozen_between_block_and_step_stays(name):
    model = network()
    method = METHODS[name](model.named_parameters(), n_data=ROWS)
    for _ in range(method.n_samples):
        with method.sampled():
            PROBLEM.loss(model).backward()
    frozen, free = model[0].weight, model[2].weight
    before, other = frozen.detach().clone(), free.detach().clone()
    frozen.requires_grad_(False)
    method.step()
    assert torch.equal(frozen, before)
    assert not torch.equal(free, other)
    assert float(method.state[frozen]["step"]) == 0
    assert "0.weight" not in method.posterior().names
    frozen.requires_grad_(True)
    steps(model, method)
    assert not torch.equal(frozen, before)
    assert float(method.state[frozen]["step"]) == 1


@pytest.mark.parametrize("name", ["ivon", "score_vi", "elbo"])
def test_gradients_near_the_largest_number_are_finite(name):
    """No sum of them is, nor a sum of squares."""
    model = network()
    method = METHODS[name](model.named_parameters(), n_data=ROWS, prior_precision=1e-3, antithetic=False, seed=1)
    with method.sampled():
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 3e38)
    assert set(method._drawn) == set(model.parameters())
    for count, first, second in method._drawn.values():
        assert count == 1
        torch.testing.assert_close(first, torch.full_like(first, 3e38))
        assert bool(second.isfinite().all())
    for bad in (float("inf"), float("nan")):
        with method.sampled():
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 3e38)
            model[2].weight.grad[0, 3] = bad
        with pytest.raises(InvalidInput, match=r"the gradient of 2\.weight is NaN or infinite"):
            method.step()


@pytest.mark.parametrize("inner", [1, 3])
@pytest.mark.filterwarnings("ignore:the weights start far")
def test_score_vi_sgd_starts_from_weights_that_were_loaded_after_it_was_made(inner):
    """As if it had been made afterwards: draws lie around the loaded weights, and so does the proximal term."""
    settings = {"lr": 1e-2, "n_data": ROWS, "init_sd": 0.01, "inner": inner}
    loaded, straight = network(seed=0), network(seed=1)
    method = ScoreVISGD(loaded.named_parameters(), **settings)
    loaded.load_state_dict(straight.state_dict())
    other = ScoreVISGD(straight.named_parameters(), **settings)
    centre = weights(straight)
    with method.sampled():
        assert float((weights(loaded) - centre).abs().max()) < 0.06
    assert torch.equal(weights(loaded), centre)
    steps(loaded, method, 4)
    steps(straight, other, 4)
    assert torch.equal(weights(loaded), weights(straight))
    assert torch.equal(variances(method), variances(other))
