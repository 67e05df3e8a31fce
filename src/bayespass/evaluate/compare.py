"""Several predictors of one posterior, on one data set, in one run.

Quality (does the posterior predict well?) and faithfulness (does the predictor match Monte Carlo?)
stand side by side but apart, and every cost is a ratio to the deterministic forward of the same
model on the same batch.
"""

import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bayespass.approximation import NAMED
from bayespass.batches import call_arguments, device_of, labelled_batches
from bayespass.errors import InvalidInput
from bayespass.evaluate.agreement import Agreement, agreement
from bayespass.evaluate.proper_scores import log_scores
from bayespass.evaluate.scores import Scores, evaluate
from bayespass.evaluate.selective import risk_coverage_curve
from bayespass.posterior.base import Posterior
from bayespass.posterior.sampled_gaussian import SampledGaussian
from bayespass.predict.dataset import predict_dataset
from bayespass.predict.linearised import Linearised
from bayespass.predict.propagation import SinglePass
from bayespass.predict.sampling import MeanNetwork, MonteCarlo, prediction_from_draws
from bayespass.prediction import ClassificationPrediction, Prediction
from bayespass.progress import track

DEFAULT_PREDICTORS = ("map", "mc4", "mc16", "mc64", "streamlined", "cvp", "faithful")
UNCALIBRATED = "_uncalibrated"
MAX_DRAWS_BYTES = 4 * 2**30
TIMING_SECONDS = 1.0  # spent on each predictor's cost, as far as one run allows


@dataclass(frozen=True)
class ComparisonRow:
    """One predictor.

    Args:
        predictor: its name.
        prediction: on all rows; for `mcS` of the first group of draws.
        scores: quality, with standard errors over rows; for `mcS` means over groups of draws.
        draw_errors: standard errors of the same figures from the finite number of draws.
        agreement: faithfulness to the Monte-Carlo reference; None for the reference itself.
        gap_closed: share of the MAP to Monte-Carlo gap that it closes (AURC, or NLL for regression); NaN where
            averaging does not measurably help, see `Comparison.averaging_helps`.
        gap_closed_error: its standard error, by paired bootstrap over rows; NaN as well.
        cost_ratio: seconds relative to the deterministic forward, same batch and threads.
    """

    predictor: str
    prediction: Prediction
    scores: Scores
    draw_errors: dict[str, float]
    agreement: Agreement | None
    gap_closed: float
    gap_closed_error: float
    cost_ratio: float


@dataclass(frozen=True)
class Comparison:
    """All predictors on one data set.

    Args:
        rows: one per predictor, the Monte-Carlo reference last.
        targets: (N,) what was to be predicted.
        n_reference: draws of the reference.
        gap_metric: "aurc" or "nll".
        gap: MAP minus Monte Carlo of that metric; positive where averaging helps.
        gap_interval: its 95 % paired-bootstrap interval.
        forward_seconds: the deterministic forward of one batch.
        batch_rows: rows in that batch.
    """

    rows: tuple[ComparisonRow, ...]
    targets: Tensor
    n_reference: int
    gap_metric: str
    gap: float
    gap_interval: tuple[float, float]
    forward_seconds: float
    batch_rows: int

    @property
    def averaging_helps(self) -> bool:
        """Whether the gap's interval lies above zero; elsewhere a share of the gap has no meaning."""
        return self.gap_interval[0] > 0

    def row(self, predictor: str) -> ComparisonRow:
        """The row of this predictor.

        Args:
            predictor: its name, as given to `compare`.

        Raises:
            InvalidInput: it was not compared.
        """
        for row in self.rows:
            if row.predictor == predictor:
                return row
        msg = f"{predictor!r} was not compared; there are {', '.join(r.predictor for r in self.rows)}"
        raise InvalidInput(msg)


