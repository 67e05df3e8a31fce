"""Digits: scikit-learn's 1,797 images of 8x8 with the two networks of the demo.

The same 1,197 images are for testing whatever the seed; the seed draws 300 (transformer) or 100 (convolutional
network) for training from the other 600, and the rest is held out. The shifted set is the first 400 of them, each
turned by up to 30 degrees, with Gaussian noise of sd 0.3 on standardised pixels.

Settings start from the demo's recipes and were changed by hand on the held-out rows of seed 0, by the log loss and
AURC of Monte Carlo, in about ten runs: AdamW 60 and 100 epochs (transformer), 20 and 40 (convolutions); IVON's rate
0.1, 0.2 and 0.3 for the convolutions (0.3 diverged on seed 1; 0.1 for 100 epochs left Monte Carlo nothing to gain
in AURC), T of 0.03, 0.1 and 0.3. The scale 4 was replaced by 2: at 4 Monte Carlo is far worse than the mean
network.
"""

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from bayespass.demo.digits import load_digits
from bayespass.demo.models import SmallCNN, SmallViT
from fidelity_cases import Case, Task, in_batches

TEST, REST, SHIFTED, CHUNK = 1197, 600, 400, 100
TURN, NOISE = math.radians(30), 0.3


def turned(images: Tensor, seed: int, turn: float = TURN, noise: float = NOISE) -> Tensor:
    """Images (N, C, H, W) each turned about its centre by an angle in [-turn, turn], with noise on top."""
    generator = torch.Generator().manual_seed(seed)
    angles = (2 * torch.rand(len(images), generator=generator) - 1) * turn
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    maps = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return moved + noise * torch.randn(images.shape, generator=generator)


def _load(network: type[SmallViT] | type[SmallCNN], n_train: int, size: int, seed: int) -> Case:
    test, rest, _ = load_digits(0, TEST, REST)
    order = torch.randperm(REST, generator=torch.Generator().manual_seed(seed))
    train, held_out = order[:n_train], order[n_train:]
    torch.manual_seed(seed)
    return Case(
        model=network(),
        train=in_batches(rest.images[train], rest.labels[train], size),
        held_out=in_batches(rest.images[held_out], rest.labels[held_out], 100),
        tests={
            "test": in_batches(test.images, test.labels, CHUNK),
            "shift": in_batches(turned(test.images[:SHIFTED], 0), test.labels[:SHIFTED], CHUNK),
        },
        n_data=n_train,
        loss=F.cross_entropy,
    )


def digits_vit(data: Path, cache: Path, seed: int) -> Case:  # noqa: ARG001
    """300 training images."""
    return _load(SmallViT, 300, 50, seed)


def digits_cnn(data: Path, cache: Path, seed: int) -> Case:  # noqa: ARG001
    """100 training images."""
    return _load(SmallCNN, 100, 25, seed)


GRID = tuple(10 ** (0.5 * k) for k in range(0, 11))
TASKS = {
    "digits_vit": Task(
        digits_vit,
        scales=(0.25, 1.0, 2.0),
        adamw={"epochs": 100, "lr": 2e-3, "weight_decay": 1e-2},
        ivon={"epochs": 240, "lr": 0.1, "hess_init": 0.08, "temperature": 0.075, "prior_precision": 0.03},
        grid=GRID,
    ),
    "digits_cnn": Task(
        digits_cnn,
        scales=(0.25, 1.0, 2.0),
        adamw={"epochs": 20, "lr": 1e-3, "weight_decay": 1e-4},
        ivon={"epochs": 300, "lr": 0.2, "hess_init": 0.1, "temperature": 0.1, "prior_precision": 0.01},
        grid=GRID,
    ),
}
