"""Nine UCI regression sets with their fixed splits, against the numbers published for them.

    from trained_uci import cells, run_cell, summarise
    run_cell("bostonHousing", "ivon", seed=0, data=Path("../shared/data"))

One hidden layer of 50 ReLU units (100 for protein), inputs and targets standardised by the training
rows of each split, figures on the scale of the data. Every method takes 4,000 gradient steps: 400
epochs in batches of a tenth of a small set (the 10 x 40 epochs of the usual protocol), and in batches
of 128 or 256 rows 70 epochs of kin8nm, 59 of power-plant, 48 of naval and 25 of protein. The
published MC-dropout numbers took 4,000 epochs (2,000 for protein) and a grid of dropout rates and
noise levels for every split. Predictions average 64 draws.

The noise is one log variance per split, learned with the weights and random with them (prior
N(0, 100)): all methods get the noise in one way, at the price that a point estimate learns it from
residuals it has fitted itself and is over-confident on small sets.

IVON and score-based VI start from half the steps of Adam, with a precision from its second moments;
mean-field VI starts from scratch. All splits train at once, weights with a leading axis: these
methods work entry by entry, so that the splits do not touch each other.

Rates were set by hand on validation rows of kin8nm, Boston, naval and yacht (three splits, seed 0):
Adam 0.01 and 0.02; mean-field VI 0.01 and 0.02; IVON 0.02, 0.1 and 0.3 with four averaging horizons
(0.3 diverged on Boston); score-based VI five rates for the mean and five for the precision, most of
which diverged on naval, kin8nm or protein (too fast for one draw per step). `FOUND` is what `search` found
best by log likelihood on a fifth of the training rows of the first five splits, one setting for a set:
prior precision 1, 5, 25 (and 100 for map) and temperature 1 and 0.1 (dropout: rates 0.005, 0.02 and
0.05); score-based VI's were found at twice its present rates, which then diverged on one seed of protein. A
row that validates one split may be a test row of another, as always when splits share a setting.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import LambdaLR

from bayespass.errors import InvalidInput
from bayespass.likelihood import gaussian_log_losses, gaussian_nll
from bayespass.posterior.base import PosteriorInfo
from bayespass.posterior.elbo import MeanFieldVI
from bayespass.posterior.ivon import IVON
from bayespass.posterior.method import TrainingMethod
from bayespass.posterior.score_matching import ScoreVI
from bayespass.predict.sampling import prediction_from_draws
from bayespass.prediction import RegressionPrediction, regression_prediction

STEPS, DRAWS, LEVEL = 4000, 64, 0.9
SMALL_BATCHES = 10  # per epoch, of the sets with fewer than 2,000 rows
PRIORS, TEMPERATURES, DROPOUTS = (1.0, 5.0, 25.0), (1.0, 0.1), (0.005, 0.02, 0.05)
MAP_PRIORS = (*PRIORS, 100.0)
NOISE_PRIOR = 0.01  # prior precision of the log noise variance
PREDICTED = PosteriorInfo("regression", sigma_noise="predicted")

METHODS = ("map", "mc_dropout", "ivon", "score_vi", "elbo")
WARM = ("ivon", "score_vi")  # the first half of their steps is Adam's

RATES: dict[str, dict[str, Any]] = {
    "map": {"lr": 0.02},
    "mc_dropout": {"lr": 0.02},
    "ivon": {"lr": 0.1, "betas": (0.9, 0.995), "rescale_lr": False, "clip_radius": 0.1},
    "score_vi": {"lr": 0.005, "precision_lr": 0.0005, "momentum": 0.9},
    "elbo": {"lr": 0.02, "sd_lr": 0.04, "init_sd": 0.05},
}


@dataclass(frozen=True)
class Setting:
    """Prior precision a0 of all weights and biases, temperature T, and dropout rate before both layers."""

    prior_precision: float = 1.0
    temperature: float = 1.0
    dropout: float = 0.0


# By set: prior precision of map; dropout rate; prior precision and temperature of ivon, score_vi and elbo.
FOUND: dict[str, tuple[float, float, tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "bostonHousing": (100, 0.02, (1, 1), (5, 1), (5, 1)),
    "concrete": (25, 0.02, (1, 1), (5, 1), (5, 0.1)),
    "energy": (25, 0.005, (1, 0.1), (5, 0.1), (1, 0.1)),
    "kin8nm": (1, 0.005, (1, 1), (1, 1), (1, 0.1)),
    "naval-propulsion-plant": (5, 0.005, (5, 0.1), (5, 1), (5, 0.1)),
    "power-plant": (1, 0.005, (1, 0.1), (1, 0.1), (1, 0.1)),
    "protein-tertiary-structure": (1, 0.005, (1, 0.1), (1, 1), (1, 0.1)),
    "wine-quality-red": (25, 0.05, (5, 1), (5, 1), (5, 1)),
    "yacht": (25, 0.005, (5, 1), (5, 1), (25, 0.1)),
}

TASKS = dict.fromkeys(FOUND, METHODS)


def chosen(task: str, method: str) -> Setting:
    """What `search` found best for a set and a method."""
    prior_precision, dropout, *variational = FOUND[task]
    if method == "map":
        return Setting(prior_precision)
    if method == "mc_dropout":
        return Setting(dropout=dropout)
    return Setting(*variational[METHODS.index(method) - 2])


@dataclass(frozen=True)
class Problem:
    """All splits of a set, standardised by their own training rows."""

    inputs: Tensor  # (splits, rows, features)
    targets: Tensor  # (splits, rows)
    held_out_inputs: Tensor
    held_out_targets: Tensor
    scale: Tensor  # (splits, 1), standard deviation of the targets

    @property
    def batch_size(self) -> int:
        """A tenth of a small set, 128 rows of a large one and 256 of the largest."""
        rows = self.targets.shape[1]
        if rows < 2000:
            return rows // SMALL_BATCHES
        return 128 if rows < 20_000 else 256


def load(name: str, data: Path, held_out: str = "test", n_splits: int | None = None) -> Problem:
    """A set with its published splits.

    Args:
        name: one of `TASKS`.
        data: folder that holds `uci_regression`.
        held_out: "test", or "validation" for a random fifth of every split's training rows; the test
            rows are not looked at then.
        n_splits: the first few; all by default.
    """
    with np.load(data / "uci_regression" / "uci_regression.npz") as file:
        values = np.column_stack([file[f"{name}/X"], file[f"{name}/y"]])
        splits = file[f"{name}/test_index"][:n_splits]
    train, other = [], []
    for index, held in enumerate(splits):
        rows = np.setdiff1d(np.arange(len(values)), held)
        if held_out == "validation":
            rows = np.random.default_rng(index).permutation(rows)
            rows, held = rows[len(rows) // 5 :], rows[: len(rows) // 5]
        center, scale = values[rows].mean(0), values[rows].std(0)
        scale[scale == 0] = 1.0
        train.append((values[rows] - center) / scale)
        other.append(np.column_stack([(values[held] - center) / scale, np.full(len(held), scale[-1])]))
    kept, held_rows = (torch.tensor(np.stack(each), dtype=torch.float32) for each in (train, other))
    return Problem(kept[..., :-1], kept[..., -1], held_rows[..., :-2], held_rows[..., -2], held_rows[:, :1, -1])


class Networks(nn.Module):
    """One network with a hidden layer for every split, side by side.

    `forward` takes (splits, rows, features) and returns (splits, rows, 2): the mean, and a log
    variance that is one learned number for each split.
    """

    def __init__(self, splits: int, features: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.hidden_weight = nn.Parameter(torch.randn(splits, features, hidden) * (2 / features) ** 0.5)
        self.hidden_bias = nn.Parameter(torch.zeros(splits, 1, hidden))
        self.output_weight = nn.Parameter(torch.randn(splits, hidden, 1) * hidden**-0.5)
        self.output_bias = nn.Parameter(torch.zeros(splits, 1, 1))
        self.log_noise = nn.Parameter(torch.zeros(splits, 1, 1))
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs: Tensor) -> Tensor:
        """Mean and log variance for every row of every split."""
        hidden = torch.baddbmm(self.hidden_bias, self.dropout(inputs), self.hidden_weight).relu()
        center = torch.baddbmm(self.output_bias, self.dropout(hidden), self.output_weight)
        return torch.cat([center, self.log_noise.expand_as(center)], -1)


class Grid(nn.Module):
    """The networks of several settings, trained at once; `forward` returns (settings, splits, rows, 2)."""

    def __init__(self, networks: Sequence[Networks]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs of every setting."""
        return torch.stack([network(inputs) for network in self.networks])


