"""Every quality figure of a prediction in one call, each with its standard error.

Means over rows have the usual standard error; figures that are no means (calibration error, areas
and coverages) get one by bootstrap over rows. scikit-learn computes what it offers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_map

from bayespass.errors import InvalidInput
from bayespass.evaluate.calibration_error import reliability_curve
from bayespass.evaluate.proper_scores import brier_scores, log_scores
from bayespass.evaluate.selective import risk_coverage_curve
from bayespass.likelihood import check_targets
from bayespass.prediction import ClassificationPrediction, Prediction, RegressionPrediction

RISKS = (0.005, 0.01, 0.05)


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error."""

    value: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.standard_error:.2g}"


Scores = dict[str, Estimate]


def evaluate(prediction: Prediction, targets: Tensor, n_bootstrap: int = 200, seed: int = 0) -> Scores:
    """Quality figures by name.

    Classification: `accuracy`, `nll` (nats), `brier` (sum over classes, [0, 2]), `ece` (top label,
    15 bins), `aurc`, `e_aurc`, `coverage_at_0.5`, `coverage_at_1`, `coverage_at_5` (share of rows
    answered at 0.5, 1 and 5 % risk, with the threshold chosen on these rows).
    Regression: `nll` (nats), `rmse`, `coverage_95` (share of targets inside the 95 % interval),
    `interval_width_95` (mean width).

    Each class label counts as one row, positions of a sequence included; for regression a row is
    an entry of the first axis.

    Args:
        prediction: of any predictor.
        targets: (N,) class labels, or values of the mean's shape.
        n_bootstrap: resamples for figures that are not means.
        seed: of the resamples.

    Returns:
        an `Estimate` per figure.

    Raises:
        InvalidInput: targets that do not fit, or no rows.
    """
    targets = targets.detach().cpu()
    if targets.numel() == 0:
        msg = "evaluate needs at least one row"
        raise InvalidInput(msg)
    if isinstance(prediction, RegressionPrediction):
        return _regression(prediction, targets)
    return _classification(prediction, targets, n_bootstrap, seed)


def _classification(prediction: ClassificationPrediction, labels: Tensor, n_bootstrap: int, seed: int) -> Scores:
    from sklearn.metrics import accuracy_score, brier_score_loss

    prediction = tree_map(lambda t: t.detach().cpu().flatten(0, -2), prediction)
    labels = labels.flatten()
    labels = check_targets(prediction.probs, labels, "classification")
    probs = prediction.probs.double()
    probs = (probs / probs.sum(-1, keepdim=True)).numpy()
    right = (prediction.labels == labels).numpy()
    confidence = prediction.confidence.double().numpy()
    observed = labels.numpy()
    classes = np.arange(probs.shape[1])
    brier = float(brier_score_loss(observed, probs, labels=classes, scale_by_half=False))  # type: ignore[arg-type]
    scores = {
        "accuracy": Estimate(float(accuracy_score(observed, prediction.labels.numpy())), standard_error(right)),
        # Not log_loss, which clips at 36 nats and so flatters a predictor that is certain and wrong.
        "nll": _mean(log_scores(prediction, labels).numpy()),
        "brier": Estimate(brier, standard_error(brier_scores(prediction, labels).numpy())),
    }

    def figures(rows: np.ndarray) -> dict[str, float]:
        curve = risk_coverage_curve(confidence[rows], ~right[rows])
        reliability = reliability_curve(confidence[rows], right[rows])
        found = {"ece": reliability.expected_calibration_error, "aurc": curve.aurc, "e_aurc": curve.excess_aurc}
        return found | {f"coverage_at_{100 * risk:g}": curve.coverage_at_risk(risk) for risk in RISKS}

    return scores | bootstrap(figures, len(labels), n_bootstrap, seed)


def _regression(prediction: RegressionPrediction, targets: Tensor) -> Scores:
    prediction = tree_map(lambda t: t.detach().cpu(), prediction)
    error = _per_row((targets - prediction.mean).double().square())
    rmse = float(np.sqrt(error.mean()))
    low, high = prediction.interval(0.95)
    return {
        "nll": _mean(_per_row(log_scores(prediction, targets))),
        "rmse": Estimate(rmse, standard_error(error) / (2 * rmse) if rmse > 0 else 0.0),
        "coverage_95": _mean(_per_row(((targets >= low) & (targets <= high)).double())),
        "interval_width_95": _mean(_per_row((high - low).double())),
    }


def _per_row(values: Tensor) -> np.ndarray:
    """Means over everything but the first axis: outputs of one row are no independent evidence."""
    return values.reshape(len(values), -1).mean(1).numpy()


def bootstrap(
    figures: Callable[[np.ndarray], dict[str, float]], n_rows: int, n_bootstrap: int, seed: int
) -> dict[str, Estimate]:
    """Figures on all rows, with standard errors over resampled rows.

    Args:
        figures: maps row indices to named figures.
        n_rows: number of rows N.
        n_bootstrap: number of resamples.
        seed: of the resamples.
    """
    rng = np.random.default_rng(seed)
    values = figures(np.arange(n_rows))
    resampled = [figures(rng.integers(0, n_rows, n_rows)) for _ in range(n_bootstrap)]
    spread = {
        name: float(np.std([r[name] for r in resampled], ddof=1)) if n_bootstrap > 1 else np.nan for name in values
    }
    return {name: Estimate(value, spread[name]) for name, value in values.items()}


def _mean(values: np.ndarray) -> Estimate:
    return Estimate(float(values.mean()), standard_error(values))


def standard_error(values: np.ndarray) -> float:
    """Standard error of a mean over rows; NaN for a single row."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
