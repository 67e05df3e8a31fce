"""Sums, products and powers.

Assumption: different tensors are independent. Two names for the same tensor are recognised
(`x + x`, `x * x`); a sum of two functions of one tensor (a residual branch) is not, see
docs/assumptions.md#sums.
"""

from typing import Any

import torch
from torch import Tensor

from bayespass.errors import UnsupportedOp
from bayespass.moments import Moments, add, as_moments, bilinear, scale
from bayespass.rules.registry import in_place, refuse_out, rule


@rule(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, knows_shared=True)
def addition(input: Any, other: Any, *, alpha: float = 1, out: None = None) -> Moments:
    """X + alpha y: v_x + alpha^2 v_y; x + x is 2 x. Exact for independent x and y.

    Source: single_pass notes 3.1 (residual add).
    """
    refuse_out(out)
    if input is other:
        return scale(input, 1 + alpha)
    return add(_tensor_like(input, other), _tensor_like(other, input), alpha)


@rule(torch.sub, torch.subtract, Tensor.sub, Tensor.subtract, Tensor.__sub__, knows_shared=True)
def subtraction(input: Any, other: Any, *, alpha: float = 1, out: None = None) -> Moments:
    """X - alpha y: v_x + alpha^2 v_y; x - x is exactly 0. Exact for independent x and y."""
    return addition(input, other, alpha=-alpha, out=out)


@rule(torch.rsub, Tensor.__rsub__, knows_shared=True)
def reflected_subtraction(input: Any, other: Any, *, alpha: float = 1) -> Moments:
    """Other - alpha input, as `1 - x` arrives."""
    return addition(_tensor_like(other, input), input, alpha=-alpha)


@rule(torch.neg, torch.negative, Tensor.neg, Tensor.negative, Tensor.__neg__, knows_shared=True)
def negation(input: Moments) -> Moments:
    """-x: variance unchanged. Exact."""
    return scale(input, -1)


@rule(torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__, knows_shared=True)
def multiplication(input: Any, other: Any, *, out: None = None) -> Moments:
    """X y: m_x^2 v_y + m_y^2 v_x + v_x v_y; x x is a square; a known factor scales.

    Exact for independent x and y. Source: single_pass notes 3.1.

    Raises:
        UnsupportedOp: both factors are random and carry shared variance, which no rule combines.
    """
    refuse_out(out)
    if not isinstance(input, Moments):
        return scale(other, input)
    if not isinstance(other, Moments):
        return scale(input, other)
    if input.shared is not None or other.shared is not None:
        msg = "no rule for the product of two Gaussian tensors with shared variance"
        raise UnsupportedOp(msg)
    return square(input) if input is other else bilinear(torch.mul, input, other)


@rule(
    torch.div, torch.divide, torch.true_divide, Tensor.div, Tensor.divide, Tensor.true_divide, Tensor.__truediv__,
    Tensor.__div__, knows_shared=True,
)  # fmt: skip
def division(input: Any, other: Any, *, rounding_mode: str | None = None, out: None = None) -> Moments:
    """X / y for a known y: v_x / y^2. Exact.

    Raises:
        UnsupportedOp: the divisor is random (its inverse has no moments), or a rounding mode.
    """
    refuse_out(out)
    if isinstance(other, Moments):
        msg = "no Gaussian rule for division by a random tensor: 1 / Gaussian has no finite variance"
        raise UnsupportedOp(msg)
    if rounding_mode is not None:
        msg = f"the Gaussian rule of torch.div does not support rounding_mode={rounding_mode!r}"
        raise UnsupportedOp(msg)
    reciprocal = 1 / other
    scaled = scale(input, reciprocal)
    return Moments(input.mean / other, scaled.var, scaled.shared)


@rule(Tensor.__rtruediv__, Tensor.__rdiv__)
def reflected_division(input: Moments, other: Any) -> Moments:
    """Other / x for a random x is refused.

    Raises:
        UnsupportedOp: always.
    """
    return division(other, input)


@rule(torch.pow, Tensor.pow, Tensor.__pow__)
def power(input: Any, exponent: Any, *, out: None = None) -> Moments:
    """X^2 (exact: m^2 + v, 4 m^2 v + 2 v^2) and x^1.

    Raises:
        UnsupportedOp: any other exponent.
    """
    refuse_out(out)
    if isinstance(input, Moments) and isinstance(exponent, int | float) and exponent == 2:
        return square(input)
    if isinstance(input, Moments) and isinstance(exponent, int | float) and exponent == 1:
        return input
    msg = f"the Gaussian rule of torch.pow supports the exponents 1 and 2; got {exponent!r}"
    raise UnsupportedOp(msg)


@rule(torch.square, Tensor.square)
def square(input: Moments, *, out: None = None) -> Moments:
    """x^2: mean m^2 + v, variance 4 m^2 v + 2 v^2. Exact for a Gaussian. Source: single_pass notes 3.2."""
    refuse_out(out)
    if input.var is None:
        return Moments(input.mean.square())
    m2 = input.mean.square()
    return Moments(m2 + input.var, 4 * m2 * input.var + 2 * input.var.square())


in_place(
    {
        Tensor.add_: torch.add, Tensor.__iadd__: torch.add, Tensor.sub_: torch.sub, Tensor.__isub__: torch.sub,
        Tensor.mul_: torch.mul, Tensor.__imul__: torch.mul, Tensor.div_: torch.div, Tensor.__itruediv__: torch.div,
        Tensor.neg_: torch.neg, Tensor.square_: torch.square,
    }
)  # fmt: skip


def _tensor_like(value: Any, other: Any) -> Any:
    """A number as a tensor of the other operand's kind, with torch's promotion of numbers."""
    if isinstance(value, Moments | Tensor):
        return value
    like = as_moments(other).mean
    return torch.as_tensor(value, device=like.device, dtype=torch.result_type(like, value))
