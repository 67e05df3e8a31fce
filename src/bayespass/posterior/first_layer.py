"""The Bayesian first layer (STF-BNN): train as usual, then make the first layer that runs random.

Phase 1 is the user's ordinary training. Phase 2, here, learns a distribution over the first layer by
variational inference while everything else is frozen and in eval mode:

    min over q(W1)  E_q[-log p(D | W1, rest)] / N + (T / N) KL(q || prior)

What it costs: a step skips the weight gradients of the frozen layers but still goes through all of
them, forth and back, because the randomness enters at the input; no feature can be cached, as it can
for a random last layer. Prediction by sampling needs as many full passes as draws.

What to expect: in our small runs (docs/training.md: two convolutional networks and a transformer,
three seeds) it was no better than the deterministic network at resisting adversarial examples or
spotting foreign inputs, and gave away membership of the training set at most a point less; likelihood
and calibration improved on the transformer and worsened on Fashion-MNIST. The paper's claims on
robustness and privacy are unverified here. That the first layer alone, retrained from other starting
points, finds several different optima did reproduce, but one Gaussian sits in one of them. Weights
whose input is always zero go back to the prior, which is harmless on the data and sets what happens
away from it.

Source: Lei et al. 2021 (arXiv 2112.06281).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bayespass.batches import call_arguments, device_of, labelled_batches, model_output
from bayespass.errors import InvalidInput
from bayespass.likelihood import Likelihood, SigmaNoise, check_targets, negative_log_likelihood
from bayespass.posterior.base import Posterior
from bayespass.posterior.elbo import MeanFieldVI
from bayespass.posterior.selection import Names, first_layer, frozen_except, select_parameters
from bayespass.progress import track

# Rates of the mean and of log sd for Adam. At the rate of the mean the sd would hardly leave its start.
DEFAULTS = {"lr": 2e-3, "sd_lr": 2e-2, "init_sd": 0.05}
SHORTEST_WINDOW = 100  # steps: in fewer, Adam could not move the sd far enough to tell rest from the start


def fit_first_layer(
    model: nn.Module,
    train_loader: Iterable[Any],
    *,
    n_data: int,
    prior_precision: float = 1.0,
    temperature: float = 1.0,
    likelihood: Likelihood = "classification",
    sigma_noise: SigmaNoise | None = None,
    names: Names = "first",
    epochs: int = 100,
    tolerance: float | None = 1e-2,
    sd_tolerance: float = 0.05,
    patience: int = 10,
    make_method: Callable[..., Any] | None = None,
    seed: int = 0,
    progress: bool = False,
    **settings: Any,
) -> Posterior:
    """Phase 2 of STF-BNN: variational inference on the first layer of a trained network.

    Everything else, buffers included, is bit for bit what it was; flags and modes are restored. The
    random parameters are left at the posterior mean.

        posterior = fit_first_layer(model, train_loader, n_data=len(train_set), prior_precision=10.0)

    Args:
        model: trained, in any mode.
        train_loader: re-iterable; yields (inputs, targets). Rows of a batch count equally.
        n_data: N, the number of training rows.
        prior_precision: a0 of the prior N(0, 1/a0). One that fits the layer's weights, about one over
            their mean square, keeps it from growing far beyond them. `prior_mean="initial"` centres it
            on the trained weights instead.
        temperature: T, tempers likelihood and prior alike.
        likelihood: "classification" or "regression".
        sigma_noise: sd of the observation noise, or "predicted", for regression.
        names: the random parameters: "first", or another choice of `select_parameters`.
        epochs: at most this many; a third to two thirds of those of phase 1 is usual. The last quarter
            of those that run lowers the learning rate to zero.
        tolerance: lower the rate and stop early once the averages over `patience` epochs show that the
            ELBO rose by less than this, in nats per row, and the sd moved by less than `sd_tolerance`;
            None runs all epochs.
        sd_tolerance: median relative change of the sd from one such average to the next.
        patience: epochs that are averaged, more where they have few steps.
        make_method: a training method, `MeanFieldVI` by default. It is called with the named parameters,
            n_data, prior_precision, temperature, likelihood, sigma_noise, seed and the settings.
        seed: of the weight noise.
        progress: show a progress bar.
        settings: of the method; for `MeanFieldVI` lr=2e-3, sd_lr=2e-2 and init_sd=0.05 by default.

    Returns:
        a posterior over these parameters alone, with `info.method` "first_layer".

    Raises:
        InvalidInput: the first layer is frozen, the loader is empty or yields no targets, or a value is
            outside its range.

    Source: arXiv 2112.06281. No gain in robustness, out-of-distribution detection or privacy was seen in
    small runs, see the head of this file.
    """
    for name, value in {"epochs": epochs, "patience": patience, "sd_tolerance": sd_tolerance}.items():
        if not value > 0:
            msg = f"{name} must be positive; got {value}"
            raise InvalidInput(msg)
    inputs, _ = next(iter(labelled_batches(train_loader, device_of(model))))
    chosen = _chosen(model, names, inputs)
    if make_method is None:
        make_method, settings = MeanFieldVI, DEFAULTS | settings
    with frozen_except(model, [name for name, _ in chosen]):
        method = make_method(
            chosen,
            n_data=n_data,
            prior_precision=prior_precision,
            temperature=temperature,
            likelihood=likelihood,
            sigma_noise=sigma_noise,
            seed=seed,
            **settings,
        )
        run = _Run(model, train_loader, method, likelihood, sigma_noise)
        watch = _Watch(tolerance, sd_tolerance, patience)
        centres = {name: method.state[p]["prior_mean"] for name, p in chosen if "prior_mean" in method.state[p]}
        done, constant = 0, math.ceil(0.75 * epochs)
        for _ in track(range(constant), "first layer", show=progress):
            done, loss = done + 1, run.epoch()
            if tolerance is not None:
                posterior = method.posterior()
                elbo = -loss - temperature / n_data * float(kl_to_prior(posterior, centres))
                if watch.settled(elbo, posterior.variance, run.steps):
                    break
        annealed = min(math.ceil(done / 3), epochs - done)
        for count in track(range(annealed), "first layer, lowering the rate", show=progress):
            run.epoch(1 - (count + 1) / (annealed + 1))
        posterior = method.posterior()
    told = {**posterior.info.settings, "vi_method": posterior.info.method, "epochs": done + annealed}
    posterior.info = replace(posterior.info, method="first_layer", settings=told)
    return posterior


def kl_to_prior(posterior: Posterior, prior_mean: Mapping[str, Tensor] | None = None) -> Tensor:
    """KL(q || p) in nats: sum of (a (v + (m - m0)^2) - 1 - log(a v)) / 2, with a = a0 / T.

    Args:
        posterior: q; a0 and T are those of its `info`, so that p is the prior tempered like the rest.
            Exact for a diagonal Gaussian; correlations would add to it, so it bounds from below a
            Gaussian that has them.
        prior_mean: m0 by name, zero for names that are missing.

    >>> from bayespass import DiagonalGaussian, PosteriorInfo
    >>> q = DiagonalGaussian({"w": torch.ones(2)}, {"w": torch.ones(2)}, PosteriorInfo(prior_precision=1.0))
    >>> kl_to_prior(q)
    tensor(1.)
    """
    precision = posterior.info.prior_precision / posterior.info.temperature
    terms = []
    for name, mean in posterior.mean.items():
        gap = mean if prior_mean is None or name not in prior_mean else mean - prior_mean[name]
        scaled = precision * posterior.variance[name]
        terms.append((scaled + precision * gap.square() - 1 - scaled.log()).sum() / 2)
    return torch.stack(terms).sum()


class _Run:
    """Epochs of one training method on a frozen network."""

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        method: Any,
        likelihood: Likelihood,
        sigma_noise: SigmaNoise | None,
    ) -> None:
        self.model, self.loader, self.method = model, loader, method
        self.likelihood: Likelihood = likelihood
        self.sigma_noise: SigmaNoise | None = sigma_noise
        self.steps = 0  # of the last epoch
        self._rates = [group["lr"] for group in method.param_groups]

    def epoch(self, rate: float = 1.0) -> float:
        """One pass over the data; the mean loss per row, in nats, under the draws it was trained on."""
        optimizer: Optimizer = self.method
        for group, lr in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * lr
        total, rows, self.steps = 0.0, 0, 0
        for inputs, targets in labelled_batches(self.loader, device_of(self.model)):
            total += len(targets) * float(self.method.step(lambda x=inputs, y=targets: self._loss(x, y)))
            rows += len(targets)
            self.steps += 1
        return total / rows

    def _loss(self, inputs: Any, targets: Tensor) -> Tensor:
        args, kwargs = call_arguments(inputs)
        outputs = model_output(self.model(*args, **kwargs))
        targets = check_targets(outputs, targets, self.likelihood, self.sigma_noise)
        loss = negative_log_likelihood(outputs, targets, self.likelihood, self.sigma_noise) / len(targets)
        loss.backward()
        return loss.detach()


class _Watch:
    """Compares averages over `patience` epochs, or `SHORTEST_WINDOW` steps, with those before."""

    def __init__(self, tolerance: float | None, sd_tolerance: float, patience: int) -> None:
        self.tolerance, self.sd_tolerance, self.patience = tolerance, sd_tolerance, patience
        self._epochs, self._steps, self._elbo = 0, 0, 0.0
        self._log_variance: dict[str, Tensor] = {}
        self._before: tuple[float, dict[str, Tensor]] | None = None

    def settled(self, elbo: float, variance: Mapping[str, Tensor], steps: int) -> bool:
        """Whether ELBO and sd have come to rest, after one more epoch of so many steps."""
        self._epochs, self._steps = self._epochs + 1, self._steps + steps
        self._elbo += (elbo - self._elbo) / self._epochs
        for name, value in variance.items():
            new = value.log()
            self._log_variance[name] = torch.lerp(self._log_variance.get(name, new), new, 1 / self._epochs)
        if self._epochs < self.patience or self._steps < SHORTEST_WINDOW:
            return False
        before, self._before = self._before, (self._elbo, self._log_variance)
        self._epochs, self._steps, self._elbo, self._log_variance = 0, 0, 0.0, {}
        if before is None or self.tolerance is None:
            return False
        moved = torch.cat([(new - before[1][name]).abs().flatten() / 2 for name, new in self._before[1].items()])
        return self._before[0] - before[0] < self.tolerance and float(moved.median()) < self.sd_tolerance


def _chosen(model: nn.Module, names: Names, inputs: Any) -> list[tuple[str, nn.Parameter]]:
    """The random parameters.

    Raises:
        InvalidInput: the first layer that runs is frozen.
    """
    chosen = select_parameters(model, names, inputs)
    if isinstance(names, str) and names == "first":
        executed = first_layer(model, inputs, trainable_only=False)
        if not set(executed) & {name for name, _ in chosen}:
            msg = (
                f"the first layer that runs ({', '.join(executed)}) is frozen; call requires_grad_(True) on it, "
                f"or say what is to be random with names=..."
            )
            raise InvalidInput(msg)
    return chosen
