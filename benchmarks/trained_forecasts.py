"""Forecasts with intervals on ETTh1 and ETTh2 by every training method: one function per cell.

    from trained_forecasts import TASKS, run_cell
    run_cell("ETTh1-patchtst", "ivon", 0, Path("../shared/data"))

Set-up: the usual 8640 / 2880 / 2880 hourly rows for training, validation and test, all seven
channels standardised by the training rows, 336 hours seen, 96 forecast, all figures on the
standardised scale. The first target of a split is its first row; its inputs reach back into the
split before. Test windows start every 8 hours and not every hour, to keep a cell short.

Every method takes the same number of gradient steps (300 for PatchTST, 600 for Koopman, 16 random
training windows each) with the same cosine schedule; an ensemble takes five times as many. `n_data`
counts every observation once, not once per window that holds it. Score-based VI spends its first
half on AdamW, as it starts from trained weights; in the other half its variance moves only part of
the way from where it starts, a hundredth of the weights' size. Dropout is 0.1 on the features of
the head and in the feed-forward layers. Rates were chosen among two or three on the validation
rows of ETTh1 (`split="validation"`), seed 0, by NLL, and are used for ETTh2 as they are; one of
IVON's for Koopman was passed over because it diverged on ETTh2. AdamW clips gradients to norm 1,
without which Koopman diverged there for some seeds. PatchTST has patches of 16 hours that do not
overlap, width 32 and two layers.

A cell takes 3 to 15 seconds on one core that it has to itself, an ensemble 10 to 30.
"""

import csv
import gzip
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from bayespass import IVON, MonteCarlo, PosteriorInfo, RegressionPrediction, SinglePass
from bayespass.forecasting import KoopmanForecaster, PatchForecaster, windows
from bayespass.likelihood import gaussian_nll
from bayespass.posterior.elbo import MeanFieldVI
from bayespass.posterior.score_matching import ScoreVI
from bayespass.predict.sampling import prediction_from_draws
from bayespass.prediction import concatenate, regression_prediction

ROWS = {"train": (0, 8640), "validation": (8640, 11520), "test": (11520, 14400)}
CONTEXT, HORIZON, CHANNELS, TEST_STRIDE = 336, 96, 7, 8
BATCH, DRAWS, MEMBERS, DROPOUT = 16, 32, 5, 0.1
SEEN = BATCH * HORIZON * CHANNELS  # observations per step, the unit of n_data
STEPS = {"patchtst": 300, "koopman": 600}
FLOOR = 0.1  # of a window's variance: three channels of ETTh2 stand still for weeks in the training rows
LEVELS = (0.5, 0.8, 0.9, 0.95)
PREDICTED = PosteriorInfo("regression", n_data=ROWS["train"][1] * CHANNELS, sigma_noise="predicted")

DATASETS = ("ETTh1", "ETTh2")
MODELS = ("patchtst", "koopman")
METHODS = ("map", "ivon", "ivon/shared", "score_vi", "elbo", "mc_dropout", "ensemble")
TASKS = tuple(f"{dataset}-{model}" for dataset in DATASETS for model in MODELS)
SUMMARISED = ("mse", "nll", "coverage_50", "coverage_90", "coverage_95", "epistemic_share")

IVON_SETTINGS = {"lr": 3.0, "betas": (0.9, 0.999), "hess_init": 0.3, "clip_radius": 0.01}
SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("patchtst", "map"): {"lr": 3e-3},
    ("patchtst", "mc_dropout"): {"lr": 3e-3},
    ("patchtst", "ensemble"): {"lr": 3e-3},
    ("patchtst", "ivon"): IVON_SETTINGS,
    ("patchtst", "score_vi"): {"lr": 0.01, "precision_lr": 5e-3, "batch_size": SEEN},
    ("patchtst", "elbo"): {"lr": 3e-3},
    ("koopman", "map"): {"lr": 1e-2},
    ("koopman", "mc_dropout"): {"lr": 1e-2},
    ("koopman", "ensemble"): {"lr": 1e-2},
    ("koopman", "ivon"): IVON_SETTINGS,
    ("koopman", "score_vi"): {"lr": 0.03, "precision_lr": 5e-3, "batch_size": SEEN, "momentum": 0.9},
    ("koopman", "elbo"): {"lr": 1e-3},
}


