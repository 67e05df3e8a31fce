"""`bayespass fit`: a posterior for a model from data in a file, by any of the methods."""

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from bayespass.cli.fit_options import (
    Antithetic,
    BatchSize,
    Calibration,
    DataPath,
    Device,
    Epochs,
    Every,
    Features,
    HessInit,
    ImageSize,
    Likelihood,
    MapEpochs,
    MapRate,
    Members,
    MethodName,
    Names,
    Output,
    PriorPrecision,
    Projected,
    Quiet,
    Rate,
    Samples,
    Seed,
    SigmaNoise,
    Standardize,
    Structure,
    Target,
    Temperature,
    Text,
    Validation,
    WeightDecay,
)
from bayespass.cli.fit_settings import Calibrate, Method, Settings, Start, check, resolve
from bayespass.cli.models import SAFE_WEIGHTS, Model, Weights, open_model
from bayespass.errors import InvalidInput

if TYPE_CHECKING:
    from torch import nn

    from bayespass.cli.data import Data, Recipe

RESULTS = ("model", "model.safetensors", "posterior.safetensors", "calibration.json", "data.json", "log.json")
SETTINGS = "settings.json"


def fit_command(
    model: Model,
    data: DataPath,
    output: Output,
    method: MethodName = Method.IVON,
    weights: Weights = None,
    likelihood: Likelihood = "classification",
    sigma_noise: SigmaNoise = None,
    names: Names = None,
    epochs: Epochs = None,
    map_epochs: MapEpochs = None,
    lr: Rate = None,
    map_lr: MapRate = None,
    batch_size: BatchSize = 64,
    prior_precision: PriorPrecision = None,
    weight_decay: WeightDecay = None,
    temperature: Temperature = None,
    hess_init: HessInit = None,
    samples: Samples = None,
    antithetic: Antithetic = False,
    members: Members = None,
    hessian_structure: Structure = None,
    rows: Projected = None,
    validation: Validation = "0.1",
    calibration: Calibration = Calibrate.SCALES,
    seed: Seed = 0,
    target: Target = None,
    text: Text = None,
    features: Features = None,
    standardize: Standardize = None,
    image_size: ImageSize = None,
    checkpoint_every: Every = 200,
    device: Device = "cpu",
    quiet: Quiet = False,
) -> None:
    """Learn a posterior for a model and calibrate it on held-out rows.

    The same command continues a run that was stopped or killed, and ends
    in the same posterior as one that was not.

    It writes model.safetensors (or the folder model/),
    posterior.safetensors, calibration.json, data.json (how data are read)
    and log.json.
    """
    asked = Settings(
        method, likelihood, _sigma_noise(sigma_noise), names, epochs, map_epochs, lr, map_lr, batch_size,
        prior_precision, weight_decay, temperature, hess_init, samples, antithetic, seed,
        members, hessian_structure, rows,
    )  # fmt: skip
    check(asked)
    import torch

    from bayespass.cli import data as reading
    from bayespass.cli.fit_results import compared, measure, write_model, write_results
    from bayespass.cli.fit_run import CHECKPOINTS, run

    torch.manual_seed(seed)
    network, notes = open_model(model, weights)
    folder = Path(model) if Path(model).is_dir() else None
    start = _start(folder, weights, notes)
    columns = None if features is None else tuple(name.strip() for name in features.split(",") if name.strip())
    size = None if image_size is None else (image_size, image_size)
    recipe = reading.Recipe(likelihood, target, columns, text=text, image_size=size)  # type: ignore[arg-type]
    training, held_out, recipe = _data(data, validation, recipe, network, folder, asked, standardize, start)
    settings = resolve(asked, start, len(training), folder=folder is not None)
    identity = {
        "settings": {**settings.to_dict(), "data": _described(recipe)},
        "starting weights": _hash_weights(network),
        "training rows": training.fingerprint(),
        "validation rows": held_out.fingerprint(),
    }
    finished = _begin(output, identity)
    _tidy(output, [f".{name}.*.part" for name in RESULTS] + (list(CHECKPOINTS) if finished else []))
    if finished:
        log = json.loads((output / "log.json").read_text(encoding="utf-8"))
        typer.echo(f"{output} holds this run, finished; delete the folder or choose another --output to run again")
        _report(log)
        return
    place = _device(device)
    network.to(place)

    def build(other_seed: int) -> "nn.Module":
        torch.manual_seed(other_seed)
        return open_model(model, weights)[0]

    outcome = run(
        network, build, training.to(place), held_out.to(place), settings, output, checkpoint_every, progress=not quiet
    )
    scales, calibrated, figures, more = measure(
        network, outcome.posterior, held_out.to(place), batch_size, seed, calibration, progress=not quiet
    )
    network.cpu()
    written = write_model(network, output, folder, recipe)
    outcome.posterior.save(output / "posterior.safetensors", network, scales)
    logs = {"warm_start": outcome.warm_start, "training": outcome.training}
    log = {
        "model": model,
        "data": str(data),
        "settings": settings.to_dict(),
        "start": start.value,
        "versions": _versions(),
        "rows": len(training),
        "validation_rows": len(held_out),
        "posterior": {
            **_plain_info(outcome.posterior),
            "parameters": sum(m.numel() for m in outcome.posterior.mean.values()),
        },
        **{name: None if log is None else log.to_dict() for name, log in logs.items()},
        "validation": figures,
        "notes": [*notes, *outcome.notes, *more],
        "next": _next(model, folder, written, data, output, validation, recipe, compared(outcome.posterior)),
    }
    write_results(output, recipe, calibrated, log)
    _tidy(output, CHECKPOINTS)
    _report(log)


