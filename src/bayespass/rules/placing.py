"""Operations that put entries into place: padding, masks, scatters, and joins of several tensors.

Assumption: masks, indices and fill values are known. What is written over loses its variance, what
is added adds it; these rules are exact for independent entries.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bayespass.errors import MissingRule, UnsupportedOp
from bayespass.moments import Moments, as_moments, average, carry, move, scale
from bayespass.rules.registry import in_place, operation_name, refuse_out, rule

Fields = tuple[str, ...]
FIELDS: Fields = ("var", "shared")


def fieldwise(operation: Callable[..., Tensor], *operands: Any, fields: Fields = FIELDS) -> Moments:
    """The operation on means, then on every field that any operand has, absent ones being zero.

    Args:
        operation: takes as many tensors as there are operands.
        *operands: moments, tensors or numbers.
        fields: which fields to follow besides the mean.
    """
    xs = [x if isinstance(x, Moments) else Moments(x) for x in operands]
    found = {}
    for name in fields:
        values = [getattr(x, name) for x in xs]
        if any(value is not None for value in values):
            found[name] = operation(*(_filled(x, value) for x, value in zip(xs, values, strict=True)))
    return Moments(operation(*(x.mean for x in xs)), **found)


def _filled(x: Moments, field: Tensor | None) -> Any:
    if field is not None:
        return field.expand_as(x.mean)
    return torch.zeros_like(x.mean) if isinstance(x.mean, Tensor) else 0.0


@rule(torch.cat, torch.concat, torch.concatenate, knows_shared=True)
def cat(tensors: Sequence[Any], dim: int = 0, *, out: None = None, axis: int | None = None) -> Moments:
    """Joined along an axis: exact; parts without variance get zero variance."""
    refuse_out(out)
    where = dim if axis is None else axis
    return fieldwise(lambda *parts: torch.cat(parts, where), *tensors)


@rule(torch.stack, knows_shared=True)
def stack(tensors: Sequence[Any], dim: int = 0, *, out: None = None) -> Moments:
    """Stacked along a new axis: exact; parts without variance get zero variance."""
    refuse_out(out)
    return fieldwise(lambda *parts: torch.stack(parts, dim), *tensors)


def _join(operation: Callable[..., Tensor]) -> Callable[..., Moments]:
    def joined(tensors: Sequence[Any], *, out: None = None) -> Moments:
        """Joined as the operation's name says: exact; parts without variance get zero variance."""
        refuse_out(out)
        return fieldwise(lambda *parts: operation(parts), *tensors)

    joined.__name__ = operation.__name__
    return joined


for _operation in (torch.hstack, torch.vstack, torch.dstack, torch.column_stack):
    rule(_operation, knows_shared=True)(_join(_operation))


@rule(torch.where, Tensor.where, knows_shared=True)
def where(condition: Any, input: Any, other: Any, *, out: None = None) -> Moments:
    """Entries of x where the condition holds, of y elsewhere: exact for a known condition.

    Raises:
        UnsupportedOp: the condition is random.
    """
    refuse_out(out)
    condition_given = isinstance(condition, Tensor) and condition.dtype == torch.bool
    if isinstance(input, Tensor) and input.dtype == torch.bool and not condition_given:
        condition, input = input, condition  # x.where(condition, y)
    if isinstance(condition, Moments):
        msg = "no Gaussian rule for torch.where with a random condition"
        raise UnsupportedOp(msg)
    result = fieldwise(lambda x, y: torch.where(condition, x, y), input, other)
    scores = [x for x in (input, other) if isinstance(x, Moments)]
    kept = len(scores) == 1 and result.mean.shape == scores[0].mean.shape  # scores of attention, masked
    return replace(result, factors=scores[0].factors) if kept else result


