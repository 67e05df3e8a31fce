"""Averages, sums and maxima over positions.

Assumption: entries are independent except for their `shared` part, which does not cancel in an
average. Without it pooling understates the variance of weight noise, which is common to all
positions; see docs/assumptions.md#pooling. Max pooling matches the moments of pairwise maxima
(Clark) or, linearised, passes the entry with the largest mean.

Source: single_pass notes 3.1.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bayespass.approximation import Approximation
from bayespass.errors import UnsupportedOp
from bayespass.moments import Moments, apply, average, in_float32, move, root
from bayespass.rules.activation import normal_cdf, normal_pdf, standardised
from bayespass.rules.placing import stack
from bayespass.rules.pointwise import maximum
from bayespass.rules.registry import Accuracy, refuse_out, rule

Size = Any  # an int, or one for each axis, as PyTorch takes it


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[-1])


@rule(torch.mean, Tensor.mean, knows_shared=True)
def mean(input: Moments, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, out: None = None) -> Moments:
    """Average of n entries: v = mean(sqrt(shared))^2 + mean(v - shared) / n. Exact under independence."""
    refuse_out(out)

    def averaged(t: Tensor) -> Tensor:
        return t.mean(dim, keepdim=keepdim, dtype=dtype)

    size = input.mean.numel() / max(1, averaged(input.mean).numel())
    return average(averaged, lambda t: averaged(t) / size, input)


@rule(torch.sum, Tensor.sum, knows_shared=True)
def summation(
    input: Moments, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, out: None = None
) -> Moments:
    """Sum of entries: variances add, shared standard deviations add. Exact under independence."""
    refuse_out(out)

    def summed(t: Tensor) -> Tensor:
        return t.sum(dim, keepdim=keepdim, dtype=dtype)

    return average(summed, summed, input)


@rule(F.adaptive_avg_pool1d, knows_shared=True)
def adaptive_avg_pool1d(input: Moments, output_size: Size) -> Moments:
    """Averages over windows that tile the length. Exact under independence."""
    size = output_size if isinstance(output_size, int) else output_size[0]
    return _adaptive(lambda t: F.adaptive_avg_pool1d(t, size), input, (size,))


@rule(F.adaptive_avg_pool2d, knows_shared=True)
def adaptive_avg_pool2d(input: Moments, output_size: Any) -> Moments:
    """Averages over windows that tile height and width. Exact under independence."""
    wanted = (output_size, output_size) if isinstance(output_size, int) or output_size is None else output_size
    height, width = (w or n for w, n in zip(wanted, input.mean.shape[-2:], strict=True))
    return _adaptive(lambda t: F.adaptive_avg_pool2d(t, (height, width)), input, (height, width))


@rule(F.adaptive_avg_pool3d, knows_shared=True)
def adaptive_avg_pool3d(input: Moments, output_size: Any) -> Moments:
    """Averages over windows that tile a volume. Exact under independence."""
    wanted = (output_size,) * 3 if isinstance(output_size, int) or output_size is None else output_size
    sizes = tuple(w or n for w, n in zip(wanted, input.mean.shape[-3:], strict=True))
    return _adaptive(lambda t: F.adaptive_avg_pool3d(t, list(sizes)), input, sizes)  # type: ignore[arg-type]


def _adaptive(pool: Callable[[Tensor], Tensor], x: Moments, sizes: tuple[int, ...]) -> Moments:
    counts = torch.ones((), dtype=x.mean.dtype, device=x.mean.device)
    for n, size in zip(x.mean.shape[-len(sizes) :], sizes, strict=True):
        widths = [-(-(i + 1) * n // size) - i * n // size for i in range(size)]
        counts = counts.unsqueeze(-1) * torch.tensor(widths, dtype=x.mean.dtype, device=x.mean.device)
    return average(pool, lambda t: pool(t) / counts, x)


@rule(F.avg_pool1d, torch.avg_pool1d, knows_shared=True)
def avg_pool1d(
    input: Moments, kernel_size: Size, stride: Any = None, padding: Size = 0, ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Moments:  # fmt: skip
    """Averages over windows along the length. Exact under independence."""
    k, s, p = (value if isinstance(value, int) else value[0] for value in (kernel_size, stride or kernel_size, padding))
    image = move(torch.unsqueeze, input, -2)
    return move(torch.squeeze, avg_pool2d(image, (1, k), (1, s), (0, p), ceil_mode, count_include_pad), -2)


@rule(F.avg_pool2d, knows_shared=True)
def avg_pool2d(
    input: Moments, kernel_size: Size, stride: Any = None, padding: Size = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Moments:  # fmt: skip
    """Averages over windows: v = (sum w sqrt(shared))^2 + sum w^2 (v - shared). Exact under independence.

    Raises:
        UnsupportedOp: `ceil_mode` together with counted padding, where windows differ in size.
    """

    def pool(t: Tensor, divisor: int | None = divisor_override) -> Tensor:
        return F.avg_pool2d(t, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor)

    padded = any(_pair(padding))
    if divisor_override is not None:
        weight: Any = 1 / divisor_override
    elif not (padded and count_include_pad):
        weight = 1 / pool(torch.ones_like(input.mean), 1)
    elif ceil_mode:
        msg = "no Gaussian rule for avg_pool with ceil_mode=True and counted padding"
        raise UnsupportedOp(msg)
    else:
        weight = 1 / math.prod(_pair(kernel_size))
    return average(pool, lambda t: pool(t) * weight, input)


@rule(F.avg_pool3d, knows_shared=True)
def avg_pool3d(
    input: Moments, kernel_size: Size, stride: Any = None, padding: Size = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Moments:  # fmt: skip
    """Averages over windows of a volume. Exact under independence.

    Raises:
        UnsupportedOp: padding or `ceil_mode`, where windows differ in size.
    """
    if padding not in (0, (0, 0, 0)) or ceil_mode:
        msg = "the Gaussian rule of avg_pool3d supports neither padding nor ceil_mode"
        raise UnsupportedOp(msg)
    size = kernel_size**3 if isinstance(kernel_size, int) else math.prod(kernel_size)
    weight = 1 / (divisor_override or size)

    def pool(t: Tensor) -> Tensor:
        return F.avg_pool3d(t, kernel_size, stride, divisor_override=divisor_override)

    return average(pool, lambda t: pool(t) * weight, input)


WIDE_ACCURACY = {"moments": Accuracy(0.08, 0.3), "linear": Accuracy(1.2, 1.6)}
MAX_ACCURACY = {"moments": Accuracy(0.06, 0.15), "linear": Accuracy(1.0, 1.1)}


@rule(F.max_pool1d, torch.max_pool1d, accuracy=MAX_ACCURACY, depends_on="activation", knows_shared=True)
def max_pool1d(
    input: Moments, kernel_size: Size, stride: Any = None, padding: Size = 0, dilation: Size = 1,
    ceil_mode: bool = False, return_indices: bool = False, *, approximation: Approximation,
) -> Moments:  # fmt: skip
    """Maxima along the length; bounds as for `max_pool2d`: 0.06 and 0.15 matched, 1.0 and 1.1 linear."""
    k, s, p, d = (
        value if isinstance(value, int) else value[0]
        for value in (kernel_size, stride or kernel_size, padding, dilation)
    )
    image = move(torch.unsqueeze, input, -2)
    pooled = max_pool2d(image, (1, k), (1, s), (0, p), (1, d), ceil_mode, return_indices, approximation=approximation)
    return move(torch.squeeze, pooled, -2)


@rule(F.max_pool2d, torch.max_pool2d, accuracy=MAX_ACCURACY, depends_on="activation", knows_shared=True)
def max_pool2d(
    input: Moments, kernel_size: Size, stride: Any = None, padding: Size = 0, dilation: Size = 1,
    ceil_mode: bool = False, return_indices: bool = False, *, approximation: Approximation,
) -> Moments:  # fmt: skip
    """Maxima over windows: Clark's pairwise moments, or the entry with the largest mean (linear).

    Bounds (mean in output sd, variance relative) for windows up to 3 x 3: 0.06 and 0.15 matched,
    1.0 and 1.1 linear. Source: Clark 1961; single_pass notes 3.1.

    Raises:
        UnsupportedOp: indices of the maxima, which are random.
    """
    if return_indices:
        msg = "no Gaussian rule for max_pool with return_indices=True: the indices of the maxima are random"
        raise UnsupportedOp(msg)
    if approximation.activation == "linear" or input.var is None:
        maxima, where = F.max_pool2d(input.mean, kernel_size, stride, padding, dilation, ceil_mode, return_indices=True)
        var, shared = (apply(lambda t: _pick(t.expand_as(input.mean), where), f) for f in (input.var, input.shared))
        return Moments(maxima, var, shared)
    kernel, strides = _pair(kernel_size), _pair(stride or kernel_size)
    shape = F.max_pool2d(input.mean, kernel_size, stride, padding, dilation, ceil_mode).shape[-2:]
    return in_float32(lambda x: _windowed_maximum(x, kernel, strides, padding, dilation, shape), input)


def _pick(field: Tensor, where: Tensor) -> Tensor:
    return field.flatten(-2).gather(-1, where.flatten(-2)).reshape(where.shape)


def _windowed_maximum(
    x: Moments, kernel: Any, stride: Any, padding: Size, dilation: Size, shape: Sequence[int]
) -> Moments:
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = kernel, stride, _pair(padding), _pair(dilation)
    height, width = ((n - 1) * step + 1 for n, step in zip(shape, (sh, sw), strict=True))
    bottom = max(0, height + dh * (kh - 1) - x.mean.shape[-2] - ph)  # more than the top with ceil_mode
    right = max(0, width + dw * (kw - 1) - x.mean.shape[-1] - pw)

    def windows(t: Tensor) -> list[Tensor]:
        t = F.pad(t, (pw, right, ph, bottom))
        starts = [(i * dh, j * dw) for i in range(kh) for j in range(kw)]
        return [t[..., y : y + height : sh, x : x + width : sw] for y, x in starts]

    assert x.var is not None
    means, variances = windows(x.mean), windows(x.var)
    common = [None] * len(means) if x.shared is None else windows(root(x.shared.expand_as(x.mean)))
    inside = (
        [w > 0 for w in windows(torch.ones_like(x.mean[..., :1, :, :]))]
        if ph or pw or bottom or right
        else [None] * len(means)
    )
    return largest(list(zip(means, variances, common, inside, strict=True)))


@rule(torch.amax, Tensor.amax, accuracy=MAX_ACCURACY, depends_on="activation", knows_shared=True)
def amax(
    input: Moments, dim: Any = (), keepdim: bool = False, *, out: None = None, approximation: Approximation
) -> Moments:  # fmt: skip
    """Maxima along axes by Clark's pairwise moments; bounds as for `max_pool2d`: 0.06, 0.15; 1.0, 1.1 linear."""
    refuse_out(out)
    if input.mean.dim() == 0:
        return input
    axes = (dim,) if isinstance(dim, int) else tuple(dim) or tuple(range(input.mean.dim()))
    axes = tuple(axis % input.mean.dim() for axis in axes)
    kept = [axis for axis in range(input.mean.dim()) if axis not in axes]
    flat = move(lambda t: t.permute(*kept, *axes).flatten(len(kept)), input)
    if approximation.activation == "linear" or flat.var is None:
        where = flat.mean.argmax(-1, keepdim=True)
        found = move(lambda t: t.gather(-1, where).squeeze(-1), flat)
    else:
        means, variances = flat.mean.unbind(-1), flat.var.unbind(-1)
        common = [None] * len(means) if flat.shared is None else list(root(flat.shared).unbind(-1))
        found = largest([(m, v, g, None) for m, v, g in zip(means, variances, common, strict=True)])
    shape = torch.amax(input.mean, axes, keepdim=keepdim).shape
    return move(Tensor.reshape, found, shape)


