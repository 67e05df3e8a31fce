"""Sums, products and powers.

Assumption: different tensors are independent. Two names for the same tensor are recognised
(`x + x`, `x * x`); a sum of two functions of one tensor (a residual branch) is not, see
docs/assumptions.md#sums.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bayespass.approximation import Approximation
from bayespass.errors import UnsupportedOp
from bayespass.moments import (
    Moments,
    add,
    as_moments,
    average,
    bilinear,
    carry,
    finite_slope,
    linearise,
    rescaled,
    scale,
    shifted,
    total,
)
from bayespass.rules.activation import sigmoid
from bayespass.rules.moving import split_with_sources
from bayespass.rules.registry import Accuracy, in_place, refuse_out, rule
from bayespass.rules.sharing import broadcast_noise, copied_axes, explained


@rule(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, knows_shared=True)
def addition(
    input: Any, other: Any, *, alpha: float = 1, out: None = None, approximation: Approximation
) -> Moments:  # fmt: skip
    """X + alpha y: v_x + alpha^2 v_y; x + x is 2 x. Exact for independent x and y.

    An operand that is broadcast is one draw for all its copies, which `shared="carry"` remembers.
    Source: single_pass notes 3.1 (residual add).
    """
    refuse_out(out)
    if input is other:
        return scale(input, 1 + alpha)
    x, y = as_moments(_tensor_like(input, other)), as_moments(_tensor_like(other, input))
    x, y = broadcast_noise(x, y.mean, approximation), broadcast_noise(y, x.mean, approximation)
    return shifted(x, y, alpha) if y.factors is None else shifted(rescaled(y, alpha), x)


@rule(torch.sub, torch.subtract, Tensor.sub, Tensor.subtract, Tensor.__sub__, knows_shared=True)
def subtraction(
    input: Any, other: Any, *, alpha: float = 1, out: None = None, approximation: Approximation
) -> Moments:  # fmt: skip
    """X - alpha y: v_x + alpha^2 v_y; x - x is exactly 0. Exact for independent x and y."""
    return addition(input, other, alpha=-alpha, out=out, approximation=approximation)


@rule(torch.rsub, Tensor.__rsub__, knows_shared=True)
def reflected_subtraction(input: Any, other: Any, *, alpha: float = 1, approximation: Approximation) -> Moments:
    """Other - alpha input, as `1 - x` arrives."""
    return addition(_tensor_like(other, input), input, alpha=-alpha, approximation=approximation)


@rule(torch.neg, torch.negative, Tensor.neg, Tensor.negative, Tensor.__neg__, knows_shared=True)
def negation(input: Moments) -> Moments:
    """-x: variance unchanged. Exact."""
    return rescaled(input, -1)


@rule(torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__, knows_shared=True)
def multiplication(input: Any, other: Any, *, out: None = None, approximation: Approximation) -> Moments:
    """X y: m_x^2 v_y + m_y^2 v_x + v_x v_y; x x is a square; a known factor scales.

    Exact for independent x and y. Two linear maps of one random input, as in gated MLPs (SwiGLU),
    have covariance c = sum_j W_x W_y v_j, which is counted: mean + c, variance + 2 m_x m_y c + c^2
    (the linearised approximation leaves the mean alone). Source: single_pass notes 3.1.
    """
    refuse_out(out)
    if not isinstance(input, Moments):
        return rescaled(other, input)
    if not isinstance(other, Moments):
        return rescaled(input, other)
    if input is other:
        return square(input)
    if approximation.shared == "carry" and input.mean.shape != other.mean.shape:
        x, gain = sorted((input, other), key=lambda factor: -factor.mean.numel())
        return random_gain(x, gain, approximation)
    product = bilinear(torch.mul, input, other)
    c = _covariance(input, other)
    if c is None or product.var is None:
        return product
    both = 2 * input.mean * other.mean * c
    if approximation.activation == "linear":
        return Moments(product.mean, (product.var + both).clamp(min=0), product.shared)
    return Moments(product.mean + c, (product.var + both + c.square()).clamp(min=0), product.shared)


def random_gain(x: Moments, gain: Moments, approximation: Approximation) -> Moments:
    """X g for a random g that is the same at all entries it is broadcast to: v = (g^2 + V_g) v_x + V_g m_x^2."""
    result = bilinear(torch.mul, x, gain)
    copied = copied_axes(gain.mean, x.mean)
    if approximation.shared == "ignore" or gain.var is None or gain.shared is not None or not copied:
        return result
    assert result.var is not None
    alike = x.mean * x.mean.mean(copied, keepdim=True)
    noise = explained(alike * gain.var, result.var, copied)
    shared = noise if result.shared is None else result.shared + noise
    return Moments(result.mean, result.var, torch.minimum(shared, result.var))


def _covariance(a: Moments, b: Moments) -> Tensor | None:
    """Cov of two linear maps of the same random input, held within what the variances allow."""
    if a.source is None or b.source is None or a.source.var is not b.source.var or a.mean.shape != b.mean.shape:
        return None
    assert a.var is not None
    assert b.var is not None
    c = F.linear(a.source.var, a.source.weight * b.source.weight)
    for source in (a.source, b.source):
        c = c if source.gain is None else c * source.gain.to(c.dtype)
    most = (a.var * b.var).sqrt()
    return torch.maximum(torch.minimum(c, most), -most)


@rule(
    torch.div, torch.divide, torch.true_divide, Tensor.div, Tensor.divide, Tensor.true_divide, Tensor.__truediv__,
    Tensor.__div__, knows_shared=True, accuracy=Accuracy(0.2, 0.25),
)  # fmt: skip
def division(input: Any, other: Any, *, rounding_mode: str | None = None, out: None = None) -> Moments:
    """X / y: exact for a known y, v_x / y^2; first order in the relative variance r of a random y.

    For a random divisor: mean m_x / m_y, variance (v_x + (m_x / m_y)^2 v_y) / m_y^2. Bounds (mean
    in output sd, variance relative): 0.2 and 0.25, for a divisor whose sd is at most 0.2 of its
    mean, as norms and sums of weights are; 1 / Gaussian itself has no finite moments.

    Raises:
        UnsupportedOp: a rounding mode.
    """
    refuse_out(out)
    if rounding_mode is not None:
        msg = f"the Gaussian rule of torch.div does not support rounding_mode={rounding_mode!r}"
        raise UnsupportedOp(msg)
    x, y = as_moments(_tensor_like(input, other)), as_moments(other) if isinstance(other, Moments) else other
    if not isinstance(y, Moments):
        return replace(rescaled(x, 1 / y), mean=x.mean / y)
    if input is other:
        return Moments(torch.ones_like(x.mean))
    inverse = carry(1 / y.mean, lambda t: t / y.mean.square().square(), y)
    first = bilinear(torch.mul, Moments(x.mean), inverse)
    second = bilinear(torch.mul, x, inverse.mean)
    return Moments(x.mean / y.mean, total(first.var, second.var), total(first.shared, second.shared))


@rule(Tensor.__rtruediv__, Tensor.__rdiv__, knows_shared=True, accuracy=Accuracy(0.2, 0.25))
def reflected_division(input: Moments, other: Any) -> Moments:
    """Other / x, see `division`; bounds 0.2 and 0.25 for an x whose sd is at most 0.2 of its mean."""
    return division(other, input)


@rule(torch.pow, Tensor.pow, Tensor.__pow__, knows_shared=True, accuracy=Accuracy(0.2, 0.25))
def power(input: Any, exponent: Any, *, out: None = None, approximation: Approximation) -> Moments:
    """X^n: exact for n = 1, 2, 3; second order for the others (n = -1, -1/2, 1/2 among them).

    The second-order form, f + v f''/2 and v f'^2 + v^2 f''^2/2, is meant for x whose sd is at most
    0.2 of its mean. Bounds (mean in output sd, variance relative): 0.2 and 0.25.

    Raises:
        UnsupportedOp: a random or tensor exponent.
    """
    refuse_out(out)
    if not isinstance(input, Moments) or not isinstance(exponent, int | float):
        msg = f"the Gaussian rule of torch.pow takes a random base and a number as exponent; got {exponent!r}"
        raise UnsupportedOp(msg)
    if exponent == 1:
        return input
    if exponent == 2:
        return square(input)
    m = input.mean
    if exponent == 3:
        return _elementary(input, m**3, 3 * m.square(), 6 * m, third=6.0, approximation=approximation)
    first, second = exponent * m ** (exponent - 1), exponent * (exponent - 1) * m ** (exponent - 2)
    first, second = finite_slope(first), finite_slope(second)
    return _elementary(input, m**exponent, first, second, third=0.0, approximation=approximation)


def _elementary(
    x: Moments, value: Tensor, first: Tensor, second: Tensor, third: float, approximation: Approximation
) -> Moments:
    """f(x) from its derivatives at the mean, exact for cubics; linearised if the approximation is."""
    if x.var is None or approximation.activation == "linear":
        return linearise(value, first, x)
    slope = first + 0.5 * x.var * third  # E f'

    def covariance(c: Tensor) -> Tensor:
        return c * slope.square() + c.square() * second.square() / 2 + c**3 * third**2 / 6

    return carry(value + x.var * second / 2, covariance, x)


@rule(torch.square, Tensor.square, knows_shared=True)
def square(input: Moments, *, out: None = None) -> Moments:
    """x^2: mean m^2 + v, variance 4 m^2 v + 2 v^2. Exact for a Gaussian. Source: single_pass notes 3.2."""
    refuse_out(out)
    m2 = input.mean.square()
    if input.var is None:
        return Moments(m2)
    return carry(m2 + input.var, lambda c: 4 * m2 * c + 2 * c.square(), input)


@rule(torch.addcmul, Tensor.addcmul, knows_shared=True)
def addcmul(
    input: Any, tensor1: Any, tensor2: Any, *, value: float = 1, out: None = None, approximation: Approximation
) -> Moments:
    """X + value a b, see `multiplication` and `addition`."""
    refuse_out(out)
    if not isinstance(tensor1, Moments) and not isinstance(tensor2, Moments):
        return addition(input, value * tensor1 * tensor2, approximation=approximation)
    return addition(
        input, multiplication(tensor1, tensor2, approximation=approximation), alpha=value, approximation=approximation
    )


@rule(
    F.glu,
    accuracy={"moments": Accuracy(0.02, 0.03), "linear": Accuracy(0.5, 2.0)},
    depends_on="activation",
    knows_shared=True,
)
def glu(input: Moments, dim: int = -1, *, approximation: Approximation) -> Moments:
    """A sigmoid(b) for the two halves of x, see `multiplication` and `sigmoid`.

    Bounds (mean in output sd, variance relative): 0.02 and 0.03 matched, 0.5 and 2 linear.
    """
    a, b = split_with_sources(input, Tensor.chunk, 2, dim)
    return multiplication(a, sigmoid(b, approximation=approximation), approximation=approximation)


@rule(torch.lerp, Tensor.lerp, knows_shared=True)
def lerp(input: Any, end: Any, weight: Any, *, out: None = None, approximation: Approximation) -> Moments:
    """(1 - w) x + w y for a known w: exact for independent x and y.

    Raises:
        UnsupportedOp: a random weight, or `out`.
    """
    refuse_out(out)
    if isinstance(weight, Moments):
        msg = "no Gaussian rule for torch.lerp with a random weight"
        raise UnsupportedOp(msg)
    return add(scale(as_moments(input), 1 - weight), scale(as_moments(end), weight))


@rule(torch.cumsum, Tensor.cumsum, knows_shared=True)
def cumsum(input: Moments, dim: int, *, dtype: Any = None, out: None = None) -> Moments:
    """y_i = x_1 + ... + x_i: variances add, shared standard deviations add. Exact for independent entries."""
    refuse_out(out)
    return average(lambda t: t.cumsum(dim, dtype=dtype), lambda t: t.cumsum(dim, dtype=dtype), input)


in_place(
    {
        Tensor.add_: torch.add, Tensor.__iadd__: torch.add, Tensor.sub_: torch.sub, Tensor.__isub__: torch.sub,
        Tensor.mul_: torch.mul, Tensor.__imul__: torch.mul, Tensor.div_: torch.div, Tensor.__itruediv__: torch.div,
        Tensor.neg_: torch.neg, Tensor.square_: torch.square, Tensor.pow_: torch.pow, Tensor.__ipow__: torch.pow,
        Tensor.addcmul_: torch.addcmul, Tensor.lerp_: torch.lerp, 
        Tensor.multiply_: torch.mul, Tensor.subtract_: torch.sub,
    }
)  # fmt: skip


def _tensor_like(value: Any, other: Any) -> Any:
    """A number as a tensor of the other operand's kind, with torch's promotion of numbers."""
    if isinstance(value, Moments | Tensor):
        return value
    like = as_moments(other).mean
    return torch.as_tensor(value, device=like.device, dtype=torch.result_type(like, value))
