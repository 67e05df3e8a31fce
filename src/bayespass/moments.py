"""Moments: the mean and variance that rules work on, and the families most rules belong to.

Everything here is arithmetic on plain tensors. Entries are treated as independent unless
`shared` says otherwise; docs/assumptions.md has one heading per family.

The families:
    move        the same call on every field (reshapes, slices, casts)
    add         sums of independent terms
    scale       multiplication by something known
    bilinear    products, matrix products, convolutions: exact under independence
    linearise   a function by its first derivative
    average     weighted sums over positions, where shared noise does not cancel
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Source(NamedTuple):
    """Where a linear map's output came from, so that a product of two of them knows their covariance.

    Args:
        var: the variance of the map's input, the very tensor.
        weight: (out, in) mean of the map.
        gain: E[f'] of an activation applied since; `None` means 1.
    """

    var: Tensor
    weight: Tensor
    gain: Tensor | None = None


class Factors(NamedTuple):
    """The queries and keys whose products attention scores are. What scales the scores scales the queries.

    Args:
        query: (..., T, E).
        key: (..., S, E).
        noise: further variance of the scores, (..., T, S), independent from key to key.
    """

    query: "Moments"
    key: "Moments"
    noise: Tensor | None = None


class ScoreNoise(NamedTuple):
    """The noise of the scores behind a softmax.

    Args:
        var: their variance, independent from key to key.
        shared: the part of it that all queries have in common; `None` means 0.
    """

    var: Tensor
    shared: Tensor | None = None

    def each(self, operation: Callable[[Tensor], Tensor]) -> "ScoreNoise":
        """The operation on both."""
        return ScoreNoise(operation(self.var), apply(operation, self.shared))


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Elementwise mean and variance of a tensor of random entries.

    Args:
        mean: E[x], any shape.
        var: elementwise Var[x] >= 0, same shape; `None` means exactly deterministic.
        shared: the part of `var` that is perfectly correlated across positions,
            0 <= shared <= var, broadcastable to `var`; `None` means 0.
        scores: on the output of a softmax only: the noise of its scores. Moves, dropout and
            casts keep it and the matrix product that follows consumes it, so that attention
            written out and the fused call agree. Everything else reads `var`.
        source: on the output of a linear map and of an activation of it only: what it was made
            from, for the covariance of gated products. Any other operation leaves it behind.
        factors: on the batched product of two random tensors only: what it was multiplied from.
            Scaling, masking, sums, casts and reshapes of leading axes keep it and the softmax that
            follows consumes it, for the same agreement. Any other operation leaves it behind.

    Source: core decision 1.
    """

    mean: Tensor
    var: Tensor | None = None
    shared: Tensor | None = None
    scores: ScoreNoise | None = None
    source: Source | None = None
    factors: Factors | None = None


def as_moments(value: "Moments | Tensor") -> Moments:
    """A plain tensor as moments without variance."""
    return value if isinstance(value, Moments) else Moments(value)


def in_float32(compute: Callable[[Moments], Moments], x: Moments) -> Moments:
    """compute(x), in float32 where the input is half precision, cast back to its dtype.

    Squares of half-precision values overflow and their differences cancel.
    """
    dtype = x.mean.dtype
    if dtype not in (torch.float16, torch.bfloat16):
        return compute(x)
    result = compute(cast(x, torch.float32))
    return cast(result, dtype)


def cast(x: Moments, dtype: torch.dtype) -> Moments:
    """Every field in the dtype."""
    if x.mean.dtype == dtype:
        return x
    var, shared = (apply(lambda t: t.to(dtype), field) for field in (x.var, x.shared))
    scores = None if x.scores is None else x.scores.each(lambda t: t.to(dtype))
    return Moments(x.mean.to(dtype), var, shared, scores, x.source, x.factors)


STEEPEST = 1e15  # stands for an infinite slope, as of a square root at zero


def finite_slope(derivative: Tensor) -> Tensor:
    """A derivative without infinities, whose product with no variance is none."""
    return derivative.nan_to_num(0.0, STEEPEST, -STEEPEST)


def root(variance: Tensor) -> Tensor:
    """The standard deviation, whose slope is finite, and zero at no variance."""
    least = torch.finfo(variance.dtype).tiny ** 0.5
    return torch.where(variance > 0, variance.clamp(min=least).sqrt(), 0.0)


def total(*terms: Tensor | None) -> Tensor | None:
    """Sum of the variances that are there; `None` when none is."""
    present = [term for term in terms if term is not None]
    return sum(present[1:], start=present[0]) if present else None


def apply(operation: Callable[[Tensor], Tensor], value: Tensor | None) -> Tensor | None:
    """The operation on a variance that may be absent."""
    return None if value is None else operation(value)


def carry(mean: Tensor, operation: Callable[[Tensor], Tensor], x: Moments) -> Moments:
    """The new mean, with the operation on the variance and on its shared part."""
    return Moments(mean, apply(operation, x.var), apply(operation, x.shared))


def move(operation: Callable[..., Any], x: Moments, *args: Any, **kwargs: Any) -> Any:
    """The same call on every field: exact for anything that only moves, repeats or picks entries.

    Operations that return several tensors (split, unbind) give a tuple of moments.
    """
    mean = operation(x.mean, *args, **kwargs)

    def moved(field: Tensor | None) -> Any:
        return None if field is None else operation(field.expand_as(x.mean), *args, **kwargs)

    def together(mean: Tensor, var: Any, shared: Any, noise: Any, common: Any) -> Moments:
        return Moments(mean, var, shared, None if noise is None else ScoreNoise(noise, common))

    fields = (x.var, x.shared, *(x.scores or (None, None)))
    if isinstance(mean, Tensor):
        return together(mean, *(moved(field) for field in fields))
    parts = [moved(field) or [None] * len(mean) for field in fields]
    return tuple(together(*each) for each in zip(mean, *parts, strict=True))


def add(a: "Moments | Tensor", b: "Moments | Tensor", alpha: float = 1) -> Moments:
    """a + alpha b of independent terms: v = v_a + alpha^2 v_b. Exact under independence."""
    a, b = as_moments(a), as_moments(b)
    mean = torch.add(a.mean, b.mean, alpha=alpha)

    def summed(first: Tensor | None, second: Tensor | None) -> Tensor | None:
        second = second if second is None or alpha == 1 else second * alpha**2
        variance = total(first, second)
        return None if variance is None else variance.expand_as(mean)

    return Moments(mean, summed(a.var, b.var), summed(a.shared, b.shared))


def scale(x: Moments, gain: "Tensor | float") -> Moments:
    """Gain x for a known gain: variance is multiplied by gain^2. Exact."""
    mean = x.mean * gain
    gain = gain.to(mean.dtype) if isinstance(gain, Tensor) else gain  # small integers overflow when squared
    square = gain * gain
    return Moments(mean, apply(lambda v: (v * square).expand_as(mean), x.var), apply(lambda v: v * square, x.shared))


def rescaled(x: Moments, gain: "Tensor | float") -> Moments:
    """`scale` of what may be scores of attention: its factors stay, where the gain is one number per head."""
    result = scale(x, gain)
    several = isinstance(gain, Tensor) and gain.dim() > 0 and gain.shape[-2:].numel() > 1
    if x.factors is None or several or result.mean.shape != x.mean.shape:
        return result
    query, key, noise = x.factors
    return replace(result, factors=Factors(scale(query, gain), key, apply(lambda v: v * gain * gain, noise)))


def shifted(x: Moments, y: "Moments | Tensor", alpha: float = 1) -> Moments:
    """`add` to what may be scores of attention: its factors stay, and the variance of y is further noise."""
    result, y = add(x, y, alpha), as_moments(y)
    if x.factors is None or y.factors is not None or result.mean.shape != x.mean.shape:
        return result
    return replace(result, factors=x.factors._replace(noise=total(x.factors.noise, key_noise(y.var, x.mean, alpha))))


def key_noise(variance: Tensor | None, scores: Tensor, alpha: float = 1) -> Tensor | None:
    """The variance of what is added to scores; none where it is the same at all keys, which softmax does not see."""
    if variance is None or variance.dim() == 0 or variance.shape[-1] < scores.shape[-1]:
        return None
    return (variance if abs(alpha) == 1 else variance * alpha**2).expand_as(scores)


def bilinear(operation: Callable[[Tensor, Tensor], Tensor], a: "Moments | Tensor", b: "Moments | Tensor") -> Moments:
    """c = operation(a, b), linear in each: v_c = op(m_a^2 + v_a, v_b) + op(v_a, m_b^2).

    Exact when all entries are independent (products, matrix products, convolutions).
    Source: single_pass notes 3.1.
    """
    a, b = as_moments(a), as_moments(b)
    mean = operation(a.mean, b.mean)

    def variance(first: Tensor | None, second: Tensor | None) -> Tensor | None:
        from_a = None if first is None else operation(first.expand_as(a.mean), b.mean.square())
        if second is None:
            return from_a
        squares = a.mean.square() if first is None else torch.addcmul(first.expand_as(a.mean), a.mean, a.mean)
        return total(from_a, operation(squares, second.expand_as(b.mean)))

    return Moments(mean, variance(a.var, b.var), variance(a.shared, b.shared))


def linearise(value: Tensor, derivative: Tensor, x: Moments) -> Moments:
    """f(x) ~ f(m) + f'(m) (x - m): mean f(m), variance f'(m)^2 v. First order."""
    square = derivative.square()
    return carry(value, lambda v: v * square, x)


def average(weighted: Callable[[Tensor], Tensor], squared: Callable[[Tensor], Tensor], x: Moments) -> Moments:
    """sum_i w_i x_i over positions: v = (sum w sqrt(shared))^2 + sum w^2 (v - shared).

    Args:
        weighted: the map t -> sum_i w_i t_i.
        squared: the map t -> sum_i w_i^2 t_i.
        x: moments; without `shared` the entries are independent and the result is exact for them.
    """
    mean = weighted(x.mean)
    if x.var is None:
        return Moments(mean)
    if x.shared is None:
        return Moments(mean, squared(x.var))
    common = x.shared.expand_as(x.var)
    shared = weighted(root(common)).square()
    return Moments(mean, shared + squared((x.var - common).clamp(min=0)), shared)
