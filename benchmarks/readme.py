"""The README's table, made from benchmarks/results/demo.json; `make benchmark-demo` runs it."""

import json
import statistics
from typing import Any

from bayespass.files import write_text
from results import ROOT

START, END = "<!-- demo table: made by benchmarks/readme.py -->", "<!-- end of the demo table -->"
LABELS = {
    "map": "MAP (deterministic)",
    "streamlined": "streamlined, one pass",
    "cvp_uncalibrated": "CVP without calibration, one pass",
    "cvp": "CVP, one pass",
    "faithful": "**faithful (the default), one pass**",
    "mc4": "MC-4",
    "mc16": "MC-16",
    "mc64": "MC-64",
    "mc200": "MC-200 (reference)",
}
TITLES = {"vit": "vision transformer", "cnn": "convolutional network"}


def demo_table(result: dict[str, Any]) -> str:
    """Means over seeds, with their standard deviation for the share of the gap."""
    seeds, machine = result["seeds"], result["machine"]
    lines = []
    for network, title in TITLES.items():
        runs = [run for run in result["table"] if run["network"] == network]
        lines += [
            f"| {title} | AURC gap closed | AURC ×100 | NLL | KL to MC-200 | cost |",
            "|---|---|---|---|---|---|",
        ]
        for predictor, label in LABELS.items():
            rows = [row for run in runs for row in run["predictors"] if row["predictor"] == predictor]
            if not rows:  # recorded before the predictor was there
                continue
            closed = [100 * row["aurc_gap_closed"] for row in rows]
            aurc, nll = (statistics.mean(row["scores"][name]["value"] for row in rows) for name in ("aurc", "nll"))
            kl = [row["agreement"]["kl"] for row in rows if row["agreement"]]
            lines.append(
                f"| {label} | {statistics.mean(closed):.0f} ± {statistics.stdev(closed):.0f} % | {100 * aurc:.2f} "
                f"| {nll:.3f} | {f'{statistics.mean(kl):.3f}' if kl else '0'} "
                f"| {statistics.mean(row['cost_ratio'] for row in rows):.1f}x |"
            )
        lines.append("")
    lines.append(
        f"Means over {len(seeds)} seeds (± standard deviation over seeds), eager, batches of 256 on "
        f"{machine['cores']} CPU cores; cost is relative to the deterministic forward of the same batch. Gap closed is "
        f"the share of the way from MAP to MC-200. `make benchmark-demo` wrote it, from `benchmarks/results/demo.json`."
    )
    return "\n".join(lines)


def with_table(readme: str, table: str) -> str:
    """The README with the table between its two marks."""
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{table}\n\n{END}{after}"


def main() -> None:
    """Rewrite the table in place."""
    result = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text(encoding="utf-8"))
    readme = ROOT / "README.md"
    write_text(readme, with_table(readme.read_text(encoding="utf-8"), demo_table(result)))


if __name__ == "__main__":
    main()
