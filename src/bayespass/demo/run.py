"""The main job on real input: train, get a posterior, calibrate, compare, report."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from bayespass.calibrate.distillation import DistilledScales, distill
from bayespass.calibrate.variance_scale import fit_scales
from bayespass.demo.digits import Split, load_digits
from bayespass.demo.models import SmallCNN, SmallViT
from bayespass.demo.training import Recipe, train
from bayespass.evaluate.compare import Comparison, compare
from bayespass.files import write_json
from bayespass.posterior.mean_field import DiagonalGaussian
from bayespass.prediction import ClassificationPrediction
from bayespass.report.figure import as_svg, draw_images, draw_reliability, draw_risk_coverage, new_figure, save_png
from bayespass.report.html import Section, write_report
from bayespass.report.table import comparison_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

N_CALIBRATION = 200
BATCH = 256
PREDICTORS = ("map", "mc4", "mc16", "mc64", "streamlined", "cvp_uncalibrated", "cvp", "faithful")
UNANSWERED = 12

# Few images. IVON runs long enough that averaging over the transformer's posterior visibly beats its mean weights;
# the convolutional network's posterior is as narrow as leaves it at least as accurate as AdamW made it.
NETWORKS: dict[str, tuple[str, Callable[[], nn.Module], Recipe]] = {
    "vit": (
        "vision transformer",
        SmallViT,
        Recipe(300, epochs=60, lr=2e-3, ivon_epochs=240, ivon_lr=0.1, hess_init=0.08, temperature=0.075),
    ),
    "cnn": (
        "convolutional network",
        SmallCNN,
        Recipe(100, epochs=20, lr=1e-3, ivon_epochs=300, ivon_lr=0.1, hess_init=1.0, temperature=0.1, batch_size=25),
    ),
}


@dataclass(frozen=True)
class NetworkResult:
    """One network of the demo.

    Args:
        key: "vit" or "cnn".
        title: in words.
        model: at the posterior mean, in eval mode.
        posterior: by IVON.
        scales: distilled for "faithful".
        comparison: on the test images.
        test: the test images.
    """

    key: str
    title: str
    model: nn.Module
    posterior: DiagonalGaussian
    scales: DistilledScales
    comparison: Comparison
    test: Split


def run_network(key: str, seed: int, n_reference: int = 200, *, progress: bool = False) -> NetworkResult:
    """Train one network on a few digits and compare its predictors on the test images.

    Args:
        key: "vit" or "cnn".
        seed: of the split, the initial weights, the batches and all draws.
        n_reference: draws of the Monte-Carlo reference.
        progress: show progress bars.
    """
    title, build, recipe = NETWORKS[key]
    train_split, calibration, test = load_digits(seed, recipe.n_train, N_CALIBRATION)
    torch.manual_seed(seed)
    model = build()
    posterior = train(model, train_split, recipe, seed, progress=progress)
    cvp = fit_scales(model, posterior, calibration.images, "cvp", seed=seed + 1, progress=progress)
    scales = distill(model, posterior, calibration.images, seed=seed + 1, progress=progress)
    calibrated = {"cvp": cvp, "faithful": scales}
    comparison = compare(
        model, posterior, test.batches(BATCH), PREDICTORS, calibrated, n_reference, seed=seed, progress=progress
    )
    return NetworkResult(key, title, model, posterior, scales, comparison, test)


def run_demo(
    output: Path, seed: int = 0, n_reference: int = 200, *, progress: bool = True
) -> tuple[list[NetworkResult], float]:
    """Run both networks and write `report.html`, `results.json`, `demo.png` and both posteriors.

    Args:
        output: the folder, made if needed.
        seed: of everything random.
        n_reference: draws of the Monte-Carlo reference.
        progress: show progress bars.

    Returns:
        the results, and the seconds that it took.
    """
    start = time.perf_counter()
    results = [run_network(key, seed, n_reference, progress=progress) for key in NETWORKS]
    for result in results:
        path = output / f"{result.key}.posterior.safetensors"
        result.posterior.save(path, result.model, scales=result.scales)
    write_json(output / "results.json", {r.key: comparison_rows(r.comparison) for r in results})
    save_png(picture(results[0]), output / "demo.png")
    introduction = (
        "Two small networks, trained on a few handwritten digits (8x8, from scikit-learn) and turned into posteriors "
        "by IVON. Each row predicts the same test images from the same posterior: with the mean weights (MAP), by "
        "Monte Carlo over S weight samples (MC-S), or in one pass that carries mean and variance."
    )
    write_report(output / "report.html", "bayespass demo", introduction, [section(result) for result in results])
    return results, time.perf_counter() - start


def shown_predictions(result: NetworkResult) -> dict[str, ClassificationPrediction]:
    """The predictions that the figures show, by the name in their legend."""
    comparison = result.comparison
    names = {"MAP": "map", "CVP, one pass": "cvp", "faithful, one pass": "faithful"}
    names[f"MC-{comparison.n_reference}"] = comparison.rows[-1].predictor
    return {label: comparison.row(name).prediction for label, name in names.items()}  # type: ignore[misc]


def section(result: NetworkResult) -> Section:
    """The part of the report about one network."""
    predictions, labels = shown_predictions(result), result.comparison.targets.numpy()
    figure, axes = new_figure(9, 3.8, columns=2)
    draw_reliability(axes[0], predictions, labels)
    draw_risk_coverage(axes[1], predictions, labels)
    rather_not, columns = new_figure(9, 1.5, columns=UNANSWERED)
    _draw_least_confident(columns, result)
    n_weights = sum(p.numel() for p in result.model.parameters())
    text = (
        f"{n_weights:,} weights, all random, trained on {NETWORKS[result.key][2].n_train} images. CVP is the published "
        f"method; faithful is the default. Both are calibrated to Monte Carlo on {N_CALIBRATION} unlabelled images, "
        f"CVP by one variance factor per site, faithful by distillation."
    )
    curves = "Left: accuracy in bins of confidence. Right: the error rate if only the most confident are answered."
    images = f"The {UNANSWERED} test images that one pass would rather not answer: guess, confidence, and the truth."
    return Section(
        result.title.capitalize(), text, result.comparison, [(curves, as_svg(figure)), (images, as_svg(rather_not))]
    )


def picture(result: NetworkResult) -> "Figure":
    """The picture of the README: risk against coverage, and what it would rather not answer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    grid = figure.add_gridspec(3, 8)
    curves = figure.add_subplot(grid[:, :4])
    curves.spines[["top", "right"]].set_visible(False)
    draw_risk_coverage(curves, shown_predictions(result), result.comparison.targets.numpy())
    curves.set_title("Errors if only the most confident digits are answered", fontsize=10)
    places = [figure.add_subplot(grid[row, column]) for row in range(3) for column in range(4, 8)]
    places[0].set_title("What one pass would rather not answer", fontsize=10, loc="left")
    _draw_least_confident(places, result)
    return figure


def _draw_least_confident(axes: list, result: NetworkResult) -> None:
    prediction = result.comparison.row("faithful").prediction
    assert isinstance(prediction, ClassificationPrediction)
    rows = prediction.confidence.argsort()[: len(axes)]
    images = result.test.images[rows, 0].numpy()
    guesses, truths = prediction.labels[rows].tolist(), result.comparison.targets[rows].tolist()
    confidences = prediction.confidence[rows].tolist()
    captions = [f"{g}? {100 * c:.0f} %\nit is {t}" for g, c, t in zip(guesses, confidences, truths, strict=True)]
    colours = ["#2e8b57" if g == t else "#c0504d" for g, t in zip(guesses, truths, strict=True)]
    draw_images(axes, images, captions, colours)
