"""Score-based variational inference for a mixture of diagonal Gaussians.

The loss is that of `score_sgd` with the score of the mixture: for q = sum_k w_k N(m_k, v_k) over all
weights jointly, grad log q = g = sum_k r_k a_k with a_k = -(theta - m_k) / v_k and responsibilities
r_k. With e = v_t (g - s), v_t the variance of the component that theta was drawn from, and
c_k = e . a_k - e . g summed over all weights,

    d/dm_k         = r_k (e / v_k - c_k a_k)
    d/dlog sigma_k = r_k (-2 e a_k + c_k (v_k a_k^2 - 1))

Components of networks lie so far apart that each draw is one component's business; the mixture is
then several posteriors trained in turn, which is what makes it cover several basins. Its weights
are given, not learned: scores do not see how much mass lies in a separate mode.

Source: arXiv 2602.05873 for the objective; gradients derived here.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from bayespass.errors import InvalidInput
from bayespass.posterior.elbo import GradientMethod
from bayespass.posterior.mean_field import DiagonalGaussian
from bayespass.posterior.method import Shared
from bayespass.posterior.mixture import Mixture
from bayespass.posterior.sampled import Active
from bayespass.posterior.score_matching import initial_sd


class ScoreVIMixture(GradientMethod):
    """Score matching with Adam for a mixture; draws take the components in turn.

    Args:
        params: `model.named_parameters()`, or groups `{"params": [(name, p), ...], "lr": ...}`.
        lr: of the means, for Adam.
        n_data: N, the number of training points.
        components: number of Gaussians.
        starts: means to start from by parameter name, one mapping per component, such as the
            `state_dict` of networks trained from different seeds; None spreads the components around
            the present weights.
        weights: of the components, summing to one; None for equal ones. They are not trained.
        sd_lr: rate of log sigma; ten times `lr` by default.
        init_sd: initial standard deviation; None takes a hundredth of the weights' root mean square.
            Without `starts` the components start ten of these apart.
        betas: of Adam.
        shared: prior_precision, temperature, likelihood, sigma_noise, prior_mean, n_samples, antithetic,
            max_grad_norm, seed and distributed, as in `TrainingMethod`;
            no antithetic pairs and one rank. The seed draws the starts too.

    With one draw per step every component learns from every `components`-th batch.
    Outside `sampled()` the model holds the mean of the first component.

    Raises:
        InvalidInput: parameters without names, starts that do not fit, or a value outside its range.

    Source: arXiv 2602.05873; docs/training.md.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        n_data: int,
        components: int = 2,
        starts: Sequence[Mapping[str, Tensor]] | None = None,
        weights: Sequence[float] | None = None,
        sd_lr: float | None = None,
        init_sd: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        **shared: Unpack[Shared],
    ) -> None:
        if components < 2:
            msg = f"components must be at least 2, ScoreVISGD is the single Gaussian; got {components}"
            raise InvalidInput(msg)
        if starts is not None and len(starts) != components:
            msg = f"starts must hold one mapping per component, {components}; got {len(starts)}"
            raise InvalidInput(msg)
        weights = [1 / components] * components if weights is None else [float(weight) for weight in weights]
        if len(weights) != components or min(weights) <= 0 or abs(sum(weights) - 1) > 1e-6:
            msg = f"weights must be {components} positive numbers that sum to one; got {weights}"
            raise InvalidInput(msg)
        for option in ("antithetic", "distributed"):
            if shared.get(option):
                msg = f"{option}=True does not go with a mixture, whose draws take the components in turn"
                raise InvalidInput(msg)
        self.components, self.weights, self._starts = components, weights, starts
        self._starting = torch.Generator().manual_seed(shared.get("seed", 0))
        self._joint: tuple[Tensor, Tensor] | None = None
        settings = {"components": components, "weights": ", ".join(f"{weight:.6g}" for weight in weights)}
        super().__init__(params, n_data, "score_vi_mixture", settings, lr, sd_lr, init_sd, betas, **shared)
        with torch.no_grad():
            for parameter, _, _ in self._active():
                parameter.copy_(self.state[parameter]["means"][0])

    def _begin(self, parameter: Tensor, group: Mapping[str, Any], name: str) -> None:
        known = bool(self.state[parameter])
        super()._begin(parameter, group, name)
        if known or self._starts is None:
            return
        for component, start in enumerate(self._starts):
            if name not in start or start[name].shape != parameter.shape:
                msg = f"starts[{component}] has no value of shape {tuple(parameter.shape)} for {name}"
                raise InvalidInput(msg)
            self.state[parameter]["means"][component].copy_(start[name])

    def _initial_state(self, mean: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        sd = group["init_sd"] if group["init_sd"] is not None else initial_sd(mean)
        shape = (self.components, *mean.shape)
        apart = torch.randn(shape, generator=self._starting, dtype=mean.dtype).to(mean.device)
        state = {"means": mean + 10 * sd * apart, "log_sds": torch.full_like(apart, sd).log_()}
        for key in ("exp_avg", "exp_avg_sq", "sd_exp_avg", "sd_exp_avg_sq"):
            state[key] = torch.zeros_like(apart)
        return state

    def _draw(self, active: Active) -> None:
        for parameter, _, name in active:
            if not torch.equal(parameter, self.state[parameter]["means"][0].to(parameter.dtype)):
                msg = f"{name} was changed after the mixture was made, which keeps means of its own; make it afterwards"
                raise InvalidInput(msg)
        super()._draw(active)

    @property
    def _component(self) -> int:
        """The component of the draw under way, or of the next one."""
        return self._draws % self.components

    def _centre(self, parameter: Tensor) -> Tensor:
        return self.state[parameter]["means"][self._component]

    def _sd(self, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
        del group
        return self.state[parameter]["log_sds"][self._component].exp()

    def _scores(self, parameter: Tensor, theta: Tensor) -> Tensor:
        """a_k of every component, (K, ...)."""
        state = self.state[parameter]
        return (state["means"] - theta) * (-2 * state["log_sds"]).exp()

    def _collect(self, active: Active, saved: list[Tensor | None]) -> None:
        """First what all weights share: responsibilities r_k and the coefficients c_k."""
        drawn = self._component
        logits = torch.tensor(self.weights, dtype=torch.float64).log()
        theta = {}
        for parameter, _, _ in active:
            state = self.state[parameter]
            theta[parameter] = parameter.detach().to(state["means"].dtype, copy=True)
            standard = (theta[parameter] - state["means"]) * (-state["log_sds"]).exp()
            logits += -(standard.square() / 2 + state["log_sds"]).double().reshape(self.components, -1).sum(1).cpu()
        shares = logits.softmax(0)
        products, total = torch.zeros(self.components, dtype=torch.float64), 0.0
        for parameter, group, _ in active:
            if parameter.grad is None:
                continue
            error, scores = self._error(parameter, group, parameter.grad, theta[parameter], drawn, shares)
            each = (error * scores).double().reshape(self.components, -1).sum(1).cpu()
            products += each
            total += float((shares * each).sum())
        self._joint, self._theta = (shares, products - total), theta
        super()._collect(active, saved)

    def _error(
        self,
        parameter: Tensor,
        group: Mapping[str, Any],
        gradient: Tensor,
        theta: Tensor,
        drawn: int,
        shares: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """e = v_t (g - s) over N / T, and a_k."""
        scores = self._scores(parameter, theta)
        score = torch.tensordot(shares.to(scores), scores, 1)
        state = self.state[parameter]
        prior = theta - state["prior_mean"] if "prior_mean" in state else theta
        residual = gradient.to(theta.dtype).add(prior, alpha=self._weight_decay(group))
        residual.add_(score, alpha=1 / self.data_weight)
        return residual.mul_((2 * state["log_sds"][drawn]).exp()), scores

    def _evidence(
        self, parameter: Tensor, group: Mapping[str, Any], gradient: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        del noise
        assert self._joint is not None
        shares, coefficients = self._joint
        state, drawn = self.state[parameter], self._component
        error, scores = self._error(parameter, group, gradient, self._theta.pop(parameter), drawn, shares)
        column = (self.components, *[1] * error.dim())
        share, coefficient = (value.to(scores).view(column) for value in (shares, coefficients))
        inverse = (-2 * state["log_sds"]).exp()
        by_mean = share * (error * inverse - coefficient * scores)
        by_sd = share * (coefficient * (scores.square() / inverse - 1) - 2 * error * scores)
        return by_mean, by_sd

    def _update(
        self, group: dict[str, Any], parameters: list[Tensor], first: list[Tensor], second: list[Tensor]
    ) -> None:
        states = [self.state[parameter] for parameter in parameters]
        self._adam_on(
            group, states, [state["means"] for state in states], [state["log_sds"] for state in states], first, second
        )
        for parameter, state in zip(parameters, states, strict=True):
            parameter.copy_(state["means"][0])
            if "mean" in state:
                state["mean"].copy_(state["means"][0])

    def _posterior(self, means: dict[str, Tensor], parameters: dict[str, tuple[Tensor, dict[str, Any]]]) -> Mixture:
        del means
        states = {name: self.state[parameter] for name, (parameter, _) in parameters.items()}
        components = [
            DiagonalGaussian(
                {name: state["means"][k].float().clone() for name, state in states.items()},
                {name: (2 * state["log_sds"][k]).exp().float() for name, state in states.items()},
                self.info,
            )
            for k in range(self.components)
        ]
        return Mixture(components, self.weights, self.info)
