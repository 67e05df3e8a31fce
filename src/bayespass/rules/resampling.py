"""Images and sequences resized: every output is a known weighted sum of inputs.

Assumption: entries are independent except for their shared part, as in averages. Resizing is
separable, so squared weights are the squares of one small matrix per axis, read off by resizing
unit vectors.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bayespass.errors import UnsupportedOp
from bayespass.moments import Moments, average, move
from bayespass.rules.registry import rule

COPYING = ("nearest", "nearest-exact")


@rule(F.interpolate, knows_shared=True)
def interpolate(
    input: Moments,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Moments:
    """sum_i w_i x_i with the mode's weights: v = (sum w sqrt(shared))^2 + sum w^2 (v - shared).

    Exact for independent entries.
    """

    def resized(t: Tensor) -> Tensor:
        return F.interpolate(t, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)

    if mode in COPYING:
        return move(resized, input)
    shape = input.mean.shape[2:]
    weights = [_weights(resized, shape, axis, input.mean) for axis in range(len(shape))]

    def squared(t: Tensor) -> Tensor:
        for axis, w in enumerate(weights, start=2):
            t = (t.movedim(axis, -1) @ w.square().T).movedim(-1, axis)
        return t

    return average(resized, squared, input)


def _weights(resized: Callable[[Tensor], Tensor], shape: torch.Size, axis: int, like: Tensor) -> Tensor:
    """(out, in) weights of one axis: what resizing makes of unit vectors that are constant along the others."""
    n = shape[axis]
    units = torch.eye(n, dtype=like.dtype, device=like.device).reshape(
        1, n, *(n if a == axis else 1 for a in range(len(shape)))
    )
    columns = resized(units.expand(1, n, *shape))
    for other in range(len(shape) - 1, -1, -1):
        if other != axis:
            columns = columns.select(2 + other, 0)
    return columns[0].T


@rule(F.grid_sample, knows_shared=True)
def grid_sample(
    input: Moments, grid: Any, mode: str = "bilinear", padding_mode: str = "zeros", align_corners: bool | None = None
) -> Moments:  # fmt: skip
    """Entries picked at known places: exact with mode="nearest".

    Raises:
        UnsupportedOp: a random grid, or weights between entries (bilinear, bicubic).
    """
    if isinstance(grid, Moments) or mode != "nearest":
        msg = f"the Gaussian rule of grid_sample takes a known grid and mode='nearest'; got mode={mode!r}"
        raise UnsupportedOp(msg)
    return move(lambda t: F.grid_sample(t, grid, mode, padding_mode, align_corners), input)
