"""The command `bayespass`: one file per subcommand."""

import sys

import typer

from bayespass.cli.compare import compare_command
from bayespass.cli.demo import demo_command
from bayespass.cli.fit import fit_command
from bayespass.cli.inspect import inspect_command
from bayespass.errors import BayespassError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="An honest Bayesian answer from any deep network in one forward pass. "
    "Start with `bayespass demo`; `bayespass COMMAND --help` explains each command.",
)
app.command("demo")(demo_command)
app.command("inspect")(inspect_command)
app.command("fit")(fit_command)
app.command("compare")(compare_command)


def main() -> None:
    """Run the command; mistakes of input end in one line and exit code 1, not in a traceback."""
    try:
        app()
    except (BayespassError, FileNotFoundError) as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        sys.exit(1)
