"""The tables and pictures of docs/fidelity.md, made from benchmarks/results/fidelity.json alone.

python benchmarks/fidelity_pages.py [--result FILE] [--docs FOLDER]
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bayespass.files import replacing, write_text
from bayespass.report.figure import COLOURS, new_figure
from results import ROOT, between_marks

START = "<!-- fidelity tables: made by benchmarks/fidelity_pages.py -->"
END = "<!-- end of the fidelity tables -->"
RESULT = ROOT / "benchmarks" / "results" / "fidelity.json"
TITLES = {
    "digits_vit": "Digits, vision transformer",
    "digits_cnn": "Digits, convolutional network",
    "california": "California housing, MLP (NLL in place of AURC)",
    "ett": "ETTh1, patch transformer (NLL in place of AURC)",
    "fashion_vit": "Fashion-MNIST, vision transformer",
    "fashion_cnn": "Fashion-MNIST, convolutional network with global pooling",
    "cifar_resnet20": "CIFAR-10, pretrained ResNet-20",
    "sst2_minilm": "SST-2, MiniLM",
    "cifar_vit": "CIFAR-10, pretrained vision transformer",
}
NAMES = {
    "map": "MAP",
    "map_temperature": "MAP with a temperature",
    "last_layer_laplace": "last-layer Laplace",
    "streamlined": "streamlined",
    "cvp_uncalibrated": "CVP, not calibrated",
    "cvp": "CVP",
    "shared_uncalibrated": "shared, not calibrated",
    "shared": "shared",
    "faithful_uncalibrated": "faithful, not calibrated",
    "faithful_sequential": "faithful, fit_scales",
    "faithful_few_inputs": "faithful, distilled on 50 inputs",
    "faithful": "**faithful, distilled (default)**",
    "correlated": "correlated pass",
    "cascade": "cascade, MC-64 for a tenth",
    "suq": "SUQ's package",
    "suq_shipped_fit": "SUQ, scale fitted as shipped",
    "suq_corrected_fit": "SUQ, scale fitted with right labels",
    "mc4": "MC-4",
    "mc8": "MC-8",
    "mc16": "MC-16",
    "mc64": "MC-64",
    "mc": "MC reference",
    "moments_link": "ceiling: exact MC mean and variance",
    "covariance_link": "ceiling: exact MC mean and covariance",
}
Row = dict[str, Any]
Setting = tuple[str, str, str, float]  # task, test set, kind, scale


def settings_of(table: Iterable[Row]) -> dict[Setting, dict[str, list[Row]]]:
    """Rows by setting and predictor, seeds together; a predictor that lacks seeds is left out."""
    found: dict[Setting, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in table:
        found[row["task"], row["test"], row["kind"], row["scale"]][row["predictor"]].append(row)
    return {
        setting: {name: rows for name, rows in by_predictor.items() if len(rows) == len(by_predictor["map"])}
        for setting, by_predictor in found.items()
    }


def key_of(setting: Setting) -> str:
    """Its name in the summary."""
    task, test, kind, scale = setting
    return f"{task}{'' if test == 'test' else f'+{test}'}/{kind}/x{scale:g}"


def page(result: dict[str, Any]) -> str:
    """The tables, in Markdown."""
    settings, summary = settings_of(result["table"]), result["summary"]
    parts = [
        "## Measured",
        f"Made by `benchmarks/fidelity_pages.py` from `benchmarks/results/fidelity.json`; protocols stand in the "
        f"headers of `benchmarks/fidelity*.py`. {len(result['seeds'])} seeds.",
        not_run(settings),
        verdict(summary),
        overview(settings, summary),
        helps_table(settings, summary),
        *(task_section(task, settings, summary) for task in TITLES),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def not_run(settings: dict[Setting, dict[str, list[Row]]]) -> str:
    """The tasks that the result lacks."""
    missing = [title for task, title in TITLES.items() if task not in {setting[0] for setting in settings}]
    return f"Not run yet: {'; '.join(missing)}." if missing else ""


def verdict(summary: dict[str, float]) -> str:
    """The leading figures in words."""
    if "median_gap_closed" not in summary:
        return ""
    n, helped = int(summary["settings"]), int(summary["settings_where_mc_helps"])
    return (
        f"Monte Carlo beats the mean network by more than chance in {helped} of {n} settings (task, posterior, scale). "
        f"There the default closes a median of {summary['median_gap_closed']:.0%} of the gap, at worst "
        f"{summary['worst_gap_closed']:.0%}; the exact Monte-Carlo moments through the same link close "
        f"{summary['ceiling_median_gap_closed']:.0%} and {summary['ceiling_worst_gap_closed']:.0%}. It is worth a "
        f"median of {summary['equivalent_mc_samples_median']:.0f} samples in KL. It is significantly worse than MC-16 "
        f"in {int(summary['significantly_worse_than_mc16'])} settings, and than MAP in "
        f"{int(summary['significantly_worse_than_map'])}."
    )


def known(names: Iterable[str]) -> list[str]:
    """Predictors in the order of `NAMES`, then those it does not have."""
    present = set(names)
    return [name for name in NAMES if name in present] + sorted(present - set(NAMES))


def overview(settings: dict[Setting, dict[str, list[Row]]], summary: dict[str, float]) -> str:
    """One line per predictor over all settings without shift."""
    plain = [setting for setting in settings if setting[1] == "test"]
    lines = []
    for name in known(name for setting in plain for name in settings[setting]):
        closed = [summary.get(f"{key_of(setting)}/{name}/gap_closed") for setting in plain]
        closed = [value for value in closed if value is not None]
        rows = [row for setting in plain for row in settings[setting].get(name, ())]
        samples = [row["equivalent_samples"][0] for row in rows if row["equivalent_samples"]]
        ranks, same = (
            [row[figure][0] for row in rows if row.get(figure)] for figure in ("confidence_spearman", "same_answer")
        )
        lines.append(
            [
                NAMES.get(name, name),
                f"{statistics.median(closed):.0%}" if closed else "",
                f"{min(closed):.0%}" if closed else "",
                str(len({row["task"] + row["kind"] + str(row["scale"]) for row in rows})),
                f"{statistics.median(samples):.0f}" if samples else "",
                f"{statistics.median(ranks):.3f}" if ranks else "",
                f"{statistics.median(same):.1%}" if same else "",
            ]
        )
    head = ["predictor", "gap closed, median", "worst", "settings", "equivalent MC samples, median"]
    head += ["rank of confidence, median", "same answer, median"]
    return "### All settings without shift\n\n" + table(head, lines)


def helps_table(settings: dict[Setting, dict[str, list[Row]]], summary: dict[str, float]) -> str:
    """Where Monte Carlo helps: the gap with its interval."""
    lines = []
    for setting in settings:
        task, test, kind, scale = setting
        key = key_of(setting)
        factor = 1 if settings[setting]["map"][0]["gap_metric"] == "nll" else 100
        gap, low, high = (factor * summary[f"{key}/{end}"] for end in ("gap", "gap_low", "gap_high"))
        helps = "yes" if summary[f"{key}/mc_helps"] else "no"
        lines.append([task, test, kind, f"{scale:g}", f"{gap:.3f} ({low:.3f} to {high:.3f})", helps])
    head = ["task", "rows", "posterior", "scale", "gap, AURC ×100 or NLL", "MC helps"]
    return "### Where Monte Carlo helps\n\n" + table(head, lines)


def task_section(task: str, settings: dict[Setting, dict[str, list[Row]]], summary: dict[str, float]) -> str:
    """One table per setting of a task."""
    parts = []
    for setting, by_predictor in settings.items():
        if setting[0] != task:
            continue
        lines = [line(by_predictor[name], summary, f"{key_of(setting)}/{name}") for name in known(by_predictor)]
        risk = "AURC ×100" if by_predictor["map"][0]["gap_metric"] == "aurc" else "MSE"
        head = ["predictor", "gap closed", risk, "coverage at 0.5 %", "at 1 %", "NLL", "KL to MC ×1000", "worth MC-S"]
        head += ["rank of confidence", "rank of variance"]
        rows = by_predictor["map"][0]["rows"]
        _, test, kind, scale = setting
        parts.append(f"**{kind}, variance ×{scale:g}, {test}** ({rows:,} rows)\n\n" + table(head, lines))
    return f"### {TITLES[task]}\n\n" + "\n\n".join(parts) if parts else ""


def line(rows: list[Row], summary: dict[str, float], key: str) -> list[str]:
    """One predictor's figures, means over seeds."""
    closed = summary.get(f"{key}/gap_closed")
    risk = shown(rows, "aurc", 100, 3) or shown(rows, "mse", 1, 4)
    name = str(rows[0]["predictor"])
    samples = [row["equivalent_samples"][0] for row in rows if row["equivalent_samples"]]
    capped = "≥ " if any(row["capped"] for row in rows) else ""
    return [
        NAMES.get(name, name),
        ""
        if closed is None
        else f"{closed:.0%} ({summary[key + '/gap_closed_low']:.0%} to {summary[key + '/gap_closed_high']:.0%})",
        risk,
        shown(rows, "coverage_at_0.5", 100, 1),
        shown(rows, "coverage_at_1", 100, 1),
        shown(rows, "nll", 1, 4),
        shown(rows, "kl_to_mc", 1000, 2),
        f"{capped}{statistics.median(samples):.0f}" if samples else "",
        shown(rows, "confidence_spearman", 1, 3),
        shown(rows, "spearman", 1, 2),
    ]


