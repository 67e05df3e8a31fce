"""The Monte-Carlo teacher of a distillation: output moments and probabilities of unlabelled inputs.

Every group of rows has draws of its own, so that what a small number of draws gets wrong averages
out over groups instead of being learned. Where a draw's mirror image is as likely as the draw, both
are used: terms of odd order in the weight noise then cancel exactly in the mean, which halves its
error at the same cost (measured on a vision transformer of digits at 100 draws).
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bayespass.batches import batch_size, call_arguments, model_output, rows_of
from bayespass.calibrate.inside import Inner, Inside, Place
from bayespass.curvature.forms import is_symmetric
from bayespass.link import Correlation, softmax_link
from bayespass.posterior.base import Posterior, PosteriorInfo
from bayespass.predict.sampling import in_single_precision
from bayespass.predict.snapshot import place, snapshot
from bayespass.prediction import regression_prediction

LATENT = 0.1  # weight of the outputs' Gaussians beside those of the observations, where noise hides most of them


@dataclass(frozen=True)
class Taught:
    """A group of rows and what Monte Carlo says of them.

    Args:
        inputs: as the model takes them.
        mean: (R, C) of the outputs, R rows and positions.
        variance: (R, C), unbiased.
        probs: (R, C) averaged class probabilities; None for regression.
        total: (R, C) variance of the observations, noise included, (R, 1) where the noise is predicted;
            None for classification.
        inner: what the parts of the network give out, where the teacher was asked for it.
    """

    inputs: Any
    mean: Tensor
    variance: Tensor
    probs: Tensor | None
    total: Tensor | None = None
    inner: Inner = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What a student says of the same rows; the fields as in `Taught`."""

    mean: Tensor
    variance: Tensor
    probs: Tensor | None
    total: Tensor | None


class Teacher:
    """Monte-Carlo moments of a model's output under a posterior.

    Args:
        model: in eval mode; it is copied.
        posterior: over any subset of its parameters.
        n_samples: draws, at least 10; half as many and their mirror images where those are draws too.
        inside: look at the parts of the network too.
    """

    def __init__(self, model: nn.Module, posterior: Posterior, n_samples: int, inside: bool = False) -> None:
        self.model = snapshot(model, posterior)
        self.posterior = posterior
        self.mirrored = is_symmetric(posterior)
        self.n_draws = n_samples // 2 if self.mirrored else n_samples
        self.inside = Inside(self.model) if inside else None

    def taught(self, inputs: Any, seed: int) -> Taught:
        """The teacher's answer for one group of rows.

        Args:
            inputs: of the group.
            seed: of its draws.
        """
        info = self.posterior.info
        classifies, predicted = info.likelihood == "classification", info.sigma_noise == "predicted"
        args, kwargs = call_arguments(inputs)
        total, extra, inner = _Running(), None, defaultdict[Place, _Running](_Running)
        with torch.no_grad():
            for outputs, parts in self._draws(args, kwargs, seed):
                total.add(outputs)
                for at, values in parts.items():
                    inner[at].add(values)
                both = torch.stack(outputs)
                found = both.softmax(-1).mean(0) if classifies else both[..., 1:].exp().mean(0) if predicted else None
                if found is not None:
                    extra = found if extra is None else extra + (found - extra) / total.count
        mean, variance = (output_rows(t) for t in total.moments())
        extra = None if extra is None else output_rows(extra)
        # A part that ran under some draws only is the work of random control flow: it says nothing.
        seen = {at: part.moments() for at, part in inner.items() if part.count == total.count}
        if classifies:
            return Taught(inputs, mean, variance, extra, inner=seen)
        return Taught(inputs, mean, variance, None, total_variance(mean, variance, info, extra), seen)

    def _draws(self, args: Any, kwargs: Any, seed: int) -> Iterator[tuple[list[Tensor], dict[Place, list[Tensor]]]]:
        """Outputs of the network and of its parts under every draw, with those under its mirror image if it has one."""

        def output(weights: dict[str, Tensor]) -> tuple[Tensor, dict[Place, Tensor]]:
            found = model_output(functional_call(self.model, place(weights, self.model), args, kwargs))
            return in_single_precision(found), {} if self.inside is None else self.inside.take()

        for draw in self.posterior.sample(self.n_draws, seed):
            runs = [output(draw)]
            if self.mirrored:
                runs.append(output({name: 2 * self.posterior.mean[name] - value for name, value in draw.items()}))
            shared = [at for at in runs[0][1] if all(at in parts for _, parts in runs)]
            yield [found for found, _ in runs], {at: [parts[at] for _, parts in runs] for at in shared}


