"""Every training method with the same few arguments, and how to run one on many independent chains at once."""

import torch
from problems import LinearRegression
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from bayespass.posterior.elbo import MeanFieldVI
from bayespass.posterior.ivon import IVON
from bayespass.posterior.score_matching import ScoreVI
from bayespass.posterior.score_sgd import ScoreVISGD

METHODS = {
    "ivon": lambda named, **kw: IVON(named, **({"lr": 0.05, "hess_init": 5.0, "betas": (0.9, 0.995)} | kw)),
    "ivon_pairs": lambda named, **kw: METHODS["ivon"](named, antithetic=True, **kw),
    "score_vi": lambda named, **kw: ScoreVI(named, **({"lr": 0.02, "precision_lr": 1e-3, "init_sd": 0.02} | kw)),
    "score_vi_pairs": lambda named, **kw: METHODS["score_vi"](named, antithetic=True, **kw),
    "score_vi_kron": lambda named, **kw: METHODS["score_vi"](named, hessian_structure="kron", antithetic=True, **kw),
    "score_vi_sgd": lambda named, **kw: ScoreVISGD(
        named, **({"lr": 2e-3, "sd_lr": 1e-2, "init_sd": 0.02, "antithetic": True} | kw)
    ),
    "elbo": lambda named, **kw: MeanFieldVI(
        named, **({"lr": 2e-3, "sd_lr": 1e-2, "init_sd": 0.02, "antithetic": True} | kw)
    ),
    "elbo_stl": lambda named, **kw: METHODS["elbo"](named, gradient="stl", **kw),
}


CHAINS = 16


class Chains(nn.Module):
    """Independent copies of one regression: the methods work entry by entry, so each is a run of its own."""

    def __init__(self, problem: LinearRegression, chains: int = CHAINS, offset: float = 0.0):
        super().__init__()
        self.problem = problem
        self.weight = nn.Parameter(problem.mean.expand(chains, -1).clone() + offset)

    def loss(self, batch: int | None = None, generator: torch.Generator | None = None):
        """Mean loss of every chain on rows of its own, summed; the whole data without a batch size."""
        inputs, targets = self.problem.inputs, self.problem.targets
        if batch is None:
            return ((inputs @ self.weight.T - targets).square().mean(0) / (2 * self.problem.sigma_noise**2)).sum()
        rows = torch.randint(len(inputs), (len(self.weight), batch), generator=generator)
        error = (inputs[rows] @ self.weight[..., None] - targets[rows]).squeeze(-1)
        return (error.square().mean(1) / (2 * self.problem.sigma_noise**2)).sum()


def regression_method(name, model, problem: LinearRegression, **settings):
    """The method on a regression problem, its prior and noise included."""
    scale = {"n_data": len(problem.inputs), "prior_precision": problem.prior_precision}
    scale |= {"likelihood": "regression", "sigma_noise": problem.sigma_noise}
    return METHODS[name](model.named_parameters(), **(scale | settings))


def run(chains: Chains, method, steps: int, batch: int | None = None, seed: int = 1):
    """Train at a falling rate from trained weights.

    Returns precision and mean (d,), averaged over the last third and over chains: what is left is bias.
    """
    schedule = LambdaLR(method, lambda step: 1 / (1 + 20 * step / steps))
    log_precision, means = [], []
    for step in range(steps):
        for draw in range(method.n_samples):
            seeds = seed * steps + (
                step if method.antithetic else step * method.n_samples + draw
            )  # pairs share a batch
            with method.sampled():
                chains.loss(batch, torch.Generator().manual_seed(seeds)).backward()
        method.step()
        schedule.step()
        if 3 * step >= 2 * steps and step % 10 == 0:
            posterior = method.posterior()
            log_precision.append(-posterior.variance["weight"].double().log().mean(0))
            means.append(posterior.mean["weight"].double().mean(0))
    return torch.stack(log_precision).mean(0).exp(), torch.stack(means).mean(0)