@rule(torch.masked_fill, Tensor.masked_fill, knows_shared=True)
def masked_fill(input: Any, mask: Tensor, value: Any) -> Moments:
    """x with known entries written over: their variance is the value's. Exact."""
    x = as_moments(input)
    if isinstance(value, Moments):
        return where(mask, value, x)
    filled = carry(x.mean.masked_fill(mask, value), lambda t: t.expand_as(x.mean).masked_fill(mask, 0), x)
    return replace(filled, scores=x.scores, factors=x.factors if filled.mean.shape == x.mean.shape else None)


@rule(F.pad, knows_shared=True)
def pad(input: Moments, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Moments:
    """x with borders: constants without variance, or copies of its own entries. Exact."""
    if mode != "constant":
        return move(lambda t: F.pad(t, tuple(pad), mode), input)
    return _padded(input, pad, value)


@rule(torch.constant_pad_nd, knows_shared=True)
def constant_pad_nd(input: Moments, pad: Sequence[int], value: float = 0) -> Moments:
    """x with constant borders, which have no variance. Exact."""
    return _padded(input, pad, value)


def _padded(x: Moments, pad: Sequence[int], value: float | None) -> Moments:
    return carry(F.pad(x.mean, tuple(pad), value=value), lambda t: F.pad(t.expand_as(x.mean), tuple(pad)), x)


def _with_source(operation: Callable[..., Tensor]) -> Callable[..., Moments]:
    def placed(input: Any, dim: int, index: Tensor, source: Any = None, **kwargs: Any) -> Moments:
        """Entries of a source put, or added, at known places: exact for independent entries.

        Raises:
            UnsupportedOp: a random index, or a scale or reduction that the rule does not honour.
        """
        alpha = kwargs.pop("alpha", 1)
        source = source if source is not None else kwargs.pop("src", kwargs.pop("value", None))
        if isinstance(index, Moments) or kwargs:
            msg = f"the Gaussian rule of {operation_name(operation)} takes known indices and no reduction"
            raise UnsupportedOp(msg)
        if not isinstance(source, Moments | Tensor):
            source = torch.full_like(as_moments(input).mean, source).gather(dim, index)
        source = source if alpha == 1 else scale(as_moments(source), alpha)
        return fieldwise(lambda x, s: operation(x, dim, index, s), input, source)

    placed.__name__ = operation.__name__
    return placed


for _operations in (
    (torch.index_copy, Tensor.index_copy), (torch.scatter, Tensor.scatter), (torch.index_add, Tensor.index_add),
    (torch.scatter_add, Tensor.scatter_add),
):  # fmt: skip
    rule(*_operations, knows_shared=True)(_with_source(_operations[0]))


@rule(torch.select_scatter, Tensor.select_scatter, knows_shared=True)
def select_scatter(input: Any, src: Any, dim: int, index: int) -> Moments:
    """x with one slice replaced: exact."""
    return fieldwise(lambda x, s: torch.select_scatter(x, s, dim, index), input, src)


@rule(torch.slice_scatter, Tensor.slice_scatter, knows_shared=True)
def slice_scatter(
    input: Any, src: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Moments:  # fmt: skip
    """x with a range replaced: exact."""
    return fieldwise(lambda x, s: torch.slice_scatter(x, s, dim, start, end, step), input, src)


def assign(input: Any, index: Any, value: Any) -> Tensor:
    """What x is after `x[index] = value`."""
    changed = input.clone()
    changed[index] = value
    return changed


@rule(assign, knows_shared=True)
def assignment(input: Any, index: Any, value: Any) -> Moments:
    """x[index] = value: exact.

    Raises:
        UnsupportedOp: the index is random.
    """
    if any(isinstance(part, Moments) for part in (index if isinstance(index, tuple) else (index,))):
        msg = "a Gaussian tensor cannot be an index; take its values from a tensor that no random weight has touched"
        raise UnsupportedOp(msg)
    return fieldwise(lambda x, v: assign(x, index, v), input, value)


def copied(input: Any, src: Any) -> Tensor:
    """What x is after `x.copy_(src)`."""
    return src.to(input.dtype).expand_as(input).clone()


@rule(copied, knows_shared=True)
def copying(input: Any, src: Any, non_blocking: bool = False) -> Moments:
    """x.copy_(y): y in the kind and shape of x. Exact."""
    like = as_moments(input).mean
    return move(lambda t: copied(like, t), as_moments(src))


@rule(F.fold, knows_shared=True)
def fold(
    input: Moments, output_size: Any, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1
) -> Moments:  # fmt: skip
    """Patches added into an image: variances add, shared standard deviations add. Exact under independence."""

    def folded(t: Tensor) -> Tensor:
        return F.fold(t, output_size, kernel_size, dilation, padding, stride)

    return average(folded, folded, input)


def _predicate(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def predicate(input: Moments) -> Tensor:
        """Whether entries are numbers at all, which the mean tells; the answer carries no variance."""
        return operation(input.mean)

    predicate.__name__ = operation.__name__
    return predicate


PREDICATES = ((torch.isnan, Tensor.isnan), (torch.isinf, Tensor.isinf), (torch.isfinite, Tensor.isfinite))
for _operations in PREDICATES:
    rule(*_operations, knows_shared=True)(_predicate(_operations[0]))


def _compared(operation: Callable[..., Any]) -> Callable[..., Any]:
    def compared(input: Any, *args: Any, **kwargs: Any) -> Any:
        """Truth values of entries whose variance is zero, as those of a mask made with zeros_like.

        Raises:
            MissingRule: an entry is random, and so would be the answer.
        """
        values = [input, *args]
        looked_at = [v.var for v in values if isinstance(v, Moments) and v.var is not None]
        if torch.compiler.is_compiling() or any(bool((var != 0).any()) for var in looked_at):
            msg = f"{operation_name(operation)} asks for the values of a random tensor; its answer would be random"
            raise MissingRule(msg)
        return operation(*(v.mean if isinstance(v, Moments) else v for v in values), **kwargs)

    compared.__name__ = operation.__name__
    return compared


COMPARISONS = (
    (Tensor.bool,), (Tensor.long,), (Tensor.int,), (torch.eq, Tensor.eq, Tensor.__eq__),
    (torch.ne, Tensor.ne, Tensor.__ne__), (torch.gt, Tensor.gt, Tensor.__gt__), (torch.ge, Tensor.ge, Tensor.__ge__),
    (torch.lt, Tensor.lt, Tensor.__lt__), (torch.le, Tensor.le, Tensor.__le__),
)  # fmt: skip
for _operations in COMPARISONS:
    rule(*_operations, knows_shared=True)(_compared(_operations[0]))


def _created(operation: Callable[..., Tensor]) -> Callable[..., Any]:
    def created(input: Any, *args: Any, **kwargs: Any) -> Any:
        """A new tensor that takes only shape, dtype and device from x.

        What is made to be filled (zeros, empty) may receive Gaussian entries and has zero variance.
        """
        made = operation(as_moments(input).mean, *args, **kwargs)
        return Moments(made, torch.zeros_like(made)) if operation in FILLED and made.is_floating_point() else made

    created.__name__ = operation.__name__
    return created


FILLED = {torch.zeros_like, torch.empty_like, Tensor.new_zeros, Tensor.new_empty}
CREATIONS = (
    torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like, torch.rand_like, torch.randn_like,
    Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_empty, Tensor.new_tensor,
)  # fmt: skip
for _operation in CREATIONS:
    rule(_operation, knows_shared=True)(_created(_operation))

in_place(
    {
        Tensor.masked_fill_: torch.masked_fill, Tensor.__setitem__: assign, Tensor.scatter_: torch.scatter,
        Tensor.scatter_add_: torch.scatter_add, Tensor.index_add_: torch.index_add,
        Tensor.index_copy_: torch.index_copy, Tensor.copy_: copied,
    }
)  # fmt: skip
