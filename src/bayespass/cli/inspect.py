"""`bayespass inspect`: which rule answers where, what is missing, and what a single pass will cost."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from bayespass.cli.models import Model, Weights, example_inputs, open_model

Inputs = Annotated[
    Path | None,
    typer.Option(help="npz file: arrays named after the arguments of forward, or the single array `inputs`."),
]
PosteriorFile = Annotated[
    Path | None,
    typer.Option("--posterior", help="Posterior file; without one every parameter that is trained counts as random."),
]
ApproximationName = Annotated[str, typer.Option(help="faithful, cvp, shared or streamlined.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
ShowAll = Annotated[bool, typer.Option("--all", help="Every module in a line of its own, repeated blocks too.")]


def inspect_command(
    model: Model,
    inputs: Inputs = None,
    posterior: PosteriorFile = None,
    approximation: ApproximationName = "faithful",
    weights: Weights = None,
    json: AsJson = False,
    show_all: ShowAll = False,
) -> None:
    """Trace a model once: which rule answers for which module, what is missing, and the predicted cost.

    Exit code 0: every operation has a rule; 2: something is missing or refused; 1: a mistake of input.

    Without --inputs, a model folder is traced on made-up inputs, module:factory on the `example_inputs` of its module.
    """
    from dataclasses import replace

    from bayespass.inspect import inspect_model
    from bayespass.posterior.base import Posterior

    network, notes = open_model(model, weights)
    distribution = None if posterior is None else Posterior.load(posterior, network)
    coverage = inspect_model(network, example_inputs(model, network, inputs), distribution, approximation)
    coverage = replace(coverage, notes=(*notes, *coverage.notes))
    if json:
        from json import dumps

        typer.echo(dumps({"source": model, **coverage.to_dict()}, indent=1, allow_nan=False))
    else:
        from rich.console import Console

        from bayespass.report.table import TABLE_WIDTH, coverage_summary, coverage_table

        console = Console(width=None if Console().is_terminal else TABLE_WIDTH)
        console.print(coverage_table(coverage, console.width, every=show_all))
        console.print(coverage_summary(coverage), soft_wrap=False, highlight=False)
    if coverage.missing:
        sys.exit(2)
