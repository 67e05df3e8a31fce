"""What an epoch of a projection costs, against weights and outputs: one process per cell.

    from post_hoc_cost import cells, run_cell, summarise
    row = run_cell("mlp_700", "block", seed=0, data=Path("../shared/data"))

Networks of 1e4 to 3e7 random weights, ten outputs, on random images: MLPs (28x28 pixels, 64 images),
CNNs (28x28, 16), vision transformers (96x96, patches of 16, 4) and Swin-T of transformers
(224x224, 2). Kinds: "train" is an epoch of AdamW in one batch; the others project
four vectors on the kernel of the Jacobian of all outputs, in two blocks: "block" by sweeps with the
factors of the blocks (made once; `gram_seconds` and `factor_seconds` are extra), "factor_free" by LSMR
without any, and "loss" by the same on the loss, one row per image. `seconds` is the median of three
epochs, of one where an epoch takes more than five seconds, after one to warm up; `over_training` divides
by an epoch of "train". What does not depend on the vectors is not repeated for each, so four cost less
than four times one.

"outputs_50" and so on: an MLP of 784-256-256-O with O outputs, 16 images in one block. Only the kind
"block" makes a matrix of (16 O)^2.

`peak_gib` is the largest resident size (VmHWM) of the cell's own process, libraries (0.3 GiB) included;
the address space is limited to 20 GiB. Slopes are of least squares in logarithms, of seconds against
weights for networks of at least 1e5 of them, and against outputs from 50 on.
"""

import json
import math
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayespass.curvature.krylov import LSMR, BlockFactors, Solver, Sweeps, factorise
from bayespass.curvature.operator import RowOperator
from bayespass.curvature.row_blocks import shuffled_blocks

KINDS = ("train", "block", "factor_free", "loss")
MLP_WIDTHS, CNN_CHANNELS = (12, 90, 330, 700, 1700, 5200), (10, 33, 105)
VIT_SIZES = {"vit_64": (64, 4), "vit_192": (192, 6), "vit_384": (384, 12)}  # width, layers
SWINS = {"swin_t": 96}  # channels of the first stage
IMAGES = {"mlp": 64, "cnn": 16, "vit": 4, "swin": 2, "outputs": 16}
PIXELS = {"mlp": (1, 28), "cnn": (1, 28), "vit": (3, 96), "swin": (3, 224), "outputs": (1, 28)}
NETWORKS = (*(f"mlp_{w}" for w in MLP_WIDTHS), *(f"cnn_{c}" for c in CNN_CHANNELS), *VIT_SIZES, *SWINS)
OUTPUTS = (2, 10, 50, 100, 200, 500, 1000)
MOST_BLOCK_OUTPUTS = 500
SMOKE = ("mlp_12", "cnn_10", "vit_64", "outputs_10", "outputs_50")
CLASSES, DRAWS, ROUNDS, LONG = 10, 4, 3, 5.0
LIMIT = 20 * 2**30
MAX_MEMORY = 16 * 2**30


def cells(seeds: Sequence[int], smoke: bool = False) -> list[tuple[str, str, int]]:
    """Every (network, kind, seed 0); the networks are random, one seed is enough."""
    del seeds
    found = [(network, kind, 0) for network in NETWORKS for kind in KINDS]
    for outputs in OUTPUTS:
        kinds = KINDS if outputs <= MOST_BLOCK_OUTPUTS else [kind for kind in KINDS if kind != "block"]
        found += [(f"outputs_{outputs}", kind, 0) for kind in kinds]
    return [cell for cell in found if cell[0] in SMOKE] if smoke else found


def run_cell(
    network: str, kind: str, seed: int, data: Path, cache: Path | None = None, smoke: bool = False
) -> dict[str, Any]:
    """Time one kind of epoch in a process of its own.

    Args:
        network: one of `NETWORKS`, or "outputs_O".
        kind: one of `KINDS`.
        seed: of the weights.
        data: not needed.
        cache: not needed.
        smoke: no difference.
    """
    del data, cache, smoke
    command = [sys.executable, __file__, network, kind, str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1][:300] if done.stderr.strip() else "killed"}
    return json.loads(done.stdout.splitlines()[-1])


def build(network: str, seed: int = 0) -> nn.Module:
    """A random network in eval mode."""
    torch.manual_seed(seed)
    family, _, size = network.partition("_")
    if family == "mlp":
        return _mlp(int(size), CLASSES)
    if family == "outputs":
        return _mlp(256, int(size))
    if family == "cnn":
        c = int(size)
        return nn.Sequential(
            nn.Conv2d(1, c, 3, stride=2, padding=1), nn.GELU(),
            nn.Conv2d(c, 2 * c, 3, stride=2, padding=1), nn.GELU(),
            nn.Conv2d(2 * c, 4 * c, 3, padding=1), nn.GELU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * c, CLASSES),
        ).eval()  # fmt: skip
    return _transformer(network).eval()


def _mlp(width: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, outputs)
    ).eval()


def _transformer(network: str) -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

    if network in SWINS:
        channels = SWINS[network]  # everything else is Swin-T
        return SwinForImageClassification(SwinConfig(embed_dim=channels, num_labels=CLASSES, drop_path_rate=0.0))
    width, layers = VIT_SIZES[network]
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        intermediate_size=4 * width,
        image_size=PIXELS["vit"][1],
        num_labels=CLASSES,
    )
    return ViTForImageClassification(config)


