"""What check_rule cannot draw, attention in all its spellings, gated products, and blocks recognised by what they do."""

import math

import pytest
import torch
from cases import gaussian, plain
from torch import Tensor, nn
from torch.nn import functional as F

from bayespass.approximation import CVP, FAITHFUL, SHARED, STREAMLINED
from bayespass.moments import Moments
from bayespass.rules.placing import CREATIONS, FILLED, PREDICATES
from bayespass.rules.registry import module_rule_for
from bayespass.testing.rule_checks import through_dispatch

N = 200_000


def sampled(x, n=N, seed=1):
    noise = torch.randn((n, *x.mean.shape), generator=torch.Generator().manual_seed(seed), dtype=x.mean.dtype)
    return x.mean + noise * x.var.sqrt()


@pytest.mark.parametrize("operation", CREATIONS, ids=lambda f: f.__name__)
def test_creations_take_only_shape_and_kind(operation):
    x = gaussian(2, 3)
    arguments = {torch.full_like: (1.5,), Tensor.new_tensor: ([1.0, 2.0],), Tensor.new_full: ((2,), 3.0)}
    made = through_dispatch(
        operation, (x, *arguments.get(operation, ((2,),) if "new" in operation.__name__ else ())), {}, CVP
    )
    if operation in FILLED:  # ready to be written into
        assert float(made.var.abs().max()) == 0
        made = made.mean
    assert isinstance(made, Tensor)
    assert made.dtype == x.mean.dtype


def test_results_can_be_collected_in_zeros_made_from_a_gaussian():
    from bayespass.gaussian import GaussianTensor, read

    x = GaussianTensor(gaussian(2, 3), CVP)
    collected = torch.zeros_like(x)
    collected[:, 1] = x[:, 0]
    collected.index_add_(1, torch.tensor([2]), x[:, 1:2])
    expected = torch.stack([torch.zeros(2), gaussian(2, 3).var[:, 0], gaussian(2, 3).var[:, 1]], 1)
    torch.testing.assert_close(read(collected).var, expected.double())


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="torch has no grouped product")
def test_grouped_products_are_products_by_group():
    x, w = gaussian(4, 8), gaussian(2, 8, 8, seed=1)
    x, w = Moments(x.mean.float(), x.var.float()), Moments(w.mean.float(), w.var.float())
    result = through_dispatch(torch._grouped_mm, (x, w), {"offs": torch.tensor([1, 4], dtype=torch.int32)}, CVP)
    for rows, group in ((slice(0, 1), 0), (slice(1, 4), 1)):
        own = through_dispatch(
            torch.matmul, (Moments(x.mean[rows], x.var[rows]), Moments(w.mean[group], w.var[group])), {}, CVP
        )
        torch.testing.assert_close(result.mean[rows], own.mean)
        torch.testing.assert_close(result.var[rows], own.var)


def test_topk_takes_the_largest_means():
    x = gaussian(3, 5)
    values, places = through_dispatch(torch.topk, (x, 2), {}, CVP)
    assert places.equal(x.mean.topk(2).indices)
    torch.testing.assert_close(values.var, x.var.gather(1, places))


@pytest.mark.parametrize("operations", PREDICATES, ids=lambda f: f[0].__name__)
def test_predicates_read_the_mean(operations):
    x = Moments(torch.tensor([1.0, math.nan, math.inf]), torch.ones(3))
    for operation in operations:
        assert through_dispatch(operation, (x,), {}, CVP).equal(operation(x.mean))


def test_the_largest_along_an_axis_comes_with_its_place():
    x = gaussian(3, 5)
    values, places = through_dispatch(torch.max, (x, 1), {}, CVP)
    torch.testing.assert_close(values.mean, through_dispatch(torch.amax, (x, 1), {}, CVP).mean)
    assert places.equal(x.mean.argmax(1))


