"""The plain training loop, for every training method and for any optimizer, with exact resume.

    method = IVON(model.named_parameters(), lr=0.1, n_data=len(data))
    log = train(model, method, loader, epochs=10, checkpoint="run.safetensors")
    posterior = method.posterior()

The loss is a MEAN over data, and a datum is one row of a batch: entry i along the first axis, with
all of its targets. Several outputs of one row (regression targets, pixels, tokens) are summed, as
their log-likelihoods are; averaging them too would weaken the data against the prior by their
number. `n_data` counts rows, then. A loss of your own that also averages over tokens goes with an
`n_data` that counts tokens.

Killed at any moment, the same call continues from the last checkpoint and ends in the same bits as
a run that was never interrupted, in the middle of an epoch too, on the same machine and software
with as many threads.
What that needs: order and augmentation of the data come from PyTorch's random numbers (its samplers
and workers do; reseed numpy or `random` from `torch.initial_seed()` in a `worker_init_fn`), and a
loader does not carry random state from one epoch into the next (`persistent_workers=True` with random
augmentation does).
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import update_bn

from bayespass.batches import call_arguments, device_of, input_batches, labelled_batches, model_output
from bayespass.checkpoint import Run, fingerprint, length, resume, save_run
from bayespass.errors import BayespassError, InvalidInput
from bayespass.likelihood import check_targets, negative_log_likelihood
from bayespass.posterior.base import PosteriorInfo
from bayespass.progress import training_bar

Loss = Callable[[Tensor, Tensor], Tensor]


class NonFiniteLoss(BayespassError, ArithmeticError):
    """Training ran into NaN or infinity.

    React by lowering the learning rate, or by looking at the batch that the step was taken on.
    """


@dataclass(frozen=True)
class TrainingLog:
    """What happened, step by step.

    Args:
        losses: mean loss of every step, before its update; with a training method at drawn weights.
        lrs: learning rate of every step, of the first parameter group.
        epochs: passes over the data.
        seconds: spent, over all runs that a checkpoint joined.
    """

    losses: tuple[float, ...]
    lrs: tuple[float, ...]
    epochs: int
    seconds: float

    @property
    def steps(self) -> int:
        """Number of updates."""
        return len(self.losses)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "steps": self.steps}


def likelihood_loss(info: PosteriorInfo) -> Loss:
    """-log p(targets | outputs) / B: the mean over the B rows of a batch, in nats.

    Args:
        info: names the likelihood, such as `method.info`; what belongs to one row is summed.
    """

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        targets = check_targets(outputs, targets, info.likelihood, info.sigma_noise)
        return negative_log_likelihood(outputs, targets, info.likelihood, info.sigma_noise) / len(outputs)

    return loss


def train(
    model: nn.Module,
    method: Optimizer,
    loader: Iterable[Any],
    epochs: int,
    loss: Loss | None = None,
    *,
    scheduler: Any = None,
    gradient_accumulation: int = 1,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 200,
    update_norms: bool = False,
    keep_modes: bool = False,
    seed: int = 0,
    progress: bool = False,
    on_step: Callable[[int, float], Any] | None = None,
) -> TrainingLog:
    """Train a model in place, by a training method or by any optimizer, and leave it in eval mode.

    Args:
        model: any `nn.Module`; with a training method its weights end at the mean.
        method: a training method such as `IVON`, or any `torch.optim.Optimizer`, over its parameters.
        loader: a `DataLoader` or list of batches `(inputs, targets)`, or dicts with "labels"; read once
            per epoch.
        epochs: passes over the loader. A finished run can be continued by asking for more.
        loss: of the model's output and the targets, the mean over the batch without an L2 term; None
            takes the likelihood that the method was made for, see `likelihood_loss`.
        scheduler: of the learning rate, over `method`; one step of it follows every update.
        gradient_accumulation: batches per update. They share its weight draws, and rows weigh the same
            whatever the sizes of the batches.
        checkpoint: a file to write every `checkpoint_every` updates and at the end, and to continue
            from if it is there; a finished one returns at once. A model, method, scheduler or setting
            other than the one it was written for is an error.
        checkpoint_every: updates between checkpoints.
        update_norms: recompute batch-norm statistics at the final weights, by one more pass over the
            loader; those of the run belong to drawn weights.
        keep_modes: leave every module in the mode it is in, during and after; the default puts the
            whole model in training mode, then in eval mode.
        seed: of the data's order, dropout and augmentation. PyTorch's global random state, a generator
            of the loader too, is set from it and the epoch's number; the global one is put back at the end.
        progress: show a bar.
        on_step: called after every update with the number of updates so far and the loss; the weights
            are the mean then.

    Raises:
        InvalidInput: settings out of range, a loader that is no loader, a checkpoint that does not fit.
        NonFiniteLoss: the loss or the weights became NaN or infinite; the last checkpoint is untouched.

    >>> model = nn.Linear(2, 1)
    >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> data = [(torch.eye(2), torch.tensor([[1.0], [2.0]]))]
    >>> train(model, sgd, data, 500, nn.functional.mse_loss).losses[-1] < 1e-6
    True
    """
    _check_settings(model, method, loader, scheduler, checkpoint)
    for name, value in {"epochs": epochs, "gradient_accumulation": gradient_accumulation}.items():
        _require_count(name, value)
    _require_count("checkpoint_every", checkpoint_every)
    if loss is None:
        loss = _default_loss(method)
    path = None if checkpoint is None else Path(checkpoint)
    settings = {"seed": seed, "gradient_accumulation": gradient_accumulation, "update_norms": update_norms}
    identity = fingerprint(model, method, loader, scheduler, settings)
    parts = {"model": model, "method": method, "scheduler": scheduler}
    run = Run()
    if path is not None and path.exists():
        run = resume(path, parts, identity)
        if run.epoch > epochs:
            msg = f"checkpoint {path} has {run.epoch} epochs behind it; epochs must be at least that, got {epochs}"
            raise InvalidInput(msg)
        if run.epoch == epochs:
            if not keep_modes:
                model.eval()
            return _log(run)
    started = time.perf_counter() - run.seconds

    def save() -> None:
        _check_finite(method, len(run.losses))
        if path is not None:
            run.seconds = time.perf_counter() - started
            save_run(path, parts, identity, run)

    per_epoch = length(loader)
    total = None if per_epoch is None else epochs * math.ceil(per_epoch / gradient_accumulation)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    bar = training_bar(f"training ({type(method).__name__})", show=progress, total=total, done=len(run.losses))
    try:
        with torch.random.fork_rng(devices), bar as advance:
            if not keep_modes:
                model.train()
            while run.epoch < epochs:
                for window in _remaining(loader, gradient_accumulation, seed, run):
                    run.lrs.append(float(method.param_groups[0]["lr"]))
                    run.losses.append(_step(model, method, window, loss, len(run.losses) + 1))
                    run.windows += 1
                    if scheduler is not None:
                        scheduler.step()
                    advance(run.losses[-1])
                    if on_step is not None:
                        on_step(len(run.losses), run.losses[-1])
                    if len(run.losses) % checkpoint_every == 0 and path is not None:
                        save()
                run.epoch, run.windows = run.epoch + 1, 0
            if update_norms:
                _seed_epoch(loader, seed, epochs)
                recompute_norms(model, loader)
            save()
    finally:
        if not keep_modes:
            model.eval()
    run.seconds = time.perf_counter() - started
    return _log(run)


def _step(model: nn.Module, method: Optimizer, window: list[Any], loss: Loss, number: int) -> float:
    """One update from the batches of a window; returns their mean loss, over draws too."""
    batches = list(labelled_batches(window, device_of(model)))
    rows = [len(targets) if targets.dim() else 1 for _, targets in batches]
    values: list[float] = []

    def closure() -> Tensor:
        model.zero_grad()  # of the weights that the method leaves alone, too
        total = torch.zeros((), dtype=torch.float64)
        for (inputs, targets), count in zip(batches, rows, strict=True):
            args, kwargs = call_arguments(inputs)
            value = loss(model_output(model(*args, **kwargs)), targets)
            if value.dim():
                msg = f"loss must return one number, the mean over the batch; got shape {tuple(value.shape)}"
                raise InvalidInput(msg)
            if not bool(torch.isfinite(value)):
                msg = (
                    f"the loss is {float(value.detach())} at step {number}; lower the learning rate, or check the "
                    f"inputs of that step for NaN. Checkpoints hold the steps before it"
                )
                raise NonFiniteLoss(msg)
            value = value * (count / sum(rows))
            value.backward()
            total += value.detach().cpu().double()
        values.append(float(total))
        return total

    method.step(closure)  # type: ignore[arg-type, call-overload]
    return sum(values) / len(values)


class _Called(nn.Module):
    """A model that is called with the inputs of a batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> Any:
        args, kwargs = call_arguments(inputs)
        return self.model(*args, **kwargs)


