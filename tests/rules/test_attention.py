"""Attention with random queries and keys: second order in the mean, first order in the variance."""

import math

import pytest
import torch
from torch import nn
from torch.func import jacrev
from torch.nn import functional as F

import bayespass.rules  # noqa: F401  registers every rule
from bayespass.approximation import CVP, FAITHFUL, SHARED
from bayespass.moments import Moments
from bayespass.rules import attention
from bayespass.testing import check_rule
from bayespass.testing.rule_checks import through_dispatch


def tensors(seed, *shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def attended(q, k, v, *args, approximation=FAITHFUL, **kwargs):
    return through_dispatch(F.scaled_dot_product_attention, (q, k, v, *args), kwargs, approximation)


@pytest.mark.parametrize("sd", [0.2, 0.5])
@pytest.mark.parametrize("n_keys", [3, 12])
def test_moments_match_monte_carlo(n_keys, sd):
    q, k, v = tensors(0, (2, 5, 8), (2, n_keys, 8), (2, n_keys, 6))
    noisy = (Moments(t, sd**2 * torch.rand_like(t)) for t in (q, k, v))
    check_rule(F.scaled_dot_product_attention, *noisy, approximation=FAITHFUL)


def test_mean_is_exact_to_second_order():
    """Mean(t) for noise of variance t v grows as t / 2 times the trace of the Hessian, per entry of q and k."""
    q, k, v, vq, vk = tensors(1, (4, 3), (5, 3), (5, 2), (4, 3), (5, 3))
    vq, vk, small = vq.square(), vk.square(), 1e-6

    def output(q, k):
        return torch.softmax(q @ k.T / math.sqrt(3), -1) @ v

    second = torch.zeros(4, 2, dtype=torch.float64)
    for variance, argument in ((vq, 0), (vk, 1)):
        rows = jacrev(jacrev(output, argument), argument)(q, k).flatten(4).flatten(2, 3)  # (4, 2, n, n)
        second += rows.diagonal(dim1=-2, dim2=-1) @ variance.flatten() / 2
    mean = attended(Moments(q, small * vq), Moments(k, small * vk), v).mean
    torch.testing.assert_close((mean - output(q, k)) / small, second, rtol=1e-4, atol=1e-6)


def test_noise_that_all_keys_share_changes_nothing():
    q, k, v = tensors(2, (4, 3), (5, 3), (5, 2))
    common = torch.ones_like(k)
    result = attended(q, Moments(k, common, common), Moments(v, torch.ones_like(v)))
    plain = attended(q, k, Moments(v, torch.ones_like(v)))
    torch.testing.assert_close(result.mean, plain.mean)
    torch.testing.assert_close(result.var, plain.var)


def test_queries_are_worked_on_in_parts(monkeypatch):
    q, k, v, mask = tensors(3, (2, 3, 7, 4), (2, 3, 7, 4), (2, 3, 7, 5), (7, 7))
    noisy = [Moments(t, torch.rand_like(t), torch.rand_like(t) / 4) for t in (q, k, v)]
    noisy = [Moments(x.mean, x.var + x.shared, x.shared) for x in noisy]
    for arguments in ({"is_causal": True}, {"attn_mask": mask}, {"attn_mask": mask > 0}, {"attn_mask": mask[:1]}):
        whole = attended(*noisy, **arguments)
        with monkeypatch.context() as patch:
            patch.setattr(attention, "SCORE_ELEMENTS", 2 * 7 * 6)
            parts = attended(*noisy, **arguments)
        for name in ("mean", "var", "shared"):
            torch.testing.assert_close(getattr(parts, name), getattr(whole, name))


def test_a_query_that_sees_no_key_is_zero():
    q, k, v = (Moments(t, torch.ones_like(t)) for t in tensors(4, (3, 4), (3, 4), (3, 2)))
    seen = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    result = attended(q, k, v, seen)
    assert torch.isfinite(result.mean).all()
    assert torch.equal(result.mean[1], torch.zeros(2, dtype=torch.float64))
    assert torch.equal(result.var[1], torch.zeros(2, dtype=torch.float64))


def test_huge_variance_stays_an_average_of_values():
    q, k, v = tensors(5, (6, 4), (7, 4), (7, 3))
    result = attended(Moments(q, torch.full_like(q, 1e6)), Moments(k, torch.full_like(k, 1e6)), v)
    assert torch.isfinite(result.var).all()
    assert (result.mean <= v.amax(0) + 1e-9).all()
    assert (result.mean >= v.amin(0) - 1e-9).all()


def test_known_values_are_random_through_the_weights():
    q, k, v = tensors(6, (2, 4), (5, 4), (5, 3))
    result = attended(Moments(q, torch.full_like(q, 0.1)), k, v)
    assert (result.var > 0).all()
    assert isinstance(attended(Moments(q, torch.full_like(q, 0.1)), k, v, approximation=CVP), torch.Tensor)


def test_half_precision_is_computed_in_single():
    q, k, v = tensors(7, (4, 8), (6, 8), (6, 3), dtype=torch.float32)
    noisy = [Moments(t, torch.full_like(t, 0.01)) for t in (q, k, v)]
    exact = attended(*noisy)
    half = attended(*(Moments(x.mean.bfloat16(), x.var.bfloat16()) for x in noisy))
    assert half.mean.dtype == half.var.dtype == torch.bfloat16
    torch.testing.assert_close(half.var.float(), exact.var, rtol=0.05, atol=1e-4)


def test_grouped_queries_share_a_key_head():
    q, k, v = tensors(8, (2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 6, 3))
    noisy = [Moments(t, torch.rand_like(t)) for t in (q, k, v)]
    grouped = attended(*noisy, enable_gqa=True)
    repeated = [Moments(x.mean.repeat_interleave(2, -3), x.var.repeat_interleave(2, -3)) for x in noisy[1:]]
    torch.testing.assert_close(grouped.var, attended(noisy[0], *repeated).var)


def in_place(scores, mask):
    scores = scores.clone()
    scores *= 0.5
    scores += mask
    return scores


SCORES = {  # how networks write scale and mask
    "divided": lambda scores, mask: scores / 2.0 + mask,
    "tensor": lambda scores, mask: mask + torch.tensor(0.5, dtype=torch.float64) * scores,
    "filled": lambda scores, mask: (scores * 0.5).masked_fill(mask < 0, -torch.inf),
    "chosen": lambda scores, mask: torch.where(mask == 0, scores.mul(0.5), torch.full_like(mask, -torch.inf)),
    "windows": lambda scores, mask: (scores.view(1, 2, 3, 5, 5) / 2 + mask).view(-1, 3, 5, 5).contiguous(),
    "in place": in_place,
    "from the mask": lambda scores, mask: mask - (-scores / 2),
    "times": lambda scores, mask: torch.add(mask, scores.unsqueeze(0).squeeze(0), alpha=0.5),
    "less the largest": lambda scores, mask: (scores - scores.amax(-1, keepdim=True)) * 0.5 + mask,
    "per head": lambda scores, mask: scores * torch.full((3, 1, 1), 0.5, dtype=torch.float64) + mask,
}


@pytest.mark.parametrize("spelling", SCORES)
def test_attention_written_out_knows_its_queries_and_keys(spelling):
    q, k, v = tensors(11, (2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 2))
    noisy = [Moments(t, var := torch.rand_like(t) / 4, share * var) for t, share in ((q, 0.2), (k, 0.5), (v, 0.7))]
    mask = torch.zeros(5, 5, dtype=torch.float64).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)

    def written(q, k, v):
        weights = torch.softmax(SCORES[spelling](q @ k.transpose(-1, -2), mask), dim=-1, dtype=torch.float64)
        return F.dropout(weights, 0.1, False) @ v

    found, fused = through_dispatch(written, noisy, {}, FAITHFUL), attended(*noisy, attn_mask=mask, scale=0.5)
    for field in ("mean", "var", "shared"):
        torch.testing.assert_close(getattr(found, field), getattr(fused, field))