def measure(network: str, kind: str, seed: int) -> dict[str, Any]:
    """Seconds of an epoch and the peak memory of this process."""
    family = network.partition("_")[0]
    model = build(network, seed)
    generator = torch.Generator().manual_seed(seed)
    channels, side = PIXELS[family]
    images = torch.randn(IMAGES[family], channels, side, side, generator=generator)
    classes = int(network.removeprefix("outputs_")) if family == "outputs" else CLASSES
    labels = torch.randint(classes, (len(images),), generator=generator)
    row: dict[str, Any] = {
        "weights": sum(parameter.numel() for parameter in model.parameters()),
        "images": len(images),
        "outputs": classes,
        "draws": DRAWS,
    }
    if kind == "train":
        row |= timed(trainer(model, images, labels))
    else:
        n_blocks = 1 if family == "outputs" else 2
        blocks = shuffled_blocks([(images, labels)], -(-len(images) // n_blocks), seed)
        rows = "loss" if kind == "loss" else "outputs"
        names = [name for name, _ in model.named_parameters()]
        operator = RowOperator(model, names, blocks, rows, max_memory=MAX_MEMORY)
        vectors = torch.randn(DRAWS, operator.width, generator=generator)
        row["rows"] = operator.n_rows
        method: Solver = LSMR(operator)
        if kind == "block":
            factors = BlockFactors(operator, MAX_MEMORY)
            row |= setup_seconds(operator, factors)
            method = Sweeps(operator, factors)
        state = method.start(vectors)
        row |= timed(lambda: method.step(state))
    return row | {"peak_gib": peak_bytes() / 2**30}


def setup_seconds(operator: RowOperator, factors: BlockFactors) -> dict[str, float]:
    """What the Gram matrices and the factors of all blocks take; the factors are kept."""
    gram = factor = 0.0
    for block in range(len(operator.blocks)):
        start = time.perf_counter()
        matrix = operator.gram(block).double()
        middle = time.perf_counter()
        factors._kept[block] = factorise(matrix, 0.0, 1e-7)[0]
        gram, factor = gram + middle - start, factor + time.perf_counter() - middle
    return {"gram_seconds": gram, "factor_seconds": factor}


def trainer(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """One step of AdamW on all rows."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        output = model(images)
        F.cross_entropy(output if isinstance(output, Tensor) else output.logits, labels).backward()
        optimizer.step()

    return step


def timed(step: Callable[[], Any]) -> dict[str, float]:
    """The median of some calls after one to warm up."""
    step()
    seconds: list[float] = []
    while len(seconds) < ROUNDS and (not seconds or seconds[0] < LONG):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds)}


def peak_bytes() -> int:
    """The largest resident size so far; rusage would count the parent's."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def slope(pairs: Sequence[tuple[float, float]]) -> float:
    """Least squares of log y on log x."""
    xs, ys = [math.log(x) for x, _ in pairs], [math.log(y) for _, y in pairs]
    mean_x, mean_y = statistics.mean(xs), statistics.mean(ys)
    top = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return top / sum((x - mean_x) ** 2 for x in xs)


def summarise(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Seconds and memory by "cost.network.kind", slopes, and the named figures of the whole."""
    done = {(row["task"], row["method"]): row for row in rows if "failed" not in row}
    summary: dict[str, float] = {}
    for (network, kind), row in done.items():
        key = f"cost.{network}.{kind}"
        for figure in ("seconds", "peak_gib", "gram_seconds", "factor_seconds"):
            if figure in row:
                summary[f"{key}.{figure}"] = row[figure]
        summary[f"cost.{network}.weights"] = row["weights"]
        summary[f"cost.{network}.outputs"] = row["outputs"]
        training = done.get((network, "train"))
        if kind != "train" and training:
            summary[f"{key}.over_training"] = row["seconds"] / training["seconds"]
            summary[f"{key}.memory_over_training"] = row["peak_gib"] / training["peak_gib"]
    for kind in KINDS:
        summary |= slopes(kind, done)
    largest = [row for (network, kind), row in done.items() if kind != "train" and not network.startswith("outputs")]
    if largest:
        summary["null_space.params_max"] = max(row["weights"] for row in largest)
        summary["null_space.peak_gib_max"] = max(row["peak_gib"] for row in largest)
    ratios = [
        row["seconds"] / done[network, "train"]["seconds"]
        for (network, kind), row in done.items()
        if kind == "block"
        and not network.startswith("outputs")
        and row["weights"] >= 1e6
        and (network, "train") in done
    ]
    if ratios:
        summary["null_space.seconds_per_epoch_over_training_epoch"] = statistics.median(ratios)
        summary["null_space.seconds_per_epoch_over_training_epoch.largest"] = max(ratios)
        summary["null_space.seconds_per_epoch_over_training_epoch.per_draw"] = statistics.median(ratios) / DRAWS
    return summary


def slopes(kind: str, done: dict[tuple[str, str], dict[str, Any]]) -> dict[str, float]:
    """Exponents of one kind by family, where there are three points or more."""
    found: dict[str, float] = {}
    for family in ("mlp", "cnn", "vit"):
        members = [row for (network, k), row in done.items() if k == kind and network.startswith(f"{family}_")]
        pairs = [(row["weights"], row["seconds"]) for row in members if row["weights"] >= 1e5]
        if len(pairs) > 2:
            found[f"cost.slope_weights.{family}.{kind}"] = slope(pairs)
    members = [row for (network, k), row in done.items() if k == kind and network.startswith("outputs_")]
    many = [row for row in members if row["outputs"] >= 50]
    if len(many) > 2:
        found[f"cost.slope_outputs.{kind}"] = slope([(row["outputs"], row["seconds"]) for row in many])
        for figure in ("gram_seconds", "factor_seconds") if kind == "block" else ():
            name = figure.removesuffix("_seconds")
            found[f"cost.slope_outputs.{name}"] = slope([(row["outputs"], row[figure]) for row in many])
    return found


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    warnings.simplefilter("ignore", UserWarning)
    print(json.dumps(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
