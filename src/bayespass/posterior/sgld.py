"""Stochastic gradient Langevin dynamics: weights that wander through the posterior.

    method = SGLD(model.named_parameters(), lr=1e-5, n_data=len(data), burn_in=1000, thin=50)
    for inputs, targets in loader:
        method.zero_grad()
        loss(model(inputs), targets).backward()      # the mean over the batch, no L2 term
        method.step()
        method.collect()                             # keeps every thin-th state after the burn-in
    posterior = method.posterior()

With the minibatch score s = -N grad lbar - a0 (theta - theta0), a step is

    theta <- theta + lr/2 s + sqrt(lr T) eps

and the chain has the tempered posterior, precision (N h + a0) / T, as its stationary distribution in
the limit of small lr. `lr` is thus on the scale of a posterior variance: with lambda = N h + a0 the
largest curvature, the chain diverges from lr = 4 / lambda on. Along a direction of curvature lambda a
finite step multiplies the stationary variance by 1 / (1 - lr lambda / 4), and minibatches of size B
add the variance of their score, about lr N^2 Var(grad) / (4 B T) in the same relative unit: halve lr
and see whether the variances move.

One chain stays around one mode. With `cycle` = C steps the learning rate restarts: it falls from lr to zero
as lr/2 (cos(pi (k mod C) / C) + 1), k counting steps from 0. The first `exploration` of every cycle runs without
noise, with steps large enough to reach another mode; the rest samples around it, and only its states are kept.
That stage begins at a point and not in equilibrium: states kept before lr_1 + lr_2 + .. of the stage has reached a
few times 2 / lambda are too narrow along curvature lambda, so `thin` at half of the stage or more. How many
cycles end in a mode follows the size of its basin, not its probability.

Source: Welling and Teh 2011; cycles: Zhang et al. 2020 (arXiv 1902.03932).
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bayespass.errors import InvalidInput, NotFitted, require_count, require_positive
from bayespass.likelihood import Likelihood, SigmaNoise
from bayespass.posterior.base import PosteriorInfo
from bayespass.posterior.draws import stream_seed
from bayespass.posterior.empirical import Empirical
from bayespass.posterior.sampled import PriorMean


class SGLD(Optimizer):
    """A sampler in the shape of an optimizer, without momentum.

    Args:
        params: `model.named_parameters()`, or groups `{"params": [(name, p), ...], "lr": ...}`. Frozen
            parameters are left out.
        lr: step size, on the scale of a posterior variance.
        n_data: N, the number of training points.
        prior_precision: a0 of the prior.
        temperature: T, tempers likelihood and prior alike.
        prior_mean: centre of the prior: None for zero, "initial" for the present weights, or values by
            name, zero for names that are missing.
        burn_in: steps before the first state is kept.
        thin: steps from one kept state to the next.
        likelihood: "classification" or "regression".
        sigma_noise: sd of the observation noise, or "predicted", for regression.
        seed: of the noise; equal seeds give equal chains on one device.
        cycle: steps from one restart of the learning rate to the next; None for a constant one.
        exploration: share of every cycle without noise, in [0, 1).
        momentum: refused.

    Raises:
        InvalidInput: parameters without names or below float32, nothing that requires a gradient,
            momentum, or a value outside its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        n_data: int,
        prior_precision: float = 1.0,
        temperature: float = 1.0,
        prior_mean: PriorMean = None,
        burn_in: int = 0,
        thin: int = 1,
        likelihood: Likelihood = "classification",
        sigma_noise: SigmaNoise | None = None,
        seed: int = 0,
        momentum: float = 0.0,
        cycle: int | None = None,
        exploration: float = 0.25,
    ) -> None:
        require_positive(lr=lr, thin=thin)
        if momentum:
            msg = (
                f"SGLD has no momentum; got momentum={momentum}. It multiplies the stationary variance by "
                f"1 / (1 - momentum), here {1 / max(1 - momentum, 1e-9):.3g}, without a trace in the result"
            )
            raise InvalidInput(msg)
        if burn_in < 0:
            msg = f"burn_in must be at least 0; got {burn_in}"
            raise InvalidInput(msg)
        settings = {"lr": float(lr), "burn_in": burn_in, "thin": thin, "seed": seed}
        self.cycle, self._explored = cycle, 0
        if cycle is not None:
            self._explored = _explored_steps(cycle, exploration, thin)
            settings |= {"cycle": cycle, "exploration": float(exploration)}
        self.info = PosteriorInfo(
            likelihood, n_data, float(prior_precision), float(temperature), sigma_noise, "sgld", settings
        )
        self.burn_in, self.thin, self.seed = burn_in, thin, seed
        self.n_steps = 0
        self._collected = -1  # the step of the last kept state
        self._members: list[dict[str, Tensor]] = []
        super().__init__(params, {"lr": lr, "prior_precision": float(prior_precision)})
        if any("param_names" not in group for group in self.param_groups):
            msg = "SGLD needs names for its posterior; pass model.named_parameters() or groups of (name, parameter)"
            raise InvalidInput(msg)
        if not self._active():
            msg = "no parameter requires a gradient; a posterior needs at least one that does"
            raise InvalidInput(msg)
        for parameter, group, name in self._active():
            require_positive(prior_precision=group["prior_precision"])
            self._begin(parameter, name, prior_mean)

    def _begin(self, parameter: Tensor, name: str, prior_mean: PriorMean) -> None:
        if parameter.dtype not in (torch.float32, torch.float64):
            msg = f"SGLD moves {name} by steps far below what {parameter.dtype} resolves; keep its weights in float32"
            raise InvalidInput(msg)
        if prior_mean == "initial":
            self.state[parameter]["prior_mean"] = parameter.detach().clone()
        elif prior_mean is not None and name in prior_mean:
            centre = prior_mean[name]
            if centre.shape != parameter.shape:
                msg = f"prior_mean of {name} has shape {tuple(centre.shape)}; it needs {tuple(parameter.shape)}"
                raise InvalidInput(msg)
            self.state[parameter]["prior_mean"] = centre.detach().to(parameter, copy=True)

    def _active(self) -> list[tuple[Tensor, dict[str, Any], str]]:
        return [
            (parameter, group, name)
            for group in self.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
            if parameter.requires_grad
        ]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of the chain; parameters without a gradient stay where they are.

        Args:
            closure: computes the loss and its gradients; called once.

        Returns:
            the closure's value, if there is one.

        Raises:
            NotFitted: no parameter has a gradient.
            InvalidInput: a gradient is not finite.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        moved = [(p, p.grad, group, name) for p, group, name in self._active() if p.grad is not None]
        if not moved:
            msg = "no gradient to step on; run loss.backward() before method.step()"
            raise NotFitted(msg)
        for _, gradient, _, name in moved:
            if not torch.isfinite(gradient).all():
                msg = f"the gradient of {name} is NaN or infinite; lower lr, the chain diverges from 4 / curvature on"
                raise InvalidInput(msg)
        generators: dict[torch.device, torch.Generator] = {}
        for parameter, gradient, group, _ in moved:
            device = parameter.device
            if device not in generators:
                generators[device] = torch.Generator(device).manual_seed(stream_seed(self.seed, self.n_steps))
            noise = torch.randn(parameter.shape, generator=generators[device], dtype=parameter.dtype, device=device)
            pull = parameter.detach().clone()
            if "prior_mean" in self.state[parameter]:
                pull -= self.state[parameter]["prior_mean"]
            lr = group["lr"] if self.cycle is None else cyclical_lr(self.n_steps, self.cycle, group["lr"])
            parameter.add_(pull, alpha=-0.5 * lr * group["prior_precision"])
            parameter.add_(gradient, alpha=-0.5 * lr * self.info.n_data)
            if self._sampled_after(self.n_steps):
                parameter.add_(noise, alpha=(lr * self.info.temperature) ** 0.5)
        self.n_steps += 1
        return result

    def collect(self) -> bool:
        """Keep the present state if it is past the burn-in and its turn; once per step at most.

        With cycles, every thin-th of the sampling stage is its turn.

        Returns:
            whether it was kept.
        """
        since = self.n_steps - self.burn_in if self.cycle is None else self._sampled_after(self.n_steps - 1)
        due = self.n_steps > self.burn_in and since > 0 and since % self.thin == 0
        if not due or self.n_steps == self._collected:
            return False
        self._collected = self.n_steps
        self._members.append({name: parameter.detach().clone() for parameter, _, name in self._active()})
        return True

    def _sampled_after(self, step: int) -> int:
        """Steps with noise in the present cycle, up to and with this one; 0 while it explores."""
        if self.cycle is None:
            return step + 1
        return max(0, step % self.cycle - self._explored + 1)

    def posterior(self) -> Empirical:
        """The kept states, equally weighted.

        Raises:
            NotFitted: none was kept.
        """
        if not self._members:
            msg = (
                f"SGLD kept no state in {self.n_steps} steps; call collect() after every step(), "
                f"with burn_in={self.burn_in} and thin={self.thin}"
            )
            raise NotFitted(msg)
        return Empirical(self._members, self.info)

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs, the kept states and the position of the noise included."""
        method = {
            "n_steps": self.n_steps,
            "collected": self._collected,
            "seed": self.seed,
            "members": [dict(member) for member in self._members],
        }
        return {**super().state_dict(), "method": method}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state, bit for bit.

        Args:
            state_dict: what `state_dict` returned.
        """
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "method"})
        method = state_dict["method"]
        self.n_steps, self._collected, self.seed = method["n_steps"], method["collected"], method["seed"]
        devices = {name: parameter.device for parameter, _, name in self._active()}
        self._members = [
            {name: value.to(devices[name], copy=True) for name, value in member.items()} for member in method["members"]
        ]