def test_rrelu_in_eval_mode_is_leaky_relu():
    x = gaussian(8)
    result = through_dispatch(F.rrelu, (x, 0.1, 0.3), {"training": False}, CVP)
    expected = through_dispatch(F.leaky_relu, (x, 0.2), {}, CVP)
    torch.testing.assert_close(result.mean, expected.mean)
    torch.testing.assert_close(result.var, expected.var)


def test_packed_sequences_give_what_separate_sequences_give():
    torch.manual_seed(0)
    lstm = nn.LSTM(3, 4, bidirectional=True, batch_first=True).double().eval()
    x, lengths = plain(2, 5, 3), [5, 3]
    from bayespass import DiagonalGaussian, SinglePass

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = lstm

        def forward(self, x, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(x * self.lstm.weight_ih_l0.mean(), lengths, batch_first=True)
            return nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0]

    model = Packed().eval()
    mean = {name: p.detach() for name, p in model.named_parameters()}
    posterior = DiagonalGaussian(mean, {name: torch.full_like(p, 1e-3) for name, p in mean.items()})
    single_pass = SinglePass(model, posterior, "shared")
    together = single_pass.moments(x, torch.tensor(lengths))
    alone = single_pass.moments(x[1:, :3], torch.tensor([3]))
    torch.testing.assert_close(together[0][1:, :3], alone[0])
    torch.testing.assert_close(together[1][1:, :3], alone[1])
    assert float(together[1][1, 3:].abs().max()) == 0


@pytest.mark.parametrize("approximation", [CVP, STREAMLINED, SHARED, FAITHFUL], ids=lambda a: a.name)
@pytest.mark.parametrize("spelling", ["matmul", "einsum", "bmm", "baddbmm"])
def test_attention_written_out_has_the_moments_of_the_fused_call(approximation, spelling):
    q, k, v = (gaussian(2, 4, 3, seed=i) for i in range(3))
    if approximation.shared == "carry":
        q, k, v = (Moments(x.mean, x.var, share * x.var) for x, share in zip((q, k, v), (0.3, 0.6, 0.5), strict=True))
    mask = torch.zeros(4, 4, dtype=torch.float64).masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf)

    def eager(q, k, v):
        if spelling == "einsum":
            scores = torch.einsum("btd,bsd->bts", q, k) / math.sqrt(3) + mask
        elif spelling == "baddbmm":
            scores = torch.baddbmm(mask.expand(2, 4, 4), q, k.transpose(1, 2), beta=1.0, alpha=1 / math.sqrt(3))
        else:
            scores = (torch.bmm(q, k.transpose(1, 2)) if spelling == "bmm" else q @ k.mT) * (1 / math.sqrt(3))
            scores = torch.where(mask == 0, scores, -torch.inf)
        weights = F.dropout(torch.softmax(scores, -1), 0.1, False).to(q.dtype)
        return torch.einsum("bts,bsd->btd", weights, v) if spelling == "einsum" else torch.matmul(weights, v)

    from bayespass.gaussian import GaussianTensor, read

    written = read(eager(*(GaussianTensor(x, approximation) for x in (q, k, v))))
    fused = through_dispatch(F.scaled_dot_product_attention, (q, k, v, mask), {}, approximation)
    torch.testing.assert_close(written.mean, fused.mean)
    torch.testing.assert_close(written.var, fused.var)
    if approximation.shared == "carry":
        torch.testing.assert_close(written.shared, fused.shared)


