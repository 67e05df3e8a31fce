"""Linear maps with random or known weights: linear, convolutions, matrix products.

Assumption: inputs, weights and biases are independent of each other, entry by entry. Under it the
rules are exact. What it leaves out is that one weight's noise is common to all tokens, pixels and
rows, see docs/assumptions.md#linear-maps.

A matrix product that follows a softmax is the second half of attention written out: it consumes the
softmax's `scores` slot and uses `weighted_values` of `attention.py`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bayespass.errors import UnsupportedOp
from bayespass.moments import Moments, add, as_moments, bilinear, scale
from bayespass.rules.attention import weighted_values
from bayespass.rules.registry import refuse_out, rule


def _with_bias(result: Moments, bias: Any, channel_dims: int = 0) -> Moments:
    if bias is None:
        return result
    bias = as_moments(bias)
    shape = (-1, *[1] * channel_dims)
    var = None if bias.var is None else bias.var.reshape(shape)
    return add(result, Moments(bias.mean.reshape(shape), var))


@rule(F.linear, knows_shared=True)
def linear(input: Any, weight: Any, bias: Any = None) -> Moments:
    """x W^T + b: v = (m_x^2 + v_x) V_W^T + v_x (W^2)^T + V_b. Exact for independent entries.

    Args:
        input: (..., in), mean and variance or plain.
        weight: (out, in), mean and variance or plain.
        bias: (out,) or None.

    Source: single_pass notes 3.1.
    """
    return _with_bias(bilinear(F.linear, input, weight), bias)


def _convolution(operation: Callable[..., Tensor], spatial_dims: int) -> Callable[..., Moments]:
    def convolution(
        input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
    ) -> Moments:
        """The convolution of (m_x^2 + v_x) with V_W plus that of v_x with W^2, plus V_b.

        Exact for independent entries; padding contributes nothing. Source: single_pass notes 3.1.
        """

        def convolve(x: Tensor, w: Tensor) -> Tensor:
            return operation(x, w, None, stride, padding, dilation, groups)

        return _with_bias(bilinear(convolve, input, weight), bias, spatial_dims)

    return convolution


rule(F.conv1d)(_convolution(F.conv1d, 1))
rule(F.conv2d)(_convolution(F.conv2d, 2))


@rule(torch.addmm, Tensor.addmm)
def addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1, out: None = None) -> Moments:
    """Beta input + alpha mat1 @ mat2, as GPT-2 writes its linear layers. Exact for independent entries.

    Raises:
        UnsupportedOp: `out` was given.
    """
    refuse_out(out)
    product = scale(bilinear(torch.matmul, mat1, mat2), alpha)
    return add(product, scale(as_moments(input), beta))


@rule(torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__, knows_shared=True)
def matmul(input: Any, other: Any, *, out: None = None) -> Moments:
    """A @ b: v = m_a^2 V_b + v_a (m_b^2 + V_b). Exact for independent entries.

    When `a` is the output of a softmax, this is the second half of attention written out and has
    the moments of the fused call (`rules/attention.py`).

    Raises:
        UnsupportedOp: `out` was given, or shared variance meets an ordinary matrix product.
    """
    refuse_out(out)
    if isinstance(input, Moments) and input.scores is not None:
        return weighted_values(input.mean, as_moments(other))
    if any(isinstance(factor, Moments) and factor.shared is not None for factor in (input, other)):
        msg = "no rule for a matrix product with shared variance outside attention"
        raise UnsupportedOp(msg)
    return bilinear(torch.matmul, input, other)


@rule(Tensor.__rmatmul__, knows_shared=True)
def reflected_matmul(input: Any, other: Any) -> Moments:
    """B @ a with the random operand on the right."""
    return matmul(other, input)
