"""Top-label expected calibration error and the reliability curve behind it."""

from dataclasses import dataclass

import numpy as np

from bayespass.errors import InvalidInput

DEFAULT_BINS = 15


@dataclass(frozen=True)
class ReliabilityCurve:
    """Equal-width confidence bins.

    Args:
        edges: (n_bins + 1,) from 0 to 1.
        confidence: (n_bins,) mean confidence; NaN in empty bins.
        accuracy: (n_bins,) share that is right; NaN in empty bins.
        count: (n_bins,) rows.
    """

    edges: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray

    @property
    def expected_calibration_error(self) -> float:
        """Mean |accuracy - confidence| over bins, weighted by rows, in [0, 1]."""
        filled = self.count > 0
        gaps = np.abs(self.accuracy[filled] - self.confidence[filled])
        return float((self.count[filled] * gaps).sum() / self.count.sum())


def reliability_curve(confidence: np.ndarray, correct: np.ndarray, n_bins: int = DEFAULT_BINS) -> ReliabilityCurve:
    """Accuracy against confidence of the predicted class.

    Args:
        confidence: (N,) probability of the predicted class, in [0, 1].
        correct: (N,) whether it is right.
        n_bins: number of equal-width bins.

    Raises:
        InvalidInput: no rows, or confidences of another shape (all class probabilities pooled is
            a different, smaller quantity).

    >>> reliability_curve(np.array([0.8, 0.8]), np.array([1, 0])).expected_calibration_error
    0.30000000000000004
    """
    if confidence.ndim != 1 or confidence.shape != correct.shape or confidence.size == 0:
        msg = f"confidence and correct must be equally long vectors of rows; got {confidence.shape} and {correct.shape}"
        raise InvalidInput(msg)
    edges = np.linspace(0.0, 1.0, n_bins + 1)
    # A bin is open on the left, as in the common definition; 0 joins the first.
    index = np.clip(np.ceil(confidence * n_bins).astype(int) - 1, 0, n_bins - 1)
    count = np.bincount(index, minlength=n_bins)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(index, weights=confidence, minlength=n_bins) / count
        accuracy = np.bincount(index, weights=correct.astype(float), minlength=n_bins) / count
    return ReliabilityCurve(edges, mean_confidence, accuracy, count)
