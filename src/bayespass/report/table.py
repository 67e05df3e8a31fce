"""A comparison as rows of numbers, and as a table for the terminal."""

import math
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from bayespass.evaluate.compare import Comparison, ComparisonRow

TABLE_WIDTH = 164  # columns that the widest table needs where the output is no terminal
STACKED_WIDTH = 128  # the same with every error under its figure
MAIN_HEADINGS = ("predictor", "NLL", "RMSE", "AURC %", "cov@1%", "gap closed %", "KL to MC", "cost")
LABELS = {
    "map": "MAP (deterministic)",
    "streamlined": "streamlined",
    "cvp": "CVP",
    "cvp_uncalibrated": "CVP, uncalibrated",
}


def predictor_label(row: ComparisonRow, comparison: Comparison) -> str:
    """The name a reader sees."""
    if row.predictor == comparison.rows[-1].predictor:
        return f"MC-{comparison.n_reference} (reference)"
    if row.predictor.startswith("mc"):
        return f"MC-{row.predictor[2:]}"
    return LABELS.get(row.predictor, row.predictor)


def comparison_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Every figure of every predictor as plain numbers, for JSON; what does not apply is None."""
    return [
        {
            "predictor": row.predictor,
            "scores": {name: {"value": e.value, "se": e.standard_error} for name, e in row.scores.items()},
            "draw_errors": row.draw_errors,
            "agreement": None if row.agreement is None else {k: _finite(v) for k, v in asdict(row.agreement).items()},
            f"{comparison.gap_metric}_gap_closed": _finite(row.gap_closed),
            f"{comparison.gap_metric}_gap_closed_se": _finite(row.gap_closed_error),
            "cost_ratio": row.cost_ratio,
        }
        for row in comparison.rows
    ]


def table_cells(comparison: Comparison, *, draws: bool = False) -> tuple[list[str], list[list[str]]]:
    """Headings and formatted cells; a figure that does not apply is a dash.

    Args:
        comparison: the numbers.
        draws: add the standard error from the finite number of draws to Monte-Carlo rows, as a second line "(d 0.1)".
    """
    classification = comparison.gap_metric == "aurc"
    scored = (  # name, heading, factor, digits
        [("accuracy", "acc %", 100, 1), ("nll", "NLL", 1, 2), ("ece", "ECE %", 100, 1), ("aurc", "AURC %", 100, 2)]
        + [(f"coverage_at_{risk}", f"cov@{risk}%", 100, 1) for risk in ("0.5", "1", "5")]
        if classification
        else [("rmse", "RMSE", 1, 3), ("nll", "NLL", 1, 3), ("coverage_95", "in 95 % interval", 1, 3)]
    )
    headings = [
        "predictor",
        *(title for _, title, _, _ in scored),
        "gap closed %",
        "KL to MC",
        "var/MC",
        "Spearman",
        "cost",
    ]
    body = []
    for row in comparison.rows:
        cells = [predictor_label(row, comparison)]
        for name, _, factor, digits in scored:
            estimate = row.scores[name]
            cell = _with_error(factor * estimate.value, factor * estimate.standard_error, digits)
            if draws and name in row.draw_errors:
                cell += f"\n(d {factor * row.draw_errors[name]:.{digits}f})"
            cells.append(cell)
        cells.append(_with_error(100 * row.gap_closed, 100 * row.gap_closed_error, 0))
        found = row.agreement
        if found is None:
            cells += ["0", "1", "1"]
        else:
            cells += [
                _with_error(found.kl, found.kl_standard_error, 3),
                _with_error(found.variance_ratio, found.variance_ratio_standard_error, 2),
                _with_error(found.spearman, found.spearman_standard_error, 2),
            ]
        cells.append(f"{row.cost_ratio:.1f}x")
        body.append(cells)
    return headings, body


def comparison_table(comparison: Comparison, title: str, width: int = TABLE_WIDTH) -> Table:
    """The table that the terminal shows.

    Args:
        comparison: the numbers.
        title: above the table.
        width: columns of the terminal; below 164 errors stand under their figures, below 128 only
            the main figures are shown.
    """
    headings, body = table_cells(comparison)
    if width < TABLE_WIDTH:
        body = [[cell.replace("±", "\n±") for cell in cells] for cells in body]
    if width < STACKED_WIDTH:
        kept = [index for index, heading in enumerate(headings) if heading in MAIN_HEADINGS]
        headings, body = [headings[i] for i in kept], [[cells[i] for i in kept] for cells in body]
    table = Table(
        title=title,
        caption=table_caption(comparison),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for heading in headings:
        first = heading == "predictor"
        table.add_column(heading, justify="left" if first else "right", no_wrap=first, overflow="fold")
    for cells in body:
        table.add_row(*cells)
    return table


def table_caption(comparison: Comparison) -> str:
    """What the numbers are, in two sentences."""
    low, high = (100 * bound if comparison.gap_metric == "aurc" else bound for bound in comparison.gap_interval)
    value = 100 * comparison.gap if comparison.gap_metric == "aurc" else comparison.gap
    helps = "averaging helps" if low > 0 else "the interval includes zero: averaging does not measurably help here"
    return (
        f"± is one standard error over {len(comparison.targets)} rows; MC-S rows are means over groups of draws; "
        f"cov@r% is the share answered at r % risk. "
        f"{comparison.gap_metric.upper()} gap of MAP to MC-{comparison.n_reference}: {value:.3f} "
        f"[{low:.3f}, {high:.3f}], {helps}. Cost is relative to the deterministic forward of the same "
        f"{comparison.batch_rows} rows, eager, {comparison.forward_seconds * 1000:.1f} ms."
    )


def _with_error(value: float, error: float, digits: int) -> str:
    if not math.isfinite(value):
        return "–"
    if not math.isfinite(error):
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f}±{error:.{digits}f}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