def cells(seeds: list[int]) -> list[tuple[str, str, int]]:
    """Task, method and seed of every cell."""
    return [(task, method, seed) for task in TASKS for method in METHODS for seed in seeds]


def series(dataset: str, folder: Path) -> Tensor:
    """The rows of a data set, standardised by its training rows.

    Args:
        dataset: "ETTh1" or "ETTh2".
        folder: of all data sets.

    Returns:
        (14400, 7) float32.
    """
    with gzip.open(folder / "timeseries" / f"{dataset}.csv.gz", "rt", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    values = np.array([row[1:] for row in rows], dtype=np.float64)[: ROWS["test"][1]]
    train = values[slice(*ROWS["train"])]
    return torch.tensor((values - train.mean(0)) / train.std(0), dtype=torch.float32)


def build(model_name: str, dropout: float = 0.0) -> nn.Module:
    """A forecaster by name."""
    if model_name == "patchtst":
        rates = {"head_dropout": dropout, "ff_dropout": dropout}
        return PatchForecaster(CONTEXT, HORIZON, CHANNELS, variance_floor=FLOOR, patch_stride=16, **rates)
    return KoopmanForecaster(CONTEXT, HORIZON, dropout=dropout, variance_floor=FLOOR)


def make_method(name: str, model: nn.Module, seed: int, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """The optimizer or training method of that name."""
    if name in ("map", "mc_dropout", "ensemble"):
        return torch.optim.AdamW(model.parameters(), **settings)
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {"ivon": IVON, "score_vi": ScoreVI, "elbo": MeanFieldVI}
    common = {"n_data": PREDICTED.n_data, "likelihood": "regression", "sigma_noise": "predicted", "seed": seed}
    return kinds[name](model.named_parameters(), **common, **settings)


def train(
    model: nn.Module, method: torch.optim.Optimizer, batches: Iterator[tuple[Tensor, Tensor]], n_steps: int
) -> None:
    """Gradient steps with a cosine schedule after a warm-up of one tenth."""
    warm = max(1, n_steps // 10)
    rate = LambdaLR(method, lambda t: min((t + 1) / warm, 0.5 * (1 + math.cos(math.pi * t / n_steps))))
    model.train()
    for _ in range(n_steps):
        inputs, targets = next(batches)

        def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            method.zero_grad()
            loss = gaussian_nll(model(inputs), targets)
            loss.backward()
            if isinstance(method, torch.optim.AdamW):
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            return loss

        method.step(closure)
        rate.step()
    model.eval()


def fitted(model_name: str, name: str, seed: int, training: tuple[Tensor, Tensor], settings: dict[str, Any]) -> Any:
    """What the method learned: (model, method)."""
    torch.manual_seed(seed)
    model, steps = build(model_name, DROPOUT if name == "mc_dropout" else 0.0), STEPS[model_name]
    batches = _batches(training, seed)
    if name == "score_vi":
        steps //= 2
        train(model, make_method("map", model, seed, SETTINGS[model_name, "map"]), batches, steps)
    method = make_method(name, model, seed, settings)
    train(model, method, batches, steps)
    return model, method


def predictor(
    model_name: str, name: str, seed: int, training: tuple[Tensor, Tensor], settings: dict[str, Any]
) -> Callable[[Tensor], Any]:
    """Trains, and returns a function from inputs to a `RegressionPrediction`."""
    base, _, single_pass = name.partition("/")
    seeds = [1000 * member + seed for member in range(MEMBERS if base == "ensemble" else 1)]
    models, methods = zip(*[fitted(model_name, base, each, training, settings) for each in seeds], strict=True)
    if base == "map":
        return lambda inputs: _at_one_point(models[0](inputs))
    if base == "ensemble":
        return lambda inputs: prediction_from_draws(torch.stack([m(inputs) for m in models]), PREDICTED, MEMBERS)
    if base == "mc_dropout":
        for module in models[0].modules():
            if isinstance(module, nn.Dropout):
                module.train()
        return lambda inputs: prediction_from_draws(
            torch.stack([models[0](inputs) for _ in range(DRAWS)]), PREDICTED, DRAWS
        )
    posterior = methods[0].posterior()
    return (
        SinglePass(models[0], posterior, single_pass) if single_pass else MonteCarlo(models[0], posterior, DRAWS, seed)
    )


def _at_one_point(outputs: Tensor) -> RegressionPrediction:
    return regression_prediction(outputs, torch.zeros_like(outputs), "predicted", "map")


def run_cell(task: str, method: str, seed: int, data: Path, split: str = "test", **overrides: Any) -> dict[str, Any]:
    """Train and score one cell.

    Args:
        task: one of `TASKS`, data set and forecaster.
        method: one of `METHODS`; "ivon/shared" is the single pass on the posterior of "ivon".
        seed: of weights, batches and draws.
        data: folder of all data sets.
        split: "test" or "validation".
        overrides: settings of the method in place of the chosen ones.

    Returns:
        mse, mae, nll (nats per target, Gaussian with the total variance), coverage_L and width_L of
        the central L % intervals, mean epistemic share of the variance, and seconds.
    """
    dataset, model_name = task.split("-")
    values = series(dataset, data)
    training = windows(values[slice(*ROWS["train"])], CONTEXT, HORIZON)
    first, last = ROWS[split]
    inputs, targets = windows(values[first - CONTEXT : last], CONTEXT, HORIZON, TEST_STRIDE)
    settings = SETTINGS[model_name, method.partition("/")[0]] | overrides
    start = time.perf_counter()
    predict = predictor(model_name, method, seed, training, settings)
    trained = time.perf_counter()
    with torch.no_grad():
        prediction = concatenate([predict(part) for part in inputs.split(64)])
    end = time.perf_counter()
    return {
        **scores(prediction, targets),
        "seconds": end - start,
        "train_seconds": trained - start,
        "predict_seconds": end - trained,
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means over seeds and their standard deviations."""
    summary: dict[str, float] = {}
    for task in TASKS:
        for method in METHODS:
            mine = [row for row in rows if (row["task"], row["method"]) == (task, method)]
            for key in SUMMARISED if mine else ():
                values = [row[key] for row in mine]
                name = f"{task}.{method.replace('/', '_')}.{key}"
                summary[name] = statistics.mean(values)
                summary[f"{name}_sd"] = statistics.stdev(values) if len(values) > 1 else 0.0
    return summary


def scores(prediction: RegressionPrediction, targets: Tensor) -> dict[str, float]:
    """Figures of a forecast, means over all targets."""
    gap, total = (targets - prediction.mean).double(), prediction.total.double()
    found = {
        "mse": float(gap.square().mean()),
        "mae": float(gap.abs().mean()),
        "nll": float(0.5 * ((2 * math.pi * total).log() + gap.square() / total).mean()),
        "epistemic_share": float((prediction.epistemic / prediction.total).mean()),
    }
    for level in LEVELS:
        low, high = prediction.interval(level)
        found[f"coverage_{100 * level:.0f}"] = float(((targets >= low) & (targets <= high)).double().mean())
        found[f"width_{100 * level:.0f}"] = float((high - low).double().mean())
    return found


def _batches(training: tuple[Tensor, Tensor], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random windows without end, the same for every method of a seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randint(len(training[0]), (BATCH,), generator=generator)
        yield training[0][rows], training[1][rows]
