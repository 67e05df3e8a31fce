"""Softmax and attention, fused and written out.

Assumption: values are independent across keys except for what they share, so that known attention
weights P give v_o = P^2 v_V. What the approximation's field `scores` says of queries and keys:

    "at_mean"  they enter by their means: P = softmax(s), and only values carry variance
    "random"   their noise moves the weights (second order) and adds variance (first order)

The noise of one query is common to all its keys, and what keys share moves all scores of a query
alike; softmax does not see either. What is left is the variance of a score around the average score
of its query, tau_ij = Var(s_ij - sum_l P_il s_il), from which the weights are
softmax(s + tau / 2): exact to second order, the plain softmax where tau vanishes. The variance of a
score itself, which is several times tau, would flatten the weights far too much
(docs/assumptions.md#attention).

Work goes over queries in parts, so that no T x S matrix of a long sequence is kept.

Written out, the product of queries and keys remembers both in `Moments.factors`, through scaling,
masking and casts, and the softmax that follows finds the same weights and noise there. It returns
the moments of its probabilities together with the noise of its scores in `Moments.scores`, which the
matrix product that follows consumes: the moments are those of the fused call. Any other reader of
the softmax sees its ordinary variance.

Source: single_pass notes 3.4 (options A0, A1, A3); the centred variance is derived in docs/assumptions.md.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bayespass.approximation import Approximation
from bayespass.errors import UnsupportedOp
from bayespass.moments import Factors, Moments, ScoreNoise, apply, as_moments, average, carry, cast, move, total
from bayespass.rules.registry import Accuracy, refuse_out, rule

LARGEST_SHIFT = 2.0  # of a second-order mean, in nats: beyond it the expansion means nothing
SCORE_ELEMENTS = 2**23  # scores that are held at once


@rule(
    torch.softmax, F.softmax, Tensor.softmax, torch.special.softmax, accuracy=Accuracy(0.4, 0.4), knows_shared=True
)  # fmt: skip
def softmax(
    input: Moments, dim: int, dtype: torch.dtype | None = None, *, _stacklevel: int = 3, approximation: Approximation
) -> Moments:  # fmt: skip
    """First order at P = softmax(m), for independent scores: v_i = p_i^2 ((1 - 2 p_i) v_i + sum_j p_j^2 v_j).

    Bounds (mean in output sd, variance relative): 0.4 and 0.4 for score sd up to 1; both vanish
    with the score variance. `scores` carries v for attention written out. Of scores that are products
    of random queries and keys it finds what the fused call finds.
    """
    x = input if dtype is None else cast(input, dtype)
    if x.factors is not None and approximation.scores == "random" and dim in (-1, x.mean.dim() - 1):
        return _softmax_of_products(x, x.factors)
    p = torch.softmax(x.mean, dim)
    p2 = p.square()

    def spread(v: Tensor) -> Tensor:
        return p2 * ((1 - 2 * p) * v + (p2 * v).sum(dim, keepdim=True))

    scores = None if x.var is None else ScoreNoise(x.var)
    return Moments(p, apply(spread, x.var), apply(lambda s: spread(s.expand_as(p)), x.shared), scores)


def _softmax_of_products(x: Moments, factors: Factors) -> Moments:
    """Attention weights from scores that know their queries and keys: v = p^2 Var(s - sum_l p_l s_l)."""
    wide = x.mean.float() if x.mean.dtype in (torch.float16, torch.bfloat16) else x.mean

    def fitting(y: Moments) -> Moments:
        return move(Tensor.to, y, wide.device, wide.dtype)

    query, key = fitting(factors.query), fitting(factors.key)
    further = apply(lambda t: t.to(wide.device, wide.dtype), factors.noise)
    written_over = None if x.var is None else x.var.expand_as(x.mean) == 0  # by a mask: they vary no more
    p, of_query, of_key, common = _noisy_weights(wide, query, key, 1.0, further, written_over)
    noise = _score_noise(of_query, of_key, common)
    if noise is None:
        return Moments(p.to(x.mean.dtype))
    square, around = p.square(), noise.var
    if of_key is not None:  # taken around the average of the query, as that of the query is
        around = around - 2 * p * of_key + (square * of_key).sum(-1, keepdim=True)
    var = torch.minimum(square * around.clamp(min=0), p - square)  # a probability varies by p (1 - p) at most
    shared = apply(lambda t: torch.minimum(square * t, var), common)
    return cast(Moments(p, var, shared, noise), x.mean.dtype)


def _score_noise(of_query: Tensor | None, of_key: Tensor | None, common: Tensor | None) -> ScoreNoise | None:
    noise = total(of_query, of_key)
    return None if noise is None else ScoreNoise(noise, common)


@rule(F.softmin, accuracy=Accuracy(0.4, 0.4), knows_shared=True)
def softmin(
    input: Moments, dim: int, _stacklevel: int = 3, dtype: torch.dtype | None = None, *, approximation: Approximation
) -> Moments:  # fmt: skip
    """softmax(-x), bounds 0.4 and 0.4."""
    return softmax(replace(input, mean=-input.mean, factors=None), dim, dtype, approximation=approximation)


@rule(
    torch.log_softmax, F.log_softmax, Tensor.log_softmax, torch.special.log_softmax, accuracy=Accuracy(0.4, 0.4),
    knows_shared=True,
)  # fmt: skip
def log_softmax(input: Moments, dim: int, dtype: torch.dtype | None = None, *, _stacklevel: int = 3) -> Moments:
    """First order: v_i - 2 p_i v_i + sum_j p_j^2 v_j, the mean less sum_j p_j (1 - p_j) v_j / 2.

    Bounds (mean in output sd, variance relative): 0.4 and 0.4 for score sd up to 1.
    """
    x = input if dtype is None else move(Tensor.to, input, dtype)
    value = torch.log_softmax(x.mean, dim)
    if x.var is None:
        return Moments(value)
    p = value.exp()

    def spread(v: Tensor) -> Tensor:
        return (1 - 2 * p) * v + (p.square() * v).sum(dim, keepdim=True)

    shift = (p * (1 - p) * x.var).sum(dim, keepdim=True) / 2
    return carry(value - shift.clamp(max=LARGEST_SHIFT), lambda s: spread(s.expand_as(p)).clamp(min=0), x)


@rule(torch.logsumexp, Tensor.logsumexp, torch.special.logsumexp, accuracy=Accuracy(0.4, 0.4), knows_shared=True)
def logsumexp(input: Moments, dim: Any, keepdim: bool = False, *, out: None = None) -> Moments:
    """First order: v = sum p^2 v, mean plus sum p (1 - p) v / 2; bounds 0.4 and 0.4 for sd up to 1."""
    refuse_out(out)
    value = torch.logsumexp(input.mean, dim, keepdim=True)
    p = (input.mean - value).exp()

    def summed(t: Tensor) -> Tensor:
        return t.sum(dim, keepdim=keepdim)

    mean = torch.logsumexp(input.mean, dim, keepdim=keepdim)
    if input.var is None:
        return Moments(mean)
    shift = (summed(p * (1 - p) * input.var) / 2).clamp(max=LARGEST_SHIFT)
    return carry(mean + shift, lambda s: summed(p.square() * s), input)


def weighted_values(
    weights: Tensor,
    values: Moments,
    noise: ScoreNoise | None = None,
    mix: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> Moments:
    """P V: v = P^2 v_V + sum_j P_j^2 tau_j ((V_j - o)^2 + v_V), shared variance through (P sqrt(shared))^2.

    What all queries have in common of tau moves the outputs of all positions and adds to what they share.

    Args:
        weights: (..., T, S), rows sum to one.
        values: (..., S, D).
        noise: (..., T, S) variance tau of the scores, independent from key to key; `None` for known weights.
        mix: how weights meet values, where an einsum wrote it with other axes.

    Exact for weights that are known and values that are independent across keys; first order in tau.
    """
    squares = weights.square()
    result = average(lambda t: mix(weights, t), lambda t: mix(squares, t), values)
    if noise is None:
        return result
    o, m = result.mean, values.mean

    def moved(gain: Tensor) -> Tensor:
        return (mix(gain, m.square()) - 2 * o * mix(gain, m) + o.square() * mix(gain, torch.ones_like(m))).clamp(min=0)

    gain = squares * noise.var
    var = total(result.var, moved(gain), apply(lambda v: mix(gain, v), values.var))
    assert var is not None
    shared = total(result.shared, apply(lambda common: moved(squares * common), noise.shared))
    return Moments(o, var, None if shared is None else torch.minimum(shared, var))


def score_noise(weights: Moments, approximation: Approximation) -> ScoreNoise | None:
    """The noise of the scores behind the output of a softmax, where the approximation follows it."""
    return weights.scores if approximation.scores == "random" else None


SDPA_ACCURACY = {"at_mean": Accuracy(), "random": Accuracy(0.15, 0.35)}


@rule(F.scaled_dot_product_attention, accuracy=SDPA_ACCURACY, depends_on="scores", knows_shared=True)
def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    approximation: Approximation,
) -> Moments:
    """softmax(q k^T scale + mask) V; queries and keys as the approximation's `scores` says.

    At the mean scores v_o = P^2 v_V, exact in the values. With random scores, for score sd up to 1,
    the bounds (mean in output sd, variance relative) are 0.15 and 0.35.

    Args:
        query: (..., H, T, E).
        key: (..., H, S, E).
        value: (..., H, S, D).
        attn_mask: boolean or additive, broadcastable to (..., H, T, S).
        dropout_p: must be 0.
        is_causal: mask the future.
        scale: factor of the scores, by default 1/sqrt(E).
        enable_gqa: let several query heads read one key and value head.
        approximation: its field `scores`.

    Raises:
        UnsupportedOp: dropout.
    """
    if dropout_p:
        msg = "no Gaussian rule for attention dropout; call model.eval() before predicting"
        raise UnsupportedOp(msg)
    q, k, values = as_moments(query), as_moments(key), as_moments(value)
    mask = None if attn_mask is None else as_moments(attn_mask)
    if mask is not None and mask.var is not None and mask.var.shape[-1] < k.mean.shape[-2]:
        mask = Moments(mask.mean)  # the same at all keys, which softmax does not see
    if approximation.scores == "at_mean":
        q, k, mask = Moments(q.mean), Moments(k.mean), None if mask is None else Moments(mask.mean)
    if q.var is None and k.var is None and values.var is None and (mask is None or mask.var is None):
        bias = None if mask is None else mask.mean
        v = values.mean
        return Moments(
            F.scaled_dot_product_attention(
                q.mean, k.mean, v, bias, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
            )
        )
    if enable_gqa:
        groups = q.mean.shape[-3] // k.mean.shape[-3]
        k, values = (move(Tensor.repeat_interleave, x, groups, -3) for x in (k, values))
    return attend(q, k, values, mask, is_causal, scale)


def attend(
    q: Moments, k: Moments, values: Moments, mask: Moments | None, is_causal: bool, scale: float | None
) -> Moments:
    """softmax(q k^T scale + mask) V, a part of the queries at a time; q, k and mask count as far as they have variance.

    Args:
        q: (..., T, E).
        k: (..., S, E).
        values: (..., S, D).
        mask: boolean or additive, broadcastable to (..., T, S).
        is_causal: mask the future.
        scale: factor of the scores, by default 1/sqrt(E).
    """
    dtype = values.mean.dtype
    if dtype in (torch.float16, torch.bfloat16):  # the variance of a score is a small difference
        q, k, values = (cast(x, torch.float32) for x in (q, k, values))
    factor = 1 / math.sqrt(q.mean.shape[-1]) if scale is None else scale
    n_queries = q.mean.shape[-2]
    per_query = q.mean[..., 0, 0].numel() * k.mean.shape[-2]
    size = n_queries if torch.compiler.is_compiling() else max(1, SCORE_ELEMENTS // max(1, per_query))
    parts = []
    for start in range(0, n_queries, max(1, size)):

        def of_part(t: Tensor, start: int = start) -> Tensor:
            return t if t.dim() < 2 or t.shape[-2] == 1 else t[..., start : start + size, :]

        part = move(Tensor.narrow, q, -2, start, min(size, n_queries - start))
        seen = None if mask is None else of_part(mask.mean)
        scores = masked_scores(part.mean, k.mean, seen, start if is_causal else None, factor)
        known = None if mask is None else apply(of_part, mask.var)
        p, *noise = _noisy_weights(scores, part, k, factor, known)
        parts.append(weighted_values(p, values, _score_noise(*noise)))
    return cast(parts[0] if len(parts) == 1 else _joined(parts), dtype)


def _joined(parts: list[Moments]) -> Moments:
    """The parts of the queries together again; all have the same fields."""

    def whole(field: str) -> Tensor | None:
        found = [getattr(part, field) for part in parts]
        return None if found[0] is None else torch.cat(found, -2)

    return Moments(torch.cat([part.mean for part in parts], -2), whole("var"), whole("shared"))


def _noisy_weights(
    scores: Tensor,
    q: Moments,
    k: Moments,
    scale: float,
    further: Tensor | None = None,
    known: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Attention weights softmax(s + tau / 2), and tau: of the query, of the keys, and what queries share of it.

    Args:
        scores: (..., T, S) at the mean, masked.
        q: (..., T, E).
        k: (..., S, E).
        scale: factor of the scores.
        further: (..., T, S) variance of what was added to the scores, independent from key to key.
        known: (..., T, S) scores that do not vary.
    """
    p = weights_of(scores)
    of_query, of_key = _centred_noise(q, k, p, scale)
    of_key = total(of_key, further)
    if known is not None:
        varies = ~known
        of_query, of_key = (apply(lambda t: torch.where(varies, t, 0.0), t) for t in (of_query, of_key))
    shift = total(of_query, None if of_key is None else of_key * (1 - 2 * p))
    if shift is None:
        return p, None, None, None
    p = weights_of(scores + (shift / 2).clamp(max=LARGEST_SHIFT))
    if of_query is None or q.shared is None or q.var is None:
        return p, of_query, of_key, None
    # What queries share moves the outputs of all positions: the same part of what the query's noise adds.
    part = q.shared.sum(-1, keepdim=True) / q.var.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    return p, of_query, of_key, of_query * part


