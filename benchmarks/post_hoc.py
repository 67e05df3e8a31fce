"""Posteriors after training: what a projection costs, how fast it converges, and what it is good for.

    python benchmarks/post_hoc.py [--data FOLDER] [--seeds 0 1 2] [--parts ...] [--smoke]

writes benchmarks/results/post_hoc.json. Five parts, each a module with its protocol in the header:
`solvers` (epochs to a residual, post_hoc_solvers.py), `ood` (seven methods on MNIST, Fashion-MNIST and
held-out classes, post_hoc_ood.py), `cost` (seconds and memory of an epoch against weights and outputs,
post_hoc_cost.py), `vae` (the loss projection of a decoder, post_hoc_vae.py) and `laplace` (beside
laplace-torch, post_hoc_laplace.py).

A finished cell is kept in output/post_hoc until it is deleted by hand, so a broken run resumes; a cell
of other code or settings of its part is run again (a change of the library does not show: delete the
folder). `cost` and `laplace` run one cell after the other on all cores; all others two at once on one
thread each. `--parts` says what is run; finished cells of the other parts are in the result all the same.
`--smoke` takes few rows and short runs, to see that everything works, and writes
output/post_hoc/smoke.json instead.
"""

import argparse
import hashlib
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import post_hoc_cost
import post_hoc_laplace
import post_hoc_ood
import post_hoc_solvers
import post_hoc_vae
from bayespass.files import write_json
from results import ROOT, write_result

PARTS = {"solvers": post_hoc_solvers, "ood": post_hoc_ood, "vae": post_hoc_vae, "cost": post_hoc_cost}
ALONE = ("cost", "laplace")  # timed on all cores
CELLS = ROOT / "output" / "post_hoc"
NETWORKS = CELLS / "networks"
Cell = tuple[str, str, str, int]
console = Console()


def main() -> None:
    """Run what is missing and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("BAYESPASS_DATA", "../shared/data")))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, "laplace"], default=[*PARTS, "laplace"])
    parser.add_argument("--workers", type=int, default=2, help="cells at once, one thread each")
    parser.add_argument("--smoke", action="store_true", help="few rows and short runs")
    arguments = parser.parse_args()
    run_missing(arguments)
    paths = [cell_path(cell, arguments) for cell in cells(arguments)]
    rows = [row for path in paths if path.is_file() for row in json.loads(path.read_text(encoding="utf-8"))]
    summary = summarise(rows)
    if arguments.smoke:
        result = {"seeds": arguments.seeds, "machine": {"cores": os.cpu_count()}, "summary": summary, "table": rows}
        write_json(CELLS / "smoke.json", result)
    else:
        write_result("post_hoc", arguments.seeds, rows, summary)
    for name, value in summary.items():
        console.print(f"{name:60s} {value:.4g}", soft_wrap=True)


def cells(arguments: argparse.Namespace) -> Iterator[Cell]:
    """Part, task, method and seed of every cell."""
    for part, module in PARTS.items():
        for task, method, seed in module.cells(arguments.seeds, arguments.smoke):
            yield part, task, method, seed
    yield "laplace", "all", "all", 0


def run_missing(arguments: argparse.Namespace) -> None:
    """Run every cell that was asked for and is not there."""
    missing = [cell for cell in cells(arguments) if cell[0] in arguments.parts]
    missing = [cell for cell in missing if not cell_path(cell, arguments).is_file()]
    together = [cell for cell in missing if cell[0] not in ALONE]
    with ProcessPoolExecutor(arguments.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        running = [pool.submit(run_cell, cell, arguments) for cell in together]
        try:
            for done, future in enumerate(as_completed(running), start=1):
                console.print(f"{done}/{len(missing)} {future.result()}", soft_wrap=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for done, cell in enumerate((cell for cell in missing if cell[0] in ALONE), start=len(together) + 1):
        console.print(f"{done}/{len(missing)} {run_cell(cell, arguments)}", soft_wrap=True)


def run_cell(cell: Cell, arguments: argparse.Namespace) -> str:
    """Run one cell, keep its rows, and say how long it took."""
    part, task, method, seed = cell
    start = time.perf_counter()
    if part == "laplace":
        rows = post_hoc_laplace.rows()
    else:
        rows = [PARTS[part].run_cell(task, method, seed, arguments.data, NETWORKS, arguments.smoke)]
    seconds = time.perf_counter() - start
    told = {"part": part, "task": task, "method": method, "seed": seed, "cell_seconds": seconds}
    write_json(cell_path(cell, arguments), [{**told, **row, "part": part} for row in rows])
    return f"{part} {task} {method} seed {seed}: {seconds:.1f} s"


def cell_path(cell: Cell, arguments: argparse.Namespace) -> Path:
    """Where a cell is kept; its name changes with the code of its part and with what it runs on."""
    part, task, method, seed = cell
    told = f"{arguments.smoke} {arguments.workers} {torch.__version__}".encode()
    kind = hashlib.sha256(CODE[part] + told).hexdigest()[:12]
    return CELLS / kind / f"{part}-{task}-{method}-{seed}.json"


def code_of(part: str) -> bytes:
    """What the cells of a part are made by."""
    files = [*sorted((ROOT / "benchmarks").glob(f"post_hoc_{part}*.py")), ROOT / "benchmarks" / "post_hoc_models.py"]
    return b"".join(file.read_bytes() for file in files)


CODE = {part: code_of(part) for part in [*PARTS, "laplace"]}  # read once: files that change later are not what runs


def summarise(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Named figures of all parts."""
    summary: dict[str, float] = {}
    for part, module in PARTS.items():
        mine = [row for row in rows if row["part"] == part]
        if mine:
            summary |= module.summarise(mine)
    mine = [row for row in rows if row["part"] == "laplace"]
    return summary | (post_hoc_laplace.summary(mine) if mine else {})


if __name__ == "__main__":
    main()
