"""Operations that only move, repeat, pick or cast entries.

Assumption: none. Mean and variance go through the same call, so these rules are exact. Entries
that an expand or a repeat copies are afterwards treated as independent, see
docs/assumptions.md#copies.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bayespass.errors import UnsupportedOp
from bayespass.moments import Moments, as_moments, move
from bayespass.rules.registry import refuse_out, rule


def _getter(name: str) -> Callable[..., Any]:
    """How reading an attribute of a tensor arrives."""
    return getattr(Tensor, name).__get__


# fmt: off
MOVES: tuple[tuple[Callable[..., Any], ...], ...] = (
    (Tensor.reshape, torch.reshape), (Tensor.view,), (Tensor.view_as,), (Tensor.reshape_as,),
    (Tensor.flatten, torch.flatten), (Tensor.unflatten, torch.unflatten), (Tensor.ravel, torch.ravel),
    (Tensor.transpose, torch.transpose), (Tensor.swapaxes, torch.swapaxes), (Tensor.swapdims, torch.swapdims),
    (Tensor.permute, torch.permute), (Tensor.movedim, torch.movedim), (Tensor.moveaxis, torch.moveaxis),
    (Tensor.t, torch.t), (_getter("T"),), (_getter("mT"),), (_getter("H"),), (_getter("mH"),),
    (Tensor.unsqueeze, torch.unsqueeze), (Tensor.squeeze, torch.squeeze), (Tensor.expand,), (Tensor.expand_as,),
    (Tensor.broadcast_to, torch.broadcast_to), (Tensor.repeat,), (Tensor.repeat_interleave, torch.repeat_interleave),
    (Tensor.tile, torch.tile), (Tensor.flip, torch.flip), (Tensor.roll, torch.roll), (Tensor.rot90, torch.rot90),
    (Tensor.narrow, torch.narrow), (Tensor.select, torch.select), (Tensor.index_select, torch.index_select),
    (Tensor.gather, torch.gather), (Tensor.unfold,), (Tensor.diagonal, torch.diagonal), (Tensor.unbind, torch.unbind),
    (Tensor.split, torch.split), (Tensor.chunk, torch.chunk), (Tensor.tensor_split, torch.tensor_split),
    (Tensor.contiguous,), (Tensor.clone, torch.clone), (Tensor.detach, torch.detach),
    (Tensor.to,), (Tensor.type,), (Tensor.type_as,), (Tensor.float,), (Tensor.double,), (Tensor.half,),
    (Tensor.bfloat16,), (Tensor.cpu,), (Tensor.cuda,), (F.unfold,), (F.pixel_shuffle, torch.pixel_shuffle),
    (F.pixel_unshuffle, torch.pixel_unshuffle), (F.channel_shuffle, torch.channel_shuffle),
)
# fmt: on


# Moves whose result never shares memory with the input; all others may be views.
COPIES = {
    Tensor.repeat, Tensor.repeat_interleave, Tensor.tile, Tensor.flip, Tensor.roll, Tensor.rot90, Tensor.index_select,
    Tensor.gather, Tensor.clone, F.unfold, F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle,
}  # fmt: skip


def _register_move(operations: tuple[Callable[..., Any], ...]) -> None:
    function = operations[0]

    def moved(input: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(input, Moments):  # x.type_as(gaussian), x.view_as(gaussian): only a pattern is read
            args = tuple(value.mean if isinstance(value, Moments) else value for value in args)
            kwargs = {key: value.mean if isinstance(value, Moments) else value for key, value in kwargs.items()}
            return function(input, *args, **kwargs)
        args = tuple(value.mean if isinstance(value, Moments) else value for value in args)
        return move(function, input, *args, **kwargs)

    rule(*operations, knows_shared=True, aliases=function not in COPIES)(moved)


for _operations in MOVES:
    _register_move(_operations)


def _joined(operation: Callable[..., Tensor], tensors: Sequence[Any], dim: int) -> Moments:
    parts = [as_moments(part) for part in tensors]
    mean = operation([part.mean for part in parts], dim)

    def field(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        if all(value is None for value in values):
            return None
        filled = [
            torch.zeros_like(part.mean) if value is None else value.expand_as(part.mean)
            for part, value in zip(parts, values, strict=True)
        ]
        return operation(filled, dim)

    return Moments(mean, field("var"), field("shared"))


@rule(torch.cat, torch.concat, torch.concatenate, knows_shared=True)
def cat(tensors: Sequence[Any], dim: int = 0, *, out: None = None, axis: int | None = None) -> Moments:
    """Joined along an axis: exact; parts without variance get zero variance."""
    refuse_out(out)
    return _joined(torch.cat, tensors, dim if axis is None else axis)


@rule(Tensor.__getitem__, knows_shared=True, aliases=True)
def getitem(input: Any, index: Any) -> Any:
    """x[index]: exact.

    Raises:
        UnsupportedOp: the index itself is Gaussian.
    """
    if not isinstance(input, Moments):
        msg = "a Gaussian tensor cannot be an index; take its values from a tensor that no random weight has touched"
        raise UnsupportedOp(msg)
    return move(lambda field: field[index], input)


@rule(torch.stack, knows_shared=True)
def stack(tensors: Sequence[Any], dim: int = 0, *, out: None = None) -> Moments:
    """Stacked along a new axis: exact; parts without variance get zero variance."""
    refuse_out(out)
    return _joined(torch.stack, tensors, dim)


@rule(
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    knows_shared=True,
    aliases=True,
)
def dropout(input: Moments, p: float = 0.5, training: bool = False) -> Moments:
    """Dropout in eval mode is the identity: exact.

    Raises:
        UnsupportedOp: training mode, whose masks are a source of noise of their own.
    """
    if training:
        msg = "no Gaussian rule for dropout in training mode; call model.eval() before predicting"
        raise UnsupportedOp(msg)
    return input