@torch.no_grad()
def test_multihead_attention_equals_its_parts_and_its_fast_path():
    """Masks, padding, added keys: at zero variance the rule is nn.MultiheadAttention itself."""
    torch.manual_seed(0)
    for options in (
        {},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"kdim": 3, "vdim": 5},
        {"bias": False},
        {"batch_first": True},
    ):
        attention = nn.MultiheadAttention(4, 2, **options).double().eval()
        x = plain(3, 2, 4) if not options.get("batch_first") else plain(2, 3, 4)
        key = plain(6, 2, options.get("kdim", 4), seed=1) if not options.get("batch_first") else plain(2, 6, 4, seed=1)
        value = plain(*key.shape[:2], options.get("vdim", 4), seed=2)
        padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
        for arguments in ({}, {"key_padding_mask": padding}, {"attn_mask": plain(3, 6)}, {"average_attn_weights": False}, {"need_weights": False},
                          {"attn_mask": plain(4, 3, 6) > 1, "key_padding_mask": padding}):  # fmt: skip
            expected, expected_weights = attention(x, key, value, **arguments)
            from bayespass.gaussian import GaussianTensor, read

            out, weights = attention(x, key, GaussianTensor(Moments(value, torch.zeros_like(value)), CVP), **arguments)
            torch.testing.assert_close(read(out).mean, expected.detach())
            assert float(read(out).var.abs().max()) == 0
            if expected_weights is not None:
                torch.testing.assert_close(weights, expected_weights.detach())


@pytest.mark.parametrize("fused", [False, True], ids=["two projections", "one projection, chunked"])
@pytest.mark.parametrize("approximation", [CVP, SHARED], ids=lambda a: a.name)
def test_gated_products_count_the_covariance_of_their_common_input(fused, approximation):
    """z = (W_g x) (W_u x) for random x and known W: exact mean, variance up to non-Gaussian terms."""
    x = gaussian(6, seed=3)
    gate, up = plain(4, 6, seed=1), plain(4, 6, seed=2)

    class Gated(nn.Module):
        def forward(self, x):
            if fused:
                g, u = F.linear(x, torch.cat([gate, up])).chunk(2, -1)
            else:
                g, u = F.linear(x, gate), F.linear(x, up)
            return g * u

    from bayespass.gaussian import GaussianTensor, read

    result = read(Gated()(GaussianTensor(x, approximation)))
    draws = sampled(x)
    truth = (draws @ gate.T) * (draws @ up.T)
    error = (truth.var(0) / N).sqrt()
    assert float(((result.mean - truth.mean(0)) / error).abs().max()) < 5
    independent = read(GaussianTensor(x, approximation) @ gate.T).var
    assert independent is not None
    torch.testing.assert_close(result.var, truth.var(0), rtol=0.03, atol=0)


