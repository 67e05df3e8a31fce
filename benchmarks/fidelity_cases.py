"""What every task of the fidelity benchmark shares: its rows, its network, its posteriors and its draws.

A `Case` is one task at one seed: a network, rows to train on, held-out rows and test rows. Held-out rows
choose whatever is chosen (prior precision of Laplace, temperature of MAP) and, without their labels, fit the
calibration of a single pass; test rows are for the figures alone and are the same for every seed.

Posteriors, over every parameter of the case's network. "ivon": from the network that AdamW trained, IVON with
a cosine schedule after a warm-up of one tenth, norms at rest. "laplace": a diagonal around the AdamW weights,
curvature "mc", prior precision of the lowest Monte-Carlo log loss (32 draws) on the held-out rows out of a
grid. A scale s multiplies every variance of the posterior by s (`Posterior.temper`), the mean stays.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import LambdaLR

from bayespass import IVON, Laplace, MonteCarlo, Posterior
from bayespass.batches import batch_size, call_arguments, rows_of
from bayespass.likelihood import Likelihood, SigmaNoise
from bayespass.training import train

Batches = list[tuple[Any, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]
PRIOR_DRAWS = 32
SMOKE_ROWS, SMOKE_EPOCHS, SMOKE_GRID = 48, 2, (10.0, 1000.0)


@dataclass(frozen=True)
class Case:
    """One task at one seed.

    Args:
        model: in eval mode; trained already where the task has no `adamw` settings.
        train: batches of (inputs, targets) to learn from.
        held_out: batches that choices are made on; their inputs alone fit calibrations.
        tests: batches of every test set by name; "test" is drawn as the training rows are.
        n_data: training rows that `train` stands for.
        loss: of AdamW, and of IVON for classification.
        sigma_noise: of regression; None is found on the held-out rows as the root mean square error.
    """

    model: nn.Module
    train: Batches
    held_out: Batches
    tests: dict[str, Batches]
    n_data: int
    loss: Loss
    sigma_noise: SigmaNoise | None = None


@dataclass(frozen=True)
class Task:
    """A task and its settings.

    Args:
        load: (data folder, cache folder, seed) -> its case.
        scales: factors of the posterior's variance.
        adamw: epochs, lr and weight_decay; empty for a network that is trained already.
        ivon: epochs, and settings of `IVON`.
        grid: prior precisions of Laplace that are tried.
        reference: draws of the Monte-Carlo reference.
        likelihood: "classification" or "regression".
        curvature_rows: training rows, at most, whose curvature is computed; it stands for all of them.
        block: neighbouring test rows that a bootstrap draws together.
        few_rows: too few test rows for coverage at a risk of 0.5 %.
    """

    load: Callable[..., Case]
    scales: tuple[float, ...]
    adamw: dict[str, Any]
    ivon: dict[str, Any]
    grid: tuple[float, ...]
    reference: int = 128
    likelihood: Likelihood = "classification"
    curvature_rows: int = 5000
    block: int = 1
    few_rows: bool = False


@dataclass(frozen=True)
class Fitted:
    """A posterior and how it came about."""

    posterior: Posterior
    settings: dict[str, Any] = field(default_factory=dict)


class Reordered:
    """Batches in another order in every epoch; plain tensors in new batches too."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self.joined = None
        if all(isinstance(inputs, Tensor) for inputs, _ in batches):
            self.joined = torch.cat([inputs for inputs, _ in batches]), targets_of(batches)
        self.size = batch_size(batches[0][0])

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        if self.joined is None:
            for index in torch.randperm(len(self.batches)).tolist():
                yield self.batches[index]
            return
        inputs, targets = self.joined
        for rows in torch.randperm(len(targets)).split(self.size):
            yield inputs[rows], targets[rows]


def in_batches(inputs: Tensor, targets: Tensor, size: int) -> Batches:
    """Rows in order, in batches."""
    return list(zip(inputs.split(size), targets.split(size), strict=True))


def targets_of(batches: Batches) -> Tensor:
    """All targets, in order."""
    return torch.cat([targets for _, targets in batches])


def inputs_of(batches: Batches) -> list[Any]:
    """The inputs of every batch."""
    return [inputs for inputs, _ in batches]


def first_rows(batches: Batches, count: int) -> Batches:
    """The first rows of batches, as batches."""
    found, left = [], count
    for inputs, targets in batches:
        rows = slice(0, min(left, len(targets)))
        if rows.stop:
            found.append((rows_of(inputs, rows), targets[rows]))
        left -= rows.stop
    return found


def smoked(case: Case) -> Case:
    """The case with few rows."""
    tests = {name: first_rows(batches, SMOKE_ROWS) for name, batches in case.tests.items()}
    kept = first_rows(case.train, SMOKE_ROWS)
    return replace(case, train=kept, held_out=first_rows(case.held_out, SMOKE_ROWS), tests=tests)


