"""The training of `bayespass fit`: AdamW where the weights need it, then the posterior, with checkpoints."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import typer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import CosineAnnealingLR

from bayespass.cli.data import Data, Shuffled
from bayespass.cli.fit_settings import Method, Settings, make_method, named
from bayespass.posterior.base import Posterior, PosteriorInfo
from bayespass.posterior.laplace import Laplace
from bayespass.posterior.selection import frozen_except, select_parameters
from bayespass.training import TrainingLog, likelihood_loss, train

CHECKPOINTS = ("warm_start.checkpoint", "method.checkpoint")


@dataclass(frozen=True)
class Outcome:
    """What training gives.

    Args:
        posterior: over the random parameters; the network is left at its mean.
        warm_start: of AdamW, if it ran.
        training: of the method; None for laplace.
        notes: warnings and verdicts, in sentences.
    """

    posterior: Posterior
    warm_start: TrainingLog | None
    training: TrainingLog | None
    notes: tuple[str, ...]


def run(
    network: nn.Module, data: Data, settings: Settings, output: Path, checkpoint_every: int, *, progress: bool
) -> Outcome:
    """Train in place; what is already done in the output folder is taken from its checkpoints.

    Args:
        network: at the weights to start from.
        data: training rows.
        settings: resolved.
        output: folder of the checkpoints.
        checkpoint_every: updates between checkpoints.
        progress: show progress bars.
    """
    with _noted() as notes:
        loader = Shuffled(data, settings.batch_size)
        options = {"checkpoint_every": checkpoint_every, "seed": settings.seed, "progress": progress}
        first = _warm_start(network, loader, settings, output / CHECKPOINTS[0], options)
        if settings.method == Method.LAPLACE:
            posterior, verdicts = _laplace(network, data, settings, progress)
            training, more = None, verdicts
        else:
            posterior, training = _train(network, loader, settings, output / CHECKPOINTS[1], options)
            more = ()
    return Outcome(posterior, first, training, (*notes, *more))


def _warm_start(
    network: nn.Module, loader: Shuffled, settings: Settings, checkpoint: Path, options: dict[str, Any]
) -> TrainingLog | None:
    """AdamW on all weights that require gradients, its rate lowered to zero by a cosine."""
    epochs = settings.map_epochs or 0
    if epochs == 0:
        return None
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.map_lr or 1e-3, weight_decay=settings.weight_decay or 0.0)
    info = PosteriorInfo(settings.likelihood, sigma_noise=settings.sigma_noise)  # type: ignore[arg-type]
    return train(
        network,
        optimizer,
        loader,
        epochs,
        likelihood_loss(info),
        scheduler=CosineAnnealingLR(optimizer, epochs * len(loader)),
        checkpoint=checkpoint,
        **options,
    )


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


def _laplace(network: nn.Module, data: Data, settings: Settings, progress: bool) -> tuple[Posterior, tuple[str, ...]]:
    """Laplace at the weights; its prior precision tuned on the training data unless it was given."""
    batches = data.batches(settings.batch_size)
    chosen = select_parameters(network, named(settings.names or "all"), batches[0][0])
    method = Laplace(
        network,
        likelihood=settings.likelihood,  # type: ignore[arg-type]
        prior_precision=settings.prior_precision or 1.0,
        temperature=settings.temperature or 1.0,
        sigma_noise=settings.sigma_noise,  # type: ignore[arg-type]
        names=[name for name, _ in chosen],
    ).fit(batches, progress=progress)
    if settings.prior_precision is not None:
        return method.posterior(), ()
    tuning = method.optimize_prior_precision("marglik", progress=progress)
    return method.posterior(), (f"prior precision by marginal likelihood: {tuning.verdict}",)


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
