"""The prior precision of a linearised posterior by held-out likelihood, where draws scale as alpha^-1/2."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bayespass.calibrate.temperature import TemperatureScaling
from bayespass.evaluate.proper_scores import log_scores
from bayespass.posterior.base import PosteriorInfo
from bayespass.posterior.prior_tuning import PriorTuning, verdict_on
from bayespass.predict.sampling import prediction_from_draws
from bayespass.prediction import ClassificationPrediction, concatenate


def search_precision(
    outputs: Sequence[Tensor],
    moved: Sequence[Tensor],
    targets: Sequence[Tensor],
    info: PosteriorInfo,
    grid: Sequence[float],
) -> PriorTuning:
    """Mean held-out negative log-likelihood of f + alpha^-1/2 J d, averaged over draws d, for every alpha.

    Args:
        outputs: f (n, ...) of the trained network, for every batch.
        moved: J d (S, n, ...) at alpha = 1, for every batch; each draw is used with both signs.
        targets: of every batch.
        info: likelihood and noise.
        grid: values of alpha, ascending.

    Returns:
        the search; nothing is warned about here.
    """
    scores = [_score(outputs, [m / alpha**0.5 for m in moved], targets, info) for alpha in grid]
    at_mean = [prediction_from_draws(torch.stack([f, f]), info, 2) for f in outputs]
    map_score = _mean([log_scores(p, y) for p, y in zip(at_mean, targets, strict=True)])
    temperature_score = None
    classes = [p for p in at_mean if isinstance(p, ClassificationPrediction)]
    if classes and len({p.probs.shape[1:] for p in classes}) == 1:
        whole, labels = concatenate(classes), torch.cat(list(targets))
        temperature_score = float(log_scores(TemperatureScaling().fit(whole, labels)(whole), labels).mean())
    best = min(range(len(grid)), key=lambda k: scores[k] if math.isfinite(scores[k]) else math.inf)
    at_edge = len(grid) > 1 and best in (0, len(grid) - 1)
    rivals = {"the trained network": map_score, "a temperature": temperature_score}
    verdict = verdict_on(grid[best], scores[best], "" if at_edge else None, rivals)
    return PriorTuning(
        "gridsearch", tuple(grid), tuple(scores), grid[best], at_edge, map_score, temperature_score, verdict
    )


def _score(outputs: Sequence[Tensor], moved: Sequence[Tensor], targets: Sequence[Tensor], info: PosteriorInfo) -> float:
    """Mean negative log-likelihood of the linearised predictive, in nats."""
    found = []
    for f, gap, y in zip(outputs, moved, targets, strict=True):
        prediction = prediction_from_draws(f + torch.cat([gap, -gap]), info, 2 * len(gap))
        found.append(log_scores(prediction, y))
    return _mean(found)


def _mean(parts: list[Tensor]) -> float:
    return float(torch.cat([part.flatten() for part in parts]).mean())