@rule(F.max_pool3d, torch.max_pool3d, accuracy=WIDE_ACCURACY, depends_on="activation", knows_shared=True)
def max_pool3d(
    input: Moments, kernel_size: Size, stride: Any = None, padding: Size = 0, dilation: Size = 1,
    ceil_mode: bool = False, return_indices: bool = False, *, approximation: Approximation,
) -> Moments:  # fmt: skip
    """Maxima over windows of a volume; bounds for windows up to 2 x 2 x 2: 0.08 and 0.3 matched, 1.2 and 1.6 linear.

    Raises:
        UnsupportedOp: padding, dilation, `ceil_mode` or indices.
    """
    if any(option not in (0, (0, 0, 0)) for option in (padding, ceil_mode, return_indices)) or dilation not in (
        1,
        (1, 1, 1),
    ):
        msg = "the Gaussian rule of max_pool3d supports neither padding, dilation, ceil_mode nor return_indices"
        raise UnsupportedOp(msg)
    sizes, steps = ((s,) * 3 if isinstance(s, int) else tuple(s) for s in (kernel_size, stride or kernel_size))

    def windows(t: Tensor) -> Tensor:
        first = t.dim() - 3  # every unfolding adds its axis at the end
        for axis, (size, step) in enumerate(zip(sizes, steps, strict=True)):
            t = t.unfold(first + axis, size, step)
        return t.flatten(-3)

    return amax(move(windows, input), -1, approximation=approximation)


