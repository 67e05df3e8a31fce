"""A Gaussian with a diagonal and a low-rank part that ties all parameters together."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from bayespass.errors import InvalidInput
from bayespass.posterior.base import Posterior, PosteriorInfo, as_generator, choose_names, require_values
from bayespass.posterior.mean_field import DiagonalGaussian


class LowRankGaussian(Posterior):
    """q(theta) = N(mean, diag(d) + D^T D), theta all parameters together.

    Draws are mean + sqrt(d) z_1 + D^T z_2 with one z_2 for all parameters, so that entries of different
    layers are correlated too.

    Args:
        mean: by parameter name, any shapes.
        diagonal: d >= 0, the same names and shapes.
        factors: D by name, (R, *shape), the same rank R for all names.
        info: what it was fitted with.

    `variance` is the exact marginal d + sum_r D_r^2; a predictor that uses it ignores the correlations,
    `MonteCarlo` keeps them.

    Raises:
        InvalidInput: names or shapes do not fit, a value is not finite, or d is negative.

    >>> name = {"w": torch.zeros(2)}
    >>> q = LowRankGaussian(name, {"w": torch.ones(2)}, {"w": torch.tensor([[1.0, 2.0]])})
    >>> q.variance["w"]
    tensor([2., 5.])
    """

    kind = "low_rank_gaussian"

    def __init__(
        self,
        mean: Mapping[str, Tensor],
        diagonal: Mapping[str, Tensor],
        factors: Mapping[str, Tensor],
        info: PosteriorInfo | None = None,
    ) -> None:
        checked = DiagonalGaussian(mean, diagonal)
        if set(factors) != set(mean):
            msg = f"mean and factors need the same parameter names; got {sorted(mean)} and {sorted(factors)}"
            raise InvalidInput(msg)
        rank = next(iter(factors.values())).shape[:1]
        for name, value in checked.mean.items():
            if factors[name].shape != (*rank, *value.shape):
                msg = (
                    f"factors of {name} must have shape (rank, *{tuple(value.shape)}), with one rank for all "
                    f"parameters; got {tuple(factors[name].shape)}"
                )
                raise InvalidInput(msg)
            if not torch.isfinite(factors[name]).all():
                msg = f"the factors of {name} are NaN or infinite; check the training run"
                raise InvalidInput(msg)
        self._mean, self._diagonal = checked.mean, checked.variance
        self._factors = {name: factors[name].detach() for name in mean}
        self.rank = rank[0]
        self.info = info or PosteriorInfo()

    @property
    def mean(self) -> Mapping[str, Tensor]:
        """E[theta] by name."""
        return self._mean

    @property
    def variance(self) -> Mapping[str, Tensor]:
        """Marginal Var[theta] = d + sum_r D_r^2 by name."""
        return {name: d + self._factors[name].square().sum(0) for name, d in self._diagonal.items()}

    def sample(self, n_samples: int, generator: torch.Generator | int = 0) -> Iterator[dict[str, Tensor]]:
        """Independent draws mean + sqrt(d) z_1 + D^T z_2.

        Args:
            n_samples: how many.
            generator: a seed, or a generator on the parameters' device.

        Yields:
            every random parameter by name.
        """
        first = next(iter(self._factors.values()))
        generator = as_generator(generator, first.device)
        sd = {name: value.sqrt() for name, value in self._diagonal.items()}
        for _ in range(n_samples):
            shared = torch.randn(self.rank, generator=generator, dtype=first.dtype, device=first.device)
            draw = {}
            for name, mean in self._mean.items():
                own = torch.randn(mean.shape, generator=generator, dtype=sd[name].dtype, device=first.device)
                common = torch.tensordot(shared.to(self._factors[name].dtype), self._factors[name], 1)
                draw[name] = mean + (sd[name] * own + common).to(mean.dtype)
            yield draw

    def subset(self, names: Iterable[str] | Callable[[str], bool]) -> "LowRankGaussian":
        """The posterior of these parameters alone; the others become deterministic at the model's weights.

        Args:
            names: the names to keep, or a predicate on names.
        """
        chosen = choose_names(self.names, names)
        parts = ({n: part[n] for n in chosen} for part in (self._mean, self._diagonal, self._factors))
        return LowRankGaussian(*parts, info=self.info)

    def log_prob(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Log density, in nats, of values for all random parameters (matrix determinant lemma and Woodbury).

        Raises:
            InvalidInput: a parameter is missing, or an entry of d is zero, which leaves no density.
        """
        require_values(self.names, parameters)
        if any(bool((d <= 0).any()) for d in self._diagonal.values()):
            msg = "the diagonal part is zero in places, so there is no density; take the subset of names that vary"
            raise InvalidInput(msg)
        gap = torch.cat([(parameters[n] - m).flatten() for n, m in self._mean.items()])
        diagonal = torch.cat([d.flatten() for d in self._diagonal.values()])
        factors = torch.cat([f.reshape(len(f), -1) for f in self._factors.values()], 1)
        scaled = factors / diagonal
        inner = torch.eye(self.rank, dtype=factors.dtype, device=factors.device) + scaled @ factors.mT
        root = torch.linalg.cholesky(inner)
        along = torch.linalg.solve_triangular(root, (scaled @ gap)[:, None], upper=False)
        distance = (gap.square() / diagonal).sum() - along.square().sum()
        log_det = diagonal.log().sum() + 2 * root.diagonal().log().sum()
        return -0.5 * (distance + log_det + gap.numel() * math.log(2 * math.pi))

    def covariance_times(self, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cov[theta] x = d x + D^T D x, by name.

        Args:
            vector: x, a tensor of the parameter's shape for every name.

        Raises:
            InvalidInput: a parameter is missing.
        """
        require_values(self.names, vector)
        along = torch.stack([(f * vector[name]).reshape(len(f), -1).sum(1) for name, f in self._factors.items()]).sum(0)
        return {
            name: d * vector[name] + torch.tensordot(along, self._factors[name], 1)
            for name, d in self._diagonal.items()
        }

    def _tempered(self, temperature: float, info: PosteriorInfo) -> "LowRankGaussian":
        diagonal = {name: d * temperature for name, d in self._diagonal.items()}
        return LowRankGaussian(self._mean, diagonal, {n: f * temperature**0.5 for n, f in self._factors.items()}, info)

    def _tensors(self) -> dict[str, Tensor]:
        parts = {"mean": self._mean, "diagonal": self._diagonal, "factors": self._factors}
        return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    @classmethod
    def _from_tensors(cls, tensors: Mapping[str, Tensor], names: list[str], info: PosteriorInfo) -> "LowRankGaussian":
        parts = ({n: tensors[f"{part}/{n}"] for n in names} for part in ("mean", "diagonal", "factors"))
        return cls(*parts, info=info)
