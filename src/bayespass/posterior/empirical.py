"""Equally weighted members: a deep ensemble, the states of a Markov chain, checkpoints."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from bayespass.errors import InvalidInput, NotFitted
from bayespass.posterior.base import Posterior, PosteriorInfo, as_generator, choose_names


class Empirical(Posterior):
    """q(theta) = 1/K sum_k delta(theta - theta_k).

    `sample` goes through all members in a random order, then through all again in another, so that K draws
    are every member exactly once and fewer are a random choice without repeats: with `n_samples=K`,
    `MonteCarlo` averages the ensemble itself.

    The variance has divisor K - 1, that of the distribution that the members were drawn from; the draws
    themselves spread by a factor (K - 1) / K less. A single pass treats the members' marginals as one
    Gaussian around the mean of their weights, which for separately trained networks is a point that no
    member visits: `MonteCarlo` is the honest predictor there.

    Args:
        members: weights by parameter name, the same names and shapes in all.
        info: what they were made with.

    Raises:
        InvalidInput: no member, members that differ in names or shapes, or a value that is not finite.

    >>> q = Empirical([{"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}])
    >>> q.mean["w"], q.variance["w"]
    (tensor([2.]), tensor([2.]))
    >>> sorted(float(draw["w"]) for draw in q.sample(2, 0))
    [1.0, 3.0]
    """

    kind = "empirical"

    def __init__(self, members: Sequence[Mapping[str, Tensor]], info: PosteriorInfo | None = None) -> None:
        if not members or not members[0]:
            msg = f"an empirical posterior needs at least one member with at least one parameter; got {len(members)}"
            raise InvalidInput(msg)
        shapes = {name: value.shape for name, value in members[0].items()}
        for k, member in enumerate(members):
            if {name: value.shape for name, value in member.items()} != shapes:
                differing = [n for n in {*shapes, *member} if n not in member or member[n].shape != shapes.get(n)]
                msg = (
                    f"members must have the same names and shapes; member {k} differs from member 0 in "
                    f"{', '.join(sorted(differing)[:3])}"
                )
                raise InvalidInput(msg)
            for name, value in member.items():
                if not torch.isfinite(value).all():
                    msg = f"parameter {name} of member {k} is NaN or infinite; check that training run"
                    raise InvalidInput(msg)
        self.members = tuple({name: member[name].detach() for name in shapes} for member in members)
        self.info = info or PosteriorInfo()

    @cached_property
    def mean(self) -> Mapping[str, Tensor]:  # type: ignore[override]
        """E[theta], the average of the members, by name."""
        return {name: centre.to(self.members[0][name].dtype) for name, (centre, _) in self._moments.items()}

    @property
    def variance(self) -> Mapping[str, Tensor]:
        """Marginal Var[theta] with divisor K - 1, by name.

        Raises:
            NotFitted: there is one member only.
        """
        if len(self.members) == 1:
            msg = "one member has no variance; collect at least two, or use its mean with MeanNetwork"
            raise NotFitted(msg)
        return {name: square / (len(self.members) - 1) for name, (_, square) in self._moments.items()}

    @cached_property
    def _moments(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and summed squared deviation by name, in one pass over the members (Welford)."""
        moments = {}
        for name, value in self.members[0].items():
            exact = torch.promote_types(value.dtype, torch.float32)
            centre, square = value.to(exact, copy=True), torch.zeros_like(value, dtype=exact)
            for count, member in enumerate(self.members[1:], start=2):
                gap = member[name].to(exact) - centre
                centre += gap / count
                square += gap * (member[name].to(exact) - centre)
            moments[name] = centre, square.clamp_(min=0)
        return moments

    def sample(self, n_samples: int, generator: torch.Generator | int = 0) -> Iterator[dict[str, Tensor]]:
        """Members, without repeats within every round of K.

        Args:
            n_samples: how many.
            generator: a seed, or a generator.

        Yields:
            every random parameter by name.
        """
        generator = as_generator(generator)
        size = len(self.members)
        order: list[int] = []
        for _ in range(n_samples):
            if not order:
                order = torch.randperm(size, generator=generator, device=generator.device).tolist()
            yield {name: value.clone() for name, value in self.members[order.pop()].items()}

    def subset(self, names: Iterable[str] | Callable[[str], bool]) -> "Empirical":
        """The posterior of these parameters alone; the others become deterministic at the model's weights.

        Args:
            names: the names to keep, or a predicate on names.
        """
        chosen = choose_names(self.names, names)
        return Empirical([{name: member[name] for name in chosen} for member in self.members], self.info)

    def _tempered(self, temperature: float, info: PosteriorInfo) -> "Empirical":
        """Refused.

        Raises:
            NotImplementedError: always; members are points.
        """
        msg = (
            "members are trained networks, and moving them towards or away from their mean makes networks that nobody "
            "trained; make them at the other temperature: SGLD(temperature=), anchors(temperature=) for an ensemble"
        )
        raise NotImplementedError(msg)

    def _tensors(self) -> dict[str, Tensor]:
        return {f"member/{k}/{name}": value for k, member in enumerate(self.members) for name, value in member.items()}

    @classmethod
    def _from_tensors(cls, tensors: Mapping[str, Tensor], names: list[str], info: PosteriorInfo) -> "Empirical":
        size = len(tensors) // len(names)
        return cls([{name: tensors[f"member/{k}/{name}"] for name in names} for k in range(size)], info)