def _adaptive_max(x: Moments, sizes: list[int], approximation: Approximation) -> Moments:
    """Maxima over windows that tile the last axes, window by window."""
    axis = -len(sizes)
    n, parts = x.mean.shape[axis], []
    for i in range(sizes[0]):
        start, stop = i * n // sizes[0], -(-(i + 1) * n // sizes[0])
        part = move(Tensor.narrow, x, axis, start, stop - start)
        if len(sizes) > 1:
            part = _adaptive_max(move(Tensor.movedim, part, axis, 0), sizes[1:], approximation)
            part = move(Tensor.movedim, part, 0, axis)
        parts.append(part)
    return stack([amax(part, axis, approximation=approximation) for part in parts], axis)


def _adaptive_max_pool(operation: Callable[..., Any], dims: int) -> Callable[..., Moments]:
    def adaptive_max_pool(
        input: Moments, output_size: Size, return_indices: bool = False, *, approximation: Approximation
    ) -> Moments:  # fmt: skip
        """Maxima over windows that tile the axes; bounds for windows of up to 9: 0.08 and 0.3, 1.2 and 1.6 linear.

        Raises:
            UnsupportedOp: indices of the maxima, which are random.
        """
        if return_indices:
            msg = f"no Gaussian rule for {operation.__name__} with return_indices=True: the indices are random"
            raise UnsupportedOp(msg)
        wanted = (output_size,) * dims if isinstance(output_size, int) or output_size is None else tuple(output_size)
        sizes = [w or n for w, n in zip(wanted, input.mean.shape[-dims:], strict=True)]
        return _adaptive_max(input, sizes, approximation)

    adaptive_max_pool.__name__ = operation.__name__
    return adaptive_max_pool


