"""A cascade: a cheap predictor for every input, an expensive one for those it is least sure of.

A row goes to the expensive predictor when its score under the cheap one exceeds a threshold. The threshold is
fitted once, on inputs without labels, so that the stated share of such inputs goes; from then on a row's
prediction does not depend on what else is in its batch.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bayespass.batches import batch_size, call_arguments, device_of, input_batches, rows_of
from bayespass.errors import InvalidInput, NotFitted, require_positive
from bayespass.prediction import ClassificationPrediction, Prediction, RegressionPrediction
from bayespass.progress import track

Score = Literal["epistemic", "entropy", "confidence", "margin"]


class Cascade(nn.Module):
    """One cheap pass for all rows of a batch, an expensive predictor for a stated share of them.

    Args:
        cheap: a predictor of every row, such as a calibrated `SinglePass`.
        expensive: a predictor of the rows that are sent on, such as `MonteCarlo`; of the same model, returning
            the same kind of prediction. Rows of a batch must not interact in it.
        budget: expected share of rows that are sent on, in [0, 1]. Inputs that are harder than those of `fit`
            exceed it.
        score: which rows are sent on, those where it is high under `cheap`. `"epistemic"` is the row's summed
            variance of logits (or of the regression mean); `"entropy"`, `"confidence"` (one minus it) and
            `"margin"` (one minus the difference of the two largest probabilities) are those of the class
            probabilities, a mean over positions where a row has several. Or a function of the prediction,
            returning one number per row.
        threshold: of the score, where it was fitted before.

    `forward` takes what the model takes and returns one `Prediction` with rows of both; its notes count the rows
    that were sent on in this batch. Which rows go depends on values, so that it neither compiles nor exports
    whole.

    Which score: rows are ranked by confidence when some are not answered, and those of least confidence stand at
    the end of that ranking already. Sending them on brings the probabilities closer to those of `expensive`, and
    the ranking hardly further than rows taken at random would. Rows of large epistemic variance, confident ones
    among them, are those whose confidence may be wrong; on a small vision transformer they served both, hence
    the default. Confidences of two predictors are ranked together here, and rank badly if one is surer than the
    other throughout: give `cheap` its scales (`fit_scales`) and `expensive` enough samples.

    Raises:
        InvalidInput: budget outside [0, 1], an unknown score, a threshold that is not a number, or predictors
            of different likelihoods.
    """

    _threshold: Tensor

    def __init__(
        self,
        cheap: nn.Module,
        expensive: nn.Module,
        budget: float = 0.2,
        score: Score | Callable[[Prediction], Tensor] = "epistemic",
        threshold: float | None = None,
    ) -> None:
        super().__init__()
        if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 <= budget <= 1:
            msg = f"budget is a share of rows and must lie in [0, 1]; got {budget!r}"
            raise InvalidInput(msg)
        if not callable(score) and score not in get_args(Score):
            msg = f"score must be one of {get_args(Score)} or a function of the prediction; got {score!r}"
            raise InvalidInput(msg)
        if threshold is not None and math.isnan(threshold):
            msg = "threshold is NaN; pass the one that fit found, or None and call fit"
            raise InvalidInput(msg)
        predictors: tuple[Any, ...] = (cheap, expensive)
        kinds = [predictor.info.likelihood for predictor in predictors if hasattr(predictor, "info")]
        if len(set(kinds)) > 1:
            msg = f"cheap and expensive must have one likelihood; got {kinds[0]!r} and {kinds[1]!r}"
            raise InvalidInput(msg)
        self.cheap = cheap
        self.expensive = expensive
        self.budget = float(budget)
        self.score: Score | Callable[[Prediction], Tensor] = score
        if threshold is None and budget in (0, 1):
            threshold = math.inf if budget == 0 else -math.inf
        self.register_buffer("_threshold", torch.tensor(math.nan if threshold is None else threshold).double())
        self.eval()

    @property
    def threshold(self) -> float | None:
        """Of the score, kept in `state_dict`; None before `fit`."""
        value = float(self._threshold)
        return None if math.isnan(value) else value

    def fit(self, batches: Iterable[Any], *, progress: bool = False) -> "Cascade":
        """Set the threshold that the share `budget` of these inputs exceeds; only `cheap` runs.

        Args:
            batches: a loader of inputs, or one batch, unlike the training data: a network is surer of what it
                has memorised, and more rows than stated would exceed the threshold. Targets are not read. With
                N inputs the share of new ones has a standard deviation of about sqrt(budget (1 - budget) / N).
            progress: show a progress bar.

        Returns:
            itself.

        Raises:
            InvalidInput: no batch, too few rows for this budget, or a score that does not tell rows apart.
        """
        if self.budget in (0, 1):
            return self
        found = []
        with torch.inference_mode():
            for inputs in track(input_batches(batches, device_of(self.cheap)), "cascade", show=progress):
                args, kwargs = call_arguments(inputs)
                found.append(self.scores(self.cheap(*args, **kwargs)).cpu())
        scores = torch.cat(found)
        sent = self.budget * len(scores)
        if not 1 <= sent <= len(scores) - 1:
            msg = f"a budget of {self.budget:g} needs more inputs than {len(scores)} to fit a threshold"
            raise InvalidInput(msg)
        values, counts = scores.unique(return_counts=True)
        if len(values) == 1:
            msg = f"the score is {float(values[0]):g} for every input; choose another, or another cheap predictor"
            raise InvalidInput(msg)
        above = len(scores) - counts.cumsum(0)[:-1]  # rows that exceed each value
        self._threshold.fill_(float(values[(above - sent).abs().argmin()]))
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Prediction:
        """The prediction for one batch, called as the model is called.

        Raises:
            NotFitted: there is no threshold yet.
            InvalidInput: the two predictions are not of one kind and shape.
        """
        threshold = self.threshold
        if threshold is None:
            msg = "the cascade has no threshold; call fit(inputs without labels), or pass threshold="
            raise NotFitted(msg)
        first = self.cheap(*args, **kwargs)
        rows = (self.scores(first) > threshold).nonzero()[:, 0]
        note = f"{len(rows)} of {batch_size((args, kwargs))} rows by the expensive predictor"
        if len(rows) == 0:
            return replace(first, method="cascade", notes=(*first.notes, note))
        arguments, keywords = rows_of((args, kwargs), rows)
        second = self.expensive(*arguments, **keywords)
        note += f" ({second.method})" if second.method else ""
        return _with_rows(first, second, rows, (*first.notes, note))

    def scores(self, prediction: Prediction) -> Tensor:
        """(B,) how much each row would gain from the expensive predictor, by `score`.

        Raises:
            InvalidInput: a score of probabilities of a regression, or a function that does not return one
                finite number per row.
        """
        if callable(self.score):
            found = self.score(prediction)
            rows = len(prediction.probs if isinstance(prediction, ClassificationPrediction) else prediction.mean)
            if not isinstance(found, Tensor) or found.shape != (rows,):
                shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                msg = f"score must return one number per row, shape ({rows},); got {shape}"
                raise InvalidInput(msg)
        else:
            found = _score(prediction, self.score)
        if torch.isnan(found).any():
            msg = "the score is NaN in some rows; the cheap predictor returned invalid values"
            raise InvalidInput(msg)
        return found.detach().float()

    def expected_cost(self, cheap: float, expensive: float) -> float:
        """Cost per row, cheap + budget * expensive, in the unit of the two costs.

        Args:
            cheap: of the cheap predictor for one row, for example in plain forward passes.
            expensive: of the expensive one.

        Raises:
            InvalidInput: a cost that is not positive.
        """
        require_positive(cheap=cheap, expensive=expensive)
        return cheap + self.budget * expensive


def _score(prediction: Prediction, name: Score) -> Tensor:
    """(B,) the named score, a mean over positions.

    Raises:
        InvalidInput: a score of class probabilities, of a regression.
    """
    if name == "epistemic":
        regression = isinstance(prediction, RegressionPrediction)
        variance = prediction.epistemic if regression else prediction.logit_variance
        return variance.flatten(1).sum(1) if variance.dim() > 1 else variance
    if isinstance(prediction, RegressionPrediction):
        msg = f"score {name!r} is one of class probabilities; use 'epistemic' for a regression"
        raise InvalidInput(msg)
    if name == "margin":
        top = prediction.probs.topk(2, -1).values
        found = 1 - (top[..., 0] - top[..., 1])
    else:
        found = prediction.entropy if name == "entropy" else 1 - prediction.confidence
    return found.flatten(1).mean(1) if found.dim() > 1 else found


def _with_rows(first: Prediction, second: Prediction, rows: Tensor, notes: tuple[str, ...]) -> Prediction:
    """The first prediction with some of its rows replaced.

    Raises:
        InvalidInput: kinds or shapes differ.
    """
    names = ("probs", "logit_mean", "logit_variance")
    if not isinstance(first, ClassificationPrediction):
        names = ("mean", "epistemic", "aleatoric")
    if type(first) is not type(second) or getattr(first, names[0])[rows].shape != getattr(second, names[0]).shape:
        found = [(type(p).__name__, tuple(pytree.tree_leaves(p)[0].shape)) for p in (first, second)]
        msg = f"cheap and expensive must return one kind of prediction, the second of {len(rows)} rows; got {found}"
        raise InvalidInput(msg)
    merged = {}
    for name in names:
        values = getattr(first, name)
        merged[name] = values.index_copy(0, rows, getattr(second, name).to(values))
    return replace(first, **merged, method="cascade", notes=notes)
