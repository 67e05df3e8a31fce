"""Sample variances and lengths of vectors, where a norm is written out in a model's own code.

Assumption: entries are independent. The statistics of d entries are sums, so their own variance is
of order 1/d; square roots are taken to first order around the expected square.
"""

import math
from typing import Any

import torch
from torch import Tensor

from bayespass.errors import UnsupportedOp
from bayespass.moments import Moments, as_moments, carry
from bayespass.rules.registry import Accuracy, refuse_out, rule

ACCURACY = Accuracy(0.25, 0.3)


@rule(torch.var, Tensor.var, knows_shared=True, accuracy=ACCURACY)
def variance(
    input: Moments, dim: Any = None, unbiased: bool | None = None, keepdim: bool = False, *,
    correction: int | None = None, out: None = None,
) -> Moments:  # fmt: skip
    """Sample variance: s^2(m) plus the mean of v; its variance (4 sum c^2 v + 2 sum v^2) / d^2.

    Bounds (mean in output sd, variance relative): 0.25 and 0.3 for 8 entries and more.
    """
    refuse_out(out)
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    less = correction if correction is not None else int(unbiased is None or unbiased)
    m = input.mean
    value = torch.var(m, dim, correction=less, keepdim=keepdim)
    if input.var is None:
        return Moments(value)
    d = m.numel() // max(1, value.numel())

    def summed(t: Tensor) -> Tensor:
        return t.sum(dim, keepdim=keepdim)

    c2 = (m - m.mean(dim, keepdim=True)).square()

    def spread(v: Tensor) -> Tensor:
        return (4 * summed(c2 * v) + 2 * summed(v.square().expand_as(m))) / max(1, d - less) ** 2

    shift = summed(input.var) * (d - 1) / d / max(1, d - less)
    return carry(value + shift, spread, input)


@rule(torch.std, Tensor.std, knows_shared=True, accuracy=ACCURACY)
def standard_deviation(
    input: Moments, dim: Any = None, unbiased: bool | None = None, keepdim: bool = False, *,
    correction: int | None = None, out: None = None,
) -> Moments:  # fmt: skip
    """The square root of `variance`, first order; bounds 0.25 and 0.3 for 8 entries and more."""
    return _root(variance(input, dim, unbiased, keepdim, correction=correction, out=out))


@rule(torch.var_mean, knows_shared=True, accuracy=ACCURACY)
def variance_and_mean(
    input: Moments, dim: Any = None, unbiased: bool | None = None, keepdim: bool = False, *,
    correction: int | None = None,
) -> tuple[Moments, Moments]:  # fmt: skip
    """Both statistics, as `variance` and the average; bounds 0.25 and 0.3."""
    from bayespass.rules.pooling import mean

    axes = tuple(range(input.mean.dim())) if dim is None or isinstance(dim, bool) else dim
    return variance(input, dim, unbiased, keepdim, correction=correction), mean(input, axes, keepdim)


@rule(torch.linalg.vector_norm, knows_shared=True, accuracy=ACCURACY)
def vector_norm(
    x: Moments, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, out: None = None
) -> Moments:  # fmt: skip
    """|x|: square root of sum (m^2 + v), first order; bounds 0.25 and 0.3 for 8 entries and more.

    Raises:
        UnsupportedOp: another norm than the Euclidean.
    """
    refuse_out(out)
    if ord != 2:
        msg = f"the Gaussian rule of vector_norm supports the Euclidean norm; got ord={ord!r}"
        raise UnsupportedOp(msg)

    def summed(t: Tensor) -> Tensor:
        return t.sum(dim, keepdim=keepdim, dtype=dtype)

    m2 = x.mean.square()

    def spread(v: Tensor) -> Tensor:
        return summed(4 * m2 * v + 2 * v.square())

    square = m2 if x.var is None else m2 + x.var
    return _root(carry(summed(square), spread, x))


@rule(torch.norm, Tensor.norm, knows_shared=True, accuracy=ACCURACY)
def norm(
    input: Moments, p: Any = "fro", dim: Any = None, keepdim: bool = False, out: None = None, dtype: Any = None
) -> Moments:
    """As `vector_norm`, bounds 0.25 and 0.3."""
    refuse_out(out)
    return vector_norm(as_moments(input), 2 if p in ("fro", None) else p, dim, keepdim, dtype=dtype)


def _root(square: Moments) -> Moments:
    value = square.mean.sqrt()
    if square.var is None:
        return Moments(value)
    safe = square.mean.clamp(min=math.sqrt(torch.finfo(value.dtype).tiny))
    shift = torch.minimum(square.var / (8 * safe * safe.sqrt()), 0.5 * value)
    return carry(value - shift, lambda s: s / (4 * safe), square)
