"""The tables of docs/training.md, made from benchmarks/results/trained_posteriors.json."""

import json
from typing import Any

from bayespass.files import write_text
from results import ROOT

PAGE = ROOT / "docs" / "training.md"
RESULT = ROOT / "benchmarks" / "results" / "trained_posteriors.json"
START = "<!-- training tables: made by benchmarks/training_tables.py -->"
END = "<!-- end of the training tables -->"
NAMES = {
    "map": "AdamW (MAP)",
    "ivon": "IVON",
    "ivon_shared": "IVON, one pass",
    "score_vi": "ScoreVI",
    "score_vi_sgd": "ScoreVISGD",
    "elbo": "MeanFieldVI",
    "elbo_t1": "MeanFieldVI, T = 1",
    "stf": "first layer (STF)",
    "mc_dropout": "MC-dropout",
    "ensemble": "ensemble of 5",
    "published": "published MC-dropout",
    "advi": "ADVI",
    "stl": "ADVI, sticking the landing",
}
IMAGES = {
    "digits_vit": "digits, transformer",
    "digits_cnn": "digits, CNN",
    "fashion_mnist": "Fashion-MNIST, CNN",
}


def tables(result: dict[str, Any]) -> str:
    """All tables of the page, in Markdown."""
    summary, seeds = result["summary"], len(result["seeds"])
    parts = [cost_table(summary)]
    parts += [image_table(summary, task, title) for task, title in IMAGES.items()]
    parts += [attack_table(summary), uci_table(summary), forecast_table(summary), logistic_table(summary)]
    note = (
        f"Means over {seeds} seeds ± standard deviation over seeds (UCI: ± standard error over the published splits), "
        f"one thread per run on {result['machine']['cores']} CPU cores. `make benchmark-training` wrote these tables "
        f"from `benchmarks/results/trained_posteriors.json`; protocols and how settings were chosen stand in the "
        f"headers of `benchmarks/trained_*.py`."
    )
    return "\n\n".join([*parts, note])


def figure(summary: dict[str, float], key: str, digits: int, factor: float = 1.0, spread: str = "_sd") -> str:
    """A value with its spread."""
    if key not in summary:
        return ""
    text = f"{factor * summary[key]:.{digits}f}"
    return f"{text} ± {factor * summary[key + spread]:.{digits}f}" if key + spread in summary else text


def methods_of(summary: dict[str, float], prefix: str) -> list[str]:
    """The methods with figures under a prefix, in the order of `NAMES`."""
    found = {key.removeprefix(f"{prefix}.").split(".")[0] for key in summary if key.startswith(f"{prefix}.")}
    return [name for name in NAMES if name in found]


def cost_table(summary: dict[str, float]) -> str:
    """Step time and memory beside AdamW."""
    lines = [
        "## What it costs",
        "",
        "A vision transformer of 22 million weights, batches of 64 at 224 x 224 pixels.",
        "",
        "| method | step time / AdamW | memory kept / AdamW | peak memory / AdamW, batch of 8 |",
        "|---|---|---|---|",
    ]
    for name, label in NAMES.items():
        if f"{name}.step_over_adamw" in summary:
            cells = [f"{summary[f'{name}.{key}_over_adamw']:.2f}" for key in ("step", "memory", "peak")]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def image_table(summary: dict[str, float], task: str, title: str) -> str:
    """Quality and uncertainty of the classifiers of one task."""
    lines = [
        f"## {title}",
        "",
        "| method | accuracy % | NLL | NLL, one pass | ECE % | AURC x100 | OOD AUROC | members AUC | random weights |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in methods_of(summary, task):
        key = f"{task}.{name}"
        cells = [
            figure(summary, f"{key}.accuracy", 1, 100),
            figure(summary, f"{key}.nll", 3),
            figure(summary, f"{key}.shared_nll", 3),
            figure(summary, f"{key}.ece", 1, 100),
            figure(summary, f"{key}.aurc", 2, 100),
            figure(summary, f"{key}.ood_auroc", 3),
            figure(summary, f"{key}.membership_auc", 3),
            f"{summary.get(f'{key}.variance_parameters', 0):,.0f}",
        ]
        lines.append(f"| {NAMES[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def attack_table(summary: dict[str, float]) -> str:
    """Accuracy under attack on the averaged predictive."""
    lines = [
        "## Attacks on the digits CNN",
        "",
        "Accuracy in percent; the gradient is that of the averaged prediction.",
        "",
        "| method | clean | FGSM | PGD, 20 steps |",
        "|---|---|---|---|",
    ]
    for name in methods_of(summary, "digits_cnn"):
        key = f"digits_cnn.{name}"
        if f"{key}.pgd" in summary:
            cells = [figure(summary, f"{key}.{attack}", 1, 100) for attack in ("attack_clean", "fgsm", "pgd")]
            lines.append(f"| {NAMES[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def uci_table(summary: dict[str, float]) -> str:
    """Test log likelihood of the regression sets."""
    sets = list(dict.fromkeys(key.split(".")[1] for key in summary if key.startswith("uci.")))
    methods = methods_of(summary, f"uci.{sets[0]}") if sets else []
    lines = ["## UCI regression"]
    for metric, title in (("ll", "test log likelihood, nats"), ("rmse", "root mean square error")):
        lines += ["", f"| {title} | {' | '.join(NAMES[name] for name in methods)} |", "|---" * (len(methods) + 1) + "|"]
        for name in sets:
            digits = 4 if summary.get(f"uci.{name}.published.rmse", 1) < 0.2 and metric == "rmse" else 2
            cells = [figure(summary, f"uci.{name}.{method}.{metric}", digits, 1.0, "_se") for method in methods]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def forecast_table(summary: dict[str, float]) -> str:
    """Forecasts with intervals."""
    lines = ["## Forecasts"]
    for task in dict.fromkeys(key.split(".")[0] for key in summary if key.startswith("ETT")):
        lines += [
            "",
            f"| {task.replace('-', ', ')} | MSE | NLL | inside 50 % | inside 90 % | epistemic share % |",
            "|---|---|---|---|---|---|",
        ]
        for name in methods_of(summary, task):
            key = f"{task}.{name}"
            cells = [
                figure(summary, f"{key}.mse", 3),
                figure(summary, f"{key}.nll", 3),
                figure(summary, f"{key}.coverage_50", 1, 100),
                figure(summary, f"{key}.coverage_90", 1, 100),
                figure(summary, f"{key}.epistemic_share", 1, 100),
            ]
            lines.append(f"| {NAMES[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def logistic_table(summary: dict[str, float]) -> str:
    """ELBO gaps after equal numbers of steps."""
    horizons = (100, 500, 2000, 8000)
    lines = [
        "## ELBO gap of Bayesian logistic regression",
        "",
        f"| nats above the mean-field optimum after | {' | '.join(f'{h:,} steps' for h in horizons)} |",
        "|---" * (len(horizons) + 1) + "|",
    ]
    for task in ("full", "minibatch"):
        prefix = f"logistic.{task}"
        names = dict.fromkeys(key.split(".")[2] for key in summary if key.startswith(f"{prefix}."))
        for name in names:
            cells = [f"{summary.get(f'{prefix}.{name}.gap_{h}', float('nan')):.3g}" for h in horizons]
            lines.append(f"| {task}: {NAMES.get(name, name)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def with_tables(page: str, text: str) -> str:
    """The page with the tables between its two marks."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{text}\n\n{END}{after}"


def main() -> None:
    """Rewrite the tables in place."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    write_text(PAGE, with_tables(PAGE.read_text(encoding="utf-8"), tables(result)))


if __name__ == "__main__":
    main()
