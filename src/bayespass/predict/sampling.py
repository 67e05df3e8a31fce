"""Monte Carlo: the reference every other predictor is measured against, and the mean network."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bayespass.batches import model_output
from bayespass.errors import InvalidInput
from bayespass.likelihood import mean_and_log_variance
from bayespass.posterior.base import Posterior, PosteriorInfo
from bayespass.predict.snapshot import check_eval, place, snapshot
from bayespass.prediction import ClassificationPrediction, Prediction, regression_prediction


class MonteCarlo(nn.Module):
    """Average of the network over draws from the posterior.

    Args:
        model: any `nn.Module` in eval mode; it is copied, never modified.
        posterior: over any subset of its parameters.
        n_samples: number of draws S, at least 2.
        seed: of the draws. Every batch sees the same draws, so all rows of a data set are
            predicted by the same function.

    `forward` takes what the model takes and returns a `Prediction`: `probs` averages the softmax
    over draws; logit mean and variance are those of the draws (divisor S - 1). With
    `sigma_noise="predicted"` the noise variance averages exp(log variance) over draws.

    Raises:
        PosteriorMismatch: posterior and model do not fit.
        InvalidInput: the model is in training mode, or fewer than two samples.
    """

    def __init__(self, model: nn.Module, posterior: Posterior, n_samples: int = 64, seed: int = 0) -> None:
        super().__init__()
        if n_samples < 2:
            msg = f"n_samples must be at least 2, a variance needs two draws; got {n_samples}"
            raise InvalidInput(msg)
        self.model = snapshot(model, posterior)
        self.posterior = posterior
        self.info = posterior.info
        self.n_samples = n_samples
        self.seed = seed
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Prediction:
        """The prediction for one batch, called as the model is called."""
        outputs = map(in_single_precision, self.outputs(*args, **kwargs))
        mean = next(outputs)
        transform = _averaged(self.info)
        average = None if transform is None else transform(mean)
        square = torch.zeros_like(mean)
        for count, output in enumerate(outputs, start=2):
            gap = output - mean
            mean = mean + gap / count
            square = square + gap * (output - mean)
            if transform is not None and average is not None:
                average = average + (transform(output) - average) / count
        variance = square / (self.n_samples - 1)
        method, notes = f"mc{self.n_samples}", (f"{self.n_samples} draws, seed {self.seed}",)
        return _from_moments(mean, variance, average, self.info, method, notes)

    def outputs(self, *args: Any, **kwargs: Any) -> Iterator[Tensor]:
        """The network's output under each draw, in order.

        Yields:
            the output tensor, of the shape the model returns.
        """
        check_eval(self.model)
        for draw in self.posterior.sample(self.n_samples, self.seed):
            yield model_output(functional_call(self.model, place(draw, self.model), args, kwargs))


class MeanNetwork(nn.Module):
    """The deterministic network at the posterior mean (the MAP network), as a predictor.

    Args:
        model: any `nn.Module` in eval mode; it is copied, never modified.
        posterior: whose mean is used.

    `forward` returns a `Prediction` without epistemic variance.
    """

    def __init__(self, model: nn.Module, posterior: Posterior) -> None:
        super().__init__()
        self.model = snapshot(model, posterior)
        self.info = posterior.info
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Prediction:
        """The prediction for one batch, called as the model is called."""
        check_eval(self.model)
        output = model_output(self.model(*args, **kwargs))
        if self.info.likelihood == "regression":
            return regression_prediction(output, torch.zeros_like(output), self.info.sigma_noise, "map")
        return ClassificationPrediction(torch.softmax(output, -1), output, torch.zeros_like(output), "map")


def in_single_precision(output: Tensor) -> Tensor:
    """Half-precision outputs as float32: running means of many draws need the digits."""
    return output.float() if output.dtype in (torch.float16, torch.bfloat16) else output


def prediction_from_draws(outputs: Tensor, info: PosteriorInfo, n_samples: int) -> Prediction:
    """The Monte-Carlo prediction of outputs that were drawn already.

    Args:
        outputs: (S, ...) the network's output under each draw, S at least 2.
        info: of the posterior.
        n_samples: S, for the method's name.
    """
    outputs = in_single_precision(outputs)
    mean, variance = outputs.mean(0), outputs.var(0)
    transform = _averaged(info)
    average = None if transform is None else transform(outputs).mean(0)
    return _from_moments(mean, variance, average, info, f"mc{n_samples}", (f"{n_samples} draws",))


def _averaged(info: PosteriorInfo) -> Callable[[Tensor], Tensor] | None:
    """What is averaged over draws besides the output: the probabilities, or a predicted noise variance."""
    if info.likelihood == "classification":
        return lambda output: torch.softmax(output, -1)
    if info.sigma_noise == "predicted":
        return lambda output: mean_and_log_variance(output)[1].exp()
    return None


def _from_moments(
    mean: Tensor, variance: Tensor, average: Tensor | None, info: PosteriorInfo, method: str, notes: tuple[str, ...]
) -> Prediction:
    if info.likelihood == "classification":
        assert average is not None
        return ClassificationPrediction(average, mean, variance, method, notes)
    return regression_prediction(mean, variance, info.sigma_noise, method, notes, average)
