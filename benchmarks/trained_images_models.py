"""The networks of `trained_images`, and how every method trains them."""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from bayespass import IVON, MonteCarlo, Posterior, PosteriorInfo
from bayespass.demo.digits import Split
from bayespass.demo.models import SmallCNN, SmallViT
from bayespass.files import replacing
from bayespass.posterior.elbo import MeanFieldVI
from bayespass.posterior.ensemble import ensemble
from bayespass.posterior.first_layer import fit_first_layer
from bayespass.posterior.score_matching import ScoreVI
from bayespass.predict.sampling import prediction_from_draws
from bayespass.prediction import ClassificationPrediction
from bayespass.training import train

DRAWS, MEMBERS = 32, 5


class FashionCNN(nn.Module):
    """Two convolutions of stride 2 and two linear layers, for 28x28 images; 80,602 weights."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()
        )
        self.head = nn.Sequential(nn.Linear(32 * 49, 48), nn.ReLU(), nn.Linear(48, classes))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, 28, 28) -> (B, classes) logits."""
        return self.head(self.features(images).flatten(1))


@dataclass(frozen=True)
class Network:
    """A network and what does not depend on the method.

    Args:
        build: a fresh one.
        batch_size: rows per step.
        dropped: ends of the paths of the linear layers whose inputs MC-dropout drops.
    """

    build: Callable[[], nn.Module]
    batch_size: int
    dropped: tuple[str, ...] = ("head.0", "head.2")


NETWORKS = {
    "digits_vit": Network(SmallViT, 50, ("attention.out", "mlp.2", "head")),
    "digits_cnn": Network(SmallCNN, 50),
    "fashion_mnist": Network(FashionCNN, 64),
}
METHODS = ("map", "ivon", "score_vi", "elbo", "elbo_t1", "stf", "mc_dropout", "ensemble")
ADAMW: dict[str, dict[str, Any]] = {
    "digits_vit": {"epochs": 50, "lr": 2e-3, "weight_decay": 0.1},
    "digits_cnn": {"epochs": 40, "lr": 2e-3, "weight_decay": 0.1},
    "fashion_mnist": {"epochs": 8, "lr": 3e-3, "weight_decay": 0.1},
}
PRIOR: dict[str, dict[str, float]] = {
    "digits_vit": {"prior_precision": 3.0, "temperature": 0.03},
    "digits_cnn": {"prior_precision": 1.0, "temperature": 0.003},
    "fashion_mnist": {"prior_precision": 10.0, "temperature": 0.1},
}
OWN: dict[tuple[str, str], dict[str, Any]] = {
    ("digits_vit", "ivon"): {"epochs": 30, "lr": 0.1, "hess_init": 0.05, "betas": (0.9, 0.999)},
    ("digits_cnn", "ivon"): {"epochs": 80, "lr": 0.1, "hess_init": 0.1, "betas": (0.9, 0.999)},
    ("fashion_mnist", "ivon"): {"epochs": 10, "lr": 0.1, "hess_init": 0.03, "betas": (0.9, 0.999)},
    ("digits_vit", "score_vi"): {"epochs": 20, "lr": 5e-3, "precision_lr": 2e-3, "init_sd": 0.01},
    ("digits_cnn", "score_vi"): {"epochs": 60, "lr": 5e-3, "precision_lr": 2e-3, "init_sd": 0.005},
    ("fashion_mnist", "score_vi"): {"epochs": 8, "lr": 2e-3, "precision_lr": 1e-3, "init_sd": 0.01},
    ("digits_vit", "elbo"): {"epochs": 20, "lr": 1e-3, "sd_lr": 2e-2, "init_sd": 0.02},
    ("digits_cnn", "elbo"): {"epochs": 60, "lr": 1e-3, "sd_lr": 2e-2, "init_sd": 0.02},
    ("fashion_mnist", "elbo"): {"epochs": 8, "lr": 1e-3, "sd_lr": 1e-2, "init_sd": 0.02},
    ("digits_vit", "stf"): {"epochs": 20},
    ("digits_cnn", "stf"): {"epochs": 60},
    ("fashion_mnist", "stf"): {"epochs": 5},
    ("digits_vit", "mc_dropout"): {"rate": 0.1},
    ("digits_cnn", "mc_dropout"): {"rate": 0.2},
    ("fashion_mnist", "mc_dropout"): {"rate": 0.1},
}


