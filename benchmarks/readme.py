"""The README's table, made from benchmarks/results/demo.json; `make benchmark-demo` runs it."""

import json
import math
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


def shares_closed(runs: list[dict[str, Any]]) -> dict[str, tuple[float, float] | None]:
    """The share of the way from MAP to Monte Carlo, of mean AURCs over seeds, by predictor.

    Args:
        runs: of one network, one per seed.

    Returns:
        the share and its jackknife standard error over seeds; None where Monte Carlo's mean gain is below two of
        its standard errors, so that there is no gap to close.
    """
    found = [{row["predictor"]: row["scores"]["aurc"]["value"] for row in run["predictors"]} for run in runs]
    reference = runs[0]["predictors"][-1]["predictor"]
    gains = {name: [aurc["map"] - aurc[name] for aurc in found] for name in found[0]}
    gaps, count = gains[reference], len(runs)
    if count < 2 or statistics.mean(gaps) < 2 * statistics.stdev(gaps) / math.sqrt(count):
        return dict.fromkeys(gains)

    def share(name: str, left_out: int | None = None) -> float:
        kept = [seed for seed in range(count) if seed != left_out]
        return sum(gains[name][seed] for seed in kept) / sum(gaps[seed] for seed in kept)

    def error(name: str) -> float:
        return math.sqrt(count - 1) * statistics.pstdev(share(name, seed) for seed in range(count))

    return {name: (share(name), error(name)) for name in gains}


def demo_table(result: dict[str, Any]) -> str:
    """Means over seeds, with their standard error for the share of the gap."""
    seeds, machine = result["seeds"], result["machine"]
    lines = []
    for network, title in TITLES.items():
        runs = [run for run in result["table"] if run["network"] == network]
        lines += [
            f"| {title} | AURC gap closed | AURC ×100 | NLL | KL to MC-200 | cost |",
            "|---|---|---|---|---|---|",
        ]
        shares = shares_closed(runs)
        for predictor, label in LABELS.items():
            rows = [row for run in runs for row in run["predictors"] if row["predictor"] == predictor]
            if not rows:  # recorded before the predictor was there
                continue
            aurc, nll = (statistics.mean(row["scores"][name]["value"] for row in rows) for name in ("aurc", "nll"))
            kl = [row["agreement"]["kl"] for row in rows if row["agreement"]]
            share = shares[predictor]
            closed = "–" if share is None else f"{100 * share[0]:.0f} ± {100 * share[1]:.0f} %"
            lines.append(
                f"| {label} | {closed} | {100 * aurc:.2f} "
                f"| {nll:.3f} | {f'{statistics.mean(kl):.3f}' if kl else '0'} "
                f"| {statistics.mean(row['cost_ratio'] for row in rows):.1f}x |"
            )
        lines.append("")
    lines.append(
        f"Means over {len(seeds)} seeds (± standard error over seeds), eager, batches of 256 on "
        f"{machine['cores']} CPU cores; cost is relative to the deterministic forward of the same batch. Gap closed is "
        f"the share of the way from MAP to MC-200, – where averaging over draws does not lower the AURC. "
        f"`make benchmark-demo` wrote it, from `benchmarks/results/demo.json`."
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
