"""Accuracy, calibration and out-of-distribution scores of posteriors after training: one function per cell.

    from post_hoc_ood import cells, run_cell, summarise
    row = run_cell("mnist", "null_space", seed=0, data=Path("../shared/data"), cache=None)

Tasks, networks and sets: see `post_hoc_models`. All methods share the trained network of a seed and are
tuned on the same 500 validation rows, by the NLL of the prediction that is scored.

"map" is the network itself, "temperature" with one fitted temperature. "laplace_diag" is the diagonal
of the generalised Gauss-Newton matrix with the network averaged over 32 draws, "laplace_diag_linear" the
same posterior with the linearised network, "last_layer" the full matrix of the last layer, where the two
predictors have the same law, linearised; the prior precision of all three is from 1e-2 to 1e6 in half
decades. "swag" collects 20 points of 20 more epochs of SGD; its learning rate (three) and a factor on
its spread (seven) are tuned. "null_space" projects 32 draws on the kernel of the Jacobian of all outputs
on the training rows, directly; "loss_projected" on that of the loss, one row per datum; both predict with
the linearised network, their scale tuned on a grid of eighths of a decade, which costs next to nothing.

Figures: accuracy, NLL (of the averaged probabilities, in nats) and top-label ECE of 15 bins on test
rows; the same on test images turned by 30 and 60 degrees, whose labels are known. AUROC of telling test
rows from every other set, for five scores: `maxprob` (1 - largest probability), `entropy` of the
averaged probabilities, `mi` (mutual information), `logit_variance` (summed
over logits) and, for the two projections, `leverage`: the logit variance over that of the prior alone,
|P J(x)^T|^2 / |J(x)|^2. For `map` and `temperature` only the first two exist. "rotated" averages the
AUROC over 60, 90, 120, 150 and 180 degrees; `ood_auroc` averages over all sets. `sd_...` is the root of
the logit variance averaged over logits, then over the rows of a set, at the tuned scale: whether it
grows away from the data. All of these are of 32 draws of the logits; where the network is linearised, of
their mirror images too. `fit_seconds` counts fit and tuning, `predict_seconds` the library's own
prediction for the 1,000 test rows, both on one thread.
"""

import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from bayespass import Laplace, MonteCarlo, Posterior, TemperatureScaling, evaluate, last_layer
from bayespass.curvature.blocks import marginals
from bayespass.curvature.layers import RowJacobian
from bayespass.curvature.operator import RowOperator
from bayespass.demo.digits import Split
from bayespass.evaluate.proper_scores import log_scores
from bayespass.posterior.low_rank import LowRankGaussian
from bayespass.posterior.null_space import NullSpace
from bayespass.posterior.swag import SWAG
from bayespass.predict.dataset import predict_dataset
from bayespass.predict.linearised import Linearised, covariance_root
from bayespass.prediction import ClassificationPrediction, concatenate
from post_hoc_models import IMAGE_TASKS, RECIPES, ImageTask, count, load_images, trained_lenet

METHODS = (
    "map",
    "temperature",
    "laplace_diag",
    "laplace_diag_linear",
    "last_layer",
    "swag",
    "null_space",
    "loss_projected",
)
PLAIN = ("map", "temperature")
PROJECTIONS = {"null_space": "outputs", "loss_projected": "loss"}
DRAWS, TUNING_DRAWS = 32, 16
GRID = tuple(10 ** (k / 2) for k in range(-4, 13))  # prior precisions, 1e-2 to 1e6
SWAG_RATES, SWAG_EPOCHS = (3e-3, 1e-2, 3e-2), 20
SWAG_FACTORS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
CHUNK, TRAIN_SHOWN = 100, 500
SWAG_RECIPE = RECIPES["mnist"]  # that of every task
SHIFTED = (30, 60)
FAR = (60, 90, 120, 150, 180)
MAX_MEMORY = 2 * 2**30
QUALITY = ("accuracy", "nll", "ece")
Draws = Callable[[Tensor], Tensor]  # images (n, 1, H, W) -> logits (S, n, C)


