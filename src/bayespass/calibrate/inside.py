"""What Monte Carlo says inside the network: moments of what its parts give out.

A part is a module that has modules of its own: a block, its attention, a stage of a convolutional network. The
outputs alone leave open which site is to blame for an error, so that factors fitted to them compensate each
other: variances and means of inner features drift away from Monte Carlo's while the outputs improve little. With
the parts beside them every site answers for its own error (docs/assumptions.md#calibration).
"""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bayespass.gaussian import GaussianTensor, read
from bayespass.predict.sampling import in_single_precision

MAX_ENTRIES = 4096  # of a part's output that are kept
MAX_CALLS = 8  # of a part in one forward pass that are looked at
FLOOR = 0.1  # of a part's mean variance, added to every variance: entries that hardly vary hardly count

# Path of the part, number of the call, number and shape of the tensor in its output: rows that are routed by what was
# drawn come in another number every time, and are then no place that all draws have.
Place = tuple[str, int, int, torch.Size]
Inner = dict[Place, tuple[Tensor, Tensor]]  # mean and variance of the entries that are kept, (E,) each


class Inside:
    """Keeps some entries of the output of every part while a model runs, the same ones in every run on as many rows.

    Args:
        model: hooks stay on it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._found: dict[Place, Any] = {}
        self._calls: dict[str, int] = {}
        for path, module in model.named_modules():
            if path and next(module.children(), None) is not None:
                module.register_forward_hook(self._keeper(path))

    def take(self) -> dict[Place, Any]:
        """What was kept since the last call: (E,) of plain tensors, their mean and variance of Gaussian ones."""
        found, self._found, self._calls = self._found, {}, {}
        return found

    def _keeper(self, path: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
            call = self._calls[path] = self._calls.get(path, -1) + 1
            if call >= MAX_CALLS:
                return
            for number, leaf in enumerate(pytree.tree_leaves(output)):
                if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel():
                    self._found[path, call, number, leaf.shape] = _entries(leaf)

        return keep


def _entries(leaf: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    chosen = _chosen(leaf.numel()).to(leaf.device)
    if not isinstance(leaf, GaussianTensor):
        return in_single_precision(leaf).flatten()[chosen]
    x = read(leaf)
    mean = in_single_precision(x.mean)
    variance = torch.zeros_like(mean) if x.var is None else in_single_precision(x.var).expand_as(mean)
    return mean.flatten()[chosen], variance.flatten()[chosen]


@lru_cache(maxsize=64)
def _chosen(count: int) -> Tensor:
    """Which of so many entries are kept."""
    if count <= MAX_ENTRIES:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(count))[:MAX_ENTRIES]


def inner_distance(found: dict[Place, Any], truth: Inner) -> Tensor:
    """Mean over parts of the mean KL(N_MC || N_found) of their entries, in nats; zero where there is no part.

    To both variances a tenth of the mean variance of the part's entries is added. Parts without variance are left out,
    those where a draw overflowed, and those that are no Gaussian in the propagation.

    Args:
        found: by the propagation, as `Inside.take` has it.
        truth: by Monte Carlo.
    """
    distances = []
    for place, (true_mean, true_variance) in truth.items():
        level = true_variance.mean()
        kept = found.get(place)
        if not isinstance(kept, tuple) or not 0 < level < math.inf:
            continue
        mean, variance = kept
        true, own = true_variance + FLOOR * level, variance + FLOOR * level
        ratio = true / own
        distances.append(0.5 * (ratio - 1 - ratio.log() + (true_mean - mean).square() / own).mean())
    return torch.stack(distances).mean() if distances else torch.zeros(())
