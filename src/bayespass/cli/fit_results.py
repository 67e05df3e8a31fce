"""What `bayespass fit` measures after training, what it writes, and the table that it prints."""

import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from torch import nn

from bayespass.calibrate.distillation import MIN_INPUTS, DistilledScales, distill
from bayespass.calibrate.temperature import TemperatureScaling
from bayespass.calibrate.variance_scale import VarianceScales, fit_scales
from bayespass.cli.data import Data, Recipe, model_classes
from bayespass.cli.fit_settings import Calibrate
from bayespass.errors import UnsupportedOp
from bayespass.evaluate.scores import Scores, evaluate
from bayespass.files import replacing, write_json
from bayespass.posterior.base import Posterior
from bayespass.posterior.empirical import Empirical
from bayespass.posterior.sampled_gaussian import SampledGaussian
from bayespass.predict.dataset import predict_dataset
from bayespass.predict.linearised import Linearised
from bayespass.predict.propagation import SinglePass
from bayespass.predict.sampling import MeanNetwork, MonteCarlo
from bayespass.prediction import ClassificationPrediction

CALIBRATION_ROWS, CALIBRATION_BATCH = 256, 64
DRAWS = 16
LABELS = {
    "map": "mean network",
    "single_pass": "single pass",
    "linearised": "linearised network",
}
LINEARISED = ("laplace", "null_space", "ridge_null")  # posteriors of the linearised network
COLUMNS = {  # name, heading, factor, digits
    "classification": [
        ("accuracy", "acc %", 100, 1), ("nll", "NLL", 1, 3), ("ece", "ECE %", 100, 1), ("aurc", "AURC %", 100, 2),
    ],
    "regression": [("rmse", "RMSE", 1, 3), ("nll", "NLL", 1, 3), ("coverage_95", "in 95 % interval", 1, 3)],
}  # fmt: skip


def measure(
    network: nn.Module,
    posterior: Posterior,
    validation: Data,
    batch_size: int,
    seed: int,
    calibration: Calibrate = Calibrate.SCALES,
    *,
    progress: bool,
) -> tuple[VarianceScales | None, dict[str, Any], dict[str, Any], tuple[str, ...]]:
    """Calibrate on the validation rows and measure the predictors there.

    Variance scales are fitted to Monte Carlo on validation inputs, without labels. Temperatures are
    fitted to labels and reported apart; the figures are without them.

    Args:
        network: in eval mode.
        posterior: over its parameters.
        validation: held-out rows, on the network's device.
        batch_size: rows per batch.
        seed: of draws and resamples.
        calibration: of the single pass; scales where there are too few rows to distill.
        progress: show progress bars.

    Returns:
        the scales (None where an operation has no rule), the calibration and the figures as plain
        values, and notes.
    """
    batches = validation.batches(batch_size)
    rows = validation.select(slice(0, CALIBRATION_ROWS)).batches(min(CALIBRATION_BATCH, batch_size))
    predictors, scales, notes = _predictors(network, posterior, rows, seed, calibration, progress)
    figures, temperatures = {}, {}
    for name, predictor in predictors.items():
        prediction = predict_dataset(predictor, batches)
        figures[name] = _plain(evaluate(prediction, validation.targets, seed=seed))
        if isinstance(prediction, ClassificationPrediction):
            labels = validation.targets.to(prediction.probs.device)
            temperatures[name] = TemperatureScaling().fit(prediction, labels).temperature_
    calibrated = {
        "rows": len(validation),
        "temperature": temperatures or None,
        "scales": None
        if scales is None
        else {
            "approximation": scales.approximation,
            "rows": sum(len(targets) for _, targets in rows),
            "factors": dict(scales),
            "log_standard_errors": {k: _finite(v) for k, v in scales.standard_errors.items()},
            "dampings": scales.dampings,
            "report": str(scales.report) if isinstance(scales, DistilledScales) else None,
        },
    }
    return scales, calibrated, figures, notes


