"""The data and the trained networks of `post_hoc`.

Images: the seed draws 1,000 training and 500 validation rows from the 60,000 of MNIST or
Fashion-MNIST, the 1,000 test rows are the same for every seed. "heldout" trains on MNIST's classes 0
to 7. Their network is the LeNet with tanh of Miani et al. (44,426 weights; 44,256 with eight classes):
the 10,000 (8,000) outputs on the training rows are fewer than the weights, so that there is a null
space; on all 60,000 rows there would be none.

Digits: scikit-learn's 8x8 images, 500 training rows (200 for the transformer), the rest in equal
parts for validation and test. Networks: an MLP of 26,122 weights, a CNN of 13,706 and the demo's vision
transformer of 152,202.

All are trained by Adam with an L2 term of a Gaussian prior, and kept in the cache.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from bayespass.demo.digits import Split, load_digits
from bayespass.demo.models import SmallViT
from bayespass.files import replacing
from trained_images_data import packed

IMAGE_TASKS = ("mnist", "fashion_mnist", "heldout")
OTHER = {"mnist": "fashion_mnist", "fashion_mnist": "mnist", "heldout": "fashion_mnist"}
PIXELS = {"mnist": (0.1307, 0.3081), "fashion_mnist": (0.286, 0.353)}  # mean and sd of all training pixels
TRAIN, VALIDATION, TEST, OOD = 1000, 500, 1000, 500
SMOKE_TRAIN, SMOKE_OTHERS = 100, 100
HELDOUT_CLASSES = 8  # the first eight are known
ANGLES = (30, 60, 90, 120, 150, 180)
ROTATED = 200  # test images of every angle
NOISE_SD = 0.5  # of "noisy" pixels in [0, 1]
DIGITS_TRAIN = {"mlp": 500, "cnn": 500, "vit": 200}


@dataclass(frozen=True)
class ImageTask:
    """One draw of an image set.

    Args:
        train: rows to learn from and to project on.
        validation: rows that priors and scales are tuned on.
        test: rows of the figures.
        rotated: the first 200 test images by angle in degrees.
        ood: images that are none of the classes, or no images at all, by name.
    """

    train: Split
    validation: Split
    test: Split
    rotated: dict[int, Tensor]
    ood: dict[str, Tensor]

    @property
    def classes(self) -> int:
        """How many are known."""
        return int(self.train.labels.max()) + 1


def load_images(task: str, seed: int, data: Path, smoke: bool = False) -> ImageTask:
    """The rows of one seed, standardised.

    Args:
        task: one of `IMAGE_TASKS`.
        seed: draws training and validation rows.
        data: the folder of `mnist`, `fashion_mnist` and `notmnist`.
        smoke: few rows, for a trial.
    """
    name = "mnist" if task == "heldout" else task
    mean, sd = PIXELS[name]
    generator = torch.Generator().manual_seed(seed)
    everything = packed(data / name / f"{name}_train.pk.npz")
    own_test = packed(data / name / f"{name}_test.pk.npz")
    ood: dict[str, Tensor] = {}
    if task == "heldout":
        unknown = own_test.images[own_test.labels >= HELDOUT_CLASSES]
        ood["heldout_classes"] = unknown[:OOD]
        everything, own_test = (_known(split) for split in (everything, own_test))
    n_train, n_validation = (SMOKE_TRAIN, SMOKE_OTHERS) if smoke else (TRAIN, VALIDATION)
    n_test, n_ood = (SMOKE_OTHERS, SMOKE_OTHERS) if smoke else (TEST, OOD)
    order = torch.randperm(len(everything.labels), generator=generator)
    train, validation = order[:n_train], order[n_train : n_train + n_validation]
    test = Split(own_test.images[:n_test], own_test.labels[:n_test])
    for other in (OTHER[task], "notmnist"):
        ood[other] = packed(data / other / f"{other}_test.pk.npz").images[:n_ood]
    noise = torch.Generator().manual_seed(1234)  # the same for every seed, as the test rows are
    ood["uniform_noise"] = torch.rand(n_ood, 1, 28, 28, generator=noise)
    some = test.images[:n_ood]
    ood["noisy"] = (some + NOISE_SD * torch.randn(some.shape, generator=noise)).clamp(0, 1)

    def standardised(images: Tensor) -> Tensor:
        return (images - mean) / sd

    def rows(chosen: Tensor) -> Split:
        return Split(standardised(everything.images[chosen]), everything.labels[chosen])

    return ImageTask(
        rows(train),
        rows(validation),
        Split(standardised(test.images), test.labels),
        {angle: standardised(rotate(test.images[:ROTATED], angle)) for angle in ANGLES},
        {name: standardised(images[:n_ood]) for name, images in ood.items()},
    )


def _known(split: Split) -> Split:
    kept = split.labels < HELDOUT_CLASSES
    return Split(split.images[kept], split.labels[kept])


def rotate(images: Tensor, degrees: float) -> Tensor:
    """Images (N, C, H, W) turned about their middle, bilinear, black outside."""
    angle = math.radians(degrees)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]])
    grid = F.affine_grid(turn.expand(len(images), -1, -1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def load_digit_rows(network: str, seed: int, smoke: bool = False) -> tuple[Split, Split, Split]:
    """Training, validation and test rows of the digits."""
    n_train = 60 if smoke else DIGITS_TRAIN[network]
    return load_digits(seed, n_train, (1797 - n_train) // 2)


class LeNet(nn.Module):
    """LeNet with tanh for 28x28 images; 44,426 weights with ten classes."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 5), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.MaxPool2d(2)
        )
        self.head = nn.Sequential(nn.Linear(256, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, classes))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, 28, 28) -> (B, classes) logits."""
        return self.head(self.features(images).flatten(1))


def digit_network(network: str) -> nn.Module:
    """A fresh network for 8x8 images: "mlp", "cnn" or "vit"."""
    if network == "vit":
        return SmallViT()
    if network == "cnn":
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.GELU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.GELU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 10),
        )  # fmt: skip
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10)
    )


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Args:
        steps: of Adam, with a cosine schedule.
        batch_size: rows per step.
        lr: first learning rate.
        prior_precision: of the L2 term a0 |theta|^2 / (2 N) beside the mean loss.
    """

    steps: int
    batch_size: int
    lr: float = 1e-3
    prior_precision: float = 0.3


