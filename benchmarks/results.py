"""Writing a benchmark's result: the same header for every file."""

import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bayespass.files import write_json

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("bayespass", "torch", "numpy", "scikit-learn", "safetensors")


def write_result(name: str, seeds: list[int], table: list[dict[str, Any]], summary: dict[str, float]) -> Path:
    """Write `benchmarks/results/NAME.json`.

    Args:
        name: of the benchmark.
        seeds: of the runs.
        table: every figure.
        summary: flat, named figures.

    Returns:
        the path.
    """
    script = Path(sys.argv[0])
    command = ["python", str(script.resolve().relative_to(ROOT)), *sys.argv[1:]]
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    result = {
        "command": shlex.join(command),
        "versions": {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}},
        "machine": {
            "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        },
        "threads": torch.get_num_threads(),
        "seeds": seeds,
        "summary": summary,
        "table": table,
    }
    write_json(path, result)
    return path


def between_marks(text: str, start: str, end: str, tables: str) -> str:
    """A page with what stands between two marks replaced."""
    before, _, rest = text.partition(start)
    return f"{before}{start}\n\n{tables}\n{end}{rest.partition(end)[2]}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
