"""The tables of docs/post_hoc.md and its pictures, made from benchmarks/results/post_hoc.json alone.

python benchmarks/post_hoc_pages.py [--result FILE] [--docs FOLDER]
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from bayespass.files import replacing, write_text
from bayespass.report.figure import COLOURS, new_figure
from results import ROOT, between_marks

START = "<!-- post-hoc tables: made by benchmarks/post_hoc_pages.py -->"
END = "<!-- end of the post-hoc tables -->"
RESULT = ROOT / "benchmarks" / "results" / "post_hoc.json"
NETWORKS = {"mlp": "MLP", "cnn": "CNN", "vit": "vision transformer"}
SOLVERS = {
    "direct": "direct",
    "lsmr": "LSMR, preconditioned",
    "cgmn": "CGMN",
    "gk": "sweeps, accelerated",
    "cyclic": "sweeps, plain",
    "lsmr_plain": "LSMR, no factors",
}
TASKS = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "heldout": "MNIST 0 to 7"}
METHODS = {
    "map": "network (MAP)",
    "temperature": "temperature",
    "laplace_diag": "diagonal Laplace, sampled",
    "laplace_diag_linear": "diagonal Laplace, linearised",
    "last_layer": "last-layer Laplace",
    "swag": "SWAG",
    "null_space": "null space",
    "loss_projected": "loss-projected",
}
SCORES = {
    "maxprob": "max. probability",
    "entropy": "entropy",
    "mi": "mutual information",
    "logit_variance": "logit variance",
    "leverage": "leverage",
}
LIBRARIES = {
    "bayespass": "bayespass",
    "BackPackGGN": "laplace-torch, BackPACK",
    "CurvlinopsGGN": "laplace-torch, curvlinops",
}
SETS = ("fashion_mnist", "mnist", "notmnist", "heldout_classes", "uniform_noise", "noisy", "rotated")
KINDS = {"block": "block projection", "factor_free": "factor-free (LSMR)", "loss": "loss rows", "train": "training"}
FAMILIES = {"mlp": "o", "cnn": "s", "vit": "^", "swin": "D"}
Summary = dict[str, float]


def page(result: dict[str, Any]) -> str:
    """The tables, in Markdown; parts without figures are left out."""
    summary = result["summary"]
    parts = [
        "## Measured",
        "Made by `benchmarks/post_hoc_pages.py` from `benchmarks/results/post_hoc.json`; protocols stand in the "
        f"headers of `benchmarks/post_hoc*.py`. Means over {len(result['seeds'])} seeds ± standard deviation over "
        f"seeds, on {result['machine']['cores']} CPU cores.",
        verdict(summary),
        solver_section(summary),
        *[ood_section(summary, task) for task in TASKS],
        spread_section(summary),
        cost_section(summary),
        vae_section(summary),
        laplace_section(summary, result["table"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def figure(summary: Summary, key: str, digits: int, factor: float = 1.0) -> str:
    """A value with its spread over seeds."""
    if key not in summary:
        return ""
    text = f"{factor * summary[key]:.{digits}f}"
    return f"{text} ± {factor * summary[f'{key}_sd']:.{digits}f}" if f"{key}_sd" in summary else text


def number(summary: Summary, key: str, form: str = ".3g") -> str:
    """A value, or nothing."""
    return format(summary[key], form) if key in summary else ""


def table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table without empty columns."""
    kept = [k for k in range(len(head)) if k == 0 or any(line[k] for line in lines)]
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row[k] for k in kept)} |" for row in rows)


def verdict(summary: Summary) -> str:
    """What the figures bear out and what not, each sentence by its own figures."""
    said = ["### What holds, and what does not", *solver_verdict(summary)]
    for task, title in TASKS.items():
        said += ood_verdict(summary, task, title)
    said += cost_verdict(summary)
    for task in ("mnist", "fashion_mnist"):
        key = f"vae.{task}"
        if f"{key}.auroc_sd" in summary:
            said.append(
                f"- VAE on {TASKS[task]}: the pixel sd tells test images from another data set with AUROC "
                f"{number(summary, f'{key}.auroc_sd', '.2f')}, the plain reconstruction error with "
                f"{number(summary, f'{key}.auroc_error', '.2f')}. One loss row per image leaves "
                f"{number(summary, f'{key}.sd_train_over_isotropic', '.0%')} of the prior's pixel sd at the training "
                "images themselves: the loss is kept, the picture is not."
            )
    return "\n".join([said[0], "", *said[1:]]) if len(said) > 1 else ""


