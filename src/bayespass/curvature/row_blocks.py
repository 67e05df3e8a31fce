"""The data of an operator in blocks, and which scalars of every datum are its rows."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bayespass.batches import labelled_batches
from bayespass.curvature.output import Rows, curvature_rows, loss_rows, output_rows
from bayespass.errors import InvalidInput, require_count
from bayespass.likelihood import Likelihood, SigmaNoise

RowKind = Literal["outputs", "curvature", "loss", "random"]
Block = tuple[Any, Tensor]


def shuffled_blocks(loader: Iterable[Any], size: int, seed: int = 0) -> list[Block]:
    """All data of a loader in blocks of at most `size`, mixed at random, kept where the loader put them.

    Blocks of one class each would slow every solver down. Batches that cannot be joined, as rows of text
    of different lengths, stay as they are, in random order.

    Args:
        loader: yields (inputs, targets).
        size: data per block.
        seed: of the order.

    Raises:
        InvalidInput: the loader yields no batch, or none with a row.
    """
    found = [(inputs, targets) for inputs, targets in labelled_batches(loader) if len(targets)]
    if not found:
        msg = "every batch of the loader is empty; pass at least one row of data"
        raise InvalidInput(msg)
    generator = torch.Generator().manual_seed(seed)
    joined = join_blocks(found)
    if len(joined) > 1:
        return split_blocks([joined[k] for k in torch.randperm(len(joined), generator=generator).tolist()], size)
    ((inputs, targets),) = joined
    order = torch.randperm(len(targets), generator=generator)
    mixed = pytree.tree_map(lambda t: t[order.to(t.device)] if isinstance(t, Tensor) else t, inputs)
    return split_blocks([(mixed, targets[order.to(targets.device)])], size)


def join_blocks(blocks: Sequence[Block]) -> list[Block]:
    """The blocks as one, if their rows have the same form; otherwise as they are."""
    forms = set()
    for inputs, targets in blocks:
        leaves, structure = pytree.tree_flatten((inputs, targets))
        forms.add(str([(t.shape[1:], t.dtype) if isinstance(t, Tensor) else t for t in leaves]) + str(structure))
    if len(forms) > 1:
        return list(blocks)
    joined = pytree.tree_map(lambda *t: torch.cat(t) if isinstance(t[0], Tensor) else t[0], *blocks)
    return [(joined[0], joined[1])]


def split_blocks(blocks: Sequence[Block], size: int) -> list[Block]:
    """Every block in parts of nearly equal size, at most `size` data."""
    parts = []
    for inputs, targets in blocks:
        count = -(-len(targets) // max(1, size))
        for rows in torch.arange(len(targets)).tensor_split(count):
            place = slice(int(rows[0]), int(rows[-1]) + 1)
            cut = pytree.tree_map(lambda t, place=place: t[place] if isinstance(t, Tensor) else t, inputs)
            parts.append((cut, targets[place]))
    return parts


def row_function(
    rows: RowKind | Rows,
    likelihood: Likelihood,
    sigma_noise: SigmaNoise | None,
    n_projections: int | None,
    seed: int,
) -> Rows:
    """The function of (outputs, targets) that is differentiated.

    Raises:
        InvalidInput: an unknown kind of rows, or projections without a number.
    """
    if (rows == "random") != (n_projections is not None):
        msg = f"n_projections, the rows per datum, belongs to rows='random'; got {n_projections!r} with {rows!r}"
        raise InvalidInput(msg)
    if callable(rows):
        return rows
    if rows not in get_args(RowKind):
        msg = f"rows must be 'outputs', 'curvature', 'loss', 'random' or a function; got {rows!r}"
        raise InvalidInput(msg)
    if rows == "curvature":
        return curvature_rows(likelihood, sigma_noise)
    if rows == "loss":
        return loss_rows(likelihood, sigma_noise)
    if rows == "outputs":
        return output_rows
    assert n_projections is not None
    require_count(n_projections=n_projections)
    return _projected_rows(n_projections, seed)


def _projected_rows(n_projections: int, seed: int) -> Rows:
    """Sums of a datum's outputs with random signs / sqrt(r), so that J^T J is that of all outputs on average."""

    def rows(outputs: Tensor, ids: Tensor | None) -> Tensor:
        assert ids is not None
        flat = outputs.reshape(len(outputs), -1)
        if flat.shape[1] <= n_projections:
            msg = (
                f"n_projections must be less than the {flat.shape[1]} outputs; got {n_projections}. Use rows='outputs'"
            )
            raise InvalidInput(msg)
        places = torch.arange(n_projections * flat.shape[1], device=flat.device)
        signs = _signs(ids[:, None] * len(places) + places + seed * 7919).to(flat.dtype)
        return (signs.reshape(len(flat), n_projections, -1) @ flat[..., None])[..., 0] / n_projections**0.5

    return rows


def _signs(counters: Tensor) -> Tensor:
    """+1 or -1 by counter, equal on every device: the mixing function of SplitMix64 (Steele et al. 2014)."""
    value = counters * -0x61C8864680B583EB
    value = (value ^ ((value >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    value = (value ^ ((value >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return 1 - 2 * ((value >> 40) & 1)
