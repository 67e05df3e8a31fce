"""The methods of `bayespass fit` that need trained weights, or several runs of ordinary training."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import CosineAnnealingLR

from bayespass.cli.data import Data, Shuffled
from bayespass.cli.fit_settings import EPOCHS, MEMBERS, RATES, Method, Settings, named
from bayespass.errors import InvalidInput
from bayespass.posterior.base import Posterior, PosteriorInfo
from bayespass.posterior.dropout import dropout_posterior
from bayespass.posterior.ensemble import ensemble
from bayespass.posterior.laplace import Laplace
from bayespass.posterior.null_space import NullSpace
from bayespass.posterior.selection import select_parameters
from bayespass.posterior.sgld import SGLD
from bayespass.posterior.swag import SWAG
from bayespass.predict.linearised import Linearised
from bayespass.training import TrainingLog, likelihood_loss, recompute_norms, train

Build = Callable[[int], nn.Module]
Made = tuple[Posterior, TrainingLog | None, tuple[str, ...]]


def info_of(settings: Settings, n_data: int, method: str) -> PosteriorInfo:
    """What a posterior of these settings records."""
    return PosteriorInfo(
        settings.likelihood,  # type: ignore[arg-type]
        n_data,
        temperature=settings.temperature or 1.0,
        sigma_noise=settings.sigma_noise,  # type: ignore[arg-type]
        method=method,
    )


def train_map(
    network: nn.Module, loader: Shuffled, settings: Settings, checkpoint: Path, options: dict[str, Any]
) -> TrainingLog | None:
    """AdamW on all weights that require gradients, its rate lowered to zero by a cosine.

    Args:
        network: at the weights to start from.
        loader: training rows.
        settings: resolved.
        checkpoint: file to continue from.
        options: of `train`.

    Returns:
        None where no epoch is asked for.
    """
    epochs = settings.map_epochs or 0
    if epochs == 0:
        return None
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.map_lr or 1e-3, weight_decay=settings.weight_decay or 0.0)
    return train(
        network,
        optimizer,
        loader,
        epochs,
        likelihood_loss(info_of(settings, len(loader.data), "map")),
        scheduler=CosineAnnealingLR(optimizer, epochs * len(loader)),
        checkpoint=checkpoint,
        **options,
    )


def fit_laplace(network: nn.Module, data: Data, settings: Settings, held_out: Data, progress: bool) -> Made:
    """Laplace at the weights; its prior precision tuned on the validation rows unless it was given.

    The marginal likelihood of a network that fits its data well asks for priors that predict badly.
    """
    batches = data.batches(settings.batch_size)
    method = Laplace(
        network,
        likelihood=settings.likelihood,  # type: ignore[arg-type]
        hessian_structure=settings.hessian_structure or "diag",  # type: ignore[arg-type]
        prior_precision=settings.prior_precision or 1.0,
        temperature=settings.temperature or 1.0,
        sigma_noise=settings.sigma_noise,  # type: ignore[arg-type]
        names=_chosen(network, batches, settings),
    ).fit(batches, progress=progress)
    covered = f"curvature of {str(method.coverage()).splitlines()[-1]}"
    if settings.prior_precision is not None:
        return method.posterior(), None, (covered,)
    validation = held_out.batches(settings.batch_size)
    tuning = method.optimize_prior_precision("gridsearch", validation, predictor=Linearised, progress=progress)
    return method.posterior(), None, (covered, f"prior precision on the validation rows: {tuning.verdict}")


def fit_null_space(
    network: nn.Module, data: Data, settings: Settings, held_out: Data, checkpoint: Path, progress: bool
) -> Made:
    """Draws in the kernel of the curvature; their scale tuned on the validation rows unless it was given."""
    batches = data.batches(settings.batch_size)
    method = NullSpace(
        network,
        likelihood=settings.likelihood,  # type: ignore[arg-type]
        sigma_noise=settings.sigma_noise,  # type: ignore[arg-type]
        rows=settings.rows or "outputs",  # type: ignore[arg-type]
        prior_precision=settings.prior_precision or 1.0,
        names=_chosen(network, batches, settings),
        n_samples=settings.members or MEMBERS[Method.NULL_SPACE],
        seed=settings.seed,
    ).fit(batches, checkpoint=checkpoint, progress=progress)
    report = method.report_
    notes: tuple[str, ...] = (
        f"{report.method}: {report.n_rows} rows, {report.n_params} parameters, {report.solver} solver, "
        f"|J d| / |J e| {report.residual:.2g} after {report.epochs} epochs",
    )
    if settings.prior_precision is None:
        tuning = method.optimize_prior_precision(held_out.batches(settings.batch_size))
        notes = (*notes, f"prior precision on the validation rows: {tuning.verdict}")
    return method.posterior(), None, notes


def fit_dropout(network: nn.Module, data: Data, settings: Settings) -> Made:
    """The posterior that the network's dropout modules stand for."""
    info = info_of(settings, len(data), "mc_dropout")
    return dropout_posterior(network, data.batches(settings.batch_size)[0][0], info), None, ()


