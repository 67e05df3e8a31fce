import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from bayespass import (
    CVP,
    STREAMLINED,
    Approximation,
    DiagonalGaussian,
    InvalidInput,
    Moments,
    MonteCarlo,
    PosteriorInfo,
    PosteriorMismatch,
    SinglePass,
    UnsupportedOp,
    VarianceScales,
    fit_scales,
    module_rule,
    propagate,
)
from bayespass.demo.models import SmallCNN, SmallViT
from bayespass.gaussian import moments_of

REGRESSION = PosteriorInfo("regression", sigma_noise=0.3)


def deep_vit():
    return SmallViT(depth=4)


def isotropic(model, sd, info=None):
    mean = {name: p.detach() for name, p in model.named_parameters()}
    return DiagonalGaussian(mean, {name: torch.full_like(p, sd**2) for name, p in mean.items()}, info)


def varied(model, info=None):
    mean = {name: p.detach() for name, p in model.named_parameters()}
    return DiagonalGaussian(mean, {name: torch.rand_like(p) for name, p in mean.items()}, info)


def test_a_linear_network_has_its_exact_moments():
    model = nn.Linear(4, 3).double().eval()
    posterior, x = varied(model, REGRESSION), torch.randn(5, 4, dtype=torch.float64)
    prediction = propagate(model, posterior, x)
    torch.testing.assert_close(prediction.mean, model(x).detach())
    exact = x.square() @ posterior.variance["weight"].T + posterior.variance["bias"]
    torch.testing.assert_close(prediction.epistemic, exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(prediction.total - prediction.epistemic, torch.full_like(exact, 0.09))


def test_two_layer_bayesian_linear_regression_equals_its_closed_form():
    """Two linear layers without a nonlinearity: E[W2 W1 x] and its variance in closed form."""
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)).double().eval()
    posterior, x = varied(model, REGRESSION), torch.randn(6, 3, dtype=torch.float64)
    prediction = propagate(model, posterior, x, approximation="streamlined")
    m1, v1, m2, v2 = (q[n] for n in ("0.weight", "1.weight") for q in (posterior.mean, posterior.variance))
    hidden_mean, hidden_var = x @ m1.T, x.square() @ v1.T
    # Var(sum_j w_j h_j) = sum_j E[w_j^2] E[h_j^2] - E[w_j]^2 E[h_j]^2 for independent entries.
    second_moments = (m2.square() + v2) @ (hidden_mean.square() + hidden_var).T
    exact = (second_moments - m2.square() @ hidden_mean.square().T).T
    torch.testing.assert_close(prediction.epistemic, exact, rtol=1e-10, atol=0)
    samples = torch.stack(list(MonteCarlo(model, posterior, 20_000).outputs(x)))
    standard_error = samples.var(0) * (2 / 20_000) ** 0.5
    # products have heavier tails than Gaussians, hence three times the Gaussian standard error
    assert bool(((samples.var(0) - exact).abs() < 15 * standard_error).all())
    torch.testing.assert_close(samples.mean(0), prediction.mean, rtol=0, atol=6 * float((exact / 20_000).sqrt().max()))


@pytest.mark.parametrize(
    "approximation", [STREAMLINED, CVP, Approximation("delta", norm="delta")], ids=lambda a: a.name
)
@pytest.mark.parametrize("build", [deep_vit, SmallCNN])
def test_whole_networks_against_monte_carlo(build, approximation):
    """At a small posterior the mean is within 0.3 sd and the variance within a factor of three.

    Weights are scaled up because norms at the mean overstate variance without limit where
    activations are nearly constant, as in an untrained transformer (single_pass notes 3.3).
    """
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(6, 1, 8, 8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if build is deep_vit and parameter.dim() > 1 else 1)
    posterior = isotropic(model, 0.02)
    with torch.inference_mode():
        single = SinglePass(model, posterior, approximation)(x)
        reference = MonteCarlo(model, posterior, 400)(x)
    ratio = (single.logit_variance / reference.logit_variance).log().mean().exp()
    assert 1 / 3 < float(ratio) < 3
    gap = (single.logit_mean - reference.logit_mean) / reference.logit_variance.sqrt()
    assert float(gap.abs().mean()) < 0.3
    torch.testing.assert_close(single.probs.sum(-1), torch.ones(6))


