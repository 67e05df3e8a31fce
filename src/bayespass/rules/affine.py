"""Linear maps with random or known weights: linear, convolutions, matrix products, einsum.

Assumption: inputs, weights and biases are independent of each other, entry by entry. Under it the
rules are exact. What it leaves out is that one weight's noise is common to all tokens, pixels and
rows (docs/assumptions.md#linear-maps); with `shared="carry"` the common part is followed
(`sharing.py`).

A product of two random tensors with batch axes may be the first half of attention written out, so
that it remembers its factors. One that follows a softmax is the second half: it consumes the
softmax's `scores` slot and uses `weighted_values` of `attention.py`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bayespass.approximation import Approximation
from bayespass.errors import UnsupportedOp
from bayespass.moments import (
    Factors,
    Moments,
    Source,
    add,
    apply,
    as_moments,
    average,
    bilinear,
    move,
    rescaled,
    scale,
    shifted,
)
from bayespass.rules.attention import score_noise, weighted_values
from bayespass.rules.registry import refuse_out, rule
from bayespass.rules.sharing import after_channels, between, broadcast_noise, weighted


def plain_weight(weight: Any) -> Any:
    """A quantised weight as ordinary numbers; anything else as it is."""
    if torch.compiler.is_compiling():
        return weight
    quantised = isinstance(weight, Tensor) and (weight.is_quantized or is_traceable_wrapper_subclass(weight))
    return weight.dequantize() if quantised else weight


def _with_bias(result: Moments, bias: Any, approximation: Approximation, channel_dims: int = 0) -> Moments:
    if bias is None:
        return result
    bias = as_moments(bias)
    shape = (-1, *[1] * channel_dims)
    noise = Moments(bias.mean.reshape(shape), None if bias.var is None else bias.var.reshape(shape))
    return add(result, broadcast_noise(noise, result.mean, approximation))


@rule(F.linear, knows_shared=True)
def linear(input: Any, weight: Any, bias: Any = None, *, approximation: Approximation) -> Moments:
    """x W^T + b: v = (m_x^2 + v_x) V_W^T + v_x (W^2)^T + V_b. Exact for independent entries.

    Args:
        input: (..., in), mean and variance or plain. With `shared="carry"` the axes between the
            first and the last hold positions.
        weight: (out, in), mean and variance or plain.
        bias: (out,) or None.
        approximation: its field `shared`.

    Source: single_pass notes 3.1.
    """
    x, w = as_moments(input), as_moments(plain_weight(weight))
    result = _with_bias(weighted(F.linear, x, w, between(x.mean), approximation), bias, approximation)
    return result if x.var is None else replace(result, source=Source(x.var, w.mean))


def _over_offsets(weight: Tensor) -> Tensor:
    return weight.sum(tuple(range(2, weight.dim())), keepdim=True)


def _convolution(operation: Callable[..., Tensor], spatial_dims: int) -> Callable[..., Moments]:
    def convolution(
        input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
        groups: int = 1, *, approximation: Approximation,
    ) -> Moments:  # fmt: skip
        """The convolution of (m_x^2 + v_x) with V_W plus that of v_x with W^2, plus V_b.

        Exact for independent entries; padding contributes nothing. Where the input's noise is
        shared by positions, the offsets of a kernel see one draw: `_smooth_noise` replaces their
        sum of squares by the square of their sum. Source: single_pass notes 3.1.
        """
        x, w = as_moments(input), as_moments(plain_weight(weight))
        if x.mean.dim() == spatial_dims + 1:  # without a batch axis
            lifted = move(torch.unsqueeze, x, 0)
            result = convolution(lifted, w, bias, stride, padding, dilation, groups, approximation=approximation)
            return move(torch.squeeze, result, 0)

        def convolve(t: Tensor, kernel: Tensor) -> Tensor:
            return operation(t, kernel, None, stride, padding, dilation, groups)

        def smooth(g: Tensor) -> Tensor:
            return _smooth_noise(g, w.mean, operation, groups, (stride, padding, dilation))

        several = w.mean[0, 0].numel() > 1
        result = weighted(
            convolve, x, w, after_channels(x.mean), approximation, _over_offsets, smooth if several else None
        )
        return _with_bias(result, bias, approximation, spatial_dims)

    convolution.__name__ = operation.__name__
    return convolution


def _smooth_noise(
    g: Tensor, w: Tensor, operation: Callable[..., Tensor], groups: int, geometry: tuple[Any, Any, Any]
) -> Tensor:
    """What the variance gains from the part of the input's noise that is smooth over a kernel's extent.

    Of shared noise with standard deviation g, its average gbar over the kernel's window passes
    through as sum_i (sum_o w_io)^2 gbar_i^2 where independence says sum_io w_io^2 gbar_i^2. Exact
    for constant g, first order in its variation within a window.
    """
    box = torch.full((g.shape[1], 1, *w.shape[2:]), 1 / w[0, 0].numel(), dtype=w.dtype, device=w.device)
    level = operation(g, box, None, *geometry, g.shape[1]).square()
    gain = _over_offsets(w).square() - _over_offsets(w.square())
    return operation(level, gain, None, 1, 0, 1, groups)


def _transposed(operation: Callable[..., Tensor], spatial_dims: int) -> Callable[..., Moments]:
    def transposed_convolution(
        input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
        groups: int = 1, dilation: Any = 1, *, approximation: Approximation,
    ) -> Moments:  # fmt: skip
        """As the convolutions, with the operation transposed; exact for independent entries.

        Offsets that meet in one output are independent also where the input's noise is shared.
        Source: single_pass notes 3.1.
        """
        x, w = as_moments(input), as_moments(plain_weight(weight))

        def convolve(t: Tensor, kernel: Tensor) -> Tensor:
            return operation(t, kernel, None, stride, padding, output_padding, groups, dilation)

        axes = after_channels(x.mean) if x.mean.dim() == spatial_dims + 2 else tuple(range(1, x.mean.dim()))
        return _with_bias(weighted(convolve, x, w, axes, approximation), bias, approximation, spatial_dims)

    transposed_convolution.__name__ = operation.__name__
    return transposed_convolution


for _dims, (_plain, _reverse) in enumerate(
    ((F.conv1d, F.conv_transpose1d), (F.conv2d, F.conv_transpose2d), (F.conv3d, F.conv_transpose3d)), start=1
):
    rule(_plain, knows_shared=True)(_convolution(_plain, _dims))
    rule(_reverse, knows_shared=True)(_transposed(_reverse, _dims))


@rule(F.bilinear, torch.bilinear, knows_shared=True)
def bilinear_map(input1: Any, input2: Any, weight: Any, bias: Any = None, *, approximation: Approximation) -> Moments:
    """x1 W x2 + b with one of the inputs known: a linear map of the other. Exact for independent entries.

    Raises:
        UnsupportedOp: both inputs are random.
    """
    if isinstance(input1, Moments) and isinstance(input2, Moments):
        msg = "no Gaussian rule for torch.bilinear with two random inputs"
        raise UnsupportedOp(msg)
    x1, x2, w = as_moments(input1), as_moments(input2), as_moments(weight)
    known, other, order = (x2, x1, "...j,oij->...oi") if x2.var is None else (x1, x2, "...i,oij->...oj")
    left = Moments(
        torch.einsum(order, known.mean, w.mean),
        apply(lambda v: torch.einsum(order, known.mean.square(), v), w.var),
    )
    row = move(torch.unsqueeze, Moments(other.mean, other.var), -2)
    product = bilinear(lambda s, t: (s * t).sum(-1), left, row)
    return _with_bias(product, bias, approximation)


@rule(torch.addmm, Tensor.addmm, knows_shared=True)
def addmm(
    input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1, out: None = None,
    approximation: Approximation,
) -> Moments:  # fmt: skip
    """Beta input + alpha mat1 @ mat2, as GPT-2 writes its linear layers. Exact for independent entries.

    Rows count as positions of unknown arrangement: with `shared="carry"` all weight noise is shared.

    Raises:
        UnsupportedOp: `out` was given.
    """
    refuse_out(out)
    product = scale(_product(as_moments(mat1), as_moments(plain_weight(mat2)), approximation), alpha)
    return add(product, broadcast_noise(scale(as_moments(input), beta), product.mean, approximation))


@rule(torch.baddbmm, Tensor.baddbmm, knows_shared=True)
def baddbmm(
    input: Any, batch1: Any, batch2: Any, *, beta: float = 1, alpha: float = 1, out: None = None,
    approximation: Approximation,
) -> Moments:  # fmt: skip
    """Beta input + alpha batch1 @ batch2, as attention scores with a bias are written. Exact for independent entries.

    Raises:
        UnsupportedOp: `out` was given.
    """
    refuse_out(out)
    q, k = as_moments(batch1), as_moments(batch2)
    product = rescaled(_with_factors(_product(q, k, approximation), q, k), alpha)
    return product if beta == 0 else shifted(product, scale(as_moments(input), beta))


@rule(
    torch.matmul, torch.mm, torch.bmm, torch.mv, torch.dot, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.mv, Tensor.dot,
    Tensor.__matmul__, knows_shared=True,
)  # fmt: skip
def matmul(input: Any, other: Any, *, out: None = None, approximation: Approximation) -> Moments:
    """A @ b: v = m_a^2 V_b + v_a (m_b^2 + V_b). Exact for independent entries.

    When `a` is the output of a softmax, this is the second half of attention written out and has
    the moments of the fused call (`rules/attention.py`). A known `a` mixes the rows of `b`, which
    are positions: shared noise adds up there as in an average.

    Raises:
        UnsupportedOp: `out` was given.
    """
    refuse_out(out)
    if isinstance(input, Moments) and input.scores is not None:
        return weighted_values(input.mean, as_moments(other), score_noise(input, approximation))
    a, b = as_moments(input), as_moments(plain_weight(other))
    return _with_factors(_product(a, b, approximation), a, b)


def _with_factors(product: Moments, a: Moments, b: Moments) -> Moments:
    """A b, which remembers both where it may be scores of attention: batched, and both random."""
    if a.var is None or b.var is None or a.mean.dim() < 2 or b.mean.dim() < 3:
        return product
    return replace(product, factors=Factors(Moments(a.mean, a.var, a.shared), move(Tensor.transpose, b, -1, -2)))


def _product(a: Moments, b: Moments, approximation: Approximation) -> Moments:
    if a.var is None and b.shared is not None and b.mean.dim() > 1:
        return average(lambda t: a.mean @ t, lambda t: a.mean.square() @ t, b)
    if b.mean.dim() == 2 and b.shared is None:  # a weight matrix
        return weighted(torch.matmul, a, b, between(a.mean), approximation)
    return bilinear(torch.matmul, a, b)


def grouped_mm(input: Any, mat2: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Moments:
    """Rows times the matrix of their group, as mixtures of experts are written. Exact for independent entries.

    Raises:
        UnsupportedOp: a bias.
    """
    if bias is not None:
        msg = "the Gaussian rule of torch._grouped_mm takes no bias"
        raise UnsupportedOp(msg)
    return bilinear(lambda a, b: torch._grouped_mm(a, b, offs, out_dtype=out_dtype), input, mat2)


if hasattr(torch, "_grouped_mm"):  # torch 2.8 and later
    rule(torch._grouped_mm, knows_shared=True)(grouped_mm)


@rule(Tensor.__rmatmul__, knows_shared=True)
def reflected_matmul(input: Any, other: Any, *, approximation: Approximation) -> Moments:
    """B @ a with the random operand on the right."""
    return matmul(other, input, approximation=approximation)


@rule(torch.outer, torch.ger, Tensor.outer, knows_shared=True)
def outer(input: Any, vec2: Any, *, out: None = None) -> Moments:
    """x y^T: products of independent entries. Exact.

    Raises:
        UnsupportedOp: `out` was given.
    """
    refuse_out(out)
    return bilinear(torch.outer, input, vec2)


@rule(torch.einsum, knows_shared=True)
def einsum(equation: str, *operands: Any, approximation: Approximation) -> Moments:
    """A product and sum over named axes, as in matmul; at most two operands may be random.

    Exact for independent entries. When the first random operand is the output of a softmax and the
    second a random tensor, this is attention written out.

    Raises:
        UnsupportedOp: more than two random operands, two that do not both have every axis that is
            summed, an operand that repeats an axis, or axes given as lists.
    """
    operands = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    if not isinstance(equation, str):
        msg = "the Gaussian rule of torch.einsum takes the equation as a string"
        raise UnsupportedOp(msg)
    places = [i for i, operand in enumerate(operands) if isinstance(operand, Moments) and operand.var is not None]
    if not _is_product_of_entries(equation, places):
        msg = (
            f"no Gaussian rule for torch.einsum({equation!r}) with {len(places)} random operands; contract in two steps"
        )
        raise UnsupportedOp(msg)
    plain = [operand.mean if isinstance(operand, Moments) else operand for operand in operands]
    random = [operands[i] for i in places]

    def contracted(*values: Tensor, squared: bool) -> Tensor:
        filled = [t.square() if squared and i not in places else t for i, t in enumerate(plain)]
        for place, value in zip(places, values, strict=True):
            filled[place] = value
        return torch.einsum(equation, *filled)

    if not random:
        return Moments(torch.einsum(equation, *plain))
    if len(random) == len(operands) == 2 and random[0].scores is not None:
        weights, values = random
        noise = score_noise(weights, approximation)
        return weighted_values(weights.mean, values, noise, lambda p, t: contracted(p, t, squared=False))
    if len(random) == 1:
        mixed = places[0] > 0  # what stands behind a known operand is mixed over positions
        equation, plain, places = _with_one_known_operand(equation, plain, places[0])
        x = random[0]
        result = average(lambda t: contracted(t, squared=False), lambda t: contracted(t, squared=True), x)
        if x.shared is None or mixed:
            return result
        independent = Moments(x.mean, x.var)
        var = average(lambda t: contracted(t, squared=False), lambda t: contracted(t, squared=True), independent).var
        return Moments(result.mean, var, contracted(x.shared.expand_as(x.mean), squared=True))
    a, b = random
    second = bilinear(lambda s, t: contracted(s, t, squared=True), a, b)
    result = Moments(contracted(a.mean, b.mean, squared=False), second.var, second.shared)
    if len(operands) > 2:
        return result
    for query, key, terms in ((a, b, (0, 1)), (b, a, (1, 0))):
        orders = _orders_of_factors(equation, *terms)
        if orders is not None and min(query.mean.dim(), key.mean.dim()) > 2:
            query, key = (_with_last_axes(x, order) for x, order in zip((query, key), orders, strict=True))
            return _with_factors(result, query, move(Tensor.transpose, key, -1, -2))
    return result


def _orders_of_factors(equation: str, first: int, second: int) -> tuple[list[int], list[int]] | None:
    """Orders of two terms' axes that give (..., T, E) and (..., S, E), if the equation multiplies queries and keys."""
    inputs, arrow, output = equation.replace(" ", "").replace("...", "").partition("->")
    query, key = (inputs.split(",")[place] for place in (first, second))
    summed = set(query) & set(key) - set(output)
    if not arrow or len(output) < 2 or len(summed) != 1:
        return None
    wanted = [*output[:-1], *summed], [*output[:-2], output[-1], *summed]
    if any(sorted(term) != sorted(axes) for term, axes in zip((query, key), wanted, strict=True)):
        return None
    return [query.index(axis) for axis in wanted[0]], [key.index(axis) for axis in wanted[1]]


