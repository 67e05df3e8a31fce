"""Selective prediction: what happens when the least confident inputs are not answered.

Rows are sorted by confidence, highest first; risk at coverage j/N is the share of errors among the
first j. Rows of equal confidence are answered together or not at all: their errors are spread
evenly, and thresholds never split them, so the order of the data does not matter.
"""

from dataclasses import dataclass

import numpy as np

from bayespass.errors import InvalidInput


@dataclass(frozen=True)
class RiskCoverageCurve:
    """Risk against coverage.

    Args:
        coverage: (N,) j / N for j = 1..N.
        risk: (N,) mean loss of the j most confident rows.
        allowed: (N,) whether a confidence threshold can stop here (no tie is split).
    """

    coverage: np.ndarray
    risk: np.ndarray
    allowed: np.ndarray

    @property
    def aurc(self) -> float:
        """Area under the curve: mean over j of risk(j), in [0, 1]. Lower is better."""
        return float(self.risk.mean())

    @property
    def excess_aurc(self) -> float:
        """AURC above that of a perfect ranking with the same errors (E-AURC)."""
        n = len(self.risk)
        errors = self.risk[-1] * n
        ranks = np.arange(1, n + 1)
        best = np.maximum(0, ranks - (n - errors)) / ranks
        return self.aurc - float(best.mean())

    def coverage_at_risk(self, risk: float) -> float:
        """Largest share of inputs that can be answered at this risk or less (last crossing)."""
        below = np.flatnonzero((self.risk <= risk + 1e-12) & self.allowed)
        return float(self.coverage[below[-1]]) if below.size else 0.0


def risk_coverage_curve(confidence: np.ndarray, losses: np.ndarray) -> RiskCoverageCurve:
    """The curve of 0/1 errors, or of losses in [0, 1].

    Args:
        confidence: (N,) higher means more certain.
        losses: (N,) in [0, 1]; 1 for an error.

    Raises:
        InvalidInput: no rows, different lengths, or a confidence that is NaN.

    Source: Geifman and El-Yaniv 2017 (arXiv 1705.08500); single_pass notes 7.

    >>> risk_coverage_curve(np.array([0.9, 0.8, 0.7]), np.array([0, 0, 1])).coverage_at_risk(0.0)
    0.6666666666666666
    """
    if confidence.ndim != 1 or confidence.shape != losses.shape or confidence.size == 0:
        msg = f"confidence and losses must be equally long vectors of rows; got {confidence.shape} and {losses.shape}"
        raise InvalidInput(msg)
    if np.isnan(confidence).any():
        msg = "confidence is NaN in some rows; the predictor returned invalid probabilities"
        raise InvalidInput(msg)
    values, group, size = np.unique(-confidence, return_inverse=True, return_counts=True)
    group_loss = np.bincount(group, weights=losses.astype(float), minlength=len(values)) / size
    ranks = np.arange(1, confidence.size + 1)
    risk = np.repeat(group_loss, size).cumsum() / ranks
    allowed = np.zeros(confidence.size, dtype=bool)
    allowed[size.cumsum() - 1] = True
    return RiskCoverageCurve(ranks / confidence.size, risk, allowed)