@dataclass(frozen=True)
class Fitted:
    """A tuned method.

    Args:
        predictor: its prediction.
        draws: of its logits, the same ones, with their mirror images where the network is linearised.
        told: what there is to tell about the fit.
    """

    predictor: nn.Module
    draws: Draws
    told: dict[str, Any]


@dataclass(frozen=True)
class Seen:
    """What a method says of some images.

    Args:
        prediction: the averaged one.
        scores: (N,) by name, high where the method doubts.
    """

    prediction: ClassificationPrediction
    scores: dict[str, Tensor]


def cells(seeds: Sequence[int], smoke: bool = False) -> list[tuple[str, str, int]]:
    """Every (task, method, seed)."""
    tasks, chosen = (IMAGE_TASKS[:1], seeds[:1]) if smoke else (IMAGE_TASKS, seeds)
    return [(task, method, seed) for task in tasks for seed in chosen for method in METHODS]


def run_cell(
    task: str, method: str, seed: int, data: Path, cache: Path | None = None, smoke: bool = False
) -> dict[str, Any]:
    """Fit, tune and score one method.

    Args:
        task: one of `IMAGE_TASKS`.
        method: one of `METHODS`.
        seed: of rows, network and draws.
        data: the folder of all data sets.
        cache: a folder for the trained networks; None trains them anew.
        smoke: few rows.
    """
    images = load_images(task, seed, data, smoke)
    model = trained_lenet(task, seed, images.train, images.classes, cache)
    row: dict[str, Any] = {"n_data": len(images.train.labels), "weights": count(model), "outputs": images.classes}
    start = time.perf_counter()
    fitted = fit(method, model, images, seed)
    row |= {"fit_seconds": time.perf_counter() - start, **fitted.told}
    start = time.perf_counter()
    predict_dataset(fitted.predictor, images.test.batches(CHUNK))
    row["predict_seconds"] = time.perf_counter() - start
    jacobian = RowJacobian(model, list(dict(model.named_parameters()))) if method in PROJECTIONS else None

    def looked_at(inputs: Tensor) -> Seen:
        return look(fitted.draws, inputs, jacobian)

    test = looked_at(images.test.images)
    turned = {angle: looked_at(some) for angle, some in images.rotated.items()}
    others = {name: looked_at(some) for name, some in images.ood.items()}
    row |= quality(test.prediction, images.test.labels)
    for angle in SHIFTED:
        labels = images.test.labels[: len(images.rotated[angle])]
        row |= {f"rot{angle}_{name}": value for name, value in quality(turned[angle].prediction, labels).items()}
    row |= ood_figures(test, others, turned)
    if method not in PLAIN:
        found = {
            "train": looked_at(images.train.images[:TRAIN_SHOWN]),
            "test": test,
            "rotated_90": turned[90],
            **others,
        }
        row |= {f"sd_{name}": spread(seen.prediction) for name, seen in found.items()}
    return row