def smoked_task(task: Task) -> Task:
    """The task with short runs."""
    short = {name: s | {"epochs": SMOKE_EPOCHS} if s else s for name, s in (("adamw", task.adamw), ("ivon", task.ivon))}
    return replace(task, **short, grid=SMOKE_GRID, scales=task.scales[:1], reference=32, curvature_rows=SMOKE_ROWS)


def fit_network(task: Task, case: Case, seed: int) -> None:
    """Train the case's network in place by AdamW, if the task says so, and leave it in eval mode."""
    case.model.eval()
    if not task.adamw:
        return
    settings = dict(task.adamw)
    epochs = settings.pop("epochs")
    optimizer = torch.optim.AdamW(case.model.parameters(), **settings)
    _run(case, optimizer, epochs, seed, case.loss)


def fit_posterior(task: Task, case: Case, kind: str, seed: int) -> Fitted:
    """The posterior of the case's trained network, which is left as it was.

    Args:
        task: its settings.
        case: with a trained network.
        kind: "ivon" or "laplace".
        seed: of batches and draws.
    """
    noise = case.sigma_noise
    if task.likelihood == "regression" and noise is None:
        noise = held_out_error(case)
    if kind == "ivon":
        return _fit_ivon(task, case, seed, noise)
    return _fit_laplace(task, case, seed, noise)


def held_out_error(case: Case) -> float:
    """Root mean square error of the network on the held-out rows."""
    with torch.inference_mode():
        gaps = [(case.model(inputs) - targets).square().flatten() for inputs, targets in case.held_out]
    return float(torch.cat(gaps).mean().sqrt())


def _fit_ivon(task: Task, case: Case, seed: int, noise: SigmaNoise | None) -> Fitted:
    settings = dict(task.ivon)
    epochs = settings.pop("epochs")
    before = {name: value.detach().clone() for name, value in case.model.state_dict().items()}
    method = IVON(
        case.model.named_parameters(),
        n_data=case.n_data,
        likelihood=task.likelihood,
        sigma_noise=noise,
        seed=seed,
        **settings,
    )
    _run(case, method, epochs, seed + 1, None, keep_modes=True)
    posterior = method.posterior()
    case.model.load_state_dict(before)
    return Fitted(posterior, {"ivon_epochs": epochs, **{f"ivon_{k}": v for k, v in settings.items()}})


def _fit_laplace(task: Task, case: Case, seed: int, noise: SigmaNoise | None) -> Fitted:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(case.train), generator=generator).tolist()
    rows = first_rows([case.train[index] for index in chosen], task.curvature_rows)
    targets_per_row = targets_of(rows)[0].numel()
    temperature = len(targets_of(rows)) * targets_per_row / case.n_data
    laplace = Laplace(case.model, task.likelihood, curvature="mc", sigma_noise=noise, temperature=temperature).fit(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the verdict is in the result
        tuning = laplace.optimize_prior_precision(
            "gridsearch",
            case.held_out,
            [temperature * value for value in task.grid],
            lambda network, posterior: MonteCarlo(network, posterior, PRIOR_DRAWS, seed),
        )
    settings = {
        "laplace_prior_precision": tuning.best / temperature,
        "laplace_prior_at_edge": tuning.at_edge,
        "laplace_held_out_nll": dict(zip(tuning.grid, tuning.scores, strict=True))[tuning.best],
        "laplace_held_out_nll_map": tuning.map_score,
    }
    return Fitted(laplace.posterior(), settings)


def _run(case: Case, optimizer: torch.optim.Optimizer, epochs: int, seed: int, loss: Loss | None, **how: Any) -> None:
    """Epochs with a cosine schedule after a warm-up of one tenth."""
    loader = Reordered(case.train)
    steps = epochs * len(loader)
    warm = max(1, steps // 10)
    rate = LambdaLR(optimizer, lambda t: min((t + 1) / warm, 0.5 * (1 + math.cos(math.pi * t / steps))))
    train(case.model, optimizer, loader, epochs, loss, scheduler=rate, seed=seed, **how)


def mean_outputs(model: nn.Module, posterior: Posterior, batches: Batches) -> Tensor:
    """(N, ...) the network's output at the posterior mean."""
    return _outputs(model, dict(posterior.mean), batches)


def drawn_outputs(model: nn.Module, posterior: Posterior, batches: Batches, count: int, seed: int) -> Iterator[Tensor]:
    """The network's output (N, ...) for all rows under one draw after the other."""
    for draw in posterior.sample(count, seed):
        yield _outputs(model, draw, batches)


def _outputs(model: nn.Module, weights: dict[str, Tensor], batches: Batches) -> Tensor:
    with torch.inference_mode():
        calls = [call_arguments(inputs) for inputs in inputs_of(batches)]
        return torch.cat([functional_call(model, weights, args, kwargs) for args, kwargs in calls])


def count_rows(batches: Sequence[tuple[Any, Tensor]]) -> int:
    """Rows of all batches."""
    return sum(len(targets) for _, targets in batches)
