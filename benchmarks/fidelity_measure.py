"""Every figure of the fidelity benchmark, each with a paired-bootstrap interval over test rows.

All predictors of a test set share the same 500 resamples of its rows (of blocks of neighbouring rows where the
task says so), so that differences are paired. Intervals hold 95 % of the resamples.

The gap is AURC(MAP) - AURC(MC reference), in regression and forecasts the same of the negative log-likelihood
(NLL). `gap_closed` is the share of it that a predictor closes; it means something where the interval of the gap
lies above zero. `equivalent_samples` is S* = a / (KL - a / R): KL(reference || MC-S) = a (1/S + 1/R) is
fitted to the independent MC-16 and MC-64, so that the noise of the reference's own R draws is taken out; at
most 1,000, then `capped`. Rows of equal confidence are answered together; in a resample they come in a
random order, which is the same in all resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bayespass import risk_coverage_curve
from bayespass.evaluate.proper_scores import log_scores
from bayespass.link import correlated_softmax_link, softmax_link
from bayespass.posterior.base import PosteriorInfo
from bayespass.predict.linearised import covariance_root
from bayespass.predict.sampling import prediction_from_draws
from bayespass.prediction import ClassificationPrediction, Prediction, RegressionPrediction, regression_prediction
from fidelity_tasks import Reference

RESAMPLES, LEVEL = 500, 0.95
GROUPS = (4, 8, 16, 64)  # MC-S
FITTED_GROUPS = (16, 64)
LARGEST = 1000.0
RANKED = 4  # members, at most, of a group whose rankings are resampled
RISKS = {"coverage_at_0.5": 0.005, "coverage_at_1": 0.01}
CHUNK = 100
Values = np.ndarray  # (1 + RESAMPLES,): of all rows, then of every resample


@dataclass(frozen=True)
class Rows:
    """What a prediction says about every test row; averaged over the parts of a row in regression.

    Args:
        log_loss: (N,) -log p(target).
        error: (N,) 1 for a wrong class, or the squared error.
        divergence: (N,) KL from the reference.
        gap: (N,) squared error of the output's mean, in units of the reference's variance.
        log_ratio: (N,) log variance over the reference's, None without variance.
        confidence: (N,) of the likeliest class, None in regression.
        same: (N,) 1 where the likeliest class is the reference's, None in regression.
        spread: (N,) variance summed over outputs.
    """

    log_loss: np.ndarray
    error: np.ndarray
    divergence: np.ndarray
    gap: np.ndarray
    log_ratio: np.ndarray | None
    confidence: np.ndarray | None
    same: np.ndarray | None
    spread: np.ndarray


def resampled_counts(n_rows: int, block: int = 1, seed: int = 0) -> np.ndarray:
    """(1 + RESAMPLES, n_rows) how often each row is there; the first line is the data themselves.

    The same for equal sizes, so that seeds of a task, which share their test rows, are resampled together.
    """
    n_blocks = -(-n_rows // block)
    draws = np.random.default_rng(seed).integers(0, n_blocks, (RESAMPLES, n_blocks))
    counts = np.stack([np.bincount(draw, minlength=n_blocks) for draw in draws])
    counts = np.repeat(counts, block, axis=1)[:, :n_rows]
    return np.concatenate([np.ones((1, n_rows), dtype=counts.dtype), counts])


def monte_carlo(reference: Reference, info: PosteriorInfo) -> dict[str, list[Prediction]]:
    """The reference, Monte Carlo of the independent draws in groups, and two ceilings.

    Both put what the reference's draws say of a row's logits through the library's link: mean and variance of each, as
    the published methods know them, or mean and covariance.
    """
    drawn = reference.draws
    found: dict[str, list[Prediction]] = {"mc": [prediction_from_draws(drawn, info, len(drawn))]}
    for size in GROUPS:
        parts = reference.further.split(size)
        found[f"mc{size}"] = [prediction_from_draws(part, info, size) for part in parts]
    mean, variance = drawn.mean(0), drawn.var(0)
    if info.likelihood == "classification":
        centred = drawn - mean
        covariance = torch.einsum("snk,snl->nkl", centred, centred) / (len(drawn) - 1)
        together = correlated_softmax_link(mean, covariance_root(covariance))
        return found | {
            "moments_link": [ClassificationPrediction(softmax_link(mean, variance), mean, variance)],
            "covariance_link": [ClassificationPrediction(together, mean, variance)],
        }
    return found | {"moments_link": [regression_prediction(mean, variance, info.sigma_noise)]}


def rows_of(prediction: Prediction, reference: Prediction, targets: Tensor) -> Rows:
    """The prediction, row by row."""
    (mean, variance), (true_mean, true) = _output(prediction), _output(reference)
    known = bool((variance > 0).all())
    log_loss = log_scores(prediction, targets).reshape(len(targets), -1).mean(1)
    if isinstance(prediction, ClassificationPrediction):
        assert isinstance(reference, ClassificationPrediction)
        error = (prediction.labels != targets).double()
        confidence = prediction.probs.double().amax(-1).numpy()
        same = (prediction.labels == reference.labels).double().numpy()
    else:
        error = (prediction.mean - targets).double().square().reshape(len(targets), -1).mean(1)
        confidence = same = None
    return Rows(
        log_loss=log_loss.numpy(),
        error=error.numpy(),
        divergence=_divergence(reference, prediction).numpy(),
        gap=((mean - true_mean).square() / true).mean(1).numpy(),
        log_ratio=(variance / true).log().mean(1).numpy() if known else None,
        confidence=confidence,
        same=same,
        spread=variance.sum(1).numpy(),
    )


def _output(prediction: Prediction) -> tuple[Tensor, Tensor]:
    """Mean and variance of the output, (N, outputs)."""
    if isinstance(prediction, ClassificationPrediction):
        pair = prediction.logit_mean, prediction.logit_variance
    else:
        pair = prediction.mean, prediction.epistemic
    mean, variance = (values.double().reshape(len(values), -1) for values in pair)
    return mean, variance


def _divergence(reference: Prediction, prediction: Prediction) -> Tensor:
    """(N,) KL(reference || prediction) of class probabilities, or the mean over a row's Gaussians."""
    if isinstance(reference, ClassificationPrediction) and isinstance(prediction, ClassificationPrediction):
        p, q = reference.probs.double(), prediction.probs.double().clamp(min=1e-30)
        return (torch.special.xlogy(p, p) - p * q.log()).sum(-1)
    assert isinstance(reference, RegressionPrediction)
    assert isinstance(prediction, RegressionPrediction)
    ratio = reference.total.double() / prediction.total.double()
    shift = (reference.mean - prediction.mean).double().square() / prediction.total.double()
    return (0.5 * (ratio - 1 - ratio.log() + shift)).reshape(len(ratio), -1).mean(1)


