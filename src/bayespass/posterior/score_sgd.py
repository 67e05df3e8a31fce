"""Score-based variational inference with a proximal term, by gradient steps.

Each outer iteration freezes a lagged copy q_t and takes `inner` steps of Adam on

    1/2 E_{q_t} || v_t^(1/2) (grad log q(theta) - s(theta)) ||^2  +  prox * KL(q_t || q)

with draws theta from q_t that no gradient flows through, and a fresh minibatch score s for every
inner step. For a diagonal Gaussian, with R = -(theta - m) / v - s,

    d/dm         = v_t R / v + prox (m - m_t) / v
    d/dlog sigma = 2 v_t R (theta - m) / v + prox (1 - v_t / v - (m - m_t)^2 / v)

One inner step is the sticking-the-landing gradient of the ELBO (twice it for log sigma), and the
proximal term does nothing there. Mixtures use the same loss with grad log q = sum_k r_k a_k,
a_k = -(theta - m_k) / v_k and responsibilities r_k over all weights jointly.

Source: Kim 2026 (arXiv 2602.05873) for the objective; gradients derived here.
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor

from bayespass.errors import InvalidInput, require_count
from bayespass.posterior.elbo import GradientMethod, landing_residual
from bayespass.posterior.method import Shared
from bayespass.posterior.sampled import Active

FIRM = 10.0  # a proximal weight at which the mean is still a standard deviation off after 50 inner steps


class ScoreVISGD(GradientMethod):
    """Score matching with a proximal term and Adam, for a diagonal Gaussian.

    Args:
        params: `model.named_parameters()`, or groups `{"params": [(name, p), ...], "lr": ...}`.
        lr: of the mean, for Adam.
        n_data: N, the number of training points.
        sd_lr: rate of log sigma; ten times `lr` by default.
        init_sd: initial standard deviation; None takes a hundredth of the weights' root mean square.
        prox: weight of KL(q_t || q), relative to the score matching loss.
        inner: steps per outer iteration, each with a fresh batch and fresh noise. Reusing a batch
            inside an iteration shrinks the variance several times.
        betas: of Adam.
        shared: prior_precision, temperature, likelihood, sigma_noise, prior_mean, n_samples, antithetic,
            max_grad_norm, seed and distributed, as in `TrainingMethod`.

    Load weights before the first draw: those set later, in the middle of an outer iteration, become the
    mean, but draws come from around the lagged copy until the iteration ends.

    Keeps the lagged copy beside q and Adam's moments: eight vectors, six with `inner=1`.

    Raises:
        InvalidInput: parameters without names, or a value outside its range.

    Warns:
        UserWarning: a start far from the optimum, or a proximal weight that holds the mean back.

    Source: arXiv 2602.05873; docs/training.md.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        n_data: int,
        sd_lr: float | None = None,
        init_sd: float | None = None,
        prox: float = 1.0,
        inner: int = 5,
        betas: tuple[float, float] = (0.9, 0.999),
        **shared: Unpack[Shared],
    ) -> None:
        if not (isinstance(prox, int | float) and 0 <= prox < float("inf")):
            msg = f"prox must be 0 or a positive number; got {prox!r}"
            raise InvalidInput(msg)
        require_count(inner=inner)
        if prox > FIRM and inner > 1:
            msg = f"prox = {prox} holds the mean back so firmly that it lags behind; use about 1, with fresh batches"
            warnings.warn(msg, UserWarning, stacklevel=2)
        self.prox, self.inner = prox, inner
        settings = {"prox": prox, "inner": inner}
        super().__init__(params, n_data, "score_vi_sgd", settings, lr, sd_lr, init_sd, betas, **shared)

    warns_of_far_starts = True

    def _draw(self, active: Active) -> None:
        if self._draws == 0 and self.inner > 1:  # weights may have been loaded since
            for parameter, _, _ in active:
                self.state[parameter]["lagged_mean"].copy_(self._mean(parameter))
        super()._draw(active)

    def _initial_state(self, mean: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        state = super()._initial_state(mean, group)
        if self.inner > 1:
            state |= {"lagged_mean": mean.clone(), "lagged_log_sd": state["log_sd"].clone()}
        return state

    def _centre(self, parameter: Tensor) -> Tensor:
        return self.state[parameter].get("lagged_mean", self._mean(parameter))

    def _move(self, parameter: Tensor, group: Mapping[str, Any], standard: Tensor, sign: float) -> None:
        del group
        lagged_sd = self._lagged_log_sd(parameter).exp()
        parameter.copy_(torch.addcmul(self._centre(parameter), standard, lagged_sd, value=sign))

    def _lagged_log_sd(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        return state.get("lagged_log_sd", state["log_sd"])

    def _evidence(
        self, parameter: Tensor, group: Mapping[str, Any], gradient: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        residual = landing_residual(self, parameter, group, gradient, noise)
        if self.inner > 1:
            ratio = (self._lagged_log_sd(parameter) - self.state[parameter]["log_sd"]).mul_(2).exp_()  # v_t / v
            residual.mul_(ratio)
        return residual, noise.mul_(residual).mul_(2)

    def _update(
        self, group: dict[str, Any], parameters: list[Tensor], first: list[Tensor], second: list[Tensor]
    ) -> None:
        if self.inner > 1 and self.prox > 0:
            for parameter, mean_gradient, sd_gradient in zip(parameters, first, second, strict=True):
                self._add_proximal(parameter, mean_gradient, sd_gradient)
        self._adam(group, parameters, first, second)
        for parameter in parameters:
            state = self.state[parameter]
            if self.inner > 1 and int(state["step"]) % self.inner == 0:
                state["lagged_mean"].copy_(self._mean(parameter))
                state["lagged_log_sd"].copy_(state["log_sd"])

    def _add_proximal(self, parameter: Tensor, mean_gradient: Tensor, sd_gradient: Tensor) -> None:
        """Add the gradients of prox KL(q_t || q), over N / T as everything is."""
        state = self.state[parameter]
        weight = self.prox / self.data_weight
        gap = self._mean(parameter) - state["lagged_mean"]
        over_variance = state["log_sd"].mul(-2).exp_()
        mean_gradient.addcmul_(gap, over_variance, value=weight)
        spread = (state["lagged_log_sd"] * 2).exp_().addcmul_(gap, gap).mul_(over_variance)
        sd_gradient.add_(1 - spread, alpha=weight)