@pytest.mark.parametrize("approximation", ["streamlined", "cvp"])
@pytest.mark.parametrize("build", [SmallViT, SmallCNN])
def test_zero_variance_gives_the_deterministic_network(build, approximation):
    model, x = build().eval(), torch.randn(4, 1, 8, 8)
    prediction = propagate(model, isotropic(model, 0.0), x, approximation)
    torch.testing.assert_close(prediction.logit_mean, model(x).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(prediction.probs, model(x).softmax(-1).detach(), rtol=1e-4, atol=1e-5)
    assert float(prediction.logit_variance.abs().max()) == 0.0


def test_operations_before_the_first_random_weight_stay_plain():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(type(x))
            return x

    model = nn.Sequential(nn.Linear(3, 3), Spy(), nn.Linear(3, 2), Spy()).eval()
    posterior = varied(model).subset(lambda name: name.startswith("2."))
    prediction = propagate(model, posterior, torch.randn(2, 3))
    assert seen[0] is torch.Tensor
    assert seen[1] is not torch.Tensor
    assert float(prediction.logit_variance.min()) > 0


def test_the_users_model_is_never_modified():
    model = SmallViT().eval()
    before, hooks = copy.deepcopy(model.state_dict()), [len(m._forward_hooks) for m in model.modules()]
    posterior = isotropic(model, 0.1)
    shifted = DiagonalGaussian({n: m + 1 for n, m in posterior.mean.items()}, posterior.variance)
    predictor = SinglePass(model, shifted)
    predictor(torch.randn(2, 1, 8, 8))
    predictor.to(torch.float64)
    predictor.train()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert not model.training
    assert all("forward" not in vars(m) for m in model.modules())


def test_predictors_share_nothing_with_the_model_or_the_posterior():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    posterior, x = varied(model).subset(["2.bias"]), torch.randn(4, 3)
    predictor = SinglePass(model, posterior)
    expected = predictor(x).logit_mean
    state, mean = copy.deepcopy(model.state_dict()), posterior.mean["2.bias"].clone()
    predictor.load_state_dict({name: value + 1 for name, value in predictor.state_dict().items()})
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(posterior.mean["2.bias"], mean)
    predictor = SinglePass(model, posterior)
    with torch.no_grad():
        model[0].weight.add_(1)
        model[1].running_mean.add_(1)
    torch.testing.assert_close(predictor(x).logit_mean, expected)


def test_both_names_of_a_tied_weight_are_refused():
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)}).eval()
    model["b"].weight = model["a"].weight
    value = model["a"].weight.detach()
    both = DiagonalGaussian(
        {"a.weight": value, "b.weight": value}, dict.fromkeys(("a.weight", "b.weight"), value.square())
    )
    with pytest.raises(PosteriorMismatch, match=r"a\.weight and b\.weight are one tied parameter"):
        both.check_model(model)


def test_variance_below_the_range_of_half_precision_is_kept():
    model = nn.Linear(3, 2).eval().half()
    tiny = DiagonalGaussian({"weight": torch.zeros(2, 3)}, {"weight": torch.full((2, 3), 1e-9)})
    _, variance = SinglePass(model, tiny).moments(torch.ones(1, 3).half())
    torch.testing.assert_close(variance, torch.full((1, 2), 3e-9))


def test_tied_weights_are_one_random_parameter():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.embed(tokens))

    model, tokens = Tied().eval(), torch.tensor([[1, 2]])
    first = propagate(model, varied(model), tokens)
    torch.manual_seed(0)
    value = model.embed.weight.detach()
    spread = varied(model).variance["embed.weight"]
    by_either = [
        propagate(model, DiagonalGaussian({n: value}, {n: spread}), tokens) for n in ("embed.weight", "head.weight")
    ]
    torch.testing.assert_close(by_either[0].logit_variance, by_either[1].logit_variance)
    assert first.logit_variance.shape == (1, 2, 7)


