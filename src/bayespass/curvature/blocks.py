"""The block of the Jacobian that belongs to one layer, and what is computed from blocks.

For rows n of a batch, R scalars r each, positions t and groups g (one but in grouped convolutions) a
linear layer or convolution has J[n, r, (g, c, k)] = sum_t G[n, r, t, g, c] A[n, t, g, k], with A its
(unfolded) inputs and G the gradients in its outputs. Everything is a contraction of the two; the block
itself is written out only where several positions make that cheaper.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

Call = tuple[Tensor, Tensor]  # what a layer was given, and what it returned
NORMS = (nn.LayerNorm, nn.GroupNorm, _BatchNorm)
KNOWN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding, *NORMS)


@dataclass(frozen=True)
class LinearPiece:
    """A linear layer or convolution.

    Args:
        weight: its name, None where only the bias is wanted.
        bias: its name, None where there is none, or it is not wanted.
        shape: of the weight.
        inputs: A (n, T, groups, k).
        grads: G (n, R, T, groups, c); None for the identity, the layer's outputs being the R scalars.
        transposed: the weight is (k, c), as in GPT-2.
    """

    weight: str | None
    bias: str | None
    shape: torch.Size
    inputs: Tensor
    grads: Tensor | None
    transposed: bool = False


@dataclass(frozen=True)
class EmbeddingPiece:
    """A table of vectors that rows look up by number.

    Args:
        weight: its name.
        shape: of the table (V, d).
        numbers: (n, T) looked up.
        grads: (n, R, T, d), of all places of one number together at its first place, zero at the others.
    """

    weight: str
    shape: torch.Size
    numbers: Tensor
    grads: Tensor


@dataclass(frozen=True)
class DensePiece:
    """Blocks written out.

    Args:
        blocks: (n, R, *shape) by parameter name.
    """

    blocks: Mapping[str, Tensor]


Piece = LinearPiece | EmbeddingPiece | DensePiece


def has_block(module: nn.Module) -> bool:
    """Whether `make_piece` knows how the module computes: a class, or one that inherits its forward."""
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return False  # none, or one that is computed from others, as by weight_norm
    if is_transposed(module):
        return True
    if not any(type(module).forward is known.forward for known in KNOWN if isinstance(module, known)):
        return False
    if isinstance(module, nn.Embedding):
        return module.max_norm is None and not module.scale_grad_by_freq
    return not isinstance(module, _BatchNorm) or module.running_mean is not None


def is_transposed(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, y = x W + b."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def make_piece(
    module: nn.Module, names: Mapping[str, str], calls: list[Call], grads: list[Tensor] | None, rows: int
) -> Piece:
    """The block of one layer.

    Args:
        module: for which `has_block` holds.
        names: {"weight": name, "bias": name} of the wanted parameters.
        calls: what it was given and returned, once for every call.
        grads: (R, ...) gradient in what it returned, for every call; None for the identity.
        rows: n, that the leading axes are multiples of.
    """
    weight, bias = names.get("weight"), names.get("bias")
    if isinstance(module, nn.Embedding):
        assert grads is not None
        return _embedding(module, names["weight"], calls, grads, rows)
    if isinstance(module, NORMS):
        assert grads is not None
        return _norm(module, names, calls, grads, rows)
    split = _unfolded if isinstance(module, _ConvNd) else _positions
    inputs = torch.cat([split(module, given, rows) for given, _ in calls], 1)
    together = None if grads is None else torch.cat([_flowing(module, g, rows) for g in grads], 2)
    shape = module.get_parameter("weight").shape
    return LinearPiece(weight, bias, shape, inputs, together, is_transposed(module))


def _positions(module: nn.Module, given: Tensor, rows: int) -> Tensor:  # noqa: ARG001
    return given.reshape(rows, -1, 1, given.shape[-1])


def _unfolded(module: nn.Module, given: Tensor, rows: int) -> Tensor:
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(given, module._reversed_padding_repeated_twice, mode=mode)
    sizes = module.kernel_size, module.dilation, module.stride
    if isinstance(module, nn.Conv1d):
        padded, sizes = padded.unsqueeze(-2), tuple((1, *size) for size in sizes)
    kernel, dilation, stride = sizes
    columns = F.unfold(padded, kernel, dilation=dilation, stride=stride)  # (m, C k, L)
    columns = columns.reshape(len(given), module.groups, -1, columns.shape[-1]).permute(0, 3, 1, 2)
    return columns.reshape(rows, -1, *columns.shape[2:])


def _flowing(module: nn.Module, grads: Tensor, rows: int) -> Tensor:
    """(n, R, T, groups, c) of the gradients (R, m, ...) in the layer's output."""
    groups = 1
    if isinstance(module, _ConvNd):
        grads, groups = grads.flatten(3).movedim(2, -1), module.groups
    grads = grads.reshape(len(grads), rows, -1, groups, grads.shape[-1] // groups)
    return grads.transpose(0, 1)


def _norm(module: nn.Module, names: Mapping[str, str], calls: list[Call], grads: list[Tensor], rows: int) -> DensePiece:
    blocks: dict[str, Tensor] = {}
    for (given, _), grad in zip(calls, grads, strict=True):
        if isinstance(module, nn.LayerNorm):
            plain, shape = F.layer_norm(given, module.normalized_shape, None, None, module.eps), module.normalized_shape
        else:
            if isinstance(module, nn.GroupNorm):
                plain = F.group_norm(given, module.num_groups, None, None, module.eps)
            else:
                assert isinstance(module, _BatchNorm)
                plain = F.batch_norm(given, module.running_mean, module.running_var, None, None, False, 0.0, module.eps)
            plain, grad, shape = plain.movedim(1, -1), grad.movedim(2, -1), (given.shape[1],)
        grad = grad.reshape(len(grad), rows, -1, *shape)
        for key, name in names.items():
            block = (grad * plain.reshape(rows, -1, *shape) if key == "weight" else grad).sum(2).transpose(0, 1)
            blocks[name] = blocks[name] + block if name in blocks else block
    return DensePiece(blocks)


def _embedding(module: nn.Embedding, name: str, calls: list[Call], grads: list[Tensor], rows: int) -> EmbeddingPiece:
    numbers = torch.cat([given.reshape(rows, -1) for given, _ in calls], 1)
    flowing = torch.cat([g.reshape(len(g), rows, -1, g.shape[-1]) for g in grads], 2).transpose(0, 1)
    if module.padding_idx is not None:
        flowing = flowing * (numbers != module.padding_idx)[:, None, :, None]
    same = numbers[:, :, None] == numbers[:, None, :]
    first = ~torch.tril(same, -1).any(-1)
    together = torch.einsum("nts,nrsd->nrtd", same.to(flowing.dtype), flowing) * first[:, None, :, None]
    return EmbeddingPiece(name, module.weight.shape, numbers, together)


def unfolded_size(module: nn.Module, returned: Tensor) -> int:
    """Entries of the unfolded inputs of a convolution that returned this; none for other layers."""
    if not isinstance(module, _ConvNd):
        return 0
    columns = module.in_channels * module.weight[0, 0].numel()
    return columns * returned.numel() // returned.shape[1]


def parameter_names(piece: Piece) -> tuple[str, ...]:
    """Names of the parameters that a piece is about."""
    if isinstance(piece, DensePiece):
        return tuple(piece.blocks)
    if isinstance(piece, EmbeddingPiece):
        return (piece.weight,)
    return tuple(name for name in (piece.weight, piece.bias) if name is not None)


def dense(piece: Piece) -> dict[str, Tensor]:
    """The blocks (n, R, *shape), written out, by parameter name."""
    if isinstance(piece, DensePiece):
        return dict(piece.blocks)
    if isinstance(piece, EmbeddingPiece):
        table = piece.grads.new_zeros(*piece.grads.shape[:2], *piece.shape)
        places = piece.numbers[:, None, :, None].expand(-1, table.shape[1], -1, piece.shape[1])
        return {piece.weight: table.scatter_add_(2, places, piece.grads)}
    found, grads = {}, _grads(piece)
    if piece.weight is not None:
        block = _weight_block(piece.inputs, grads)
        block = block.squeeze(2).mT if piece.transposed else block
        found[piece.weight] = block.reshape(*grads.shape[:2], *piece.shape)
    if piece.bias is not None:
        found[piece.bias] = grads.sum(2).flatten(2)
    return found


def squares(piece: Piece) -> dict[str, Tensor]:
    """sum_{n,r} J^2, the diagonal of J^T J, in the parameters' shapes, by name."""
    if isinstance(piece, EmbeddingPiece):
        total = piece.grads.new_zeros(piece.shape)
        return {piece.weight: total.index_add_(0, piece.numbers.flatten(), piece.grads.square().sum(1).flatten(0, 1))}
    if isinstance(piece, DensePiece) or piece.inputs.shape[1] > 1:
        return {name: block.square().sum((0, 1)) for name, block in dense(piece).items()}
    found, inputs = {}, piece.inputs[:, 0].square()
    grads = _grads(piece)[:, :, 0].square().sum(1)
    if piece.weight is not None:
        block = torch.einsum("ngc,ngk->gck", grads, inputs)
        found[piece.weight] = (block[0].mT if piece.transposed else block).reshape(piece.shape)
    if piece.bias is not None:
        found[piece.bias] = grads.sum(0).flatten()
    return found


def gram(a: Piece, b: Piece) -> Tensor:
    """(n_a R, n_b R): what this layer adds to J_a J_b^T, rows ordered by (datum, scalar).

    Args:
        a: a piece.
        b: the piece of the same layer for other rows, or the same ones.
    """
    if isinstance(a, EmbeddingPiece) and isinstance(b, EmbeddingPiece):
        same = (a.numbers[:, :, None, None] == b.numbers).to(a.grads.dtype)  # (n, T, m, S)
        common = torch.einsum("ntms,mrsd->ntmrd", same, b.grads)
        return torch.einsum("nqtd,ntmrd->nqmr", a.grads, common).flatten(0, 1).flatten(1)
    if isinstance(a, LinearPiece) and isinstance(b, LinearPiece) and a.inputs.shape[1] == b.inputs.shape[1] == 1:
        return _gram_of_vectors(a, b)
    others = dense(b)
    parts = [_as_rows(block) @ _as_rows(others[name]).mT for name, block in dense(a).items()]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def _as_rows(block: Tensor) -> Tensor:
    """(n R, p) of a block (n, R, *shape)."""
    return block.reshape(block.shape[0] * block.shape[1], -1)


def _gram_of_vectors(a: LinearPiece, b: LinearPiece) -> Tensor:
    """One position: <a_n, a_m> <g_nr, g_ms>, by group."""
    grads_a, grads_b = _grads(a)[:, :, 0], _grads(b)[:, :, 0]
    total: Tensor | None = None
    for group in range(a.inputs.shape[2]):
        inner = grads_a[:, :, group].flatten(0, 1) @ grads_b[:, :, group].flatten(0, 1).mT
        factor = torch.zeros(len(a.inputs), len(b.inputs), dtype=inner.dtype, device=inner.device)
        if a.weight is not None:
            factor = a.inputs[:, 0, group] @ b.inputs[:, 0, group].mT
        if a.bias is not None:
            factor = factor + 1
        shape = (len(a.inputs), grads_a.shape[1], len(b.inputs), grads_b.shape[1])
        part = (inner.view(shape) * factor[:, None, :, None]).view(inner.shape)
        total = part if total is None else total + part
    assert total is not None
    return total


Bases = Mapping[str, Tensor]


def covariance(piece: Piece, variance: Mapping[str, Tensor], left: Bases, right: Bases) -> Tensor:
    """(M, n, R, R): what this layer adds to J Sigma J^T, for M covariances with one eigenbasis.

    Args:
        piece: of a layer.
        variance: (M, *shape) by parameter name, in the basis.
        left: Q_L of a parameter's rows by name, the identity for names left out.
        right: Q_R of its columns by name.
    """
    total: Tensor | float = 0.0
    for grads, spread in _in_basis(piece, variance, left, right):
        total = total + torch.stack([(grads * each[:, None]) @ grads.mT for each in spread])
    assert isinstance(total, Tensor)
    return total


def marginals(piece: Piece, variance: Mapping[str, Tensor], left: Bases, right: Bases) -> Tensor:
    """(M, n, R): the diagonal of `covariance`, for less.

    Args:
        piece: of a layer.
        variance: (M, *shape) by parameter name, in the basis.
        left: Q_L of a parameter's rows by name, the identity for names left out.
        right: Q_R of its columns by name.
    """
    total: Tensor | float = 0.0
    for grads, spread in _in_basis(piece, variance, left, right):
        if spread.shape[1] == 1:
            part = (grads.square() @ spread[:, 0].mT).movedim(-1, 0)
        elif len(grads) == 1:
            part = spread @ grads[0].square().mT
        else:
            part = torch.einsum("nrc,mnc->mnr", grads.square(), spread)
        total = total + part
    assert isinstance(total, Tensor)
    return total


def _in_basis(piece: Piece, variance: Mapping[str, Tensor], left: Bases, right: Bases) -> list[tuple[Tensor, Tensor]]:
    """Pairs g (n, R, c) and v (M, n, c), one of the two n may be 1, whose sum_c g_r v g_s make the covariance."""
    if isinstance(piece, EmbeddingPiece) and piece.weight not in left and piece.weight not in right:
        spread = variance[piece.weight][:, piece.numbers].flatten(2)
        return [(piece.grads.flatten(2).to(spread.dtype), spread)]
    found: list[tuple[Tensor, Tensor]] = []
    if not isinstance(piece, LinearPiece) or piece.inputs.shape[1:3] != (1, 1):
        for name, block in dense(piece).items():
            spread = variance[name].reshape(len(variance[name]), -1)
            turned = _turned_blocks(block, left.get(name), right.get(name))
            turned = turned.reshape(*block.shape[:2], spread.shape[1])
            found.append((turned.to(spread.dtype), spread[:, None]))
        return found
    if piece.weight is not None:
        rows, columns = left.get(piece.weight), right.get(piece.weight)
        spread = variance[piece.weight].flatten(2)  # (M, rows, columns)
        if piece.transposed:
            rows, columns, spread = columns, rows, spread.mT
        inputs = piece.inputs[:, 0, 0].to(spread.dtype)
        inputs = inputs if columns is None else inputs @ columns
        found.append((_turned_grads(piece, rows, spread), inputs.square() @ spread.mT))
    if piece.bias is not None:
        spread = variance[piece.bias]
        spread = spread[:, None].expand(-1, len(piece.inputs) if piece.grads is None else 1, -1)
        found.append((_turned_grads(piece, left.get(piece.bias), spread), spread))
    return found


def _turned_grads(piece: LinearPiece, basis: Tensor | None, like: Tensor) -> Tensor:
    """(n, R, c) gradients of a layer with one position in the eigenbasis of its outputs; (1, c, c) for the identity."""
    if piece.grads is None:
        size = piece.shape[1] if piece.transposed else piece.shape[0]
        return torch.eye(size, dtype=like.dtype, device=like.device)[None] if basis is None else basis[None]
    grads = piece.grads[:, :, 0, 0].to(like.dtype)
    return grads if basis is None else grads @ basis


def _turned_blocks(block: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Q_L^T X Q_R of every (n, R) block X, rows its first axis."""
    if left is None and right is None:
        return block
    matrix = block.reshape(*block.shape[:2], block.shape[2] if block.dim() > 2 else 1, -1)
    if left is not None:
        matrix = left.mT @ matrix.to(left.dtype)
    return matrix if right is None else matrix.to(right.dtype) @ right


def _weight_block(inputs: Tensor, grads: Tensor) -> Tensor:
    """(n, R, groups, c, k): sum_t G A^T."""
    return torch.einsum("nrtgc,ntgk->nrgck", grads, inputs)


def _grads(piece: LinearPiece) -> Tensor:
    """G (n, R, T, groups, c), written out where it is the identity."""
    if piece.grads is not None:
        return piece.grads
    size = piece.shape[1] if piece.transposed else piece.shape[0]
    unit = torch.eye(size, dtype=piece.inputs.dtype, device=piece.inputs.device)
    return unit[None, :, None, None].expand(len(piece.inputs), -1, -1, -1, -1)