def _predictors(
    network: nn.Module, posterior: Posterior, rows: list[Any], seed: int, calibration: Calibrate, progress: bool
) -> tuple[dict[str, nn.Module], VarianceScales | None, tuple[str, ...]]:
    """The predictors that suit a posterior, by name, with the scales of the single pass and notes.

    Draws in a null space move the network itself far outside the range where it is linear, and the mean
    weights of an ensemble are no network's: they have neither a single pass nor a mean network.
    """
    if isinstance(posterior, Empirical):
        weights = dict(network.named_parameters())
        itself = Empirical([{name: weights[name] for name in posterior.names}], posterior.info)
        size = len(posterior.members)
        return {"map": MeanNetwork(network, itself), f"mc{size}": MonteCarlo(network, posterior, size, seed)}, None, ()
    predictors: dict[str, nn.Module] = {"map": MeanNetwork(network, posterior)}
    if posterior.info.method in LINEARISED:
        predictors["linearised"] = Linearised(network, posterior)
    if isinstance(posterior, SampledGaussian):
        return predictors, None, ("predicted by the linearised network only: the draws are for it",)
    scales, notes = None, ()
    try:
        enough = sum(len(targets) for _, targets in rows) >= MIN_INPUTS
        fit = distill if calibration is Calibrate.DISTILL and enough else fit_scales
        if fit is fit_scales and calibration is Calibrate.DISTILL:
            notes = (f"fewer than {MIN_INPUTS} validation rows, too few to distill: fit_scales instead",)
        scales = fit(network, posterior, rows, seed=seed, progress=progress)
        predictors["single_pass"] = SinglePass(network, posterior, scales=scales)
    except UnsupportedOp as error:
        notes = (f"no single pass: {' '.join(str(error).split())}",)
    predictors[f"mc{DRAWS}"] = MonteCarlo(network, posterior, DRAWS, seed)
    return predictors, scales, notes


def compared(posterior: Posterior) -> list[str]:
    """The options of `bayespass compare` that suit a posterior."""
    if isinstance(posterior, Empirical):
        return ["--predictors", "map", "--reference", str(len(posterior.members))]
    if isinstance(posterior, SampledGaussian):
        return ["--predictors", "map,linearised"]
    return []


def write_model(network: nn.Module, output: Path, folder: Path | None, recipe: Recipe) -> Path:
    """The mean weights: model.safetensors, or for a Hugging Face folder the folder `model`.

    Args:
        network: at the posterior mean, on the CPU.
        output: of the run.
        folder: the Hugging Face folder that it came from; its tokenizer or image processor comes along.
        recipe: how data are read.

    Returns:
        what was written.
    """
    if folder is None:
        from safetensors.torch import save_model

        with replacing(output / "model.safetensors") as temporary:
            save_model(network, str(temporary))
        return output / "model.safetensors"
    model: Any = network
    if recipe.classes and model_classes(network) is None and len(recipe.classes) == model.config.num_labels:
        model.config.id2label = dict(enumerate(recipe.classes))
        model.config.label2id = {name: label for label, name in enumerate(recipe.classes)}
    target = output / "model"
    temporary = Path(tempfile.mkdtemp(dir=output, prefix=".model.", suffix=".part"))
    try:
        model.save_pretrained(temporary)
        if recipe.text is not None:
            from transformers import AutoTokenizer

            AutoTokenizer.from_pretrained(folder, local_files_only=True).save_pretrained(temporary)
        if recipe.channels is not None:
            from bayespass.cli.images import image_processor

            image_processor(folder).save_pretrained(temporary)
        temporary.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def write_results(output: Path, recipe: Recipe, calibration: Mapping[str, Any], log: Mapping[str, Any]) -> None:
    """data.json, calibration.json and, last because it says that the run is finished, log.json."""
    write_json(output / "data.json", recipe.to_dict())
    write_json(output / "calibration.json", calibration)
    write_json(output / "log.json", log)


def summary_table(log: Mapping[str, Any]) -> Table:
    """The validation figures in a log.

    Args:
        log: what log.json holds.
    """
    table = Table(
        title=f"{log['settings']['method']}: {log['validation_rows']} validation rows",
        caption="± is one standard error over rows",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    columns = COLUMNS[log["settings"]["likelihood"]]
    table.add_column("predictor", no_wrap=True)
    for _, heading, _, _ in columns:
        table.add_column(heading, justify="right")
    for name, figures in log["validation"].items():
        cells = []
        for key, _, factor, digits in columns:
            value, error = figures[key]["value"], figures[key]["se"]
            shown = "–" if value is None else f"{factor * value:.{digits}f}"
            cells.append(shown if error is None else f"{shown}±{factor * error:.{digits}f}")
        draws = f"Monte Carlo, {name[2:]} draws" if name.startswith("mc") else name
        table.add_row(LABELS.get(name, draws), *cells)
    return table


def _plain(scores: Scores) -> dict[str, dict[str, float | None]]:
    return {name: {"value": _finite(e.value), "se": _finite(e.standard_error)} for name, e in scores.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