def fit_swag(
    network: nn.Module, loader: Shuffled, settings: Settings, checkpoint: Path, options: dict[str, Any]
) -> Made:
    """SGD with momentum at a constant rate, the weights collected after every epoch.

    Raises:
        InvalidInput: fewer than two epochs.
    """
    chosen = select_parameters(network, named(settings.names or "all"), _first_inputs(loader))
    rank, epochs = settings.members or MEMBERS[Method.SWAG], settings.epochs or EPOCHS
    if epochs < 2:
        msg = f"--epochs must be at least 2 for swag, which collects weights after every epoch; got {epochs}"
        raise InvalidInput(msg)
    info = info_of(settings, len(loader.data), "swag")
    swag = SWAG(chosen, len(loader.data), rank, info.likelihood, info.sigma_noise)
    optimizer = torch.optim.SGD(
        [p for _, p in chosen],
        lr=settings.lr or RATES[Method.SWAG],
        momentum=0.9,
        weight_decay=settings.weight_decay or 0,
    )
    loss = likelihood_loss(info)
    log = train(
        network,
        optimizer,
        loader,
        epochs,
        loss,
        scheduler=_Collects(swag, len(loader)),
        checkpoint=checkpoint,
        **options,
    )
    posterior = swag.posterior()
    _place(network, posterior, loader)
    return posterior, log, ()


def fit_sgld(
    network: nn.Module, loader: Shuffled, settings: Settings, checkpoint: Path, options: dict[str, Any]
) -> Made:
    """Langevin dynamics from the weights; the second half of the chain is kept, evenly thinned."""
    chosen = select_parameters(network, named(settings.names or "all"), _first_inputs(loader))
    n_data, epochs = len(loader.data), settings.epochs or EPOCHS
    steps, members = epochs * len(loader), settings.members or MEMBERS[Method.SGLD]
    burn_in = steps // 2
    method = SGLD(
        chosen,
        lr=settings.lr or RATES[Method.SGLD] / n_data,
        n_data=n_data,
        prior_precision=settings.prior_precision or 1.0,
        temperature=settings.temperature or 1.0,
        burn_in=burn_in,
        thin=max(1, (steps - burn_in) // members),
        likelihood=settings.likelihood,  # type: ignore[arg-type]
        sigma_noise=settings.sigma_noise,  # type: ignore[arg-type]
        seed=settings.seed,
    )
    keep = lambda *_: method.collect()  # noqa: E731
    log = train(network, method, loader, epochs, checkpoint=checkpoint, on_step=keep, **options)
    return method.posterior(), log, ()


def fit_ensemble(
    network: nn.Module,
    build: Build,
    loader: Shuffled,
    settings: Settings,
    checkpoints: Callable[[int], Path],
    options: dict[str, Any],
) -> Made:
    """Networks trained one by one from weights and orders of their own; the given one is the first."""
    members = [network]
    logs = [train_map(network, loader, settings, checkpoints(0), options)]
    for k in range(1, settings.members or MEMBERS[Method.ENSEMBLE]):
        seed = settings.seed + k
        member = build(seed).to(next(network.parameters()).device)
        logs.append(train_map(member, loader, settings, checkpoints(k), {**options, "seed": seed}))
        members.append(member)
    info = replace(info_of(settings, len(loader.data), "ensemble"), settings={"members": len(members)})
    return ensemble(members, info, network), logs[0], ()


def _chosen(network: nn.Module, batches: list[Any], settings: Settings) -> list[str]:
    return [name for name, _ in select_parameters(network, named(settings.names or "all"), batches[0][0])]


def _first_inputs(loader: Shuffled) -> Any:
    return loader.data.batches(min(2, len(loader.data)))[0][0]


def _place(network: nn.Module, posterior: Posterior, loader: Shuffled) -> None:
    """Put the mean into the network, with the batch-norm statistics of it."""
    with torch.no_grad():
        parameters = dict(network.named_parameters())
        for name, mean in posterior.mean.items():
            parameters[name].copy_(mean)
    if any(isinstance(module, _BatchNorm) for module in network.modules()):
        recompute_norms(network, loader)


class _Collects:
    """Calls `collect` at the end of every epoch, in the place of a scheduler, so that checkpoints hold it.

    Args:
        swag: whose `collect` to call.
        steps_per_epoch: updates in an epoch.
    """

    def __init__(self, swag: SWAG, steps_per_epoch: int) -> None:
        self.swag, self.steps_per_epoch, self.n_steps = swag, steps_per_epoch, 0

    def step(self) -> None:
        """Count an update."""
        self.n_steps += 1
        if self.n_steps % self.steps_per_epoch == 0:
            self.swag.collect()

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs."""
        return {"n_steps": self.n_steps, "swag": self.swag.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.n_steps = state["n_steps"]
        self.swag.load_state_dict(state["swag"])