def _data(
    path: Path,
    validation: str,
    recipe: "Recipe",
    network: "nn.Module",
    folder: Path | None,
    asked: Settings,
    standardize: bool | None,
    start: Start,
) -> "tuple[Data, Data, Recipe]":
    """Training rows, validation rows and how they were read.

    Raises:
        InvalidInput: --standardize without columns of numbers, or training rows of one class.
    """
    from bayespass.cli import data as reading
    from bayespass.posterior.store import hash_tensors

    rows, recipe = reading.read_data(path, recipe, network, folder)
    rows, recipe = reading.fit_to_model(rows, recipe, network, asked.sigma_noise)
    if (share := _share(validation)) is None:
        held_out, _ = reading.read_data(Path(validation), recipe, network, folder)
        reading.fit_to_model(held_out, recipe, network, asked.sigma_noise)
        training = rows
    else:
        training, held_out = reading.split_rows(rows, share, asked.seed)
        whole = hash_tensors({"targets": rows.targets})
        recipe = replace(recipe, fraction=share, seed=asked.seed, held_out_of=whole)
    if recipe.likelihood == "classification" and training.targets.unique().numel() < 2:
        msg = f"{path}: classification needs at least two classes among the training rows; all have one label"
        raise InvalidInput(msg)
    if recipe.features is None and standardize:
        msg = f"--standardize is for numeric columns of csv or parquet; {path} is taken as it is"
        raise InvalidInput(msg)
    if recipe.features is not None and (start == Start.RANDOM if standardize is None else standardize):
        recipe = reading.standardizer(training, recipe)
    return reading.prepared(training, recipe, network), reading.prepared(held_out, recipe, network), recipe


