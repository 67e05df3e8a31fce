"""Progress bars for long work, by rich."""

import sys
from collections.abc import Iterable
from typing import TypeVar

Item = TypeVar("Item")


def track(items: Iterable[Item], description: str, *, show: bool, total: float | None = None) -> Iterable[Item]:
    """The items, with a progress bar on standard error, if that is a terminal, while they are consumed."""
    if not show or not sys.stderr.isatty():
        return items
    from rich.console import Console
    from rich.progress import track as rich_track

    return rich_track(items, description=description, total=total, console=Console(file=sys.stderr), transient=True)
