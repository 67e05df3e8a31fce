"""`nn.MultiheadAttention` as one function, which is how it reaches a rule.

Assumption: as in `attention.py`. PyTorch's fast paths check for tensor subclasses and step aside,
so attention and the encoder layers built on it always come here.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bayespass.approximation import Approximation
from bayespass.errors import UnsupportedOp
from bayespass.moments import Moments, apply, as_moments, move
from bayespass.rules.affine import linear
from bayespass.rules.attention import SDPA_ACCURACY, attend, masked_scores, weights_of
from bayespass.rules.placing import cat
from bayespass.rules.registry import rule


@rule(F.multi_head_attention_forward, accuracy=SDPA_ACCURACY, depends_on="scores", knows_shared=True)
def multi_head_attention_forward(
    query: Any,
    key: Any,
    value: Any,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: Any,
    bias_k: Any,
    bias_v: Any,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Any,
    out_proj_bias: Any,
    training: bool = True,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None,
    k_proj_weight: Any = None,
    v_proj_weight: Any = None,
    static_k: Any = None,
    static_v: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    *,
    approximation: Approximation,
) -> tuple[Moments, Tensor | None]:
    """Projections, attention as the approximation's `scores` says, output projection.

    At the mean scores exact in the values; with random scores within 0.15 and 0.35. Takes (T, B, E)
    or (T, E); the returned weights are those of the mean scores and carry no variance.

    Raises:
        UnsupportedOp: attention dropout, or given keys and values.
    """
    if (training and dropout_p) or static_k is not None or static_v is not None:
        msg = "no Gaussian rule for multi-head attention with dropout (call model.eval()) or static keys and values"
        raise UnsupportedOp(msg)
    batched = as_moments(query).mean.dim() == 3
    q, k, v = (move(Tensor.transpose if batched else Tensor.unsqueeze, as_moments(x), 0, *([1] if batched else []))
               for x in (query, key, value))  # fmt: skip
    weights = (
        (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else _thirds(in_proj_weight)
    )  # fmt: skip
    biases = (None, None, None) if in_proj_bias is None else _thirds(in_proj_bias)
    q, k, v = (linear(x, w, b, approximation=approximation) for x, w, b in zip((q, k, v), weights, biases, strict=True))
    batch, tokens = q.mean.shape[:2]
    mask = _mask(attn_mask, batch, num_heads)
    padding = None if key_padding_mask is None else (key_padding_mask if batched else key_padding_mask[None])
    if bias_k is not None:
        k, v = (cat([x, move(Tensor.expand, as_moments(b), batch, 1, -1)], 1) for x, b in ((k, bias_k), (v, bias_v)))
    if add_zero_attn:
        k, v = (cat([x, torch.zeros_like(x.mean[:, :1])], 1) for x in (k, v))
    if bias_k is not None or add_zero_attn:
        extra = k.mean.shape[1] - as_moments(key).mean.shape[0]
        mask, padding = (apply(lambda t: F.pad(t, (0, extra)), t) for t in (mask, padding))

    def heads(x: Moments) -> Moments:
        return move(lambda t: t.reshape(batch, -1, num_heads, t.shape[-1] // num_heads).transpose(1, 2), x)

    scores_mask = _joined(mask, padding, q.mean.dtype)
    causal = is_causal and scores_mask is None
    q, k, v = heads(q), heads(k), heads(v)
    if approximation.scores == "at_mean":
        q, k = Moments(q.mean), Moments(k.mean)
    mixed = attend(q, k, v, None if scores_mask is None else Moments(scores_mask), causal, None)
    mixed = move(lambda t: t.transpose(1, 2).reshape(batch, tokens, -1), mixed)
    out = linear(mixed, out_proj_weight, out_proj_bias, approximation=approximation)
    out = move(Tensor.transpose, out, 0, 1) if batched else move(Tensor.squeeze, out, 0)
    if not need_weights:
        return out, None
    scale = 1 / math.sqrt(q.mean.shape[-1])
    p = weights_of(masked_scores(q.mean, k.mean, scores_mask, 0 if causal else None, scale))
    shown = p.mean(1) if average_attn_weights else p
    return out, shown if batched else shown[0]


def _thirds(packed: Any) -> Any:
    return move(Tensor.chunk, as_moments(packed), 3)


def _mask(mask: Any, batch: int, heads: int) -> Tensor | None:
    """(T, S) or (B * H, T, S) as something that broadcasts to (B, H, T, S)."""
    mask = None if mask is None else as_moments(mask).mean
    return mask.reshape(batch, heads, *mask.shape[1:]) if mask is not None and mask.dim() == 3 else mask


def _joined(mask: Tensor | None, padding: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Both masks as one additive mask; True means hidden in either."""

    def additive(t: Tensor) -> Tensor:
        return torch.zeros_like(t, dtype=dtype).masked_fill(t, -torch.inf) if t.dtype == torch.bool else t

    parts = [additive(mask)] if mask is not None else []
    parts += [additive(padding)[:, None, None, :]] if padding is not None else []
    return parts[0] + parts[1] if len(parts) == 2 else parts[0] if parts else None
