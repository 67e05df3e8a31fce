"""Fashion-MNIST: a small vision transformer and a convolutional network that ends in global average pooling.

The test rows are the first 4,000 of its own test set; the seed draws 1,500 images for training and 500 to hold out
from the other 60,000. The shifted set is the first 500 test rows, each turned by up to 20 degrees, with Gaussian
noise of sd 0.2 on standardised pixels.

Settings were chosen by hand on held-out rows of seed 0, by the log loss and AURC of Monte Carlo: one run of the
transformer; for the convolutions also 500 and 1,000 training images with IVON's rate at 0.3, where scales 0.25 to 4
left AURC no better than MAP's, as at 1,500 images. Where Laplace's best prior lies at the end of its grid
(convolutions), its narrowest posterior is kept, not a point.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayespass.demo.models import SmallViT
from fidelity_cases import Case, Task, in_batches
from fidelity_digits import turned
from trained_images_data import FASHION_MEAN, FASHION_SD, packed

TRAIN, HELD_OUT, TEST, SHIFTED, CHUNK = 1500, 500, 4000, 500, 100
TURN, NOISE = math.radians(20), 0.2


class FashionViT(SmallViT):
    """The demo's transformer with four blocks and 16 patches of 7x7, for 28x28 images."""

    def __init__(self) -> None:
        super().__init__(width=64, depth=4)
        self.patches = nn.Conv2d(1, 64, kernel_size=7, stride=7)


class PooledCNN(nn.Module):
    """Three convolutions with batch norm, the mean over all pixels, one linear layer, for 28x28 images."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inner, outer, stride in ((1, 16, 2), (16, 32, 2), (32, 64, 1)):
            layers += [nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, 28, 28) -> (B, classes) logits."""
        return self.head(self.pool(self.features(images)).flatten(1))


def _load(network: type[FashionViT] | type[PooledCNN], data: Path, seed: int) -> Case:
    train, test = (packed(data / "fashion_mnist" / f"fashion_mnist_{part}.pk.npz") for part in ("train", "test"))
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(seed))

    def standard(images: Tensor) -> Tensor:
        return (images - FASHION_MEAN) / FASHION_SD

    def rows(chosen: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
        return in_batches(standard(train.images[chosen]), train.labels[chosen], size)

    images, labels = standard(test.images[:TEST]), test.labels[:TEST]
    torch.manual_seed(seed)
    return Case(
        model=network(),
        train=rows(order[:TRAIN], 50),
        held_out=rows(order[TRAIN : TRAIN + HELD_OUT], 100),
        tests={
            "test": in_batches(images, labels, CHUNK),
            "shift": in_batches(turned(images[:SHIFTED], 0, TURN, NOISE), labels[:SHIFTED], CHUNK),
        },
        n_data=TRAIN,
        loss=F.cross_entropy,
    )


def fashion_vit(data: Path, cache: Path, seed: int) -> Case:  # noqa: ARG001
    """The transformer."""
    return _load(FashionViT, data, seed)


def fashion_cnn(data: Path, cache: Path, seed: int) -> Case:  # noqa: ARG001
    """The convolutional network."""
    return _load(PooledCNN, data, seed)


GRID = tuple(10 ** (0.5 * k) for k in range(0, 11))
TASKS = {
    "fashion_vit": Task(
        fashion_vit,
        scales=(0.25, 1.0),
        adamw={"epochs": 30, "lr": 2e-3, "weight_decay": 1e-4},
        ivon={"epochs": 60, "lr": 0.1, "hess_init": 0.05, "temperature": 0.1, "prior_precision": 0.15},
        grid=GRID,
    ),
    "fashion_cnn": Task(
        fashion_cnn,
        scales=(1.0,),
        adamw={"epochs": 30, "lr": 2e-3, "weight_decay": 1e-4},
        ivon={"epochs": 60, "lr": 0.1, "hess_init": 0.1, "temperature": 0.05, "prior_precision": 0.15},
        grid=GRID,
    ),
}
