"""Image classifiers by every training method: one function per cell.

    from trained_images import cells, run_cell, summarise
    row = run_cell("digits_cnn", "ivon", seed=0, data=Path("../shared/data"))

Tasks: scikit-learn's digits with the two networks of the demo (800 training images for the
transformer, 300 for the convolutional network), and Fashion-MNIST (10,000, or all with `full`) with a
convolutional network of 80,602 weights. Rows: see `trained_images_data`.

Methods. "map" is AdamW with a cosine schedule; "ensemble" five of them, of other initial weights and
orders; "mc_dropout" the same training with dropout in front of the linear layers (of the transformer:
of attention outputs, second feed-forward layers and the head), 32 passes with dropout on. "ivon",
"score_vi" (closed form), "elbo" (mean-field VI, weights drawn: no local reparametrisation, which
takes the pixels or tokens of one row for independent) and "stf" (first layer only, by VI) start at
the network of "map" of the same seed and train on for `setting_epochs`, with batch norms at rest. Their
prediction is the average over 32 draws; keys that begin with "mean_", "cvp_" and "shared_" are of the
mean weights and of the two single passes, without scales. These four share prior precision and
temperature T; "elbo_t1" is "elbo" at T = 1.

Settings were chosen by hand on the validation rows of seed 0, by NLL, in about 60 runs and 12
minutes: for AdamW 1 to 5 pairs of epochs and rate a task; T of 1, 0.3, 0.1, 0.03, 0.01, 0.003 and prior
precisions of 1, 3, 5, 10 and 100, not all pairs; IVON's h0 of 0.03 to 0.5 and second beta of 0.999,
0.9995 and 0.99999; score-based VI's rate of 0.002 to 0.05, the precision's of 0.0005 to 0.005 and
initial sd; dropout of 0.1, 0.2 and 0.4, one or two of them a task. Score-based VI diverged in several
of these runs, all with a wide initial sd for their T or a precision rate of 0.005; for the two tasks
where the best setting lay beside a diverging one, a narrower start of nearly the same NLL was taken.
One temperature serves all methods of a task, so that none has the one that fits it best.

Figures: accuracy, NLL in nats, top-label ECE of 15 bins, AURC and Brier score on test rows that no
choice has seen. `ood_auroc` ranks by the entropy of the prediction, and averages over the sets in
`ood_sets`. `membership_auc` ranks training and test rows by their loss. `fgsm` and `pgd` (20 steps) are
accuracies of "digits_cnn" on 400 test rows under attacks of at most 0.1 on pixels in [0, 1]; their
gradient goes through the averaged prediction that is attacked, all members or 8 fixed draws;
`attack_clean` is that prediction's accuracy on these rows without attack. `step_over_adamw` is the
ratio of medians of 40 training steps on one batch, one method's and AdamW's in turn, batch norms in the
same mode in both except for "stf"; an ensemble's step trains its five members. `state_over_adamw`
compares bytes of weights and optimizer state between steps, `state_vectors` is the number of them
per weight. `seconds` counts the whole cell, with the network of "map" read from `cache` if it is
there; on one core of a shared machine a seed takes 50 (digits_cnn), 110 and 215 (digits_vit).
"""

import copy
import statistics
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from bayespass import MonteCarlo, SinglePass, evaluate, predict_dataset
from bayespass.demo.digits import Split
from bayespass.evaluate.proper_scores import log_scores
from bayespass.posterior.elbo import MeanFieldVI
from bayespass.posterior.first_layer import DEFAULTS
from bayespass.posterior.selection import frozen_except, select_parameters
from bayespass.prediction import ClassificationPrediction
from trained_images_data import ImageTask, load_images
from trained_images_models import (
    MEMBERS,
    METHODS,
    NETWORKS,
    Plain,
    Trained,
    fit,
    make_method,
    method_settings,
    new_network,
    settings_of,
)

FIGURES = ("accuracy", "nll", "ece", "aurc", "brier")
SINGLE_PASSES = ("cvp", "shared")
CHUNK = 500
TASKS = NETWORKS
MEMBERS_TESTED = 2000  # training rows, at most, whose loss is compared with that of all test rows
ATTACKED, ATTACK_DRAWS, ATTACK_STEPS, EPSILON = ("map", "stf", "elbo", "ensemble"), 8, 20, 0.1
ATTACK_ROWS = 400
TIMED_STEPS, WARM_STEPS = 40, 5
TIMED_RATE = 0.01  # of the learning rate, so that many steps on one batch leave the weights where they are
SUMMARISED = (
    *FIGURES,
    "ood_auroc",
    "mean_accuracy",
    "mean_nll",
    "cvp_nll",
    "shared_nll",
    "membership_auc",
    "attack_clean",
    "fgsm",
    "pgd",
    "variance_parameters",
    "step_over_adamw",
    "state_over_adamw",
    "seconds",
)


