"""The covariance of a posterior as a sum of simple forms, and what each makes of a layer's Jacobian.

A basis is a diagonal Sigma in an eigenbasis by parameter; a root is Sigma = R R^T over all parameters together.
Posteriors without either are known by their draws.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayespass.curvature.blocks import Bases, DensePiece, LinearPiece, Piece, covariance, dense, marginals
from bayespass.curvature.blocks import parameter_names as names_of
from bayespass.curvature.rows import Parameters
from bayespass.errors import require_count
from bayespass.posterior.base import Posterior
from bayespass.posterior.empirical import Empirical
from bayespass.posterior.full import FullGaussian
from bayespass.posterior.kronecker import KroneckerGaussian
from bayespass.posterior.low_rank import LowRankGaussian
from bayespass.posterior.mean_field import DiagonalGaussian
from bayespass.posterior.product import Product
from bayespass.posterior.sampled_gaussian import SampledGaussian

GAUSSIAN = (DiagonalGaussian, KroneckerGaussian, FullGaussian, LowRankGaussian, SampledGaussian)


@dataclass(frozen=True)
class Basis:
    """Parameters that are independent in a basis.

    Args:
        variance: (M, *shape) by name, for M covariances with one basis.
        left: Q_L by name, the identity for names left out.
        right: Q_R by name.
    """

    variance: Mapping[str, Tensor]
    left: Bases
    right: Bases


@dataclass(frozen=True)
class Root:
    """Parameters with covariance R R^T.

    Args:
        columns: (*shape, K) by name, the rows of R.
    """

    columns: Mapping[str, Tensor]


Form = Basis | Root


def closed_forms(posterior: Posterior) -> list[Form] | None:
    """The covariance of a posterior as a sum of bases and roots; None where it has none but draws."""
    if isinstance(posterior, DiagonalGaussian):
        return [Basis({name: ordinary(value)[None] for name, value in posterior.variance.items()}, {}, {})]
    if isinstance(posterior, KroneckerGaussian):
        variance = {name: ordinary(value)[None] for name, value in posterior._variance_in_basis.items()}
        return [Basis(variance, dict(posterior._left), dict(posterior._right))]
    if isinstance(posterior, FullGaussian):
        root = ordinary(posterior._root)
        parts = root.split([mean.numel() for mean in posterior.mean.values()])
        return [Root({n: p.view(*m.shape, -1) for (n, m), p in zip(posterior.mean.items(), parts, strict=True)})]
    if isinstance(posterior, LowRankGaussian):
        diagonal = Basis({name: ordinary(value)[None] for name, value in posterior._diagonal.items()}, {}, {})
        return [diagonal, Root({name: ordinary(value).movedim(0, -1) for name, value in posterior._factors.items()})]
    if isinstance(posterior, Product):
        found = [closed_forms(part) for part in posterior.parts]
        return None if any(part is None for part in found) else [form for part in found for form in part or []]
    return None


def is_symmetric(posterior: Posterior) -> bool:
    """Whether mean - d is as likely as mean + d, so that a draw's mirror image is a draw."""
    if isinstance(posterior, Product):
        return all(map(is_symmetric, posterior.parts))
    return isinstance(posterior, GAUSSIAN)


def displacements(posterior: Posterior, n_samples: int, seed: int) -> tuple[Parameters, int]:
    """Draws of theta - mean (S, *shape) by name, and the divisor of their squares.

    Stored draws and members are all used, whatever `n_samples`. The divisor is S, as the mean is known, and
    S - 1 for members, whose mean is their own.

    Args:
        posterior: any.
        n_samples: S.
        seed: of the draws.
    """
    require_count(n_samples=n_samples)
    mean = posterior.mean
    if isinstance(posterior, SampledGaussian):
        return {name: ordinary(value) for name, value in posterior.displacements.items()}, posterior.n_draws
    members = isinstance(posterior, Empirical)
    count = len(posterior.members) if isinstance(posterior, Empirical) else n_samples
    draws = list(posterior.members if isinstance(posterior, Empirical) else posterior.sample(count, seed))
    found = {
        name: torch.stack([ordinary(draw[name]) - ordinary(value) for draw in draws]) for name, value in mean.items()
    }
    return found, max(1, count - 1) if members else count


def times(piece: Piece, columns: Mapping[str, Tensor]) -> Tensor:
    """(n, R, K): what a layer adds to J R.

    Args:
        piece: of the layer.
        columns: (*shape, K) by name; names left out do not vary.
    """
    if isinstance(piece, LinearPiece) and piece.inputs.shape[1:3] == (1, 1):
        found: list[Tensor] = []
        inputs = piece.inputs[:, 0, 0]
        if piece.weight is not None and piece.weight in columns:
            matrix = columns[piece.weight].flatten(1, -2)
            matrix = matrix.transpose(0, 1) if piece.transposed else matrix
            found.append(torch.einsum("nk,ckz->ncz", inputs.to(matrix.dtype), matrix))
        if piece.bias is not None and piece.bias in columns:
            found.append(columns[piece.bias][None].expand(len(inputs), -1, -1))
        total = sum_of(found)
        return total if piece.grads is None else piece.grads[:, :, 0, 0].to(total.dtype) @ total
    blocks = dense(piece)
    return sum_of(
        blocks[name].reshape(*blocks[name].shape[:2], -1).to(columns[name].dtype)
        @ columns[name].reshape(-1, columns[name].shape[-1])
        for name in names_of(piece)
        if name in columns
    )


def form_marginals(pieces: Iterable[Piece], form: Basis) -> Tensor:
    """(M, n, R) of all pieces that the form is about."""
    return sum_of(marginals(piece, form.variance, form.left, form.right) for piece in _about(pieces, form))


def form_covariance(pieces: Iterable[Piece], form: Basis) -> Tensor:
    """(M, n, R, R) of all pieces that the form is about."""
    return sum_of(covariance(piece, form.variance, form.left, form.right) for piece in _about(pieces, form))


def _about(pieces: Iterable[Piece], form: Basis) -> Iterator[Piece]:
    """The parts of the pieces whose parameters the form has."""
    for piece in pieces:
        known = [name for name in names_of(piece) if name in form.variance]
        if len(known) == len(names_of(piece)):
            yield piece
        elif known and isinstance(piece, LinearPiece):
            yield replace(
                piece,
                weight=piece.weight if piece.weight in known else None,
                bias=piece.bias if piece.bias in known else None,
            )
        elif known and isinstance(piece, DensePiece):
            yield DensePiece({name: piece.blocks[name] for name in known})


def sum_of(values: Iterable[Tensor]) -> Tensor:
    """x_1 + x_2 + ... of at least one tensor."""
    total: Tensor | None = None
    for value in values:
        total = value if total is None else total + value
    assert total is not None
    return total


def ordinary(value: Tensor) -> Tensor:
    """In float32 or better, and an ordinary tensor where it was made in inference mode."""
    value = value.clone() if value.is_inference() else value
    return value.detach().to(torch.promote_types(value.dtype, torch.float32))


def placed(form: Form, device: torch.device, dtype: torch.dtype) -> Form:
    """The form on the device, in this dtype or float32, whichever is better."""
    dtype = torch.promote_types(dtype, torch.float32)

    def each(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: ordinary(value).to(device, dtype) for name, value in values.items()}

    if isinstance(form, Root):
        return Root(each(form.columns))
    return Basis(each(form.variance), each(form.left), each(form.right))
