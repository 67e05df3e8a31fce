"""`bayespass compare`: predictors of one posterior on one data set, in one run."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayespass.cli.models import Model, Weights, build_model
from bayespass.errors import InvalidInput

if TYPE_CHECKING:
    from torch import nn

    from bayespass.likelihood import Likelihood

PosteriorFile = Annotated[Path, typer.Argument(help="Posterior file written by posterior.save(...).")]
Data = Annotated[
    Path,
    typer.Argument(
        help="npz file with the arrays `inputs` (or the arguments of forward by name) and `targets`; with --recipe "
        "also csv, parquet or a folder of images."
    ),
]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="data.json that `bayespass fit` wrote: DATA is read as its data were.")
]


class Rows(StrEnum):
    """Which rows of DATA."""

    ALL = "all"
    VALIDATION = "validation"


RowsOption = Annotated[Rows, typer.Option("--rows", help="validation: only rows that `bayespass fit` held out.")]
Predictors = Annotated[
    str, typer.Option(help="Comma-separated: map, mcS, streamlined, cvp, shared, faithful, or NAME_uncalibrated.")
]
Reference = Annotated[int, typer.Option(min=2, help="Weight samples of the Monte-Carlo reference.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows per batch; costs are measured on one batch.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Also write the numbers to this JSON file.")]
Seed = Annotated[int, typer.Option(help="Seed of draws and resamples.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


def compare_command(
    model: Model,
    posterior: PosteriorFile,
    data: Data,
    weights: Weights = None,
    predictors: Predictors = "map,mc4,mc16,mc64,streamlined,cvp,faithful",
    reference: Reference = 200,
    batch_size: BatchSize = 256,
    output: Output = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    recipe: RecipeFile = None,
    rows: RowsOption = Rows.ALL,
) -> None:
    """Compare predictors of one posterior: quality, faithfulness to Monte Carlo, and cost.

    Variance scales that were saved with the posterior are used where they belong.
    """
    from rich.console import Console

    from bayespass.calibrate.variance_scale import load_scales
    from bayespass.evaluate.compare import compare
    from bayespass.files import write_json
    from bayespass.posterior.base import Posterior
    from bayespass.report.table import TABLE_WIDTH, comparison_rows, comparison_table

    network = build_model(model, weights)
    distribution = Posterior.load(posterior, network)
    saved = load_scales(posterior)
    scales = {} if saved is None else {saved.approximation: saved}
    names = tuple(name.strip() for name in predictors.split(",") if name.strip())
    kind = distribution.info.likelihood
    batches = _batches(data, recipe, rows, network, Path(model) if Path(model).is_dir() else None, kind, batch_size)
    result = compare(network, distribution, batches, names, scales, reference, seed=seed, progress=not quiet)
    console = Console(width=None if Console().is_terminal else TABLE_WIDTH)
    console.print(comparison_table(result, f"{model} on {data}", console.width))
    if output is not None:
        write_json(output, {"rows": comparison_rows(result), "gap": result.gap, "gap_interval": result.gap_interval})


def _batches(
    data: Path,
    recipe: Path | None,
    rows: Rows,
    network: "nn.Module",
    folder: Path | None,
    likelihood: "Likelihood",
    batch_size: int,
) -> list[tuple[Any, Any]]:
    """The rows of DATA as batches.

    Raises:
        InvalidInput: a table, images or --rows validation without --recipe.
    """
    from bayespass.cli.data import TABLES, Recipe, held_out_rows, prepared, read_data

    if recipe is None and (rows == Rows.VALIDATION or data.is_dir() or data.suffix.lower() in TABLES):
        what = "--rows validation" if rows == Rows.VALIDATION else f"reading {data}"
        msg = f"{what} needs --recipe, the data.json that `bayespass fit` wrote"
        raise InvalidInput(msg)
    how = Recipe(likelihood) if recipe is None else Recipe.load(recipe)
    read, how = read_data(data, how, network, folder)
    if rows == Rows.VALIDATION:
        read = held_out_rows(data, read, how)
    return prepared(read, how, network).batches(batch_size)
