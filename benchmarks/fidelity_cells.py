"""What a cell of the fidelity benchmark measures: every predictor's predictions are kept, then compared.

Predictions are kept in output/fidelity/predictions by cell and predictor, so that a new predictor costs its own
time alone. A change of the library does not show there: `--again NAME ...` makes those anew.
"""

import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from bayespass import ClassificationPrediction, Prediction, RegressionPrediction
from bayespass.files import replacing, write_json
from fidelity_cases import targets_of
from fidelity_measure import (
    LARGEST,
    derived,
    figures,
    gap_metric,
    interval,
    monte_carlo,
    resampled_counts,
    resampled_ranks,
    rows_of,
)
from fidelity_predictors import PREDICTORS, Setting
from fidelity_tasks import Cell, Store
from results import ROOT

FIELDS = {
    ClassificationPrediction: ("probs", "logit_mean", "logit_variance"),
    RegressionPrediction: ("mean", "epistemic", "aleatoric"),
}
MEASURED = hashlib.sha256(
    b"".join((ROOT / "benchmarks" / f"fidelity_{name}.py").read_bytes() for name in ("measure", "cells"))
).hexdigest()[:12]
DIGITS, BOUND_DIGITS = 4, 3


def predict_cell(cell: Cell, store: Store, again: tuple[str, ...] = ()) -> str:
    """Make the predictions of a cell that are missing, and measure all of them."""
    start = time.perf_counter()
    missing = [name for name in PREDICTORS if name in again or not prediction_path(cell, store, name).is_file()]
    if missing:
        case = store.case(cell)
        posterior, _ = store.posterior(cell, case)
        setting = Setting(cell.task, store.task(cell.task), case, posterior, cell.seed)
        for name in missing:
            keep_predictions(cell, store, name, setting)
    measure_cell(cell, store)
    return f"predicted {cell.name}: {time.perf_counter() - start:.1f} s"


def prediction_path(cell: Cell, store: Store, name: str) -> Path:
    """Of a note on the predictions of one predictor; the predictions lie beside it."""
    return store.path("predictions", cell, "") / f"{name}.json"


def keep_predictions(cell: Cell, store: Store, name: str, setting: Setting) -> None:
    """Fit and run one predictor on every test set; what goes wrong is kept as a note.

    A program that is not there (SUQ's environment) leaves nothing, so that it is tried again.
    """
    path, case = prediction_path(cell, store, name), setting.case
    start, arrays, note = time.perf_counter(), {}, ""
    try:
        predict = PREDICTORS[name](setting)
        fitted = time.perf_counter()
        for test, batches in case.tests.items() if predict is not None else ():
            prediction = predict(batches)  # type: ignore[misc]
            arrays |= {f"{test}/{field}": getattr(prediction, field) for field in FIELDS[type(prediction)]}
        if predict is None:
            note = "does not apply"
    except FileNotFoundError:
        return
    except (ArithmeticError, RuntimeError, ValueError, NotImplementedError) as error:
        fitted, note = time.perf_counter(), f"{type(error).__name__}: {error}"[:300]
    if arrays:
        if not all(bool(torch.isfinite(value).all()) for value in arrays.values()):
            note = "predictions are not finite"
        with replacing(path.with_suffix(".safetensors")) as whole:
            save_file({key: value.detach().contiguous().clone() for key, value in arrays.items()}, whole)
    told = {"note": note, "fit_seconds": fitted - start, "predict_seconds": time.perf_counter() - fitted}
    write_json(path, told)


def kept_prediction(cell: Cell, store: Store, name: str, test: str) -> Prediction | None:
    """A predictor's kept prediction; None where it has none."""
    path = prediction_path(cell, store, name).with_suffix(".safetensors")
    if not path.is_file() or read_json(path.with_suffix(".json"))["note"]:
        return None
    arrays = load_file(path)
    kind = next(kind for kind, names in FIELDS.items() if f"{test}/{names[0]}" in arrays)
    return kind(*(arrays[f"{test}/{field}"] for field in FIELDS[kind]), method=name)


