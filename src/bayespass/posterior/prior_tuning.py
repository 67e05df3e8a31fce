"""The prior precision of a Laplace posterior, one for all or one per layer, from cached curvature.

Marginal likelihood: with eigenvalues h of a layer's curvature, minus twice its log is, up to a constant,
sum over layers of a |theta|^2 + sum log(1 + h / a). Its slope in log a, a |theta|^2 - sum h / (h + a), rises
with a, so that every layer has one optimum, found by bisection.

Held-out likelihood of the linearised network: the covariance of its outputs is a sum over layers of J_l
Sigma_l(a_l) J_l^T. One pass over the data keeps every term for every grid point; any combination is then a sum.

Source: MacKay 1992; Immer et al. 2021 (arXiv 2104.04975).
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from bayespass.batches import device_of, labelled_batches, rows_of
from bayespass.calibrate.temperature import TemperatureScaling
from bayespass.curvature.pushforward import covariance_grid, layer_paths, outputs_of
from bayespass.errors import InvalidInput
from bayespass.evaluate.proper_scores import log_scores
from bayespass.link import SOBOL_CLASSES, correlated_softmax_link, softmax_link
from bayespass.posterior.base import Posterior, PosteriorInfo
from bayespass.posterior.spectrum import Spectrum
from bayespass.predict.dataset import predict_dataset
from bayespass.predict.linearised import Linearised, covariance_root, in_single_precision, position_blocks
from bayespass.predict.sampling import MeanNetwork
from bayespass.predict.snapshot import snapshot
from bayespass.prediction import ClassificationPrediction, Prediction, regression_prediction
from bayespass.progress import track

if TYPE_CHECKING:
    from bayespass.posterior.laplace import Laplace

ROUNDING = 1e-6  # of a score, relative
TuningMethod = Literal["marglik", "gridsearch"]
DEFAULT_GRID = tuple(10 ** (0.25 * k) for k in range(-16, 25))  # 1e-4 to 1e6
BISECTIONS = 50
SWEEPS = 10  # of coordinate descent over the layers, which ends when a sweep changes nothing


@dataclass(frozen=True)
class PriorTuning:
    """The outcome of a search for the prior precision.

    Args:
        method: "marglik" or "gridsearch".
        grid: prior precisions tried, ascending.
        scores: one per grid point, with that precision for all parameters, lower is better: negative log
            marginal likelihood in nats, or mean held-out negative log-likelihood in nats.
        best: the chosen prior precision; by layer, the geometric mean over all entries.
        at_edge: the best lies at an end of the grid; by layer, that of one of them.
        map_score: held-out score of the mean network (gridsearch).
        temperature_score: the same with one fitted temperature (classification, gridsearch).
        verdict: the outcome in one plain sentence.
        by_name: the chosen precision of every parameter, where layers have their own.
    """

    method: TuningMethod
    grid: tuple[float, ...]
    scores: tuple[float, ...]
    best: float
    at_edge: bool
    map_score: float | None
    temperature_score: float | None
    verdict: str
    by_name: Mapping[str, float] | None = None


def tune_prior(
    laplace: "Laplace",
    method: TuningMethod,
    val_loader: Iterable[Any] | None,
    grid: Sequence[float],
    predictor: Callable[[nn.Module, Posterior], nn.Module],
    per_layer: bool,
    progress: bool,
) -> PriorTuning:
    """See `Laplace.optimize_prior_precision`.

    Raises:
        InvalidInput: an unknown method, an empty or non-positive grid, no held-out data, or `per_layer`
            where there is no such search.

    Warns:
        UserWarning: the best lies at an end of the grid, or the posterior does not beat the mean network
            or a temperature.
    """
    values = tuple(sorted(float(value) for value in grid))
    if not values or not values[0] > 0:
        msg = f"grid must hold positive prior precisions; got {values}"
        raise InvalidInput(msg)
    if per_layer and laplace.hessian_structure == "full":
        msg = "per_layer is for hessian_structure='diag' and 'kron'; a full matrix has one prior precision"
        raise InvalidInput(msg)
    rivals: dict[str, float | None] = {}
    by_layer: dict[str, float] | None = None
    if method == "marglik":
        scores = [-laplace.log_marginal_likelihood(value) for value in values]
        if per_layer:
            by_layer = marglik_by_layer(laplace._fitted(), laplace.mean_, values[0], values[-1])
            score = -laplace.log_marginal_likelihood(_by_name(by_layer, laplace.names))
    elif method == "gridsearch":
        if val_loader is None:
            msg = "optimize_prior_precision('gridsearch') needs val_loader, held-out (inputs, targets)"
            raise InvalidInput(msg)
        held_out = list(labelled_batches(val_loader, device_of(laplace.model)))
        targets = torch.cat([target for _, target in held_out])
        posterior = laplace.posterior(values[-1])
        rivals = _rivals(predict_dataset(MeanNetwork(laplace.model, posterior), held_out), targets)
        if predictor is Linearised and laplace.hessian_structure != "full":
            cached = CachedLinearised(laplace, posterior, held_out, targets, values, per_layer)
            scores = cached.shared_scores(progress)
            if per_layer:
                score, by_layer = cached.descend(_best(scores), progress)
        elif per_layer:
            msg = "gridsearch by layer needs predictor=Linearised: no other keeps what each layer adds"
            raise InvalidInput(msg)
        else:
            steps = track(values, "prior precision", show=progress, total=len(values))
            scores = [
                _score(predict_dataset(predictor(laplace.model, laplace.posterior(value)), held_out), targets)
                for value in steps
            ]
    else:
        msg = f"method must be 'marglik' or 'gridsearch'; got {method!r}"
        raise InvalidInput(msg)
    best = values[_best(scores)]
    ends = (values[0], values[-1])
    edge = ["the one precision"] if best in ends else []
    by_name = None
    if by_layer is None:
        score = scores[_best(scores)]
    else:
        by_name = _by_name(by_layer, laplace.names)
        best = geometric_mean(by_name, laplace.mean_)
        edge = [path or "the model" for path, value in by_layer.items() if value in ends]
    at_edge = len(values) > 1 and bool(edge)
    where = f" for {', '.join(edge[:3])}{', ...' if len(edge) > 3 else ''}" if by_layer is not None else ""
    verdict = verdict_on(best, score, where if at_edge else None, rivals)
    if at_edge or "does not beat" in verdict:
        warnings.warn(verdict, UserWarning, stacklevel=3)
    found = rivals.get("the MAP network"), rivals.get("a temperature")
    return PriorTuning(method, values, tuple(scores), best, at_edge, *found, verdict, by_name)


def marglik_by_layer(spectrum: Spectrum, mean: Mapping[str, Tensor], lowest: float, highest: float) -> dict[str, float]:
    """The precision of every layer with the highest marginal likelihood, in [lowest, highest].

    Args:
        spectrum: eigenvalues of the curvature by parameter name.
        mean: the weights by name.
        lowest: end of the search.
        highest: the other end.

    Returns:
        by path of the module that owns the parameters.
    """
    found = {}
    for path in layer_paths(mean):
        own = [name for name in mean if name.rpartition(".")[0] == path]
        square = sum(float(mean[name].double().square().sum()) for name in own)
        eigenvalues = torch.cat([spectrum.values[name].flatten() for name in own]).double()

        def slope(a: float, square: float = square, eigenvalues: Tensor = eigenvalues) -> float:
            """Of minus twice the log marginal likelihood in log a, rising."""
            return a * square - float((eigenvalues / (eigenvalues + a)).sum())

        low, high = lowest, highest
        if slope(low) >= 0:
            high = low
        elif slope(high) <= 0:
            low = high
        for _ in range(BISECTIONS if low < high else 0):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if slope(middle) < 0 else (low, middle)
        found[path] = high if low == high else (low * high) ** 0.5
    return found


class CachedLinearised:
    """Held-out scores of the linearised network at any precisions on a grid, from one pass.

    Args:
        laplace: fitted, "diag" or "kron".
        posterior: its own, at any precision.
        held_out: (inputs, targets).
        targets: of all of them.
        grid: prior precisions.
        per_layer: keep what each layer adds apart.

    Raises:
        InvalidInput: even the marginal variances of all combinations exceed `max_memory`.
    """

    def __init__(
        self,
        laplace: "Laplace",
        posterior: Posterior,
        held_out: list[tuple[Any, Tensor]],
        targets: Tensor,
        grid: Sequence[float],
        per_layer: bool,
    ) -> None:
        self.info: PosteriorInfo = laplace.posterior(grid[0]).info
        self.targets, self.size = targets, len(grid)
        self.paths = layer_paths(laplace.names)
        self.grid = tuple(grid)
        spectrum = laplace._fitted()
        model = in_single_precision(snapshot(laplace.model, posterior))
        kinds = len(grid) * (len(self.paths) if per_layer else 1)
        needed = 4 * kinds * len(targets) * _outputs_of_a_row(model, held_out)
        if needed > laplace.max_memory:
            msg = (
                f"the variances of {kinds} covariances on {len(targets)} held-out rows take about "
                f"{needed / 2**20:,.0f} MiB, more than max_memory ({laplace.max_memory / 2**20:,.0f} MiB); "
                f"use fewer rows or a smaller grid, or raise max_memory"
            )
            raise InvalidInput(msg)
        size = sum(value.numel() for value in spectrum.values.values())
        together = max(1, int(laplace.max_memory // (16 * size)))  # grid points whose variances are held at once
        parts = []
        for start in range(0, len(grid), together):
            each = [spectrum.variance(a0, laplace.temperature) for a0 in grid[start : start + together]]
            stacked = {name: torch.stack([variance[name] for variance in each]) for name in laplace.names}
            room = max(1, laplace.max_memory * len(each) // len(grid))
            self.outputs, found = covariance_grid(
                model, held_out, laplace.names, stacked, spectrum.left, spectrum.right, per_layer, room
            )
            parts.append(found if per_layer else found[None])
        self.covariance = torch.cat(parts, 1)  # (L, M, N, R[, R]), L = 1 for all layers together

    def shared_scores(self, progress: bool) -> list[float]:
        """The score with each grid point for all layers."""
        steps = track(range(self.size), "prior precision", show=progress, total=self.size)
        return [self.score(self.covariance[:, k].sum(0)) for k in steps]

    def descend(self, start: int, progress: bool) -> tuple[float, dict[str, float]]:
        """Coordinate descent over the layers from one precision for all: the score, and the precision by layer path."""
        chosen = dict.fromkeys(range(len(self.paths)), start)
        best = self.score(self.covariance[:, start].sum(0))
        for _ in track(range(SWEEPS), "prior precision by layer", show=progress, total=SWEEPS):
            before = dict(chosen)
            for layer in chosen:
                others = sum(self.covariance[m, k] for m, k in chosen.items() if m != layer)
                scores = [self.score(others + own) for own in self.covariance[layer]]
                k = _best(scores)
                if scores[k] < best:
                    best, chosen[layer] = scores[k], k
            if chosen == before:
                break
        return best, {self.paths[layer]: self.grid[k] for layer, k in chosen.items()}

    def score(self, covariance: Tensor) -> float:
        """Mean held-out negative log-likelihood, in nats, of outputs with covariance (N, R, R) or variance (N, R)."""
        return _score(self._prediction(covariance), self.targets)

    def _prediction(self, covariance: Tensor) -> Prediction:
        mean = self.outputs
        square = covariance.dim() == 3
        marginals = (covariance.diagonal(dim1=1, dim2=2) if square else covariance).clamp(min=0)
        variance = marginals.to(mean.dtype).reshape(mean.shape)
        if self.info.likelihood == "regression":
            return regression_prediction(mean, variance, self.info.sigma_noise)
        if square and mean.shape[-1] <= SOBOL_CLASSES:
            root = covariance_root(position_blocks(covariance, mean).to(mean.dtype))
            return ClassificationPrediction(correlated_softmax_link(mean, root), mean, variance)
        return ClassificationPrediction(softmax_link(mean, variance), mean, variance)


def geometric_mean(by_name: Mapping[str, float], mean: Mapping[str, Tensor]) -> float:
    """exp of the mean log precision over all entries of all parameters.

    Args:
        by_name: precisions.
        mean: the parameters, for their sizes.
    """
    logs = [math.log(by_name[name]) * value.numel() for name, value in mean.items()]
    return math.exp(sum(logs) / sum(value.numel() for value in mean.values()))


def _by_name(by_layer: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    return {name: by_layer[name.rpartition(".")[0]] for name in names}


def _outputs_of_a_row(model: nn.Module, held_out: list[tuple[Any, Tensor]]) -> int:
    return outputs_of(model, rows_of(held_out[0][0], slice(0, 1))).numel()


def _best(scores: Sequence[float]) -> int:
    return min(range(len(scores)), key=lambda i: scores[i] if math.isfinite(scores[i]) else math.inf)


def _score(prediction: Prediction, targets: Tensor) -> float:
    return float(log_scores(prediction, targets).mean())


def _rivals(at_mean: Prediction, targets: Tensor) -> dict[str, float | None]:
    """The score of the mean network, and with one fitted temperature."""
    found: dict[str, float | None] = {"the MAP network": _score(at_mean, targets)}
    if isinstance(at_mean, ClassificationPrediction):
        found["a temperature"] = _score(TemperatureScaling().fit(at_mean, targets)(at_mean), targets)
    return found


def verdict_on(best: float, score: float, edge: str | None, rivals: Mapping[str, float | None]) -> str:
    """A tuning in words.

    Args:
        best: prior precision.
        score: its score; lower is better, and a difference of rounding beats nobody.
        edge: where the best lies at an end of the grid, "" if there is but one place; None where it does not.
        rivals: scores of what the posterior should beat, by name.
    """
    parts = [f"prior_precision = {best:.3g}, score {score:.4f}"]
    if edge is not None:
        parts.append(f"this is the edge of the grid{edge}: widen it, the optimum may lie beyond")
    known = {name: value for name, value in rivals.items() if value is not None}
    if known:
        lost = [f"{name} ({value:.4f})" for name, value in known.items() if value - score <= ROUNDING * abs(value)]
        won = [f"{name} ({value:.4f})" for name, value in known.items()]
        parts.append(
            f"the posterior does not beat {' or '.join(lost)} on these data"
            if lost
            else f"the posterior beats {' and '.join(won)}"
        )
    return "; ".join(parts)
