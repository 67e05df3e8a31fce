"""The image sets of `trained_images`: rows for training, validation and test, and what is none of them.

Digits: scikit-learn's 1,797 images of 8x8. The same 800 are for testing whatever the seed; the seed
draws those for training from the other 997, 800 for the transformer and 300 for the convolutional
network, and the rest is for validation. Fashion-MNIST: its own 10,000 test
images; the seed draws 10,000 for training and 2,000 for validation from the other 60,000. With `full`
all 60,000 are for training.

Out of distribution, for Fashion-MNIST: 2,000 images each of the test sets of MNIST and notMNIST. For
digits: 500 each of the test sets of Fashion-MNIST and notMNIST, averaged down to 8x8, and 500 of its
own test images whose pixels are shuffled, each in another order. The sets that need the data folder
are left out of digits where there is none.
"""

import importlib.util
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from bayespass.demo.digits import PIXEL_MEAN, PIXEL_SD, Split, load_digits

FASHION_MEAN, FASHION_SD = 0.286, 0.353  # of all training pixels, scaled to [0, 1]
TRAIN = {"digits_vit": 800, "digits_cnn": 300, "fashion_mnist": 10_000}
DIGITS_TEST, FASHION_VALIDATION, DIGITS_OOD, FASHION_OOD = 800, 2000, 500, 2000


@dataclass(frozen=True)
class ImageTask:
    """One draw of a data set.

    Args:
        train: rows to learn from.
        validation: rows that hyper-parameters were chosen on.
        test: rows of the figures.
        ood: standardised images of no known class, by name.
        black: a pixel of value 0, standardised.
        white: a pixel of value 1, standardised.
    """

    train: Split
    validation: Split
    test: Split
    ood: dict[str, Tensor]
    black: float
    white: float

    def to(self, device: str) -> "ImageTask":
        """The same on a device."""

        def moved(split: Split) -> Split:
            return Split(split.images.to(device), split.labels.to(device))

        return replace(
            self,
            train=moved(self.train),
            validation=moved(self.validation),
            test=moved(self.test),
            ood={name: images.to(device) for name, images in self.ood.items()},
        )


def load_images(task: str, seed: int, data: Path, full: bool = False) -> ImageTask:
    """The rows of one seed.

    Args:
        task: "digits_vit", "digits_cnn" or "fashion_mnist".
        seed: draws the rows.
        data: the folder of `fashion_mnist`, `mnist`, `notmnist` and `unpack.py`.
        full: train on all rows; there are none for validation then.
    """
    generator = torch.Generator().manual_seed(seed)
    if task == "fashion_mnist":
        return _fashion_mnist(generator, data, full)
    return _digits(TRAIN[task], generator, data)


def _digits(n_train: int, generator: torch.Generator, data: Path) -> ImageTask:
    test, rest, _ = load_digits(0, DIGITS_TEST, 1797 - DIGITS_TEST)
    order = torch.randperm(len(rest.labels), generator=generator)
    train, validation = _rows(rest, order[:n_train]), _rows(rest, order[n_train:])
    ood = {}
    for name in ("fashion_mnist", "notmnist") if (data / "unpack.py").exists() else ():
        pixels = _some(packed(data / name / f"{name}_test.pk.npz").images, DIGITS_OOD, generator)
        ood[name] = (F.adaptive_avg_pool2d(pixels, 8) - PIXEL_MEAN) / PIXEL_SD
    flat = _some(test.images, DIGITS_OOD, generator).flatten(1)
    shuffled = torch.rand(flat.shape, generator=generator).argsort(1)
    ood["shuffled"] = flat.gather(1, shuffled).view(-1, 1, 8, 8)
    return ImageTask(train, validation, test, ood, -PIXEL_MEAN / PIXEL_SD, (1 - PIXEL_MEAN) / PIXEL_SD)


def _fashion_mnist(generator: torch.Generator, data: Path, full: bool) -> ImageTask:
    def read(name: str, part: str) -> Split:
        split = packed(data / name / f"{name}_{part}.pk.npz")
        return Split((split.images - FASHION_MEAN) / FASHION_SD, split.labels)

    everything, test = read("fashion_mnist", "train"), read("fashion_mnist", "test")
    order = torch.randperm(len(everything.labels), generator=generator)
    n_train = len(order) if full else TRAIN["fashion_mnist"]
    train, validation = order[:n_train], order[n_train : n_train + FASHION_VALIDATION]
    ood = {name: _some(read(name, "test").images, FASHION_OOD, generator) for name in ("mnist", "notmnist")}
    black, white = -FASHION_MEAN / FASHION_SD, (1 - FASHION_MEAN) / FASHION_SD
    return ImageTask(_rows(everything, train), _rows(everything, validation), test, ood, black, white)


@cache
def packed(path: Path) -> Split:
    """Images (N, 1, H, W) with pixels in [0, 1] and the labels of a packed file, by the folder's own reader."""
    spec = importlib.util.spec_from_file_location("unpack", path.parent.parent / "unpack.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pixels, labels = module.load(path)
    return Split(torch.from_numpy(pixels).unsqueeze(1).float() / 255, torch.from_numpy(labels).long())


def _rows(split: Split, rows: Tensor) -> Split:
    return Split(split.images[rows], split.labels[rows])


def _some(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return images[torch.randperm(len(images), generator=generator)[:count]]