def solver_verdict(summary: Summary) -> list[str]:
    """On convergence."""
    said = []
    if "null_space.train_shift" in summary:
        said.append(
            "- Training predictions stay where they are: a draw moves them by at most "
            f"{number(summary, 'null_space.train_shift', '.1e')} of what it did before the projection (direct solver, "
            "single precision), and by at most "
            f"{number(summary, 'null_space.train_shift.iterative', '.1e')} with preconditioned LSMR."
        )
    if "null_space.epochs_to_1e-2.plain" in summary:
        stopped = int(summary["null_space.epochs_to_1e-2.plain.stopped"])
        limit = f" ({stopped} runs stopped at their limit and count with it)" if stopped else ""
        said.append(
            f"- A residual of 1e-2 takes {number(summary, 'null_space.epochs_to_1e-2', '.0f')} epochs with "
            f"preconditioned LSMR and {number(summary, 'null_space.epochs_to_1e-2.plain', '.0f')} with plain "
            f"alternating projections{limit}."
        )
    return said


def ood_verdict(summary: Summary, task: str, title: str) -> list[str]:
    """On one image task: NLL, AUROCs and whether variance grows away from the data."""
    key = f"ood.{task}"
    if f"{key}.null_space.nll" not in summary or f"{key}.map.nll" not in summary:
        return []
    rivals = {m: summary[f"{key}.{m}.nll"] for m in METHODS if m != "null_space" and f"{key}.{m}.nll" in summary}
    best = min(rivals, key=lambda m: rivals[m])
    own, spread = summary[f"{key}.null_space.nll"], summary.get(f"{key}.null_space.nll_sd", 0.0)
    compared = "below" if own < rivals[best] - spread else "above" if own > rivals[best] + spread else "within a sd of"
    variances = {m: summary[f"{key}.{m}.ood_auroc_logit_variance"] for m in rivals if has_variance(summary, task, m)}
    leader = max(variances, key=lambda m: variances[m], default=None)
    rival = f"; best of the others {METHODS[leader]}, {variances[leader]:.3f}" if leader else ""
    train, test = summary[f"{key}.null_space.sd_train"], summary[f"{key}.null_space.sd_test"]
    outside = [n for n in SETS if n != "rotated" and f"{key}.null_space.sd_{n}" in summary]
    smaller = [n for n in outside if summary[f"{key}.null_space.sd_{n}"] < test]
    grows = (
        f"but is smaller than on test images for {', '.join(map(words, smaller))}"
        if smaller
        else "and on every other set larger than that"
    )
    return [
        f"- {title}: NLL of the null space {own:.4f}, {compared} the best of the others ({METHODS[best]}, "
        f"{rivals[best]:.4f}; MAP {rivals['map']:.4f}). Mean AUROC by entropy: MAP "
        f"{summary[f'{key}.map.ood_auroc_entropy']:.3f}, null space "
        f"{summary[f'{key}.null_space.ood_auroc_entropy']:.3f}; by logit variance: null space "
        f"{summary[f'{key}.null_space.ood_auroc_logit_variance']:.3f}{rival}. The null space's logit sd is "
        f"{train:.2g} on training images, {test:.2g} on test images, {grows}."
    ]


def has_variance(summary: Summary, task: str, method: str) -> bool:
    """Whether a method's logits vary."""
    return f"ood.{task}.{method}.ood_auroc_logit_variance" in summary


def score_of(summary: Summary, task: str, method: str) -> str:
    """The score that is shown by set, by a rule that no figure enters."""
    return "logit_variance" if has_variance(summary, task, method) else "entropy"