def fit(method: str, model: nn.Module, images: ImageTask, seed: int) -> Fitted:
    """The method, tuned on the validation rows."""
    held_out = images.validation.batches(CHUNK)
    if method in PLAIN:
        temperature = 1.0
        if method == "temperature":
            prediction = predict_dataset(Tempered(model, 1.0), held_out)
            found = TemperatureScaling().fit(prediction, images.validation.labels)  # type: ignore[arg-type]
            temperature = float(found.temperature_ or 1.0)
        return Fitted(
            Tempered(model, temperature), lambda some: model(some)[None] / temperature, {"scale": temperature}
        )
    if method == "swag":
        return fit_swag(model, images, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the network or a temperature is better; both are scored
        return (
            fit_projection(method, model, images, seed) if method in PROJECTIONS else fit_laplace(method, model, images)
        )


def fit_projection(method: str, model: nn.Module, images: ImageTask, seed: int) -> Fitted:
    """Draws that leave the outputs or the losses of the training rows as they are."""
    projected = NullSpace(
        model, rows=PROJECTIONS[method], n_samples=DRAWS, solver="direct", max_memory=MAX_MEMORY, seed=seed
    ).fit(images.train.batches(CHUNK))
    tuning = projected.optimize_prior_precision(images.validation.batches(CHUNK))
    report, posterior = projected.report_, projected.posterior()

    def draws(some: Tensor) -> Tensor:
        operator = RowOperator(model, projected.names, [(some, torch.zeros(len(some), dtype=torch.long))])
        moved = operator.times(0, operator.flatten(posterior.displacements))
        return operator.outputs(0) + mirrored(moved.reshape(len(moved), len(some), -1))

    told = {"scale": tuning.best, "residual": report.residual, "rank": report.rank, "at_edge": float(tuning.at_edge)}
    return Fitted(Linearised(model, posterior), draws, told)


def fit_laplace(method: str, model: nn.Module, images: ImageTask) -> Fitted:
    """A diagonal Laplace posterior by draws or linearised, or that of the last layer."""
    names = last_layer(model, images.train.images[:2]) if method == "last_layer" else None
    structure = "full" if method == "last_layer" else "diag"
    laplace = Laplace(model, hessian_structure=structure, names=names).fit(images.train.batches(CHUNK))

    def predictor_of(network: nn.Module, posterior: Posterior, n_samples: int = TUNING_DRAWS) -> nn.Module:
        if method == "laplace_diag":
            return MonteCarlo(network, posterior, n_samples)
        return Linearised(network, posterior)

    tuning = laplace.optimize_prior_precision("gridsearch", images.validation.batches(CHUNK), GRID, predictor_of)
    predictor = predictor_of(model, laplace.posterior(), DRAWS)
    draws = network_draws(predictor) if isinstance(predictor, MonteCarlo) else gaussian_draws(predictor)
    return Fitted(predictor, draws, {"scale": tuning.best, "at_edge": float(tuning.at_edge)})


def fit_swag(model: nn.Module, images: ImageTask, seed: int) -> Fitted:
    """SWAG at the best of its learning rates and spreads."""
    found: list[tuple[float, float, float, LowRankGaussian]] = []
    for rate in SWAG_RATES:
        posterior = swag_posterior(model, images.train, rate, seed)
        for factor in SWAG_FACTORS:
            scaled = posterior.temper(factor**2)
            prediction = predict_dataset(MonteCarlo(model, scaled, TUNING_DRAWS), images.validation.batches(CHUNK))
            score = float(log_scores(prediction, images.validation.labels).mean())
            found.append((score, rate, factor, scaled))
    _, rate, factor, best = min(found, key=lambda each: each[0])
    predictor = MonteCarlo(model, best, DRAWS)
    return Fitted(predictor, network_draws(predictor), {"rate": rate, "scale": factor})


def swag_posterior(model: nn.Module, rows: Split, rate: float, seed: int) -> LowRankGaussian:
    """20 more epochs of SGD, one collection at the end of each; the model's weights are put back."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    swag = SWAG(model.named_parameters(), n_data=len(rows.labels), rank=SWAG_EPOCHS)
    for _ in range(SWAG_EPOCHS):
        for batch in torch.randperm(len(rows.labels), generator=generator).split(SWAG_RECIPE.batch_size):
            square = sum(parameter.square().sum() for parameter in model.parameters())
            loss = nn.functional.cross_entropy(model(rows.images[batch]), rows.labels[batch])
            optimizer.zero_grad()
            (loss + SWAG_RECIPE.prior_precision / (2 * len(rows.labels)) * square).backward()
            optimizer.step()
        swag.collect()
    optimizer.zero_grad(set_to_none=True)
    model.load_state_dict(before)
    return swag.posterior()


class Tempered(nn.Module):
    """softmax(logits / t) of a network."""

    def __init__(self, model: nn.Module, temperature: float) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, images: Tensor) -> ClassificationPrediction:
        """(n, 1, H, W) -> prediction."""
        logits = self.model(images) / self.temperature
        return ClassificationPrediction(logits.softmax(-1), logits, torch.zeros_like(logits), "map")


def network_draws(predictor: MonteCarlo) -> Draws:
    """The logits of the sampled network."""
    return lambda images: torch.stack(list(predictor.outputs(images)))


def gaussian_draws(predictor: Linearised) -> Draws:
    """Logits from the exact Gaussian of the linearised network."""

    def draws(images: Tensor) -> Tensor:
        root = covariance_root(predictor.covariance(images))
        noise = torch.randn(DRAWS, *root.shape[:2], generator=torch.Generator().manual_seed(0), dtype=root.dtype)
        return predictor.model(images) + mirrored((root @ noise[..., None])[..., 0])

    return draws


def mirrored(moved: Tensor) -> Tensor:
    """Displacements and their negatives."""
    return torch.cat([moved, -moved])


def quality(prediction: ClassificationPrediction, labels: Tensor) -> dict[str, float]:
    """Accuracy, NLL and ECE."""
    scores = evaluate(prediction, labels, n_bootstrap=0)
    return {name: scores[name].value for name in QUALITY}


def look(draws: Draws, inputs: Tensor, jacobian: RowJacobian | None) -> Seen:
    """The averaged prediction, and every score there is."""
    predictions, information = [], []
    with torch.no_grad():
        for part in inputs.split(CHUNK):
            logits = draws(part)
            probs = logits.softmax(-1)
            variance = logits.var(0, correction=0)
            predictions.append(ClassificationPrediction(probs.mean(0), logits.mean(0), variance))
            expected = torch.special.entr(probs).sum(-1).mean(0)
            information.append(predictions[-1].entropy - expected)
    prediction = concatenate(predictions)
    scores = {"maxprob": 1 - prediction.confidence, "entropy": prediction.entropy}
    if float(prediction.logit_variance.max()) > 0:
        scores |= {"mi": torch.cat(information), "logit_variance": prediction.logit_variance.sum(-1)}
    if jacobian is not None:
        scores["leverage"] = scores["logit_variance"] / squared_norms(jacobian, inputs)
    return Seen(prediction, scores)


def squared_norms(jacobian: RowJacobian, inputs: Tensor) -> Tensor:
    """(N,) |J(x)|^2 over all weights and logits."""
    parameters = dict(jacobian.model.named_parameters())
    unit = {name: torch.ones(1, *parameters[name].shape) for name in jacobian.names}
    found = []
    for part in inputs.split(CHUNK):
        for _, _, pieces in jacobian.chunks(part, None):
            found.append(torch.stack([marginals(piece, unit, {}, {})[0].sum(-1) for piece in pieces]).sum(0))
    return torch.cat(found)


def ood_figures(test: Seen, others: dict[str, Seen], turned: dict[int, Seen]) -> dict[str, float]:
    """AUROCs by score and set, and their means."""
    found: dict[str, float] = {}
    for score, low in test.scores.items():
        by_angle = {angle: auroc(low, seen.scores[score]) for angle, seen in turned.items()}
        by_set = {name: auroc(low, seen.scores[score]) for name, seen in others.items()}
        by_set["rotated"] = statistics.mean(by_angle[angle] for angle in FAR)
        found |= {f"auroc_{score}_{name}": value for name, value in by_set.items()}
        found |= {f"auroc_{score}_rot{angle}": value for angle, value in by_angle.items()}
        found[f"ood_auroc_{score}"] = statistics.mean(by_set.values())
    return found


def spread(prediction: ClassificationPrediction) -> float:
    """The standard deviation of a logit, root mean square over logits, averaged over rows."""
    return float(prediction.logit_variance.mean(-1).sqrt().mean())


def auroc(low: Tensor, high: Tensor) -> float:
    """The share of pairs that `high` ranks above `low`."""
    scores = torch.cat([low, high]).double()
    return float(roc_auc_score([0] * len(low) + [1] * len(high), scores))


def summarise(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Means over seeds by "ood.task.method.figure", and their standard deviation as "..._sd"."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["method"]), []).append(row)
    summary = {}
    told = ("part", "task", "method", "seed")
    for (task, method), members in groups.items():
        for figure in dict.fromkeys(key for row in members for key in row if key not in told):
            values = [row[figure] for row in members if isinstance(row.get(figure), int | float)]
            if values:
                summary[f"ood.{task}.{method}.{figure}"] = statistics.mean(values)
            if len(values) > 1:
                summary[f"ood.{task}.{method}.{figure}_sd"] = statistics.stdev(values)
    return summary