RECIPES = {
    "mlp": Recipe(1500, 500),
    "cnn": Recipe(1500, 100),
    "vit": Recipe(900, 50, 2e-3),
    "mnist": Recipe(1500, 50, 2e-3, 1.0),
    "fashion_mnist": Recipe(1500, 50, 2e-3, 1.0),
    "heldout": Recipe(1500, 50, 2e-3, 1.0),
}


def trained_digits(network: str, seed: int, rows: Split, cache: Path | None = None) -> nn.Module:
    """The digits network of that name, in eval mode."""
    return trained(lambda: digit_network(network), network, seed, rows, cache)


def trained_lenet(task: str, seed: int, rows: Split, classes: int, cache: Path | None = None) -> nn.Module:
    """The LeNet of an image task, in eval mode."""
    return trained(lambda: LeNet(classes), task, seed, rows, cache)


def trained(build: Callable[[], nn.Module], name: str, seed: int, rows: Split, cache: Path | None) -> nn.Module:
    """A classifier trained by `RECIPES[name]`, read from the cache if it was trained before."""
    recipe = RECIPES[name]
    torch.manual_seed(seed)
    model = build()
    told = repr((name, seed, recipe, torch.__version__, str(model), rows.labels.tolist()))
    path = (
        None if cache is None else cache / f"{name}_{seed}_{hashlib.sha256(told.encode()).hexdigest()[:16]}.safetensors"
    )
    if path is not None and path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    adam(model, rows, recipe, seed)
    if path is not None:
        with replacing(path) as whole:
            save_file({key: value.contiguous() for key, value in model.state_dict().items()}, whole)
    return model


def adam(model: nn.Module, rows: Split, recipe: Recipe, seed: int) -> None:
    """Train in place, and leave in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
    model.train()
    order = torch.empty(0, dtype=torch.long)
    for _ in range(recipe.steps):
        if len(order) < min(recipe.batch_size, len(rows.labels)):
            order = torch.randperm(len(rows.labels), generator=generator)
        batch, order = order[: recipe.batch_size], order[recipe.batch_size :]
        square = sum(parameter.square().sum() for parameter in model.parameters())
        loss = F.cross_entropy(model(rows.images[batch]), rows.labels[batch])
        optimizer.zero_grad()
        (loss + recipe.prior_precision / (2 * len(rows.labels)) * square).backward()
        optimizer.step()
        schedule.step()
    model.eval()


def count(model: nn.Module) -> int:
    """Weights of a network."""
    return sum(parameter.numel() for parameter in model.parameters())