def settings_of(task: str, method: str) -> dict[str, Any]:
    """The chosen settings of a cell; how they were chosen stands in `trained_images`."""
    if method in ("map", "ensemble"):
        return ADAMW[task]
    if method == "mc_dropout":
        return ADAMW[task] | OWN[task, method]
    if method == "elbo_t1":
        return settings_of(task, "elbo") | {"temperature": 1.0}
    return PRIOR[task] | OWN[task, method]


class Shuffled:
    """The rows of a split in batches, in another order in every pass."""

    def __init__(self, split: Split, batch_size: int) -> None:
        self.split, self.batch_size = split, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.split.labels) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(self.split.labels)).to(self.split.labels.device).split(self.batch_size):
            yield self.split.images[rows], self.split.labels[rows]


@dataclass(frozen=True)
class Trained:
    """What one method made.

    Args:
        model: in eval mode, at the mean of the posterior if there is one.
        predictor: its averaged prediction, an `nn.Module` that returns a `ClassificationPrediction`.
        posterior: the Gaussian, for the methods that have one.
        variance_parameters: how many parameters carry variance.
    """

    model: nn.Module
    predictor: nn.Module
    posterior: Posterior | None
    variance_parameters: int


class Plain(nn.Module):
    """The network's own probabilities, or their mean over passes with active dropout."""

    def __init__(self, model: nn.Module, n_passes: int = 1, seed: int = 0) -> None:
        super().__init__()
        self.model, self.n_passes, self.seed = model, n_passes, seed

    def forward(self, images: Tensor) -> ClassificationPrediction:
        """(B, 1, H, W) -> prediction."""
        if self.n_passes == 1:
            logits = self.model(images)
            return ClassificationPrediction(logits.softmax(-1), logits, torch.zeros_like(logits), "map")
        devices = [images.device] if images.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            logits = torch.stack([self.model(images) for _ in range(self.n_passes)])
        return prediction_from_draws(logits, PosteriorInfo(), self.n_passes)  # type: ignore[return-value]


def fit(
    task: str,
    method: str,
    seed: int,
    rows: Split,
    settings: dict[str, Any],
    map_settings: dict[str, Any],
    cache: Path | None = None,
) -> Trained:
    """Train one network by one method.

    Args:
        task: names the network.
        method: one of `METHODS`.
        seed: of weights, batches and draws.
        rows: for training.
        settings: of the method.
        map_settings: of the AdamW run that the method starts from.
        cache: folder that keeps the start, which methods share.
    """
    device = str(rows.images.device)
    if method == "map":
        model = map_network(task, seed, rows, settings, cache)
        return Trained(model, Plain(model), None, 0)
    if method == "mc_dropout":
        model = new_network(task, seed, device, settings["rate"])
        adamw(model, rows, task, seed, settings)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.train()
        return Trained(model, Plain(model, DRAWS, seed), None, behind_dropout(model))
    if method == "ensemble":
        members = [map_network(task, seed + 1000 * k, rows, settings, cache) for k in range(MEMBERS)]
        posterior = ensemble(members, PosteriorInfo(n_data=len(rows.labels), method="ensemble"))
        return Trained(members[0], MonteCarlo(members[0], posterior, MEMBERS, seed), None, _count(members[0]))
    model = map_network(task, seed, rows, map_settings, cache)
    posterior = vi_posterior(task, method, seed, model, rows, settings)
    carrying = sum(mean.numel() for mean in posterior.mean.values())
    return Trained(model, MonteCarlo(model, posterior, DRAWS, seed), posterior, carrying)


