"""Proper scoring rules, row by row: log score and Brier score."""

import math

import torch
from torch import Tensor

from bayespass.likelihood import check_targets
from bayespass.prediction import ClassificationPrediction, Prediction


def log_scores(prediction: Prediction, targets: Tensor) -> Tensor:
    """-log p(target), in nats, one per row (per entry for regression). Lower is better.

    Args:
        prediction: (..., C) classification, or (...) regression with its total variance.
        targets: (...,) class labels, or values of the mean's shape.

    Returns:
        (...,) float64.
    """
    if isinstance(prediction, ClassificationPrediction):
        targets = check_targets(prediction.probs, targets, "classification")
        probs = prediction.probs.double().clamp(min=torch.finfo(torch.float32).tiny)
        return -probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1).log()
    targets = check_targets(prediction.mean, targets, "regression")
    total = prediction.total.double()
    return 0.5 * ((2 * math.pi * total).log() + (targets - prediction.mean).double().square() / total)


def brier_scores(prediction: ClassificationPrediction, labels: Tensor) -> Tensor:
    """sum_k (p_k - 1{y = k})^2, one per row, in [0, 2]. Lower is better.

    Args:
        prediction: (..., C).
        labels: (...,) integers in [0, C).

    Returns:
        (...,) float64.
    """
    labels = check_targets(prediction.probs, labels, "classification")
    probs = prediction.probs.double()
    observed = torch.zeros_like(probs).scatter(-1, labels.unsqueeze(-1), 1.0)
    return (probs - observed).square().sum(-1)
