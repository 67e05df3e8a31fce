"""Progress bars for long work, by rich."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


def track(items: Iterable[Item], description: str, *, show: bool, total: float | None = None) -> Iterable[Item]:
    """The items, with a progress bar on standard error, if that is a terminal, while they are consumed."""
    if not show or not sys.stderr.isatty():
        return items
    from rich.console import Console
    from rich.progress import track as rich_track

    return rich_track(items, description=description, total=total, console=Console(file=sys.stderr), transient=True)


@contextmanager
def training_bar(
    description: str, *, show: bool, total: int | None, done: int = 0
) -> Iterator[Callable[[float], None]]:
    """A bar of steps with the running loss, on standard error if that is a terminal.

    Args:
        description: shown before the bar.
        show: no bar at all where false.
        total: number of steps, if it is known.
        done: steps that an earlier run did.

    Yields:
        a function to call with the loss after every step.
    """
    if not show or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(file=sys.stderr), transient=True) as bar:
        task, average = bar.add_task(description, total=total, completed=done, loss="..."), None

        def advance(loss: float) -> None:
            nonlocal average
            average = loss if average is None else average + 0.05 * (loss - average)
            bar.update(task, advance=1, loss=f"{average:.4g}")

        yield advance
