"""Mean-field variational inference by gradients of the ELBO: Bayes by backprop, or ADVI.

Maximises (E_q[log p(D | theta)] + E_q[log prior]) / T + entropy of q, for q = N(m, sigma^2), with Adam on
m and log sigma. Everything is divided by N / T, so that with delta = a0 / N and a loss that is
the MEAN negative log-likelihood of the batch, one draw theta = m + sigma eps gives

    closed entropy:        d/dm = G + delta (m - m0)
                           d/dlog sigma = (theta - m) G + delta sigma^2 - T/N
    sticking the landing:  R = G + delta (theta - m0) - (T/N) (theta - m) / sigma^2
                           d/dm = R,  d/dlog sigma = (theta - m) R

Only weights are sampled, the gradients of m and log sigma are assembled from those of the weights:
one backward pass on any unmodified network.

Source: Blundell et al. 2015 (arXiv 1505.05424); Kucukelbir et al. 2017 (arXiv 1603.00788); sticking
the landing: Roeder et al. 2017 (arXiv 1703.09194); local reparametrisation: Kingma et al. 2015
(arXiv 1506.02557).
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from bayespass.errors import InvalidInput, require_positive
from bayespass.posterior.groups import check_rates
from bayespass.posterior.local import LocalReparametrization
from bayespass.posterior.mean_field import DiagonalGaussian
from bayespass.posterior.method import Shared, TrainingMethod
from bayespass.posterior.score_matching import initial_sd

Gradient = Literal["closed", "stl"]


class GradientMethod(TrainingMethod):
    """What the methods share that run Adam on m and log sigma.

    Args:
        params: `model.named_parameters()`, or groups.
        n_data: N.
        name: the method's.
        settings: recorded in the posterior.
        lr: of the mean; schedulers that change it change the rate of log sigma alike.
        sd_lr: rate of log sigma at the start.
        init_sd: initial standard deviation; None takes a hundredth of the weights' root mean square.
        betas: of Adam.
        shared: see `TrainingMethod`.

    Raises:
        InvalidInput: a value outside its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        n_data: int,
        name: str,
        settings: dict[str, Any],
        lr: float,
        sd_lr: float | None,
        init_sd: float | None,
        betas: tuple[float, float],
        **shared: Unpack[Shared],
    ) -> None:
        check_rates({"lr": lr, "betas": betas})
        require_positive(**{k: v for k, v in {"sd_lr": sd_lr, "init_sd": init_sd}.items() if v is not None})
        ratio = 10.0 if sd_lr is None else sd_lr / lr
        defaults = {"lr": lr, "sd_lr_ratio": ratio, "init_sd": init_sd, "betas": betas, "eps": 1e-8}
        settings = {"lr": lr, "sd_lr": lr * ratio, **settings}
        super().__init__(params, n_data, name, settings, defaults, **shared)

    def _initial_state(self, mean: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        sd = group["init_sd"] if group["init_sd"] is not None else initial_sd(mean)
        state = {"log_sd": torch.full_like(mean, sd).log_()}
        for key in ("exp_avg", "exp_avg_sq", "sd_exp_avg", "sd_exp_avg_sq"):
            state[key] = torch.zeros_like(mean)
        return state

    def _sd(self, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
        del group
        return self.state[parameter]["log_sd"].exp()

    def _adam(self, group: dict[str, Any], parameters: list[Tensor], first: list[Tensor], second: list[Tensor]) -> None:
        """One step of Adam on the means and on the log standard deviations."""
        states = [self.state[parameter] for parameter in parameters]
        means = [self._mean(parameter) for parameter in parameters]
        self._adam_on(group, states, means, [state["log_sd"] for state in states], first, second)

    def _adam_on(
        self,
        group: dict[str, Any],
        states: list[dict[str, Tensor]],
        means: list[Tensor],
        log_sds: list[Tensor],
        first: list[Tensor],
        second: list[Tensor],
    ) -> None:
        sd_rate = group["lr"] * group["sd_lr_ratio"]
        for targets, gradients, prefix, rate in ((means, first, "", group["lr"]), (log_sds, second, "sd_", sd_rate)):
            adam(
                targets,
                gradients,
                [state[f"{prefix}exp_avg"] for state in states],
                [state[f"{prefix}exp_avg_sq"] for state in states],
                [],
                [state["step"] - 1 for state in states],  # the function counts the step itself
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=rate,
                weight_decay=0.0,
                eps=group["eps"],
                maximize=False,
            )

    def _posterior(
        self, means: dict[str, Tensor], parameters: dict[str, tuple[Tensor, dict[str, Any]]]
    ) -> DiagonalGaussian:
        variance = {name: self._sd(*pair).square_().float() for name, pair in parameters.items()}
        return DiagonalGaussian(means, variance, self.info)


class MeanFieldVI(GradientMethod):
    """Gaussian mean-field VI: the baseline that everyone compares with.

        method = MeanFieldVI(model.named_parameters(), lr=1e-3, n_data=len(data))
        for inputs, targets in loader:
            with method.sampled():
                loss(model(inputs), targets).backward()      # the mean over the batch, no L2 term
            method.step()
        posterior = method.posterior()

    Args:
        params: `model.named_parameters()`, or groups `{"params": [(name, p), ...], "lr": ...}`.
        lr: of the mean, for Adam.
        n_data: N, the number of training points; the KL weight is T / N.
        sd_lr: rate of log sigma; ten times `lr` by default, since at the rate of the mean it hardly
            moves in a usual number of steps.
        init_sd: initial standard deviation; None takes a hundredth of the weights' root mean square,
            tensor by tensor.
        gradient: "closed" (entropy in closed form) or "stl" (sticking the landing, no noise left where
            q fits the posterior).
        local: a module whose `nn.Linear` layers sample their outputs instead of their weights,
            independently for every row: far less noise in the gradients. Each layer must see one vector
            per row, (B, features); positions of a row share one draw of the weights, so that tokens and
            convolutions have to be drawn as usual: pass the part of the model, such as its head, where
            the layer allows it. One forward pass per block; only with "closed".
        betas: of Adam.
        shared: prior_precision, temperature, likelihood, sigma_noise, prior_mean, n_samples, antithetic,
            max_grad_norm, seed and distributed, as in `TrainingMethod`.

    Raises:
        InvalidInput: parameters without names, or a value outside its range.

    Source: arXiv 1505.05424, 1603.00788, 1703.09194, 1506.02557; docs/training.md.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        n_data: int,
        sd_lr: float | None = None,
        init_sd: float | None = None,
        gradient: Gradient = "closed",
        local: nn.Module | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        **shared: Unpack[Shared],
    ) -> None:
        if gradient not in ("closed", "stl"):
            msg = f"gradient must be 'closed' or 'stl'; got {gradient!r}"
            raise InvalidInput(msg)
        if local is not None and gradient == "stl":
            msg = "gradient='stl' needs drawn weights, which local reparametrisation never draws; use gradient='closed'"
            raise InvalidInput(msg)
        if local is not None and shared.get("antithetic"):
            msg = (
                "antithetic pairs mirror drawn weights, which local reparametrisation never draws; drop one of the two"
            )
            raise InvalidInput(msg)
        self.gradient = gradient
        self._local: LocalReparametrization | None = None
        settings = {"gradient": gradient, "local": local is not None}
        super().__init__(params, n_data, "elbo", settings, lr, sd_lr, init_sd, betas, **shared)
        if local is not None:
            self._local = LocalReparametrization(local, [parameter for parameter, _, _ in self._active()])

    def _move(self, parameter: Tensor, group: Mapping[str, Any], standard: Tensor, sign: float) -> None:
        if self._local is not None and parameter in self._local:
            self._local.variance[parameter] = self._sd(parameter, group).square_().to(parameter.dtype)
        else:
            super()._move(parameter, group, standard, sign)

    def _before_block(self) -> None:
        if self._local is not None:
            self._local.begin(self._noise_generator)

    def _after_block(self) -> None:
        if self._local is not None:
            self._local.end()

    def _noise_generator(self, device: torch.device) -> torch.Generator:
        return self._generators[device]

    def _evidence(
        self, parameter: Tensor, group: Mapping[str, Any], gradient: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.gradient == "stl":
            residual = landing_residual(self, parameter, group, gradient, noise)
            return residual, noise.mul_(residual)
        # The prior's pull at the mean adds nothing to the expected product, but at the optimum it cancels the data's.
        pulled = gradient.add(self._prior_pull([parameter])[0], alpha=self._weight_decay(group))
        if self._local is not None and parameter in self._local:
            return pulled, self._local.log_sd_gradient(parameter).to(pulled.dtype)
        return pulled, noise.mul_(pulled)

    def _update(
        self, group: dict[str, Any], parameters: list[Tensor], first: list[Tensor], second: list[Tensor]
    ) -> None:
        if self.gradient == "closed":
            delta = self._weight_decay(group)
            variances = torch._foreach_exp(torch._foreach_mul([self.state[p]["log_sd"] for p in parameters], 2.0))
            torch._foreach_add_(second, variances, alpha=delta)
            torch._foreach_sub_(second, 1 / self.data_weight)
        self._adam(group, parameters, first, second)


def landing_residual(
    method: TrainingMethod, parameter: Tensor, group: Mapping[str, Any], gradient: Tensor, noise: Tensor
) -> Tensor:
    """Score of q minus score of the posterior at a draw, over N / T.

    G + delta (theta - m0) - (T/N) (theta - m) / sigma^2: zero for every draw where q is the posterior.
    """
    delta, inverse_variance = method._weight_decay(group), method._sd(parameter, group).square_().reciprocal_()
    pull = method._prior_pull([parameter])[0] + noise
    return gradient.add(pull, alpha=delta).addcmul_(noise, inverse_variance, value=-1 / method.data_weight)
