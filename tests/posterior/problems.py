"""Problems with a known posterior."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LinearRegression:
    """y = x w + noise with a Gaussian prior: the posterior precision is X^T X / s^2 + a0."""

    inputs: Tensor
    targets: Tensor
    sigma_noise: float = 0.5
    prior_precision: float = 2.0

    @property
    def precision(self) -> Tensor:
        d = self.inputs.shape[1]
        return self.inputs.T @ self.inputs / self.sigma_noise**2 + self.prior_precision * torch.eye(
            d, dtype=self.inputs.dtype
        )

    @property
    def mean(self) -> Tensor:
        return torch.linalg.solve(self.precision, self.inputs.T @ self.targets / self.sigma_noise**2).squeeze(1)

    def model(self) -> nn.Module:
        """One weight vector, started at zero."""
        model = nn.Linear(self.inputs.shape[1], 1, bias=False, dtype=self.inputs.dtype)
        nn.init.zeros_(model.weight)
        return model

    def loss(self, model: nn.Module, rows: Tensor | slice = slice(None)) -> Tensor:
        """Mean negative log-likelihood up to a constant."""
        return (model(self.inputs[rows]) - self.targets[rows]).square().mean() / (2 * self.sigma_noise**2)


def linear_regression(n: int = 400, d: int = 5, seed: int = 0, dtype: torch.dtype = torch.float32) -> LinearRegression:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator, dtype=dtype) / d**0.5 + torch.eye(d, dtype=dtype)
    inputs = torch.randn(n, d, generator=generator, dtype=dtype) @ mixing
    weights = torch.randn(d, 1, generator=generator, dtype=dtype)
    return LinearRegression(inputs, inputs @ weights + 0.5 * torch.randn(n, 1, generator=generator, dtype=dtype))
