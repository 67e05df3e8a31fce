"""Tables looked up by index.

Assumption: none; a lookup picks rows. The same token at two positions has the same noise, which
is afterwards treated as independent, see docs/assumptions.md#copies.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bayespass.errors import UnsupportedOp
from bayespass.moments import Moments, average, move
from bayespass.rules.registry import rule


@rule(F.embedding)
def embedding(
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Moments:
    """Rows of the table: mean and variance of each looked-up entry. Exact.

    Raises:
        UnsupportedOp: `max_norm`, which rescales rows by their random norm.
    """
    if max_norm is not None:
        msg = f"the Gaussian rule of torch.nn.functional.embedding does not support max_norm={max_norm}"
        raise UnsupportedOp(msg)
    return _lookup(weight, input)


@rule(torch.embedding)
def embedding_weight_first(
    weight: Any, indices: Any, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Moments:
    """`torch.embedding`, which takes the table first."""
    return _lookup(weight, indices)


@rule(F.embedding_bag, knows_shared=True)
def embedding_bag(
    input: Any, weight: Any, offsets: Any = None, max_norm: float | None = None, norm_type: float = 2,
    scale_grad_by_freq: bool = False, mode: str = "mean", sparse: bool = False, per_sample_weights: Any = None,
    include_last_offset: bool = False, padding_idx: int | None = None,
) -> Moments:  # fmt: skip
    """Sums or averages of looked-up rows, bag by bag. Exact for bags without repeated rows.

    Raises:
        UnsupportedOp: another form than (B, N) indices with mode "sum" or "mean".
    """
    plain = isinstance(input, Tensor) and input.dim() == 2
    if not plain or max_norm is not None or mode == "max" or per_sample_weights is not None or padding_idx is not None:
        msg = "the Gaussian rule of embedding_bag takes (B, N) indices with mode='sum' or 'mean' and no further options"
        raise UnsupportedOp(msg)
    rows = _lookup(weight, input)
    size = input.shape[1] if mode == "mean" else 1
    return average(lambda t: t.sum(1) / size, lambda t: t.sum(1) / size**2, rows)


def _lookup(weight: Any, indices: Any) -> Moments:
    if not isinstance(weight, Moments) or not isinstance(indices, Tensor):
        msg = "the indices of an embedding must be plain integers; got a Gaussian tensor"
        raise UnsupportedOp(msg)
    return move(lambda table: F.embedding(indices, table), weight)
