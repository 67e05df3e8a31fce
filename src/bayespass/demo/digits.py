"""scikit-learn's handwritten digits: real 8x8 images that ship with the package."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

PIXEL_MEAN, PIXEL_SD = 0.305, 0.376  # of all pixels, scaled to [0, 1]


@dataclass(frozen=True)
class Split:
    """Images and labels.

    Args:
        images: (N, 1, 8, 8) standardised.
        labels: (N,) in [0, 10).
    """

    images: Tensor
    labels: Tensor

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """In order, as (images, labels)."""
        return list(zip(self.images.split(size), self.labels.split(size), strict=True))


def load_digits(seed: int, n_train: int, n_calibration: int) -> tuple[Split, Split, Split]:
    """A random split into training, calibration and test images.

    Args:
        seed: of the shuffle.
        n_train: images for training.
        n_calibration: images whose labels are never read, for calibration.

    Returns:
        training, calibration and test splits; the test split is the rest of the 1,797.
    """
    from sklearn.datasets import load_digits as load

    pixels, labels = load(return_X_y=True)
    images = (torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16 - PIXEL_MEAN) / PIXEL_SD
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    targets = torch.from_numpy(labels).long()
    ends = (0, n_train, n_train + n_calibration, len(labels))
    parts = [order[start:end] for start, end in pairwise(ends)]
    train, calibration, test = (Split(images[rows], targets[rows]) for rows in parts)
    return train, calibration, test