def make_method(
    name: str,
    model: Grid,
    settings: Sequence[Setting],
    problem: Problem,
    seed: int,
    rates: dict[str, Any],
    adam: torch.optim.Optimizer | None = None,
) -> torch.optim.Optimizer:
    """The optimizer, with one group for every parameter of every setting; `adam` is what trained the model before."""
    n_data, groups = problem.targets.shape[1], []
    for key, parameter in model.named_parameters():
        setting = settings[int(key.split(".")[1])]
        prior_precision = NOISE_PRIOR if key.endswith("log_noise") else setting.prior_precision
        group = {"params": [(key, parameter)], "prior_precision": prior_precision}
        if name in ("map", "mc_dropout"):
            group["weight_decay"] = group.pop("prior_precision") / n_data
        if name == "score_vi" and adam is not None:  # the sd that Adam's mean squared gradients imply
            curvature = problem.batch_size * float(adam.state[parameter]["exp_avg_sq"].mean())
            group["init_sd"] = ((n_data * curvature + prior_precision) / setting.temperature) ** -0.5
        groups.append(group)
    if name in ("map", "mc_dropout"):
        return torch.optim.Adam(groups, **rates)
    common: dict[str, Any] = {"n_data": n_data, "temperature": settings[0].temperature, "seed": seed}
    common |= {"likelihood": "regression", "sigma_noise": "predicted"}
    kinds: dict[str, type[TrainingMethod]] = {"ivon": IVON, "score_vi": ScoreVI, "elbo": MeanFieldVI}
    method = kinds[name](groups, **common, **rates)
    if adam is not None and isinstance(method, IVON):
        method.warm_start(adam, problem.batch_size)
    return method


