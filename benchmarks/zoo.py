"""Every model of the zoo in one pass against Monte Carlo, and the demo's trained CNN: `make benchmark-zoo`.

For each model, random weights as its library initialises them and a Gaussian posterior around them
whose sd is a tenth of each tensor's root mean square: it runs, the mean at zero variance is the
plain forward, variance is finite and non-negative, and the variance of the output against 1,000
weight samples. `resnet20.*` is taken from the last run of `benchmarks/real_weights.py`.
"""

import argparse
import contextlib
import importlib.util
import json
import logging
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from bayespass.batches import model_output
from bayespass.calibrate.variance_scale import fit_scales
from bayespass.demo.digits import load_digits
from bayespass.demo.run import N_CALIBRATION, NETWORKS
from bayespass.demo.training import train
from bayespass.errors import UnsupportedOp
from bayespass.posterior.base import Posterior
from bayespass.posterior.mean_field import DiagonalGaussian
from bayespass.predict.propagation import SinglePass
from bayespass.predict.sampling import MonteCarlo
from bayespass.progress import track
from results import ROOT, write_result
from zoo_models import ZOO, Entry

APPROXIMATIONS = ("streamlined", "cvp", "shared")
RELATIVE_SD = 0.1
LARGEST_SAMPLE = 20_000  # entries that a rank correlation looks at
TRAINED = "demo CNN, trained"
TOLERANCE = 1e-5  # of the largest output, at zero variance


@dataclass
class Reference:
    """Monte-Carlo variance of the output, and the rank correlation of its two halves with each other."""

    variance: Tensor
    halves_spearman: float


def reference(model: nn.Module, posterior: Posterior, args: Any, kwargs: Any, n_samples: int, seed: int) -> Reference:
    """Variance over draws, kept as running sums."""
    outputs = MonteCarlo(model, posterior, n_samples, seed).outputs(*args, **kwargs)
    halves = [_Running(), _Running()]
    whole = _Running()
    for index, output in enumerate(outputs):
        whole.add(output.double())
        halves[index % 2].add(output.double())
    return Reference(whole.variance(), spearman(halves[0].variance(), halves[1].variance()))


class _Running:
    def __init__(self) -> None:
        self.count, self.mean, self.square = 0, torch.zeros(()), torch.zeros(())

    def add(self, value: Tensor) -> None:
        self.count += 1
        gap = value - self.mean
        self.mean = self.mean + gap / self.count
        self.square = self.square + gap * (value - self.mean)

    def variance(self) -> Tensor:
        return self.square / (self.count - 1)


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation over entries; 0 where one of them is constant."""
    from scipy.stats import spearmanr

    x, y = a.flatten().double().numpy(), b.flatten().double().numpy()
    if len(x) > LARGEST_SAMPLE:
        chosen = np.random.default_rng(0).choice(len(x), LARGEST_SAMPLE, replace=False)
        x, y = x[chosen], y[chosen]
    return float(spearmanr(x, y)[0]) if np.ptp(x) > 0 and np.ptp(y) > 0 else 0.0  # type: ignore[arg-type]


def random_posterior(model: nn.Module, relative_sd: float = RELATIVE_SD) -> DiagonalGaussian:
    """Around the model's weights, with an sd relative to each tensor's root mean square (0.02 for zeros)."""
    mean = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}
    sizes = {n: p.square().mean().sqrt().item() or 0.02 for n, p in mean.items()}
    return DiagonalGaussian(mean, {n: torch.full_like(p, (relative_sd * sizes[n]) ** 2) for n, p in mean.items()})


def zero_posterior(model: nn.Module) -> DiagonalGaussian:
    """The model's own weights, without variance."""
    return random_posterior(model, 0.0)


def built(entry: Entry, seed: int = 0) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The entry's model and one batch, the same every time."""
    torch.manual_seed(seed)
    return entry.build()


def missing_library(entry: Entry) -> str | None:
    """Why the entry cannot be built here, if so."""
    for library in (entry.library, *(("torchvision",) if entry.library == "timm" else ())):
        if importlib.util.find_spec(library) is None:
            return f"{library} is not installed"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                importlib.import_module(library)
            except Exception as error:
                return f"{library} does not import here: {error}".splitlines()[0]
    return None


def deterministic_error(entry: Entry) -> float:
    """Largest |single pass at zero variance - plain forward|, relative to the largest output."""
    model, args, kwargs = built(entry)
    with torch.no_grad():
        plain = model_output(model(*args, **kwargs))
        mean, _ = SinglePass(model, zero_posterior(model)).moments(*args, **kwargs)
    return float((mean - plain).abs().max() / plain.abs().max().clamp(min=1e-6))


def row(entry: Entry, n_samples: int) -> dict[str, Any]:
    """One row of the table."""
    result: dict[str, Any] = {"model": entry.name, "library": entry.library, "kind": entry.kind}
    reason = missing_library(entry)
    if reason is not None:
        return result | {"status": "skipped", "reason": reason}
    try:
        result["deterministic_error"] = deterministic_error(entry)
        model, args, kwargs = built(entry)
        posterior = random_posterior(model)
        result["parameters"] = sum(p.numel() for p in model.parameters())
        with torch.no_grad():
            truth = reference(model, posterior, args, kwargs, n_samples, seed=0)
            result["monte_carlo"] = {"samples": n_samples, "halves_spearman": truth.halves_spearman}
            for name in APPROXIMATIONS:
                _, variance = SinglePass(model, posterior, name).moments(*args, **kwargs)
                valid = bool(torch.isfinite(variance).all()) and bool((variance >= 0).all())
                result[name] = {
                    "valid": valid,
                    "ratio": float((variance.double() / truth.variance).median()),
                    "spearman": spearman(variance, truth.variance),
                }
    except UnsupportedOp as error:
        return result | {"status": "fails", "reason": str(error)}
    valid = all(result[name]["valid"] for name in APPROXIMATIONS) and result["deterministic_error"] < TOLERANCE
    return result | {"status": "ok" if valid else "fails"}


