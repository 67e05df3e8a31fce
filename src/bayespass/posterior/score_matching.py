"""Score-based variational inference with a proximal term: the closed form.

Around the present q_t = N(m_t, v_t) every step minimises a score-matching loss plus a penalty on
the change of q, with samples theta = m_t + sigma_t eps that no gradient flows through:

    1/2 E_{q_t} || v_t^(1/2) (grad log q(theta) - s(theta)) ||^2  +  1 / (4 eta) KL(q_t || q)

where s is the minibatch score of the tempered posterior, -(N/T) grad lbar - (a0/T) (theta - m0). With
gbar = E[s] and ghat = -E[s (theta - m_t)], the curvature in units of the present precision p_t, the
minimiser is, entry by entry,

    Delta = 2 eta v_t gbar / (1 + 2 eta r),   m <- m_t + Delta
    r     = (b + sqrt(b^2 + 16 eta)) / (8 eta),   b = 4 eta ghat - 1 + D,   p <- r p_t

with D = Delta^2 / v_t (coupled, the exact minimiser) or 0 (decoupled: the mean's own step does not
count as evidence of curvature). r is positive for any curvature estimate, however noisy or negative.
Stationary points are those of the ELBO: E[s] = 0 and p_i = -E[d_i^2 log pi]. Not letting gradients
flow through the samples is what makes them so: the Fisher divergence itself gives variances that are
far too small.

Source: Kim 2026 (arXiv 2602.05873) for the objective; its closed form and bias laws are derived here.
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from bayespass.errors import InvalidInput, require_count, require_positive
from bayespass.posterior.base import Posterior
from bayespass.posterior.draws import average
from bayespass.posterior.groups import check_rates
from bayespass.posterior.kronecker import KroneckerGaussian, marginal, turned, turned_back
from bayespass.posterior.mean_field import DiagonalGaussian
from bayespass.posterior.method import Shared, TrainingMethod

BISECTIONS = 50  # of the coupled equation, on a logarithmic scale
GRAM_HORIZON = 1000  # draws that the gradients' covariance averages over


class ScoreVI(TrainingMethod):
    """Score matching with a proximal term, one closed-form update per step.

        method = ScoreVI(model.named_parameters(), lr=0.05, n_data=len(data), batch_size=100)
        for inputs, targets in loader:
            with method.sampled():
                loss(model(inputs), targets).backward()      # the mean over the batch, no L2 term
            method.step()
        posterior = method.posterior()

    Start from trained weights: it is a natural-gradient step and keeps two vectors, mean and precision.

    Args:
        params: `model.named_parameters()`, or groups `{"params": [(name, p), ...], "lr": ...}`.
        lr: eta of the mean; a small one moves the mean by 2 eta of a Newton step.
        n_data: N, the number of training points.
        precision_lr: eta of the precision, whose averaging horizon is 1 / (4 eta) steps; it stays where
            it is when a scheduler changes lr.
        init_sd: initial standard deviation; None takes a hundredth of the weights' root mean square,
            tensor by tensor.
        coupled: solve for mean and precision together, with one eta, `lr`. Minibatch noise in the mean's
            step then counts as curvature: v is too small by 1 + eta N / (T B) for batches of B rows.
        momentum: of the score; 0 keeps no third vector.
        hessian_structure: "diag", or "kron": diagonal in an orthogonal basis per weight matrix that
            follows the gradients' row and column covariance.
        basis_every: steps between two refreshes of that basis.
        max_basis: sides longer than this keep the standard basis.
        batch_size: B, rows per batch; sharpens the warnings, needed by `coupled`.
        shared: prior_precision, temperature, likelihood, sigma_noise, prior_mean, n_samples, antithetic,
            max_grad_norm, seed and distributed, as in `TrainingMethod`.
            Antithetic pairs on one batch cut the noise of the curvature several times.

    Take a fresh batch for every step: curvature from reused noise shrinks the variance.

    Raises:
        InvalidInput: parameters without names, or a value outside its range.

    Warns:
        UserWarning: a rate at which the noise of the curvature can make the run diverge, or that breaks
            the bias rules (eta N / (T B) <= 0.02 coupled, eta <= 0.005
            decoupled), or a start so far from the optimum that the variance would collapse.

    Source: arXiv 2602.05873; docs/training.md.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        n_data: int,
        precision_lr: float = 2.5e-4,
        init_sd: float | None = None,
        coupled: bool = False,
        momentum: float = 0.0,
        hessian_structure: Literal["diag", "kron"] = "diag",
        basis_every: int = 10,
        max_basis: int = 2048,
        batch_size: int | None = None,
        **shared: Unpack[Shared],
    ) -> None:
        check_rates({"lr": lr, "precision_lr": precision_lr})
        require_count(basis_every=basis_every, max_basis=max_basis)
        if init_sd is not None:
            require_positive(init_sd=init_sd)
        if batch_size is not None:
            require_count(batch_size=batch_size)
        if not 0 <= momentum < 1:
            msg = f"momentum must lie in [0, 1); got {momentum}"
            raise InvalidInput(msg)
        if hessian_structure not in ("diag", "kron"):
            msg = f"hessian_structure must be 'diag' or 'kron'; got {hessian_structure!r}"
            raise InvalidInput(msg)
        if coupled and batch_size is None:
            msg = "coupled=True needs batch_size, the rows per batch: its bias is eta N / (T B)"
            raise InvalidInput(msg)
        self.coupled, self.momentum, self.batch_size = coupled, momentum, batch_size
        self.hessian_structure, self.basis_every, self.max_basis = hessian_structure, basis_every, max_basis
        settings = {
            "lr": lr,
            "precision_lr": lr if coupled else precision_lr,
            "coupled": coupled,
            "momentum": momentum,
            "hessian_structure": hessian_structure,
            "basis_every": basis_every,
            "max_basis": max_basis,
        }
        defaults = {"lr": lr, "precision_lr": precision_lr, "init_sd": init_sd}
        super().__init__(params, n_data, "score_vi", settings, defaults, **shared)
        self._check_bias(lr, precision_lr)

    def _check_bias(self, lr: float, precision_lr: float) -> None:
        if self.batch_size is not None and self.batch_size >= self.info.n_data:
            return
        if self.coupled:
            bias = lr * self.data_weight / (self.batch_size or self.info.n_data)
            if bias > 0.02:
                msg = (
                    f"coupled score-based VI makes variances too small by 1 + lr N / (T batch_size) = {1 + bias:.3f}; "
                    f"lower lr, use larger batches or coupled=False"
                )
                warnings.warn(msg, UserWarning, stacklevel=3)
        elif 4 * precision_lr * (self.data_weight / (self.batch_size or self.info.n_data)) ** 0.5 > 0.5:
            msg = (
                f"one draw's curvature moves the precision by more than half at precision_lr = {precision_lr}: its "
                f"noise is about sqrt(N / (T batch_size)). Lower precision_lr, take larger batches or antithetic pairs"
            )
            warnings.warn(msg, UserWarning, stacklevel=3)
        elif precision_lr > 0.005:
            msg = f"precision_lr = {precision_lr} biases the variance by several percent on minibatches; use <= 0.005"
            warnings.warn(msg, UserWarning, stacklevel=3)

    warns_of_far_starts = True

    def _initial_state(self, mean: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        sd = group["init_sd"] if group["init_sd"] is not None else initial_sd(mean)
        state = {"precision": torch.full_like(mean, sd**-2)}
        if self.momentum:
            state["momentum"] = torch.zeros_like(mean)
        if self.hessian_structure == "kron" and mean.dim() > 1 and mean.numel():
            rows, columns = mean.shape[0], mean[0].numel()
            for side, size in (("left", rows), ("right", columns)):
                if size <= self.max_basis:
                    state[side] = torch.eye(size, dtype=mean.dtype, device=mean.device)
                    state[f"{side}_gram"] = torch.zeros_like(state[side])
        return state

    def _sd(self, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
        del group
        precision = self.state[parameter]["precision"]
        state = self.state[parameter]
        if "left" in state or "right" in state:
            return marginal(precision.reciprocal(), *bases(state)).sqrt_()
        return precision.rsqrt()

    def _move(self, parameter: Tensor, group: Mapping[str, Any], standard: Tensor, sign: float) -> None:
        state = self.state[parameter]
        if "left" in state or "right" in state:
            displacement = turned(standard.mul_(state["precision"].rsqrt()), *bases(state))
            parameter.copy_(self._centre(parameter).add(displacement, alpha=sign))
        else:
            super()._move(parameter, group, standard, sign)

    def _evidence(
        self, parameter: Tensor, group: Mapping[str, Any], gradient: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        state = self.state[parameter]
        matrix = gradient.flatten(1) if gradient.dim() > 1 else gradient
        rate = 1 / min(self._draws + 1, GRAM_HORIZON)
        if "left" in state:  # per draw: in the average of an antithetic pair the curvature's share cancels
            state["left_gram"].lerp_(matrix @ matrix.T, rate)
        if "right" in state:
            state["right_gram"].lerp_(matrix.T @ matrix, rate)
        # The prior's pull at the mean has no curvature, but at the optimum it cancels the data's: less noise.
        gradient = gradient.add(self._prior_pull([parameter])[0], alpha=self._weight_decay(group))
        return gradient, turned_back(noise, *bases(state)).mul_(turned_back(gradient, *bases(state)))

    def _update(
        self, group: dict[str, Any], parameters: list[Tensor], first: list[Tensor], second: list[Tensor]
    ) -> None:
        states = [self.state[parameter] for parameter in parameters]
        scores = torch._foreach_mul(first, -self.data_weight)
        if self.momentum:
            averaged = [state["momentum"] for state in states]
            torch._foreach_lerp_(averaged, scores, 1 - self.momentum)
            corrections = [1 - self.momentum ** float(state["step"]) for state in states]
            scores = torch._foreach_div(averaged, corrections)
        prior = group["prior_precision"] / self.info.temperature  # its part of the curvature is known
        for parameter, state, score, product in zip(parameters, states, scores, second, strict=True):
            variance = state["precision"].reciprocal()
            curvature = product.mul_(self.data_weight).add_(variance, alpha=prior)
            moved, ratio = closed_form(
                turned_back(score, *bases(state)),
                curvature,
                variance,
                group["lr"],
                group["precision_lr"],
                coupled=self.coupled,
            )
            self._mean(parameter).add_(turned(moved, *bases(state)))
            state["precision"].mul_(ratio)
            if ("left" in state or "right" in state) and int(state["step"]) % self.basis_every == 0:
                self._refresh_basis(state)

    def _refresh_basis(self, state: dict[str, Tensor]) -> None:
        """Turn the basis to the gradients' row and column covariance and re-express the precision in it."""
        precision = state["precision"].flatten(1)
        for side in ("left", "right"):
            if side not in state:
                continue
            if self.distributed:
                average(state[f"{side}_gram"])
            basis = torch.linalg.eigh(state[f"{side}_gram"]).eigenvectors
            turn = (basis.T @ state[side]).square_()
            precision = turn @ precision if side == "left" else precision @ turn.T
            state[side].copy_(basis)
        state["precision"].copy_(precision.view_as(state["precision"]))

    def _posterior(self, means: dict[str, Tensor], parameters: dict[str, tuple[Tensor, dict[str, Any]]]) -> Posterior:
        states = {name: self.state[parameter] for name, (parameter, _) in parameters.items()}
        variance = {name: state["precision"].reciprocal().float() for name, state in states.items()}
        if self.hessian_structure == "diag":
            return DiagonalGaussian(means, variance, self.info)
        left = {name: state["left"].float() for name, state in states.items() if "left" in state}
        right = {name: state["right"].float() for name, state in states.items() if "right" in state}
        return KroneckerGaussian(means, variance, left, right, self.info)


def closed_form(
    score: Tensor, curvature: Tensor, variance: Tensor, lr: float, precision_lr: float, *, coupled: bool
) -> tuple[Tensor, Tensor]:
    """The minimiser of score matching plus proximal term for a diagonal Gaussian.

    Args:
        score: gbar, mean score of the samples.
        curvature: ghat = -E[score (theta - m)], 1 where the precision fits.
        variance: of the present q.
        lr: eta of the mean, and of the precision too if coupled.
        precision_lr: eta of the precision, if decoupled.
        coupled: solve for both together.

    Returns:
        the step of the mean, and the positive factor of the precision.
    """
    pull = (variance * score).mul_(2 * lr)
    if not coupled:
        ratio = precision_ratio(curvature, precision_lr)
        return pull.div_((ratio * (2 * lr)).add_(1)), ratio

    def answer(ratio: Tensor) -> Tensor:  # falls with ratio, so that it meets it once
        moved = pull / (1 + 2 * lr * ratio)
        return precision_ratio(curvature + moved.square() / (variance * 4 * lr), lr)

    low = precision_ratio(curvature, lr)
    high = answer(low)
    for _ in range(BISECTIONS):
        middle = (low * high).sqrt()
        above = answer(middle) > middle
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return pull / (1 + 2 * lr * high), high


def precision_ratio(curvature: Tensor, eta: float) -> Tensor:
    """r > 0 with 4 eta r^2 - b r - 1 = 0, b = 4 eta curvature - 1; exactly 1 at curvature 1.

    Near 1 it is solved for r - 1, which a tiny eta would drown in rounding; elsewhere in the form
    whose terms do not cancel.
    """
    gap = (curvature - 1).mul_(4 * eta)
    root = gap.add(4 * eta - 1).square_().add_(16 * eta).sqrt_()
    near = gap / (root - gap).add_(1 + 4 * eta)
    near.mul_(2).add_(1)
    if gap.numel() == 0 or float(gap.abs().max()) < 0.5:
        return near
    b = gap + (4 * eta - 1)
    far = torch.where(b < 0, 2 / (root - b), (root + b) / (8 * eta))
    return torch.where(gap.abs() < 0.5, near, far)


def initial_sd(mean: Tensor) -> float:
    """A hundredth of the root mean square of the weights, at least 1e-4."""
    if mean.numel() == 0:
        return 1e-4
    return max(1e-2 * float(mean.square().mean().sqrt()), 1e-4)


def bases(state: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Q_L and Q_R of a parameter's state; None is the standard basis."""
    return state.get("left"), state.get("right")
