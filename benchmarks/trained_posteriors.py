"""Posteriors by training: quality, uncertainty and price of every training method.

    python benchmarks/trained_posteriors.py [--data FOLDER] [--seeds 0 1 2] [--parts ...] [--workers 2]

writes benchmarks/results/trained_posteriors.json. Five parts, each a module with its protocol in the
header: `cost` (step time and memory beside AdamW, trained_cost.py), `images` (digits and
Fashion-MNIST, trained_images.py), `uci` (nine regression sets with their published splits,
trained_uci.py), `logistic` (the ELBO gap of Bayesian logistic regression and separate modes,
trained_logistic.py) and `forecasts` (ETTh1 and ETTh2, trained_forecasts.py).

A finished cell is kept in output/trained_posteriors until it is deleted by hand, so a broken run
resumes; a cell of other code or settings is run again. `cost` runs alone, on all cores, everything
else one thread per cell. With `--device cuda` networks and data are placed there, and `--full` takes
all 60,000 images of Fashion-MNIST instead of 10,000.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import trained_cost
import trained_forecasts
import trained_images
import trained_logistic
import trained_uci
from bayespass.files import write_json
from results import ROOT, write_result

PARTS = {
    "images": trained_images,
    "uci": trained_uci,
    "logistic": trained_logistic,
    "forecasts": trained_forecasts,
}
CELLS = ROOT / "output" / "trained_posteriors"
console = Console()


def main() -> None:
    """Run what is missing and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("BAYESPASS_DATA", "../shared/data")))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parts", nargs="+", choices=["cost", *PARTS], default=["cost", *PARTS])
    parser.add_argument("--workers", type=int, default=2, help="cells at once, one thread each")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps per method of the cost part")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--full", action="store_true", help="all training images")
    arguments = parser.parse_args()
    rows = [] if "cost" not in arguments.parts else cost_rows(arguments)
    rows += quality_rows(arguments)
    summary = summarise(rows)
    write_result("trained_posteriors", arguments.seeds, rows, summary)
    for name, value in summary.items():
        console.print(f"{name:60s} {value:.4g}", soft_wrap=True)


def cost_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Step times and memory, measured once on all cores."""
    path = cell_path("cost", "vit", "all", 0, arguments)
    if not path.is_file():
        write_json(path, trained_cost.run(arguments.rounds, device=arguments.device))
    return json.loads(path.read_text(encoding="utf-8"))


def quality_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of every cell, run where they are missing."""
    wanted = list(cells(arguments))
    missing = [cell for cell in wanted if not cell_path(*cell, arguments).is_file()]
    with ProcessPoolExecutor(arguments.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        running = {pool.submit(run_cell, *cell, arguments): cell for cell in missing}
        for done, future in enumerate(as_completed(running), start=1):
            part, task, method, seed = running[future]
            row = future.result()
            write_json(cell_path(part, task, method, seed, arguments), row)
            console.print(f"{done}/{len(missing)} {part} {task} {method} seed {seed}: {row.get('seconds', 0):.0f} s")
    return [json.loads(cell_path(*cell, arguments).read_text(encoding="utf-8")) for cell in wanted]


def cells(arguments: argparse.Namespace) -> Iterator[tuple[str, str, str, int]]:
    """Part, task, method and seed of every cell that was asked for."""
    for part, module in PARTS.items():
        if part in arguments.parts:
            for task, method, seed in module.cells(arguments.seeds):
                yield part, task, method, seed


def run_cell(part: str, task: str, method: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    options: dict[str, Any] = {}
    if part == "images":
        options = {"device": arguments.device, "full": arguments.full, "cache": CELLS / "networks"}
    row = PARTS[part].run_cell(task, method, seed, arguments.data, **options)
    return {"part": part, "task": task, "method": method, "seed": seed, **row}


def cell_path(part: str, task: str, method: str, seed: int, arguments: argparse.Namespace) -> Path:
    """Where a cell is kept; its name changes with the code of its part and with what it runs on."""
    code = b"".join(file.read_bytes() for file in sorted((ROOT / "benchmarks").glob(f"trained_{part}*.py")))
    kind = hashlib.sha256(code + f"{arguments.device} {arguments.full} {torch.__version__}".encode()).hexdigest()[:12]
    return CELLS / kind / f"{part}-{task}-{method.replace('/', '_')}-{seed}.json"


def summarise(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Named figures of all parts."""
    summary = trained_cost.summarise([row for row in rows if row["part"] == "cost"])
    for part, module in PARTS.items():
        mine = [row for row in rows if row["part"] == part]
        if mine:
            summary |= module.summarise(mine)
    return summary


if __name__ == "__main__":
    main()