def cost_verdict(summary: Summary) -> list[str]:
    """On cost."""
    said = []
    ratio = "null_space.seconds_per_epoch_over_training_epoch"
    if ratio in summary:
        said.append(
            f"- An epoch of block projections of four draws costs {number(summary, ratio)} epochs of training on "
            "the same rows (median over networks of at least a million weights; largest "
            f"{number(summary, f'{ratio}.largest')}). The largest network has "
            f"{number(summary, 'null_space.params_max', ',.0f')} weights; peak memory stayed within "
            f"{number(summary, 'null_space.peak_gib_max', '.1f')} GiB."
        )
    slopes = {name: summary.get(f"cost.slope_outputs.{name}") for name in ("gram", "factor", "factor_free", "loss")}
    if all(value is not None for value in slopes.values()):
        said.append(
            "- Against outputs O, from 50 on, seconds grow as O to the power "
            f"{slopes['gram']:.2f} (Gram matrix), {slopes['factor']:.2f} (its factor), {slopes['factor_free']:.2f} "
            f"(factor-free) and {slopes['loss']:.2f} (loss rows)."
        )
    return said


def solver_section(summary: Summary) -> str:
    """Epochs and seconds to the tolerance."""
    lines = []
    for network, title in NETWORKS.items():
        for solver, name in SOLVERS.items():
            key = f"solvers.{network}.{solver}"
            if f"{key}.epochs" not in summary:
                continue
            stopped = int(summary[f"{key}.stopped"])
            epochs = f"{summary[f'{key}.epochs']:.0f}" + (f" ({stopped} stopped)" if stopped else "")
            size = f"{summary[f'{key}.rows']:,.0f} x {summary[f'{key}.weights']:,.0f}"
            seconds, shift = number(summary, f"{key}.seconds", ".1f"), number(summary, f"{key}.train_shift", ".1e")
            lines.append([f"{title}, {size}", name, epochs, seconds, shift])
    if not lines:
        return ""
    head = ["network, rows x weights", "solver", "epochs to 1e-2", "seconds", "largest shift of training outputs"]
    text = "The direct solver is exact after one pass; its seconds are the Gram matrix and the factor."
    return "\n\n".join(
        ["### Convergence", "![Residual against epochs](images/post_hoc_convergence.png)", table(head, lines), text]
    )


def ood_section(summary: Summary, task: str) -> str:
    """Quality and AUROCs of one image task."""
    methods = [m for m in METHODS if f"ood.{task}.{m}.nll" in summary]
    if not methods:
        return ""
    quality, scores = [], []
    for method in methods:
        key = f"ood.{task}.{method}"
        quality.append([
            METHODS[method],
            figure(summary, f"{key}.accuracy", 1, 100),
            figure(summary, f"{key}.nll", 4),
            figure(summary, f"{key}.ece", 1, 100),
            figure(summary, f"{key}.rot30_nll", 2),
            figure(summary, f"{key}.rot60_nll", 2),
            number(summary, f"{key}.fit_seconds", ".1f"),
            number(summary, f"{key}.predict_seconds", ".2f"),
        ])  # fmt: skip
        scores.append([METHODS[method], *[figure(summary, f"{key}.ood_auroc_{score}", 3) for score in SCORES]])
    head = ["method", "accuracy %", "NLL", "ECE %", "NLL at 30°", "NLL at 60°", "fit s", "predict s"]
    by_set = [[METHODS[m], SCORES[score_of(summary, task, m)], *set_figures(summary, task, m)] for m in methods]
    size = summary[f"ood.{task}.{methods[0]}.n_data"] * summary[f"ood.{task}.{methods[0]}.outputs"]
    return "\n\n".join([
        f"### {TASKS[task]}",
        f"{size:,.0f} rows, {summary[f'ood.{task}.{methods[0]}.weights']:,.0f} weights.",
        table(head, quality),
        "AUROC, averaged over all sets, by score:",
        table(["method", *SCORES.values()], scores),
        "By set, by logit variance where there is one, by entropy where there is none:",
        table(["method", "score", *[words(name) for name in SETS]], by_set),
    ])  # fmt: skip


