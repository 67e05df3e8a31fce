"""The single pass with the exact linearised variance where it decides: one pass up, a few down.

Marginals lose correlations, and in what they lose rows differ: after a global average pool they can rank
inputs backwards. One backward pass through the network per output gives that output's linearised variance

    v_k = g^T Sigma g,   g = d z_k / d theta,

with every correlation between channels, positions and layers. Only the largest logits of a row decide its
class and its confidence, so only theirs are computed; what the exact variances say of the propagated ones,
on average over the row's, corrects the others. Means are those of the single pass.

Source: single_pass notes 3.6 (the full Jacobian has ratio .985-1.03 to Monte Carlo) and 9.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bayespass.approximation import FAITHFUL, Approximation
from bayespass.batches import call_arguments, device_of, input_batches
from bayespass.calibrate.output_variance import OutputVariance, fit_output_variance
from bayespass.calibrate.teacher import Teacher, answers, joined, joined_moments, output_rows, row_correlation
from bayespass.curvature.layers import DEFAULT_MEMORY
from bayespass.curvature.pushforward import PlacedCovariance
from bayespass.errors import InvalidInput, require_count, require_positive
from bayespass.link import Correlation, Link, softmax_link
from bayespass.posterior.base import Posterior
from bayespass.predict.linearised import in_single_precision, ordinary_inputs
from bayespass.predict.propagation import SinglePass
from bayespass.predict.snapshot import snapshot
from bayespass.prediction import ClassificationPrediction, Prediction, regression_prediction
from bayespass.progress import track


class CorrelatedPass(nn.Module):
    """Means by the single pass, the variance of the largest logits exactly as the linearised network has it.

    Args:
        model: in eval mode; it is copied, never modified. Rows of a batch must not interact.
        posterior: over any subset of its parameters.
        approximation: of the single pass.
        scales: of the single pass, see `fit_scales` and `distill`.
        n_outputs: how many outputs of every row are computed exactly: the largest logits (of every position,
            where a row has several), or for regression outputs spread evenly over all of a row's.
        link: how Gaussian logits become probabilities.
        max_memory: bytes that one part of a batch may take, roughly.

    `forward` takes what the model takes and returns a `Prediction`. The linearised variance has its own level, so
    that scales do not reach it; `fit` calibrates it.

    Raises:
        PosteriorMismatch: posterior and model do not fit.
        InvalidInput: a model in training mode, or a value outside its range.
    """

    def __init__(
        self,
        model: nn.Module,
        posterior: Posterior,
        approximation: Approximation | str = FAITHFUL,
        scales: Mapping[str, float] | None = None,
        n_outputs: int = 3,
        link: Link = "auto",
        max_memory: int = DEFAULT_MEMORY,
    ) -> None:
        super().__init__()
        require_count(n_outputs=n_outputs)
        require_positive(max_memory=max_memory)
        self.single_pass = SinglePass(model, posterior, approximation, scales, link)
        with torch.inference_mode(mode=False):
            self.model = in_single_precision(snapshot(model, posterior))
        self.posterior = posterior
        self.info = posterior.info
        self.n_outputs = n_outputs
        self.link: Link = link
        self.max_memory = max_memory
        self.output_variance: OutputVariance | None = None
        self._pushed = PlacedCovariance(self.model, posterior, max_memory)
        self.eval()

    def fit(
        self, loader: Iterable[Any] | Tensor, n_samples: int = 100, seed: int = 0, *, progress: bool = False
    ) -> "CorrelatedPass":
        """Correct the variance's level, and what is left of its spread, to Monte Carlo on unlabelled inputs.

        Args:
            loader: batches of inputs, or one batch, as in `fit_scales`; a few hundred rows.
            n_samples: draws per batch, at least 10.
            seed: of the draws.
            progress: show a progress bar.

        Returns:
            itself.

        Raises:
            InvalidInput: fewer than 10 samples, or no batch.
        """
        if n_samples < 10:
            msg = f"n_samples must be at least 10 to measure variances; got {n_samples}"
            raise InvalidInput(msg)
        self.output_variance = None
        teacher = Teacher(self.model, self.posterior, n_samples)
        taught, found = [], []
        with torch.inference_mode():
            batches = input_batches(loader, device_of(self.model))
            for index, inputs in enumerate(track(batches, "calibration", show=progress)):
                args, kwargs = call_arguments(inputs)
                mean, variance, correlation, _ = self._moments(args, kwargs)
                found.append((output_rows(mean), output_rows(variance), row_correlation(correlation)))
                taught.append(teacher.taught(inputs, seed + index))
        mean, variance, correlation = joined_moments(found)
        self.output_variance = fit_output_variance(mean, variance, joined(taught), answers(self.info, correlation))
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Prediction:
        """The prediction for one batch, called as the model is called.

        Raises:
            InvalidInput: logits without a last axis, or one row exceeds `max_memory`.
        """
        mean, variance, correlation, count = self._moments(args, kwargs)
        kind = "exact" if self._pushed().exact else f"by {self._pushed().n_draws} draws"
        notes = (f"linearised variance of {count} of {mean.shape[-1]} outputs, {kind}",)
        name = f"correlated {self.single_pass.approximation.name}"
        if self.info.likelihood == "regression":
            return regression_prediction(mean, variance, self.info.sigma_noise, name, notes)
        return ClassificationPrediction(
            softmax_link(mean, variance, self.link, correlation), mean, variance, name, notes
        )

    def _moments(self, args: Any, kwargs: Any) -> tuple[Tensor, Tensor, Correlation | None, int]:
        """Mean, variance and correlation of the output, and how many of a row's outputs are exact.

        Raises:
            InvalidInput: logits without a last axis.
        """
        mean, variance, correlation = self.single_pass.correlated_moments(*args, **kwargs)
        classifies = self.info.likelihood == "classification"
        if classifies and mean.dim() < 2:
            msg = f"CorrelatedPass needs logits (rows, ..., C); got shape {tuple(mean.shape)}"
            raise InvalidInput(msg)
        rows = _places_of_largest if classifies else _places_spread_evenly
        with torch.inference_mode(mode=False):
            inputs = ordinary_inputs(self.model, args, kwargs)
            chosen = partial(rows, self.n_outputs)
            found = [
                (chosen(part.outputs), part.marginals())
                for part in self._pushed().chunks(inputs, lambda outputs, _: _scalars(outputs, chosen(outputs)))
            ]
        places = torch.cat([place for place, _ in found])
        exact = torch.cat([value for _, value in found]).reshape(places.shape).to(variance.dtype)
        known = variance if classifies else variance.reshape(len(variance), -1)
        variance = merged(known, places, exact).reshape(mean.shape)
        if self.output_variance is not None:
            variance = self.output_variance(mean, variance)
        return mean, variance, correlation, places.shape[-1]


def merged(variance: Tensor, places: Tensor, exact: Tensor) -> Tensor:
    """The variances with the exact ones in their places, and the others changed as those were on average.

    Args:
        variance: (..., C) propagated.
        places: (..., K) of the exact ones on the last axis.
        exact: (..., K) >= 0.

    Returns:
        (..., C); a row's other variances are multiplied by the geometric mean of exact over propagated.

    >>> merged(torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[0]]), torch.tensor([[4.0]]))
    tensor([[4., 4., 4.]])
    """
    tiny = torch.finfo(variance.dtype).tiny
    exact = exact.clamp(min=0)
    ratio = exact.clamp(min=tiny).log() - variance.gather(-1, places).clamp(min=tiny).log()
    return (variance * ratio.mean(-1, keepdim=True).exp()).scatter(-1, places, exact)


def _places_of_largest(count: int, outputs: Tensor) -> Tensor:
    """(n, ..., K) places of the largest logits."""
    return outputs.detach().topk(min(count, outputs.shape[-1]), -1).indices


def _places_spread_evenly(count: int, outputs: Tensor) -> Tensor:
    """(n, K) places spread over all outputs of a row."""
    width = outputs[0].numel()
    count = min(count, width)
    even = torch.linspace(0, width - 1, count, device=outputs.device).round().long()
    return even.expand(len(outputs), count)


def _scalars(outputs: Tensor, places: Tensor) -> Tensor:
    """(n, R) the outputs in these places."""
    rows = outputs if places.dim() == outputs.dim() else outputs.reshape(len(outputs), -1)
    return rows.gather(-1, places).reshape(len(outputs), -1)
