"""The demo's comparison over six seeds: MAP, Monte Carlo, streamlined, CVP and the default on the same posteriors.

    python benchmarks/demo.py

writes benchmarks/results/demo.json and docs/images/demo.png (the picture in the README, seed 0).
The data are scikit-learn's digits; nothing is downloaded.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from bayespass.demo.run import NETWORKS, PREDICTORS, picture, run_demo, run_network
from bayespass.report.figure import save_png
from bayespass.report.table import TABLE_WIDTH, comparison_rows, comparison_table
from readme import shares_closed
from results import ROOT, write_result

SUMMARISED = ("streamlined", "cvp_uncalibrated", "cvp", "faithful", "mc4", "mc16", "mc64")


def main() -> None:
    """Run every network on every seed and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5])
    parser.add_argument("--reference", type=int, default=200, help="draws of the Monte-Carlo reference")
    arguments = parser.parse_args()
    console = Console(width=TABLE_WIDTH)
    table, pictured = [], None
    for seed in arguments.seeds:
        for key in NETWORKS:
            result = run_network(key, seed, arguments.reference, progress=sys.stderr.isatty())
            comparison = result.comparison
            console.print(comparison_table(comparison, f"{result.title}, seed {seed}"))
            table.append(
                {
                    "network": key,
                    "seed": seed,
                    "gap": comparison.gap,
                    "gap_interval": comparison.gap_interval,
                    "scales": dict(result.scales),
                    "predictors": comparison_rows(comparison),
                }
            )
            pictured = pictured or result
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run_demo(Path(folder), arguments.seeds[0], arguments.reference, progress=False)
    summary = summarise(table) | {"demo.seconds": time.perf_counter() - start}
    write_result("demo", arguments.seeds, table, summary)
    if pictured is not None:
        save_png(picture(pictured), ROOT / "docs" / "images" / "demo.png")
    for name, value in summary.items():
        console.print(f"{name:40s} {value:.3f}")


def summarise(table: list[dict]) -> dict[str, float]:
    """Over the seeds of a network: every predictor's share of the gap, where there is one, its cost and its KL."""
    summary: dict[str, float] = {}
    for key in NETWORKS:
        runs = [run for run in table if run["network"] == key]
        shares = shares_closed(runs)
        summary[f"{key}.gap"] = statistics.mean(run["gap"] for run in runs)
        for predictor in SUMMARISED:
            assert predictor in PREDICTORS
            rows = [row for run in runs for row in run["predictors"] if row["predictor"] == predictor]
            if (share := shares[predictor]) is not None:
                summary[f"{key}.{predictor}.aurc_gap_closed"], summary[f"{key}.{predictor}.aurc_gap_closed_se"] = share
            summary[f"{key}.{predictor}.cost_ratio"] = statistics.mean(row["cost_ratio"] for row in rows)
            summary[f"{key}.{predictor}.kl_to_mc"] = statistics.mean(row["agreement"]["kl"] for row in rows)
    return summary


if __name__ == "__main__":
    main()
