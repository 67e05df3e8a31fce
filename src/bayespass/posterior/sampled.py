"""SampledWeights: the part of a training method that puts draws into the model and takes their gradients.

Draw k is made of the noise of stream k, so that it can be made again: after an error, on resuming, or
on one rank instead of several.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from bayespass.errors import InvalidInput, NotFitted
from bayespass.posterior.base import PosteriorInfo
from bayespass.posterior.draws import Drawn, add_draw, exact_arithmetic, first_not_finite, stream_seed, world
from bayespass.posterior.groups import follow, warn_of_rounding

PriorMean = Mapping[str, Tensor] | Literal["initial"] | None
Active = list[tuple[Tensor, dict[str, Any], str]]  # parameter, group and name


class SampledWeights(Optimizer):
    """Weights that are a draw inside `sampled()` and their mean outside; `TrainingMethod` learns from the draws."""

    info: PosteriorInfo
    antithetic: bool
    distributed: bool
    seed: int
    _prior_mean: PriorMean
    _inside: bool
    _draws: int  # that were collected, over all steps
    _stepped: int  # of these, at the last step
    _drawn: Drawn
    _not_finite: str | None
    _checked_rounding: bool
    _generators: dict[torch.device, torch.Generator]

    @abstractmethod
    def _initial_state(self, mean: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors that the method keeps for one parameter."""

    @abstractmethod
    def _sd(self, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
        """Standard deviation of the draws, entry by entry."""

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

    def _active(self) -> Active:
        return [
            (parameter, group, name)
            for group in self.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
            if parameter.requires_grad
        ]

    def _begin(self, parameter: Tensor, group: Mapping[str, Any], name: str) -> None:
        state = self.state[parameter]
        if state:
            follow(state, parameter)
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
            `scaler.unscale_(method)` last, with one block per step, which is all that it allows; a
            block whose gradients are not finite is dropped.

        Raises:
            NotFitted: one block inside another.
        """
        if self._inside:
            msg = "sampled() blocks of one method cannot be nested; leave one before entering the next"
            raise NotFitted(msg)
        self._inside = True
        active = self._active()
        saved: list[Tensor | None] = []
        try:
            with torch.no_grad():
                for parameter, group, name in active:
                    self._begin(parameter, group, name)
                    saved.append(self._saved(parameter))
                with exact_arithmetic(active):
                    self._draw(active)
            self._before_block()
            yield
            with torch.no_grad(), exact_arithmetic(active):
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

    def _draw(self, active: Active) -> None:
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
            self._checked_rounding = True
            warn_of_rounding((name, p.dtype, self._mean(p), self._sd(p, group)) for p, group, name in active)

    def _collect(self, active: Active, saved: list[Tensor | None]) -> None:
        """Take what the block's gradients tell, all of it or, where it is not finite or fails, nothing."""
        broken = first_not_finite((name, p.grad) for p, _, name in active if p.grad is not None)
        if broken is not None:
            self._not_finite = broken
            return
        evidence: list[tuple[Tensor, Tensor, Tensor]] = []
        for index, (parameter, group, _) in enumerate(active):
            mean = saved[index]
            if parameter.grad is None or mean is None:
                continue
            # A copy: a wrapper such as DDP may own the gradient's memory and write to it again.
            dense = parameter.grad.detach().to_dense() if parameter.grad.is_sparse else parameter.grad.detach()
            gradient = dense.to(mean.dtype, copy=True)
            parameter.grad = None
            noise = parameter.detach().to(mean.dtype) - mean  # after rounding to the parameter's dtype
            parameter.copy_(mean)
            saved[index] = None
            evidence.append((parameter, *self._evidence(parameter, group, gradient, noise)))
        for parameter, first, second in evidence:
            add_draw(self._drawn, parameter, first, second)
        if evidence:
            self._draws += 1
            self._not_finite = None

    def _discard(self) -> None:
        """Forget the draws since the last step; the next ones are the same again."""
        self._drawn.clear()
        self._draws, self._not_finite = self._stepped, None
