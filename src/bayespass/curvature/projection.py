"""The projection P v = v - J^T (J J^T)^+ J v onto the kernel of J, exactly or as far as it is worth going.

    "direct"      one Cholesky factor of the smaller of J J^T and J^T J, all vectors at once: exact
    "lsmr"        least squares, preconditioned by the blocks' factors: the fastest that iterates
    "lsmr_plain"  the same without any factor
    "cgmn"        conjugate gradients on the symmetric sweep
    "gk"          sweeps, each followed by the best point among the last 8 iterates
    "cyclic"      sweeps alone, the reference

Iterations end when the MEASURED residual |J v| / |J v_0| is small enough, never by a count alone: after a
few sweeps the large directions of J are gone and the small ones are all still there, and only the residual
tells. With a ridge, J stands for [J, sqrt(ridge) I] throughout.
"""

import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bayespass import checkpoint as files
from bayespass.curvature.krylov import (
    CGMN,
    JITTER,
    LSMR,
    BlockFactors,
    Solver,
    State,
    Sweeps,
    exact_dtype,
    factorise,
)
from bayespass.curvature.layers import DEFAULT_MEMORY
from bayespass.curvature.operator import RowOperator
from bayespass.errors import InvalidInput, require_count, require_positive
from bayespass.posterior.store import hash_tensors

SolverName = Literal["auto", "direct", "lsmr", "lsmr_plain", "cgmn", "gk", "cyclic"]
ITERATES = 8  # kept by "gk"
DIRECT_WORK = {"cpu": 1e13, "cuda": 1e16}  # n^3 / 3 of a Cholesky factorisation that counts as cheap: minutes
LARGEST_BLOCK, SMALLEST_BLOCK = 20_000, 64  # rows of a block that is factorised
MEASURED_BLOCKS = 8
RANK_SIZE = 12_000  # rows up to which the rank is worth a triangular inverse


@dataclass(frozen=True)
class Projection:
    """Projected vectors, and how well.

    Args:
        vectors: (S, width).
        residual: |J v| / |J v_0| in Frobenius norms, over all rows.
        history: (epochs, residual) at every measurement; on a fixed random subset of blocks where there are
            many, over all rows at the end.
        epochs: passes over the data, one being a product with J and one with J^T; measurements not counted.
        solver: the one that ran.
        converged: the residual is within the tolerance.
        rank: of J ("direct" only; None for more than 12,000 rows): tr K (K + c)^-1 with c the ridge, or
            1e-10 of the mean diagonal of K without.
    """

    vectors: Tensor
    residual: float
    history: tuple[tuple[int, float], ...]
    epochs: int
    solver: str
    converged: bool
    rank: float | None = None


def project(
    operator: RowOperator,
    vectors: Tensor,
    solver: SolverName = "auto",
    tolerance: float = 1e-2,
    max_epochs: int = 500,
    max_memory: int = DEFAULT_MEMORY,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 10,
    progress: bool = False,
) -> Projection:
    """Project vectors onto the kernel of J.

    Args:
        operator: J, its data in blocks of random composition.
        vectors: (S, operator.width), left as they are.
        solver: see the module's table; "auto" takes "direct" where its matrix fits and is cheap, else
            "lsmr" where the factors of the blocks fit, else "lsmr_plain".
        tolerance: of the residual.
        max_epochs: passes over the data at most.
        max_memory: bytes for factors; those of blocks beyond it are made again in every pass.
        seed: of the blocks that are measured on the way.
        checkpoint: a file to write on the way, and to continue from if it is there; the result is the
            same in every bit as that of a run without interruption.
        checkpoint_every: epochs between writing.
        progress: show a bar with the residual.

    Raises:
        InvalidInput: a value outside its range, vectors that do not fit or are not finite, or a checkpoint
            of another run.

    Warns:
        UserWarning: the residual is above the tolerance after `max_epochs`.

    Source: Miani, Roy and Hauberg 2025 (arXiv 2410.16901).
    """
    require_positive(tolerance=tolerance)
    require_count(max_epochs=max_epochs, max_memory=max_memory, checkpoint_every=checkpoint_every)
    if vectors.dim() != 2 or vectors.shape[1] != operator.width or not torch.isfinite(vectors).all():
        msg = f"vectors must be finite, of shape (S, {operator.width}); got shape {tuple(vectors.shape)}"
        raise InvalidInput(msg)
    solver = plan(operator, solver, max_memory)[0]
    path = None if checkpoint is None else Path(checkpoint)
    run = _Run(operator, vectors, solver, tolerance, max_memory, seed, path)
    if not run.finished:
        if solver == "direct":
            _direct(run)
        else:
            _iterate(run, max_epochs, checkpoint_every, progress)
        run.write()
    found = run.result()
    if not found.converged:
        msg = (
            f"the projection stopped at residual {found.residual:.2g} after {found.epochs} epochs of {solver!r}, above "
            f"the tolerance {tolerance:.2g}: what it left of the data's directions moves the training outputs. Raise "
            f"max_epochs, or max_memory for larger blocks, or give a ridge"
        )
        warnings.warn(msg, UserWarning, stacklevel=2)
    return found


