"""docs/coverage.md, made from the registry and from benchmarks/results/zoo.json; `make coverage-page` runs it."""

import inspect
import json
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

import bayespass.rules  # noqa: F401  registers every rule
from bayespass.approximation import NAMED
from bayespass.files import write_text
from bayespass.rules.placing import COMPARISONS
from bayespass.rules.registry import Rule, in_place_operations, operation_name, rules
from results import ROOT

PAGE = ROOT / "docs" / "coverage.md"
# What is no part of inference: losses, random draws, and functions that return no function of entries.
NOT_INFERENCE = (
    "loss", "entropy", "nll", "divergence", "kl_div", "gumbel", "one_hot", "hinge", "cosine_embedding", "_threshold",
    "multi_head", "assert_int", "handle_torch", "has_torch", "boolean_dispatch", "sigmoid_focal", "ctc",
)  # fmt: skip
HEADER = """# Coverage

Made by `benchmarks/coverage_page.py`; a test fails when this page and the registry or the result file differ.

## Operations

For independent Gaussian entries a rule is exact, or its largest error is stated: of the mean in output standard
deviations, and of the variance relative to the output's (for means within 4, sd up to 2 or the range in the rule's
docstring). Exact attention is exact in the values; queries and keys enter by their means. What every rule assumes is
in [assumptions](assumptions.md). Several spellings of one operation share a row.
"""


def short(name: str) -> str:
    """The name as people write it."""
    for long, brief in (
        ("torch.nn.functional.", "F."), ("torch.Tensor.", "Tensor."),
        ("bayespass.rules.placing.assign", "x[i] = y"), ("bayespass.rules.placing.copied", "x.copy_(y)"),
    ):  # fmt: skip
        name = name.replace(long, brief)
    return name


def shown(entry: Rule) -> str:
    """At most three spellings, the functional ones first."""
    names = sorted(
        {short(operation_name(op)) for op in entry.operations},
        key=lambda n: (n.startswith("Tensor._"), "Tensor" in n, n),
    )
    plain = [name for name in names if "__" not in name] or names
    return ", ".join(f"`{name}`" for name in plain[:3]) + (", ..." if len(plain) > 3 else "")


def accuracy(entry: Rule, approximation: Any) -> str:
    """Exact, or the bounds."""
    found = entry.accuracy_under(approximation)
    return "exact" if found.exact else f"≈ {found.mean:g} / {found.variance:g}"


def operations() -> str:
    """One table per rule file."""
    looked_up = {
        operation for operations in COMPARISONS for operation in operations
    }  # answered where nothing is random
    entries: dict[int, Rule] = {id(entry): entry for operation, entry in rules().items() if operation not in looked_up}
    files: dict[str, list[Rule]] = {}
    for entry in entries.values():
        files.setdefault(entry.call.__module__.rpartition(".")[2], []).append(entry)
    lines = []
    for file, found in sorted(files.items()):
        lines += [
            f"### `rules/{file}.py`",
            "",
            "| operation | " + " | ".join(NAMED) + " |",
            "|---" * (1 + len(NAMED)) + "|",
        ]
        for row in sorted(
            f"| {shown(entry)} | " + " | ".join(accuracy(entry, a) for a in NAMED.values()) + " |" for entry in found
        ):
            lines.append(row)
        lines.append("")
    return "\n".join(lines)


def missing() -> list[str]:
    """Functions of torch.nn.functional that work on real entries and have no rule."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        overridable: list[Callable[..., Any]] = torch.overrides.get_overridable_functions()[F]
    answered = set(rules()) | set(in_place_operations())
    names = set()
    for function in overridable:
        name = getattr(function, "__name__", "")
        known = function in answered or getattr(F, name, None) in answered or getattr(torch, name, None) in answered
        if name and not known and not any(word in name for word in NOT_INFERENCE) and not name.endswith("_"):
            names.add(name)
    return sorted(names)


def zoo(result: dict[str, Any]) -> str:
    """The zoo's table: median ratio of the variance to Monte Carlo and rank correlation, per approximation."""
    names = [name for name in NAMED if any(name in row for row in result["table"])]
    samples = next(row["monte_carlo"]["samples"] for row in result["table"] if "monte_carlo" in row)
    lines = [
        f"Random small configurations of real library classes, unmodified; posterior sd a tenth of each tensor's root mean "
        f"square; {samples} weight samples. *Ratio* is the median over outputs of the propagated variance over Monte "
        f"Carlo's, without calibration; ρ the rank correlation over outputs. The last column is the rank correlation of "
        f"two halves of the samples with each other, which no method can be expected to beat.",
        "",
        "| model | library | runs | " + " | ".join(f"{n}: ratio, ρ" for n in names) + " | MC halves ρ |",
        "|---" * (4 + len(names)) + "|",
    ]
    for row in result["table"]:
        if "library" not in row:
            continue
        figures = [f"{row[n]['ratio']:.3g}, {row[n]['spearman']:.2f}" if n in row else "" for n in names]
        status = row["status"] if row["status"] == "ok" else f"{row['status']}: {row['reason']}"
        halves = f"{row['monte_carlo']['halves_spearman']:.2f}" if "monte_carlo" in row else ""
        lines.append(f"| {row['model']} | {row['library']} | {status} | {' | '.join(figures)} | {halves} |")
    return "\n".join(lines)


def trained(result: dict[str, Any]) -> str:
    """The trained networks, before and after calibration."""
    lines = [
        "| network | approximation | ratio, uncalibrated | ratio, calibrated | ρ, uncalibrated | ρ, calibrated |",
        "|---|---|---|---|---|---|",
    ]
    summary = result["summary"]
    for key, title in (("cnn", "the demo's CNN"), ("resnet20", "ResNet-20 on CIFAR-10")):
        for name in ("streamlined", "cvp", "shared"):
            prefix = f"{key}." if name == "shared" else f"{key}.{name}."
            keys = ("variance_ratio_median_uncalibrated", "variance_ratio_median", "spearman_uncalibrated", "spearman")
            if all(prefix + k in summary for k in keys):
                figures = " | ".join(
                    f"{summary[prefix + k]:.2g} ± {summary.get(prefix + k + '_sd', float('nan')):.1g}" for k in keys
                )
                lines.append(f"| {title} | {name} | {figures} |")
    return "\n".join(lines)


def page(result: dict[str, Any]) -> str:
    """The whole page."""
    absent = ", ".join(f"`F.{name}`" for name in missing())
    return "\n".join(
        [
            HEADER,
            operations(),
            f"**Missing** in `torch.nn.functional` (under every approximation; each raises and names itself): {absent}.",
            "",
            "## Model zoo",
            "",
            zoo(result),
            "",
            "## Trained networks",
            "",
            "Median ratio of the propagated variance of a logit to Monte Carlo's, and rank correlation over logits, before",
            "and after per-site calibration; means over seeds ± standard deviation.",
            "",
            trained(result),
            "",
            inspect.cleandoc("""
                Ranking needs what one noise does to several features at once, which no approximation here carries yet.
                `make benchmark-zoo` and `make benchmark-real-weights` write the numbers.
            """),
            "",
        ]
    )


def main() -> None:
    """Rewrite the page."""
    result = json.loads((ROOT / "benchmarks" / "results" / "zoo.json").read_text(encoding="utf-8"))
    write_text(PAGE, page(result))


if __name__ == "__main__":
    main()
