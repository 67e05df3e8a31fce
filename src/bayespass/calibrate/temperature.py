"""Temperature scaling: one number, fitted on labels, that maps a prediction to a prediction."""

from dataclasses import replace

import torch
from torch import Tensor

from bayespass.errors import InvalidInput, NotFitted
from bayespass.likelihood import check_targets
from bayespass.prediction import ClassificationPrediction

SMALLEST, LARGEST = 0.02, 50.0


class TemperatureScaling:
    """p_k proportional to p_k^(1/t), for any predictor; on a MAP network softmax(logits / t).

    `fit` finds the t in [0.02, 50] with the lowest negative log-likelihood, which is convex in
    1/t; calling the fitted object maps a prediction to a prediction, logits divided by t and
    their variance by t^2.

    Source: Guo et al. 2017 (arXiv 1706.04599).
    """

    def __init__(self) -> None:
        self.temperature_: float | None = None

    def fit(self, prediction: ClassificationPrediction, labels: Tensor) -> "TemperatureScaling":
        """Fit on held-out labels.

        Args:
            prediction: (N, C) of any predictor.
            labels: (N,) integers in [0, C).

        Returns:
            itself.

        Raises:
            InvalidInput: not a classification prediction, labels that do not fit, or none at all.
        """
        if not isinstance(prediction, ClassificationPrediction):
            msg = f"TemperatureScaling is for classification; got {type(prediction).__name__}"
            raise InvalidInput(msg)
        labels = check_targets(prediction.probs, labels, "classification")
        if labels.numel() == 0:
            msg = "TemperatureScaling.fit needs at least one label"
            raise InvalidInput(msg)
        log_probs = _log_probs(prediction).double().flatten(0, -2)
        observed = labels.flatten().unsqueeze(-1)

        def slope(inverse: float) -> float:
            """Derivative of the mean negative log-likelihood in 1/t, increasing."""
            tempered = torch.softmax(inverse * log_probs, -1)
            return float(((tempered * log_probs).sum(-1) - log_probs.gather(-1, observed).squeeze(-1)).mean())

        low, high = 1 / LARGEST, 1 / SMALLEST
        for _ in range(60):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if slope(middle) < 0 else (low, middle)
        self.temperature_ = 1 / (low * high) ** 0.5
        return self

    def __call__(self, prediction: ClassificationPrediction) -> ClassificationPrediction:
        """The tempered prediction.

        Args:
            prediction: of any predictor.

        Raises:
            NotFitted: before `fit`.
        """
        if self.temperature_ is None:
            msg = "TemperatureScaling has no temperature yet; call fit(prediction, labels) first"
            raise NotFitted(msg)
        t = self.temperature_
        return replace(
            prediction,
            probs=torch.softmax(_log_probs(prediction) / t, -1),
            logit_mean=prediction.logit_mean / t,
            logit_variance=prediction.logit_variance / t**2,
            notes=(*prediction.notes, f"temperature {t:.3f}"),
        )


def _log_probs(prediction: ClassificationPrediction) -> Tensor:
    return prediction.probs.clamp(min=torch.finfo(prediction.probs.dtype).tiny).log()