def train(
    model: Grid, method: torch.optim.Optimizer, problem: Problem, batches: Iterator[Tensor], n_steps: int
) -> None:
    """Steps with a short warm-up and a cosine schedule; the loss is the sum over networks of each one's mean."""
    warm = n_steps // 20
    rate = LambdaLR(method, lambda t: min((t + 1) / warm, 0.5 * (1 + math.cos(math.pi * t / n_steps))))
    model.train()
    for _ in range(n_steps):
        rows = next(batches)
        inputs, targets = problem.inputs[:, rows], problem.targets[:, rows].expand(len(model.networks), -1, -1)

        def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Any:
            method.zero_grad()
            loss = gaussian_nll(model(inputs), targets) * targets.shape[:2].numel()
            loss.backward()
            return loss

        method.step(closure)
        rate.step()
    model.eval()


def batches_of(problem: Problem, seed: int) -> Iterator[Tensor]:
    """Row numbers without end, epoch by epoch; a last batch that would be short is left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(problem.targets.shape[1], generator=generator)
        yield from (part for part in order.split(problem.batch_size) if len(part) == problem.batch_size)


def outputs_of(
    name: str, problem: Problem, settings: Sequence[Setting], seed: int, n_steps: int = STEPS, **rates: Any
) -> Tensor:
    """Trains every split with every setting: (draws, settings, splits, held-out rows, 2) outputs.

    Args:
        name: one of `METHODS`.
        problem: what to train on.
        settings: they may differ in prior precision and dropout, not in temperature.
        seed: of weights, batches and draws.
        n_steps: gradient steps; score-based VI spends its first half on Adam.
        rates: in place of `RATES`.
    """
    torch.manual_seed(seed)
    splits, rows, features = problem.inputs.shape
    hidden = 100 if rows > 20_000 else 50
    model = Grid([Networks(splits, features, hidden, setting.dropout) for setting in settings])
    batches = batches_of(problem, seed)
    adam = None
    if name in WARM:
        n_steps //= 2
        adam = make_method("map", model, settings, problem, seed, RATES["map"])
        train(model, adam, problem, batches, n_steps)
    method = make_method(name, model, settings, problem, seed, RATES[name] | rates, adam)
    train(model, method, problem, batches, n_steps)
    with torch.no_grad():
        if name == "map":
            return model(problem.held_out_inputs).unsqueeze(0)
        if name == "mc_dropout":
            model.train()
            return torch.stack([model(problem.held_out_inputs) for _ in range(DRAWS)])
        assert isinstance(method, TrainingMethod)
        draws = method.posterior().sample(DRAWS, seed)
        return torch.stack([functional_call(model, draw, problem.held_out_inputs) for draw in draws])


def scores(outputs: Tensor, problem: Problem) -> dict[str, Tensor]:
    """RMSE and log likelihood on the scale of the data and coverage, (settings, splits) each.

    The log likelihood is the mean over rows of the log of the density averaged over draws; the
    interval is Gaussian, with the variance of the average density.
    """
    targets = problem.held_out_targets.expand(outputs.shape[1:-1])
    log_densities = -gaussian_log_losses(outputs.double(), targets.double())
    log_likelihood = log_densities.logsumexp(0) - math.log(len(outputs)) - problem.scale.double().log()
    if len(outputs) == 1:
        prediction = regression_prediction(outputs[0], torch.zeros_like(outputs[0]), "predicted")
    else:
        prediction = prediction_from_draws(outputs, PREDICTED, len(outputs))
    assert isinstance(prediction, RegressionPrediction)
    low, high = prediction.interval(LEVEL)
    return {
        "rmse": (prediction.mean - targets).square().mean(-1).sqrt() * problem.scale.squeeze(-1),
        "ll": log_likelihood.mean(-1),
        "coverage_90": ((targets >= low) & (targets <= high)).double().mean(-1),
    }


def run_cell(task: str, method: str, seed: int, data: Path, n_steps: int = STEPS) -> dict[str, Any]:
    """Train all splits of a set at once with the chosen setting and score their test rows.

    Args:
        task: one of `TASKS`.
        method: one of `METHODS`.
        seed: of weights, batches and draws.
        data: folder that holds `uci_regression`.
        n_steps: gradient steps.

    Returns:
        rmse, ll and coverage_90, means over splits, with their standard errors; every split's rmse and
        ll; the published means; what was chosen; and seconds.
    """
    start = time.perf_counter()
    problem, setting = load(task, data), chosen(task, method)
    found = scores(outputs_of(method, problem, [setting], seed, n_steps), problem)
    row: dict[str, Any] = {"task": task, "method": method, "seed": seed, "splits": len(problem.inputs)}
    row |= {"epochs": n_steps // (problem.targets.shape[1] // problem.batch_size), "steps": n_steps}
    for key, values in found.items():
        row[key] = float(values.mean())
        row[f"{key}_se"] = float(values.std()) / values.numel() ** 0.5
    row |= {f"{key}_by_split": found[key].flatten().tolist() for key in ("rmse", "ll")}
    row |= {"prior_precision": setting.prior_precision, "temperature": setting.temperature}
    row |= {"dropout": setting.dropout, "seconds": time.perf_counter() - start}
    return row | published(task, data)


def published(task: str, data: Path) -> dict[str, float]:
    """The published MC-dropout results of the same splits: one hidden layer, 100 times 40 epochs."""
    results = json.loads((data / "uci_regression" / "published_mc_dropout.json").read_text())[task]["results"]
    row = {}
    for key, start in (("rmse", "test_MC_rmse"), ("ll", "test_ll")):
        values = next(values for name, values in results.items() if name.startswith(start))
        row[f"published_{key}"], row[f"published_{key}_se"] = mean(values), stdev(values) / len(values) ** 0.5
    return row


def cells(seeds: Sequence[int] = (0, 1, 2)) -> list[tuple[str, str, int]]:
    """(set, method, seed)."""
    return [(task, method, seed) for task, methods in TASKS.items() for method in methods for seed in seeds]


def summarise(rows: list[dict[str, Any]]) -> dict[str, float]:
    """`uci.SET.METHOD.FIGURE`: means over seeds, with `_se` over splits and `_sd` over seeds; and the published."""
    summary: dict[str, float] = {}
    for task, method in dict.fromkeys((row["task"], row["method"]) for row in rows):
        found = [row for row in rows if (row["task"], row["method"]) == (task, method)]
        for figure in ("rmse", "ll", "coverage_90"):
            key, values = f"uci.{task}.{method}.{figure}", [row[figure] for row in found]
            summary[key] = mean(values)
            summary[f"{key}_se"] = mean(row[f"{figure}_se"] for row in found)
            summary[f"{key}_sd"] = stdev(values) if len(values) > 1 else 0.0
            if f"published_{figure}" in found[0]:
                summary[f"uci.{task}.published.{figure}"] = found[0][f"published_{figure}"]
                summary[f"uci.{task}.published.{figure}_se"] = found[0][f"published_{figure}_se"]
    return summary


def search(data: Path, sets: Sequence[str] = tuple(TASKS), methods: Sequence[str] = METHODS, n_splits: int = 5) -> None:
    """Print the validation log likelihood of every setting: where `FOUND` comes from."""
    for name in sets:
        problem = load(name, data, "validation", n_splits)
        for method in methods:
            grids = [[Setting(a, temperature) for a in PRIORS] for temperature in TEMPERATURES]
            if method == "map":
                grids = [[Setting(a) for a in MAP_PRIORS]]
            elif method == "mc_dropout":
                grids = [[Setting(1.0, dropout=rate) for rate in DROPOUTS]]
            found: list[tuple[float, Setting]] = []
            for grid in grids:
                try:
                    values = scores(outputs_of(method, problem, grid, 0), problem)["ll"].mean(-1).tolist()
                except InvalidInput:  # it diverged
                    values = [-math.inf] * len(grid)
                found += zip(values, grid, strict=True)
            print(name, method, max(found, key=lambda pair: pair[0])[1], flush=True)
            for value, setting in found:
                print(f"    {value:9.3f}  {setting}", flush=True)
