"""The noise of one weight, common to all the positions it is applied at.

With `shared="carry"` a rule whose weight is random also says which part of its output's variance
positions have in common. Write y_p = w x_p for positions p (tokens, pixels) and ybar for their
average. What positions share is what ybar explains of each of them,

    shared_p = Cov(y_p, ybar)^2 / Var(ybar),

so that pooling, which adds the square roots of `shared`, gives back Var(ybar). Weight noise
contributes V (m_p mbar + g_p gbar) to the covariance and the inputs' own shared part, of standard
deviation g, contributes w^2 g_p gbar: the more alike the inputs are, the more is shared. Where no
axis is known to hold positions (a matrix of rows) all weight noise counts as shared.

Source: core decision 1; single_pass notes 3.3, 3.4 (A3, A4), 3.6; docs/assumptions.md#shared-noise.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bayespass.approximation import Approximation
from bayespass.moments import Moments, as_moments, bilinear, root, total

Bilinear = Callable[[Tensor, Tensor], Tensor]


def weighted(
    operation: Bilinear,
    x: Moments | Tensor,
    weight: Moments | Tensor,
    axes: tuple[int, ...],
    approximation: Approximation,
    summed: Callable[[Tensor], Tensor] | None = None,
    smooth: Callable[[Tensor], Tensor] | None = None,
) -> Moments:
    """operation(x, w) for a weight that meets the input at every position; exact under independence.

    Args:
        operation: linear in each argument.
        x: input.
        weight: the same at all positions.
        axes: which axes of input and output hold positions; may be empty.
        approximation: with `shared="ignore"` positions are independent.
        summed: for convolutions: w with its offsets added up, broadcastable to w, which is how much
            of a constant input comes through. By default w itself.
        smooth: for convolutions: from g to what the variance gains because the offsets of a kernel
            see one draw.

    Returns:
        the moments, with `shared` if the approximation carries it.
    """
    x, weight = as_moments(x), as_moments(weight)
    result = bilinear(operation, Moments(x.mean, x.var), weight)
    if approximation.shared == "ignore" or result.var is None:
        return result
    g = None if x.shared is None else root(x.shared.expand_as(x.mean))
    from_weight = from_input = None
    if weight.var is not None:
        alike = x.mean * _centre(x.mean, axes)
        alike = alike if g is None else torch.addcmul(alike, g, _centre(g, axes))
        from_weight = operation(alike, weight.var)
    if g is not None:
        response = weight.mean.square() if summed is None else weight.mean * summed(weight.mean)
        from_input = operation(g * _centre(g, axes), response)
    covariance = total(from_weight, from_input)
    if covariance is None:
        return result
    var = result.var if g is None or smooth is None else (result.var + smooth(g)).clamp(min=0)
    return Moments(result.mean, var, explained(covariance, var, axes))


def explained(covariance: Tensor, var: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Cov(y_p, ybar)^2 / Var(ybar), within [0, var].

    Args:
        covariance: Cov(y_p, ybar), which averages to Var(ybar) over positions.
        var: Var(y_p).
        axes: the positions.
    """
    covariance = covariance.clamp(min=0)
    if axes:
        level = covariance.mean(axes, keepdim=True).clamp(min=torch.finfo(var.dtype).tiny)
        covariance = covariance * (covariance / level)
    return torch.minimum(covariance, var)


def broadcast_noise(x: Moments, like: Tensor, approximation: Approximation) -> Moments:
    """What is about to be broadcast to `like` is one draw for all its copies."""
    known = approximation.shared == "ignore" or x.var is None or x.shared is not None
    return x if known or not copied_axes(x.mean, like) else Moments(x.mean, x.var, x.var)


def copied_axes(t: Tensor, like: Tensor) -> tuple[int, ...]:
    """Axes of `like` that hold positions and along which `t` is copied; the first is the batch.

    A last axis of one entry is a statistic over features, and its copies are no positions, unless
    `t` has no batch axis: a bias of shape (C, 1, 1) is copied to all pixels.
    """
    missing = like.dim() - t.dim()
    own = [1] * missing + list(t.shape)
    last = like.dim() if missing or own[:1] == [1] else like.dim() - 1
    return tuple(axis for axis in range(1, last) if own[axis] == 1 and like.shape[axis] > 1)


def between(t: Tensor) -> tuple[int, ...]:
    """The axes between the first (the batch) and the last (features)."""
    return tuple(range(1, t.dim() - 1))


def after_channels(t: Tensor) -> tuple[int, ...]:
    """The axes after batch and channels."""
    return tuple(range(2, t.dim()))


def _centre(t: Tensor, axes: tuple[int, ...]) -> Tensor:
    return t.mean(axes, keepdim=True) if axes else t