def compare(
    model: nn.Module,
    posterior: Posterior,
    loader: Iterable[Any],
    predictors: Sequence[str] = DEFAULT_PREDICTORS,
    scales: Mapping[str, Mapping[str, float]] | None = None,
    n_reference: int = 200,
    n_bootstrap: int = 200,
    seed: int = 0,
    progress: bool = False,
) -> Comparison:
    """Compare predictors of one posterior on labelled data.

    Args:
        model: in eval mode.
        posterior: over any subset of its parameters.
        loader: yields (inputs, targets).
        predictors: "map", "linearised", "mcS" for S draws, an approximation's name ("faithful", "cvp"; with
            its scales if given), or that name with "_uncalibrated" for the same without scales.
        scales: fitted `VarianceScales` by approximation name.
        n_reference: draws R of the Monte-Carlo reference. `mcS` rows are means over its disjoint
            groups of S draws; being part of the reference, their squared distance to it is about
            1 - S/R of that of fresh draws.
            Draws of a null space are for the linearised network: with a `SampledGaussian` the reference is
            that network at all stored draws and their mirror images, whatever R.
        n_bootstrap: resamples of rows for standard errors.
        seed: of draws and resamples.
        progress: show a progress bar.

    Raises:
        InvalidInput: an unknown predictor, an empty loader, or draws beyond 4 GiB.
    """
    if isinstance(posterior, SampledGaussian):
        n_reference = 2 * posterior.n_draws
    specs = [_parse(name, n_reference) for name in predictors]
    batches = list(labelled_batches(loader, device_of(model)))
    targets = torch.cat([target for _, target in batches])
    reference = _by_draws(model, posterior, n_reference, seed)
    mean_network = MeanNetwork(model, posterior)
    with torch.inference_mode():
        draws = _draws(reference, batches, progress)  # (S, N, ...)
        at_mean = predict_dataset(mean_network, batches)
        truth = prediction_from_draws(draws, posterior.info, n_reference)
        made: list[tuple[str, nn.Module, list[Prediction]]] = []
        for name, (kind, argument) in zip(predictors, specs, strict=True):
            if kind == "map":
                made.append((name, mean_network, [at_mean]))
            elif kind == "mc":
                groups = draws[: n_reference // argument * argument].split(argument)
                found = [prediction_from_draws(group, posterior.info, argument) for group in groups]
                made.append((name, _by_draws(model, posterior, argument, seed), found))
            elif kind == "linearised":
                linear = Linearised(model, posterior)
                made.append((name, linear, [predict_dataset(linear, batches)]))
            else:
                own = None if name.endswith(UNCALIBRATED) else (scales or {}).get(argument)
                single = SinglePass(model, posterior, argument, own)
                made.append((name, single, [predict_dataset(single, batches)]))
        made.append((f"mc{n_reference}", reference, [truth]))
        gap = _Gap(at_mean, truth, targets, n_bootstrap, seed)
        forward, costs = _costs(mean_network, [module for _, module, _ in made], batches[0][0])
    rows = []
    blocks = draws.split(max(1, n_reference // 10))
    for (name, _, found), cost in zip(track(made, "scores", show=progress), costs, strict=True):
        each = [evaluate(prediction, targets, n_bootstrap if i == 0 else 1, seed) for i, prediction in enumerate(found)]
        scores, draw_errors = _over_groups(each)
        if found[0] is truth:
            draw_errors = _jackknife(blocks, draws, posterior, targets)
        closed, closed_error = gap.closed(found)
        faithful = None if found[0] is truth else agreement(found[0], truth, n_bootstrap, seed)
        rows.append(ComparisonRow(name, found[0], scores, draw_errors, faithful, closed, closed_error, cost))
    return Comparison(
        tuple(rows), targets.cpu(), n_reference, gap.metric, gap.value, gap.interval, forward, len(batches[0][1])
    )


def _by_draws(model: nn.Module, posterior: Posterior, n_samples: int, seed: int) -> "MonteCarlo | Linearised":
    """The network at draws; the linearised one at those of a `SampledGaussian`, which are for it alone."""
    if isinstance(posterior, SampledGaussian):
        return Linearised(model, posterior, covariance="samples")
    return MonteCarlo(model, posterior, n_samples, seed)


def _parse(name: str, n_reference: int) -> tuple[str, Any]:
    if name in ("map", "linearised"):
        return name, None
    draws = re.fullmatch(r"mc(\d+)", name)
    if draws and 2 <= int(draws[1]) <= n_reference:
        return "mc", int(draws[1])
    base = name.removesuffix(UNCALIBRATED)
    if base in NAMED:
        return "single", base
    msg = (
        f"unknown predictor {name!r}; use 'map', 'linearised', 'mcS' with 2 <= S <= n_reference ({n_reference}), "
        f"or one of {', '.join(map(repr, NAMED))}, each also with {UNCALIBRATED!r}"
    )
    raise InvalidInput(msg)


def _draws(reference: "MonteCarlo | Linearised", batches: list[tuple[Any, Tensor]], progress: bool) -> Tensor:
    parts, size = [], 0
    for inputs, _ in track(batches, "Monte Carlo", show=progress):
        args, kwargs = call_arguments(inputs)
        parts.append(torch.stack(list(reference.outputs(*args, **kwargs))))
        size += parts[-1].nbytes
        if size > MAX_DRAWS_BYTES:
            msg = (
                f"the outputs of {len(parts[-1])} draws need more than {MAX_DRAWS_BYTES / 2**30:.0f} GiB; "
                f"compare on fewer rows or lower n_reference"
            )
            raise InvalidInput(msg)
    return torch.cat(parts, dim=1)


def _over_groups(each: list[Scores]) -> tuple[Scores, dict[str, float]]:
    """Means over groups of draws, and their standard errors from the spread over groups."""
    if len(each) == 1:
        return each[0], {}
    scores, errors = {}, {}
    for name, first in each[0].items():
        values = np.array([scores_of_group[name].value for scores_of_group in each])
        scores[name] = type(first)(float(values.mean()), first.standard_error)
        errors[name] = float(values.std(ddof=1) / np.sqrt(len(values)))
    return scores, errors


def _jackknife(blocks: tuple[Tensor, ...], draws: Tensor, posterior: Posterior, targets: Tensor) -> dict[str, float]:
    """Standard errors of the reference's figures from leaving out one block of draws at a time."""
    size, n = len(blocks[0]), len(blocks)
    left_out = []
    for index in range(n):
        kept = torch.cat([draws[: index * size], draws[(index + 1) * size :]])
        left_out.append(evaluate(prediction_from_draws(kept, posterior.info, len(kept)), targets, 1))
    spread = {name: np.array([scores[name].value for scores in left_out]) for name in left_out[0]}
    return {name: float(np.sqrt((n - 1) / n * ((v - v.mean()) ** 2).sum())) for name, v in spread.items()}


class _Gap:
    """The MAP to Monte-Carlo gap of one metric, on all rows and on paired resamples."""

    def __init__(self, at_mean: Prediction, truth: Prediction, targets: Tensor, n_bootstrap: int, seed: int) -> None:
        self.metric = "aurc" if isinstance(truth, ClassificationPrediction) else "nll"
        self._targets = targets.cpu()
        self._map, self._truth = self._losses(at_mean), self._losses(truth)
        n_rows = len(self._map[0])
        self._all = np.arange(n_rows)
        self._resamples = np.random.default_rng(seed).integers(0, n_rows, (max(2, n_bootstrap), n_rows))
        self.value = self._difference(self._all)
        low, high = np.quantile([self._difference(rows) for rows in self._resamples], [0.025, 0.975])
        self.interval = (float(low), float(high))

    def _losses(self, prediction: Prediction) -> tuple[np.ndarray, np.ndarray]:
        """Per row: confidence and error for "aurc"; the log score, twice, for "nll"."""
        if isinstance(prediction, ClassificationPrediction):
            probs = prediction.probs.detach().cpu().double().flatten(0, -2)
            return probs.amax(-1).numpy(), (probs.argmax(-1) != self._targets.flatten()).numpy()
        scores = log_scores(tree_map(lambda t: t.cpu(), prediction), self._targets)
        per_row = scores.reshape(len(scores), -1).mean(1).numpy()
        return per_row, per_row

    def _metric(self, losses: tuple[np.ndarray, np.ndarray], rows: np.ndarray) -> float:
        confidence, loss = losses
        if self.metric == "nll":
            return float(loss[rows].mean())
        return risk_coverage_curve(confidence[rows], loss[rows]).aurc

    def _difference(self, rows: np.ndarray) -> float:
        return self._metric(self._map, rows) - self._metric(self._truth, rows)

    def closed(self, predictions: list[Prediction]) -> tuple[float, float]:
        """Mean share of the gap that the predictions close, and its standard error over rows; NaN without a gap."""
        if not self.interval[0] > 0:  # `Comparison.averaging_helps`
            return math.nan, math.nan
        each = [self._losses(prediction) for prediction in predictions]

        def closed_on(rows: np.ndarray) -> float:
            gap = self._difference(rows)
            found = float(np.mean([self._metric(losses, rows) for losses in each]))
            return (self._metric(self._map, rows) - found) / gap if gap != 0 else math.nan

        resampled = np.array([closed_on(rows) for rows in self._resamples])
        resampled = resampled[np.isfinite(resampled)]  # a resample without a gap says nothing
        return closed_on(self._all), float(resampled.std(ddof=1)) if len(resampled) > 1 else math.nan


def _costs(mean_network: MeanNetwork, predictors: list[nn.Module], inputs: Any) -> tuple[float, list[float]]:
    """Seconds of the deterministic forward, and every predictor's seconds relative to it.

    Candidate and reference alternate, so that load on the machine hits both; the best of each counts.
    """
    args, kwargs = call_arguments(inputs)
    deterministic = mean_network.model

    def seconds(module: nn.Module) -> float:
        start = time.perf_counter()
        module(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(deterministic)
    forward, best = [], []
    for predictor in predictors:
        first = seconds(predictor)
        repeats = max(1, min(30, int(TIMING_SECONDS / first)))
        pairs = [(seconds(deterministic), seconds(predictor)) for _ in range(repeats)]
        forward += [pair[0] for pair in pairs]
        best.append(min(pair[1] for pair in pairs))
    return min(forward), [value / min(forward) for value in best]