def test_swiglu_counts_the_covariance_through_its_activation():
    x = Moments(plain(6), torch.full((6,), 0.05, dtype=torch.float64))
    gate, up = plain(4, 6, seed=1), plain(4, 6, seed=2)
    from bayespass.gaussian import GaussianTensor, read

    lifted = GaussianTensor(x, CVP)
    result = read(F.silu(F.linear(lifted, gate)) * F.linear(lifted, up))
    draws = sampled(x)
    truth = F.silu(draws @ gate.T) * (draws @ up.T)
    torch.testing.assert_close(result.var, truth.var(0), rtol=0.12, atol=1e-3)
    assert float(((result.mean - truth.mean(0)).abs() / truth.std(0)).max()) < 0.03


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class SecondRMS(nn.Module):
    """RMS norm with the weight written as 1 + w, as some libraries do."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = 1e-3

    def forward(self, x):
        x32 = x.float()
        return ((1.0 + self.weight.float()) * x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(
            x
        )


class CentredNorm(SecondRMS):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class Rolled(nn.Module):
    def forward(self, x):
        return torch.roll(x * torch.sigmoid(x), 1, -1)


class PixelNorm(nn.Module):
    """RMS over channels: the last axis only for matrices."""

    def __init__(self):
        super().__init__()
        self.eps = 1e-8

    def forward(self, x):
        return x / torch.sqrt(torch.mean(x**2, dim=1, keepdim=True) + self.eps)


class CentredIn3D(nn.Module):
    def forward(self, x):
        y = x * 2 + 1
        return y - y.mean(1, keepdim=True) if x.dim() == 3 else y


class Shifted(nn.Module):
    def forward(self, x):
        return x * 0.5 + F.pad(x, (0, 5))[..., 5:] * 0.5


class GatedNorm(SecondRMS):
    """An RMS norm with an optional second input."""

    def forward(self, hidden, gate=None):
        return super().forward(hidden if gate is None else hidden * F.silu(gate))


def over(model, x, variance=1e-4, approximation=CVP):
    from bayespass import DiagonalGaussian, SinglePass

    mean = {name: p.detach() for name, p in model.named_parameters()}
    posterior = DiagonalGaussian(
        mean, {name: torch.full_like(p, variance, dtype=torch.float32) for name, p in mean.items()}
    )
    return SinglePass(model, posterior, approximation).moments(*x)


@pytest.mark.parametrize("block", [PixelNorm, CentredIn3D, Shifted], ids=lambda c: c.__name__)
def test_blocks_that_only_look_alike_are_answered_by_their_operations(block):
    assert module_rule_for(block()) is None
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(3, 12, 3), block()).eval()
    x = torch.randn(2, 3, 14)
    torch.testing.assert_close(over(net, (x,), 1e-12)[0], net(x).detach())


def test_a_recognised_block_with_a_second_input_is_answered_by_its_operations():
    class Net(nn.Module):
        def __init__(self, gated):
            super().__init__()
            self.first, self.norm, self.gated = nn.Linear(4, 8), GatedNorm(8), gated

        def forward(self, x):
            y = self.first(x)
            return self.norm(y, gate=y.tanh()) if self.gated else self.norm(hidden=y)

    for gated in (False, True):
        net, x = Net(gated).eval(), torch.randn(5, 4)
        mean, variance = over(net, (x,), 1e-12)
        torch.testing.assert_close(mean, net(x).detach())
        assert bool((variance >= 0).all())


def test_a_norm_keeps_its_own_precision():
    """A single-precision weight in a half-precision model, as some libraries keep it."""
    net = nn.Sequential(nn.Linear(4, 8), SecondRMS(8), nn.Linear(8, 2)).to(torch.bfloat16).eval()
    net[1].weight.data = net[1].weight.data.float()
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    mean, _ = over(net, (x,))
    assert mean.dtype == net(x).dtype


def test_blocks_are_recognised_by_what_they_compute():
    assert module_rule_for(QuickGELU()) is not None
    assert module_rule_for(SecondRMS(8)) is not None
    for other in (
        CentredNorm(8),
        Rolled(),
        nn.GELU(),
        nn.Identity(),
        nn.Linear(8, 8),
        nn.LayerNorm(8),
        nn.Sequential(),
    ):
        assert module_rule_for(other) is None, other


def test_a_recognised_activation_has_the_moments_of_its_input():
    from bayespass.rules.blocks import written_out_activation

    x = Moments(torch.linspace(-3, 3, 9, dtype=torch.float64), torch.full((9,), 0.7, dtype=torch.float64))
    result = written_out_activation(QuickGELU())(QuickGELU(), x, approximation=CVP)
    truth = QuickGELU()(sampled(x, 400_000))
    torch.testing.assert_close(result.mean, truth.mean(0), rtol=0, atol=5e-3)
    torch.testing.assert_close(result.var, truth.var(0), rtol=0.02, atol=1e-4)


def test_a_recognised_norm_has_the_moments_of_the_function():
    from bayespass.rules.blocks import written_out_rms_norm

    x = gaussian(3, 32).mean.float(), gaussian(3, 32).var.float()
    module = SecondRMS(32).eval()
    mine = written_out_rms_norm(module)(module, Moments(*x), approximation=SHARED)
    expected = through_dispatch(F.rms_norm, (Moments(*x), (32,), torch.ones(32), 1e-3), {}, SHARED)
    torch.testing.assert_close(mine.mean, expected.mean)
    torch.testing.assert_close(mine.var, expected.var)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gated_products_count_their_covariance_in_every_precision(dtype):
    from bayespass.gaussian import GaussianTensor, read

    w = plain(32, 16).to(dtype)
    x = GaussianTensor(
        Moments(
            torch.zeros(1, 16, dtype=dtype),
            torch.full((1, 16), 0.09, dtype=torch.float32 if dtype == torch.float16 else dtype),
        ),
        CVP,
    )
    result = read(F.linear(x, w) * F.linear(x, w))
    expected = 0.09 * w.float().square().sum(1)
    torch.testing.assert_close(result.mean.float(), expected[None], rtol=0.05, atol=0.05)


def test_small_variances_survive_float16():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False)).eval()
    x = torch.randn(2, 16) * 0.02
    _, expected = over(net, (x,), 1e-8)
    _, variance = over(net.half(), (x.half(),), 1e-8)
    torch.testing.assert_close(variance.float(), expected, rtol=0.05, atol=0)


def test_infinities_stay_infinite_in_float16():
    x = Moments(torch.zeros(2, 2, dtype=torch.float16), torch.ones(2, 2))
    masked = through_dispatch(torch.masked_fill, (x, torch.tensor([True, False]), -math.inf), {}, CVP)
    assert masked.mean[:, 0].isneginf().all()


def test_float16_autocast_is_refused():
    from bayespass.errors import InvalidInput

    net = nn.Linear(3, 2).eval()
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(InvalidInput, match="bfloat16"):
        over(net, (torch.randn(2, 3),))


@pytest.mark.parametrize("equation", ["bi,ij,jk->bk", "bi,ij->bi", "ib,bo->io"])
def test_einsum_contracts_known_operands_before_squaring(equation):
    x, known = gaussian(2, 4), [plain(4, 5), plain(5, 3)][: equation.count(",")]
    result = through_dispatch(torch.einsum, (equation, x, *known), {}, CVP)
    truth = torch.stack([torch.einsum(equation, draw, *known) for draw in sampled(x, 20_000)])
    torch.testing.assert_close(result.var, truth.var(0), rtol=0.06, atol=1e-6)


def test_einsum_with_a_summed_axis_that_only_the_known_operand_has():
    x = gaussian(3, 4)
    known = plain(2, 4) + 1
    result = through_dispatch(torch.einsum, ("bi,oi->o", known, x), {}, CVP)
    torch.testing.assert_close(result.var, (known.sum(0).square() * x.var).sum(1))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_integer_gains_do_not_overflow(dtype):
    x = gaussian(3)
    scaled = through_dispatch(torch.mul, (x, torch.full((3,), 100, dtype=dtype)), {}, CVP)
    torch.testing.assert_close(scaled.var, 1e4 * x.var)


def test_views_copies_and_spellings():
    from bayespass.gaussian import GaussianTensor, read

    def made(*shape, dtype=torch.float64):
        x = gaussian(*shape)
        return GaussianTensor(Moments(x.mean.to(dtype), x.var.to(dtype)), CVP)

    x = made(3, 4)
    copied = x[torch.tensor([0, 1])]
    copied += 1
    assert isinstance(x * 2, GaussianTensor)  # an advanced index copies: x is not stale
    x[:, :2] += 1.0
    torch.testing.assert_close(read(x).mean[:, :2], gaussian(3, 4).mean[:, :2] + 1)
    assert isinstance(x * 2, GaussianTensor)
    low = made(3, 4, dtype=torch.bfloat16)
    low += torch.ones(3, 4)
    assert low.dtype == read(low).mean.dtype == torch.bfloat16
    for result in (torch.flatten(input=x), torch.chunk(input=x, chunks=2, dim=1)[0], x.mean(axis=1), x.sum(axis=1, keepdims=True),
                   x.scatter(1, torch.zeros(3, 1, dtype=torch.long), src=x), torch.zeros(3, 4).double().where(torch.ones(3, 4).bool(), x)):  # fmt: skip
        assert isinstance(result, GaussianTensor)
    mask = torch.zeros_like(x).scatter_(1, torch.tensor([[0], [1], [2]]), 1)
    assert mask.bool().sum() == 3
    assert (torch.zeros_like(x) == 0).all()
    with pytest.raises(Exception, match="random"):
        _ = x > 0
