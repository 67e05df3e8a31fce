"""How many passes over the data a projection takes: one function per cell.

    from post_hoc_solvers import cells, run_cell, summarise
    row = run_cell("mlp", "lsmr", seed=0, data=Path("../shared/data"), cache=None)

Four Gaussian vectors are projected on the kernel of the Jacobian of all outputs on 500 digits, 200
for the transformer (5,000 and 2,000 rows, fewer than the weights; see `post_hoc_models`), in four blocks
in random order. An iteration ends when the residual |J v| / |J v_0|, measured over all rows every eighth
epoch or more often, is 1e-2, or after 300 epochs, 60 for the transformer; `epochs` counts a product
with J and one with J^T as one, and not the measurements, which `seconds` does. The direct solver takes
one Gram matrix, one Cholesky factor and one correction, or more where the Jacobian's single precision
leaves something.

`train_shift` is how much a draw moves the linearised predictions on the training rows after the
projection, over what it did before, in root mean squares over rows, outputs and draws, as the predictor
`Linearised` has it: zero for a null space.
"""

import statistics
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bayespass.curvature.operator import RowOperator
from bayespass.curvature.projection import project
from bayespass.curvature.row_blocks import shuffled_blocks
from bayespass.demo.digits import Split
from bayespass.posterior.sampled_gaussian import SampledGaussian
from bayespass.predict.dataset import predict_dataset
from bayespass.predict.linearised import Linearised
from post_hoc_models import count, load_digit_rows, trained_digits

NETWORKS = ("mlp", "cnn", "vit")
SOLVERS = ("direct", "lsmr", "cgmn", "gk", "cyclic", "lsmr_plain")
SOLVERS_OF = {"vit": ("direct", "lsmr", "gk", "cyclic")}  # an epoch of the transformer is slow
ACCELERATED, PLAIN = "lsmr", "cyclic"
N_BLOCKS, DRAWS, TOLERANCE = 4, 4, 1e-2
MAX_EPOCHS = {"mlp": 300, "cnn": 300, "vit": 60}
MAX_MEMORY = 2 * 2**30
CHUNK = 100


def cells(seeds: Sequence[int], smoke: bool = False) -> list[tuple[str, str, int]]:
    """Every (network, solver, seed)."""
    chosen = seeds[:1] if smoke else seeds
    return [
        (network, solver, seed)
        for network in NETWORKS
        for seed in chosen
        for solver in SOLVERS_OF.get(network, SOLVERS)
    ]


def run_cell(
    network: str, solver: str, seed: int, data: Path, cache: Path | None = None, smoke: bool = False
) -> dict[str, Any]:
    """Project with one solver.

    Args:
        network: one of `NETWORKS`.
        solver: one of `SOLVERS`.
        seed: of rows, network and vectors.
        data: not needed; the digits come with scikit-learn.
        cache: a folder for the trained networks; None trains them anew.
        smoke: few rows and epochs.
    """
    del data
    train = load_digit_rows(network, seed, smoke)[0]
    model = trained_digits(network, seed, train, cache)
    operator = operator_of(model, train, seed)
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(DRAWS, operator.n_params, generator=generator)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it has not converged; the row says so
        found = project(operator, vectors, solver, TOLERANCE, 20 if smoke else MAX_EPOCHS[network], MAX_MEMORY, seed)
    seconds = time.perf_counter() - start
    return {
        "weights": count(model),
        "rows": operator.n_rows,
        "residual": found.residual,
        "converged": found.converged,
        "epochs": found.epochs,
        "history": [[epochs, residual] for epochs, residual in found.history],
        "seconds": seconds,
        "seconds_per_epoch": seconds / max(1, found.epochs),
        "train_shift": shift(model, train, operator, vectors, found.vectors),
    }


def operator_of(model: nn.Module, rows: Split, seed: int) -> RowOperator:
    """The Jacobian of all outputs, in blocks of random composition."""
    blocks = shuffled_blocks([(rows.images, rows.labels)], -(-len(rows.labels) // N_BLOCKS), seed)
    return RowOperator(model, [name for name, _ in model.named_parameters()], blocks, max_memory=MAX_MEMORY)


def shift(model: nn.Module, rows: Split, operator: RowOperator, before: Tensor, after: Tensor) -> float:
    """|J v| / |J v_0| on the training rows, as the linearised predictor has it."""
    mean = {name: value.detach() for name, value in model.named_parameters()}
    squares = []
    for vectors in (after, before):
        posterior = SampledGaussian(mean, operator.unflatten(vectors))
        prediction = predict_dataset(Linearised(model, posterior, covariance="samples"), list(rows.images.split(CHUNK)))
        squares.append(float(prediction.logit_variance.double().sum()))  # type: ignore[union-attr]
    return (squares[0] / squares[1]) ** 0.5


def summarise(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Means over seeds by "solvers.network.solver.figure", and the named figures of the whole."""
    rows = list(rows)
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["method"]), []).append(row)
    summary: dict[str, float] = {}
    for (network, solver), members in groups.items():
        key = f"solvers.{network}.{solver}"
        for figure in ("epochs", "seconds", "seconds_per_epoch", "residual"):
            summary[f"{key}.{figure}"] = statistics.mean(row[figure] for row in members)
        summary[f"{key}.train_shift"] = max(row["train_shift"] for row in members)
        summary[f"{key}.stopped"] = sum(not row["converged"] for row in members)
        summary[f"{key}.weights"], summary[f"{key}.rows"] = members[0]["weights"], members[0]["rows"]
    direct = [row["train_shift"] for row in rows if row["method"] == "direct"]
    iterative = [row["train_shift"] for row in rows if row["method"] == ACCELERATED]
    if direct:
        summary["null_space.train_shift"] = max(direct)
    if iterative:
        summary["null_space.train_shift.iterative"] = max(iterative)
    for solver, name in ((ACCELERATED, ""), (PLAIN, ".plain")):
        members = [row for row in rows if row["method"] == solver]
        if members:  # those that stopped at the limit count with it, so that the mean is a lower bound
            summary[f"null_space.epochs_to_1e-2{name}"] = statistics.mean(row["epochs"] for row in members)
            summary[f"null_space.epochs_to_1e-2{name}.stopped"] = sum(not row["converged"] for row in members)
    return summary
