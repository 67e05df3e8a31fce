"""Laplace: a Gaussian around trained weights, from the curvature of the loss there.

Precision (H + a0) / T with H the summed curvature: its diagonal, a Kronecker product per linear layer,
or the whole matrix. It is stored without the prior and in its eigenbasis, so that the prior precision
a0 can be tuned again without another pass over the data.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from bayespass.batches import device_of, labelled_batches
from bayespass.calibrate.temperature import TemperatureScaling
from bayespass.curvature.diagonal import Curvature
from bayespass.errors import InvalidInput, NotFitted
from bayespass.evaluate.proper_scores import log_scores
from bayespass.likelihood import Likelihood, SigmaNoise, check_likelihood
from bayespass.posterior.base import Posterior, PosteriorInfo, choose_names
from bayespass.posterior.spectrum import HessianStructure, Spectrum, fit_spectrum
from bayespass.predict.dataset import predict_dataset
from bayespass.predict.propagation import SinglePass
from bayespass.predict.sampling import MeanNetwork
from bayespass.predict.snapshot import check_eval
from bayespass.prediction import ClassificationPrediction, Prediction
from bayespass.progress import track

TuningMethod = Literal["marglik", "gridsearch"]
DEFAULT_GRID = tuple(10 ** (0.25 * k) for k in range(-16, 25))  # 1e-4 to 1e6


@dataclass(frozen=True)
class PriorTuning:
    """The outcome of a search for the prior precision.

    Args:
        method: "marglik" or "gridsearch".
        grid: prior precisions tried, ascending.
        scores: one per grid point, lower is better: negative log marginal likelihood in nats, or
            mean held-out negative log-likelihood in nats.
        best: the chosen prior precision.
        at_edge: the best lies at an end of the grid.
        map_score: held-out score of the mean network (gridsearch).
        temperature_score: the same with one fitted temperature (classification, gridsearch).
        verdict: the outcome in one plain sentence.
    """

    method: TuningMethod
    grid: tuple[float, ...]
    scores: tuple[float, ...]
    best: float
    at_edge: bool
    map_score: float | None
    temperature_score: float | None
    verdict: str


class Laplace:
    """Laplace approximation at the model's present weights.

        method = Laplace(model, likelihood="classification").fit(train_loader)
        method.optimize_prior_precision("gridsearch", val_loader)
        posterior = method.posterior()

    Args:
        model: trained, in eval mode; not modified.
        likelihood: "classification" or "regression".
        hessian_structure: "diag" (any parameters), "kron" (KFAC: weights and biases of `nn.Linear`, one
            Kronecker product per weight) or "full" (the whole matrix, 5,000 parameters at most: a last
            layer, chosen by `names`).
        curvature: "ggn" (generalised Gauss-Newton, exact), "mc" (the same in expectation, from one
            sampled label per row: one backward pass instead of one per class) or "ef" (empirical Fisher).
            "full" has "ggn" only.
        prior_precision: a0 of the prior N(0, 1/a0).
        temperature: T, tempers likelihood and prior alike.
        sigma_noise: sd of the observation noise, or "predicted" where the network outputs (mean, log
            variance), for regression.
        names: random parameters, a list or a predicate; by default all that require gradients.

    Raises:
        InvalidInput: a value outside its range, or a model in training mode.

    Source: MacKay 1992; Daxberger et al. 2021 (arXiv 2106.14806); "mc": Kunstner et al. 2019 (arXiv 1905.12558).
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood = "classification",
        hessian_structure: HessianStructure = "diag",
        curvature: Curvature = "ggn",
        prior_precision: float = 1.0,
        temperature: float = 1.0,
        sigma_noise: SigmaNoise | None = None,
        names: Iterable[str] | Callable[[str], bool] | None = None,
    ) -> None:
        check_likelihood(likelihood, sigma_noise)
        check_eval(model)
        if hessian_structure not in get_args(HessianStructure):
            msg = f"hessian_structure must be 'diag', 'kron' or 'full'; got {hessian_structure!r}"
            raise InvalidInput(msg)
        if hessian_structure == "full" and curvature != "ggn":
            msg = f"hessian_structure='full' has curvature='ggn' only; got {curvature!r}"
            raise InvalidInput(msg)
        if not prior_precision > 0 or not temperature > 0:
            msg = f"prior_precision and temperature must be positive; got {prior_precision} and {temperature}"
            raise InvalidInput(msg)
        self.model = model
        self.likelihood: Likelihood = likelihood
        self.hessian_structure: HessianStructure = hessian_structure
        self.curvature: Curvature = curvature
        self.prior_precision = float(prior_precision)
        self.temperature = float(temperature)
        self.sigma_noise: SigmaNoise | None = sigma_noise
        trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.names = tuple(choose_names(trainable, names) if names is not None else trainable)
        self.mean_: dict[str, Tensor] = {}
        self.spectrum_: Spectrum | None = None
        self.train_loss_: float = math.nan
        self.n_data_: int = 0

    def fit(self, train_loader: Iterable[Any], chunk_size: int = 32, progress: bool = False) -> "Laplace":
        """One pass over the training data for the curvature; keeps no data.

        Args:
            train_loader: yields (inputs, targets).
            chunk_size: rows whose gradients are held at once.
            progress: show a progress bar.

        Returns:
            itself.

        Raises:
            InvalidInput: an empty loader, targets that do not fit, a curvature that is not finite, or
                parameters that the structure is not for.
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
            chunk_size,
            progress,
        )
        parameters = dict(self.model.named_parameters())
        self.mean_ = {name: parameters[name].detach().float().clone() for name in self.names}
        self.spectrum_, self.train_loss_, self.n_data_ = fitted
        return self

    def posterior(self, prior_precision: float | None = None) -> Posterior:
        """N(theta, T (H + a0)^-1) with the weights at `fit`, at the tuned or the given prior precision.

        Args:
            prior_precision: a0; by default the present one.

        Raises:
            NotFitted: before `fit`.
        """
        spectrum = self._fitted()
        a0 = self.prior_precision if prior_precision is None else float(prior_precision)
        settings = {"hessian_structure": self.hessian_structure, "curvature": self.curvature}
        info = PosteriorInfo(self.likelihood, self.n_data_, a0, self.temperature, self.sigma_noise, "laplace", settings)
        return spectrum.posterior(self.mean_, a0, self.temperature, info)

    def log_marginal_likelihood(self, prior_precision: float | None = None) -> float:
        """Laplace's log p(D | a0), in nats, for the prior N(0, 1/a0) and temperature 1.

        log p(D | theta) - a0 |theta|^2 / 2 + (P log a0 - log det(H + a0)) / 2.

        Args:
            prior_precision: a0; by default the present one.

        Raises:
            NotFitted: before `fit`.
        """
        spectrum = self._fitted()
        a0 = self.prior_precision if prior_precision is None else float(prior_precision)
        square = sum(float(mean.double().square().sum()) for mean in self.mean_.values())
        return -self.train_loss_ - 0.5 * a0 * square - 0.5 * spectrum.log_det(a0)

    def optimize_prior_precision(
        self,
        method: TuningMethod = "marglik",
        val_loader: Iterable[Any] | None = None,
        grid: Sequence[float] = DEFAULT_GRID,
        predictor: Callable[[nn.Module, Posterior], nn.Module] = SinglePass,
        progress: bool = False,
    ) -> PriorTuning:
        """Choose the prior precision from cached curvature; the data are not visited again.

        Args:
            method: "marglik" (marginal likelihood of the training data, no other data needed) or
                "gridsearch" (mean negative log-likelihood on held-out data).
            val_loader: held-out (inputs, targets), for "gridsearch".
            grid: prior precisions to try.
            predictor: makes the predictor from (model, posterior), for "gridsearch".
            progress: show a progress bar.

        Returns:
            the search, with its verdict; `prior_precision` is set to the best.

        Raises:
            NotFitted: before `fit`.
            InvalidInput: an unknown method, an empty or non-positive grid, or no held-out data.

        Warns:
            UserWarning: the best lies at an end of the grid, or the posterior does not beat the
                mean network or a temperature.
        """
        self._fitted()
        values = tuple(sorted(float(value) for value in grid))
        if not values or values[0] <= 0:
            msg = f"grid must hold positive prior precisions; got {values}"
            raise InvalidInput(msg)
        map_score = temperature_score = None
        if method == "marglik":
            scores = [-self.log_marginal_likelihood(value) for value in values]
        elif method == "gridsearch":
            if val_loader is None:
                msg = "optimize_prior_precision('gridsearch') needs val_loader, held-out (inputs, targets)"
                raise InvalidInput(msg)
            held_out = list(labelled_batches(val_loader, device_of(self.model)))
            targets = torch.cat([target for _, target in held_out])
            steps = track(values, "prior precision", show=progress, total=len(values))
            scores = [
                _score(predict_dataset(predictor(self.model, self.posterior(value)), held_out), targets)
                for value in steps
            ]
            at_mean = predict_dataset(MeanNetwork(self.model, self.posterior(values[-1])), held_out)
            map_score = _score(at_mean, targets)
            if isinstance(at_mean, ClassificationPrediction):
                temperature_score = _score(TemperatureScaling().fit(at_mean, targets)(at_mean), targets)
        else:
            msg = f"method must be 'marglik' or 'gridsearch'; got {method!r}"
            raise InvalidInput(msg)
        best = min(range(len(values)), key=lambda i: scores[i] if math.isfinite(scores[i]) else math.inf)
        self.prior_precision = values[best]
        at_edge = len(values) > 1 and best in (0, len(values) - 1)
        verdict = _verdict(values[best], scores[best], at_edge, map_score, temperature_score)
        if at_edge or "does not beat" in verdict:
            warnings.warn(verdict, UserWarning, stacklevel=2)
        return PriorTuning(method, values, tuple(scores), values[best], at_edge, map_score, temperature_score, verdict)

    def _fitted(self) -> Spectrum:
        if self.spectrum_ is None:
            msg = "Laplace has no curvature yet; call fit(train_loader) first"
            raise NotFitted(msg)
        return self.spectrum_


def _score(prediction: Prediction, targets: Tensor) -> float:
    return float(log_scores(prediction, targets).mean())


def _verdict(best: float, score: float, at_edge: bool, map_score: float | None, temperature_score: float | None) -> str:
    parts = [f"prior_precision = {best:.3g}, score {score:.4f}"]
    if at_edge:
        parts.append("this is the edge of the grid: widen it, the optimum may lie beyond")
    if map_score is not None:
        rivals = {"the MAP network": map_score, "a temperature": temperature_score}
        lost = [f"{name} ({value:.4f})" for name, value in rivals.items() if value is not None and value <= score]
        parts.append(
            f"the posterior does not beat {' or '.join(lost)} on these data"
            if lost
            else "the posterior beats "
            + " and ".join(f"{name} ({value:.4f})" for name, value in rivals.items() if value is not None)
        )
    return "; ".join(parts)
