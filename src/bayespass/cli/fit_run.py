"""The training of `bayespass fit`: AdamW where the weights need it, then the posterior, with checkpoints."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import CosineAnnealingLR

from bayespass.cli import fit_after
from bayespass.cli.data import Data, Shuffled
from bayespass.cli.fit_settings import Method, Settings, make_method, named
from bayespass.posterior.base import Posterior
from bayespass.posterior.selection import frozen_except, select_parameters
from bayespass.training import TrainingLog, train

WARM_START, METHOD = "warm_start.checkpoint", "method.checkpoint"
CHECKPOINTS = (WARM_START, METHOD, "member*.checkpoint")


@dataclass(frozen=True)
class Outcome:
    """What training gives.

    Args:
        posterior: over the random parameters; the network is left at its mean, or at its first member.
        warm_start: of AdamW, if it ran.
        training: of the method; None for those that need no training of their own.
        notes: warnings and verdicts, in sentences.
    """

    posterior: Posterior
    warm_start: TrainingLog | None
    training: TrainingLog | None
    notes: tuple[str, ...]


def run(
    network: nn.Module,
    build: fit_after.Build,
    data: Data,
    held_out: Data,
    settings: Settings,
    output: Path,
    checkpoint_every: int,
    *,
    progress: bool,
) -> Outcome:
    """Train in place; what is already done in the output folder is taken from its checkpoints.

    Args:
        network: at the weights to start from.
        build: makes another network to start from, given a seed.
        data: training rows.
        held_out: validation rows, for what is tuned on them.
        settings: resolved.
        output: folder of the checkpoints.
        checkpoint_every: updates between checkpoints.
        progress: show progress bars.
    """
    with _noted() as notes:
        loader = Shuffled(data, settings.batch_size)
        options = {"checkpoint_every": checkpoint_every, "seed": settings.seed, "progress": progress}
        method, checkpoint = settings.method, output / METHOD
        if method == Method.ENSEMBLE:
            members = fit_after.fit_ensemble(
                network, build, loader, settings, lambda k: output / f"member{k}.checkpoint", options
            )
            return Outcome(members[0], members[1], None, (*notes, *members[2]))
        first = fit_after.train_map(network, loader, settings, output / WARM_START, options)
        if method == Method.LAPLACE:
            made = fit_after.fit_laplace(network, data, settings, held_out, progress)
        elif method == Method.NULL_SPACE:
            made = fit_after.fit_null_space(network, data, settings, held_out, checkpoint, progress)
        elif method == Method.MC_DROPOUT:
            made = fit_after.fit_dropout(network, data, settings)
        elif method == Method.SWAG:
            made = fit_after.fit_swag(network, loader, settings, checkpoint, options)
        elif method == Method.SGLD:
            made = fit_after.fit_sgld(network, loader, settings, checkpoint, options)
        else:
            made = (*_train(network, loader, settings, checkpoint, options), ())
    return Outcome(made[0], first, made[1], (*notes, *made[2]))


def _train(
    network: nn.Module, loader: Shuffled, settings: Settings, checkpoint: Path, options: dict[str, Any]
) -> tuple[Posterior, TrainingLog]:
    """The method on the parameters that --names chooses; when that is not all, the others stay fixed."""
    inputs, _ = next(iter(loader.data.batches(min(2, len(loader.data)))))
    parameters = select_parameters(network, named(settings.names or "all"), inputs)
    alone = settings.names != "all"
    epochs = settings.epochs or 1
    with frozen_except(network, [name for name, _ in parameters]) if alone else nullcontext():
        method = make_method(settings, parameters, len(loader.data), len(loader))
        log = train(
            network,
            method,
            loader,
            epochs,
            scheduler=CosineAnnealingLR(method, epochs * len(loader)),
            checkpoint=checkpoint,
            keep_modes=alone,
            update_norms=not alone and any(isinstance(module, _BatchNorm) for module in network.modules()),
            **options,
        )
        posterior = method.posterior()
    if settings.method == Method.FIRST_LAYER:
        told = {**posterior.info.settings, "vi_method": posterior.info.method, "epochs": epochs}
        posterior.info = replace(posterior.info, method="first_layer", settings=told)
    network.eval()
    return posterior, log


@contextmanager
def _noted() -> Iterator[list[str]]:
    """Collect warnings as sentences; if the block fails they go to standard error, they may say why.

    Yields:
        the list that holds them when the block has ended.
    """
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield notes
        except BaseException:
            for note in _sentences(caught):
                typer.secho(f"warning: {note}", fg=typer.colors.YELLOW, err=True)
            raise
    notes += _sentences(caught)


def _sentences(caught: Iterable[warnings.WarningMessage]) -> list[str]:
    others = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)  # for developers, not users
    return list(dict.fromkeys(str(one.message) for one in caught if not issubclass(one.category, others)))