def recompute_norms(model: nn.Module, loader: Iterable[Any]) -> None:
    """Recompute the running statistics of batch norms at the present weights, from the inputs of a loader."""
    modes = {module: module.training for module in model.modules()}
    try:
        update_bn(([inputs] for inputs in input_batches(loader, device_of(model))), _Called(model))
    finally:
        for module, training in modes.items():
            module.training = training


def _remaining(loader: Iterable[Any], size: int, seed: int, run: Run) -> Iterator[list[Any]]:
    """The windows of this epoch that are not done yet, in the order that its seed gives.

    Raises:
        InvalidInput: the loader yields no batch, or fewer than are done.
    """
    _seed_epoch(loader, seed, run.epoch)
    iterator = iter(loader)
    for _ in range(run.windows):
        if not list(islice(iterator, size)):
            msg = (
                f"the loader yields fewer batches than the checkpoint has behind it in epoch {run.epoch + 1}; "
                f"continue with the data that the run began with"
            )
            raise InvalidInput(msg)
    run.restore_rng()
    seen = run.windows
    while window := list(islice(iterator, size)):
        seen += 1
        yield window
    if not seen:
        msg = "the loader yields no batch; pass a re-iterable loader (a DataLoader or a list) with at least one"
        raise InvalidInput(msg)