@pytest.mark.parametrize("grad", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_gradient_modes(grad):
    model = SmallCNN().eval()
    with grad():
        assert propagate(model, isotropic(model, 0.1), torch.randn(2, 1, 8, 8)).probs.shape == (2, 10)


def test_gradients_reach_the_input():
    model, x = SmallCNN().eval(), torch.randn(2, 1, 8, 8, requires_grad=True)
    propagate(model, isotropic(model, 0.1), x).logit_variance.sum().backward()
    assert float(x.grad.abs().sum()) > 0


def test_batches_of_tuples_and_dicts_and_structured_outputs():
    class Two(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.linear, self.wrap = nn.Linear(3, 2), wrap

        def forward(self, first, second=None):
            return self.wrap(self.linear(first) + (0 if second is None else second))

    class Output(dict):
        __getattr__ = dict.get

    x, y = torch.randn(4, 3), torch.randn(4, 2)
    plain = Two(lambda t: t).eval()
    expected = propagate(plain, varied(plain), (x, y))
    for wrap in (lambda t: (t, None), lambda t: {"logits": t}, lambda t: Output(logits=t)):
        model = Two(wrap).eval()
        model.load_state_dict(plain.state_dict())
        torch.manual_seed(0)
        found = propagate(model, isotropic(model, 0.3), {"first": x, "second": y})
        torch.testing.assert_close(found.logit_mean, expected.logit_mean)
    model = Two(lambda t: "text").eval()
    with pytest.raises(InvalidInput, match=r"must return a tensor.*str"):
        propagate(model, varied(model), x)
    with pytest.raises(InvalidInput, match="inputs must be"):
        propagate(plain, varied(plain), "text")


class Cumulative(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return torch.cumprod(self.linear(x), 1)


def test_an_operation_without_a_rule_says_what_where_and_how():
    model = nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"block": Cumulative()})["block"]).eval()
    with pytest.raises(
        UnsupportedOp, match=r"torch\.cumprod.*in 1 \(Cumulative\).*test_propagation\.py:\d+.*@bayespass\.rule"
    ):
        propagate(model, varied(model), torch.randn(2, 3))


def test_a_module_rule_takes_the_block_whole():
    @module_rule(Cumulative)
    def cumulative(module, x):
        own = moments_of(module)
        mean = F.linear(x.mean, own["linear.weight"].mean if "linear.weight" in own else torch.eye(3))
        return Moments(mean.cumsum(1), x.var.cumsum(1))

    from bayespass.rules.registry import _MODULE_RULES

    try:
        model = nn.Sequential(nn.Linear(3, 3), type("Sub", (Cumulative,), {})()).eval()
        posterior = varied(model).subset(lambda name: name.startswith("0."))
        x = torch.randn(2, 3)
        prediction = propagate(model, posterior, x)
        torch.testing.assert_close(prediction.logit_mean, model[0](x).detach().cumsum(1))
        assert "forward" not in vars(model[1])
    finally:
        del _MODULE_RULES[Cumulative]


def test_a_block_taken_whole_is_one_site_even_when_it_comes_first():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x):
            return self.inner(x)

    calls = []

    @module_rule(Block)
    def block(module, x):
        calls.append(module)
        own = moments_of(module.inner)
        return Moments(
            F.linear(x, own["weight"].mean, own["bias"].mean), F.linear(x.square(), own["weight"].var, own["bias"].var)
        )

    from bayespass.rules.registry import _MODULE_RULES

    try:
        model, x = nn.Sequential(Block(), nn.Linear(3, 2)).eval(), torch.randn(50, 3)
        posterior = isotropic(model, 0.1)
        predictor = SinglePass(model, posterior)
        assert predictor.sites == ("0", "1", "")
        predictor(x)
        assert len(calls) == 1
        assert set(fit_scales(model, posterior, x, n_samples=20)) == {"0", "1", ""}
    finally:
        del _MODULE_RULES[Block]