def test_a_random_bias_of_the_scores_is_noise_of_the_keys():
    """Fused or written out, against draws of everything."""
    q, k, v, bias = tensors(12, (3, 5, 8), (3, 6, 8), (3, 6, 2), (3, 5, 6))
    noisy = [Moments(t, torch.full_like(t, 0.01)) for t in (q, k, v)] + [Moments(bias, torch.full_like(bias, 0.2))]

    def written(q, k, v, bias):
        return torch.softmax(q @ k.mT / math.sqrt(8) + bias, -1) @ v

    found = through_dispatch(written, noisy, {}, FAITHFUL)
    fused = attended(*noisy)
    torch.testing.assert_close(found.mean, fused.mean)
    torch.testing.assert_close(found.var, fused.var)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [
            written(*(x.mean + x.var.sqrt() * torch.randn(x.mean.shape, generator=generator, dtype=x.mean.dtype)
                      for x in noisy))
            for _ in range(4000)
        ]
    )  # fmt: skip
    mean, var = draws.mean(0), draws.var(0)
    assert ((found.mean - mean) / var.sqrt()).abs().mean() < 0.05
    assert ((written(q, k, v, bias) - mean) / var.sqrt()).abs().mean() > 0.07
    assert (found.var / var).log().abs().mean() < 0.15