def figures(
    members: Sequence[Rows], true_ranks: np.ndarray, counts: np.ndarray, confidence_ranks: np.ndarray | None = None
) -> dict[str, Values]:
    """Every figure of a predictor for all rows and for every resample; the mean over members, such as MC groups.

    Rankings, which are slow, take the first four members.

    Args:
        members: predictions, row by row.
        true_ranks: `resampled_ranks` of the reference's spread.
        counts: of `resampled_counts`.
        confidence_ranks: `resampled_ranks` of the reference's confidence; None in regression.
    """
    weights = counts / counts.sum(1, keepdims=True)

    def average(values: Sequence[np.ndarray]) -> Values:
        return weights @ np.mean(values, axis=0)

    found = {
        "nll": average([rows.log_loss for rows in members]),
        "kl_to_mc": average([rows.divergence for rows in members]),
        "mean_error": np.sqrt(average([rows.gap for rows in members])),
    }
    ratios = [rows.log_ratio for rows in members if rows.log_ratio is not None]
    if len(ratios) == len(members):
        found["variance_ratio"] = np.exp(average(ratios))
        found["spearman"] = np.mean(
            [rank_correlation(rows.spread, true_ranks, counts) for rows in members[:RANKED]], axis=0
        )
    if members[0].confidence is None:
        return found | {"mse": average([rows.error for rows in members])}
    found["accuracy"] = 1 - average([rows.error for rows in members])
    found["same_answer"] = average([rows.same for rows in members])  # type: ignore[misc]
    if confidence_ranks is not None:
        found["confidence_spearman"] = np.mean(
            [rank_correlation(rows.confidence, confidence_ranks, counts) for rows in members[:RANKED]],  # type: ignore[arg-type]
            axis=0,
        )
    selective = [selective_figures(rows.confidence, rows.error, counts) for rows in members[:RANKED]]  # type: ignore[arg-type]
    return found | {name: np.mean([each[name] for each in selective], axis=0) for name in selective[0]}