def plan(
    operator: RowOperator, solver: SolverName = "auto", max_memory: int = DEFAULT_MEMORY
) -> tuple[SolverName, int]:
    """The solver that "auto" stands for, and how many data its blocks should have.

    Args:
        operator: J, in any blocks.
        solver: "auto" or a choice that is kept.
        max_memory: bytes for factors.

    Raises:
        InvalidInput: an unknown solver.
    """
    if solver not in get_args(SolverName):
        msg = f"solver must be one of {', '.join(map(repr, get_args(SolverName)))}; got {solver!r}"
        raise InvalidInput(msg)
    smaller, per_datum = min(operator.n_rows, operator.n_params), operator.n_rows / operator.n_data
    one_gram = int(math.sqrt(max_memory / 64) / per_datum)  # a matrix and what it takes to make it
    kept = int(max_memory / (16 * operator.n_rows * per_datum))  # the factors of all blocks
    factorised = min(one_gram, kept, int(LARGEST_BLOCK / per_datum))
    if solver == "auto":
        cheap = smaller**3 / 3 <= DIRECT_WORK.get(operator.device.type, DIRECT_WORK["cpu"])
        if 16 * smaller**2 <= max_memory and cheap:
            solver = "direct"
        else:
            solver = "lsmr" if factorised * per_datum >= SMALLEST_BLOCK else "lsmr_plain"
    if solver in ("direct", "lsmr_plain"):
        return solver, max(1, one_gram)
    enough = int(SMALLEST_BLOCK / per_datum) + 1  # below that factors are made again instead of kept
    return solver, max(1, factorised, min(enough, one_gram))