def trained_cnn(seed: int, n_samples: int) -> dict[str, Any]:
    """The demo's CNN after training: one pass against Monte Carlo on test digits, before and after calibration."""
    _, build, recipe = NETWORKS["cnn"]
    train_split, calibration, test = load_digits(seed, recipe.n_train, N_CALIBRATION)
    torch.manual_seed(seed)
    model = build()
    posterior = train(model, train_split, recipe, seed, progress=False)
    images = test.images[:512]
    result: dict[str, Any] = {"model": TRAINED, "seed": seed, "status": "ok"}
    with torch.no_grad():
        truth = reference(model, posterior, (images,), {}, n_samples, seed)
    result["monte_carlo"] = {"samples": n_samples, "halves_spearman": truth.halves_spearman}
    for name in APPROXIMATIONS:
        scales = fit_scales(model, posterior, calibration.images, name, seed=seed + 1)
        result[name] = {}
        for label, used in (("", scales), ("_uncalibrated", None)):
            with torch.no_grad():
                _, variance = SinglePass(model, posterior, name, used).moments(images)
            result[name][f"ratio{label}"] = float((variance.double() / truth.variance).median())
            result[name][f"spearman{label}"] = spearman(variance, truth.variance)
            result[name][f"spearman_of_totals{label}"] = spearman(variance.sum(1), truth.variance.sum(1))
    return result


def slug(name: str) -> str:
    """The model's name as a key: lower case, words joined."""
    return "_".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def summarise(table: list[dict[str, Any]], cnn: list[dict[str, Any]], resnet: dict[str, float]) -> dict[str, float]:
    """The named figures."""
    known = [r for r in table if r["status"] != "skipped"]
    summary: dict[str, float] = {"models": len(known), "models_ok": sum(r["status"] == "ok" for r in known)}
    summary["models_skipped"] = len(table) - len(known)
    for name in APPROXIMATIONS:
        prefix = "" if name == "shared" else f"{name}."
        for figure, source in (("variance_ratio_median", "ratio"), ("spearman", "spearman")):
            for label in ("", "_uncalibrated"):
                values = [run[name][f"{source}{label}"] for run in cnn]
                summary[f"cnn.{prefix}{figure}{label}"] = float(np.mean(values))
                summary[f"cnn.{prefix}{figure}{label}_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    summary |= resnet
    for r in known:
        for name in APPROXIMATIONS:
            if name in r:
                summary[f"{slug(r['model'])}.{name}.ratio"] = r[name]["ratio"]
                summary[f"{slug(r['model'])}.{name}.spearman"] = r[name]["spearman"]
    return summary


def resnet_figures() -> dict[str, float]:
    """`resnet20.*` of the last run on real weights; those of "shared" also without its name."""
    path = ROOT / "benchmarks" / "results" / "real_weights.json"
    if not path.exists():
        return {}
    summary = json.loads(path.read_text(encoding="utf-8"))["summary"]
    figures = {key: value for key, value in summary.items() if key.startswith("resnet20.")}
    short = {key.replace("resnet20.shared.", "resnet20."): v for key, v in figures.items() if ".shared." in key}
    return figures | short


def kept_rows() -> list[dict[str, Any]]:
    """The models' rows of the last run."""
    result = json.loads((ROOT / "benchmarks" / "results" / "zoo.json").read_text(encoding="utf-8"))
    return [row for row in result["table"] if row["model"] != TRAINED]


def main() -> None:
    """Run and write benchmarks/results/zoo.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1000, help="weight samples of the reference")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the trained CNN")
    parser.add_argument("--only", nargs="+", default=[], help="models whose name contains one of these; writes nothing")
    parser.add_argument("--trained-only", action="store_true", help="run the trained CNN; keep the models' last rows")
    arguments = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    wanted = [] if arguments.trained_only else ZOO
    chosen = [e for e in wanted if not arguments.only or any(text.lower() in e.name.lower() for text in arguments.only)]
    console = Console()
    table = kept_rows() if arguments.trained_only else []
    for entry in track(chosen, "zoo", show=sys.stderr.isatty(), total=len(chosen)):
        found = row(entry, arguments.samples)
        table.append(found)
        shown = " ".join(
            f"{n} {found[n]['ratio']:.2f}/{found[n]['spearman']:.2f}" for n in APPROXIMATIONS if n in found
        )
        console.print(f"{found['model']:28s} {found['status']:8s} {shown} {found.get('reason', '')}"[:200])
    if arguments.only:
        return
    cnn = [trained_cnn(seed, arguments.samples) for seed in arguments.seeds]
    summary = summarise(table, cnn, resnet_figures())
    write_result("zoo", arguments.seeds, [*table, *cnn], summary)
    for name, value in summary.items():
        console.print(f"{name:60s} {value:.3f}")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
