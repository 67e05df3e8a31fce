"""What a step costs: training methods beside AdamW on a vision transformer of 22 million weights.

ViT-S/16 (transformers, random weights, eager attention off), batches of 64 random images of 224 x 224
pixels and 1,000 classes. Every round runs one step of each method in turn, so that a busy machine
slows all alike; a ratio is the median over rounds of the method's seconds over AdamW's of the same
round. Persistent memory is counted: weights and the tensors of the optimizer's state, in bytes; for
the first layer alone the state is that of the layer. Peak memory is the largest resident size of a
process of its own that takes two steps with batches of 8, where weights and not activations rule,
less that of one that only builds the model.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayespass.posterior.elbo import MeanFieldVI
from bayespass.posterior.ivon import IVON
from bayespass.posterior.score_matching import ScoreVI
from bayespass.posterior.score_sgd import ScoreVISGD
from bayespass.posterior.selection import first_layer, frozen_except

METHODS = ("adamw", "ivon", "score_vi", "elbo", "score_vi_sgd", "stf")
N_DATA = 1_281_167
CLASSES = 1000


def vision_transformer() -> nn.Module:
    """ViT-S/16 with 22 million weights."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536, num_labels=CLASSES
    )
    return ViTForImageClassification(config)


def optimizer_for(method: str, model: nn.Module) -> torch.optim.Optimizer:
    """The method on all trainable weights of the model."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if method == "adamw":
        return torch.optim.AdamW([p for _, p in named], lr=1e-4)
    if method == "ivon":
        return IVON(named, lr=0.05, n_data=N_DATA, hess_init=0.05)
    if method == "score_vi":
        return ScoreVI(named, lr=1e-3, n_data=N_DATA, batch_size=64)
    if method == "score_vi_sgd":
        return ScoreVISGD(named, lr=1e-4, n_data=N_DATA)
    return MeanFieldVI(named, lr=1e-4, n_data=N_DATA)


def stepper(method: str, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Callable[[], None], Any]:
    """A function that takes one training step, and its optimizer."""
    optimizer = optimizer_for(method, model)

    def loss() -> None:
        F.cross_entropy(model(images).logits, labels).backward()

    def ordinary() -> None:
        optimizer.zero_grad()
        loss()
        optimizer.step()

    def bayesian() -> None:
        with optimizer.sampled():  # type: ignore[attr-defined]
            loss()
        optimizer.step()

    return (ordinary if method == "adamw" else bayesian), optimizer


def persistent_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Weights and optimizer state that outlive a step."""
    tensors = [*model.parameters()]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor) and value.numel() > 1]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def images_and_labels(batch: int, device: str) -> tuple[Tensor, Tensor]:
    """A batch of noise."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 224, 224, generator=generator)
    return images.to(device), torch.randint(CLASSES, (batch,), generator=generator).to(device)


def run(rounds: int = 5, batch: int = 64, device: str = "cpu") -> list[dict[str, Any]]:
    """Step times and memory of every method.

    Args:
        rounds: steps of each method after one to warm up.
        batch: images per step.
        device: "cpu" or "cuda".
    """
    images, labels = images_and_labels(batch, device)
    model = vision_transformer().to(device)
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    names = {method: [name for name, _ in model.named_parameters()] for method in METHODS}
    names["stf"] = list(first_layer(model.eval(), images[:2]))
    steps, memory = {}, {}
    for round_ in range(-1, rounds):
        for method in METHODS:
            with random_only(model, names[method], method):
                if method not in steps:
                    steps[method], optimizer = stepper(method, model, images, labels)
                taken = timed(steps[method], device)
                if round_ < 0:
                    memory[method] = persistent_bytes(model, optimizer)
            if round_ >= 0:
                seconds[method].append(taken)
            model.zero_grad(set_to_none=True)
    rows = []
    floor = resident_bytes("none") if device == "cpu" else 0
    for method in METHODS:
        ratios = [mine / theirs for mine, theirs in zip(seconds[method], seconds["adamw"], strict=True)]
        rows.append(
            {
                "part": "cost",
                "method": method,
                "weights": sum(p.numel() for p in model.parameters()),
                "seconds": seconds[method],
                "step_over_adamw": statistics.median(ratios),
                "step_over_adamw_range": [min(ratios), max(ratios)],
                "persistent_bytes": memory[method],
                "memory_over_adamw": memory[method] / memory["adamw"],
                "peak_bytes": resident_bytes(method) - floor if device == "cpu" else None,
            }
        )
    for row in rows:
        if row["peak_bytes"] is not None:
            row["peak_over_adamw"] = row["peak_bytes"] / rows[0]["peak_bytes"]
    return rows


@contextmanager
def random_only(model: nn.Module, names: list[str], method: str) -> Iterator[None]:
    """Phase 2 of the first layer runs with everything else frozen and in eval mode, all others in training mode."""
    if method == "stf":
        with frozen_except(model, names):
            yield
    else:
        model.train()
        yield


def timed(step: Callable[[], None], device: str) -> float:
    """Seconds of one step."""
    synchronise = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    synchronise()
    start = time.perf_counter()
    step()
    synchronise()
    return time.perf_counter() - start


def resident_bytes(method: str) -> int:
    """Largest resident size of a fresh process that builds the model and, unless "none", takes two steps."""
    result = subprocess.run([sys.executable, __file__, method], capture_output=True, text=True, check=True)
    return int(result.stdout.split()[-1])


def summarise(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The named figures of the cost part."""
    summary = {}
    for row in rows:
        if row["method"] == "adamw":
            continue
        for key in ("step_over_adamw", "memory_over_adamw", "peak_over_adamw"):
            if row.get(key) is not None:
                summary[f"{row['method']}.{key}"] = row[key]
    return summary


def _child(method: str) -> None:
    model = vision_transformer()
    images, labels = images_and_labels(8, "cpu")
    if method != "none":
        names = list(first_layer(model.eval(), images[:2])) if method == "stf" else []
        with random_only(model, names, method):
            step, _ = stepper(method, model, images, labels)
            for _ in range(2):
                step()
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()  # rusage would count the parent's
    print(1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1]))


if __name__ == "__main__":
    _child(sys.argv[1])