def _with_last_axes(x: Moments, order: list[int]) -> Moments:
    """The last axes in this order; those before them are what an ellipsis stands for."""
    leading = x.mean.dim() - len(order)
    return move(Tensor.permute, x, [*range(leading), *(leading + place for place in order)])


def _with_one_known_operand(equation: str, operands: list[Any], place: int) -> tuple[str, list[Any], list[int]]:
    """The same contraction with the known operands contracted first, to axes of the random operand or the output.

    Only then are the squares of known weights those of what multiplies an entry.

    Raises:
        UnsupportedOp: "..." in an equation where that is needed.
    """
    inputs, _, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    kept = set(terms[place]) | set(output)
    lost = set(inputs) - kept - {","}
    if "->" not in equation or not lost:
        return equation, operands, [place]
    if "..." in equation:
        msg = f"no Gaussian rule for torch.einsum({equation!r}): contract the known operands first"
        raise UnsupportedOp(msg)
    known = [i for i in range(len(terms)) if i != place]
    axes = "".join(sorted(set("".join(terms[i] for i in known)) - lost))
    factor = torch.einsum(",".join(terms[i] for i in known) + "->" + axes, *(operands[i] for i in known))
    return f"{terms[place]},{axes}->{output}", [operands[place], factor], [0]


def _is_product_of_entries(equation: str, places: list[int]) -> bool:
    """Whether every entry of one random operand meets only one entry of the other in each output."""
    inputs, _, output = equation.replace(" ", "").replace("...", "").partition("->")
    terms = inputs.split(",")
    if "->" not in equation:
        output = "".join(axis for axis in inputs if inputs.count(axis) == 1)
    random = [terms[i] for i in places]
    summed = set(inputs) - set(output) - {","}
    return (
        len(places) <= 2
        and all(len(set(term)) == len(term) for term in random)
        and (len(places) < 2 or all(axis in random[0] and axis in random[1] for axis in summed))
    )
