"""Layer, RMS, group, instance and batch norm, and vectors scaled to length one.

Assumption: entries are independent within the group that is normalised. The norms divide by a
statistic of random entries; the approximation's field `norm` says how that statistic is treated:

    "at_mean"   the statistics of the mean, as constants: overstates variance by 1 + mean(v)/s^2
    "expected"  the expected sample variance S = s^2(m) + (1 - 1/d) mean(v) + eps, as a constant
    "delta"     the expected statistics plus the first-order effect of every entry on them; alone
                right on dimensions with outlying activations

Batch norm in eval mode divides by constants and is exact.

Source: single_pass notes 3.3 (rules L, E and EJ), docs/assumptions.md#norms.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bayespass.approximation import Approximation
from bayespass.errors import UnsupportedOp
from bayespass.moments import Moments, add, as_moments, carry, in_float32, move, root, scale
from bayespass.rules.arithmetic import random_gain
from bayespass.rules.registry import Accuracy, refuse_out, rule
from bayespass.rules.sharing import broadcast_noise

ACCURACY = {"expected": Accuracy(0.05, 0.35), "delta": Accuracy(0.05, 0.06), "at_mean": Accuracy(0.6, 1.2)}


def _gain_and_shift(x: Moments, weight: Any, bias: Any, approximation: Approximation) -> Moments:
    """G x + b with random g and b: v = (g^2 + V_g) v_x + V_g m_x^2 + V_b."""
    if weight is not None:
        x = random_gain(x, as_moments(weight), approximation)
    return x if bias is None else add(x, broadcast_noise(as_moments(bias), x.mean, approximation))


@rule(F.batch_norm, knows_shared=True)
def batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    approximation: Approximation,
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
        approximation: its field `shared`.

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
    inverse = _channelwise(torch.rsqrt(running_var + eps), x.mean).mean
    centred = Moments(x.mean - _channelwise(running_mean, x.mean).mean, x.var, x.shared)
    return _gain_and_shift(
        scale(centred, inverse), _channelwise(weight, x.mean), _channelwise(bias, x.mean), approximation
    )


@rule(torch.batch_norm, knows_shared=True)
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
    *,
    approximation: Approximation,
) -> Moments:
    """`torch.batch_norm`, which takes weight and bias before the statistics."""
    return batch_norm(
        input, running_mean, running_var, weight, bias, training, momentum, eps, approximation=approximation
    )


def _channelwise(value: Any, like: Tensor) -> Any:
    """A vector over channels, ready to be broadcast over the axes behind them."""
    shape = (-1, *[1] * (like.dim() - 2))
    return value if value is None else move(Tensor.reshape, as_moments(value), shape)


@rule(F.layer_norm, accuracy=ACCURACY, depends_on="norm", knows_shared=True)
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
    output sd, variance relative): 0.05 and 0.35 with "expected", 0.05 and 0.06 with "delta", 0.6
    and 1.2 with "at_mean". Source: single_pass notes 3.3.
    """
    x = as_moments(input)
    if x.var is None:
        return _gain_and_shift(Moments(F.layer_norm(x.mean, normalized_shape, eps=eps)), weight, bias, approximation)
    axes = tuple(range(-len(normalized_shape), 0))
    return _gain_and_shift(_standardise(x, axes, eps, approximation, centred=True), weight, bias, approximation)


@rule(torch.layer_norm, accuracy=ACCURACY, depends_on="norm", knows_shared=True)
def layer_norm_with_cudnn(
    input: Any, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5,
    cudnn_enable: bool = True, *, approximation: Approximation,
) -> Moments:  # fmt: skip
    """`torch.layer_norm`: as `layer_norm`; bounds 0.05 and 0.35, 0.05 and 0.06, 0.6 and 1.2."""
    return layer_norm(input, normalized_shape, weight, bias, eps, approximation=approximation)


@rule(F.rms_norm, torch.rms_norm, accuracy=ACCURACY, depends_on="norm", knows_shared=True)
def rms_norm(
    input: Any,
    normalized_shape: Sequence[int],
    weight: Any = None,
    eps: float | None = None,
    *,
    approximation: Approximation,
) -> Moments:
    """y = x / sqrt(mean(x^2) + eps) g: layer norm without centring, with the same bounds.

    0.05 and 0.35 with "expected", 0.05 and 0.06 with "delta", 0.6 and 1.2 with "at_mean".
    Source: single_pass notes 3.3.
    """
    x = as_moments(input)
    if x.var is None:
        return _gain_and_shift(Moments(F.rms_norm(x.mean, normalized_shape, eps=eps)), weight, None, approximation)
    small = torch.finfo(x.mean.dtype).eps if eps is None else eps
    axes = tuple(range(-len(normalized_shape), 0))
    return _gain_and_shift(_standardise(x, axes, small, approximation, centred=False), weight, None, approximation)


