"""TrainingMethod: an optimizer that learns a distribution over the weights instead of a point.

    method = Method(model.named_parameters(), n_data=len(data), prior_precision=1.0, temperature=1.0, ...)
    for inputs, targets in loader:
        with method.sampled():
            loss(model(inputs), targets).backward()      # the mean over the batch, no L2 term
        method.step()
    posterior = method.posterior()

Inside `sampled()` the weights are a draw theta from q; outside they are its mean. What a block
leaves behind are two running means per parameter, of the gradient G and of (theta - m) G, from which
every rule here learns: E[G] moves the mean and E[(theta - m) G] is the derivative of the expected
loss with respect to the log standard deviation, or v times the expected Hessian (Price's theorem).
"""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from bayespass.errors import InvalidInput, NotFitted, require_positive
from bayespass.likelihood import Likelihood, SigmaNoise
from bayespass.posterior.base import Posterior, PosteriorInfo
from bayespass.posterior.draws import Drawn, chunks, reduce_draws, stream_seed, world

PriorMean = Mapping[str, Tensor] | Literal["initial"] | None


class Shared(TypedDict, total=False):
    """The settings that every training method takes by keyword, described at `TrainingMethod`."""

    prior_precision: float
    temperature: float
    likelihood: Likelihood
    sigma_noise: SigmaNoise | None
    prior_mean: PriorMean
    n_samples: int
    antithetic: bool
    max_grad_norm: float | None
    seed: int
    distributed: bool


