"""Every task of the fidelity benchmark, and what is kept of a cell: network, posterior and draws.

A cell is a task, a kind of posterior, a scale of its variance and a seed. Its reference is a file with the
network's outputs at the posterior's mean, under R draws, and under 64 further draws that are independent of
those; networks and posteriors are kept beside it. All are keyed by the code and settings that make them:
the module of the task and `fidelity_cases`, docstrings and comments apart.
"""

import ast
import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import fidelity_digits
import fidelity_fashion
import fidelity_numbers
import fidelity_pretrained
from bayespass import Posterior
from bayespass.files import replacing, write_json
from fidelity_cases import (
    Case,
    Task,
    drawn_outputs,
    fit_network,
    fit_posterior,
    mean_outputs,
    smoked,
    smoked_task,
)
from results import ROOT

MODULES = (fidelity_digits, fidelity_numbers, fidelity_fashion, fidelity_pretrained)
KINDS = ("ivon", "laplace")
FURTHER = 64  # draws that are independent of the reference
FURTHER_SEED = 1_000_000
FOLDER = ROOT / "output" / "fidelity"


@dataclass(frozen=True)
class Cell:
    """A task, a kind of posterior, a scale of its variance and a seed."""

    task: str
    kind: str
    scale: float
    seed: int

    @property
    def name(self) -> str:
        """As in file names."""
        return f"{self.task}-{self.kind}-x{self.scale:g}-{self.seed}"


@dataclass(frozen=True)
class Reference:
    """Outputs on one test set: at the mean (N, ...), under the reference (R, N, ...) and 64 further draws."""

    mean: Tensor
    draws: Tensor
    further: Tensor


def _code(module: Any) -> bytes:
    """The code of a module and of what all tasks share, without docstrings, comments and the table of settings."""
    found = b""
    for path in (Path(module.__file__), ROOT / "benchmarks" / "fidelity_cases.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if "TASKS" not in ast.unparse(node).splitlines()[0]]
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
                value = body[0].value
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    value.value = ""
        found += ast.dump(tree).encode()
    return found


TASKS: dict[str, Task] = {name: task for module in MODULES for name, task in module.TASKS.items()}
CODE = {name: _code(module) for module in MODULES for name in module.TASKS}  # read once: what runs


class Store:
    """Where cells are kept, and the work to make what is missing.

    Args:
        data: the folder of all data sets.
        smoke: few rows and short runs, kept apart.
        folder: of everything.
    """

    def __init__(self, data: Path, smoke: bool = False, folder: Path = FOLDER) -> None:
        self.data, self.smoke = data, smoke
        self.folder = folder / "smoke" if smoke else folder
        self.cache = folder / "downloads"

    def task(self, name: str) -> Task:
        """The settings of a task."""
        return smoked_task(TASKS[name]) if self.smoke else TASKS[name]

    def key(self, name: str) -> str:
        """What the files of a task depend on."""
        settings = {field.name: getattr(self.task(name), field.name) for field in fields(Task)}
        for left_out in ("load", "scales", "block", "few_rows"):  # code, in the file's name, and of the measures
            del settings[left_out]
        told = f"{sorted(settings.items())} {torch.__version__} {FURTHER} {self.smoke}"
        return hashlib.sha256(CODE[name] + told.encode()).hexdigest()[:12]

    def path(self, kind: str, cell: Cell, end: str) -> Path:
        """Of a file of this kind."""
        return self.folder / kind / f"{cell.task}-{self.key(cell.task)}" / f"{cell.name}{end}"

    def case(self, cell: Cell) -> Case:
        """The case with its trained network."""
        task = self.task(cell.task)
        case = task.load(self.data, self.cache, cell.seed)
        if self.smoke:
            case = smoked(case)
        case.model.eval()
        if not task.adamw:
            return case
        path = self.path("networks", cell, "").with_name(f"{cell.task}-{cell.seed}.safetensors")
        if path.is_file():
            case.model.load_state_dict(load_file(path))
            return case
        fit_network(task, case, cell.seed)
        with replacing(path) as whole:
            save_file({name: value.contiguous() for name, value in case.model.state_dict().items()}, whole)
        return case

    def posterior(self, cell: Cell, case: Case) -> tuple[Posterior, dict[str, Any]]:
        """The cell's posterior, at its scale, and how it was fitted."""
        path = self.path("networks", cell, "").with_name(f"{cell.task}-{cell.kind}-{cell.seed}.safetensors")
        told = path.with_suffix(".json")
        if not told.is_file():
            fitted = fit_posterior(self.task(cell.task), case, cell.kind, cell.seed)
            fitted.posterior.save(path, case.model)
            write_json(told, fitted.settings)
        posterior = Posterior.load(path, case.model)
        return posterior.temper(cell.scale), json.loads(told.read_text(encoding="utf-8"))

    def make_reference(self, cell: Cell) -> None:
        """Train, fit and draw, unless the cell's reference is there."""
        path = self.path("references", cell, ".safetensors")
        if path.is_file():
            return
        case = self.case(cell)
        posterior, _ = self.posterior(cell, case)
        count, arrays = self.task(cell.task).reference, {}
        for name, batches in case.tests.items():
            arrays[f"{name}/mean"] = mean_outputs(case.model, posterior, batches)
            for part, size, seed in (("draws", count, cell.seed), ("further", FURTHER, FURTHER_SEED + cell.seed)):
                drawn = arrays[f"{name}/{part}"] = torch.empty((size, *arrays[f"{name}/mean"].shape))
                for index, outputs in enumerate(drawn_outputs(case.model, posterior, batches, size, seed)):
                    drawn[index] = outputs
        with replacing(path) as whole:
            save_file(arrays, whole)

    def reference(self, cell: Cell, name: str) -> Reference:
        """The kept outputs on one test set."""
        with safe_open(self.path("references", cell, ".safetensors"), "pt") as file:
            return Reference(*(file.get_tensor(f"{name}/{part}") for part in ("mean", "draws", "further")))
