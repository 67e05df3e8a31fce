"""A Gaussian that is diagonal in a Kronecker eigenbasis of every weight matrix.

A weight reshaped to (rows, columns), rows its first axis, is W = M + Q_L (sqrt(v) * E) Q_R^T with E
standard normal, so Cov[vec W] = (Q_L kron Q_R) diag(v) (Q_L kron Q_R)^T in row-major order. Different
parameters are independent. It serves a variational posterior in an eigenbasis and KFAC Laplace.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor

from bayespass.errors import InvalidInput
from bayespass.posterior.base import Posterior, PosteriorInfo, as_generator, choose_names, require_values
from bayespass.posterior.mean_field import DiagonalGaussian

ORTHOGONALITY = 1e-3  # largest entry of |Q^T Q - I|: float32 eigenvectors of 4,000 rows are within 1e-4


class KroneckerGaussian(Posterior):
    """q(W) = N(M, (Q_L kron Q_R) diag(v) (Q_L kron Q_R)^T) for every parameter.

    Args:
        mean: by parameter name, any shapes.
        variance_in_basis: v >= 0 for the same names, of the parameter's shape or (rows, columns).
        left: orthogonal Q_L (rows, rows) by name, rows the parameter's first axis; the identity for names
            left out.
        right: orthogonal Q_R (columns, columns) by name, columns all other axes together; the identity for
            names left out. A name in neither is plainly diagonal.
        info: what it was fitted with.

    `variance` is the exact marginal (Q_L^2) v (Q_R^2)^T; a predictor that uses it ignores correlations
    between entries of one matrix, `MonteCarlo` keeps them.

    Raises:
        InvalidInput: names or shapes do not fit, a value is not finite, a variance is negative, or a
            basis is not orthogonal.

    Source: Martens and Grosse 2015 (arXiv 1503.05671); George et al. 2018 (arXiv 1806.03884).

    >>> turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    >>> q = KroneckerGaussian({"w": torch.zeros(2, 1)}, {"w": torch.tensor([[1.0], [0.0]])}, left={"w": turn})
    >>> q.variance["w"].squeeze()  # of the two entries of a draw along (0.6, 0.8)
    tensor([0.3600, 0.6400])
    """

    kind = "kronecker_gaussian"

    def __init__(
        self,
        mean: Mapping[str, Tensor],
        variance_in_basis: Mapping[str, Tensor],
        left: Mapping[str, Tensor] | None = None,
        right: Mapping[str, Tensor] | None = None,
        info: PosteriorInfo | None = None,
    ) -> None:
        shaped = {
            name: v.reshape(mean[name].shape) if name in mean and v.shape == _matrix_shape(mean[name]) else v
            for name, v in variance_in_basis.items()
        }
        checked = DiagonalGaussian(mean, shaped)
        self._mean = checked.mean
        self._variance_in_basis = {
            name: _own(v, torch.promote_types(v.dtype, torch.float32)) for name, v in checked.variance.items()
        }
        self._left = self._checked_bases("left", left or {})
        self._right = self._checked_bases("right", right or {})
        self.info = info or PosteriorInfo()

    def _checked_bases(self, side: str, bases: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, basis in bases.items():
            if name not in self._mean:
                msg = f"{side} has a basis for {name}, which mean lacks; pass bases for random parameters only"
                raise InvalidInput(msg)
            size = _matrix_shape(self._mean[name])[0 if side == "left" else 1]
            if basis.shape != (size, size):
                msg = (
                    f"the {side} basis of {name} must have shape {(size, size)} for a parameter of shape "
                    f"{tuple(self._mean[name].shape)}; got {tuple(basis.shape)}"
                )
                raise InvalidInput(msg)
            error = float((basis.mT @ basis - torch.eye(size, dtype=basis.dtype, device=basis.device)).abs().max())
            if not error <= ORTHOGONALITY:
                msg = (
                    f"the {side} basis of {name} is not orthogonal: |Q^T Q - I| reaches {error:.2g}; pass "
                    f"eigenvectors (torch.linalg.eigh) in float32 or float64"
                )
                raise InvalidInput(msg)
        return {name: _own(bases[name], v.dtype) for name, v in self._variance_in_basis.items() if name in bases}

    @property
    def mean(self) -> Mapping[str, Tensor]:
        """E[theta] by name."""
        return self._mean

    @cached_property
    def variance(self) -> Mapping[str, Tensor]:  # type: ignore[override]
        """Marginal Var[theta] = (Q_L^2) v (Q_R^2)^T by name, in float32 or better."""
        return {
            name: marginal(v, self._left.get(name), self._right.get(name))
            for name, v in self._variance_in_basis.items()
        }

    def sample(self, n_samples: int, generator: torch.Generator | int = 0) -> Iterator[dict[str, Tensor]]:
        """Independent draws M + Q_L (sqrt(v) * E) Q_R^T.

        Args:
            n_samples: how many.
            generator: a seed, or a generator on the parameters' device.

        Yields:
            every random parameter by name.
        """
        device = next(iter(self._mean.values())).device
        generator = as_generator(generator, device)
        sd = {name: value.sqrt() for name, value in self._variance_in_basis.items()}
        for _ in range(n_samples):
            yield {
                name: mean
                + self._from_basis(
                    name, sd[name] * torch.randn(mean.shape, generator=generator, dtype=sd[name].dtype, device=device)
                ).to(mean.dtype)
                for name, mean in self._mean.items()
            }

    def subset(self, names: Iterable[str] | Callable[[str], bool]) -> "KroneckerGaussian":
        """The posterior of these parameters alone; the others become deterministic at the model's weights.

        Args:
            names: the names to keep, or a predicate on names.
        """
        chosen = choose_names(self.names, names)
        return KroneckerGaussian(
            {n: self._mean[n] for n in chosen},
            {n: self._variance_in_basis[n] for n in chosen},
            {n: self._left[n] for n in chosen if n in self._left},
            {n: self._right[n] for n in chosen if n in self._right},
            self.info,
        )

    def log_prob(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Log density, in nats, of values for all random parameters.

        Raises:
            InvalidInput: a parameter is missing.
        """
        require_values(self.names, parameters)
        terms = [
            -0.5 * (self._to_basis(name, parameters[name] - mean).square() / v + v.log()).sum()
            - 0.5 * v.numel() * math.log(2 * math.pi)
            for (name, mean), v in zip(self._mean.items(), self._variance_in_basis.values(), strict=True)
        ]
        return torch.stack(terms).sum()

    def covariance_times(self, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cov[theta] x, by name.

        Args:
            vector: x, a tensor of the parameter's shape for every name.

        Raises:
            InvalidInput: a parameter is missing.
        """
        require_values(self.names, vector)
        return {
            name: self._from_basis(name, v * self._to_basis(name, vector[name]))
            for name, v in self._variance_in_basis.items()
        }

    def _tempered(self, temperature: float, info: PosteriorInfo) -> "KroneckerGaussian":
        scaled = {name: v * temperature for name, v in self._variance_in_basis.items()}
        return KroneckerGaussian(self._mean, scaled, self._left, self._right, info)

    def _from_basis(self, name: str, value: Tensor) -> Tensor:
        """Q_L X Q_R^T, in the parameter's shape."""
        return turned(value, self._left.get(name), self._right.get(name))

    def _to_basis(self, name: str, value: Tensor) -> Tensor:
        """Q_L^T X Q_R, in the parameter's shape."""
        return turned_back(value, self._left.get(name), self._right.get(name))

    def _tensors(self) -> dict[str, Tensor]:
        parts = {
            "mean": self._mean,
            "variance_in_basis": self._variance_in_basis,
            "left": self._left,
            "right": self._right,
        }
        return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    @classmethod
    def _from_tensors(cls, tensors: Mapping[str, Tensor], names: list[str], info: PosteriorInfo) -> "KroneckerGaussian":
        return cls(
            {n: tensors[f"mean/{n}"] for n in names},
            {n: tensors[f"variance_in_basis/{n}"] for n in names},
            {n: tensors[f"left/{n}"] for n in names if f"left/{n}" in tensors},
            {n: tensors[f"right/{n}"] for n in names if f"right/{n}" in tensors},
            info,
        )


def _matrix_shape(value: Tensor) -> tuple[int, int]:
    """(rows, columns): the first axis, and all others together."""
    rows = value.shape[0] if value.dim() else 1
    return rows, math.prod(value.shape[1:])


def _own(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy: products of equal matrices are equal bit for bit only where they lie alike in memory."""
    return value.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)


def _matrix(value: Tensor) -> Tensor:
    return value.reshape(_matrix_shape(value))


def turned(value: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """L X R^T, in the shape of X."""
    matrix = _matrix(value)
    if left is not None:
        matrix = left @ matrix.to(left.dtype)
    if right is not None:
        matrix = matrix.to(right.dtype) @ right.mT
    return matrix.reshape(value.shape)


def turned_back(value: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """L^T X R, in the shape of X."""
    return turned(value, None if left is None else left.mT, None if right is None else right.mT)


def marginal(variance: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Variance of every entry of L X R^T, from the variances of the independent entries of X."""
    return turned(variance, None if left is None else left.square(), None if right is None else right.square())