@pytest.mark.parametrize(
    "equation", ["bhid,bhjd->bhij", "...id,...jd->...ij", "b h j d, b h i d -> b h i j", "bhid,bhjd->hbij"]
)
def test_scores_by_einsum_know_their_queries_and_keys(equation):
    q, k, v = tensors(14, (2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 2))
    noisy = [Moments(t, torch.rand_like(t) / 4) for t in (q, k, v)]

    def written(q, k, v):
        first, second = (k, q) if equation.startswith("b h j") else (q, k)
        weights = (torch.einsum(equation, first, second) / 2).softmax(-1)
        return (weights.transpose(0, 1) if equation.endswith("hbij") else weights) @ v

    found, fused = through_dispatch(written, noisy, {}, FAITHFUL), attended(*noisy, scale=0.5)
    torch.testing.assert_close(found.mean, fused.mean)
    torch.testing.assert_close(found.var, fused.var)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widen", [lambda s: s, torch.Tensor.float], ids=["half", "single"])
def test_attention_written_out_in_half_precision(dtype, widen):
    q, k, v = tensors(15, (2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 2), dtype=torch.float32)
    noisy = [Moments(t, torch.full_like(t, 0.05)) for t in (q, k, v)]

    def written(q, k, v):
        return torch.softmax(widen(q @ k.mT / 2), -1).to(v.dtype) @ v

    exact = through_dispatch(written, noisy, {}, FAITHFUL)
    half = through_dispatch(written, [Moments(x.mean.to(dtype), x.var.to(dtype)) for x in noisy], {}, FAITHFUL)
    assert half.mean.dtype == dtype
    torch.testing.assert_close(half.mean.float(), exact.mean, rtol=0.05, atol=0.02)
    torch.testing.assert_close(half.var.float(), exact.var, rtol=0.1, atol=1e-3)


