"""A mixture of posteriors over the same parameters: several IVON runs, an ensemble of Laplaces."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bayespass.errors import InvalidInput, InvalidPosteriorFile
from bayespass.posterior.base import (
    Posterior,
    PosteriorInfo,
    as_generator,
    from_nested,
    nested_structure,
    nested_tensors,
)


class Mixture(Posterior):
    """q(theta) = sum_k w_k q_k(theta).

    Its moments are exact: mean sum_k w_k m_k, variance sum_k w_k (v_k + m_k^2) - mean^2. But separately
    trained components are separate modes, and the network at their mean is none of them: a single pass
    treats all modes as one wide Gaussian around a point that no component visits. `MonteCarlo`, which
    picks a component for every draw, is the honest predictor; keep the single pass for components
    around one optimum.

    Args:
        components: posteriors over the same names and shapes, mixtures included.
        weights: w_k > 0, scaled to sum to one; equal by default.
        info: what it was fitted with; by default that of the first component.

    Raises:
        InvalidInput: no component, components that differ in names, shapes or likelihood, or weights that
            do not fit.

    >>> from bayespass.posterior.mean_field import DiagonalGaussian
    >>> at = lambda m: DiagonalGaussian({"w": torch.tensor([m])}, {"w": torch.tensor([1.0])})
    >>> mixture = Mixture([at(-2.0), at(2.0)])
    >>> mixture.mean["w"], mixture.variance["w"]  # 1 + 2^2
    (tensor([0.]), tensor([5.]))
    """

    kind = "mixture"

    def __init__(
        self,
        components: Sequence[Posterior],
        weights: Sequence[float] | Tensor | None = None,
        info: PosteriorInfo | None = None,
    ) -> None:
        if not components:
            msg = "a mixture needs at least one component; got none"
            raise InvalidInput(msg)
        for k, component in enumerate(components):
            _check_alike(k, component, components[0])
        given = torch.ones(len(components)) if weights is None else torch.as_tensor(weights).detach().cpu()
        values = given.to(torch.float64)
        if values.shape != (len(components),) or not bool(((values > 0) & torch.isfinite(values)).all()):
            msg = f"weights must be {len(components)} positive numbers, one per component; got {given.tolist()}"
            raise InvalidInput(msg)
        self.components = tuple(components)
        self.weights = values / values.sum()
        self.info = info or components[0].info

    @cached_property
    def mean(self) -> Mapping[str, Tensor]:  # type: ignore[override]
        """E[theta] = sum_k w_k m_k by name."""
        return {
            name: self._average([component.mean[name] for component in self.components]).to(mean.dtype)
            for name, mean in self.components[0].mean.items()
        }

    @cached_property
    def variance(self) -> Mapping[str, Tensor]:  # type: ignore[override]
        """Marginal Var[theta] by name: within components plus between their means."""
        variances = [component.variance for component in self.components]
        result = {}
        for name in self.names:
            means = [_exact(component.mean[name]) for component in self.components]
            centre = self._average(means)  # m_k minus the mean, squared, is what does not cancel
            result[name] = self._average(
                [v[name] + (m - centre).square() for v, m in zip(variances, means, strict=True)]
            )
        return result

    def sample(self, n_samples: int, generator: torch.Generator | int = 0) -> Iterator[dict[str, Tensor]]:
        """Independent draws: a component by its weight, then a draw from it.

        Args:
            n_samples: how many.
            generator: a seed, or a generator.

        Yields:
            every random parameter by name.
        """
        generator = as_generator(generator)
        weights = self.weights.to(generator.device)
        chosen = torch.multinomial(weights, n_samples, replacement=True, generator=generator).tolist()
        seeds = torch.randint(2**62, (len(weights),), generator=generator, device=generator.device).tolist()
        draws = [
            component.sample(chosen.count(k), seed)
            for k, (component, seed) in enumerate(zip(self.components, seeds, strict=True))
        ]
        for k in chosen:
            yield next(iter(draws[k]))

    def subset(self, names: Iterable[str] | Callable[[str], bool]) -> "Mixture":
        """The posterior of these parameters alone; the others become deterministic at the model's weights.

        Args:
            names: the names to keep, or a predicate on names.
        """
        names = names if callable(names) or isinstance(names, str) else list(names)
        return Mixture([component.subset(names) for component in self.components], self.weights, self.info)

    def log_prob(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Log density log sum_k w_k q_k(theta), in nats, where every component has one.

        Args:
            parameters: a value for every random parameter.
        """
        terms = torch.stack([component.log_prob(parameters) for component in self.components])
        return torch.logsumexp(terms + self.weights.log().to(terms.device, terms.dtype), 0)

    def _average(self, values: list[Tensor]) -> Tensor:
        """sum_k w_k x_k, in float32 or better."""
        total = torch.zeros_like(_exact(values[0]))
        for weight, value in zip(self.weights.tolist(), values, strict=True):
            total.add_(value, alpha=weight)
        return total

    def _tempered(self, temperature: float, info: PosteriorInfo) -> "Mixture":
        """Every component tempered and the weights kept.

        The density to the power 1 / T would also move weight towards the higher modes, by an unknown amount
        where components overlap; weights are probabilities of modes, which no temperature here has learned.
        """
        return Mixture([component.temper(temperature) for component in self.components], self.weights, info)

    def _tensors(self) -> dict[str, Tensor]:
        return nested_tensors("component", self.components) | {"weights": self.weights}

    def _structure(self) -> dict[str, Any]:
        return {"components": nested_structure(self.components)}

    @classmethod
    def _from_tensors(cls, tensors: Mapping[str, Tensor], names: list[str], info: PosteriorInfo) -> "Mixture":
        del tensors, names, info
        msg = "the file holds a mixture without its list of components; save it again"
        raise InvalidPosteriorFile(msg)

    @classmethod
    def _from_file(
        cls, tensors: Mapping[str, Tensor], names: list[str], info: PosteriorInfo, structure: Mapping[str, Any]
    ) -> "Mixture":
        if "components" not in structure:
            return cls._from_tensors(tensors, names, info)
        components = from_nested("component", tensors, structure["components"])
        return cls(components, tensors["weights"], info)


def _exact(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _check_alike(k: int, component: Posterior, first: Posterior) -> None:
    shapes, expected = ({name: tuple(m.shape) for name, m in q.mean.items()} for q in (component, first))
    if shapes != expected:
        differing = sorted(name for name in {*shapes, *expected} if shapes.get(name) != expected.get(name))
        msg = (
            f"components of a mixture must have the same names and shapes; component {k} differs from component 0 "
            f"in {', '.join(differing[:3])}. Take the subset that all have"
        )
        raise InvalidInput(msg)
    if (component.info.likelihood, component.info.sigma_noise) != (first.info.likelihood, first.info.sigma_noise):
        msg = (
            f"components of a mixture must share likelihood and sigma_noise; component {k} has "
            f"{component.info.likelihood!r} and {component.info.sigma_noise!r}, component 0 "
            f"{first.info.likelihood!r} and {first.info.sigma_noise!r}"
        )
        raise InvalidInput(msg)
