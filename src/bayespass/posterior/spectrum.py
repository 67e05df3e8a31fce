"""The curvature of a Laplace approximation in its own eigenbasis, where any prior precision is an addition.

H = Q diag(values) Q^T without prior; the posterior covariance is Q diag(T / (values + a0)) Q^T, and
log det(H + a0) is a sum over values. So trying another prior precision costs no decomposition. Where the
basis does not mix parameters ("diag" and "kron"), each may have a prior precision of its own.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bayespass.curvature.dense import dense_ggn
from bayespass.curvature.diagonal import Curvature, diagonal_curvature
from bayespass.curvature.kfac import KFACApprox, kfac
from bayespass.errors import InvalidInput
from bayespass.likelihood import Likelihood, SigmaNoise
from bayespass.posterior.base import Posterior, PosteriorInfo
from bayespass.posterior.full import FullGaussian
from bayespass.posterior.kronecker import KroneckerGaussian
from bayespass.posterior.mean_field import DiagonalGaussian

HessianStructure = Literal["diag", "kron", "full"]
PriorPrecision = float | Mapping[str, float]


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of the curvature, and the basis that they belong to.

    Args:
        values: eigenvalues >= 0 by parameter name, of the parameter's shape; under the name "" all
            together for a full matrix.
        left: eigenvectors of the rows by name (kron; a name in neither has its diagonal alone).
        right: eigenvectors of the columns by name (kron).
        full: eigenvectors of all parameters together, in the order of the names (full).
    """

    values: Mapping[str, Tensor]
    left: Mapping[str, Tensor] = field(default_factory=dict)
    right: Mapping[str, Tensor] = field(default_factory=dict)
    full: Tensor | None = None

    def posterior(
        self, mean: Mapping[str, Tensor], prior_precision: PriorPrecision, temperature: float, info: PosteriorInfo
    ) -> Posterior:
        """N(mean, Q diag(T / (values + a0)) Q^T).

        Args:
            mean: the trained weights by name.
            prior_precision: a0, one for all or by parameter name.
            temperature: T.
            info: what to record.

        Raises:
            InvalidInput: a prior precision by name for a full matrix.
        """
        variance = self.variance(prior_precision, temperature)
        if self.full is not None:
            return FullGaussian(mean, self.full * variance[""].sqrt(), info)
        if self.left or self.right:
            return KroneckerGaussian(mean, variance, self.left, self.right, info)
        return DiagonalGaussian(mean, variance, info)

    def variance(self, prior_precision: PriorPrecision, temperature: float = 1.0) -> dict[str, Tensor]:
        """T / (values + a0) in the basis, by name.

        Args:
            prior_precision: a0, one for all or by parameter name.
            temperature: T.

        Raises:
            InvalidInput: a prior precision by name for a full matrix.
        """
        own = self._by_name(prior_precision)
        return {name: temperature / (value + own[name]) for name, value in self.values.items()}

    def log_det(self, prior_precision: PriorPrecision) -> float:
        """log det(H / a0 + 1), in nats.

        Args:
            prior_precision: a0, one for all or by parameter name.

        Raises:
            InvalidInput: a prior precision by name for a full matrix.
        """
        own = self._by_name(prior_precision)
        return sum(float(torch.log1p(value.double() / own[name]).sum()) for name, value in self.values.items())

    def _by_name(self, prior_precision: PriorPrecision) -> Mapping[str, float]:
        if not isinstance(prior_precision, Mapping):
            return dict.fromkeys(self.values, float(prior_precision))
        if self.full is not None:
            msg = "a full matrix has one prior precision for all parameters; use hessian_structure='kron' or 'diag'"
            raise InvalidInput(msg)
        return prior_precision


def fit_spectrum(
    structure: HessianStructure,
    model: nn.Module,
    loader: Iterable[Any],
    names: tuple[str, ...],
    likelihood: Likelihood,
    sigma_noise: SigmaNoise | None,
    curvature: Curvature,
    kfac_approx: KFACApprox,
    max_memory: int,
    progress: bool,
) -> tuple[Spectrum, float, int]:
    """One pass over the data for the curvature, decomposed.

    Args:
        structure: "diag", "kron" or "full".
        model: in eval mode.
        loader: yields (inputs, targets).
        names: random parameters.
        likelihood: "classification" or "regression".
        sigma_noise: sd of the observation noise, or "predicted", for regression.
        curvature: "ggn", "mc" or "ef"; only "ggn" for "full".
        kfac_approx: "expand" or "reduce" ("kron").
        max_memory: bytes beyond the model and what is returned, roughly.
        progress: show a progress bar.

    Returns:
        the spectrum, the summed negative log-likelihood in nats, and the number of rows N.

    Raises:
        InvalidInput: see `diagonal_curvature`, `kfac` and `dense_ggn`; or a curvature that is not finite.
    """
    if structure == "full":
        matrix, loss, n_data = dense_ggn(model, loader, names, likelihood, sigma_noise, max_memory, progress)
        _check_finite(f"parameters {', '.join(names[:3])}", matrix)
        found, basis = _decomposed(matrix)
        return Spectrum({"": found}, full=basis), loss, n_data
    if structure == "diag":
        values, loss, n_data = diagonal_curvature(
            model, loader, names, likelihood, sigma_noise, curvature, max_memory, progress
        )
        factors = {}
    else:
        factors, values, loss, n_data = kfac(
            model, loader, names, likelihood, sigma_noise, curvature, kfac_approx, max_memory, progress
        )
    for name, value in values.items():
        _check_finite(f"parameter {name}", value)
    left, right = {}, {}
    for path, factor in factors.items():
        _check_finite(f"layer {path}", factor.outputs)
        _check_finite(f"layer {path}", factor.inputs)
        outputs, turn = _decomposed(factor.outputs)
        if factor.weight is not None:
            inputs, other = _decomposed(factor.inputs)
            rows, columns = (inputs, outputs) if factor.transposed else (outputs, inputs)
            shape = model.get_parameter(factor.weight).shape
            values[factor.weight] = torch.outer(rows, columns).view(shape)
            left[factor.weight], right[factor.weight] = (other, turn) if factor.transposed else (turn, other)
        if factor.bias is not None:
            values[factor.bias], left[factor.bias] = outputs, turn
    return Spectrum({name: values[name] for name in names}, left, right), loss, n_data


def _decomposed(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues >= 0 and eigenvectors in float32, decomposed in float64 where the device has it."""
    exact = matrix if matrix.device.type == "mps" else matrix.double()
    values, vectors = torch.linalg.eigh((exact + exact.mT).div_(2))
    return values.clamp(min=0).float(), vectors.float()


def _check_finite(what: str, value: Tensor) -> None:
    """Raise unless all entries are finite.

    Raises:
        InvalidInput: the curvature is not.
    """
    if not torch.isfinite(value).all():
        msg = f"the curvature of {what} is NaN or infinite; check the model's weights and the data"
        raise InvalidInput(msg)