def _begin(output: Path, identity: Mapping[str, Any]) -> bool:
    """Claim the output folder for this run; whether the run is finished already.

    Raises:
        InvalidInput: the folder holds something else.
    """
    from bayespass.files import write_json

    settings = output / SETTINGS
    if not settings.is_file():
        foreign = [name for name in RESULTS if (output / name).exists()]
        if foreign:
            msg = f"--output {output} holds {foreign[0]}, which is not of a run of this command; choose another folder"
            raise InvalidInput(msg)
        write_json(settings, identity)
        return False
    try:
        theirs = json.loads(settings.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"--output {output}: {SETTINGS} cannot be read ({error}); delete the folder or choose another"
        raise InvalidInput(msg) from error
    ours = json.loads(json.dumps(identity))
    different = [
        f"{name} is {ours['settings'].get(name)} and was {theirs.get('settings', {}).get(name)}"
        for name in ours["settings"]
        if ours["settings"].get(name) != theirs.get("settings", {}).get(name)
    ]
    different += [f"the {key} differ" for key in ours if key != "settings" and ours[key] != theirs.get(key)]
    if different:
        msg = (
            f"--output {output} holds a run with other settings: {'; '.join(different[:3])}. "
            f"Choose another folder, or delete this one to start over"
        )
        raise InvalidInput(msg)
    return (output / "log.json").is_file()


def _tidy(output: Path, patterns: Iterable[str]) -> None:
    """Remove what is no longer needed: checkpoints, and files half-written by a run that was killed."""
    import shutil

    for path in [path for pattern in patterns for path in output.glob(pattern)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _start(folder: Path | None, weights: Path | None, notes: tuple[str, ...]) -> Start:
    if weights is not None or (folder is not None and not notes):
        return Start.TRAINED
    if folder is not None and any((folder / name).is_file() for name in SAFE_WEIGHTS):
        return Start.NEW_HEAD
    return Start.RANDOM


def _sigma_noise(text: str | None) -> float | str | None:
    """A number, or `predicted`.

    Raises:
        InvalidInput: it is neither.
    """
    if text is None or text == "predicted":
        return text
    try:
        return float(text)
    except ValueError as error:
        msg = f"--sigma-noise must be a number > 0 or `predicted`; got {text!r}"
        raise InvalidInput(msg) from error


def _share(validation: str) -> float | None:
    try:
        return float(validation)
    except ValueError:
        return None


def _device(name: str) -> Any:
    """The torch device of this name.

    Raises:
        InvalidInput: there is none here.
    """
    import torch

    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        msg = f"--device {name!r} cannot be used: {str(error).splitlines()[0]}"
        raise InvalidInput(msg) from error


def _hash_weights(network: "nn.Module") -> str:
    from torch import Tensor

    from bayespass.posterior.store import hash_tensors

    return hash_tensors({k: v for k, v in network.state_dict().items() if isinstance(v, Tensor)})


def _described(recipe: "Recipe") -> dict[str, Any]:
    """The recipe without what the rows' own hash already tells."""
    left_out = ("center", "spread", "held_out_of")
    return {name: value for name, value in recipe.to_dict().items() if name not in left_out}


def _plain_info(posterior: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {"kind": posterior.kind, **asdict(posterior.info)}


def _versions() -> dict[str, str]:
    import platform
    import sys
    from importlib.metadata import version

    loaded = [name for name in ("torch", "numpy", "safetensors", "transformers", "pyarrow") if name in sys.modules]
    return {"bayespass": version("bayespass"), "python": platform.python_version(), **{n: version(n) for n in loaded}}


def _next(
    model: str,
    folder: Path | None,
    written: Path,
    data: Path,
    output: Path,
    validation: str,
    recipe: "Recipe",
    options: list[str],
) -> str:
    """The command that compares predictors on the validation rows."""
    spec = model if folder is None else str(written)
    own_rows = recipe.fraction is not None
    command = [
        "bayespass",
        "compare",
        spec,
        str(output / "posterior.safetensors"),
        str(data) if own_rows else validation,
    ]
    command += ["--weights", str(written)] if folder is None else []
    command += ["--recipe", str(output / "data.json")] + (["--rows", "validation"] if own_rows else [])
    command += options
    return shlex.join(command)


def _report(log: Mapping[str, Any]) -> None:
    from rich.console import Console

    from bayespass.cli.fit_results import summary_table

    console = Console(width=None if Console().is_terminal else 120)
    console.print(summary_table(log))
    for note in log["notes"]:
        console.print(f"note: {note}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"next: {log['next']}", soft_wrap=True, highlight=False, markup=False)
