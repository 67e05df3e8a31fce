"""Training of the demo: AdamW first, then IVON turns the network into a posterior."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from bayespass.demo.digits import Split
from bayespass.posterior.ivon import IVON
from bayespass.posterior.mean_field import DiagonalGaussian
from bayespass.progress import track


@dataclass(frozen=True)
class Recipe:
    """How one network is trained.

    Args:
        n_train: training images.
        epochs: of AdamW.
        lr: largest learning rate of AdamW.
        ivon_epochs: of IVON.
        ivon_lr: first learning rate of IVON.
        hess_init: h0 of IVON.
        temperature: T of the posterior.
        weight_decay: of both; IVON's prior precision is N times it.
        batch_size: rows per step.
    """

    n_train: int
    epochs: int
    lr: float
    ivon_epochs: int
    ivon_lr: float
    hess_init: float
    temperature: float
    weight_decay: float = 1e-4
    batch_size: int = 50


def train(model: nn.Module, data: Split, recipe: Recipe, seed: int, *, progress: bool) -> DiagonalGaussian:
    """Train in place and return the posterior; the model is left at its mean, in eval mode.

    Args:
        model: freshly initialised.
        data: training images.
        recipe: settings.
        seed: of batches and weight noise.
        progress: show progress bars.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = len(data.labels) // recipe.batch_size
    model.train()

    def epochs(count: int, title: str, step: Callable[[torch.Tensor], None]) -> None:
        for _ in track(range(count), title, show=progress):
            for rows in torch.randperm(len(data.labels), generator=generator).split(recipe.batch_size)[:steps]:
                step(rows)

    def loss(rows: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(data.images[rows]), data.labels[rows])

    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    schedule = OneCycleLR(optimizer, recipe.lr, total_steps=recipe.epochs * steps)

    def ordinary_step(rows: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss(rows).backward()
        optimizer.step()
        schedule.step()

    epochs(recipe.epochs, "training (AdamW)", ordinary_step)

    n_data = len(data.labels)
    method = IVON(
        model.named_parameters(),
        lr=recipe.ivon_lr,
        n_data=n_data,
        prior_precision=recipe.weight_decay * n_data,
        temperature=recipe.temperature,
        hess_init=recipe.hess_init,
        seed=seed,
    )
    ivon_schedule = CosineAnnealingLR(method, recipe.ivon_epochs * steps)

    def posterior_step(rows: torch.Tensor) -> None:
        with method.sampled():
            loss(rows).backward()
        method.step()
        ivon_schedule.step()

    epochs(recipe.ivon_epochs, "posterior (IVON)", posterior_step)
    model.eval()
    return method.posterior()