@rule(F.group_norm, accuracy=ACCURACY, depends_on="norm", knows_shared=True)
def group_norm(
    input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *,
    approximation: Approximation,
) -> Moments:  # fmt: skip
    """Layer norm of each group of channels with all their positions, with the same bounds.

    0.05 and 0.35 with "expected", 0.05 and 0.06 with "delta", 0.6 and 1.2 with "at_mean".
    Source: single_pass notes 3.3.
    """
    x = as_moments(input)
    if x.var is None:
        normed = Moments(F.group_norm(x.mean, num_groups, eps=eps))
    else:
        shape = x.mean.shape
        size = (shape[0], num_groups, shape[1] // num_groups, math.prod(shape[2:]))
        grouped = move(Tensor.reshape, x, size)
        standard = _standardise(grouped, (-2, -1), eps, approximation, centred=True)
        if grouped.shared is not None:
            standard = replace(standard, shared=_group_share(grouped, standard))
        normed = move(Tensor.reshape, standard, shape)
    return _gain_and_shift(normed, _channelwise(weight, x.mean), _channelwise(bias, x.mean), approximation)


@rule(torch.group_norm, accuracy=ACCURACY, depends_on="norm", knows_shared=True)
def group_norm_with_cudnn(
    input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn_enabled: bool = True,
    *, approximation: Approximation,
) -> Moments:  # fmt: skip
    """`torch.group_norm`: as `group_norm`; bounds 0.05 and 0.35, 0.05 and 0.06, 0.6 and 1.2."""
    return group_norm(input, num_groups, weight, bias, eps, approximation=approximation)


@rule(F.instance_norm, accuracy=ACCURACY, depends_on="norm", knows_shared=True)
def instance_norm(
    input: Any, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None,
    use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5, *, approximation: Approximation,
) -> Moments:  # fmt: skip
    """Group norm with one channel per group, or batch norm where running statistics are used.

    Bounds as there: 0.05 and 0.35 with "expected", 0.05 and 0.06 with "delta", 0.6 and 1.2 "at_mean".
    """
    if not use_input_stats:
        return batch_norm(
            input, running_mean, running_var, weight, bias, False, momentum, eps, approximation=approximation
        )
    return group_norm(input, as_moments(input).mean.shape[1], weight, bias, eps, approximation=approximation)


def _group_share(x: Moments, normed: Moments) -> Tensor:
    """What positions still share after a group of K channels was centred over all its positions.

    Centring over positions takes away what they share, except for what one channel has beyond the
    others: Cov = (g_p gbar (1 - 1/K) - gbar^2/K + sum_k gbar_k^2 / K^2) / S.
    """
    assert x.shared is not None
    assert normed.var is not None
    assert x.var is not None
    g = root(x.shared)
    level = g.mean(-1, keepdim=True)
    k = x.mean.shape[-2]
    common = level.square().sum(-2, keepdim=True) / k**2
    covariance = g * level * (1 - 1 / k) - level.square() / k + common
    inverse = normed.var.sum((-2, -1), keepdim=True) / x.var.sum((-2, -1), keepdim=True).clamp(min=1e-30)
    average = covariance.mean(-1, keepdim=True).clamp(min=torch.finfo(g.dtype).tiny)
    return torch.minimum(covariance.clamp(min=0).square() / average * inverse, normed.var)


@rule(F.normalize, accuracy=ACCURACY, depends_on="norm", knows_shared=True)
def normalize(
    input: Moments, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: None = None, *, approximation: Approximation
) -> Moments:  # fmt: skip
    """X / |x|: RMS norm divided by sqrt(d), with its bounds.

    0.05 and 0.35 with "expected", 0.05 and 0.06 with "delta", 0.6 and 1.2 with "at_mean".

    Raises:
        UnsupportedOp: another norm than the Euclidean.
    """
    refuse_out(out)
    if p != 2.0:
        msg = f"the Gaussian rule of torch.nn.functional.normalize supports p=2; got {p}"
        raise UnsupportedOp(msg)
    axes = (dim,) if isinstance(dim, int) else tuple(dim)
    d = math.prod(input.mean.shape[axis] for axis in axes)
    return scale(_standardise(input, axes, eps**2 / d, approximation, centred=False), 1 / math.sqrt(d))


@rule(torch._weight_norm, accuracy=ACCURACY, depends_on="norm")
def weight_norm(v: Any, g: Any, dim: int = 0, *, approximation: Approximation) -> Moments:
    """G v / |v|, a weight with its length apart: RMS norm over all axes but one, with its bounds.

    0.05 and 0.35 with "expected", 0.05 and 0.06 with "delta", 0.6 and 1.2 with "at_mean".
    """
    v = as_moments(v)
    axes = tuple(axis for axis in range(v.mean.dim()) if axis != dim % v.mean.dim())
    axes = axes if dim != -1 else tuple(range(v.mean.dim()))
    direction = normalize(v, dim=axes, approximation=approximation)
    return random_gain(direction, as_moments(g), replace(approximation, shared="ignore"))


def _standardise(x: Moments, axes: tuple[int, ...], eps: float, approximation: Approximation, centred: bool) -> Moments:
    """(x - mu) / sqrt(S) over the axes, or x / sqrt(S) where nothing is centred."""

    def compute(x: Moments) -> Moments:
        m, v = x.mean, x.var
        d = math.prod(m.shape[axis] for axis in axes)
        c = m - m.mean(axes, keepdim=True) if centred else m
        statistic = c.square().mean(axes, keepdim=True) + eps
        if approximation.norm != "at_mean" and v is not None:
            statistic = statistic + (1 - 1 / d if centred else 1) * v.mean(axes, keepdim=True)
        inverse = torch.rsqrt(statistic)
        n = c * inverse

        def spread(v: Tensor) -> Tensor:
            if approximation.norm != "delta":
                return v * inverse.square()
            n2 = n.square()
            slope = v * n2
            correction = n2 * slope.sum(axes, keepdim=True)
            if centred:
                slope = slope + v
                correction = correction + v.sum(axes, keepdim=True) + 2 * n * (v * n).sum(axes, keepdim=True)
            return (v - 2 * slope / d + correction / d**2).clamp(min=0) * inverse.square()

        return carry(n, lambda s: spread(s.expand_as(m)), x)

    return in_float32(compute, x)