class _Running:
    """Mean and variance over draws, each given alone or with its mirror image."""

    def __init__(self) -> None:
        self.count = 0
        self._mean: Any = 0.0
        self._square: Any = 0.0
        self._odd_square: Any = 0.0

    def add(self, outputs: list[Tensor]) -> None:
        """Take one draw, or a pair."""
        self.count += 1
        even = torch.stack(outputs).mean(0)
        self._odd_square = self._odd_square + (outputs[0] - even).square()
        gap = even - self._mean
        self._mean = self._mean + gap / self.count
        self._square = self._square + gap * (even - self._mean)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance."""
        # Of a pair (z+, z-): half the difference has mean zero, half the sum is independent of it.
        return self._mean, self._square / (self.count - 1) + self._odd_square / self.count


def output_rows(values: Tensor) -> Tensor:
    """(R, C): every row and position of an output (..., C); (R, 1) of a vector."""
    return values.flatten(0, -2) if values.dim() > 1 else values.reshape(-1, 1)


def total_variance(mean: Tensor, variance: Tensor, info: PosteriorInfo, noise: Tensor | None = None) -> Tensor | None:
    """Variance of the observations behind outputs (R, C); (R, 1) of a predicted noise, None for classification.

    Args:
        mean: (R, C) of the outputs.
        variance: (R, C) of the outputs.
        info: of the posterior.
        noise: (R, 1) the mean predicted noise variance, where it was averaged over draws.
    """
    if info.likelihood == "classification":
        return None
    known = None if noise is None else noise.squeeze(-1)
    total = regression_prediction(mean, variance, info.sigma_noise, noise=known).total
    return total.unsqueeze(-1) if info.sigma_noise == "predicted" else total


def answers(info: PosteriorInfo, correlation: Correlation | None = None) -> Callable[[Tensor, Tensor], Answer]:
    """From mean and variance (R, C) of outputs with this correlation to a student's answer."""

    def answer(mean: Tensor, variance: Tensor) -> Answer:
        classifies = info.likelihood == "classification"
        probs = softmax_link(mean, variance, correlation=correlation) if classifies else None
        return Answer(mean, variance, probs, total_variance(mean, variance, info))

    return answer


def row_correlation(correlation: Correlation | None) -> Correlation | None:
    """The same for outputs as `output_rows` has them; None for outputs without a last axis."""
    if correlation is None or correlation.total.dim() < 2:
        return None
    features, total = (in_single_precision(output_rows(t)) for t in (correlation.features, correlation.total))
    return Correlation(features, in_single_precision(correlation.weight), total)


def joined_moments(
    parts: list[tuple[Tensor, Tensor, Correlation | None]],
) -> tuple[Tensor, Tensor, Correlation | None]:
    """Mean, variance and correlation of all rows; the last where all have one."""
    mean, variance = (torch.cat([part[k] for part in parts]) for k in (0, 1))  # type: ignore[misc]
    known = [part[2] for part in parts if part[2] is not None]
    if len(known) < len(parts):
        return mean, variance, None
    features, total = torch.cat([p.features for p in known]), torch.cat([p.total for p in known])
    return mean, variance, Correlation(features, known[0].weight, total)


def joined(groups: list[Taught]) -> Taught:
    """What the teacher says of all groups, without their inputs."""

    def whole(name: str) -> Tensor | None:
        parts = [getattr(group, name) for group in groups]
        return None if parts[0] is None else torch.cat(parts)

    return Taught(None, *(whole(name) for name in ("mean", "variance", "probs", "total")))  # type: ignore[arg-type]


def distance(found: Answer, truth: Taught) -> Tensor:
    """(R,) how far an answer is from the teacher's, in nats: KL of the predictions plus mean KL of output Gaussians.

    Predictions are class probabilities, or for regression the Gaussians of the observations, the mean over a row's.

    Args:
        found: the answer.
        truth: the teacher's.
    """
    mean, variance, probs = found.mean, found.variance, found.probs
    rounding = (8 * torch.finfo(mean.dtype).eps * truth.mean).square()
    random = truth.variance > rounding.clamp(min=torch.finfo(mean.dtype).tiny)
    true = torch.where(random, truth.variance, variance.detach())
    ratio = true / variance
    divergence = 0.5 * (ratio - 1 - ratio.log() + (truth.mean - mean).square() / variance)
    loss = torch.where(random, divergence, 0.0).mean(-1)
    if truth.total is not None and found.total is not None:
        gap = (truth.mean - mean)[..., : truth.total.shape[-1]]
        least = torch.finfo(mean.dtype).tiny ** 0.5
        ratio = truth.total.clamp(min=least) / found.total.clamp(min=least)
        return LATENT * loss + 0.5 * (ratio - 1 - ratio.log() + gap.square() / found.total.clamp(min=least)).mean(-1)
    if truth.probs is None or probs is None:
        return loss
    tiny = torch.finfo(probs.dtype).tiny
    return loss + (truth.probs * (truth.probs.clamp(min=tiny).log() - probs.clamp(min=tiny).log())).sum(-1)


def split_rows(batches: list[Any], share: float, generator: torch.Generator) -> tuple[list[Any], list[Any]]:
    """The rows of all batches, some of them set apart at random.

    Args:
        batches: inputs, with rows along the leading axis of every tensor.
        share: of the rows that are set apart, at least two.
        generator: of the choice.

    Returns:
        batches of what remains, and of the rows set apart.
    """
    sizes = [batch_size(batch) for batch in batches]
    order = torch.randperm(sum(sizes), generator=generator)
    apart = torch.zeros(len(order), dtype=torch.bool)
    apart[order[: max(2, round(share * len(order)))]] = True
    kept, held_out = [], []
    for batch, chosen in zip(batches, apart.split(sizes), strict=True):
        for rows, part in ((~chosen, kept), (chosen, held_out)):
            if rows.any():
                part.append(rows_of(batch, rows.nonzero().squeeze(1)))
    return kept, held_out


def groups_of(batches: list[Any], size: int) -> list[Any]:
    """The batches in parts of at most `size` rows."""
    return [
        rows_of(batch, torch.arange(n)[start : start + size])
        for batch in batches
        for n in [batch_size(batch)]
        for start in range(0, n, size)
    ]