class _Run:
    """One projection: where it stands, how it is measured, and its file."""

    def __init__(
        self,
        operator: RowOperator,
        vectors: Tensor,
        solver: SolverName,
        tolerance: float,
        max_memory: int,
        seed: int,
        path: Path | None,
    ) -> None:
        self.operator, self.solver, self.tolerance = operator, solver, tolerance
        self.max_memory, self.path = max_memory, path
        self.state: State = {"vectors": vectors}
        self.epochs, self.history, self.next = 0, [], 1
        self.rank: float | None = None
        self.finished = False
        count = len(operator.blocks)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
        self.everywhere = range(count)
        self.watched = sorted(order[: max(MEASURED_BLOCKS, count // 10)])
        self._identity = {} if path is None else _identity(operator, vectors, solver, seed)
        if path is not None and path.exists():
            self._resume(path)
        else:
            self.initial = [self.square(vectors, [block]) for block in self.everywhere]

    def square(self, vectors: Tensor, blocks: Sequence[int]) -> float:
        """|J v|_F^2 over these blocks."""
        return sum(float(self.operator.times(block, vectors).double().square().sum()) for block in blocks)

    def residual(self, blocks: Sequence[int]) -> float:
        """|J v| / |J v_0| over these blocks."""
        initial = sum(self.initial[block] for block in blocks)
        return math.sqrt(self.square(self.state["vectors"], blocks) / initial) if initial > 0 else 0.0

    def measure(self) -> float:
        """The present residual, over all rows if those that are watched are within the tolerance."""
        found = self.residual(self.watched)
        if found <= self.tolerance and len(self.watched) < len(self.everywhere):
            found = self.residual(self.everywhere)
        self.history.append((self.epochs, found))
        return found

    def result(self) -> Projection:
        """The outcome, measured over all rows."""
        final = self.history[-1][1]
        converged = final <= self.tolerance
        history = tuple((int(epochs), float(value)) for epochs, value in self.history)
        return Projection(self.state["vectors"], final, history, self.epochs, self.solver, converged, self.rank)

    def write(self) -> None:
        """Keep the present state, if there is a file for it."""
        if self.path is None:
            return
        place = {name: getattr(self, name) for name in ("epochs", "history", "next", "rank", "finished", "initial")}
        files.write(self.path, {"identity": self._identity, "place": place, "state": self.state})

    def _resume(self, path: Path) -> None:
        """Continue from a file.

        Raises:
            InvalidInput: it belongs to another run.
        """
        found = files.read(path)
        theirs = found.get("identity", {})
        different = [key for key in {**self._identity, **theirs} if self._identity.get(key) != theirs.get(key)]
        if different:
            shown = "; ".join(f"{key} is {self._identity.get(key)} and was {theirs.get(key)}" for key in different[:3])
            msg = (
                f"checkpoint {path} belongs to another projection: {shown}. Give this one a path of its own, or "
                f"delete the file"
            )
            raise InvalidInput(msg)
        for name, value in found["place"].items():
            setattr(self, name, value)
        device = self.operator.device
        self.state = pytree.tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, found["state"])
        if self.finished and self.history[-1][1] > self.tolerance and self.solver != "direct":
            self.finished = False  # it stopped at its max_epochs; this one may have more


def _iterate(run: _Run, max_epochs: int, checkpoint_every: int, progress: bool) -> None:
    method = _method(run)
    if run.epochs == 0:
        run.state = method.start(run.state["vectors"])
    written, found = run.epochs, math.inf
    with _bar(progress, max_epochs, run.epochs) as show:
        while run.epochs + method.epochs <= max_epochs:
            method.step(run.state)
            run.epochs += method.epochs
            if run.epochs >= run.next:
                found = run.measure()
                run.next = run.epochs + max(1, run.epochs // 8)
                if found <= run.tolerance:
                    break
            show(run.epochs, found)
            if run.epochs - written >= checkpoint_every:
                run.write()
                written = run.epochs
    if not (found <= run.tolerance and run.history[-1][0] == run.epochs):
        run.history.append((run.epochs, run.residual(run.everywhere)))
    run.finished = True


def _method(run: _Run) -> Solver:
    operator = run.operator
    if run.solver == "lsmr_plain":
        return LSMR(operator)
    factors = BlockFactors(operator, run.max_memory)
    if run.solver == "lsmr":
        return LSMR(operator, factors)
    if run.solver == "cgmn":
        return CGMN(operator, factors)
    return Sweeps(operator, factors, ITERATES if run.solver == "gk" else 0)


def _direct(run: _Run, refinements: int = 4) -> None:
    """v <- v - J^T K^-1 J v with one factor, repeated where the Jacobian's own rounding leaves something."""
    operator = run.operator
    vectors = run.state["vectors"].clone()
    primal = operator.n_params < operator.n_rows
    matrix = operator.primal_gram() if primal else _whole_gram(operator)
    factor, added = factorise(matrix, operator.ridge, JITTER[torch.float64])
    del matrix
    run.rank = _rank(factor, added)
    before = math.inf
    for _ in range(refinements):
        _correct(operator, vectors, factor, primal)
        run.epochs += 1
        run.state = {"vectors": vectors}
        found = run.residual(run.everywhere)
        run.history.append((run.epochs, found))
        if found <= run.tolerance or found > before / 2:
            break
        before = found
    run.finished = True


def _correct(operator: RowOperator, vectors: Tensor, factor: Tensor, primal: bool) -> None:
    parts = [operator.times(block, vectors).to(factor.dtype) for block in range(len(operator.blocks))]
    if not primal:
        weights = torch.cholesky_solve(torch.cat(parts, 1).mT, factor).mT
        for block, part in enumerate(weights.split(operator.sizes, 1)):
            operator.add_transposed(block, vectors, part.to(vectors.dtype), -1.0)
        return
    # (J J^T + c)^-1 w = (w - J (J^T J + c)^-1 J^T w) / c, and J^T times it is (J^T J + c)^-1 J^T w.
    back = sum(operator.transposed(block, part).to(factor.dtype) for block, part in enumerate(parts))
    assert isinstance(back, Tensor)
    change = torch.cholesky_solve(back.mT, factor).mT.to(vectors.dtype)
    if operator.ridge:
        moved = torch.cat([change, torch.zeros_like(vectors[:, operator.n_params :])], 1)
        rest = [p - operator.times(block, moved).to(p.dtype) for block, p in enumerate(parts)]
        vectors[:, operator.n_params :] -= (torch.cat(rest, 1) / operator.ridge**0.5).to(vectors.dtype)
    vectors[:, : operator.n_params] -= change


def _whole_gram(operator: RowOperator) -> Tensor:
    matrix = torch.empty(operator.n_rows, operator.n_rows, dtype=exact_dtype(operator), device=operator.device)
    count = len(operator.blocks)
    ends = torch.tensor([0, *operator.sizes]).cumsum(0).tolist()
    places = [slice(ends[k], ends[k + 1]) for k in range(count)]
    for i in range(count):
        for j in range(i, count):
            part = operator.gram(i, j, matrix.dtype)
            matrix[places[i], places[j]] = part
            matrix[places[j], places[i]] = part.mT
    return matrix


def _rank(factor: Tensor, added: float) -> float | None:
    """n - c tr (K + c)^-1 = tr K (K + c)^-1, by the Frobenius norm of the inverse factor."""
    size = len(factor)
    if size > RANK_SIZE:
        return None
    total = 0.0
    for start in range(0, size, 1024):
        unit = torch.zeros(size - start, min(1024, size - start), dtype=factor.dtype, device=factor.device)
        unit.fill_diagonal_(1)
        inverse = torch.linalg.solve_triangular(factor[start:, start:], unit, upper=False)
        total += float(inverse.square().sum())
    return size - added * total


def _identity(operator: RowOperator, vectors: Tensor, solver: str, seed: int) -> dict[str, str]:
    """What must be the same when a projection continues, in words."""
    data: dict[str, Tensor] = {}
    for k, block in enumerate(operator.blocks):
        leaves = [leaf for leaf in pytree.tree_leaves(block) if isinstance(leaf, Tensor)]
        data |= {f"{k}/{place}": leaf for place, leaf in enumerate(leaves)}
    weights = dict(operator.model.named_parameters()) | dict(operator.model.named_buffers())
    found = {
        "solver": solver,
        "seed": seed,
        "rows": operator.kind if isinstance(operator.kind, str) else "a function",
        "n_projections": operator.n_projections,
        "ridge": operator.ridge,
        "names": operator.names,
        "scale": list(operator.scale.values()),
        "likelihood": (operator.likelihood, operator.sigma_noise),
        "rows per block": hash_tensors({"sizes": torch.tensor(operator.sizes)})[:16],
        "the model's weights": hash_tensors(weights)[:16],
        "the data": hash_tensors(data)[:16],
        "the vectors": hash_tensors({"vectors": vectors})[:16],
    }
    return {key: str(value) for key, value in found.items()}


@contextmanager
def _bar(show: bool, total: int, done: int) -> Iterator[Callable[[int, float], None]]:
    """A bar of epochs with the last measured residual, on standard error if that is a terminal."""
    if not show or not sys.stderr.isatty():
        yield lambda epochs, residual: None  # noqa: ARG005
        return
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    columns = (*Progress.get_default_columns()[:2], TextColumn("epoch {task.completed}, residual {task.fields[left]}"))
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("projection", total=total, completed=done, left="...")
        yield lambda epochs, residual: bar.update(task, completed=epochs, left=f"{residual:.2g}")