def shown(rows: list[Row], figure: str, factor: float, digits: int) -> str:
    """Mean over seeds, or nothing."""
    values = [row[figure][0] for row in rows if row.get(figure) and row[figure][0] is not None]
    return f"{round(factor * statistics.mean(values), digits) + 0.0:.{digits}f}" if values else ""  # no "-0.0"


def table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table without empty columns."""
    kept = [k for k in range(len(head)) if k == 0 or any(each[k] for each in lines)]
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row[k] for k in kept)} |" for row in rows)


def draw_gap_closed(result: dict[str, Any], path: Path) -> None:
    """A dot for every setting where Monte Carlo helps: the share of the gap closed, with the default's interval."""
    summary, settings = result["summary"], settings_of(result["table"])
    plain = [key_of(setting) for setting in settings if setting[1] == "test"]
    keys = [key for key in plain if summary[f"{key}/mc_helps"]]
    names = [name for name in ("map_temperature", "cvp", "faithful", "mc16", "mc64", "moments_link") if keys]
    figure, (axis,) = new_figure(9, 0.9 + 0.28 * max(1, len(keys)))
    for place, key in enumerate(keys):
        for colour, name in zip(COLOURS, names, strict=True):
            value = summary.get(f"{key}/{name}/gap_closed")
            if value is not None:
                label = NAMES.get(name, name).strip("*") if place == 0 else None
                axis.plot(min(max(value, -0.5), 1.5), place, "o", color=colour, markersize=5, label=label)
                if name == "faithful":
                    ends = [summary[f"{key}/{name}/gap_closed_{end}"] for end in ("low", "high")]
                    axis.plot([min(max(end, -0.55), 1.55) for end in ends], [place, place], color=colour, zorder=0.5)
    axis.axvline(0, color="#cccccc", linewidth=1, zorder=0)
    axis.axvline(1, color="#cccccc", linewidth=1, zorder=0)
    axis.set(xlim=(-0.55, 1.55), xlabel="share of the gap from MAP to Monte Carlo that is closed")
    axis.set_yticks(range(len(keys)), keys, fontsize=8)
    axis.invert_yaxis()
    if keys:
        axis.legend(frameon=False, fontsize=8, ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    with replacing(path) as whole:
        figure.savefig(whole, format="png", dpi=120)


def with_tables(text: str, tables: str) -> str:
    """The page with these tables between its marks."""
    return between_marks(text, START, END, tables)


def main() -> None:
    """Put the tables between their marks and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    result = json.loads(arguments.result.read_text(encoding="utf-8"))
    path = arguments.docs / "fidelity.md"
    write_text(path, with_tables(path.read_text(encoding="utf-8"), page(result)))
    draw_gap_closed(result, arguments.docs / "images" / "fidelity_gap_closed.png")


if __name__ == "__main__":
    main()
