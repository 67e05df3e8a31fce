"""Softmax and attention, fused and written out.

Assumption: attention weights are those of the mean scores (`scores="at_mean"`), so that only the
values carry variance, and values are independent across keys: v_o = P^2 v_V. What this leaves out
is declared in `Approximation.drops`; see docs/assumptions.md#attention.

Written out, the softmax returns the moments of its probabilities together with the variance of
its scores in `Moments.scores`; the matrix product that follows consumes that slot and gives the
moments of the fused call. Any other reader of the softmax sees its ordinary variance.

Source: single_pass notes 3.4 (option A0).
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bayespass.errors import UnsupportedOp
from bayespass.moments import Moments, apply, as_moments, average, carry, move
from bayespass.rules.registry import Accuracy, refuse_out, rule

LARGEST_SHIFT = 2.0  # of a second-order mean, in nats: beyond it the expansion means nothing


@rule(
    torch.softmax, F.softmax, Tensor.softmax, torch.special.softmax, accuracy=Accuracy(0.4, 0.4), knows_shared=True
)  # fmt: skip
def softmax(input: Moments, dim: int, dtype: torch.dtype | None = None, *, _stacklevel: int = 3) -> Moments:
    """First order at P = softmax(m), for independent scores: v_i = p_i^2 ((1 - 2 p_i) v_i + sum_j p_j^2 v_j).

    Bounds (mean in output sd, variance relative): 0.4 and 0.4 for score sd up to 1; both vanish
    with the score variance. `scores` carries v for attention written out.
    """
    x = input if dtype is None else move(Tensor.to, input, dtype)
    p = torch.softmax(x.mean, dim)
    p2 = p.square()

    def spread(v: Tensor) -> Tensor:
        return p2 * ((1 - 2 * p) * v + (p2 * v).sum(dim, keepdim=True))

    return Moments(p, apply(spread, x.var), apply(lambda s: spread(s.expand_as(p)), x.shared), scores=x.var)


@rule(F.softmin, accuracy=Accuracy(0.4, 0.4), knows_shared=True)
def softmin(input: Moments, dim: int, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Moments:
    """softmax(-x), bounds 0.4 and 0.4."""
    return softmax(replace(input, mean=-input.mean), dim, dtype)


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


def weighted_values(weights: Tensor, values: Moments) -> Moments:
    """P V for known attention weights: v = P^2 v_V, shared variance through (P sqrt(shared))^2.

    Args:
        weights: (..., T, S), rows sum to one.
        values: (..., S, D).

    Exact for weights that are known and values that are independent across keys.
    """
    return average(lambda t: weights @ t, lambda t: weights.square() @ t, values)


@rule(F.scaled_dot_product_attention, knows_shared=True)
def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Moments:
    """softmax(q k^T scale + mask) V at the mean scores: v_o = P^2 v_V.

    Exact in the values; query, key and mask enter by their means (declared by the approximation).

    Args:
        query: (..., H, T, E).
        key: (..., H, S, E).
        value: (..., H, S, D).
        attn_mask: boolean or additive, broadcastable to (..., H, T, S).
        dropout_p: must be 0.
        is_causal: mask the future.
        scale: factor of the scores, by default 1/sqrt(E).
        enable_gqa: let several query heads read one key and value head.

    Raises:
        UnsupportedOp: dropout.
    """
    if dropout_p:
        msg = "no Gaussian rule for attention dropout; call model.eval() before predicting"
        raise UnsupportedOp(msg)
    q, k, values = as_moments(query).mean, as_moments(key).mean, as_moments(value)
    mask = None if attn_mask is None else as_moments(attn_mask).mean
    if values.var is None:
        v = values.mean
        return Moments(
            F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
        )
    if enable_gqa:
        groups = q.shape[-3] // k.shape[-3]
        k = k.repeat_interleave(groups, -3)
        values = move(Tensor.repeat_interleave, values, groups, -3)
    return weighted_values(attention_weights(q, k, mask, is_causal, scale), values)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    """softmax(q k^T scale + mask); a row that sees no key has zero weights."""
    scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    if mask is None:
        return torch.softmax(scores, -1)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    blind = scores.isneginf().all(-1, keepdim=True)
    return torch.softmax(scores, -1).masked_fill(blind, 0)
