"""Faithfulness: how closely a predictor matches Monte Carlo on the same posterior.

This is not quality. A predictor can match Monte Carlo on a poor posterior perfectly, and the two
losses of accuracy are reported apart.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bayespass.errors import InvalidInput
from bayespass.evaluate.scores import standard_error
from bayespass.prediction import ClassificationPrediction, Prediction, RegressionPrediction


@dataclass(frozen=True)
class Agreement:
    """Comparison of one predictor with Monte Carlo.

    Args:
        kl: mean KL(Monte Carlo || predictor) of the predictive distributions, in nats.
        kl_standard_error: over rows.
        variance_ratio: geometric mean of predicted over Monte-Carlo variance of the output; NaN if the
            predictor has none.
        variance_ratio_standard_error: over rows.
        spearman: rank correlation of the output's total variance per row; NaN if it is constant.
        spearman_standard_error: by bootstrap over rows.
        mean_error: root mean square of (output mean - Monte-Carlo mean), in Monte-Carlo sd.
        mean_error_standard_error: over rows, first order.
    """

    kl: float
    kl_standard_error: float
    variance_ratio: float
    variance_ratio_standard_error: float
    spearman: float
    spearman_standard_error: float
    mean_error: float
    mean_error_standard_error: float


def agreement(prediction: Prediction, reference: Prediction, n_bootstrap: int = 200, seed: int = 0) -> Agreement:
    """Compare a prediction with a Monte-Carlo reference on the same rows.

    Args:
        prediction: (N, C) of any predictor.
        reference: the same shape, by `MonteCarlo` with many samples.
        n_bootstrap: resamples for the standard error of the rank correlation.
        seed: of the resamples.

    Raises:
        InvalidInput: kinds or shapes differ, or there are fewer than two rows.
    """
    (mean, mine), (true_mean, true) = _output(prediction), _output(reference)
    if type(prediction) is not type(reference) or mine.shape != true.shape or len(mine) < 2:
        msg = (
            f"prediction and reference need the same kind and shape and at least two rows; got "
            f"{type(prediction).__name__} {tuple(mine.shape)} and {type(reference).__name__} {tuple(true.shape)}"
        )
        raise InvalidInput(msg)
    kl = _divergence(reference, prediction)
    log_ratio = (mine / true).log().mean(-1)
    gap = ((mean - true_mean).square() / true).mean(-1)
    mean_error = float(gap.mean().sqrt())
    ratio, ratio_error = float("nan"), float("nan")
    if torch.isfinite(log_ratio).all():
        ratio = float(log_ratio.mean().exp())
        ratio_error = ratio * standard_error(log_ratio.numpy())
    total, total_true = mine.sum(-1).numpy(), true.sum(-1).numpy()
    spearman, spearman_error = float("nan"), float("nan")
    if np.ptp(total) > 0 and np.ptp(total_true) > 0:
        rng = np.random.default_rng(seed)
        draws = rng.integers(0, len(total), (n_bootstrap, len(total)))
        spearman = _spearman(total, total_true)
        spearman_error = float(np.std([_spearman(total[d], total_true[d]) for d in draws], ddof=1))
    return Agreement(
        kl=float(kl.mean()),
        kl_standard_error=standard_error(kl.numpy()),
        variance_ratio=ratio,
        variance_ratio_standard_error=ratio_error,
        spearman=spearman,
        spearman_standard_error=spearman_error,
        mean_error=mean_error,
        mean_error_standard_error=standard_error(gap.numpy()) / (2 * mean_error) if mean_error > 0 else 0.0,
    )


def _output(prediction: Prediction) -> tuple[Tensor, Tensor]:
    """Mean and epistemic variance of the output, (N, C)."""
    if isinstance(prediction, ClassificationPrediction):
        return _rows(prediction.logit_mean), _rows(prediction.logit_variance)
    return _rows(prediction.mean), _rows(prediction.epistemic)


def _divergence(reference: Prediction, prediction: Prediction) -> Tensor:
    """KL(reference || prediction) per row: of class probabilities, or of Gaussians of total variance."""
    if isinstance(reference, ClassificationPrediction) and isinstance(prediction, ClassificationPrediction):
        p, q = _rows(reference.probs), _rows(prediction.probs)
        return (p * ((p + 1e-30).log() - (q + 1e-30).log())).sum(-1)
    assert isinstance(reference, RegressionPrediction)
    assert isinstance(prediction, RegressionPrediction)
    ratio = _rows(reference.total) / _rows(prediction.total)
    shift = (_rows(reference.mean) - _rows(prediction.mean)).square() / _rows(prediction.total)
    return 0.5 * (ratio - 1 - ratio.log() + shift).sum(-1)


def _rows(values: Tensor) -> Tensor:
    values = values.detach().cpu().double()
    return values.flatten(0, -2) if values.dim() > 1 else values.unsqueeze(-1)


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(a, b)[0])  # type: ignore[arg-type]
