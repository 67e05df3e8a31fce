"""The curvature of a Laplace approximation in its own eigenbasis, where any prior precision is an addition.

H = Q diag(values) Q^T without prior; the posterior covariance is Q diag(T / (values + a0)) Q^T, and
log det(H + a0) is a sum over values. So trying another prior precision costs no decomposition.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bayespass.curvature.dense import dense_ggn
from bayespass.curvature.diagonal import Curvature, diagonal_curvature
from bayespass.curvature.kfac import kfac
from bayespass.errors import InvalidInput
from bayespass.likelihood import Likelihood, SigmaNoise
from bayespass.posterior.base import Posterior, PosteriorInfo
from bayespass.posterior.full import FullGaussian
from bayespass.posterior.kronecker import KroneckerGaussian
from bayespass.posterior.mean_field import DiagonalGaussian

HessianStructure = Literal["diag", "kron", "full"]


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of the curvature, and the basis that they belong to.

    Args:
        values: eigenvalues >= 0 by parameter name, of the parameter's shape; under the name "" all
            together for a full matrix.
        left: eigenvectors of the rows by name (kron).
        right: eigenvectors of the columns by name (kron).
        full: eigenvectors of all parameters together, in the order of the names (full).
    """

    values: Mapping[str, Tensor]
    left: Mapping[str, Tensor] = field(default_factory=dict)
    right: Mapping[str, Tensor] = field(default_factory=dict)
    full: Tensor | None = None

    def posterior(
        self, mean: Mapping[str, Tensor], prior_precision: float, temperature: float, info: PosteriorInfo
    ) -> Posterior:
        """N(mean, Q diag(T / (values + a0)) Q^T).

        Args:
            mean: the trained weights by name.
            prior_precision: a0.
            temperature: T.
            info: what to record.
        """
        variance = {name: temperature / (value + prior_precision) for name, value in self.values.items()}
        if self.full is not None:
            return FullGaussian(mean, self.full * variance[""].sqrt(), info)
        if self.left or self.right:
            return KroneckerGaussian(mean, variance, self.left, self.right, info)
        return DiagonalGaussian(mean, variance, info)

    def log_det(self, prior_precision: float) -> float:
        """log det(H / a0 + 1), in nats.

        Args:
            prior_precision: a0.
        """
        return sum(float(torch.log1p(value.double() / prior_precision).sum()) for value in self.values.values())


def fit_spectrum(
    structure: HessianStructure,
    model: nn.Module,
    loader: Iterable[Any],
    names: tuple[str, ...],
    likelihood: Likelihood,
    sigma_noise: SigmaNoise | None,
    curvature: Curvature,
    chunk_size: int,
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
        chunk_size: rows whose gradients are held at once ("diag" and "full").
        progress: show a progress bar.

    Returns:
        the spectrum, the summed negative log-likelihood in nats, and the number of rows N.

    Raises:
        InvalidInput: see `diagonal_curvature`, `kfac` and `dense_ggn`; or a curvature that is not finite.
    """
    if structure == "diag":
        values, loss, n_data = diagonal_curvature(
            model, loader, names, likelihood, sigma_noise, curvature, chunk_size, progress
        )
        for name, value in values.items():
            _check_finite(f"parameter {name}", value)
        return Spectrum(values), loss, n_data
    if structure == "full":
        matrix, loss, n_data = dense_ggn(model, loader, names, likelihood, sigma_noise, chunk_size, progress)
        _check_finite(f"parameters {', '.join(names[:3])}", matrix)
        found, basis = _decomposed(matrix)
        return Spectrum({"": found}, full=basis), loss, n_data
    factors, loss, n_data = kfac(model, loader, names, likelihood, sigma_noise, curvature, progress)
    values, left, right = {}, {}, {}
    for path, factor in factors.items():
        prefix = f"{path}." if path else ""
        _check_finite(f"layer {path}", factor.outputs)
        _check_finite(f"layer {path}", factor.inputs)
        outputs, turn = _decomposed(factor.outputs)
        if f"{prefix}weight" in names:
            inputs, right[f"{prefix}weight"] = _decomposed(factor.inputs)
            values[f"{prefix}weight"], left[f"{prefix}weight"] = torch.outer(outputs, inputs), turn
        if f"{prefix}bias" in names:
            values[f"{prefix}bias"], left[f"{prefix}bias"] = outputs, turn
    return Spectrum({name: values[name] for name in names}, left, right), loss, n_data


def _decomposed(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues >= 0 and eigenvectors in float32, decomposed in float64 where the device has it."""
    exact = matrix if matrix.device.type == "mps" else matrix.double()
    values, vectors = torch.linalg.eigh((exact + exact.mT) / 2)
    return values.clamp(min=0).float(), vectors.float()


def _check_finite(what: str, value: Tensor) -> None:
    """Raise unless all entries are finite.

    Raises:
        InvalidInput: the curvature is not.
    """
    if not torch.isfinite(value).all():
        msg = f"the curvature of {what} is NaN or infinite; check the model's weights and the data"
        raise InvalidInput(msg)