for _operation, _dims in ((F.adaptive_max_pool1d, 1), (F.adaptive_max_pool2d, 2), (F.adaptive_max_pool3d, 3)):
    rule(_operation, accuracy=WIDE_ACCURACY, depends_on="activation", knows_shared=True)(
        _adaptive_max_pool(_operation, _dims)
    )


@rule(torch.max, Tensor.max, accuracy=MAX_ACCURACY, depends_on="activation", knows_shared=True)
def maximum_along(
    input: Moments, dim: int | None = None, keepdim: bool = False, *, out: None = None, approximation: Approximation
) -> Any:  # fmt: skip
    """As `amax`, bounds 0.06, 0.15; 1.0, 1.1 linear; with an axis, also the place of the largest mean."""
    refuse_out(out)
    if dim is None:
        return amax(input, approximation=approximation)
    if not isinstance(dim, int):
        return maximum(input, dim, approximation=approximation)
    values = amax(input, dim, keepdim, approximation=approximation)
    return torch.return_types.max((values, input.mean.argmax(dim, keepdim=keepdim)))  # type: ignore[arg-type]


@rule(torch.topk, Tensor.topk, knows_shared=True)
def topk(
    input: Moments, k: int, dim: int = -1, largest: bool = True, sorted: bool = True, *, out: None = None
) -> Any:  # fmt: skip
    """The k entries with the largest means and their places; as for routers to experts, the mean chooses."""
    refuse_out(out)
    _, places = torch.topk(input.mean, k, dim, largest, sorted)
    return torch.return_types.topk((move(lambda t: t.gather(dim, places), input), places))  # type: ignore[arg-type]


Entry = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # mean, variance, shared sd, whether it takes part


def largest(entries: list[Entry]) -> Moments:
    """Moments of the largest of several Gaussians, pair by pair."""
    found = entries
    while len(found) > 1:
        pairs = [found[i : i + 2] for i in range(0, len(found), 2)]
        found = [_maximum(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
    mean, var, common, _ = found[0]
    return Moments(mean, var, None if common is None else torch.minimum(common.square(), var))


def _maximum(a: Entry, b: Entry) -> Entry:
    """Clark's moments of max(a, b), whose covariance is that of their shared parts.

    The larger one's shared part is met with the probability that it is the larger. An entry in
    the padding yields to the other.
    """
    (m1, v1, g1, valid1), (m2, v2, g2, valid2) = a, b
    gap = m1 - m2
    spread = root(v1 + v2 if g1 is None or g2 is None else v1 + v2 - 2 * g1 * g2)
    alpha = standardised(gap, spread)
    p, tail = normal_cdf(alpha), spread * normal_pdf(alpha)
    q = 1 - p
    m = torch.addcmul(m2, gap, p) + tail
    v = (v1 * p + v2 * q + gap * (gap * p * q + tail * (q - p)) - tail * tail).clamp(min=0)
    g = None if g1 is None or g2 is None else g1 * p + g2 * q
    if valid1 is None or valid2 is None:
        return m, v, g, None

    def chosen(both: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return torch.where(valid1 & valid2, both, torch.where(valid1, first, second))

    shared = None if g is None or g1 is None or g2 is None else chosen(g, g1, g2)
    return chosen(m, m1, m2), chosen(v, v1, v2), shared, valid1 | valid2