def selective_figures(confidence: np.ndarray, losses: np.ndarray, counts: np.ndarray) -> dict[str, Values]:
    """AURC and coverage at every risk of `RISKS`, as `bayespass.risk_coverage_curve` has them, in all resamples."""
    order = np.lexsort((np.random.default_rng(0).random(len(confidence)), -confidence))
    group = np.unique(-confidence[order], return_inverse=True)[1]
    loss = losses[order]
    exact = risk_coverage_curve(confidence, losses)
    ranks = np.arange(1, len(order) + 1)
    parts: list[list[np.ndarray]] = []
    for some in np.split(counts[:, order], range(CHUNK, len(counts), CHUNK)):
        n_rows = some.sum(1).max()
        places = np.repeat(np.tile(np.arange(len(order)), len(some)), some.ravel()).reshape(len(some), n_rows)
        risk = loss[places].cumsum(1) / ranks[:n_rows]
        allowed = np.ones_like(places, dtype=bool)
        allowed[:, :-1] = group[places[:, 1:]] != group[places[:, :-1]]
        found = [risk.mean(1)]
        for level in RISKS.values():
            below = (risk <= level + 1e-12) & allowed
            found.append(np.where(below.any(1), 1 - below[:, ::-1].argmax(1) / n_rows, 0.0))
        parts.append(found)
    found = {name: np.concatenate([part[k] for part in parts]) for k, name in enumerate(("aurc", *RISKS))}
    for name, level in RISKS.items():
        found[name][0] = exact.coverage_at_risk(level)
    found["aurc"][0] = exact.aurc
    return found


def rank_correlation(values: np.ndarray, true_ranks: np.ndarray, counts: np.ndarray) -> Values:
    """Spearman's correlation with the values behind `true_ranks`, in all resamples."""
    ranks = resampled_ranks(values, counts)
    both, one, two = (
        np.einsum("bn,bn,bn->b", counts, a, b, dtype=np.float64)
        for a, b in ((ranks, true_ranks), (ranks, ranks), (true_ranks, true_ranks))
    )
    return both / np.sqrt(one * two)


def resampled_ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(resamples, N) the centred rank of every row in every resample, a repeated row in the middle of its places."""
    order = np.argsort(values, kind="stable")
    sorted_counts = counts[:, order]
    places = sorted_counts.cumsum(1) - (sorted_counts + counts.sum(1, keepdims=True)) / 2
    ranks = np.empty(counts.shape, dtype=np.float32)
    ranks[:, order] = places
    return ranks


def derived(found: dict[str, dict[str, Values]], n_reference: int) -> dict[str, dict[str, Values]]:
    """Figures that compare predictors: shares of the gap, differences and equivalent samples.

    Args:
        found: figures of every predictor, with "map", "mc", "mc16" and the groups.
        n_reference: R, draws of the reference.
    """
    metric = gap_metric(found)
    gap = found["map"][metric] - found["mc"][metric]
    noise = [found[f"mc{size}"]["kl_to_mc"] / (1 / size + 1 / n_reference) for size in FITTED_GROUPS]
    scale = np.mean(noise, axis=0)
    added = {}
    for name, own in found.items():
        excess = own["kl_to_mc"] - scale / n_reference
        with np.errstate(divide="ignore", invalid="ignore"):
            more = {
                "gap": gap,
                "gap_closed": (found["map"][metric] - own[metric]) / gap,
                "over_map": own[metric] - found["map"][metric],
                "over_mc16": own[metric] - found["mc16"][metric],
                "equivalent_samples": np.where(excess > scale / LARGEST, scale / excess, LARGEST),
            }
        added[name] = own | more
    return added


def gap_metric(found: dict[str, dict[str, Values]]) -> str:
    """What the gap is measured in."""
    return "aurc" if "aurc" in found["map"] else "nll"


def interval(values: Values) -> tuple[float, float]:
    """The central interval of the resamples."""
    kept = values[1:][np.isfinite(values[1:])]
    if not len(kept):
        return float("nan"), float("nan")
    low, high = np.quantile(kept, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
