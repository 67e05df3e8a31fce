"""A Gaussian with the whole covariance matrix, for a few thousand parameters at most."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from bayespass.errors import InvalidInput
from bayespass.posterior.base import Posterior, PosteriorInfo, as_generator, choose_names, require_values


class FullGaussian(Posterior):
    """q(theta) = N(mean, R R^T), theta all parameters flattened one after the other.

    Args:
        mean: by parameter name, any shapes.
        root: R (P, K), rows in the order of `mean`; a Cholesky factor, or eigenvectors times the square
            roots of their eigenvalues.
        info: what it was fitted with.

    `variance` is the exact marginal; a predictor that uses it ignores the correlations, `MonteCarlo` keeps
    them.

    Raises:
        InvalidInput: there is no parameter, a value is not finite, or the root does not fit.

    >>> q = FullGaussian({"w": torch.zeros(2)}, torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
    >>> q.variance["w"], q.covariance
    (tensor([1., 5.]), tensor([[1., 1.],
            [1., 5.]]))
    """

    kind = "full_gaussian"

    def __init__(self, mean: Mapping[str, Tensor], root: Tensor, info: PosteriorInfo | None = None) -> None:
        size = sum(value.numel() for value in mean.values())
        if not mean or root.dim() != 2 or root.shape[0] != size:
            msg = (
                f"root must be a matrix with one row for each of the {size} entries of mean, at least one; "
                f"got shape {tuple(root.shape)}"
            )
            raise InvalidInput(msg)
        for name, value in (*mean.items(), ("root", root)):
            if not torch.isfinite(value).all():
                msg = f"{name} is NaN or infinite; check the training run and the prior precision"
                raise InvalidInput(msg)
        self._mean = {name: value.detach() for name, value in mean.items()}
        self._root = root.detach().clone(memory_format=torch.contiguous_format)  # so that equal roots sum alike
        self.info = info or PosteriorInfo()

    @property
    def mean(self) -> Mapping[str, Tensor]:
        """E[theta] by name."""
        return self._mean

    @property
    def variance(self) -> Mapping[str, Tensor]:
        """Marginal Var[theta], the diagonal of R R^T, by name."""
        return self._unflatten(self._root.square().sum(1))

    @property
    def covariance(self) -> Tensor:
        """R R^T (P, P), in the order of the names."""
        return self._root @ self._root.mT

    def sample(self, n_samples: int, generator: torch.Generator | int = 0) -> Iterator[dict[str, Tensor]]:
        """Independent draws mean + R eps.

        Args:
            n_samples: how many.
            generator: a seed, or a generator on the parameters' device.

        Yields:
            every random parameter by name.
        """
        root = self._root
        generator = as_generator(generator, root.device)
        for _ in range(n_samples):
            noise = torch.randn(root.shape[1], generator=generator, dtype=root.dtype, device=root.device)
            gap = self._unflatten(root @ noise)
            yield {name: mean + gap[name].to(mean.dtype) for name, mean in self._mean.items()}

    def subset(self, names: Iterable[str] | Callable[[str], bool]) -> "FullGaussian":
        """The marginal of these parameters alone; the others become deterministic at the model's weights.

        Args:
            names: the names to keep, or a predicate on names.
        """
        chosen = choose_names(self.names, names)
        rows = dict(zip(self._mean, self._root.split([m.numel() for m in self._mean.values()]), strict=True))
        return FullGaussian({n: self._mean[n] for n in chosen}, torch.cat([rows[n] for n in chosen]), self.info)

    def log_prob(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Log density, in nats, of values for all random parameters.

        Raises:
            InvalidInput: a parameter is missing, or the covariance is singular, which leaves no density.
        """
        require_values(self.names, parameters)
        gap = torch.cat([(parameters[name] - mean).flatten() for name, mean in self._mean.items()])
        factor, failed = torch.linalg.cholesky_ex(self.covariance)
        if failed:
            msg = "the covariance is singular, so there is no density; take the subset of names that vary"
            raise InvalidInput(msg)
        distance = torch.linalg.solve_triangular(factor, gap.to(factor.dtype)[:, None], upper=False).square().sum()
        return -0.5 * (distance + len(gap) * math.log(2 * math.pi)) - factor.diagonal().log().sum()

    def covariance_times(self, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cov[theta] x, by name.

        Args:
            vector: x, a tensor of the parameter's shape for every name.

        Raises:
            InvalidInput: a parameter is missing.
        """
        require_values(self.names, vector)
        flat = torch.cat([vector[name].flatten() for name in self._mean]).to(self._root.dtype)
        return self._unflatten(self._root @ (self._root.mT @ flat))

    def _tempered(self, temperature: float, info: PosteriorInfo) -> "FullGaussian":
        return FullGaussian(self._mean, self._root * temperature**0.5, info)

    def _unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        parts = vector.split([mean.numel() for mean in self._mean.values()])
        return {name: part.view(mean.shape) for (name, mean), part in zip(self._mean.items(), parts, strict=True)}

    def _tensors(self) -> dict[str, Tensor]:
        return {f"mean/{name}": value for name, value in self._mean.items()} | {"root": self._root}

    @classmethod
    def _from_tensors(cls, tensors: Mapping[str, Tensor], names: list[str], info: PosteriorInfo) -> "FullGaussian":
        return cls({name: tensors[f"mean/{name}"] for name in names}, tensors["root"], info)