def test_module_rules_see_the_modules_own_gaussian_parameters():
    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor([2.0]))

        def forward(self, x):
            return torch.lerp(x, self.gain * x, 1.0)

    @module_rule(Gain)
    def gain(module, x):
        own = moments_of(module)["gain"]
        return Moments(own.mean * x, own.var * x.square())

    from bayespass.rules.registry import _MODULE_RULES

    try:
        model = Gain().eval()
        prediction = propagate(
            model,
            DiagonalGaussian({"gain": torch.tensor([2.0])}, {"gain": torch.tensor([0.5])}),
            torch.tensor([[1.0, 3.0]]),
        )
        torch.testing.assert_close(prediction.logit_variance, torch.tensor([[0.5, 4.5]]))
    finally:
        del _MODULE_RULES[Gain]


def test_scales_multiply_the_variance_at_their_site():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).eval()
    posterior, x = varied(model), torch.randn(5, 3)
    plain = SinglePass(model, posterior)
    assert plain.sites == ("0", "1", "")
    torch.testing.assert_close(
        SinglePass(model, posterior, scales={"": 2.0})(x).logit_variance, 2 * plain(x).logit_variance
    )
    scaled = SinglePass(model, posterior, scales={"0": 3.0, "1": 0.5})(x)
    hidden = posterior.variance["0.weight"], posterior.variance["0.bias"]
    tripled = DiagonalGaussian(
        posterior.mean, {**posterior.variance, "0.weight": 3 * hidden[0], "0.bias": 3 * hidden[1]}
    )
    torch.testing.assert_close(scaled.logit_variance, 0.5 * SinglePass(model, tripled)(x).logit_variance)
    assert "2 of 3 sites scaled" in scaled.notes


