"""`bayespass demo`: the whole job on real images, in under three minutes on two cores."""

from pathlib import Path
from typing import Annotated

import typer

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the report, the figures and the posteriors.")]
Seed = Annotated[int, typer.Option(help="Seed of the split, the weights and all draws.")]
Reference = Annotated[int, typer.Option(min=64, help="Weight samples of the Monte-Carlo reference.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


def demo_command(
    output: Output = Path("output/demo"), seed: Seed = 0, reference: Reference = 200, quiet: Quiet = False
) -> None:
    """Train two small networks on handwritten digits and compare one pass with Monte Carlo.

    Prints a table per network and writes report.html, a page that needs no network.
    """
    from rich.console import Console

    from bayespass.demo.run import run_demo
    from bayespass.report.table import TABLE_WIDTH, comparison_table

    results, seconds = run_demo(output, seed, reference, progress=not quiet)
    console = Console(width=None if Console().is_terminal else TABLE_WIDTH)
    for result in results:
        title = f"{result.title}, {len(result.test.labels)} test digits"
        console.print(comparison_table(result.comparison, title, console.width))
        console.print()
    console.print(f"{seconds:.0f} s; the report is {output / 'report.html'}", soft_wrap=True)