def cells(seeds: Sequence[int]) -> list[tuple[str, str, int]]:
    """Every (task, method, seed), the start that others share first."""
    return [(task, method, seed) for seed in seeds for task in TASKS for method in METHODS]


def run_cell(
    task: str,
    method: str,
    seed: int,
    data: Path,
    cache: Path | None = None,
    device: str = "cpu",
    full: bool = False,
    split: str = "test",
    **overrides: Any,
) -> dict[str, Any]:
    """Train and score one cell.

    Args:
        task: one of `TASKS`.
        method: one of `METHODS`.
        seed: of rows, weights, batches and draws.
        data: the folder of all data sets.
        cache: a folder for the AdamW networks that several methods start from; None trains them anew.
        device: "cpu" or "cuda".
        full: train on all 60,000 images of Fashion-MNIST.
        split: "test" or "validation".
        overrides: settings of the method in place of the chosen ones.
    """
    start, cpu = time.perf_counter(), time.process_time()
    images = load_images(task, seed, data, full).to(device)
    settings = settings_of(task, method) | overrides
    trained = fit(task, method, seed, images.train, settings, settings_of(task, "map"), cache)
    training = time.perf_counter() - start
    row: dict[str, Any] = {"task": task, "method": method, "seed": seed, "n_data": len(images.train.labels)}
    row |= {f"setting_{name}": value for name, value in settings.items() if isinstance(value, int | float | str)}
    rows = images.test if split == "test" else images.validation
    row |= {"variance_parameters": trained.variance_parameters, "ood_sets": " ".join(images.ood)}
    prediction = predict(trained.predictor, rows.images)
    row |= quality(trained.predictor, prediction, rows.labels, images.ood)
    row |= membership(trained.predictor, prediction, rows.labels, images.train, seed)
    if trained.posterior is not None:
        others = {name: SinglePass(trained.model, trained.posterior, name) for name in SINGLE_PASSES}
        for name, predictor in {"mean": Plain(trained.model), **others}.items():
            figures = quality(predictor, predict(predictor, rows.images), rows.labels, images.ood)
            row |= {f"{name}_{figure}": value for figure, value in figures.items()}
    if task == "digits_cnn" and method in ATTACKED:
        row |= robustness(trained, rows, images, seed)
    row |= cost(task, method, seed, images.train, settings, trained.model)
    row |= {"training_seconds": training, "seconds": time.perf_counter() - start}
    return row | {"cpu_seconds": time.process_time() - cpu}


def predict(predictor: nn.Module, images: Tensor) -> ClassificationPrediction:
    """The prediction for every row."""
    return predict_dataset(predictor, list(images.split(CHUNK)))  # type: ignore[return-value]


def quality(
    predictor: nn.Module, prediction: ClassificationPrediction, labels: Tensor, ood: dict[str, Tensor]
) -> dict[str, float]:
    """Figures of the prediction, and the AUROC of its entropy against every set that is none of the classes."""
    scores = evaluate(prediction, labels, n_bootstrap=0)
    others = {name: auroc(prediction.entropy, predict(predictor, images).entropy) for name, images in ood.items()}
    return {
        **{name: scores[name].value for name in FIGURES},
        **{f"ood_auroc_{name}": value for name, value in others.items()},
        "ood_auroc": statistics.mean(others.values()),
    }


def auroc(low: Tensor, high: Tensor) -> float:
    """The share of pairs that `high` ranks above `low`."""
    scores = torch.cat([low, high]).double().cpu()
    return float(roc_auc_score([0] * len(low) + [1] * len(high), scores))


