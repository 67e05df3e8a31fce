"""The loss projection on a generative model: where a decoder does not know how pixels look.

    from post_hoc_vae import cells, run_cell, summarise
    row = run_cell("mnist", "loss_projected", seed=0, data=Path("../shared/data"), cache=None)

A convolutional VAE with 20 latents (decoder: 160,329 weights, linear, then two of up-sampling and
convolution) is trained on 1,000 images with pixels in [0, 1]. Then the encoder and the noise of its
latents are frozen, so that training row n is a latent z_n and an image x_n, and the rows of the Jacobian
are the gradients of |x_n - decoder(z_n)|^2 in the decoder's weights, one per image. 16 draws are projected
on its kernel directly, and the decoder is linearised: pixel variances are those of J d. Their scale, the
prior precision, is tuned on 100 validation images by the Gaussian likelihood with the noise's sd at the
training residual.

`sd_train` and so on are pixel sds, averaged over pixels and images, of training and test rows, of another
data set ("ood", encoded and decoded all the same), and of latents from the prior ("prior"). `moved_train`
is the change of the training losses by a draw, first order, over that of unprojected draws: zero by
construction; `sd_train_over_isotropic` is what the projection takes from the pixel sd at training rows: not
much, as one row per image fixes one of its 784 directions. `auroc_sd` tells test images from the other
data set by the mean pixel sd, `auroc_sd_over_isotropic` by the ratio to that without projection,
`auroc_error` by the reconstruction error alone.

The pixels of the picture are kept in the row.
"""

import hashlib
import statistics
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from bayespass.curvature.operator import RowOperator
from bayespass.files import replacing
from bayespass.posterior.null_space import NullSpace
from bayespass.posterior.sampled_gaussian import SampledGaussian
from bayespass.predict.linearised import Linearised
from bayespass.prediction import RegressionPrediction
from post_hoc_models import OTHER, count
from trained_images_data import packed

TASKS = ("mnist", "fashion_mnist")
LATENTS, BATCH, LR, EPOCHS = 20, 50, 2e-3, 60
BETA = 0.02  # weight of the latents' KL beside squared errors: the usual 1/2 sigma^-2 with sigma^2 = 0.01
TRAIN, VALIDATION, TEST = 1000, 100, 200
SMOKE_ROWS, SMOKE_EPOCHS = 100, 2
DRAWS, CHUNK, MAX_MEMORY = 16, 100, 2 * 2**30
TRAIN_SHOWN = 200  # training rows whose pixel sd is averaged
SHOWN = 4  # images of each kind in the picture
STEPS = 4  # from one test image's latent to another's


class Encoder(nn.Module):
    """Mean and log variance of the latents."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.GELU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GELU(),
            nn.Flatten(), nn.Linear(64 * 49, 128), nn.GELU(), nn.Linear(128, 2 * LATENTS),
        )  # fmt: skip

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1, 28, 28) -> two of (B, 20)."""
        mean, log_variance = self.layers(images).chunk(2, -1)
        return mean, log_variance


def decoder() -> nn.Sequential:
    """(B, 20) -> (B, 784) pixels, not confined to [0, 1]."""
    return nn.Sequential(
        nn.Linear(LATENTS, 128), nn.GELU(),
        nn.Linear(128, 24 * 49), nn.GELU(), nn.Unflatten(1, (24, 7, 7)),
        nn.Upsample(scale_factor=2), nn.Conv2d(24, 16, 3, padding=1), nn.GELU(),
        nn.Upsample(scale_factor=2), nn.Conv2d(16, 16, 3, padding=1), nn.GELU(),
        nn.Conv2d(16, 1, 3, padding=1), nn.Flatten(),
    )  # fmt: skip


def squared_errors(outputs: Tensor, targets: Tensor | None) -> Tensor:
    """(n, 1) the summed squared error of every image."""
    assert targets is not None
    return (outputs - targets).square().sum(1, keepdim=True)


def cells(seeds: Sequence[int], smoke: bool = False) -> list[tuple[str, str, int]]:
    """Every (data set, method, seed)."""
    tasks, chosen = (TASKS[:1], seeds[:1]) if smoke else (TASKS, seeds)
    return [(task, "loss_projected", seed) for task in tasks for seed in chosen]


