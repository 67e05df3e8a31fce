"""A diagonal Gaussian: every entry of every parameter independent."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from bayespass.errors import InvalidInput
from bayespass.posterior.base import Posterior, PosteriorInfo, as_generator, choose_names, require_values


class DiagonalGaussian(Posterior):
    """q(theta) = prod_i N(theta_i; mean_i, variance_i).

    Args:
        mean: by parameter name, any shapes.
        variance: the same names and shapes, >= 0.
        info: what it was fitted with.

    Raises:
        InvalidInput: names or shapes differ, a value is not finite, or a variance is negative.

    >>> posterior = DiagonalGaussian({"weight": torch.zeros(2)}, {"weight": torch.ones(2)})
    >>> [draw["weight"].shape for draw in posterior.sample(1, 0)]
    [torch.Size([2])]
    """

    kind = "diagonal_gaussian"

    def __init__(
        self, mean: Mapping[str, Tensor], variance: Mapping[str, Tensor], info: PosteriorInfo | None = None
    ) -> None:
        if set(mean) != set(variance) or not mean:
            msg = (
                f"mean and variance need the same parameter names, at least one; "
                f"got {sorted(mean)} and {sorted(variance)}"
            )
            raise InvalidInput(msg)
        for name, value in mean.items():
            spread = variance[name]
            if value.shape != spread.shape:
                msg = f"mean and variance of {name} differ in shape: {tuple(value.shape)} and {tuple(spread.shape)}"
                raise InvalidInput(msg)
            if not (torch.isfinite(value).all() and torch.isfinite(spread).all()):
                msg = f"parameter {name} has a mean or variance that is NaN or infinite; check the training run"
                raise InvalidInput(msg)
            if bool((spread < 0).any()):
                msg = f"parameter {name} has a negative variance ({float(spread.min()):.3g}); variances must be >= 0"
                raise InvalidInput(msg)
        self._mean = {name: value.detach() for name, value in mean.items()}
        self._variance = {name: variance[name].detach() for name in mean}
        self.info = info or PosteriorInfo()

    @property
    def mean(self) -> Mapping[str, Tensor]:
        """E[theta] by name."""
        return self._mean

    @property
    def variance(self) -> Mapping[str, Tensor]:
        """Var[theta] by name."""
        return self._variance

    def sample(self, n_samples: int, generator: torch.Generator | int = 0) -> Iterator[dict[str, Tensor]]:
        """Independent draws mean + sqrt(variance) eps.

        Args:
            n_samples: how many.
            generator: a seed, or a generator on the parameters' device.

        Yields:
            every random parameter by name.
        """
        device = next(iter(self._mean.values())).device
        generator = as_generator(generator, device)
        sd = {name: value.sqrt() for name, value in self._variance.items()}
        for _ in range(n_samples):
            yield {
                name: torch.addcmul(
                    mean, sd[name], torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=device)
                )
                for name, mean in self._mean.items()
            }

    def subset(self, names: Iterable[str] | Callable[[str], bool]) -> "DiagonalGaussian":
        """The posterior of these parameters alone; the others become deterministic at the model's weights.

        Args:
            names: the names to keep, or a predicate on names.
        """
        chosen = choose_names(self.names, names)
        return DiagonalGaussian({n: self._mean[n] for n in chosen}, {n: self._variance[n] for n in chosen}, self.info)

    def log_prob(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Log density, in nats, of values for all random parameters.

        Raises:
            InvalidInput: a parameter is missing.
        """
        require_values(self.names, parameters)
        terms = [
            -0.5 * ((parameters[name] - mean).square() / self._variance[name] + self._variance[name].log()).sum()
            - 0.5 * mean.numel() * math.log(2 * math.pi)
            for name, mean in self._mean.items()
        ]
        return torch.stack(terms).sum()

    def covariance_times(self, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cov[theta] x, by name.

        Args:
            vector: x, a tensor of the parameter's shape for every name.

        Raises:
            InvalidInput: a parameter is missing.
        """
        require_values(self.names, vector)
        return {name: v * vector[name] for name, v in self._variance.items()}

    def _tempered(self, temperature: float, info: PosteriorInfo) -> "DiagonalGaussian":
        return DiagonalGaussian(self._mean, {n: v * temperature for n, v in self._variance.items()}, info)

    def _tensors(self) -> dict[str, Tensor]:
        return {f"mean/{n}": t for n, t in self._mean.items()} | {f"variance/{n}": t for n, t in self._variance.items()}

    @classmethod
    def _from_tensors(cls, tensors: Mapping[str, Tensor], names: list[str], info: PosteriorInfo) -> "DiagonalGaussian":
        return cls({n: tensors[f"mean/{n}"] for n in names}, {n: tensors[f"variance/{n}"] for n in names}, info)