def membership(
    predictor: nn.Module, prediction: ClassificationPrediction, labels: Tensor, train: Split, seed: int
) -> dict[str, float]:
    """AUC of telling training rows from the others by their loss; 0.5 gives nothing away."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(train.labels), generator=generator)[:MEMBERS_TESTED].to(train.labels.device)
    members = log_scores(predict(predictor, train.images[chosen]), train.labels[chosen])
    return {"membership_auc": auroc(members, log_scores(prediction, labels))}


def robustness(trained: Trained, rows: Split, images: ImageTask, seed: int) -> dict[str, float]:
    """Accuracy under attacks on the averaged prediction itself, within EPSILON of every pixel."""
    predictor = trained.predictor
    if trained.posterior is not None:
        predictor = MonteCarlo(trained.model, trained.posterior, ATTACK_DRAWS, seed)
    radius = EPSILON * (images.white - images.black)
    inputs, labels = rows.images[:ATTACK_ROWS], rows.labels[:ATTACK_ROWS]

    def accuracy(steps: int, size: float) -> float:
        attacked = inputs.clone()
        for _ in range(steps):
            attacked.requires_grad_(True)
            loss = F.nll_loss(predictor(attacked).probs.clamp_min(1e-30).log(), labels)
            (gradient,) = torch.autograd.grad(loss, attacked)
            moved = attacked.detach() + size * gradient.sign()
            attacked = torch.clamp(moved, inputs - radius, inputs + radius).clamp(images.black, images.white)
        return float((predict(predictor, attacked.detach()).labels == labels).float().mean())

    return {
        "attack_clean": accuracy(0, 0.0),
        "fgsm": accuracy(1, radius),
        "pgd": accuracy(ATTACK_STEPS, 2.5 * radius / ATTACK_STEPS),
    }


def cost(
    task: str, method: str, seed: int, train: Split, settings: dict[str, Any], model: nn.Module
) -> dict[str, float]:
    """Time of a training step over AdamW's, one after the other in turn, and what stays between steps."""
    device, batch = train.images.device, NETWORKS[task].batch_size
    inputs, labels = train.images[:batch], train.labels[:batch]
    plain = new_network(task, seed, str(device)).train()
    mine = [copy.deepcopy(model).train() for _ in range(MEMBERS if method == "ensemble" else 1)]
    own = method_settings(settings)
    own |= {"lr": TIMED_RATE * own.get("lr", DEFAULTS["lr"])}
    with ExitStack() as context:
        if method == "stf":
            chosen = select_parameters(mine[0], "first", inputs)
            context.enter_context(frozen_except(mine[0], [name for name, _ in chosen]))
            optimizers = [MeanFieldVI(chosen, n_data=len(train.labels), seed=seed, **DEFAULTS | own)]
        elif method in ("map", "mc_dropout", "ensemble"):
            optimizers = [torch.optim.AdamW(member.parameters(), **own) for member in mine]
        else:
            plain.eval()  # as this method's network: batch norms at rest cost less
            mine[0].eval()
            optimizers = [make_method(method, mine[0], len(train.labels), seed, own)]
        trainers = [[(plain, torch.optim.AdamW(plain.parameters()))], list(zip(mine, optimizers, strict=True))]
        seconds: list[list[float]] = [[], []]
        for _ in range(WARM_STEPS + TIMED_STEPS):
            for trained, times in zip(trainers, seconds, strict=True):
                times.append(timed_step(trained, inputs, labels))
    theirs, ours = (statistics.median(times[WARM_STEPS:]) for times in seconds)
    adamw_bytes, own_bytes = (sum(kept_bytes(*pair) for pair in trained) for trained in trainers)
    weights = sum(parameter.nbytes for parameter in plain.parameters())
    return {
        "step_over_adamw": ours / theirs,
        "adamw_step_seconds": theirs,
        "state_vectors": own_bytes / weights,
        "state_over_adamw": own_bytes / adamw_bytes,
    }


def timed_step(trained: list[tuple[nn.Module, torch.optim.Optimizer]], inputs: Tensor, labels: Tensor) -> float:
    """Seconds of one training step of all these networks."""

    def now() -> float:
        if inputs.is_cuda:
            torch.cuda.synchronize(inputs.device)
        return time.perf_counter()

    start = now()
    for model, optimizer in trained:

        def closure(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
    return now() - start


def kept_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights and optimizer state."""
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in [*model.parameters(), *state])


def summarise(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Means over seeds by "task.method.figure", and their standard deviation as "..._sd"."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["method"]), []).append(row)
    summary = {}
    for (task, method), members in groups.items():
        for figure in SUMMARISED:
            values = [row[figure] for row in members if figure in row]
            if values:
                summary[f"{task}.{method}.{figure}"] = statistics.mean(values)
            if len(values) > 1:
                summary[f"{task}.{method}.{figure}_sd"] = statistics.stdev(values)
    return summary