def test_logits_that_features_move_together():
    """A known head on random features: the logits are jointly Gaussian, and softmax is averaged over that."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 6)).eval().requires_grad_(False)
    posterior = isotropic(model, 0.7).subset(["0.weight", "0.bias"])
    x = torch.randn(4, 5)
    truth = torch.stack([functional_call(model, dict(w), (x,)).softmax(-1) for w in posterior.sample(20_000, 0)]).mean(
        0
    )

    def divergence(approximation):
        probs = SinglePass(model, posterior, approximation)(x).probs
        return float((truth * (truth / probs).log()).sum(-1).mean())

    assert divergence("faithful") < 1e-3
    assert divergence("faithful") < 0.1 * divergence("shared")  # which takes logits as independent
    predictor = SinglePass(model, posterior, scales={"0": 1.0, "": 1.0})
    torch.testing.assert_close(predictor(x).probs, SinglePass(model, posterior)(x).probs)
    variance, correlation = predictor.correlated_moments(x)[1:]
    assert correlation is not None
    assert SinglePass(model, posterior, "shared").correlated_moments(x)[2] is None
    torch.testing.assert_close(correlation.features @ model[1].weight.square().T, variance)


def test_logits_that_something_changed_after_the_head_are_independent():
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 6), nn.Tanh()).eval()
    assert SinglePass(model, isotropic(model, 0.5)).correlated_moments(torch.randn(2, 5))[2] is None


def test_bad_scales_name_the_site():
    model = nn.Sequential(nn.Linear(3, 2)).eval()
    posterior = varied(model)
    with pytest.raises(InvalidInput, match="'nope', which is no site"):
        SinglePass(model, posterior, scales={"nope": 1.0})
    with pytest.raises(InvalidInput, match="must be positive"):
        SinglePass(model, posterior, scales={"0": -1.0})
    with pytest.raises(InvalidInput, match="fitted for approximation 'cvp'"):
        SinglePass(model, posterior, "streamlined", scales=VarianceScales({"0": 1.0}, "cvp"))
    with pytest.raises(InvalidInput, match="approximation must be"):
        SinglePass(model, posterior, "exact")
    with pytest.raises(InvalidInput, match=r"Approximation\.norm"):
        Approximation("mine", norm="sample")


def test_training_mode_is_refused():
    model = SmallCNN().eval()
    posterior = isotropic(model, 0.1)
    model.features[1].train()
    with pytest.raises(InvalidInput, match=r"'features\.1' is in training mode"):
        SinglePass(model, posterior)
    predictor = SinglePass(model.eval(), posterior)
    predictor.train()
    with pytest.raises(InvalidInput, match="training mode"):
        predictor(torch.randn(2, 1, 8, 8))


def test_nan_weights_name_the_parameter():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).eval()
    posterior = varied(model).subset(["1.bias"])
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(InvalidInput, match=r"parameter 0\.weight of Sequential is NaN"):
        SinglePass(model, posterior)


def test_a_foreign_posterior_is_refused():
    with pytest.raises(PosteriorMismatch, match="lacks"):
        SinglePass(nn.Linear(3, 2).eval(), varied(SmallCNN()))


def test_the_predictor_is_a_module_like_any_other():
    model, x = SmallCNN().eval(), torch.randn(2, 1, 8, 8)
    posterior = isotropic(model, 0.1)
    predictor = SinglePass(model, posterior)
    other = SinglePass(SmallCNN().eval(), isotropic(model, 0.2))
    other.load_state_dict(predictor.state_dict())
    torch.testing.assert_close(other(x).logit_variance, predictor(x).logit_variance)
    assert predictor.to(torch.float64)(x.double()).probs.dtype == torch.float64


def test_half_precision_is_finite():
    model = SmallViT().eval()
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(model).to(dtype)
        prediction = propagate(half, isotropic(half, 0.05), torch.randn(2, 1, 8, 8, dtype=dtype))
        assert prediction.probs.dtype == dtype
        assert bool(torch.isfinite(prediction.logit_variance).all())
        assert bool((prediction.logit_variance >= 0).all())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", [SmallViT, SmallCNN])
def test_compile_and_export_give_the_eager_result(build):
    """One graph without breaks, so that shipping needs no other design."""
    model, x = build().eval(), torch.randn(2, 1, 8, 8)
    predictor = SinglePass(model, isotropic(model, 0.1), scales={"head" if build is SmallViT else "head.2": 1.5})
    with torch.no_grad():
        expected = predictor(x)
        compiled = torch.compile(predictor, fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(compiled.logit_variance, expected.logit_variance)
        torch.testing.assert_close(compiled.probs, expected.probs)
        exported = torch.export.export(predictor, (x,), strict=False).module()(x)
        torch.testing.assert_close(exported.logit_variance, expected.logit_variance)


def test_attention_written_out_equals_the_fused_call():
    class Attention(nn.Module):
        def __init__(self, fused):
            super().__init__()
            self.qkv, self.fused, self.drop = nn.Linear(8, 24), fused, nn.Dropout(0.1)

        def forward(self, x):
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
            if self.fused:
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)
            scores = q @ k.transpose(-2, -1) / 2 + torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)
            return self.drop(torch.softmax(scores, -1).to(v.dtype)) @ v

    fused, written = Attention(True).eval(), Attention(False).eval()
    written.load_state_dict(fused.state_dict())
    posterior, x = isotropic(fused, 0.3), torch.randn(2, 5, 8)
    for approximation in ("streamlined", "cvp", "shared", "faithful"):
        a, b = (propagate(m, posterior, x, approximation) for m in (fused, written))
        torch.testing.assert_close(a.logit_mean, b.logit_mean)
        torch.testing.assert_close(a.logit_variance, b.logit_variance)
    predictor = SinglePass(written, posterior)
    with torch.inference_mode():
        compiled = torch.compile(predictor, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(compiled.logit_variance, b.logit_variance)


def test_a_softmax_outside_attention_keeps_its_variance():
    model = nn.Sequential(nn.Linear(3, 4), nn.Softmax(dim=-1)).eval()
    prediction = propagate(model, isotropic(model, 0.1), torch.randn(2, 3))
    assert float(prediction.logit_variance.min()) > 0