def drawn(function, inputs, seed, count=4000):
    """Mean and variance of a function of independent Gaussian tensors, plain ones among them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(x):
        if isinstance(x, torch.Tensor):
            return x
        return x.mean + x.var.sqrt() * torch.randn(x.mean.shape, generator=generator, dtype=x.mean.dtype)

    draws = torch.stack([function(*(draw(x) for x in inputs)) for _ in range(count)])
    return draws.mean(0), draws.var(0)


PROBABILITIES = {
    "attention": (lambda q, k: torch.softmax(q @ k.mT / math.sqrt(8), -1), (2, 4, 8), (2, 6, 8), 0.05, 0.02),
    "router": (lambda x, w: torch.softmax(torch.bmm(x, w), -1), (2, 6, 8), (2, 8, 4), 0.02, 0.02),
    "two experts": (lambda x, w: torch.softmax(torch.bmm(x, w), -1), (2, 6, 8), (2, 8, 2), 0.02, 0.02),
    "known input": (lambda x, w: torch.softmax(torch.bmm(x, w), -1), (2, 6, 8), (2, 8, 4), None, 0.02),
    "filled": (
        lambda q, k: torch.softmax((q @ k.mT / math.sqrt(8)).masked_fill(torch.eye(4, 6) > 0, 1.5), -1),
        (2, 4, 8), (2, 6, 8), 0.05, 0.05,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PROBABILITIES)
def test_probabilities_of_scores_vary_about_the_average_score_of_their_query(case):
    """What other readers of the softmax see, against draws; noise that is common to all keys is not in it."""
    function, *shapes, of_first, of_second = PROBABILITIES[case]
    first, second = tensors(13, *shapes)
    first = first if of_first is None else Moments(first, torch.full_like(first, of_first))
    inputs = [first, Moments(second, torch.full_like(second, of_second))]
    found = through_dispatch(function, inputs, {}, FAITHFUL)
    mean, var = drawn(function, inputs, 1)
    counts = var > 1e-3 * var.amax()
    assert (found.var.sum() / var.sum()).log().abs() < 0.3
    assert (found.var / var)[counts].log().abs().mean() < 0.3
    assert ((found.mean - mean) / var.sqrt())[counts].abs().mean() < 0.15
    assert (found.shared is None) or (found.shared <= found.var).all()


def test_scores_that_only_look_like_attention():
    """One query for all keys, a bias that is the same at all of them, a known matrix that mixes random features."""
    q, k, v, mixing, bias = tensors(16, (4,), (3, 5, 4), (3, 5, 2), (3, 6, 5), (3, 1, 1))
    noisy = {name: Moments(t, torch.full_like(t, 0.05)) for name, t in {"q": q, "k": k, "v": v, "bias": bias}.items()}

    def pooled(q, k, v):
        return (torch.softmax((q @ k.mT).reshape(3, 5), -1).unsqueeze(1) @ v).squeeze(1)

    found = through_dispatch(pooled, [noisy["q"], noisy["k"], noisy["v"]], {}, FAITHFUL)
    assert found.var.shape == (3, 2)

    def biased(k, v, bias):
        return torch.softmax(k @ k.mT + bias, -1) @ v

    plain, same = (
        through_dispatch(lambda k, v, b=b: biased(k, v, b), [noisy["k"], noisy["v"]], {}, FAITHFUL) for b in (0.0, bias)
    )
    random = through_dispatch(biased, [noisy["k"], noisy["v"], noisy["bias"]], {}, FAITHFUL)
    for other in (same, random):
        torch.testing.assert_close(other.mean, plain.mean)
        torch.testing.assert_close(other.var, plain.var)

    shared = Moments(noisy["v"].mean, noisy["v"].var, 0.9 * noisy["v"].var)
    mixed = through_dispatch(lambda x: torch.softmax(torch.matmul(mixing, x), -1), (shared,), {}, FAITHFUL)
    torch.testing.assert_close(
        mixed.var, through_dispatch(lambda x: torch.softmax(torch.matmul(mixing, x), -1), (shared,), {}, SHARED).var
    )


def test_a_matrix_of_scores_keeps_the_mean_weights_and_adds_their_variance():
    """Without a batch axis the second factor may as well be a weight, and the softmax the network's output."""
    q, k, v = tensors(9, (4, 8), (6, 8), (6, 3))
    noisy = [Moments(t, torch.full_like(t, 0.1)) for t in (q, k, v)]

    def written(q, k, v):
        return torch.softmax(q @ k.mT / math.sqrt(8), -1) @ v

    def by_einsum(q, k, v):
        return torch.einsum("ts,sd->td", torch.softmax(q @ k.mT / math.sqrt(8), -1), v)

    known = through_dispatch(written, noisy, {}, CVP)
    random = through_dispatch(written, noisy, {}, FAITHFUL)
    torch.testing.assert_close(random.mean, known.mean)
    assert (random.var > known.var).all()
    torch.testing.assert_close(through_dispatch(by_einsum, noisy, {}, FAITHFUL).var, random.var)


def test_multihead_attention_is_the_fused_call_between_its_projections():
    torch.manual_seed(10)
    layer = nn.MultiheadAttention(8, 2, batch_first=True).double().eval()
    (x,) = tensors(10, (3, 5, 8))
    noisy = Moments(x, torch.full_like(x, 0.05))

    def by_hand(x):
        parts = F.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
        q, k, v = (t.reshape(3, 5, 2, 4).transpose(1, 2) for t in parts)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(3, 5, 8)
        return layer.out_proj(mixed)

    whole = through_dispatch(lambda x: layer(x, x, x, need_weights=False)[0], (noisy,), {}, FAITHFUL)
    parts = through_dispatch(by_hand, (noisy,), {}, FAITHFUL)
    torch.testing.assert_close(whole.mean, parts.mean)
    torch.testing.assert_close(whole.var, parts.var)


def test_gradients_reach_means_and_variances():
    q, k, v = tensors(11, (2, 4, 3), (2, 5, 3), (2, 5, 3))
    variances = [0.1 + t.square() / 4 for t in (q, k, v)]

    def moments(*fields):
        found = attention.attend(
            *(Moments(m, s) for m, s in zip(fields[:3], fields[3:], strict=True)), None, True, None
        )
        return found.mean, found.var

    fields = [t.clone().requires_grad_() for t in (q, k, v, *variances)]
    assert torch.autograd.gradcheck(moments, fields)