def set_figures(summary: Summary, task: str, method: str) -> list[str]:
    """AUROCs of a method by set."""
    score = score_of(summary, task, method)
    return [figure(summary, f"ood.{task}.{method}.auroc_{score}_{name}", 3) for name in SETS]


def words(name: str) -> str:
    """A set's name as people write it."""
    return {"fashion_mnist": "Fashion-MNIST", "mnist": "MNIST", "notmnist": "notMNIST"}.get(
        name, name.replace("_", " ")
    )


def spread_section(summary: Summary) -> str:
    """Logit sd by set."""
    sets = ("train", "test", "rotated_90", *[name for name in SETS if name != "rotated"])
    lines = []
    for task, title in TASKS.items():
        for method, name in METHODS.items():
            key = f"ood.{task}.{method}"
            if f"{key}.sd_train" in summary:
                lines.append([f"{title}, {name}", *[number(summary, f"{key}.sd_{some}", ".2g") for some in sets]])
    if not lines:
        return ""
    head = ["task, method", *[words(some) for some in sets]]
    text = "The sd of a logit at the tuned scale: whether doubt grows away from the data."
    return "\n\n".join(
        ["### Where the variance is", "![Logit sd by set](images/post_hoc_sd.png)", text, table(head, lines)]
    )


def cost_section(summary: Summary) -> str:
    """Seconds and memory beside training."""
    networks = [key.split(".")[1] for key in summary if key.startswith("cost.") and key.endswith(".weights")]
    lines = []
    for network in sorted(networks, key=lambda name: (name.startswith("outputs"), summary[f"cost.{name}.weights"])):
        key = f"cost.{network}"
        cells = [number(summary, f"{key}.train.seconds"), number(summary, f"{key}.block.gram_seconds")]
        cells += [number(summary, f"{key}.block.factor_seconds")]
        for kind in ("block", "factor_free", "loss"):
            cells += [number(summary, f"{key}.{kind}.over_training"), number(summary, f"{key}.{kind}.peak_gib", ".2f")]
        lines.append([network, f"{summary[f'{key}.weights']:,.0f}", f"{summary[f'{key}.outputs']:.0f}", *cells])
    if not lines:
        return ""
    head = ["network", "weights", "outputs", "training epoch s", "Gram s", "factor s"]
    head += [
        f"{KINDS[k]}: {what}" for k in ("block", "factor_free", "loss") for what in ("epoch / training", "peak GiB")
    ]
    slopes = [
        [family, *[number(summary, f"cost.slope_weights.{family}.{kind}", ".2f") for kind in KINDS]]
        for family in ("mlp", "cnn", "vit")
    ]
    slopes = [line for line in slopes if any(line[1:])]
    found = [
        "### Cost",
        "![Seconds of an epoch](images/post_hoc_cost.png)",
        "Four draws at once; Gram matrices and factors are made once, not every epoch.",
        table(head, lines),
    ]
    if slopes:
        found += ["Exponent of the seconds of an epoch in weights:", table(["family", *KINDS.values()], slopes)]
    return "\n\n".join(found)


def vae_section(summary: Summary) -> str:
    """Numbers of the decoder."""
    lines = []
    for task in ("mnist", "fashion_mnist"):
        key = f"vae.{task}"
        if f"{key}.sd_train" in summary:
            sds = [figure(summary, f"{key}.sd_{name}", 4) for name in ("train", "test", "ood", "prior")]
            aurocs = [
                figure(summary, f"{key}.{name}", 3) for name in ("auroc_sd", "auroc_sd_over_isotropic", "auroc_error")
            ]
            lines.append([TASKS[task], *sds, *aurocs, number(summary, f"{key}.moved_train", ".1e")])
    if not lines:
        return ""
    head = ["data", "pixel sd: train", "test", "other data set", "prior latents"]
    head += ["AUROC: pixel sd", "sd / unprojected", "reconstruction error", "change of training losses / unprojected"]
    picture = "![Inputs, reconstructions and pixel sds](images/post_hoc_vae.png)"
    return "\n\n".join(["### The decoder of a VAE, by its loss", picture, table(head, lines)])


