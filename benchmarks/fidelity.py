"""Fidelity: from one posterior, how close does each predictor come to Monte Carlo, and how much of its gain is kept.

    python benchmarks/fidelity.py [--tasks ...] [--seeds 0 1 2] [--stage reference|predict|summary|all] [--again NAME]

writes benchmarks/results/fidelity.json, from which fidelity_pages.py makes docs/fidelity.md. A cell is a task, a
kind of posterior ("ivon" or "laplace"), a scale of its variance and a seed. Two stages, both resumable, with
everything kept in output/fidelity:

`reference` trains the network, fits the posterior and keeps the network's raw outputs on every test row: at the
mean, under R draws (the reference) and under 64 further, independent ones (MC-4, 8, 16 and 64). It depends on the
tasks alone (fidelity_tasks.py says what their files go by) and is the dear part.

`predict` runs every predictor of fidelity_predictors.py that a cell lacks, on networks and posteriors as they were
kept, and compares all with Monte Carlo (fidelity_measure.py). A new predictor is one line there and costs its own
time alone; a change of the library asks for `--again NAME ...`. `summary` only writes the result.

Tasks and how their settings were chosen: fidelity_digits.py, fidelity_numbers.py, fidelity_fashion.py,
fidelity_pretrained.py; posteriors: fidelity_cases.py. `--smoke` takes few rows and short runs, to see that
everything works, and writes output/fidelity/smoke/fidelity.json instead.

The C library gives large blocks back to the system after every batch, which can double the time of a draw; the
Makefile sets MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ so that it does not.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bayespass.files import write_json
from fidelity_cells import predict_cell
from fidelity_predictors import PREDICTORS
from fidelity_summary import pooled, summarise
from fidelity_tasks import KINDS, TASKS, Cell, Store
from results import write_result

console = Console()


def cells(arguments: argparse.Namespace) -> list[Cell]:
    """Every cell that was asked for, task by task."""
    store = Store(arguments.data, arguments.smoke)
    return [
        Cell(task, kind, scale, seed)
        for task in arguments.tasks
        for seed in arguments.seeds
        for kind in arguments.kinds
        for scale in store.task(task).scales
        if arguments.scales is None or scale in arguments.scales
    ]


def fit(cell: Cell, store: Store) -> str:
    """Make the network and the posterior that a cell shares with other scales."""
    start = time.perf_counter()
    store.posterior(cell, store.case(cell))
    return f"fitted {cell.task} {cell.kind} seed {cell.seed}: {time.perf_counter() - start:.1f} s"


def draw(cell: Cell, store: Store) -> str:
    """Make a cell's reference."""
    start = time.perf_counter()
    store.make_reference(cell)
    return f"drawn {cell.name}: {time.perf_counter() - start:.1f} s"


def in_parallel(work: Callable[[Cell], str], todo: Iterable[Cell], workers: int) -> int:
    """Run this for every cell, some at once with one thread each, and say how long each took.

    Returns:
        how many cells failed; the others run on, and a later run tries them again.
    """
    todo, failed = list(todo), 0
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        running = {pool.submit(work, cell): cell for cell in todo}
        try:
            for done, future in enumerate(as_completed(running), start=1):
                error = future.exception()
                failed += error is not None
                said = f"FAILED {running[future].name}: {error!r}" if error else future.result()
                console.print(f"{done}/{len(todo)} {said}", soft_wrap=True, highlight=False)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def make_references(arguments: argparse.Namespace) -> int:
    """Fit and draw what is missing; how much of it failed."""
    store = Store(arguments.data, arguments.smoke)
    missing = [cell for cell in cells(arguments) if not store.path("references", cell, ".safetensors").is_file()]
    networks = {(cell.task, cell.seed): cell for cell in missing}
    posteriors = {(cell.task, cell.seed, cell.kind): cell for cell in missing}
    later = {key: cell for key, cell in posteriors.items() if cell not in networks.values()}
    failed = sum(
        in_parallel(partial(fit, store=store), todo, arguments.workers) for todo in (networks.values(), later.values())
    )
    return failed + in_parallel(partial(draw, store=store), missing, arguments.workers)


def predict(cell: Cell, store: Store, again: tuple[str, ...]) -> str:
    """Make a cell's missing predictions and compare them."""
    return predict_cell(cell, store, again)


def predict_all(arguments: argparse.Namespace) -> int:
    """Predict and measure every cell that has a reference; how many failed."""
    store = Store(arguments.data, arguments.smoke)
    ready = [cell for cell in cells(arguments) if store.path("references", cell, ".safetensors").is_file()]
    return in_parallel(partial(predict, store=store, again=tuple(arguments.again)), ready, arguments.workers)


def gather(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Path]]:
    """The rows of the settings whose seeds are all measured, and where their resamples are."""
    store, rows, resamples = Store(arguments.data, arguments.smoke), [], {}
    found = {cell: store.path("cells", cell, ".json") for cell in cells(arguments)}
    short = {(cell.task, cell.kind, cell.scale) for cell, path in found.items() if not path.is_file()}
    for cell, path in found.items():
        if (cell.task, cell.kind, cell.scale) not in short:
            rows += json.loads(path.read_text(encoding="utf-8"))["rows"]
            resamples[cell.name] = path.with_suffix(".npz")
    return rows, resamples


def main() -> None:
    """Run what is missing and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("BAYESPASS_DATA", "../shared/data")))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--scales", type=float, nargs="+", help="of the posterior's variance; all of a task's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stage", choices=("reference", "predict", "summary", "all"), default="all")
    parser.add_argument("--again", nargs="+", choices=list(PREDICTORS), default=[], help="predictors to run anew")
    parser.add_argument("--workers", type=int, default=2, help="cells at once, one thread each")
    parser.add_argument("--smoke", action="store_true", help="few rows and short runs")
    arguments = parser.parse_args()
    failed = make_references(arguments) if arguments.stage in ("reference", "all") else 0
    if arguments.stage == "reference":
        sys.exit(failed > 0)
    failed += predict_all(arguments) if arguments.stage in ("predict", "all") else 0
    rows, resamples = gather(arguments)
    summary = summarise(pooled(rows, resamples))
    if arguments.smoke:
        store = Store(arguments.data, smoke=True)
        write_json(store.folder / "fidelity.json", {"seeds": arguments.seeds, "summary": summary, "table": rows})
    else:
        write_result("fidelity", arguments.seeds, rows, summary)
    for name, value in list(summary.items())[:12]:
        console.print(f"{name:60s} {value:.4g}", soft_wrap=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
