"""IVON: a diagonal Gaussian posterior learned at the price of AdamW.

Improved variational online Newton (Shen et al. 2024, arXiv 2402.17641), written from the update
equations. Per parameter, with lambda = N / T, delta = a0 / N and a loss that is the MEAN negative
log-likelihood of the batch:

    eps ~ N(0, 1 / (lambda (h + delta))),  theta = m + eps,  G = gradient of the loss at theta
    g  <- b1 g + (1 - b1) mean G
    f   = lambda (h + delta) mean(eps G)                 an unbiased estimate of the mean Hessian
    h  <- b2 h + (1 - b2) f + (1 - b2)^2 (h - f)^2 / (2 (h + delta))
    u   = (g / (1 - b1^t) + delta m) / (h + delta)
    m  <- m - A clip(u, -xi, xi),  A = lr (h0 + delta)   (or lr, with rescale_lr=False)

and the posterior is N(m, 1 / (lambda (h + delta))), that is precision (N h + a0) / T.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bayespass.errors import InvalidInput, NotFitted
from bayespass.likelihood import Likelihood
from bayespass.posterior.base import PosteriorInfo, as_generator
from bayespass.posterior.mean_field import DiagonalGaussian

STATE = ("momentum", "hessian")


class IVON(Optimizer):
    """Optimizer whose state is a posterior.

        method = IVON(model.named_parameters(), lr=0.1, n_data=len(data))
        for inputs, targets in loader:
            with method.sampled():
                loss(model(inputs), targets).backward()      # the mean over the batch, no L2 term
            method.step()
        posterior = method.posterior()

    Args:
        params: `model.named_parameters()`, or groups `{"params": [(name, p), ...], "lr": ...}`.
        lr: learning rate; with `rescale_lr` on the scale of SGD.
        n_data: N, the number of training points.
        prior_precision: a0 of the prior N(0, 1/a0); the L2 term is part of the update.
        temperature: T; below 1 the posterior is colder than Bayes, precision (N h + a0) / T.
        hess_init: h0 > 0; sets the initial sd 1 / sqrt(N/T (h0 + a0/N)).
        betas: momentum and Hessian averaging; the second must average over about one epoch.
        clip_radius: xi, largest entry of the preconditioned update.
        rescale_lr: multiply the learning rate by (h0 + delta).
        seed: of the weight noise.
        likelihood: recorded in the posterior.
        sigma_noise: recorded in the posterior, for regression.

    Several `sampled()` blocks before one `step()` average over several weight samples or
    micro-batches. Each block starts from zero gradients and leaves none behind, and restores the
    mean weights on every way out, errors included.

    Raises:
        InvalidInput: parameters without names, or a value outside its range.

    Source: arXiv 2402.17641; posterior notes 3.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        n_data: int,
        prior_precision: float = 1.0,
        temperature: float = 1.0,
        hess_init: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.99999),
        clip_radius: float = float("inf"),
        rescale_lr: bool = True,
        seed: int = 0,
        likelihood: Likelihood = "classification",
        sigma_noise: float | None = None,
    ) -> None:
        for name, value in {"lr": lr, "hess_init": hess_init, "clip_radius": clip_radius}.items():
            if not value > 0:
                msg = f"{name} must be positive; got {value}"
                raise InvalidInput(msg)
        if not all(0 <= beta < 1 for beta in betas):
            msg = f"betas must lie in [0, 1); got {betas}"
            raise InvalidInput(msg)
        settings = {
            "lr": lr,
            "hess_init": hess_init,
            "beta1": betas[0],
            "beta2": betas[1],
            "clip_radius": "inf" if clip_radius == float("inf") else clip_radius,
            "rescale_lr": rescale_lr,
            "seed": seed,
        }
        self.info = PosteriorInfo(
            likelihood, int(n_data), float(prior_precision), float(temperature), sigma_noise, "ivon", settings
        )
        defaults = {"lr": lr, "prior_precision": float(prior_precision), "hess_init": hess_init, "betas": betas}
        super().__init__(params, {**defaults, "clip_radius": clip_radius, "rescale_lr": rescale_lr})
        if any("param_names" not in group for group in self.param_groups):
            msg = "IVON needs names for its posterior; pass model.named_parameters() or groups of (name, parameter)"
            raise InvalidInput(msg)
        self._data_weight = self.info.n_data / self.info.temperature  # lambda
        self._generator = as_generator(seed)
        self._inside = False
        self._drawn: dict[Tensor, tuple[int, Tensor, Tensor]] = {}  # count, mean G, mean eps G
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["step"] = torch.tensor(0.0)
                state["momentum"] = torch.zeros_like(parameter, dtype=torch.float32)
                state["hessian"] = torch.full_like(parameter, group["hess_init"], dtype=torch.float32)

    def _delta(self, group: Mapping[str, Any]) -> float:
        return group["prior_precision"] / self.info.n_data

    def _variance(self, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
        return 1 / (self._data_weight * (self.state[parameter]["hessian"] + self._delta(group)))

    @contextmanager
    def sampled(self) -> Iterator[None]:
        """Weights drawn from the posterior inside, the mean weights outside.

        Yields:
            nothing; compute the loss and its gradients inside.

        Raises:
            NotFitted: one block inside another.
        """
        if self._inside:
            msg = "sampled() blocks cannot be nested; leave one before entering the next"
            raise NotFitted(msg)
        self._inside = True
        active = [(p, group) for group in self.param_groups for p in group["params"] if p.requires_grad]
        means = [parameter.detach().clone() for parameter, _ in active]
        noises = []
        try:
            with torch.no_grad():
                for parameter, group in active:
                    standard = torch.randn(parameter.shape, generator=self._generator, dtype=torch.float32)
                    parameter.add_(standard.to(parameter.device) * self._variance(parameter, group).sqrt())
                    parameter.grad = None
            for (parameter, _), mean in zip(active, means, strict=True):
                noises.append(parameter.detach() - mean)  # after rounding to the parameter's dtype
            yield
            self._accumulate([parameter for parameter, _ in active], noises)
        finally:
            with torch.no_grad():
                for (parameter, _), mean in zip(active, means, strict=True):
                    parameter.copy_(mean)
                    parameter.grad = None
            self._inside = False

    def _accumulate(self, parameters: list[Tensor], noises: list[Tensor]) -> None:
        for parameter, noise in zip(parameters, noises, strict=True):
            if parameter.grad is None:
                continue
            gradient = parameter.grad.detach().float()
            count, mean, product = self._drawn.get(parameter, (0, 0.0, 0.0))
            count += 1
            mean = mean + (gradient - mean) / count
            product = product + (noise.float() * gradient - product) / count
            self._drawn[parameter] = (count, mean, product)  # type: ignore[assignment]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of mean and precision from the samples since the last step.

        Args:
            closure: computes the loss and its gradients; called once, inside `sampled()`.

        Returns:
            the closure's value, if there is one.

        Raises:
            NotFitted: no gradient was computed inside `sampled()` since the last step.
        """
        result = None
        if closure is not None:
            with torch.enable_grad(), self.sampled():
                result = closure()
        if not self._drawn:
            msg = "no gradient to step on; run `with method.sampled(): loss.backward()` before method.step()"
            raise NotFitted(msg)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self._drawn:
                    _, gradient, product = self._drawn[parameter]
                    self._update(parameter, group, gradient, product)
        self._drawn.clear()
        return result

    def _update(self, parameter: Tensor, group: Mapping[str, Any], gradient: Tensor, product: Tensor) -> None:
        state, delta, (beta1, beta2) = self.state[parameter], self._delta(group), group["betas"]
        momentum, hessian = state["momentum"], state["hessian"]
        state["step"] += 1
        momentum.lerp_(gradient, 1 - beta1)
        precision = hessian + delta
        price = self._data_weight * precision * product
        gap = hessian - price
        hessian.add_(-(1 - beta2) * gap + 0.5 * (1 - beta2) ** 2 * gap.square() / precision)
        debiased = momentum / (1 - beta1 ** int(state["step"]))
        update = (debiased + delta * parameter) / (hessian + delta)
        size = group["lr"] * (group["hess_init"] + delta if group["rescale_lr"] else 1.0)
        radius = group["clip_radius"]
        parameter.sub_((size * update.clamp(-radius, radius)).to(parameter.dtype))

    def posterior(self) -> DiagonalGaussian:
        """The posterior at this point: N(m, 1 / (N/T (h + a0/N))), in float32.

        Raises:
            NotFitted: asked for inside `sampled()`, where the weights are a draw and not the mean.
        """
        if self._inside:
            msg = "posterior() inside sampled() would take a draw for the mean; call it outside"
            raise NotFitted(msg)
        mean, variance = {}, {}
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if not parameter.requires_grad:
                    continue  # frozen weights are deterministic
                mean[name] = parameter.detach().float().clone()
                variance[name] = self._variance(parameter, group)
        return DiagonalGaussian(mean, variance, self.info)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state with step counts and the noise generator: resuming is exact."""
        return {**super().state_dict(), "generator": self._generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state, bit for bit; moments stay in float32.

        Args:
            state_dict: what `state_dict` returned.
        """
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "generator"})
        ordered = [parameter for group in self.param_groups for parameter in group["params"]]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        for parameter, index in zip(ordered, indices, strict=True):
            for key in STATE:  # the base class casts state to the parameter's dtype, which may be half
                exact = state_dict["state"][index][key]
                self.state[parameter][key] = exact.to(parameter.device, torch.float32).clone()
        self._generator.set_state(state_dict["generator"].cpu())
        self._drawn.clear()