def vi_posterior(
    task: str, method: str, seed: int, model: nn.Module, rows: Split, settings: dict[str, Any]
) -> Posterior:
    """The posterior of a method that learns one; the model is left at its mean, in eval mode."""
    loader = Shuffled(rows, NETWORKS[task].batch_size)
    own = method_settings(settings)
    if method == "stf":
        torch.manual_seed(seed)
        posterior = fit_first_layer(
            model, loader, n_data=len(rows.labels), epochs=settings["epochs"], tolerance=None, seed=seed, **own
        )
        model.eval()
        return posterior
    optimizer = make_method(method, model, len(rows.labels), seed, own)
    model.eval()  # batch norms keep the statistics of the trained network
    run(model, optimizer, loader, settings["epochs"], seed, keep_modes=True)
    return optimizer.posterior()  # type: ignore[attr-defined]


def make_method(
    method: str, model: nn.Module, n_data: int, seed: int, settings: dict[str, Any]
) -> torch.optim.Optimizer:
    """The training method of that name over all weights."""
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {"ivon": IVON, "score_vi": ScoreVI, "elbo": MeanFieldVI}
    return kinds[method.removesuffix("_t1")](model.named_parameters(), n_data=n_data, seed=seed, **settings)


def method_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that belong to the method's constructor."""
    return {name: value for name, value in settings.items() if name not in ("epochs", "rate")}


def map_network(task: str, seed: int, rows: Split, settings: dict[str, Any], cache: Path | None = None) -> nn.Module:
    """A network trained by AdamW, in eval mode; read from the cache if it was trained before."""
    device = str(rows.images.device)
    model = new_network(task, seed, device)
    told = repr((task, seed, sorted(settings.items()), device, torch.__version__, rows.labels.tolist()))
    path = (
        None if cache is None else cache / f"{task}_{seed}_{hashlib.sha256(told.encode()).hexdigest()[:16]}.safetensors"
    )
    if path is not None and path.exists():
        model.load_state_dict(load_file(path, device=device))
        return model.eval()
    adamw(model, rows, task, seed, settings)
    if path is not None:
        with replacing(path) as whole:
            save_file({name: value.contiguous() for name, value in model.state_dict().items()}, whole)
    return model


def adamw(model: nn.Module, rows: Split, task: str, seed: int, settings: dict[str, Any]) -> None:
    """Train in place, and leave in eval mode."""
    optimizer = torch.optim.AdamW(model.parameters(), **method_settings(settings))
    run(model, optimizer, Shuffled(rows, NETWORKS[task].batch_size), settings["epochs"], seed)


def run(
    model: nn.Module, optimizer: torch.optim.Optimizer, loader: Shuffled, epochs: int, seed: int, **options: Any
) -> None:
    """Epochs with a cosine schedule after a warm-up of one tenth."""
    steps = epochs * len(loader)
    warm = max(1, steps // 10)
    rate = LambdaLR(optimizer, lambda t: min((t + 1) / warm, 0.5 * (1 + math.cos(math.pi * t / steps))))
    train(model, optimizer, loader, epochs, F.cross_entropy, scheduler=rate, seed=seed, **options)


def new_network(task: str, seed: int, device: str, dropout: float = 0.0) -> nn.Module:
    """A fresh network; with dropout in front of the linear layers that the task names."""
    torch.manual_seed(seed)
    model = NETWORKS[task].build()
    if dropout:
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and path.endswith(NETWORKS[task].dropped):
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, nn.Sequential(nn.Dropout(dropout), module))
    return model.to(device)


def behind_dropout(model: nn.Module) -> int:
    """Weights whose inputs are dropped."""
    pairs = [m for m in model.modules() if isinstance(m, nn.Sequential) and isinstance(m[0], nn.Dropout)]
    return sum(pair[1].weight.numel() for pair in pairs)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
