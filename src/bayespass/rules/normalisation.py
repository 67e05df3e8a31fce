"""Layer norm and batch norm.

Assumption: entries are independent within the group that is normalised. Layer norm divides by a
statistic of random entries; the approximation's field `norm` says how that statistic is treated:

    "at_mean"   the statistics of the mean, as constants: overstates variance by 1 + mean(v)/s^2
    "expected"  the expected sample variance S = s^2(m) + (1 - 1/d) mean(v) + eps, as a constant
    "delta"     the expected statistics plus the first-order effect of every entry on them; alone
                right on dimensions with outlying activations

Batch norm in eval mode divides by constants and is exact.

Source: single_pass notes 3.3 (rules L, E and EJ), docs/assumptions.md#norms.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bayespass.approximation import Approximation
from bayespass.errors import UnsupportedOp
from bayespass.moments import Moments, add, as_moments, bilinear, in_float32, scale
from bayespass.rules.registry import Accuracy, rule


def _gain_and_shift(x: Moments, weight: Any, bias: Any) -> Moments:
    """G x + b with random g and b: v = (g^2 + V_g) v_x + V_g m_x^2 + V_b."""
    if weight is not None:
        x = bilinear(torch.mul, x, weight)
    return x if bias is None else add(x, bias)


@rule(F.batch_norm)
def batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Moments:
    """(x - mu) / sqrt(s2 + eps) g + b with running statistics, which are constants. Exact.

    Args:
        input: (N, C, ...).
        running_mean: (C,), plain.
        running_var: (C,), plain.
        weight: (C,), plain or Gaussian.
        bias: (C,), plain or Gaussian.
        training: must be False.
        momentum: unused in eval mode.
        eps: added to the variance.

    Raises:
        UnsupportedOp: statistics of the batch (training mode, or no running statistics).
    """
    if training or running_mean is None or running_var is None:
        msg = (
            "no Gaussian rule for batch norm on the statistics of the batch; call model.eval() and use "
            "track_running_stats=True"
        )
        raise UnsupportedOp(msg)
    x = as_moments(input)
    shape = (-1, *[1] * (x.mean.dim() - 2))
    inverse = torch.rsqrt(running_var + eps).reshape(shape)
    centred = Moments(x.mean - running_mean.reshape(shape), x.var, x.shared)
    return _gain_and_shift(scale(centred, inverse), _channelwise(weight, shape), _channelwise(bias, shape))


@rule(torch.batch_norm)
def batch_norm_weight_first(
    input: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Moments:
    """`torch.batch_norm`, which takes weight and bias before the statistics."""
    return batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _channelwise(value: Any, shape: tuple[int, ...]) -> Any:
    if isinstance(value, Moments):
        return Moments(value.mean.reshape(shape), None if value.var is None else value.var.reshape(shape))
    return None if value is None else value.reshape(shape)


@rule(
    F.layer_norm,
    accuracy={"expected": Accuracy(0.05, 0.35), "delta": Accuracy(0.05, 0.05), "at_mean": Accuracy(0.6, 1.2)},
    depends_on="norm",
)
def layer_norm(
    input: Any,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *,
    approximation: Approximation,
) -> Moments:
    """y = (x - mu) / sqrt(S) g + b with S from the approximation's `norm`.

    Args:
        input: (..., *normalized_shape).
        normalized_shape: the trailing axes that form a group of d entries.
        weight: normalized_shape, plain or Gaussian.
        bias: normalized_shape, plain or Gaussian.
        eps: added to the variance.
        approximation: its field `norm` chooses the statistics.

    Bounds for groups of 32 or more whose mean variance is at most that of the means (mean in
    output sd, variance relative): 0.05 and 0.35 with "expected", 0.05 and 0.05 with "delta", 0.6
    and 1.2 with "at_mean". Source: single_pass notes 3.3.
    """
    x = as_moments(input)
    if x.var is None:
        return _gain_and_shift(Moments(F.layer_norm(x.mean, normalized_shape, eps=eps)), weight, bias)
    axes = tuple(range(-len(normalized_shape), 0))
    standardised = in_float32(lambda m, v: _standardise(m, v, axes, eps, approximation.norm), x)
    return _gain_and_shift(standardised, weight, bias)


def _standardise(m: Tensor, v: Tensor, axes: tuple[int, ...], eps: float, norm: str) -> Moments:
    d = 1
    for axis in axes:
        d *= m.shape[axis]
    centred = m - m.mean(axes, keepdim=True)
    statistic = centred.square().mean(axes, keepdim=True) + eps
    if norm != "at_mean":
        statistic = statistic + (1 - 1 / d) * v.mean(axes, keepdim=True)
    inverse = torch.rsqrt(statistic)
    n = centred * inverse
    if norm != "delta":
        return Moments(n, v * inverse.square())
    a, b, c = (term.sum(axes, keepdim=True) for term in (v, v * n, v * n.square()))
    variance = v - 2 * v * (1 + n.square()) / d + (a + 2 * n * b + n.square() * c) / d**2
    return Moments(n, variance.clamp(min=0) * inverse.square())
