"""Prediction: what every predictor returns.

A frozen dataclass of plain tensors, registered as a pytree, so it maps, moves and exports like any
PyTorch result. Variances are variances, never standard deviations; the variance of the latent
output (epistemic) and of the observation (aleatoric) never share a name.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bayespass.errors import InvalidInput
from bayespass.likelihood import SigmaNoise, mean_and_log_variance

AnyPrediction = TypeVar("AnyPrediction", "ClassificationPrediction", "RegressionPrediction")


@dataclass(frozen=True, eq=False)
class ClassificationPrediction:
    """A categorical predictive distribution and the Gaussian over logits behind it.

    Args:
        probs: (..., C) class probabilities, rows sum to one.
        logit_mean: (..., C) mean of the logits.
        logit_variance: (..., C) marginal variance of the logits, epistemic.
        method: how it was made, one word.
        notes: assumptions made, sites scaled, samples drawn.
    """

    probs: Tensor
    logit_mean: Tensor
    logit_variance: Tensor
    method: str = ""
    notes: tuple[str, ...] = ()

    @property
    def confidence(self) -> Tensor:
        """(...,) probability of the likeliest class."""
        return self.probs.amax(-1)

    @property
    def entropy(self) -> Tensor:
        """(...,) entropy of the class probabilities, in nats."""
        return torch.special.entr(self.probs).sum(-1)

    @property
    def labels(self) -> Tensor:
        """(...,) the likeliest class."""
        return self.probs.argmax(-1)


@dataclass(frozen=True, eq=False)
class RegressionPrediction:
    """A Gaussian predictive distribution with its variance split by source.

    Args:
        mean: (...) predicted mean.
        epistemic: (...) variance of the mean, from the posterior.
        aleatoric: (...) variance of the observation noise.
        method: how it was made, one word.
        notes: assumptions made, sites scaled, samples drawn.
    """

    mean: Tensor
    epistemic: Tensor
    aleatoric: Tensor
    method: str = ""
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> Tensor:
        """(...) epistemic plus aleatoric variance."""
        return self.epistemic + self.aleatoric

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Central interval of an observation at the given level.

        Args:
            level: probability inside, in (0, 1).

        Returns:
            lower and upper bound, each of the mean's shape.

        Raises:
            InvalidInput: level outside (0, 1).
        """
        if not 0 < level < 1:
            msg = f"level must lie in (0, 1); got {level}"
            raise InvalidInput(msg)
        z = torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)).item()
        half_width = z * self.total.sqrt()
        return self.mean - half_width, self.mean + half_width


Prediction = ClassificationPrediction | RegressionPrediction


def regression_prediction(
    mean: Tensor,
    variance: Tensor,
    sigma_noise: SigmaNoise | None,
    method: str = "",
    notes: tuple[str, ...] = (),
    noise: Tensor | None = None,
) -> RegressionPrediction:
    """The prediction behind a Gaussian network output: the one place where its variance is split by source.

    With a known `sigma_noise` the output is the predicted mean and the noise has variance
    sigma_noise^2. With `"predicted"` the output's last axis is (mean, log variance s): epistemic is
    the variance of the first entry, aleatoric is E[exp(s)] = exp(E[s] + Var[s] / 2), exact for a
    Gaussian s (the mean of a log-normal), unless the caller has averaged exp(s) over draws.

    Args:
        mean: of the network's output.
        variance: of the network's output, from the posterior.
        sigma_noise: sd of the observation noise, or "predicted".
        method: how it was made, one word.
        notes: assumptions made.
        noise: (...) E[exp(s)] where it is known; only with "predicted".

    Raises:
        InvalidInput: `"predicted"` with an output whose last axis is not of size two.
    """
    if sigma_noise != "predicted":
        known = torch.full_like(mean, float(sigma_noise or 0.0) ** 2)
        return RegressionPrediction(mean, variance, known, method, notes)
    center, log_noise = mean_and_log_variance(mean)
    epistemic, log_noise_variance = mean_and_log_variance(variance)
    if noise is None:
        noise = torch.exp(log_noise + log_noise_variance / 2)
    return RegressionPrediction(center, epistemic, noise, method, notes)


def _tensor_names(cls: type) -> list[str]:
    return [field.name for field in fields(cls) if field.name not in ("method", "notes")]


def _register(cls: type[ClassificationPrediction] | type[RegressionPrediction]) -> None:
    names = _tensor_names(cls)

    def flatten(prediction: Any) -> tuple[list[Tensor], tuple[str, tuple[str, ...]]]:
        return [getattr(prediction, name) for name in names], (prediction.method, prediction.notes)

    def flatten_with_keys(prediction: Any) -> tuple[list[Any], tuple[str, tuple[str, ...]]]:
        return [(pytree.GetAttrKey(name), getattr(prediction, name)) for name in names], flatten(prediction)[1]

    def unflatten(leaves: Any, context: Any) -> Any:
        return cls(*leaves, *context)

    pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=f"bayespass.{cls.__name__}",
        to_dumpable_context=lambda context: [context[0], list(context[1])],
        from_dumpable_context=lambda dumped: (dumped[0], tuple(dumped[1])),
        flatten_with_keys_fn=flatten_with_keys,
    )


_register(ClassificationPrediction)
_register(RegressionPrediction)


def concatenate(predictions: Sequence[AnyPrediction]) -> AnyPrediction:
    """Predictions of several batches as one, along the first axis.

    Raises:
        InvalidInput: no prediction at all.
    """
    if not predictions:
        msg = "there is no prediction to join; the loader yielded no batch"
        raise InvalidInput(msg)
    first = predictions[0]
    joined = {name: torch.cat([getattr(p, name) for p in predictions]) for name in _tensor_names(type(first))}
    return replace(first, **joined)