def laplace_section(summary: Summary, rows: list[dict[str, Any]]) -> str:
    """The comparison with laplace-torch: its figures, every posterior, and who fits which architecture."""
    keys = [key for key in summary if key.startswith(("laplace.", "last_layer_1000_classes."))]
    if not keys:
        return ""
    lines = [[f"`{key}`", number(summary, key)] for key in keys]
    mine = [row for row in rows if row["part"] == "laplace"]
    fits = [
        [
            f"{row['task'].upper()}, {row['kind']}",
            LIBRARIES[row["library"]],
            f"{row['fit_s']:.3f}",
            f"{row['predict_s']:.3f}",
            f"{row['memory_mib']:.0f}",
            f"{row['difference']:.1e}" if "difference" in row else "",
        ]
        for row in mine
        if row["task"] in ("mlp", "cnn")
    ]
    known = [row for row in mine if row["task"] == "architectures"]
    refused = [[row["kind"], *["yes" if row[key] == "ok" else "no" for key in LIBRARIES]] for row in known]
    asked = (
        "The last layer of 1,000 classes asks laplace-torch for 65.5 GB, diagonal or Kronecker, and fails under 12 GiB."
    )
    text = f"{asked} Kronecker Laplace of all weights of tiny networks, fit and predict:"
    return "\n\n".join(
        [
            "### Beside laplace-torch",
            table(["figure", "value"], lines),
            table(["posterior", "library", "fit CPU s", "predict CPU s", "memory MiB", "largest difference"], fits),
            text,
            table(["architecture", *LIBRARIES.values()], refused),
        ]
    )


def save(drawn: Any, path: Path) -> None:
    """Write a figure, in one step."""
    with replacing(path) as temporary:
        drawn.savefig(temporary, format="png", dpi=130)


def draw_convergence(rows: list[dict[str, Any]], path: Path) -> None:
    """Residual against epochs, one axis per network, all seeds."""
    rows = [row for row in rows if row["part"] == "solvers"]
    networks = [name for name in NETWORKS if any(row["task"] == name for row in rows)]
    if not networks:
        return
    drawn, axes = new_figure(11, 3.6, len(networks))
    for axis, network in zip(axes, networks, strict=True):
        for colour, (solver, name) in zip(COLOURS, SOLVERS.items(), strict=True):
            members = [row for row in rows if row["task"] == network and row["method"] == solver]
            for k, row in enumerate(members):
                epochs, residuals = zip(*row["history"], strict=True)
                axis.loglog(
                    epochs, residuals, color=colour, marker="." if len(epochs) == 1 else None, label=None if k else name
                )
        axis.axhline(1e-2, color="#cccccc", linewidth=1, zorder=0)
        axis.set(title=NETWORKS[network], xlabel="epochs")
    axes[0].set_ylabel("residual |Jv| / |Jε|")
    axes[0].legend(frameon=False, fontsize=8)  # all solvers ran there
    save(drawn, path)