def _centred_noise(q: Moments, k: Moments, p: Tensor, scale: float) -> tuple[Tensor | None, Tensor | None]:
    """Variance of every score around the average of its query, from the query's noise and from the keys' own.

    tau^q_ij = scale^2 sum_c v_q,ic (k_jc - kbar_ic)^2 with kbar_i = sum_j P_ij k_j, and
    tau^k_ij = scale^2 sum_c (q_ic^2 + v_q,ic) (v_k,jc - shared_k,jc).
    """
    of_query = of_key = None
    if q.var is not None:
        centre = p @ k.mean
        weighted = q.var * centre
        constant = (weighted * centre).sum(-1, keepdim=True)
        of_query = q.var @ k.mean.square().mT - 2 * weighted @ k.mean.mT + constant
        of_query = of_query.clamp(min=0) * scale**2
    if k.var is not None:
        own = k.var if k.shared is None else (k.var - k.shared).clamp(min=0)
        squares = q.mean.square() if q.var is None else q.mean.square() + q.var
        of_key = (squares @ own.mT) * scale**2
    return of_query, of_key


def masked_scores(q: Tensor, k: Tensor, mask: Tensor | None, first: int | None, scale: float) -> Tensor:
    """q k^T scale + mask, -inf where a query does not look; `first` is the place of the first query if causal."""
    scores = q @ k.mT * scale
    if first is not None:
        places = torch.arange(first, first + scores.shape[-2], device=scores.device).unsqueeze(-1)
        scores = scores.masked_fill(torch.arange(scores.shape[-1], device=scores.device) > places, -torch.inf)
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


def weights_of(scores: Tensor) -> Tensor:
    """softmax over keys; a query that sees no key has zero weights."""
    return torch.softmax(scores, -1).masked_fill(scores.isneginf().all(-1, keepdim=True), 0)
