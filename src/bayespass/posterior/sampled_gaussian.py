"""A Gaussian known through exact draws from it, where its covariance has no form that could be stored."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from bayespass.errors import InvalidInput, require_positive
from bayespass.posterior.base import Posterior, PosteriorInfo, as_generator, choose_names, require_values


class SampledGaussian(Posterior):
    """q(theta) = N(mean, C) with displacements d_1 .. d_S drawn exactly from N(0, C).

    `sample` goes through mean + d_s in a random order without repeats, then through mean - d_s, which are
    exact draws too, and so on: S draws are the stored ones. Everything else is their Monte-Carlo average
    around the known mean, variance sum_s d_s^2 / S with a relative standard error of sqrt(2 / S).

    Draws of such a posterior are usually far from the mean, as of a null space, where only the linearised
    network means what it should; a predictor that samples the network itself may be destroyed by them.

    Args:
        mean: by parameter name, any shapes.
        displacements: (S, *shape) by name, the same S for all.
        info: what it was fitted with.

    Raises:
        InvalidInput: names or shapes do not fit, there is no draw, or a value is not finite.

    >>> q = SampledGaussian({"w": torch.zeros(1)}, {"w": torch.tensor([[1.0], [3.0]])})
    >>> q.variance["w"]
    tensor([5.])
    >>> sorted(float(draw["w"]) for draw in q.sample(4, 0))
    [-3.0, -1.0, 1.0, 3.0]
    """

    kind = "sampled_gaussian"

    def __init__(
        self, mean: Mapping[str, Tensor], displacements: Mapping[str, Tensor], info: PosteriorInfo | None = None
    ) -> None:
        if not mean or set(displacements) != set(mean):
            msg = (
                f"mean and displacements need the same parameter names, at least one; got {sorted(mean)} and "
                f"{sorted(displacements)}"
            )
            raise InvalidInput(msg)
        size = next(iter(displacements.values())).shape[:1]
        if not size or size[0] < 1:
            msg = "a sampled Gaussian needs at least one displacement; draw some with n_samples"
            raise InvalidInput(msg)
        for name, value in mean.items():
            if displacements[name].shape != (*size, *value.shape):
                msg = (
                    f"displacements of {name} must have shape {(*size, *value.shape)}, one per draw; got "
                    f"{tuple(displacements[name].shape)}"
                )
                raise InvalidInput(msg)
            if not (torch.isfinite(value).all() and torch.isfinite(displacements[name]).all()):
                msg = f"mean or displacements of {name} are NaN or infinite; check the training run"
                raise InvalidInput(msg)
        self._mean = {name: value.detach() for name, value in mean.items()}
        self.displacements = {name: displacements[name].detach() for name in mean}
        self.info = info or PosteriorInfo()

    @property
    def mean(self) -> Mapping[str, Tensor]:
        """E[theta] by name."""
        return self._mean

    @property
    def n_draws(self) -> int:
        """S, the number of stored draws."""
        return len(next(iter(self.displacements.values())))

    @property
    def variance(self) -> Mapping[str, Tensor]:
        """Marginal Var[theta] by name, sum_s d_s^2 / S."""
        return {name: value.square().mean(0) for name, value in self.displacements.items()}

    def sample(self, n_samples: int, generator: torch.Generator | int = 0) -> Iterator[dict[str, Tensor]]:
        """The stored draws without repeats, then their mirror images, and so on.

        Args:
            n_samples: how many.
            generator: a seed, or a generator.

        Yields:
            every random parameter by name.
        """
        generator = as_generator(generator)
        order: list[int] = []
        sign = -1
        for _ in range(n_samples):
            if not order:
                order = torch.randperm(self.n_draws, generator=generator, device=generator.device).tolist()
                sign = -sign
            s = order.pop()
            yield {name: mean + sign * self.displacements[name][s].to(mean.dtype) for name, mean in self._mean.items()}

    def subset(self, names: Iterable[str] | Callable[[str], bool]) -> "SampledGaussian":
        """The marginal of these parameters alone; the others become deterministic at the model's weights.

        Args:
            names: the names to keep, or a predicate on names.
        """
        chosen = choose_names(self.names, names)
        return SampledGaussian(
            {n: self._mean[n] for n in chosen}, {n: self.displacements[n] for n in chosen}, self.info
        )

    def rescaled(self, factor: float) -> "SampledGaussian":
        """The same with every displacement multiplied by a number: prior precision alpha becomes alpha / factor^2.

        Args:
            factor: positive.

        Raises:
            InvalidInput: it is not.
        """
        require_positive(factor=factor)
        info = replace(self.info, prior_precision=self.info.prior_precision / factor**2)
        return SampledGaussian(self._mean, {n: d * factor for n, d in self.displacements.items()}, info)

    def covariance_times(self, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cov[theta] x by Monte Carlo, sum_s d_s <d_s, x> / S, by name.

        Args:
            vector: x, a tensor of the parameter's shape for every name.

        Raises:
            InvalidInput: a parameter is missing.
        """
        require_values(self.names, vector)
        along = torch.stack(
            [(d * vector[name]).reshape(len(d), -1).sum(1) for name, d in self.displacements.items()]
        ).sum(0)
        return {name: torch.tensordot(along, d, 1) / self.n_draws for name, d in self.displacements.items()}

    def _tempered(self, temperature: float, info: PosteriorInfo) -> "SampledGaussian":
        displacements = {name: d * temperature**0.5 for name, d in self.displacements.items()}
        return SampledGaussian(self._mean, displacements, info)

    def _tensors(self) -> dict[str, Tensor]:
        parts = {"mean": self._mean, "displacement": self.displacements}
        return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    @classmethod
    def _from_tensors(cls, tensors: Mapping[str, Tensor], names: list[str], info: PosteriorInfo) -> "SampledGaussian":
        mean, displacements = ({name: tensors[f"{part}/{name}"] for name in names} for part in ("mean", "displacement"))
        return cls(mean, displacements, info)