def measure_cell(cell: Cell, store: Store) -> None:
    """Compare all kept predictions with Monte Carlo, unless that was done."""
    paths = [prediction_path(cell, store, name) for name in PREDICTORS]
    stamps = repr([(path.name, path.stat().st_mtime_ns) for path in paths if path.is_file()])
    key = hashlib.sha256(f"{MEASURED} {stamps}".encode()).hexdigest()[:16]
    result = store.path("cells", cell, ".json")
    if result.is_file() and read_json(result)["key"] == key:
        return
    case = store.case(cell)
    posterior, settings = store.posterior(cell, case)
    rows, resamples = [], {}
    for test, batches in case.tests.items():
        found = compare(cell, store, test, targets_of(batches), posterior.info)
        metric = gap_metric(found)
        for name, own in found.items():
            rows.append(as_row(cell, store, test, name, own, metric, len(targets_of(batches))))
            resamples[f"{test}/{name}"] = own[metric]
    with replacing(result.with_suffix(".npz")) as whole, whole.open("wb") as file:
        np.savez_compressed(file, **{key: values.astype(np.float32) for key, values in resamples.items()})
    write_json(result, {"key": key, "settings": clean(settings), "rows": rows})


def compare(cell: Cell, store: Store, test: str, targets: Any, info: Any) -> dict[str, dict[str, np.ndarray]]:
    """Figures of every predictor on a test set, for all rows and for every resample."""
    reference = store.reference(cell, test)
    drawn = monte_carlo(reference, info)
    truth = drawn["mc"][0]
    members: dict[str, list[Prediction]] = {}
    for name in PREDICTORS:
        prediction = kept_prediction(cell, store, name, test)
        if prediction is not None:
            members[name] = [prediction]
    members |= drawn
    counts = resampled_counts(len(targets), store.task(cell.task).block)
    by_row = {name: [rows_of(each, truth, targets) for each in own] for name, own in members.items()}
    ranks = resampled_ranks(by_row["mc"][0].spread, counts)
    confidence = by_row["mc"][0].confidence
    confidence_ranks = None if confidence is None else resampled_ranks(confidence, counts)
    found = {name: figures(own, ranks, counts, confidence_ranks) for name, own in by_row.items()}
    return derived(found, len(reference.draws))


def as_row(
    cell: Cell, store: Store, test: str, name: str, own: dict[str, np.ndarray], metric: str, n_rows: int
) -> dict[str, Any]:
    """A row of the table: every figure as [value, low, high]."""
    task = store.task(cell.task)
    helps = interval(own["gap"])[0] > 0
    row: dict[str, Any] = {
        "task": cell.task,
        "kind": cell.kind,
        "scale": cell.scale,
        "seed": cell.seed,
        "test": test,
        "predictor": name,
        "rows": n_rows,
        "mc_helps": helps,
        "gap_metric": metric,
    }
    for figure, values in own.items():
        row[figure] = [rounded(float(values[0])), *(rounded(bound, BOUND_DIGITS) for bound in interval(values))]
    row["capped"] = bool(own["equivalent_samples"][0] >= LARGEST)
    if name == "mc":  # its own divergence from itself says nothing
        row |= {"equivalent_samples": None, "capped": False}
    if not helps:
        row["gap_closed"] = None
    if name != "map":  # one gap for all predictors of a test set
        del row["gap"]
    if task.few_rows and "coverage_at_0.5" in row:
        row |= {"coverage_at_0.5": None, "note": "too few rows for a risk of 0.5 %"}
    path = prediction_path(cell, store, name)
    if name in PREDICTORS:
        told = read_json(path)
        row |= {"fit_seconds": rounded(told["fit_seconds"]), "predict_seconds": rounded(told["predict_seconds"])}
    return row


def rounded(value: float, digits: int = DIGITS) -> float | None:
    """Significant digits; None for what is not finite."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def clean(values: dict[str, Any]) -> dict[str, Any]:
    """Without numbers that JSON does not know."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def read_json(path: Path) -> Any:
    """The content of a file."""
    return json.loads(path.read_text(encoding="utf-8"))