def run_cell(
    task: str, method: str, seed: int, data: Path, cache: Path | None = None, smoke: bool = False
) -> dict[str, Any]:
    """Train, project, and look at other images.

    Args:
        task: one of `TASKS`.
        method: "loss_projected".
        seed: of rows, weights and draws.
        data: the folder of `mnist` and `fashion_mnist`.
        cache: a folder for the trained networks; None trains them anew.
        smoke: few rows and epochs.
    """
    del method
    train, validation, test, other = image_rows(task, seed, data, smoke)
    start = time.perf_counter()
    encoder, model = trained_vae(task, seed, train, cache, SMOKE_EPOCHS if smoke else EPOCHS)
    row: dict[str, Any] = {"training_seconds": time.perf_counter() - start, "weights": count(model), "rows": len(train)}
    noise = torch.Generator().manual_seed(seed)
    latents = {name: encode(encoder, some, noise) for name, some in
               {"train": train, "validation": validation, "test": test, "ood": other}.items()}  # fmt: skip
    images = {"train": train, "validation": validation, "test": test, "ood": other}
    latents["prior"] = torch.randn(len(test), LATENTS, generator=noise)
    with torch.no_grad():
        sigma = float((model(latents["train"]) - train.flatten(1)).square().mean().sqrt())
    start = time.perf_counter()
    method_ = NullSpace(
        model,
        likelihood="regression",
        sigma_noise=sigma,
        rows=squared_errors,
        n_samples=DRAWS,
        solver="direct",
        max_memory=MAX_MEMORY,
        seed=seed,
    ).fit(batches(latents["train"], train))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the edge of the grid or the plain decoder is best
        tuning = method_.optimize_prior_precision(batches(latents["validation"], validation))
    row |= {"fit_seconds": time.perf_counter() - start, "residual": method_.report_.residual}
    row |= {"scale": tuning.best, "at_edge": float(tuning.at_edge), "sigma_noise": sigma}
    posterior = method_.posterior()
    row["moved_train"] = moved(model, latents["train"], train, posterior, tuning.best, seed)
    isotropic = without_projection(posterior, tuning.best, seed)
    start = time.perf_counter()
    few = {name: z[:TRAIN_SHOWN] for name, z in latents.items() if name != "validation"}
    found = {name: predict(Linearised(model, posterior), z) for name, z in few.items()}
    row["predict_seconds"] = (time.perf_counter() - start) / sum(map(len, few.values()))  # of one image
    plain = {name: predict(Linearised(model, isotropic), few[name]) for name in ("train", "test", "ood")}
    row |= {f"sd_{name}": float(pixel_sd(prediction).mean()) for name, prediction in found.items()}
    row["sd_train_over_isotropic"] = row["sd_train"] / float(pixel_sd(plain["train"]).mean())
    mean_sd = {name: pixel_sd(found[name]).mean(1) for name in ("test", "ood")}
    ratio = {name: mean_sd[name] / pixel_sd(plain[name]).mean(1) for name in mean_sd}
    error = {name: (found[name].mean - images[name].flatten(1)).square().mean(1) for name in mean_sd}
    row |= {"auroc_sd": auroc(mean_sd), "auroc_sd_over_isotropic": auroc(ratio), "auroc_error": auroc(error)}
    row |= {f"rmse_{name}": float(value.mean().sqrt()) for name, value in error.items()}
    if seed == 0:
        row["picture"] = picture(model, posterior, latents, images)
    return row