class TrainingMethod(Optimizer):
    """What IVON, score-based VI and mean-field VI share.

    Args:
        params: `model.named_parameters()`, or groups `{"params": [(name, p), ...], "lr": ...}`. Frozen
            parameters are left out: they have no state and stay deterministic.
        n_data: N, the number of training points.
        name: the method's, recorded in the posterior.
        settings: numbers and words of its own, recorded in the posterior.
        defaults: settings of a group.
        prior_precision: a0 of the prior N(m0, 1/a0); the L2 term is part of the update. A group may have its own.
        temperature: T, tempers likelihood and prior alike: precision (N h + a0) / T.
        likelihood: recorded in the posterior, "classification" or "regression".
        sigma_noise: recorded in the posterior, for regression.
        prior_mean: centre of the prior: None for zero, "initial" for the present weights, or values by
            name, zero for names that are missing.
        n_samples: draws per `step(closure)`.
        antithetic: every second draw mirrors the one before, so that an even number of blocks belongs
            to every step. On a shared batch the noise of the gradient cancels in the curvature.
        max_grad_norm: largest norm of the averaged gradient that moves the mean. Clipping gradients
            inside `sampled()` instead would also shrink the curvature.
        seed: of the weight noise; equal seeds give equal noise on one device.
        distributed: every rank draws its own noise and `step` averages over ranks, weighted by their
            draws. With `DistributedDataParallel` register PyTorch's `noop_hook` first, which leaves
            gradients local. Without it all ranks draw the same noise and gradients come averaged.

    Several blocks before one `step()` average over weight samples or micro-batches. Each block starts
    from zero gradients and leaves none behind, and restores the mean weights on every way out, errors
    included. State is kept in float32 or better whatever the weights' dtype; half-precision weights
    get a float32 mean beside them.

    Raises:
        InvalidInput: parameters without names, nothing that requires a gradient, or a value outside
            its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        n_data: int,
        name: str,
        settings: dict[str, Any],
        defaults: dict[str, Any],
        prior_precision: float = 1.0,
        temperature: float = 1.0,
        likelihood: Likelihood = "classification",
        sigma_noise: SigmaNoise | None = None,
        prior_mean: PriorMean = None,
        n_samples: int = 1,
        antithetic: bool = False,
        max_grad_norm: float | None = None,
        seed: int = 0,
        distributed: bool = False,
    ) -> None:
        require_positive(n_samples=n_samples, max_grad_norm=max_grad_norm)
        if antithetic and n_samples == 1:
            n_samples = 2
        if antithetic and n_samples % 2:
            msg = f"antithetic draws come in pairs; n_samples must be even, got {n_samples}"
            raise InvalidInput(msg)
        settings = {**settings, "antithetic": antithetic, "seed": seed}
        scale = (int(n_data), float(prior_precision), float(temperature))
        self.info = PosteriorInfo(likelihood, *scale, sigma_noise, name, settings)
        self.n_samples, self.antithetic, self.max_grad_norm = n_samples, antithetic, max_grad_norm
        self.seed, self.distributed = seed, distributed
        self.data_weight = self.info.n_data / self.info.temperature  # N / T, weight of the mean loss
        self._draws = 0
        self._inside = False
        self._drawn: Drawn = {}
        self._not_finite: str | None = None
        self._checked_rounding = False
        self._generators: dict[torch.device, torch.Generator] = {}
        super().__init__(params, {"prior_precision": float(prior_precision), **defaults})
        if any("param_names" not in group for group in self.param_groups):
            msg = (
                f"{type(self).__name__} needs names for its posterior; "
                f"pass model.named_parameters() or groups of (name, parameter)"
            )
            raise InvalidInput(msg)
        require_positive(prior_precision=[group["prior_precision"] for group in self.param_groups])
        self._prior_mean = prior_mean
        active = self._active()
        if not active:
            msg = "no parameter requires a gradient; a posterior needs at least one that does"
            raise InvalidInput(msg)
        for parameter, group, name in active:
            self._begin(parameter, group, name)

    @abstractmethod
    def _initial_state(self, mean: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors that the method keeps for one parameter."""

    @abstractmethod
    def _sd(self, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
        """Standard deviation of the draws, entry by entry."""

    @abstractmethod
    def _update(
        self, group: dict[str, Any], parameters: list[Tensor], first: list[Tensor], second: list[Tensor]
    ) -> None:
        """One update of some parameters of a group from the averages of `_evidence`."""

    @abstractmethod
    def _posterior(self, means: dict[str, Tensor], parameters: dict[str, tuple[Tensor, dict[str, Any]]]) -> Posterior:
        """The posterior around these means; parameters and groups by name."""

    def _centre(self, parameter: Tensor) -> Tensor:
        """What draws are centred on."""
        return self._mean(parameter)

    def _move(self, parameter: Tensor, group: Mapping[str, Any], standard: Tensor, sign: float) -> None:
        """Set the parameter to its centre plus sign times a draw's displacement, made of standard normal noise."""
        moved = torch.addcmul(self._centre(parameter), standard, self._sd(parameter, group), value=sign)
        parameter.copy_(moved)

    def _evidence(
        self, parameter: Tensor, group: Mapping[str, Any], gradient: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What one draw tells: by default the gradient, and noise times gradient; `noise` is theta - m."""
        del parameter, group
        return gradient, noise.mul_(gradient)

    def _active(self) -> list[tuple[Tensor, dict[str, Any], str]]:
        return [
            (parameter, group, name)
            for group in self.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
            if parameter.requires_grad
        ]

    def _begin(self, parameter: Tensor, group: Mapping[str, Any], name: str) -> None:
        state = self.state[parameter]
        if state:
            return
        exact = torch.promote_types(parameter.dtype, torch.float32)
        mean = parameter.detach().to(exact)
        state["step"] = torch.tensor(0.0)
        if exact != parameter.dtype:
            state["mean"] = mean.clone()
        centre = mean if self._prior_mean == "initial" else None
        if isinstance(self._prior_mean, Mapping):
            centre = self._prior_mean.get(name)
        if centre is not None:
            if centre.shape != parameter.shape:
                msg = f"prior_mean of {name} has shape {tuple(centre.shape)}; it needs {tuple(parameter.shape)}"
                raise InvalidInput(msg)
            state["prior_mean"] = centre.detach().to(parameter.device, exact, copy=True)
        state.update(self._initial_state(mean, group))

    def _mean(self, parameter: Tensor) -> Tensor:
        """Where the mean lives: the parameter, or the float32 copy of a half-precision one."""
        return self.state[parameter].get("mean", parameter.detach())

    def _weight_decay(self, group: Mapping[str, Any]) -> float:
        """delta = a0 / N, the prior precision on the scale of the mean loss."""
        return group["prior_precision"] / self.info.n_data

    def _prior_pull(self, parameters: list[Tensor]) -> list[Tensor]:
        """Mean minus prior mean, for parameters that hold their mean."""
        return [
            self._mean(p) - self.state[p]["prior_mean"] if "prior_mean" in self.state[p] else self._mean(p)
            for p in parameters
        ]

    @contextmanager
    def sampled(self) -> Iterator[None]:
        """Weights drawn from the posterior inside, the mean weights outside.

        Yields:
            nothing; compute the loss and its gradients inside. Under `torch.amp.GradScaler` call
            `scaler.unscale_(method)` last; a block whose gradients are not finite is dropped.

        Raises:
            NotFitted: one block inside another.
        """
        if self._inside:
            msg = "sampled() blocks cannot be nested; leave one before entering the next"
            raise NotFitted(msg)
        self._inside = True
        active = self._active()
        saved: list[Tensor | None] = []
        try:
            with torch.no_grad():
                for parameter, group, name in active:
                    self._begin(parameter, group, name)
                    saved.append(self._saved(parameter))
                self._draw(active)
            self._before_block()
            yield
            with torch.no_grad():
                self._collect(active, saved)
        finally:
            self._after_block()
            with torch.no_grad():
                for (parameter, _, _), mean in zip(active, saved, strict=False):
                    if mean is not None:
                        parameter.copy_(mean)
                    parameter.grad = None
            self._inside = False

    def _before_block(self) -> None:
        """Called once the weights are drawn."""

    def _after_block(self) -> None:
        """Called on every way out of a block."""

    def _saved(self, parameter: Tensor) -> Tensor:
        """The mean, kept while the parameter holds a draw; weights set from outside become the mean."""
        mean = self.state[parameter].get("mean")
        if mean is None:
            return parameter.detach().clone()
        if not torch.equal(mean.to(parameter.dtype), parameter):
            mean.copy_(parameter)
        return mean

    def _draw(self, active: list[tuple[Tensor, dict[str, Any], str]]) -> None:
        rank, size = world(self.distributed)
        pair, mirrored = divmod(self._draws, 2) if self.antithetic else (self._draws, 0)
        generators = self._generators = {}
        for parameter, group, _ in active:
            if parameter.device not in generators:
                stream = stream_seed(self.seed, pair * size + rank)
                generators[parameter.device] = torch.Generator(parameter.device).manual_seed(stream)
            exact = torch.promote_types(parameter.dtype, torch.float32)
            standard = torch.randn(
                parameter.shape, generator=generators[parameter.device], dtype=exact, device=parameter.device
            )
            self._move(parameter, group, standard, -1.0 if mirrored else 1.0)
            parameter.grad = None
        if not self._checked_rounding:
            self._check_rounding(active)
        self._draws += 1

    def _collect(self, active: list[tuple[Tensor, dict[str, Any], str]], saved: list[Tensor | None]) -> None:
        found = [(name, parameter.grad) for parameter, _, name in active if parameter.grad is not None]
        if found:
            sums = torch.stack([gradient.sum(dtype=torch.float32).to(found[0][1].device) for _, gradient in found])
            if not bool(torch.isfinite(sums).all()):
                self._not_finite = found[int(torch.isfinite(sums).logical_not().nonzero()[0, 0])][0]
                return
        for index, (parameter, group, _) in enumerate(active):
            mean = saved[index]
            if parameter.grad is None or mean is None:
                continue
            gradient = parameter.grad.detach().to(mean.dtype)
            if self.distributed and gradient.data_ptr() == parameter.grad.data_ptr():
                gradient = gradient.clone()  # the wrapper may own the gradient's memory and write to it again
            parameter.grad = None
            noise = parameter.detach().to(mean.dtype) - mean  # after rounding to the parameter's dtype
            parameter.copy_(mean)
            saved[index] = None
            first, second = self._evidence(parameter, group, gradient, noise)
            if parameter in self._drawn:
                count, old_first, old_second = self._drawn[parameter]
                first = old_first.lerp_(first, 1 / (count + 1))
                second = old_second.lerp_(second, 1 / (count + 1))
            else:
                count = 0
            self._drawn[parameter] = (count + 1, first, second)

    def _check_rounding(self, active: list[tuple[Tensor, dict[str, Any], str]]) -> None:
        self._checked_rounding = True
        coarse = []
        for parameter, group, name in active:
            if parameter.dtype not in (torch.float16, torch.bfloat16) or parameter.numel() == 0:
                continue
            half_step = self._mean(parameter).abs() * (torch.finfo(parameter.dtype).eps / 2)
            if float((self._sd(parameter, group) < half_step).float().mean()) > 0.5:
                coarse.append(name)
        if coarse:
            msg = (
                f"the standard deviation of most entries of {coarse[0]} ({len(coarse)} parameters in all) is below "
                f"what their dtype resolves: draws are rounded to a grid wider than the posterior. Keep random weights "
                f"in float32"
            )
            warnings.warn(msg, UserWarning, stacklevel=6)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update from the draws since the last step.

        Args:
            closure: computes the loss and its gradients; called `n_samples` times, inside `sampled()`.

        Returns:
            the closure's last value, if there is one.

        Raises:
            NotFitted: no gradient was computed inside `sampled()` since the last step.
            InvalidInput: gradients are not finite, or an antithetic pair is incomplete.
        """
        result = None
        for _ in range(self.n_samples if closure is not None else 0):
            with torch.enable_grad(), self.sampled():
                result = closure()  # type: ignore[misc]
        if not self._drawn:
            if self._not_finite is not None:
                name, self._not_finite = self._not_finite, None
                msg = f"the gradient of {name} is NaN or infinite; lower lr, or start from trained weights"
                raise InvalidInput(msg)
            msg = "no gradient to step on; run `with method.sampled(): loss.backward()` before method.step()"
            raise NotFitted(msg)
        if self.antithetic and self._draws % 2:
            msg = "antithetic draws come in pairs; run sampled() on the same batch once more before step()"
            raise InvalidInput(msg)
        if self.distributed:
            self._drawn = reduce_draws([parameter for parameter, _, _ in self._active()], self._drawn)
        if self.max_grad_norm is not None:
            gradients = [first for _, first, _ in self._drawn.values()]
            factor = self.max_grad_norm / max(float(get_total_norm(gradients)), self.max_grad_norm)
            torch._foreach_mul_(gradients, factor)
        for group in self.param_groups:
            for parameters in chunks([p for p in group["params"] if p in self._drawn]):
                self._update_chunk(group, parameters)
        self._drawn.clear()
        self._not_finite = None
        return result

    def _update_chunk(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            self.state[parameter]["step"] += 1
        _, first, second = zip(*(self._drawn.pop(parameter) for parameter in parameters), strict=True)
        self._update(group, parameters, list(first), list(second))
        for parameter in parameters:
            if "mean" in self.state[parameter]:
                parameter.copy_(self.state[parameter]["mean"])

    def posterior(self) -> Posterior:
        """The posterior at this point, in float32.

        Raises:
            NotFitted: asked for inside `sampled()`, where the weights are a draw and not the mean.
        """
        if self._inside:
            msg = "posterior() inside sampled() would take a draw for the mean; call it outside"
            raise NotFitted(msg)
        active = self._active()
        for parameter, group, name in active:
            self._begin(parameter, group, name)
        means = {name: self._saved(parameter).float().clone() for parameter, _, name in active}
        return self._posterior(means, {name: (parameter, group) for parameter, group, name in active})

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs, step counts and the position of the noise included.

        Raises:
            NotFitted: asked for between `sampled()` and `step()`, where draws would be lost.
        """
        if self._drawn or self._inside:
            msg = "state_dict() between sampled() and step() would lose draws; save after step()"
            raise NotFitted(msg)
        return {**super().state_dict(), "method": {"draws": self._draws, "seed": self.seed}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state, bit for bit; state stays in float32 or better.

        Args:
            state_dict: what `state_dict` returned.
        """
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "method"})
        ordered = [parameter for group in self.param_groups for parameter in group["params"]]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        for parameter, index in zip(ordered, indices, strict=True):
            for key, exact in state_dict["state"].get(index, {}).items():  # the base class casts to the weights' dtype
                if isinstance(exact, Tensor) and key != "step":
                    self.state[parameter][key] = exact.to(parameter.device, copy=True)
        self._draws, self.seed = state_dict["method"]["draws"], state_dict["method"]["seed"]
        self._drawn.clear()