def _seed_epoch(loader: Any, seed: int, epoch: int) -> None:
    """Set every random state that decides the order and the augmentation of an epoch."""
    everything, own = (int(word) >> 1 for word in np.random.SeedSequence((seed, epoch)).generate_state(2, np.uint64))
    torch.manual_seed(everything)
    batch_sampler = getattr(loader, "batch_sampler", None)
    for part in (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)):
        if isinstance(getattr(part, "generator", None), torch.Generator):
            part.generator.manual_seed(own)  # type: ignore[union-attr]
        if callable(getattr(part, "set_epoch", None)):
            part.set_epoch(epoch)  # type: ignore[union-attr]


def _check_settings(model: nn.Module, method: Optimizer, loader: Any, scheduler: Any, checkpoint: Any) -> None:
    if isinstance(loader, Tensor | Mapping | tuple | Iterator) or not isinstance(loader, Iterable):
        msg = (
            f"loader must be re-iterable, a DataLoader or a list of batches such as [(inputs, targets)]; "
            f"got {type(loader).__name__}"
        )
        raise InvalidInput(msg)
    theirs = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) not in theirs for group in method.param_groups for parameter in group["params"]):
        msg = f"{type(method).__name__} holds parameters that {type(model).__name__} lacks; make it from this model's"
        raise InvalidInput(msg)
    if isinstance(scheduler, ReduceLROnPlateau):
        msg = "ReduceLROnPlateau needs a validation figure, which train() does not have; step it yourself in on_step"
        raise InvalidInput(msg)
    if scheduler is not None and getattr(scheduler, "optimizer", method) is not method:
        msg = "scheduler changes another optimizer's learning rate; make it with scheduler(method, ...)"
        raise InvalidInput(msg)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if checkpoint is not None and distributed and torch.distributed.get_world_size() > 1:
        msg = "checkpoint is for one process; with several use the transformers or Lightning integration"
        raise InvalidInput(msg)


def _require_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        msg = f"{name} must be a whole number of at least 1; got {value!r}"
        raise InvalidInput(msg)


def _default_loss(method: Optimizer) -> Loss:
    info = getattr(method, "info", None)
    if not isinstance(info, PosteriorInfo):
        msg = (
            f"{type(method).__name__} has no likelihood to take the loss from; "
            f"pass loss, for example torch.nn.functional.cross_entropy"
        )
        raise InvalidInput(msg)
    return likelihood_loss(info)


def _check_finite(method: Optimizer, step: int) -> None:
    with torch.no_grad():
        for group in method.param_groups:
            for parameter in group["params"]:
                if not bool(torch.isfinite(parameter).all()):
                    msg = (
                        f"weights are NaN or infinite after step {step}; lower the learning rate. "
                        f"The last checkpoint is untouched"
                    )
                    raise NonFiniteLoss(msg)


def _log(run: Run) -> TrainingLog:
    return TrainingLog(tuple(run.losses), tuple(run.lrs), run.epoch, run.seconds)
