"""How well counting predicts what a single pass costs: `make benchmark-cost`, on an idle machine.

Networks of several sizes and kinds are timed eagerly, single pass over plain forward, and compared
with `bayespass.cost`. The constant that fits best is printed; the one in the code is reported.
"""

import argparse
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch import nn

from bayespass.approximation import NAMED
from bayespass.cost import FLOP_PER_BYTE, Meter
from bayespass.demo.models import SmallCNN, SmallViT
from bayespass.predict.propagation import SinglePass
from results import write_result
from zoo import random_posterior
from zoo_models import LSTMForecaster, UNet, images

CONSTANTS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0)


def mlp(width: int) -> nn.Module:
    """Three layers."""
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def vit(width: int, depth: int) -> Callable[[], nn.Module]:
    """A transformers ViT on 64 x 64 pictures."""

    def build() -> nn.Module:
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(hidden_size=width, num_hidden_layers=depth, num_attention_heads=4, intermediate_size=4 * width, image_size=64, patch_size=8)  # fmt: skip
        return ViTForImageClassification(config)

    return build


def resnet(width: int) -> Callable[[], nn.Module]:
    """A transformers ResNet with basic blocks."""

    def build() -> nn.Module:
        from transformers import ResNetConfig, ResNetForImageClassification

        sizes = [width, 2 * width, 4 * width, 8 * width]
        return ResNetForImageClassification(
            ResNetConfig(embedding_size=width, hidden_sizes=sizes, depths=[1, 1, 1, 1], layer_type="basic")
        )

    return build


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "mlp 256": (lambda: mlp(256), lambda: torch.randn(512, 256)),
    "mlp 2048": (lambda: mlp(2048), lambda: torch.randn(256, 2048)),
    "demo vit": (SmallViT, lambda: torch.randn(256, 1, 8, 8)),
    "demo cnn": (SmallCNN, lambda: torch.randn(256, 1, 8, 8)),
    "vit 64 x 4": (vit(64, 4), lambda: images(32, 64)),
    "vit 256 x 4": (vit(256, 4), lambda: images(16, 64)),
    "vit 512 x 2": (vit(512, 2), lambda: images(16, 64)),
    "resnet 16": (resnet(16), lambda: images(16, 64)),
    "u-net": (UNet, lambda: images(8, 64)),
    "lstm": (LSTMForecaster, lambda: torch.randn(256, 20, 3)),
}


def seconds(run: Callable[[], Any], repeats: int = 7) -> float:
    """The fastest of several runs."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Measure, fit and write benchmarks/results/cost.json."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    console = Console()
    table: list[dict[str, Any]] = []
    for name, (build, inputs) in NETWORKS.items():
        torch.manual_seed(0)
        model, x = build().eval(), inputs()
        with torch.inference_mode():
            plain_seconds = seconds(lambda model=model, x=x: model(x))
        for approximation in NAMED:
            single = SinglePass(model, random_posterior(model), approximation)
            with torch.no_grad(), Meter() as plain:
                model(x)
            with torch.no_grad(), Meter() as spent:
                single.moments(x)
            with torch.inference_mode():
                measured = seconds(lambda single=single, x=x: single.moments(x)) / plain_seconds
            counts = {
                "flops": spent.flops,
                "bytes": spent.bytes,
                "plain_flops": plain.flops,
                "plain_bytes": plain.bytes,
            }
            predicted = prediction(counts, FLOP_PER_BYTE)
            table.append(
                {
                    "network": name,
                    "approximation": approximation,
                    "measured": measured,
                    "predicted": predicted,
                    **counts,
                }
            )
            console.print(f"{name:12s} {approximation:12s} measured {measured:6.2f} predicted {predicted:6.2f}")
    fits = {constant: rms_factor(table, constant) for constant in CONSTANTS}
    inside = [max(r["measured"] / r["predicted"], r["predicted"] / r["measured"]) for r in table]
    summary = {
        "flop_per_byte": FLOP_PER_BYTE,
        "rms_factor": rms_factor(table, FLOP_PER_BYTE),
        "share_within_1.5": statistics.mean(factor < 1.5 for factor in inside),
        "worst_factor": max(inside),
        "best_constant": min(fits, key=fits.__getitem__),
        **{f"measured.{r['network'].replace(' ', '_')}.{r['approximation']}": r["measured"] for r in table},
    }
    write_result("cost", [0], table, summary)
    for constant, factor in fits.items():
        console.print(f"{constant:5.0f} flop per byte: off by a factor {factor:.2f} (rms)")


def prediction(counts: dict[str, Any], constant: float) -> float:
    """Ratio of times."""
    return (counts["flops"] + constant * counts["bytes"]) / (counts["plain_flops"] + constant * counts["plain_bytes"])


def rms_factor(table: list[dict[str, Any]], constant: float) -> float:
    """Root mean square of the log of measured over predicted, as a factor."""
    logs = [math.log(r["measured"] / prediction(r, constant)) for r in table]
    return math.exp(math.sqrt(statistics.mean(log**2 for log in logs)))


if __name__ == "__main__":
    main()
