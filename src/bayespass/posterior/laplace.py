"""Laplace: a Gaussian around trained weights, from the curvature of the loss there.

Precision (H + a0) / T with H the summed curvature: its diagonal, a Kronecker product per layer, or the
whole matrix. It is stored without the prior and in its eigenbasis, so that the prior precision a0 can be
tuned again without another pass over the data.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

from torch import Tensor, nn

from bayespass.curvature.coverage import CurvatureCoverage, Structure, curvature_coverage
from bayespass.curvature.diagonal import Curvature
from bayespass.curvature.kfac import KFACApprox
from bayespass.curvature.layers import DEFAULT_MEMORY
from bayespass.errors import InvalidInput, NotFitted, require_positive
from bayespass.likelihood import Likelihood, SigmaNoise, check_likelihood
from bayespass.posterior.base import Posterior, PosteriorInfo
from bayespass.posterior.prior_tuning import DEFAULT_GRID, PriorTuning, TuningMethod, geometric_mean, tune_prior
from bayespass.posterior.selection import select_parameters
from bayespass.posterior.spectrum import HessianStructure, PriorPrecision, Spectrum, fit_spectrum
from bayespass.predict.propagation import SinglePass
from bayespass.predict.snapshot import check_eval

__all__ = ["Laplace", "PriorTuning"]


class Laplace:
    """Laplace approximation at the model's present weights, for any network.

        method = Laplace(model, likelihood="classification").fit(train_loader)
        method.optimize_prior_precision("gridsearch", val_loader)
        posterior = method.posterior()

    Args:
        model: trained, in eval mode; not modified.
        likelihood: "classification" or "regression".
        hessian_structure: "diag", "kron" (KFAC: one Kronecker product per weight of linear layers and
            convolutions, the diagonal of all other parameters; `coverage` says which) or "full" (the whole
            matrix, for a last layer chosen by `names`).
        curvature: "ggn" (generalised Gauss-Newton, exact), "mc" (the same in expectation, from one
            sampled label per row: one backward pass instead of one per class) or "ef" (empirical Fisher).
            "full" has "ggn" only.
        prior_precision: a0 of the prior N(0, 1/a0), one for all or, but for "full", one for every random
            parameter by name.
        temperature: T, tempers likelihood and prior alike.
        sigma_noise: sd of the observation noise, or "predicted" where the network outputs (mean, log
            variance), for regression.
        names: random parameters, a list or a predicate; by default all that require gradients.
        kfac_approx: "expand" (positions of a row, such as tokens and the patches of a convolution, count
            as rows) or "reduce" (they are averaged: for networks that pool them), for "kron".
        max_memory: bytes that `fit` may take beyond the model and the factors, roughly.

    Raises:
        InvalidInput: a value outside its range, or a model in training mode.

    Source: MacKay 1992; Daxberger et al. 2021 (arXiv 2106.14806); "mc": Kunstner et al. 2019 (arXiv
    1905.12558); "expand" and "reduce": Eschenhagen et al. 2023 (arXiv 2311.00636).
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood = "classification",
        hessian_structure: HessianStructure = "diag",
        curvature: Curvature = "ggn",
        prior_precision: PriorPrecision = 1.0,
        temperature: float = 1.0,
        sigma_noise: SigmaNoise | None = None,
        names: Iterable[str] | Callable[[str], bool] | None = None,
        kfac_approx: KFACApprox = "expand",
        max_memory: int = DEFAULT_MEMORY,
    ) -> None:
        check_likelihood(likelihood, sigma_noise)
        check_eval(model)
        if hessian_structure not in get_args(HessianStructure):
            msg = f"hessian_structure must be 'diag', 'kron' or 'full'; got {hessian_structure!r}"
            raise InvalidInput(msg)
        if hessian_structure == "full" and curvature != "ggn":
            msg = f"hessian_structure='full' has curvature='ggn' only; got {curvature!r}"
            raise InvalidInput(msg)
        if kfac_approx not in get_args(KFACApprox):
            msg = f"kfac_approx must be 'expand' or 'reduce'; got {kfac_approx!r}"
            raise InvalidInput(msg)
        require_positive(temperature=temperature, max_memory=max_memory)
        self.model = model
        self.likelihood: Likelihood = likelihood
        self.hessian_structure: HessianStructure = hessian_structure
        self.curvature: Curvature = curvature
        self.kfac_approx: KFACApprox = kfac_approx
        self.temperature = float(temperature)
        self.sigma_noise: SigmaNoise | None = sigma_noise
        self.max_memory = int(max_memory)
        self.names = tuple(name for name, _ in select_parameters(model, "all" if names is None else names))
        self.prior_precision = self._checked(prior_precision)
        self.mean_: dict[str, Tensor] = {}
        self.spectrum_: Spectrum | None = None
        self.train_loss_: float = math.nan
        self.n_data_: int = 0

    def fit(self, train_loader: Iterable[Any], *, progress: bool = False) -> "Laplace":
        """One pass over the training data for the curvature; keeps no data.

        Args:
            train_loader: yields (inputs, targets).
            progress: show a progress bar.

        Returns:
            itself.

        Raises:
            InvalidInput: an empty loader, targets that do not fit, a curvature that is not finite, or
                a full matrix that exceeds `max_memory`.
        """
        check_eval(self.model)
        fitted = fit_spectrum(
            self.hessian_structure,
            self.model,
            train_loader,
            self.names,
            self.likelihood,
            self.sigma_noise,
            self.curvature,
            self.kfac_approx,
            self.max_memory,
            progress,
        )
        parameters = dict(self.model.named_parameters())
        self.mean_ = {name: parameters[name].detach().float().clone() for name in self.names}
        self.spectrum_, self.train_loss_, self.n_data_ = fitted
        return self

    def coverage(self) -> CurvatureCoverage:
        """Which structure every parameter of the model got, and why: a table when printed.

        Raises:
            NotFitted: before `fit`, as only a pass through the model shows how its weights are used.
        """
        spectrum = self._fitted()
        if self.hessian_structure == "kron":
            factors: Structure = "kron reduce" if self.kfac_approx == "reduce" else "kron expand"
            diagonal: Structure = "diagonal"
            return curvature_coverage(
                self.model, {name: factors if name in spectrum.left else diagonal for name in self.names}
            )
        structure: Structure = "full" if self.hessian_structure == "full" else "diagonal"
        return curvature_coverage(
            self.model, dict.fromkeys(self.names, structure), f"hessian_structure={self.hessian_structure!r}"
        )

    def posterior(self, prior_precision: PriorPrecision | None = None) -> Posterior:
        """N(theta, T (H + a0)^-1) with the weights at `fit`, at the tuned or the given prior precision.

        Where it has one by parameter, `info.prior_precision` is the geometric mean over all their entries
        and `info.settings` has each under "prior_precision/" and its name.

        Args:
            prior_precision: a0, one for all or by name; by default the present one.

        Raises:
            NotFitted: before `fit`.
            InvalidInput: a value outside its range.
        """
        spectrum = self._fitted()
        a0 = self.prior_precision if prior_precision is None else self._checked(prior_precision)
        settings: dict[str, float | int | str | bool | None] = {
            "hessian_structure": self.hessian_structure,
            "curvature": self.curvature,
        }
        if self.hessian_structure == "kron":
            settings["kfac_approx"] = self.kfac_approx
        if isinstance(a0, Mapping):
            settings |= {f"prior_precision/{name}": value for name, value in a0.items()}
            shared = geometric_mean(a0, self.mean_)
        else:
            shared = a0
        info = PosteriorInfo(
            self.likelihood, self.n_data_, shared, self.temperature, self.sigma_noise, "laplace", settings
        )
        return spectrum.posterior(self.mean_, a0, self.temperature, info)

    def log_marginal_likelihood(self, prior_precision: PriorPrecision | None = None) -> float:
        """Laplace's log p(D | a0), in nats, for the prior N(0, 1/a0) and temperature 1.

        log p(D | theta) - a0 |theta|^2 / 2 + (P log a0 - log det(H + a0)) / 2, its second and third term
        summed over parameters where each has its own a0.

        Args:
            prior_precision: a0, one for all or by name; by default the present one.

        Raises:
            NotFitted: before `fit`.
            InvalidInput: a value outside its range.
        """
        spectrum = self._fitted()
        a0 = self.prior_precision if prior_precision is None else self._checked(prior_precision)
        own = a0 if isinstance(a0, Mapping) else dict.fromkeys(self.mean_, a0)
        square = sum(own[name] * float(mean.double().square().sum()) for name, mean in self.mean_.items())
        return -self.train_loss_ - 0.5 * square - 0.5 * spectrum.log_det(a0)

    def optimize_prior_precision(
        self,
        method: TuningMethod = "marglik",
        val_loader: Iterable[Any] | None = None,
        grid: Sequence[float] = DEFAULT_GRID,
        predictor: Callable[[nn.Module, Posterior], nn.Module] = SinglePass,
        per_layer: bool = False,
        progress: bool = False,
    ) -> PriorTuning:
        """Choose the prior precision from cached curvature; the training data are not visited again.

        "gridsearch" runs the predictor over the held-out data at every grid point, but for `Linearised` on a
        "diag" or "kron" posterior: one pass keeps the covariance of the outputs for the whole grid, and a
        grid point then costs no pass.

        `sigma_noise` is not tuned: the marginal likelihood at fixed weights mistakes it for the training
        error, and overfits it. Estimate it on held-out residuals.

        Args:
            method: "marglik" (marginal likelihood of the training data, no other data needed) or
                "gridsearch" (mean negative log-likelihood on held-out data).
            val_loader: held-out (inputs, targets), for "gridsearch".
            grid: prior precisions to try; by layer, "marglik" takes the best between its ends.
            predictor: makes the predictor from (model, posterior), for "gridsearch".
            per_layer: one precision for every module that owns parameters ("diag" and "kron"); "gridsearch"
                needs `predictor=Linearised` for it, and goes by coordinate descent.
            progress: show a progress bar.

        Returns:
            the search, with its verdict; `prior_precision` is set to the best.

        Raises:
            NotFitted: before `fit`.
            InvalidInput: an unknown method, an empty or non-positive grid, no held-out data, or `per_layer`
                where there is no such search.

        Warns:
            UserWarning: the best lies at an end of the grid, or the posterior does not beat the
                mean network or a temperature.
        """
        self._fitted()
        tuning = tune_prior(self, method, val_loader, grid, predictor, per_layer, progress)
        self.prior_precision = tuning.best if tuning.by_name is None else dict(tuning.by_name)
        return tuning

    def _fitted(self) -> Spectrum:
        if self.spectrum_ is None:
            msg = "Laplace has no curvature yet; call fit(train_loader) first"
            raise NotFitted(msg)
        return self.spectrum_

    def _checked(self, prior_precision: PriorPrecision) -> PriorPrecision:
        """One positive number, or one for every random parameter.

        Raises:
            InvalidInput: it is not.
        """
        if not isinstance(prior_precision, Mapping):
            require_positive(prior_precision=prior_precision)
            return float(prior_precision)
        if self.hessian_structure == "full" or set(prior_precision) != set(self.names):
            odd = sorted(set(prior_precision) ^ set(self.names))
            msg = "a full matrix has one prior precision for all parameters; pass a number"
            if self.hessian_structure != "full":
                msg = f"prior_precision by name must have every random parameter; {', '.join(odd[:3])} differ"
            raise InvalidInput(msg)
        for name in self.names:
            require_positive(**{f"prior_precision of {name}": prior_precision[name]})
        return {name: float(prior_precision[name]) for name in self.names}
