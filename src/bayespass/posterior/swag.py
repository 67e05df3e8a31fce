"""SWAG: the Gaussian that the weights walk through late in training.

    swag = SWAG(model.named_parameters(), n_data=len(data), rank=20)
    for epoch in range(epochs):                # with a constant, rather high learning rate
        train_one_epoch(model)
        swag.collect()
    posterior = swag.posterior()

With theta_1 .. theta_n the collected weights, mean their average and D_i = theta_i - mean_i (mean_i
the average of the first i) the last K deviations, a draw is

    mean + sqrt(diag / 2) z_1 + D^T z_2 / sqrt(2 (K - 1)),   diag = max(average of theta^2 - mean^2, 0)

It describes the noise of the optimizer, whose size follows the learning rate and the batch, not the
posterior of a given prior and temperature. Layers with running statistics (batch norm) need them
recomputed at the mean: load `posterior.mean` into the model, then `torch.optim.swa_utils.update_bn`.

Source: Maddox et al. 2019 (arXiv 1902.02476).
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bayespass.errors import InvalidInput, NotFitted
from bayespass.likelihood import Likelihood, SigmaNoise
from bayespass.posterior.base import PosteriorInfo
from bayespass.posterior.low_rank import LowRankGaussian


class SWAG:
    """Collects weights at chosen steps of any optimizer.

    Args:
        params: `model.named_parameters()`; frozen ones are left out.
        n_data: N, for the record.
        rank: K, how many of the last deviations are kept, at least 2.
        likelihood: "classification" or "regression".
        sigma_noise: sd of the observation noise, or "predicted", for regression.

    Raises:
        InvalidInput: nothing that requires a gradient, parameters without names, or a rank below 2.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, Tensor]],
        n_data: int,
        rank: int = 20,
        likelihood: Likelihood = "classification",
        sigma_noise: SigmaNoise | None = None,
    ) -> None:
        if rank < 2:
            msg = f"rank must be at least 2, the low-rank part divides by rank - 1; got {rank}"
            raise InvalidInput(msg)
        self.rank = rank
        self.info = PosteriorInfo(likelihood, n_data, sigma_noise=sigma_noise, method="swag", settings={"rank": rank})
        self._parameters = named(params)
        self.n_collected = 0
        self._mean: dict[str, Tensor] = {}
        self._square: dict[str, Tensor] = {}  # summed squared deviations: theta^2 - mean^2 would cancel
        self._deviations: dict[str, list[Tensor]] = {name: [] for name in self._parameters}

    @torch.no_grad()
    def collect(self) -> None:
        """Take the present weights in.

        Raises:
            InvalidInput: a weight is NaN or infinite.
        """
        for name, parameter in self._parameters.items():
            if not torch.isfinite(parameter).all():
                msg = f"parameter {name} is NaN or infinite; lower the learning rate and collect again"
                raise InvalidInput(msg)
        self.n_collected += 1
        for name, parameter in self._parameters.items():
            value = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
            mean = self._mean.setdefault(name, torch.zeros_like(value))
            square = self._square.setdefault(name, torch.zeros_like(value))
            before = value - mean
            mean += before / self.n_collected
            after = value - mean
            square += before * after
            self._deviations[name] = [*self._deviations[name], after][-self.rank :]

    def posterior(self) -> LowRankGaussian:
        """N(mean, diag / 2 + D^T D / (2 (K - 1))).

        Raises:
            NotFitted: fewer than two collections.
        """
        if self.n_collected < 2:
            msg = f"SWAG needs at least two collections, it has {self.n_collected}; call collect() during training"
            raise NotFitted(msg)
        kept = min(self.rank, self.n_collected)
        return LowRankGaussian(
            {name: mean.clone() for name, mean in self._mean.items()},
            {name: (square / self.n_collected).clamp_(min=0) / 2 for name, square in self._square.items()},
            {name: torch.stack(found) / (2 * (kept - 1)) ** 0.5 for name, found in self._deviations.items()},
            self.info,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs."""
        return {
            "n_collected": self.n_collected,
            "mean": {name: value.clone() for name, value in self._mean.items()},
            "square": {name: value.clone() for name, value in self._square.items()},
            "deviations": {name: torch.stack(found) for name, found in self._deviations.items() if found},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state.

        Args:
            state_dict: what `state_dict` returned.

        Raises:
            InvalidInput: it belongs to other parameters.
        """
        shapes = {name: p.shape for name, p in self._parameters.items()}
        found = {name: value.shape for name, value in state_dict["mean"].items()}
        if found and found != shapes:
            msg = "the state belongs to a model with other parameters; load it into the model that it was made with"
            raise InvalidInput(msg)
        device = {name: p.device for name, p in self._parameters.items()}
        self.n_collected = int(state_dict["n_collected"])
        self._mean, self._square = (
            {name: value.to(device[name], copy=True) for name, value in state_dict[key].items()}
            for key in ("mean", "square")
        )
        deviations = state_dict["deviations"]
        self._deviations = {
            name: list(deviations[name].to(device[name], copy=True)) if name in deviations else [] for name in shapes
        }


def named(params: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The parameters that require gradients, by name.

    Raises:
        InvalidInput: parameters without names, or none that requires a gradient.
    """
    pairs = list(params)
    if any(not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)) for pair in pairs):
        msg = "a posterior needs names; pass model.named_parameters()"
        raise InvalidInput(msg)
    trainable = {name: parameter for name, parameter in pairs if parameter.requires_grad}
    if not trainable:
        msg = "no parameter requires a gradient; a posterior needs at least one that does"
        raise InvalidInput(msg)
    return trainable
