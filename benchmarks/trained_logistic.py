"""How close each variational method comes to the best mean-field Gaussian, where that one is known.

    from trained_logistic import cells, run_cell, summarise
    run_cell("logistic_full", "advi", seed=0)

Bayesian logistic regression: 500 rows, 10 features with pairwise correlation 0.7, prior N(0, 1), all
500 rows or 50 random ones per step, two antithetic draws. The ELBO of a mean-field Gaussian is a sum
of one-dimensional integrals there, so Gauss-Hermite quadrature gives it to ten digits and the
optimum is found without noise. The gap is NELBO minus the NELBO of that optimum, in nats.

Banana: -log p = x^2 / 4 + (y + x^2 / 2 + 2/5)^2, 16 antithetic draws, 2,000 steps; its ELBO is a
polynomial. Two modes: 0.3 N(-3, 0.5^2) + 0.7 N(3, 0.5^2), started at -1 and at 1 with sd 1; KL by
quadrature. The mixture has two components of equal weight, which it does not learn, started at -1
and 1.

All methods start at mean 0 and sd 0.1 (banana 0.5) and take the same number of steps, with a cosine
schedule that ends there; 100 and 8,000 steps are two runs, not two readings of one. Every method has
a grid of three settings and is shown at the best of them, step count by step count, on the mean over
runs: ADVI, sticking the landing and the gradient form of score-based VI have one and the same grid.
Rates that a schedule does not bring down, and those of Adam, shrink as one over the step count.
Eight runs with their own data, batches and noise train side by side on a leading axis; every method
here works entry by entry, so they are as independent as eight programs.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from bayespass.posterior.elbo import MeanFieldVI
from bayespass.posterior.ivon import IVON
from bayespass.posterior.method import TrainingMethod
from bayespass.posterior.mixture import Mixture
from bayespass.posterior.score_matching import ScoreVI
from bayespass.posterior.score_mixture import ScoreVIMixture
from bayespass.posterior.score_sgd import ScoreVISGD

RUNS, ROWS, FEATURES, BATCH, CORRELATION = 8, 500, 10, 50, 0.7
NODES = 40  # of Gauss-Hermite
HORIZONS = (100, 500, 2000, 8000)
WEIGHT, MODE, MODE_SD = 0.3, 3.0, 0.5
BIMODAL_STEPS = 1000
MIXTURE_RUNS = 2  # its responsibilities join all entries, so runs cannot share a parameter

ADAM = tuple({"lr": rate} for rate in (15.0, 30.0, 60.0))
NEWTON = ((0.05, 2.0), (0.3, 2.0), (0.3, 0.5))
GRIDS: dict[str, tuple[dict[str, float], ...]] = {  # rates marked below are divided by the number of steps
    "advi": ADAM,
    "stl": ADAM,
    "score_vi_sgd": ADAM,
    "score_vi_sgd_inner5": ADAM,
    "score_vi": tuple({"lr": lr, "precision_lr": rate} for lr, rate in NEWTON),
    "ivon": tuple({"lr": 2 * lr, "beta2": 4 * rate} for lr, rate in NEWTON),
}
TASKS = {
    "logistic_full": tuple(GRIDS),
    "logistic_minibatch": tuple(GRIDS),
    "banana": tuple(name for name in GRIDS if name != "stl"),  # to the last digit score_vi_sgd there
    "bimodal": ("advi", "score_vi_sgd", "score_vi", "score_vi_mixture"),
}


@dataclass(frozen=True)
class Target:
    """A density of which every run sees its own version.

    Args:
        shape: (runs, entries) of the parameters.
        n_data: N; the density is exp(-N mean loss - a0/2 |theta|^2).
        prior_precision: a0.
        batch: rows for one step, from a generator.
        loss: mean loss of parameters (grid, runs, entries) on a batch, summed over grid and runs.
        nelbo: negative ELBO of means and variances, (..., runs, entries) to (..., runs).
        start_sd: where every method starts.
        n_samples: antithetic draws per step.
        horizons: step counts.
    """

    shape: tuple[int, int]
    n_data: int
    prior_precision: float
    batch: Callable[[torch.Generator], Any]
    loss: Callable[[Tensor, Any], Tensor]
    nelbo: Callable[[Tensor, Tensor], Tensor]
    start_sd: float
    n_samples: int
    horizons: tuple[int, ...]


def logistic(seed: int, batch_size: int | None) -> Target:
    """Bayesian logistic regression; None takes all rows at every step."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    shared, own = torch.randn(RUNS, ROWS, 1, **draw), torch.randn(RUNS, ROWS, FEATURES, **draw)
    inputs = CORRELATION**0.5 * shared + (1 - CORRELATION) ** 0.5 * own
    weights = torch.randn(RUNS, FEATURES, 1, **draw)
    labels = (torch.rand(RUNS, ROWS, **draw) < (inputs @ weights).squeeze(-1).sigmoid()).double()
    signed = inputs * (2 * labels - 1).unsqueeze(-1)  # -log p = softplus(-signed . theta)
    nodes, node_weights = (torch.tensor(each) for each in np.polynomial.hermite_e.hermegauss(NODES))
    node_weights = node_weights / node_weights.sum()
    runs = torch.arange(RUNS).unsqueeze(1)

    def batch(generator: torch.Generator) -> Tensor:
        if batch_size is None:
            return signed
        return signed[runs, torch.randint(ROWS, (RUNS, batch_size), generator=generator)]

    def loss(theta: Tensor, rows: Tensor) -> Tensor:
        return F.softplus(-torch.einsum("rnd,grd->grn", rows, theta)).mean(-1).sum()

    def nelbo(mean: Tensor, variance: Tensor) -> Tensor:
        centre = torch.einsum("rnd,...rd->...rn", signed, mean)
        spread = torch.einsum("rnd,...rd->...rn", signed.square(), variance).sqrt()
        data = F.softplus(-(centre.unsqueeze(-1) + spread.unsqueeze(-1) * nodes)) @ node_weights
        return data.sum(-1) + 0.5 * (mean.square() + variance - variance.log() - 1).sum(-1)

    return Target((RUNS, FEATURES), ROWS, 1.0, batch, loss, nelbo, 0.1, 2, HORIZONS)


