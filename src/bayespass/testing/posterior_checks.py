"""The contract of a posterior, checked: moments of its samples, subsets, seeds and the file."""

import tempfile
from pathlib import Path

import torch
from torch import nn

from bayespass.posterior.base import Posterior

Z_LIMIT = 5.5


def check_posterior(posterior: Posterior, model: nn.Module, n_samples: int = 2000) -> None:
    """Check one posterior of one model.

    Samples have the stated mean and marginal variance (z-test), equal seeds give equal draws, a
    subset keeps the moments of what is left, and saving and loading give the same posterior.

    Args:
        posterior: to check.
        model: the model it belongs to.
        n_samples: draws for the z-test.

    Raises:
        AssertionError: the posterior breaks its contract; the message says how.
    """
    posterior.check_model(model)
    _check_samples(posterior, n_samples)
    first, second = (next(iter(posterior.sample(1, 3))) for _ in range(2))
    for name in posterior.names:
        assert torch.equal(first[name], second[name]), f"{name}: equal seeds give different draws"
    kept = posterior.names[-1]
    part = posterior.subset([kept])
    assert part.names == (kept,), f"subset kept {part.names} instead of {kept}"
    assert torch.equal(part.variance[kept], posterior.variance[kept]), f"subset changed the variance of {kept}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "posterior.safetensors"
        posterior.save(path, model)
        loaded = Posterior.load(path, model)
    assert type(loaded) is type(posterior), f"a {type(posterior).__name__} came back as {type(loaded).__name__}"
    assert loaded.info == posterior.info, "what the posterior was fitted with changed in the file"
    for name in posterior.names:
        assert torch.equal(loaded.mean[name], posterior.mean[name]), f"{name}: the mean changed in the file"
        assert torch.equal(loaded.variance[name], posterior.variance[name]), f"{name}: the variance changed"


def _check_samples(posterior: Posterior, n_samples: int) -> None:
    total = {name: torch.zeros_like(mean, dtype=torch.float64) for name, mean in posterior.mean.items()}
    square = {name: torch.zeros_like(value) for name, value in total.items()}
    for draw in posterior.sample(n_samples, 0):
        for name, value in draw.items():
            gap = value.double() - posterior.mean[name].double()
            total[name] += gap
            square[name] += gap.square()
    for name in posterior.names:
        variance = posterior.variance[name].double()
        mean_z = (total[name] / n_samples).abs() / (variance / n_samples).sqrt().clamp(min=1e-12)
        variance_z = (square[name] / n_samples / variance.clamp(min=1e-30) - 1).abs() / (2 / n_samples) ** 0.5
        random = variance > 0
        assert not random.any() or float(mean_z[random].max()) < Z_LIMIT, f"{name}: samples miss the mean"
        assert not random.any() or float(variance_z[random].max()) < Z_LIMIT, f"{name}: samples miss the variance"
