"""Independent posteriors over different parameters of one model, as one posterior."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bayespass.errors import InvalidInput, InvalidPosteriorFile
from bayespass.posterior.base import (
    Posterior,
    PosteriorInfo,
    as_generator,
    choose_names,
    from_nested,
    nested_structure,
    nested_tensors,
    require_values,
)
from bayespass.posterior.mean_field import DiagonalGaussian

SHARED = ("likelihood", "sigma_noise", "n_data")


class Product(Posterior):
    """q(theta) = prod_k q_k(theta_k), theta_k the parameters of part k.

    A Kronecker Laplace of the body with a full one of the head, say. Correlations between parts are zero by
    construction; those inside a part stay.

    Args:
        parts: posteriors over different names of one model, fitted to the same data. Products among them are
            replaced by their parts.
        info: what it was fitted with; by default that of the first part. Every part keeps its own, and prior
            precision and temperature may differ between them.

    Raises:
        InvalidInput: no part, a name in two parts, or parts that differ in likelihood, sigma_noise or n_data.

    >>> a, b = (DiagonalGaussian({name: torch.zeros(1)}, {name: torch.ones(1)}) for name in "ab")
    >>> Product([a, b]).names
    ('a', 'b')
    """

    kind = "product"

    def __init__(self, parts: Sequence[Posterior], info: PosteriorInfo | None = None) -> None:
        flat = [inner for part in parts for inner in (part.parts if isinstance(part, Product) else (part,))]
        if not flat:
            msg = "a product needs at least one part; got none"
            raise InvalidInput(msg)
        for k, part in enumerate(flat[1:], start=1):
            _check_apart([name for earlier in flat[:k] for name in earlier.names], part.names)
            _check_shared(flat[0].info, part.info, f"part {k}")
        self.parts = tuple(flat)
        self.info = info or flat[0].info

    @property
    def mean(self) -> Mapping[str, Tensor]:
        """E[theta] by name, part after part."""
        return _joined(part.mean for part in self.parts)

    @property
    def variance(self) -> Mapping[str, Tensor]:
        """Marginal Var[theta] by name."""
        return _joined(part.variance for part in self.parts)

    def sample(self, n_samples: int, generator: torch.Generator | int = 0) -> Iterator[dict[str, Tensor]]:
        """Independent draws of all parts, each from a seed of its own.

        Args:
            n_samples: how many.
            generator: a seed, or a generator.

        Yields:
            every random parameter by name.
        """
        generator = as_generator(generator)
        seeds = torch.randint(2**62, (len(self.parts),), generator=generator, device=generator.device).tolist()
        draws = [part.sample(n_samples, seed) for part, seed in zip(self.parts, seeds, strict=True)]
        for drawn in zip(*draws, strict=True):
            yield _joined(drawn)

    def subset(self, names: Iterable[str] | Callable[[str], bool]) -> Posterior:
        """The posterior of these parameters alone; the others become deterministic at the model's weights.

        Args:
            names: the names to keep, or a predicate on names.

        Returns:
            a product, or the one part that is left.
        """
        chosen = set(choose_names(self.names, names))
        kept = [part.subset(own) for part in self.parts if (own := [n for n in part.names if n in chosen])]
        return kept[0] if len(kept) == 1 else Product(kept, self.info)

    def log_prob(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Log density sum_k log q_k(theta_k), in nats, where every part has one.

        Args:
            parameters: a value for every random parameter.

        Raises:
            InvalidInput: a parameter is missing.
        """
        require_values(self.names, parameters)
        terms = [part.log_prob(parameters) for part in self.parts]
        return torch.stack([term.to(terms[0]) for term in terms]).sum()

    def covariance_times(self, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cov[theta] x, by name, where every part has it.

        Args:
            vector: x, a tensor of the parameter's shape for every name.

        Raises:
            InvalidInput: a parameter is missing.
        """
        require_values(self.names, vector)
        return _joined(part.covariance_times(vector) for part in self.parts)

    def _tempered(self, temperature: float, info: PosteriorInfo) -> "Product":
        return Product([part.temper(temperature) for part in self.parts], info)

    def _tensors(self) -> dict[str, Tensor]:
        return nested_tensors("part", self.parts)

    def _structure(self) -> dict[str, Any]:
        return {"parts": nested_structure(self.parts)}

    @classmethod
    def _from_tensors(cls, tensors: Mapping[str, Tensor], names: list[str], info: PosteriorInfo) -> "Product":
        del tensors, names, info
        msg = "the file holds a product without its list of parts; save it again"
        raise InvalidPosteriorFile(msg)

    @classmethod
    def _from_file(
        cls, tensors: Mapping[str, Tensor], names: list[str], info: PosteriorInfo, structure: Mapping[str, Any]
    ) -> "Product":
        if "parts" not in structure:
            return cls._from_tensors(tensors, names, info)
        return cls(from_nested("part", tensors, structure["parts"]), info)


def merged(first: Posterior, second: Posterior) -> Posterior:
    """The posterior over the names of both, independent; see `Posterior.merge`.

    Args:
        first: over some parameters.
        second: over others.
    """
    _check_apart(first.names, second.names)
    _check_shared(first.info, second.info, "the other")
    if isinstance(first, DiagonalGaussian) and isinstance(second, DiagonalGaussian) and first.info == second.info:
        return DiagonalGaussian({**first.mean, **second.mean}, {**first.variance, **second.variance}, first.info)
    return Product([first, second])


def _joined(mappings: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: value for mapping in mappings for name, value in mapping.items()}


def _check_apart(names: Iterable[str], others: Iterable[str]) -> None:
    taken = set(names)
    if both := [name for name in others if name in taken]:
        shown = ", ".join(both[:3]) + (f" and {len(both) - 3} more" if len(both) > 3 else "")
        msg = f"independent posteriors need different parameters; {shown} would be in two. Take subsets first"
        raise InvalidInput(msg)


def _check_shared(info: PosteriorInfo, other: PosteriorInfo, which: str) -> None:
    for name in SHARED:
        one, two = getattr(info, name), getattr(other, name)
        if one != two:
            msg = (
                f"parts of one posterior must share {name}; the first has {one!r}, {which} {two!r}. Fit both to the "
                f"same data and likelihood"
            )
            raise InvalidInput(msg)
