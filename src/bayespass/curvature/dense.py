"""The whole generalised Gauss-Newton matrix of a few parameters, a last layer for instance."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bayespass.curvature.blocks import DensePiece, EmbeddingPiece, Piece, dense
from bayespass.curvature.diagonal import CurvaturePass
from bayespass.curvature.last_layer import Features
from bayespass.curvature.layers import DEFAULT_MEMORY
from bayespass.curvature.output import output_root
from bayespass.errors import InvalidInput
from bayespass.likelihood import Likelihood, SigmaNoise

BYTES_PER_ENTRY = 40  # the float64 matrix, its eigenvectors, LAPACK's workspace of two more, and the float32 result


def largest_matrix(max_memory: int) -> int:
    """How many parameters a full matrix and its eigenvectors may have.

    Args:
        max_memory: bytes.
    """
    return int((max_memory / BYTES_PER_ENTRY) ** 0.5)


def dense_ggn(
    model: nn.Module,
    loader: Iterable[Any],
    names: tuple[str, ...],
    likelihood: Likelihood,
    sigma_noise: SigmaNoise | None = None,
    max_memory: int = DEFAULT_MEMORY,
    progress: bool = False,
) -> tuple[Tensor, float, int]:
    """sum_n J_n^T H_n J_n, with J_n the Jacobian of the outputs and H_n the curvature in them.

    Of a last layer, whose outputs are the model's, it is sum_n H_n kron phi_n phi_n^T.

    Args:
        model: in eval mode; rows of a batch must not interact.
        loader: yields (inputs, targets).
        names: parameters, at most `largest_matrix(max_memory)` entries in all.
        likelihood: "classification" or "regression".
        sigma_noise: sd of the observation noise, or "predicted", for regression.
        max_memory: bytes for the matrix with its decomposition, and for one chunk of rows, roughly.
        progress: show a progress bar.

    Returns:
        (P, P) in the order of `names` (float32 or better, without prior), the summed negative
        log-likelihood in nats, and the number of rows N.

    Raises:
        InvalidInput: too many parameters, an empty loader, or targets that do not fit.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    size, limit = sum(parameters[name].numel() for name in names), largest_matrix(max_memory)
    if size > limit:
        msg = (
            f"a full matrix of {size} parameters ({', '.join(names[:2])}, ...) and its eigenvectors take about "
            f"{BYTES_PER_ENTRY * size**2 / 2**20:,.0f} MiB, more than max_memory ({max_memory / 2**20:,.0f} MiB, "
            f"{limit} parameters). Choose fewer with names= (the last layer), use hessian_structure='kron' or "
            f"'diag', or raise max_memory"
        )
        raise InvalidInput(msg)
    one = CurvaturePass(model, names, likelihood, sigma_noise, "ggn", max_memory)
    total: Tensor | None = None
    for pieces, _ in one.pieces(loader, progress, last_layer=True):
        for part in _matrices(pieces, names, size, likelihood, sigma_noise, max_memory):
            total = part if total is None else total.add_(part)
    assert total is not None  # an empty loader raised
    return total, one.loss, one.n_data


def _matrices(
    pieces: list[Piece | Features],
    names: tuple[str, ...],
    size: int,
    likelihood: Likelihood,
    sigma_noise: SigmaNoise | None,
    max_memory: int,
) -> Iterator[Tensor]:
    """The matrices (P, P) of parts of a chunk, that add up to its own."""
    first = pieces[0]
    if isinstance(first, Features):
        step = max(1, max_memory // (8 * first.inputs.element_size() * (first.inputs.shape[1] + 1) ** 2))
        for start in range(0, len(first.inputs), step):
            rows = slice(start, start + step)
            part = Features(first.weight, first.bias, first.inputs[rows], first.outputs[rows])
            yield _last_layer(part, names, likelihood, sigma_noise)
        return
    kept = [piece for piece in pieces if not isinstance(piece, Features)]
    n, scalars, dtype = _extent(kept[0])
    step = max(1, max_memory // (8 * dtype.itemsize * size))  # rows of J
    together, width = max(1, step // scalars), min(step, scalars)
    for start in range(0, n, together):
        for first_scalar in range(0, scalars, width):
            place = slice(start, start + together), slice(first_scalar, first_scalar + width)
            blocks: dict[str, Tensor] = {}
            for piece in kept:
                blocks |= dense(_part(piece, *place))
            flat = [blocks[name].reshape(*blocks[name].shape[:2], -1) for name in names]
            jacobian = torch.cat(flat, -1).flatten(0, 1)
            yield jacobian.mT @ jacobian


def _last_layer(
    features: Features, names: tuple[str, ...], likelihood: Likelihood, sigma_noise: SigmaNoise | None
) -> Tensor:
    """sum_n H_n kron (phi_n, 1)(phi_n, 1)^T, its rows and columns in the order of the names."""
    root = output_root(features.outputs, likelihood, sigma_noise)[:, 0]
    inner = root.mT @ root  # (n, C, C)
    with_one = torch.cat([features.inputs, torch.ones_like(features.inputs[:, :1])], 1)
    products = (with_one[:, :, None] * with_one[:, None, :]).flatten(1)
    c, k = inner.shape[1], with_one.shape[1]
    block = (inner.flatten(1).mT @ products).view(c, c, k, k).transpose(1, 2)  # (c, k, c, k)
    places = torch.arange(c * k, device=block.device).view(c, k)
    order = torch.cat([(places[:, :-1] if name == features.weight else places[:, -1]).flatten() for name in names])
    return block.reshape(c * k, c * k)[order][:, order]


def _extent(piece: Piece) -> tuple[int, int, torch.dtype]:
    """Rows, scalars of each, and dtype."""
    if isinstance(piece, DensePiece):
        block = next(iter(piece.blocks.values()))
        return len(block), block.shape[1], block.dtype
    assert piece.grads is not None
    return len(piece.grads), piece.grads.shape[1], piece.grads.dtype


def _part(piece: Piece, rows: slice, scalars: slice) -> Piece:
    """Some rows and scalars of a piece."""
    if isinstance(piece, DensePiece):
        return DensePiece({name: block[rows, scalars] for name, block in piece.blocks.items()})
    assert piece.grads is not None
    if isinstance(piece, EmbeddingPiece):
        return EmbeddingPiece(piece.weight, piece.shape, piece.numbers[rows], piece.grads[rows, scalars])
    return type(piece)(
        piece.weight, piece.bias, piece.shape, piece.inputs[rows], piece.grads[rows, scalars], piece.transposed
    )
