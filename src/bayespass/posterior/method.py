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

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from bayespass.errors import InvalidInput, NotFitted, require_count, require_positive
from bayespass.likelihood import Likelihood, SigmaNoise
from bayespass.posterior.base import Posterior, PosteriorInfo
from bayespass.posterior.draws import any_rank, chunks, reduce_draws
from bayespass.posterior.groups import (
    check_identity,
    check_prior_mean,
    check_rates,
    clean_group,
    named_parameters,
    warn_of_far_start,
)
from bayespass.posterior.sampled import PriorMean, SampledWeights


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


class TrainingMethod(SampledWeights):
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

    warns_of_far_starts: ClassVar[bool] = False

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
        require_count(n_data=n_data, n_samples=n_samples)
        require_positive(prior_precision=prior_precision, temperature=temperature)
        if max_grad_norm is not None:
            require_positive(max_grad_norm=max_grad_norm)
        if antithetic and n_samples == 1:
            n_samples = 2
        if antithetic and n_samples % 2:
            msg = f"antithetic draws come in pairs; n_samples must be even, got {n_samples}"
            raise InvalidInput(msg)
        settings = {**settings, "antithetic": antithetic, "seed": seed}
        scale = (n_data, float(prior_precision), float(temperature))
        self.info = PosteriorInfo(likelihood, *scale, sigma_noise, name, settings)
        self.n_samples, self.antithetic, self.max_grad_norm = n_samples, antithetic, max_grad_norm
        self.seed, self.distributed = seed, distributed
        self.data_weight = self.info.n_data / self.info.temperature  # N / T, weight of the mean loss
        self._draws = self._stepped = 0
        self._inside = False
        self._drawn = {}
        self._not_finite = None
        self._checked_rounding = False
        self._generators = {}
        defaults = {"prior_precision": float(prior_precision), **defaults}
        super().__init__(named_parameters(params, type(self).__name__), defaults)
        names = [name for group in self.param_groups for name in group["param_names"]]
        check_prior_mean(prior_mean, names)
        self._prior_mean = prior_mean
        active = self._active()
        if not active:
            msg = "no parameter requires a gradient; a posterior needs at least one that does"
            raise InvalidInput(msg)
        for parameter, group, name in active:
            self._begin(parameter, group, name)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with settings of its own where it names them.

        Args:
            param_group: `{"params": [(name, p), ...], "lr": ...}`.

        Raises:
            InvalidInput: names are missing or taken, a parameter comes twice, or a value is out of range.
        """
        cleaned = clean_group(param_group, self.param_groups, type(self).__name__)
        check_rates({**self.defaults, **cleaned})
        super().add_param_group(cleaned)

    @abstractmethod
    def _update(
        self, group: dict[str, Any], parameters: list[Tensor], first: list[Tensor], second: list[Tensor]
    ) -> None:
        """One update of some parameters of a group from the averages of `_evidence`."""

    @abstractmethod
    def _posterior(self, means: dict[str, Tensor], parameters: dict[str, tuple[Tensor, dict[str, Any]]]) -> Posterior:
        """The posterior around these means; parameters and groups by name."""

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
        if closure is not None:
            try:
                for _ in range(self.n_samples):
                    with torch.enable_grad(), self.sampled():
                        result = closure()
            except BaseException:
                self._discard()
                raise
            if not self._drawn and self._not_finite is None and result is None and not self.distributed:
                return None  # the closure chose to skip this batch
        self._check_draws()
        active = [parameter for parameter, _, _ in self._active()]
        if self.distributed:
            self._drawn = reduce_draws(active, self._drawn)
        trained = set(active)
        self._drawn = {parameter: drawn for parameter, drawn in self._drawn.items() if parameter in trained}
        if self.warns_of_far_starts and not self._stepped:
            group_of = {parameter: group for parameter, group, _ in self._active()}
            pulls = [self._sd(p, group_of[p]) * first * self.data_weight for p, (_, first, _) in self._drawn.items()]
            warn_of_far_start(pulls, self.data_weight / (getattr(self, "batch_size", None) or 1))
        if self.max_grad_norm is not None:
            gradients = [first for _, first, _ in self._drawn.values()]
            factor = self.max_grad_norm / max(float(get_total_norm(gradients)), self.max_grad_norm)
            torch._foreach_mul_(gradients, factor)
        for group in self.param_groups:
            for parameters in chunks([p for p in group["params"] if p in self._drawn]):
                self._update_chunk(group, parameters)
        self._drawn.clear()
        self._stepped = self._draws
        return result

    def _check_draws(self) -> None:
        """Raise, on all ranks alike, unless there is something whole to step on.

        Raises:
            NotFitted: no gradient was computed.
            InvalidInput: gradients are not finite, or an antithetic pair is incomplete.
        """
        name, odd = self._not_finite, self.antithetic and (self._draws - self._stepped) % 2
        empty = not self._drawn and not self.distributed
        problems = any_rank(bool(name is not None or odd)) if self.distributed else bool(name is not None or odd)
        if not (problems or empty):
            return
        self._discard()
        if empty and name is None:
            msg = "no gradient to step on; run `with method.sampled(): loss.backward()` before method.step()"
            raise NotFitted(msg)
        if odd and name is None:
            msg = "antithetic draws come in pairs; run sampled() on the same batch twice before step()"
            raise InvalidInput(msg)
        where = f"the gradient of {name}" if name is not None else "a gradient on another rank"
        msg = f"{where} is NaN or infinite; lower lr, or start from trained weights"
        raise InvalidInput(msg)

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

        Draws since the last step are not part of it, as gradients never are: they are made again.

        Raises:
            NotFitted: asked for inside `sampled()`, where the weights are a draw and not the mean.
        """
        if self._inside:
            msg = "state_dict() inside sampled() would save a draw for the mean; call it outside"
            raise NotFitted(msg)
        return {**super().state_dict(), "method": {"draws": self._stepped, "seed": self.seed, **self._identity()}}

    def _identity(self) -> dict[str, Any]:
        """What a state belongs to: settings that are not kept in the groups and would change its meaning."""
        restored = {*self.defaults, "beta1", "beta2", "sd_lr", "seed"}
        settings = {key: value for key, value in self.info.settings.items() if key not in restored}
        scale = {"n_data": self.info.n_data, "temperature": self.info.temperature}
        return {"class": type(self).__name__, **scale, **settings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state, bit for bit; state stays in float32 or better.

        Args:
            state_dict: what `state_dict` returned.

        Raises:
            InvalidInput: it belongs to another method, scale or setting.
        """
        theirs = check_identity(state_dict, self._identity())
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "method"})
        ordered = [parameter for group in self.param_groups for parameter in group["params"]]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        for parameter, index in zip(ordered, indices, strict=True):
            for key, exact in state_dict["state"].get(index, {}).items():  # the base class casts to the weights' dtype
                if isinstance(exact, Tensor) and key != "step":
                    self.state[parameter][key] = exact.to(parameter.device, copy=True)
        self._stepped, self.seed = theirs["draws"], theirs["seed"]
        self._discard()

    def __getstate__(self) -> dict[str, Any]:
        """For copies: everything but generators, which are made anew for every draw."""
        return {**self.__dict__, "_generators": {}}
