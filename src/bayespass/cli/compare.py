"""`bayespass compare`: predictors of one posterior on one data set, in one run."""

from pathlib import Path
from typing import Annotated, Any

import typer

from bayespass.cli.models import Model, Weights, build_model
from bayespass.errors import InvalidInput

PosteriorFile = Annotated[Path, typer.Argument(help="Posterior file written by posterior.save(...).")]
Data = Annotated[Path, typer.Argument(help="npz file with the arrays `inputs` and `targets`.")]
Predictors = Annotated[
    str, typer.Option(help="Comma-separated: map, mcS, streamlined, cvp, shared, or NAME_uncalibrated.")
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
    predictors: Predictors = "map,mc4,mc16,mc64,streamlined,cvp",
    reference: Reference = 200,
    batch_size: BatchSize = 256,
    output: Output = None,
    seed: Seed = 0,
    quiet: Quiet = False,
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
    result = compare(
        network, distribution, read_npz(data, batch_size), names, scales, reference, seed=seed, progress=not quiet
    )
    console = Console(width=None if Console().is_terminal else TABLE_WIDTH)
    console.print(comparison_table(result, f"{model} on {data}", console.width))
    if output is not None:
        write_json(output, {"rows": comparison_rows(result), "gap": result.gap, "gap_interval": result.gap_interval})


def read_npz(path: Path, batch_size: int) -> list[tuple[Any, Any]]:
    """Batches of the arrays `inputs` and `targets`; nothing in the file is unpickled.

    Raises:
        FileNotFoundError: there is no such file.
        InvalidInput: it is no npz file, or an array is missing, empty or of another length.
    """
    import zipfile

    import numpy as np
    import torch

    if not path.is_file():
        msg = f"no data file at {path}"
        raise FileNotFoundError(msg)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            inputs, targets = torch.from_numpy(arrays["inputs"]), torch.from_numpy(arrays["targets"])
    except (KeyError, ValueError, TypeError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        msg = f"{path} must be an npz file with the numeric arrays 'inputs' and 'targets' ({error})"
        raise InvalidInput(msg) from error
    if len(inputs) == 0 or len(inputs) != len(targets):
        msg = f"{path}: 'inputs' and 'targets' must be equally long and not empty; got {len(inputs)} and {len(targets)}"
        raise InvalidInput(msg)
    return list(zip(inputs.split(batch_size), targets.split(batch_size), strict=True))