def image_rows(task: str, seed: int, data: Path, smoke: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training, validation, test and other images, pixels in [0, 1]."""
    sizes = (SMOKE_ROWS, SMOKE_ROWS, SMOKE_ROWS) if smoke else (TRAIN, VALIDATION, TEST)
    everything = packed(data / task / f"{task}_train.pk.npz").images
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed))
    train, validation = everything[order[: sizes[0]]], everything[order[sizes[0] : sizes[0] + sizes[1]]]
    test = packed(data / task / f"{task}_test.pk.npz").images[: sizes[2]]
    other = packed(data / OTHER[task] / f"{OTHER[task]}_test.pk.npz").images[: sizes[2]]
    return train, validation, test, other


def trained_vae(task: str, seed: int, images: Tensor, cache: Path | None, epochs: int) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder in eval mode, read from the cache if they were trained before."""
    torch.manual_seed(seed)
    both = nn.ModuleDict({"encoder": Encoder(), "decoder": decoder()})
    told = repr((task, seed, epochs, BETA, BATCH, LR, torch.__version__, str(both), len(images)))
    name = f"vae_{task}_{seed}_{hashlib.sha256(told.encode()).hexdigest()[:16]}.safetensors"
    path = None if cache is None else cache / name
    if path is not None and path.exists():
        both.load_state_dict(load_file(path))
    else:
        _train(both, images, epochs, seed)
        if path is not None:
            with replacing(path) as whole:
                save_file({key: value.contiguous() for key, value in both.state_dict().items()}, whole)
    both.eval()
    return both["encoder"], both["decoder"]


def _train(both: nn.ModuleDict, images: Tensor, epochs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(both.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(images) // BATCH))
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(BATCH):
            mean, log_variance = both["encoder"](images[rows])
            noise = torch.randn(mean.shape, generator=generator)
            outputs = both["decoder"](mean + (log_variance / 2).exp() * noise)
            kl = (mean.square() + log_variance.exp() - log_variance - 1).sum(1) / 2
            loss = (squared_errors(outputs, images[rows].flatten(1))[:, 0] + BETA * kl).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def encode(encoder: nn.Module, images: Tensor, generator: torch.Generator) -> Tensor:
    """(N, 20) latents, their noise drawn once."""
    with torch.no_grad():
        mean, log_variance = encoder(images)
        return mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=generator)


def batches(latents: Tensor, images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Latents and the pixels they stand for."""
    return list(zip(latents.split(CHUNK), images.flatten(1).split(CHUNK), strict=True))


def without_projection(posterior: SampledGaussian, alpha: float, seed: int) -> SampledGaussian:
    """As many draws of the prior alone."""
    generator = torch.Generator().manual_seed(seed + 1)
    draws = {
        name: torch.randn(value.shape, generator=generator) / alpha**0.5
        for name, value in posterior.displacements.items()
    }
    return SampledGaussian(posterior.mean, draws, posterior.info)


def moved(
    model: nn.Module, latents: Tensor, images: Tensor, posterior: SampledGaussian, alpha: float, seed: int
) -> float:
    """The change of the training losses by a draw over that by one of the prior, root mean squares."""
    operator = RowOperator(
        model,
        posterior.names,
        batches(latents, images),
        squared_errors,
        "regression",
        posterior.info.sigma_noise,
        max_memory=MAX_MEMORY,
    )
    squares = []
    for draws in (posterior, without_projection(posterior, alpha, seed)):
        vectors = operator.flatten(draws.displacements)
        parts = [operator.times(block, vectors) for block in range(len(operator.blocks))]
        squares.append(float(torch.cat(parts, 1).double().square().sum()))
    return (squares[0] / squares[1]) ** 0.5


def predict(predictor: Linearised, latents: Tensor) -> RegressionPrediction:
    """Pixels of every latent, with their variance."""
    with torch.inference_mode():
        parts = [predictor(z) for z in latents.split(CHUNK)]
    return RegressionPrediction(
        torch.cat([p.mean for p in parts]),
        torch.cat([p.epistemic for p in parts]),
        torch.cat([p.aleatoric for p in parts]),
    )


def pixel_sd(prediction: RegressionPrediction) -> Tensor:
    """(N, 784) from the posterior."""
    return prediction.epistemic.sqrt()


def auroc(scores: dict[str, Tensor]) -> float:
    """The share of pairs of test and other images that a score ranks rightly."""
    joined = torch.cat([scores["test"], scores["ood"]]).double()
    return float(roc_auc_score([0] * len(scores["test"]) + [1] * len(scores["ood"]), joined))


def picture(
    model: nn.Module, posterior: SampledGaussian, latents: dict[str, Tensor], images: dict[str, Tensor]
) -> list[dict[str, Any]]:
    """Columns of the picture: input (or none), reconstruction and pixel sd, as nested lists of two digits."""
    shown = {name: latents[name][:SHOWN] for name in ("train", "test", "ood", "prior")}
    steps = torch.linspace(0, 1, STEPS)[:, None]
    shown["between"] = latents["test"][:1] * (1 - steps) + latents["test"][1:2] * steps
    columns = []
    for name, z in shown.items():
        prediction = predict(Linearised(model, posterior), z)
        for k in range(len(z)):
            given = images[name][k].flatten() if name in images else None
            kept = {"input": given, "mean": prediction.mean[k], "sd": pixel_sd(prediction)[k]}
            columns.append({"kind": name} | {key: _rounded(value) for key, value in kept.items() if value is not None})
    return columns


def _rounded(pixels: Tensor) -> list[float]:
    return [round(value, 4) for value in pixels.tolist()]


def summarise(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Means over seeds by "vae.data set.figure", and their standard deviation as "..._sd"."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["task"], []).append(row)
    summary = {}
    for task, members in groups.items():
        for figure in [key for key, value in members[0].items() if isinstance(value, float | int) and key != "seed"]:
            values = [row[figure] for row in members]
            summary[f"vae.{task}.{figure}"] = statistics.mean(values)
            if len(values) > 1:
                summary[f"vae.{task}.{figure}_sd"] = statistics.stdev(values)
    return summary
