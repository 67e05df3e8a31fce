"""Operations that only move, repeat, pick or cast entries.

Assumption: none. Mean and variance go through the same call, so these rules are exact. Entries
that an expand or a repeat copies are afterwards treated as independent, see
docs/assumptions.md#copies.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bayespass.errors import UnsupportedOp
from bayespass.moments import Factors, Moments, apply, move
from bayespass.rules.registry import rule


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
    (Tensor.take_along_dim, torch.take_along_dim), (Tensor.take, torch.take),
    (Tensor.masked_select, torch.masked_select), (Tensor.tril, torch.tril), (Tensor.triu, torch.triu),
    (Tensor.diag, torch.diag), (Tensor.diag_embed, torch.diag_embed), (Tensor.fliplr, torch.fliplr),
    (Tensor.flipud, torch.flipud), (Tensor.hsplit, torch.hsplit), (Tensor.vsplit, torch.vsplit),
    (Tensor.unsafe_split, torch.unsafe_split), (Tensor.unsafe_chunk, torch.unsafe_chunk),
)
# fmt: on


# Moves whose result never shares memory with the input; all others may be views.
COPIES = {
    Tensor.repeat, Tensor.repeat_interleave, Tensor.tile, Tensor.flip, Tensor.roll, Tensor.rot90, Tensor.index_select,
    Tensor.gather, Tensor.clone, F.unfold, F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle,
    Tensor.take_along_dim, Tensor.take, Tensor.masked_select, Tensor.tril, Tensor.triu, Tensor.diag_embed,
    Tensor.fliplr, Tensor.flipud,
}  # fmt: skip


SPLITS = {Tensor.split, Tensor.chunk}


def split_with_sources(x: Moments, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Parts of a linear map's output that remember their rows of the map (a fused gate and up projection)."""
    parts = move(function, x, *args, **kwargs)
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if x.source is None or x.source.gain is not None or dim not in (-1, x.mean.dim() - 1):
        return parts
    size = args[0] if args else next(kwargs[key] for key in ("split_size", "chunks") if key in kwargs)
    weights = function(x.source.weight, size, dim=0)
    pairs = zip(parts, weights, strict=True)
    return tuple(replace(part, source=x.source._replace(weight=weight)) for part, weight in pairs)


CASTS = {
    Tensor.contiguous, Tensor.clone, Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.double,
    Tensor.half, Tensor.bfloat16,
}  # fmt: skip
RESHAPES = {
    Tensor.reshape, Tensor.view, Tensor.view_as, Tensor.reshape_as, Tensor.flatten, Tensor.unflatten, Tensor.squeeze,
    Tensor.unsqueeze,
}  # fmt: skip


def _moved(x: Moments, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    result = move(function, x, *args, **kwargs)
    if x.factors is None or not isinstance(result, Moments):
        return result
    if function in CASTS:
        return replace(result, factors=x.factors)
    if function in RESHAPES and result.mean.shape[-2:] == x.mean.shape[-2:]:
        return replace(result, factors=_regrouped(x.factors, x.mean.shape[:-2], result.mean.shape[:-2]))
    return result


def _regrouped(factors: Factors, leading: torch.Size, wanted: torch.Size) -> Factors:
    """The factors of scores whose axes before the last two were reshaped."""

    def regroup(t: Tensor) -> Tensor:
        return t.expand(*leading, *t.shape[-2:]).reshape(*wanted, *t.shape[-2:])

    query, key = (move(regroup, x) for x in factors[:2])
    return Factors(query, key, apply(regroup, factors.noise))


def _register_move(operations: tuple[Callable[..., Any], ...]) -> None:
    function = operations[0]

    def moved(input: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(input, Moments):  # x.type_as(gaussian), x.view_as(gaussian): only a pattern is read
            args = tuple(value.mean if isinstance(value, Moments) else value for value in args)
            kwargs = {key: value.mean if isinstance(value, Moments) else value for key, value in kwargs.items()}
            return function(input, *args, **kwargs)
        args = tuple(value.mean if isinstance(value, Moments) else value for value in args)
        return (split_with_sources if function in SPLITS else _moved)(input, function, *args, **kwargs)

    rule(*operations, knows_shared=True, aliases=function not in COPIES)(moved)


for _operations in MOVES:
    _register_move(_operations)


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
    if training and p > 0:
        msg = "no Gaussian rule for dropout in training mode; call model.eval() before predicting"
        raise UnsupportedOp(msg)
    return input