def banana() -> Target:
    """The banana-shaped density; the prior that every method adds is taken out of the loss."""
    prior_precision = 0.01

    def loss(theta: Tensor, rows: None) -> Tensor:
        del rows
        x, y = theta.unbind(-1)
        energy = x.square() / 4 + (y + x.square() / 2 + 0.4).square()
        return (energy - prior_precision / 2 * theta.square().sum(-1)).sum()

    def nelbo(mean: Tensor, variance: Tensor) -> Tensor:
        (x, y), (v, w) = mean.unbind(-1), variance.unbind(-1)
        ridge = y + (x.square() + v) / 2 + 0.4
        spread = w + (2 * v.square() + 4 * x.square() * v) / 4
        entropy = 0.5 * (2 * math.pi * math.e * variance).log().sum(-1)
        return (x.square() + v) / 4 + ridge.square() + spread - entropy

    return Target((RUNS, 2), 1, prior_precision, lambda _: None, loss, nelbo, 0.5, 16, (2000,))


def optimum(target: Target) -> tuple[Tensor, Tensor, Tensor, float]:
    """Mean, variance and NELBO of the best mean-field Gaussian, and the largest gradient left."""
    mean = torch.zeros(target.shape, dtype=torch.float64, requires_grad=True)
    log_sd = torch.full(target.shape, math.log(target.start_sd), dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [mean, log_sd], max_iter=2000, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        total = target.nelbo(mean, (2 * log_sd).exp()).sum()
        total.backward()
        return total

    solver.step(closure)
    closure()
    left = max(float(each.grad.abs().max()) for each in (mean, log_sd) if each.grad is not None)
    with torch.no_grad():
        variance = (2 * log_sd).exp()
        return mean.detach(), variance, target.nelbo(mean, variance), left


def grid(name: str, n_steps: int) -> list[dict[str, Any]]:
    """The settings of a method, one parameter group each; most rates shrink with the number of steps."""
    settings = GRIDS[name]
    if name == "ivon":
        return [{"lr": each["lr"], "betas": (0.9, 1 - each["beta2"] / n_steps)} for each in settings]
    if name == "score_vi":
        return [{"lr": each["lr"], "precision_lr": each["precision_lr"] / n_steps} for each in settings]
    return [{"lr": each["lr"] / n_steps} for each in settings]


def make_method(name: str, parameters: nn.ParameterList, target: Target, n_steps: int, seed: int) -> TrainingMethod:
    """The method with one parameter group for every setting of its grid."""
    settings = grid(name, n_steps)
    named = list(parameters.named_parameters())
    groups = [{"params": [pair], **setting} for pair, setting in zip(named, settings, strict=True)]
    common: dict[str, Any] = {"n_data": target.n_data, "prior_precision": target.prior_precision, "seed": seed}
    common |= {"n_samples": target.n_samples, "antithetic": True, "lr": 0.01}
    if name == "ivon":  # sd 1 / sqrt(N (h0 + a0 / N))
        curvature = (target.start_sd**-2 - target.prior_precision) / target.n_data
        return IVON(groups, **common, hess_init=curvature)
    if name == "score_vi":
        return ScoreVI(groups, **common, init_sd=target.start_sd)
    common |= {"init_sd": target.start_sd, "sd_lr": 0.01}
    if name in ("advi", "stl"):
        return MeanFieldVI(groups, **common, gradient="closed" if name == "advi" else "stl")
    return ScoreVISGD(groups, **common, inner=5 if name.endswith("inner5") else 1, prox=1.0)


def train(
    method: TrainingMethod, parameters: nn.ParameterList, target: Target, n_steps: int, generator: torch.Generator
) -> None:
    """Steps with a cosine schedule to zero."""
    rate = LambdaLR(method, lambda step: 0.5 * (1 + math.cos(math.pi * step / n_steps)))
    for _ in range(n_steps):
        rows = target.batch(generator)  # one batch for all draws of a step

        def closure(rows: Any = rows) -> Tensor:
            loss = target.loss(torch.stack(list(parameters)), rows)
            loss.backward()
            return loss

        method.step(closure)
        rate.step()


def trained(target: Target, name: str, n_steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Means and variances after training, (grid, runs, entries)."""
    parameters = nn.ParameterList([torch.zeros(target.shape, dtype=torch.float64) for _ in GRIDS[name]])
    method = make_method(name, parameters, target, n_steps, seed)
    train(method, parameters, target, n_steps, torch.Generator().manual_seed(seed + 1))
    posterior = method.posterior()
    mean, variance = (torch.stack(list(each.values())).double() for each in (posterior.mean, posterior.variance))
    return mean, variance


def run_cell(task: str, method: str, seed: int = 0, data: Path | None = None) -> dict[str, Any]:
    """Train one method on one target with every setting of its grid.

    Args:
        task: one of `TASKS`.
        method: one of the task's methods.
        seed: of the first run; data, batches and noise follow from it.
        data: not needed.

    Returns:
        for every step count H: gap_H and its standard error over runs, at the best setting, and which
        one that is; after the last also sd_ratio and mean_error_sd, against the optimum. For two modes
        kl, mean and sd from either start.
    """
    del data
    start = time.perf_counter()
    row: dict[str, Any] = {"task": task, "method": method, "seed": seed}
    if task == "bimodal":
        found = bimodal_mixture(seed) if method == "score_vi_mixture" else bimodal(method, seed)
        return row | found | {"seconds": time.perf_counter() - start}
    target = banana() if task == "banana" else logistic(seed, BATCH if task == "logistic_minibatch" else None)
    best_mean, best_variance, best, left = optimum(target)
    row |= {"runs": RUNS, "optimum_gradient": left}
    if task == "banana":
        row["nelbo_optimum"] = float(best.mean())
    for horizon in target.horizons:
        mean, variance = trained(target, method, horizon, seed)
        gaps = target.nelbo(mean, variance) - best
        chosen = int(gaps.mean(1).nan_to_num(math.inf).argmin())
        row[f"gap_{horizon}"] = float(gaps[chosen].mean())
        row[f"gap_{horizon}_se"] = float(gaps[chosen].std() / RUNS**0.5)
        row[f"gap_{horizon}_grid"] = [float(gap) for gap in gaps.mean(1)]
        row[f"setting_{horizon}"] = chosen
    error, ratio = (mean[chosen] - best_mean) / best_variance.sqrt(), (variance[chosen] / best_variance).sqrt()
    row |= {"mean_error_sd": float(error.abs().max()), "sd_ratio_min": float(ratio.min())}
    row |= {"sd_ratio_max": float(ratio.max()), "seconds": time.perf_counter() - start}
    return row


def bimodal_energy(theta: Tensor) -> Tensor:
    """-log p of the two modes."""
    logs = [math.log(w) - 0.5 * ((theta - m) / MODE_SD).square() for w, m in ((WEIGHT, -MODE), (1 - WEIGHT, MODE))]
    return math.log(MODE_SD * math.sqrt(2 * math.pi)) - torch.logaddexp(*logs)


def kl_to_modes(weights: Tensor, means: Tensor, sds: Tensor) -> Tensor:
    """KL(q || p) of mixtures (..., components) in nats, by the trapezoidal rule."""
    grid = torch.linspace(-20, 20, 20001, dtype=torch.float64)
    parts = torch.distributions.Normal(means.unsqueeze(-1), sds.unsqueeze(-1)).log_prob(grid)
    log_q = (weights.log().unsqueeze(-1) + parts).logsumexp(-2)
    return torch.trapezoid(log_q.exp() * (log_q + bimodal_energy(grid)), grid)


BIMODAL_PRIOR = 0.01


def bimodal_loss(theta: Tensor) -> Tensor:
    """The loss of either start and run, summed, without the prior that the method adds."""
    return (bimodal_energy(theta) - BIMODAL_PRIOR / 2 * theta.square()).sum()


def bimodal(name: str, seed: int) -> dict[str, float]:
    """One Gaussian for two modes, from either side."""
    starts = torch.tensor([[-1.0], [1.0]], dtype=torch.float64).expand(2, RUNS).clone()
    parameter = nn.Parameter(starts)
    common: dict[str, Any] = {"n_data": 1, "prior_precision": BIMODAL_PRIOR, "init_sd": 1.0, "seed": seed}
    common |= {"n_samples": 2, "antithetic": True}
    kinds: dict[str, Callable[..., TrainingMethod]] = {
        "advi": lambda p: MeanFieldVI(p, lr=0.03, sd_lr=0.03, **common),
        "score_vi_sgd": lambda p: ScoreVISGD(p, lr=0.03, sd_lr=0.03, inner=5, **common),
        "score_vi": lambda p: ScoreVI(p, lr=0.05, precision_lr=0.003, **common),
    }
    method = kinds[name]([("theta", parameter)])
    rate = LambdaLR(method, lambda step: 0.5 * (1 + math.cos(math.pi * step / BIMODAL_STEPS)))

    def closure() -> Tensor:
        loss = bimodal_loss(parameter)
        loss.backward()
        return loss

    for _ in range(BIMODAL_STEPS):
        method.step(closure)
        rate.step()
    posterior = method.posterior()
    mean, sd = posterior.mean["theta"].double(), posterior.variance["theta"].double().sqrt()
    divergence = kl_to_modes(torch.ones(2, RUNS, 1, dtype=torch.float64), mean.unsqueeze(-1), sd.unsqueeze(-1))
    row: dict[str, float] = {}
    for index, side in enumerate(("left", "right")):
        row |= {f"kl_from_{side}": float(divergence[index].mean()), f"mean_from_{side}": float(mean[index].mean())}
        row |= {f"sd_from_{side}": float(sd[index].mean()), f"kl_from_{side}_sd": float(divergence[index].std())}
    row["collapsed"] = float((mean.abs() > MODE - MODE_SD).double().mean())
    return row


def bimodal_mixture(seed: int) -> dict[str, float]:
    """Two components of equal weight for two modes: means and sds are learned, weights are not."""
    figures = []
    for run in range(MIXTURE_RUNS):
        parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        starts = [{"theta": torch.tensor([start], dtype=torch.float64)} for start in (-1.0, 1.0)]
        method = ScoreVIMixture(
            [("theta", parameter)],
            lr=0.03,
            sd_lr=0.03,
            n_data=1,
            prior_precision=BIMODAL_PRIOR,
            starts=starts,
            init_sd=1.0,
            n_samples=2,
            seed=seed + run,
        )
        rate = LambdaLR(method, lambda step: 0.5 * (1 + math.cos(math.pi * step / BIMODAL_STEPS)))
        for _ in range(BIMODAL_STEPS):
            for _ in range(method.n_samples):
                with method.sampled():
                    bimodal_loss(parameter).backward()
            method.step()
            rate.step()
        posterior = method.posterior()
        assert isinstance(posterior, Mixture)
        means, sds = (
            torch.tensor([float(value(each)) for each in posterior.components], dtype=torch.float64)
            for value in (lambda q: q.mean["theta"], lambda q: q.variance["theta"].sqrt())
        )
        true = torch.tensor([WEIGHT, 1 - WEIGHT], dtype=torch.float64)
        figures.append(
            {
                "weight_left": float(posterior.weights[means.argmin()]),
                "weight_left_true": WEIGHT,
                "mean_left": float(means.min()),
                "mean_right": float(means.max()),
                "sd_left": float(sds[means.argmin()]),
                "sd_right": float(sds[means.argmax()]),
                "kl": float(kl_to_modes(posterior.weights, means, sds)),
                "kl_with_true_weights": float(kl_to_modes(true[means.argsort().argsort()], means, sds)),
            }
        )
    return {key: sum(figure[key] for figure in figures) / len(figures) for key in figures[0]}


def cells(seeds: Iterator[int] | list[int] | tuple[int, ...] = (0,)) -> list[tuple[str, str, int]]:
    """(task, method, seed); one seed, the first, since its eight runs are as many seeds."""
    return [(task, method, next(iter(seeds))) for task, methods in TASKS.items() for method in methods]


def summarise(rows: list[dict[str, Any]]) -> dict[str, float]:
    """`logistic.full.METHOD.gap_STEPS`, `banana.METHOD.gap_2000`, `bimodal.METHOD.FIGURE`, and the ratios to ADVI."""
    summary: dict[str, float] = {}
    for row in rows:
        prefix = f"{row['task'].replace('_', '.')}.{row['method']}"
        for key, value in row.items():
            if isinstance(value, float) and key not in ("seconds", "optimum_gradient"):
                summary[f"{prefix}.{key}"] = value
    for form in ("score_vi_sgd", "score_vi_sgd_inner5", "score_vi"):
        for task in ("full", "minibatch"):
            for horizon in HORIZONS:
                keys = [f"logistic.{task}.{each}.gap_{horizon}" for each in (form, "advi")]
                if all(key in summary for key in keys):
                    ratio = summary[keys[0]] / summary[keys[1]]
                    summary[f"{form}.gap_over_advi_{task}_{horizon}"] = ratio
                    if horizon == 2000:
                        summary[f"{form}.gap_over_advi_{task}"] = ratio
    return summary