def draw_spread(summary: Summary, path: Path) -> None:
    """Logit sd by set over that of the test set, one axis per task."""
    tasks = [task for task in TASKS if any(key.startswith(f"ood.{task}.") for key in summary)]
    if not tasks:
        return
    sets = ["train", "test", "rotated_90", *[name for name in SETS if name != "rotated"]]
    drawn, axes = new_figure(13, 3.8, len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        methods = [m for m in METHODS if f"ood.{task}.{m}.sd_test" in summary]
        found = [name for name in sets if f"ood.{task}.{methods[0]}.sd_{name}" in summary]
        for colour, method in zip(COLOURS, methods, strict=False):
            key = f"ood.{task}.{method}"
            values = [summary[f"{key}.sd_{name}"] / summary[f"{key}.sd_test"] for name in found]
            axis.plot(range(len(found)), values, marker="o", markersize=4, color=colour, label=METHODS[method])
        axis.axhline(1, color="#cccccc", linewidth=1, zorder=0)
        axis.set(title=TASKS[task], ylim=(0, None))
        axis.set_xticks(range(len(found)), [words(name) for name in found], rotation=35, ha="right", fontsize=8)
    axes[0].set_ylabel("logit sd / that on test images")
    axes[-1].legend(frameon=False, fontsize=7)
    save(drawn, path)


def draw_cost(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds per image and epoch against weights, and seconds against outputs."""
    rows = [row for row in rows if row["part"] == "cost" and "failed" not in row]
    if not rows:
        return
    drawn, axes = new_figure(11, 4.2, 2)
    for colour, (kind, name) in zip(COLOURS[1:], KINDS.items(), strict=False):
        for family, marker in FAMILIES.items():
            members = [r for r in rows if r["method"] == kind and r["task"].startswith(f"{family}_")]
            points = sorted((r["weights"], r["seconds"] / r["images"]) for r in members)
            if points:
                label = f"{name}, {family}" if kind == "block" else name if family == "mlp" else None
                axes[0].loglog(*zip(*points, strict=True), marker=marker, markersize=4, color=colour, label=label)
        members = [r for r in rows if r["method"] == kind and r["task"].startswith("outputs_")]
        points = sorted((r["outputs"], r["seconds"]) for r in members)
        if points:
            axes[1].loglog(*zip(*points, strict=True), marker="o", markersize=4, color=colour, label=name)
        if kind == "block" and points:
            once = sorted((r["outputs"], r["gram_seconds"] + r["factor_seconds"]) for r in members)
            axes[1].loglog(
                *zip(*once, strict=True), marker="x", linestyle="--", color=colour, label="Gram and factor, once"
            )
    axes[0].set(xlabel="weights", ylabel="seconds per image of an epoch", title="10 outputs")
    axes[1].set(xlabel="outputs", ylabel="seconds of an epoch", title="MLP 784-256-256-O, 16 images")
    for axis in axes:
        axis.legend(frameon=False, fontsize=7)
    save(drawn, path)


def draw_vae(rows: list[dict[str, Any]], path: Path) -> None:
    """Inputs, reconstructions and pixel sds, three rows of images a data set."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row["part"] == "vae" and "picture" in row]
    if not shown:
        return
    width = max(len(row["picture"]) for row in shown)
    drawn = Figure(figsize=(0.62 * width + 1, 0.62 * 3 * len(shown) + 0.8), layout="constrained")
    axes = drawn.subplots(3 * len(shown), width, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for block, row in enumerate(shown):
        top = max(max(column["sd"]) for column in row["picture"])
        for k, column in enumerate(row["picture"]):
            for line, (kind, limit) in enumerate({"input": 1.0, "mean": 1.0, "sd": top}.items()):
                if kind in column:
                    pixels = np.array(column[kind]).reshape(28, math.isqrt(len(column[kind])))
                    colours = "magma" if kind == "sd" else "gray"
                    axes[3 * block + line][k].imshow(pixels, cmap=colours, vmin=0, vmax=limit)
            if k == 0 or column["kind"] != row["picture"][k - 1]["kind"]:
                title = {"ood": "other set", "prior": "prior latents"}.get(column["kind"], column["kind"])
                axes[3 * block][k].set_title(title, fontsize=8, loc="left")
    save(drawn, path)


def with_tables(text: str, tables: str) -> str:
    """A page with what stands between the marks replaced."""
    return between_marks(text, START, END, tables)


def main() -> None:
    """Write the page and its pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    result = json.loads(arguments.result.read_text(encoding="utf-8"))
    images = arguments.docs / "images"
    draw_convergence(result["table"], images / "post_hoc_convergence.png")
    draw_spread(result["summary"], images / "post_hoc_sd.png")
    draw_cost(result["table"], images / "post_hoc_cost.png")
    draw_vae(result["table"], images / "post_hoc_vae.png")
    target = arguments.docs / "post_hoc.md"
    write_text(target, with_tables(target.read_text(encoding="utf-8"), page(result)))


if __name__ == "__main__":
    main()
