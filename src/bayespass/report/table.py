"""Tables for the terminal: a comparison of predictors, and what `inspect` found in a model."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from bayespass.evaluate.compare import Comparison, ComparisonRow
from bayespass.inspect import Coverage, OperationRow

TABLE_WIDTH = 164  # columns that the widest table needs where the output is no terminal
STACKED_WIDTH = 128  # the same with every error under its figure
COVERAGE_WIDTH = 110  # columns from which the coverage table names classes
STATUS_STYLES = {"exact": "green", "approximate": "yellow", "refused": "bold red", "missing": "bold red"}  # best first
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
    doubt = "its interval is not above zero: averaging does not measurably help here, and no share of a gap is told"
    helps = "averaging helps" if comparison.averaging_helps else doubt
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


def coverage_table(coverage: Coverage, width: int = TABLE_WIDTH, *, every: bool = False) -> Table:
    """One line per module: what it calls, the worst status among it, and its random parameters.

    Modules that differ only in the numbers of their path share a line, `layers.{0-11}`.

    Args:
        coverage: what was found.
        width: columns of the terminal; below 110 classes and error bounds are left out.
        every: a line for every module.
    """
    wide = width >= COVERAGE_WIDTH
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("module", overflow="fold")
    table.add_column("", justify="right", no_wrap=True)
    if wide:
        table.add_column("class", overflow="fold")
    table.add_column("operations" + (" (error of mean, variance)" if wide else ""), overflow="fold")
    table.add_column("status", no_wrap=True)
    table.add_column("random", justify="right", no_wrap=True)
    by_path: dict[str, list[OperationRow]] = {}
    for row in coverage.rows:
        by_path.setdefault(row.path, []).append(row)
    merged: dict[Any, list[str]] = {}
    for path, rows in by_path.items():
        signature = tuple((row.class_name, row.operation, row.calls, row.status) for row in rows)
        merged.setdefault(path if every else (_pattern(path), signature), []).append(path)
    sizes = {module.path: (module.random, module.total) for module in coverage.modules}
    blocks: dict[str, list[tuple[str, list[str]]]] = {}  # by repeated prefix; other lines alone under their own name
    for paths in merged.values():
        name = merged_path(paths)
        prefix, rest = _split_name(name)
        blocks.setdefault(prefix or name, []).append((rest, paths))
    limit = 29 if wide else 24
    for prefix, members in blocks.items():
        headed = len(members) > 1
        if headed:
            table.add_row(Text(_broken(prefix, limit), style="bold"))
        for rest, paths in members:
            rows = by_path[paths[0]]
            name = f"  {rest or '(itself)'}" if headed else merged_path(paths) or "(model)"
            worst = max((row.status for row in rows), key=list(STATUS_STYLES).index)
            starred = "*" if any(row.drops for row in rows) else ""
            cells: list[Any] = [Text(_broken(name, limit)), f"x{len(paths)}" if len(paths) > 1 else ""]
            cells += [rows[0].class_name] if wide else []
            cells += [_operations(rows, wide), Text(worst + starred, style=STATUS_STYLES[worst])]
            table.add_row(*cells, _share(*(sum(sizes.get(p, (0, 0))[i] for p in paths) for i in (0, 1))))
    return table


def coverage_summary(coverage: Coverage) -> Text:
    """The lines under the table: totals, cost, what is left out by design, and what is missing where."""
    counts, cost = coverage.counts, coverage.cost
    share = coverage.parameters_random / max(coverage.parameters_total, 1)
    lines = [
        f"{coverage.model}, approximation {coverage.approximation}, traced once on {'; '.join(coverage.inputs)}",
        f"calls: {', '.join(f'{number} {status}' for status, number in counts.items())} "
        "(exact: for independent Gaussian entries)",
        f"parameters: {coverage.parameters_random:,} of {coverage.parameters_total:,} random ({100 * share:.0f} %)",
        f"predicted cost: {cost.predicted_ratio:.1f}x the plain forward of these inputs"
        f"{', or more once nothing is missing' if coverage.missing else ''} "
        f"(arithmetic {cost.arithmetic_ratio:.1f}x, memory traffic {cost.traffic_ratio:.1f}x)",
    ]
    if coverage.unused:
        more = f" and {len(coverage.unused) - 3} more" if len(coverage.unused) > 3 else ""
        lines.append(f"random but never read: {', '.join(coverage.unused[:3])}{more}")
    if any(row.drops for row in coverage.rows):
        lines.append(f"* {coverage.approximation} leaves out: {'; '.join(coverage.drops)}")
    lines += [f"note: {note}" for note in coverage.notes]
    text = Text("\n".join(lines))
    troubles: dict[Any, list[OperationRow]] = {}
    for row in coverage.missing:
        key = (row.status, row.operation, row.location, row.class_name, row.reason)
        troubles.setdefault(key, []).append(row)
    for (status, operation, location, class_name, reason), rows in troubles.items():
        text.append(f"\n{status}: {operation}", style=STATUS_STYLES[status])
        where = merged_path([row.path for row in rows]) or "the model"
        text.append(f" in {where} ({class_name}), {location.rpartition('site-packages/')[2]}\n  {reason}")
    if troubles:
        text.append(
            "\nRegister a rule with @bayespass.rule(operation), take a block whole with @bayespass.module_rule(Class), "
            "or leave the parameters before it out: posterior.subset(...)"
        )
    return text


def merged_path(paths: list[str]) -> str:
    """One name for paths that differ only in numbers: `layers.{0-11}.norm`; several patterns are joined by commas."""
    patterns: dict[Any, list[list[str]]] = {}
    for path in paths:
        patterns.setdefault(_pattern(path), []).append(path.split("."))
    return ", ".join(".".join(_numbers(parts) for parts in zip(*alike, strict=True)) for alike in patterns.values())


def _pattern(path: str) -> tuple[str | None, ...]:
    return tuple(None if part.isdigit() else part for part in path.split("."))


def _numbers(parts: Iterable[str]) -> str:
    found = sorted(set(parts), key=lambda part: (len(part), part))
    if len(found) == 1:
        return found[0]
    values = [int(part) for part in found]
    if len(values) > 2 and values == list(range(values[0], values[-1] + 1)):
        return f"{{{values[0]}-{values[-1]}}}"
    return "{" + ",".join(found if len(found) < 5 else [*found[:2], "..", found[-1]]) + "}"


def _split_name(name: str) -> tuple[str, str]:
    """The name up to its last repeated part, and the rest."""
    prefix, brace, rest = name.rpartition("}")
    return prefix + brace, rest.removeprefix(".")


def _broken(name: str, limit: int) -> str:
    """A long path in several lines, broken at its dots."""
    if len(name) <= limit or "." not in name[:limit]:
        return name
    cut = name[:limit].rindex(".") + 1
    return name[:cut] + "\n    " + _broken(name[cut:], limit - 4)


def _operations(rows: list[OperationRow], bounds: bool) -> Text:
    """Short names, worst first, each in the colour of its status."""
    parts: dict[str, str] = {}
    calls: Counter[str] = Counter()
    for row in sorted(rows, key=lambda row: -list(STATUS_STYLES).index(row.status)):
        name = row.operation.rpartition(".")[2].strip("_").replace("scaled_dot_product_attention", "sdpa")
        if row.module_rule:
            name += " (module rule)"
        elif bounds and row.status == "approximate" and row.mean_error is not None:
            name += f" ({row.mean_error:g}, {row.variance_error:g})"
        parts.setdefault(name, row.status)
        calls[name] += row.calls
    text = Text()
    for name, status in parts.items():
        text.append(", " if text else "")
        text.append(name + (f" x{calls[name]}" if calls[name] > 1 else ""), style=STATUS_STYLES[status])
    return text


def _share(random: int, total: int) -> str:
    if total == 0:
        return ""
    return _short(total) if random == total else f"{_short(random)} of {_short(total)}"


def _short(number: int) -> str:
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return str(number)