def cyclical_lr(step: int, steps_per_cycle: int, lr: float) -> float:
    """lr / 2 (cos(pi (step mod C) / C) + 1): from lr down to almost zero, again and again.

    Args:
        step: steps done so far, 0 for the first.
        steps_per_cycle: C.
        lr: at the start of every cycle.

    Source: Zhang et al. 2020 (arXiv 1902.03932), equation 1.

    >>> [round(cyclical_lr(step, 4, 1.0), 3) for step in range(6)]
    [1.0, 0.854, 0.5, 0.146, 1.0, 0.854]
    """
    return 0.5 * lr * (math.cos(math.pi * (step % steps_per_cycle) / steps_per_cycle) + 1)


def _explored_steps(cycle: int, exploration: float, thin: int) -> int:
    """Steps of a cycle without noise.

    Raises:
        InvalidInput: a value outside its range, or a sampling stage too short to keep a state of.
    """
    require_count(cycle=cycle)
    if not 0 <= exploration < 1:
        msg = f"exploration must lie in [0, 1), the share of a cycle without noise; got {exploration}"
        raise InvalidInput(msg)
    explored = math.ceil(exploration * cycle)
    if thin > cycle - explored:
        msg = (
            f"no state would be kept: thin={thin}, but {cycle - explored} of the {cycle} steps of a cycle sample; "
            f"lower thin or exploration, or lengthen the cycle"
        )
        raise InvalidInput(msg)
    return explored
