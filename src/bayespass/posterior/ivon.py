"""IVON: a diagonal Gaussian posterior learned at the price of AdamW.

Improved variational online Newton (Shen et al. 2024, arXiv 2402.17641), written from the update
equations. Per parameter, with lambda = N / T, delta = a0 / N and a loss that is the MEAN negative
log-likelihood of the batch:

    eps ~ N(0, 1 / (lambda (h + delta))),  theta = m + eps,  G = gradient of the loss at theta
    g  <- b1 g + (1 - b1) mean G
    f   = lambda (h + delta) mean(eps G)                 an unbiased estimate of the mean Hessian
    h  <- b2 h + (1 - b2) f + (1 - b2)^2 (h - f)^2 / (2 (h + delta))
    u   = (g / (1 - b1^t) + delta (m - m0)) / (h + delta)
    m  <- m - A clip(u, -xi, xi),  A = lr (h0 + delta)   (or lr, with rescale_lr=False)

and the posterior is N(m, 1 / (lambda (h + delta))), that is precision (N h + a0) / T. The precision
never shrinks below half of what it was in one step, so it stays positive whatever the estimates.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Unpack

import torch
from torch import Tensor
from torch.optim import Optimizer

from bayespass.errors import InvalidInput, require_count
from bayespass.posterior.groups import check_rates
from bayespass.posterior.mean_field import DiagonalGaussian
from bayespass.posterior.method import Shared, TrainingMethod

Setting = Literal["scratch", "fine_tuning", "lora"]

PRESETS: dict[str, dict[str, Any]] = {
    "scratch": {"lr": 0.1, "hess_init": 0.5, "weight_decay": 2e-4, "cold": 1.0},
    "fine_tuning": {"lr": 0.05, "hess_init": 0.01, "weight_decay": 1e-5, "cold": 1e3, "clip_radius": 1e-2},
    "lora": {
        "lr": 0.03,
        "hess_init": 1e-3,
        "weight_decay": 1e-6,
        "cold": 1e3,
        "clip_radius": 1e-3,
        "rescale_lr": False,
    },
}


class IVON(TrainingMethod):
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
        hess_init: h0 > 0; sets the initial sd 1 / sqrt(N/T (h0 + a0/N)).
        betas: momentum and Hessian averaging; the second must average over about one epoch.
        clip_radius: xi, largest entry of the preconditioned update.
        rescale_lr: multiply the learning rate by (h0 + delta).
        hess_approx: "price", unbiased for the mean Hessian, or "gradsq", batch_size times the squared
            gradient: the empirical Fisher, biased by (batch_size - 1) times the squared mean gradient.
        batch_size: rows per `sampled()` block, for "gradsq".
        shared: prior_precision, temperature, likelihood, sigma_noise, prior_mean, n_samples, antithetic,
            max_grad_norm, seed and distributed, as in `TrainingMethod`.

    With one draw per step the correction term raises the stationary precision by a factor of about
    1 + (1 - b2) / 2 (N / (T B) + 2) for batches of B rows; an antithetic pair on one batch removes most of
    it. Very cold temperatures therefore ask for a b2 that is closer to 1 still.

    Raises:
        InvalidInput: parameters without names, or a value outside its range.

    Source: arXiv 2402.17641; temperature and prior as in docs/training.md.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        n_data: int,
        hess_init: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.99999),
        clip_radius: float = float("inf"),
        rescale_lr: bool = True,
        hess_approx: Literal["price", "gradsq"] = "price",
        batch_size: int | None = None,
        **shared: Unpack[Shared],
    ) -> None:
        check_rates({"lr": lr, "hess_init": hess_init, "betas": betas, "clip_radius": clip_radius})
        if batch_size is not None:
            require_count(batch_size=batch_size)
        if hess_approx not in ("price", "gradsq"):
            msg = f"hess_approx must be 'price' or 'gradsq'; got {hess_approx!r}"
            raise InvalidInput(msg)
        if hess_approx == "gradsq" and batch_size is None:
            msg = (
                "hess_approx='gradsq' needs batch_size: the squared gradient of a mean over B rows is B times too small"
            )
            raise InvalidInput(msg)
        settings = {
            "lr": lr,
            "hess_init": hess_init,
            "beta1": betas[0],
            "beta2": betas[1],
            "clip_radius": "inf" if clip_radius == float("inf") else clip_radius,
            "rescale_lr": rescale_lr,
            "hess_approx": hess_approx,
            "batch_size": batch_size,
        }
        self.hess_approx, self.batch_size = hess_approx, batch_size
        defaults = {"lr": lr, "hess_init": hess_init, "betas": betas}
        defaults |= {"clip_radius": clip_radius, "rescale_lr": rescale_lr}
        super().__init__(params, n_data, "ivon", settings, defaults, **shared)

    @classmethod
    def for_setting(cls, setting: Setting, params: Iterable[Any], n_data: int, **changes: Any) -> "IVON":
        """IVON with the settings that published runs agree on for a situation.

        Args:
            setting: "scratch" (all weights, warm Bayes), "fine_tuning" (pretrained weights) or "lora".
                The last two are cold: T = 1e-3, since published runs weigh the data 1e3 to 1e5 times;
                starting points for a search over `lr` and `hess_init`, not the end of one.
            params: `model.named_parameters()`.
            n_data: N.
            changes: any argument of the constructor.

        Raises:
            InvalidInput: an unknown setting.

        Source: settings of the runs in arXiv 2402.17641, 2411.04421 and 2411.18425.
        """
        if setting not in PRESETS:
            msg = f"setting must be one of {', '.join(map(repr, PRESETS))}; got {setting!r}"
            raise InvalidInput(msg)
        preset = dict(PRESETS[setting])
        weight_decay, cold = preset.pop("weight_decay"), preset.pop("cold")
        settings = {"prior_precision": weight_decay * n_data, "temperature": 1 / cold, **preset}
        return cls(params, n_data=n_data, **{**settings, **changes})

    @torch.no_grad()
    def warm_start(self, optimizer: Optimizer, batch_size: int) -> "IVON":
        """Start from the running moments of an Adam or AdamW that trained the same parameters.

        The mean squared gradient of batches of B rows is the empirical Fisher over B near an optimum,
        so h starts at B times it, and the momentum where Adam's is.

        Args:
            optimizer: `torch.optim.Adam` or `AdamW` over the same parameters.
            batch_size: B, rows per step of that optimizer.

        Returns:
            itself.

        Raises:
            InvalidInput: it has no moments for a parameter.
        """
        require_count(batch_size=batch_size)
        for parameter, group, name in self._active():
            theirs = optimizer.state.get(parameter, {})
            if "exp_avg_sq" not in theirs:
                msg = f"the optimizer has no Adam moments for {name}; warm_start needs an Adam that trained it"
                raise InvalidInput(msg)
            betas = next(g["betas"] for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
            steps, state = float(theirs["step"]), self.state[parameter]
            state["hessian"].copy_(theirs["exp_avg_sq"] * (batch_size / (1 - betas[1] ** steps)))
            state["momentum"].copy_(theirs["exp_avg"] / (1 - betas[0] ** steps))
            state["step"].fill_(steps)
            state["momentum"].mul_(1 - group["betas"][0] ** steps)
        return self

    def _initial_state(self, mean: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(mean), "hessian": torch.full_like(mean, group["hess_init"])}

    def _sd(self, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
        precision = self.state[parameter]["hessian"] + self._weight_decay(group)
        return precision.mul_(self.data_weight).rsqrt_()

    def _evidence(
        self, parameter: Tensor, group: Mapping[str, Any], gradient: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.hess_approx == "gradsq":
            return gradient, gradient.square()
        return super()._evidence(parameter, group, gradient, noise)

    def _update(
        self, group: dict[str, Any], parameters: list[Tensor], first: list[Tensor], second: list[Tensor]
    ) -> None:
        beta1, beta2 = group["betas"]
        delta, radius = self._weight_decay(group), group["clip_radius"]
        states = [self.state[parameter] for parameter in parameters]
        momentum, hessian = [s["momentum"] for s in states], [s["hessian"] for s in states]
        torch._foreach_lerp_(momentum, first, 1 - beta1)

        precision = torch._foreach_add(hessian, delta)
        if self.hess_approx == "price":
            gap = torch._foreach_addcmul(hessian, second, precision, -self.data_weight)  # h - f
        else:
            gap = torch._foreach_add(hessian, second, alpha=-float(self.batch_size or 1))
        torch._foreach_add_(hessian, gap, alpha=-(1 - beta2))
        torch._foreach_mul_(gap, gap)
        torch._foreach_addcdiv_(hessian, gap, precision, 0.5 * (1 - beta2) ** 2)

        precision = torch._foreach_add(hessian, delta)
        update = torch._foreach_div(momentum, [1 - beta1 ** float(s["step"]) for s in states])
        torch._foreach_add_(update, self._prior_pull(parameters), alpha=delta)
        size = group["lr"] * (group["hess_init"] + delta if group["rescale_lr"] else 1.0)
        means = [self._mean(parameter) for parameter in parameters]
        if radius == float("inf"):
            torch._foreach_addcdiv_(means, update, precision, -size)
        else:
            torch._foreach_div_(update, precision)
            torch._foreach_clamp_min_(update, -radius)
            torch._foreach_clamp_max_(update, radius)
            torch._foreach_add_(means, update, alpha=-size)

    def _posterior(
        self, means: dict[str, Tensor], parameters: dict[str, tuple[Tensor, dict[str, Any]]]
    ) -> DiagonalGaussian:
        variance = {name: self._sd(*pair).square_().float() for name, pair in parameters.items()}
        return DiagonalGaussian(means, variance, self.info)

    def posterior(self) -> DiagonalGaussian:
        """The posterior at this point: N(m, 1 / (N/T (h + a0/N))), in float32.

        Raises:
            NotFitted: asked for inside `sampled()`, where the weights are a draw and not the mean.
        """
        return super().posterior()  # type: ignore[return-value]
