"""The summary of the fidelity benchmark: seeds pooled, settings gathered.

A setting is a task, a kind of posterior, a scale and a test set, `TASK/KIND/xSCALE`, with `TASK+shift` for a
shifted set. Its gap is the mean over seeds, its interval that of the seed mean over the resamples of test rows,
which the seeds share; Monte Carlo helps where it lies above zero. `gap_closed` of a predictor is the ratio of seed
means, and is left out where Monte Carlo does not help.
"""

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from fidelity_measure import interval
from fidelity_predictors import DEFAULT

Row = dict[str, Any]
Pooled = dict[str, dict[str, Any]]
FAITHFUL = ("spearman", "confidence_spearman", "same_answer", "variance_ratio", "mean_error")
AVERAGED = ("gap_closed", "coverage_at_0.5", "coverage_at_1", "kl_to_mc", "equivalent_samples")


def setting_of(row: Row) -> str:
    """Its name in the summary."""
    shifted = "" if row["test"] == "test" else f"+{row['test']}"
    return f"{row['task']}{shifted}/{row['kind']}/x{row['scale']:g}"


def pooled(rows: list[Row], resamples: dict[str, Path]) -> Pooled:
    """Figures of every setting over its seeds, and of every predictor that has run on all of them.

    Args:
        rows: of the table.
        resamples: the file with the resampled gap metric of every cell, by `cell_of`.

    Returns:
        by setting: `gap`, `gap_low`, `gap_high`, `mc_helps`, and under `predictors` their figures.
    """
    groups: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[setting_of(row)][row["predictor"]].append(row)
    result: Pooled = {}
    for name, by_predictor in groups.items():
        by_predictor = {key: own for key, own in by_predictor.items() if len(own) == len(by_predictor["map"])}
        means = {predictor: _seed_mean(own, resamples) for predictor, own in by_predictor.items()}
        gap = means["map"] - means["mc"]
        low, high = interval(gap)
        first = next(iter(by_predictor.values()))[0]
        result[name] = {
            "task": first["task"],
            "test": first["test"],
            "gap": float(gap[0]),
            "gap_low": low,
            "gap_high": high,
            "mc_helps": low > 0,
            "predictors": {
                predictor: _figures(own, means[predictor], means, low > 0) for predictor, own in by_predictor.items()
            },
        }
    return result


def cell_of(row: Row) -> str:
    """The name of a row's cell."""
    return f"{row['task']}-{row['kind']}-x{row['scale']:g}-{row['seed']}"


def _seed_mean(rows: list[Row], resamples: dict[str, Path]) -> np.ndarray:
    """The gap metric averaged over seeds, for all rows and every resample."""
    found = []
    for row in rows:
        with np.load(resamples[cell_of(row)]) as file:
            found.append(file[f"{row['test']}/{row['predictor']}"].astype(np.float64))
    return np.mean(found, axis=0)


def _figures(rows: list[Row], mean: np.ndarray, means: dict[str, np.ndarray], helps: bool) -> dict[str, float | None]:
    """Means over seeds, their standard deviation, and pooled intervals."""
    found: dict[str, float | None] = {}
    for figure in (*AVERAGED, "nll", "aurc", "accuracy", "mse", *FAITHFUL):
        values = [row[figure][0] for row in rows if row.get(figure) is not None and row[figure][0] is not None]
        if values and len(values) == len(rows):
            found[figure] = statistics.median(values) if figure == "equivalent_samples" else statistics.mean(values)
            found[f"{figure}_sd"] = statistics.stdev(values) if len(values) > 1 else 0.0
    found["gap_closed"] = None
    if helps:
        closed = (means["map"] - mean) / (means["map"] - means["mc"])
        low, high = interval(closed)
        found |= {"gap_closed": float(closed[0]), "gap_closed_low": low, "gap_closed_high": high}
    for other in ("map", "mc16"):
        low, high = interval(mean - means[other])
        found |= {
            f"over_{other}": float(mean[0] - means[other][0]),
            f"over_{other}_low": low,
            f"over_{other}_high": high,
        }
    return found


def summarise(found: Pooled) -> dict[str, float]:
    """Flat figures: those of the default predictor first, then of every setting and predictor."""
    plain = {name: setting for name, setting in found.items() if setting["test"] == "test"}
    own = {name: setting["predictors"][DEFAULT] for name, setting in plain.items() if DEFAULT in setting["predictors"]}
    closed = [figures["gap_closed"] for figures in own.values() if figures["gap_closed"] is not None]
    summary: dict[str, float] = {"settings": len(plain), "settings_where_mc_helps": len(closed)}
    if closed:
        summary |= {"median_gap_closed": statistics.median(closed), "worst_gap_closed": min(closed)}
        ceilings = [s["predictors"]["moments_link"]["gap_closed"] for s in plain.values() if s["mc_helps"]]
        summary |= {"ceiling_median_gap_closed": statistics.median(ceilings), "ceiling_worst_gap_closed": min(ceilings)}
    if own:
        samples = [figures["equivalent_samples"] for figures in own.values()]
        summary["equivalent_mc_samples_median"] = statistics.median(samples)
        for other in ("map", "mc16"):  # where Monte Carlo is no better than MAP, nor must a copy of it be
            worse = sum(own[name][f"over_{other}_low"] > 0 for name in own if plain[name]["mc_helps"])
            summary[f"significantly_worse_than_{other}"] = worse
    for name, setting in found.items():
        summary |= {f"{name}/{key}": float(setting[key]) for key in ("gap", "gap_low", "gap_high", "mc_helps")}
        for predictor, figures in setting["predictors"].items():
            for figure in ("gap_closed", "gap_closed_low", "gap_closed_high", "coverage_at_0.5", "kl_to_mc"):
                if figures.get(figure) is not None:
                    summary[f"{name}/{predictor}/{figure}"] = figures[figure]
    return {name: float(f"{value:.4g}") for name, value in summary.items()}
