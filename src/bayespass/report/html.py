"""One self-contained page: tables and inline figures, no network, no scripts."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bayespass.evaluate.compare import Comparison
from bayespass.files import write_text
from bayespass.report.table import table_caption, table_cells

DRAWS_NOTE = "(d) is the standard error from the finite number of draws."


@dataclass(frozen=True)
class Section:
    """One part of the page.

    Args:
        title: its heading.
        text: a paragraph under it.
        comparison: shown as a table; None for none.
        figures: (caption, inline SVG) pairs.
    """

    title: str
    text: str
    comparison: Comparison | None
    figures: Sequence[tuple[str, str]]


def write_report(path: str | os.PathLike[str], title: str, introduction: str, sections: Sequence[Section]) -> None:
    """Write the page, in one step.

    Args:
        path: the HTML file.
        title: of the page.
        introduction: first paragraph.
        sections: in order.
    """
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("bayespass.report"), autoescape=True, trim_blocks=True)
    shown = []
    for section in sections:
        headings, body = table_cells(section.comparison, draws=True) if section.comparison else ([], [])
        caption = f"{table_caption(section.comparison)} {DRAWS_NOTE}" if section.comparison else ""
        shown.append({"section": section, "headings": headings, "body": body, "caption": caption})
    page = environment.get_template("report.html").render(title=title, introduction=introduction, sections=shown)
    write_text(Path(path), page)
