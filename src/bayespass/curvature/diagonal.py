"""Diagonal curvature from per-example gradients, exact and matrix-free.

For a categorical likelihood the generalised Gauss-Newton matrix equals the Fisher matrix, so its
diagonal is sum_n sum_c p(c | x_n) (d log p(c | x_n) / d theta)^2; for a Gaussian one it is
sum_n sum_o (d f_o(x_n) / d theta)^2 / sigma^2; for one whose network predicts mean and log variance s
the Fisher matrix of the two is diag(exp(-s), 1/2). One target per row drawn from the network's own
predictive makes the same matrix in expectation for one backward pass instead of one per class. The
empirical Fisher uses the observed target instead and is another matrix (Kunstner, Balles and Hennig
2019, arXiv 1905.12558).
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils import _pytree as pytree

from bayespass.batches import call_arguments, device_of, labelled_batches, model_output
from bayespass.curvature.rows import Parameters, chunks, drawn_targets, row_outputs
from bayespass.errors import InvalidInput
from bayespass.likelihood import (
    Likelihood,
    SigmaNoise,
    check_targets,
    gaussian_log_losses,
    mean_and_log_variance,
    negative_log_likelihood,
)
from bayespass.posterior.base import as_generator
from bayespass.progress import track

Curvature = Literal["ggn", "mc", "ef"]


def diagonal_curvature(
    model: nn.Module,
    loader: Iterable[Any],
    names: tuple[str, ...],
    likelihood: Likelihood,
    sigma_noise: SigmaNoise | None = None,
    curvature: Curvature = "ggn",
    chunk_size: int = 32,
    progress: bool = False,
    seed: int = 0,
) -> tuple[Parameters, float, int]:
    """Diagonal of the curvature of the negative log-likelihood, summed over the data.

    Args:
        model: in eval mode; rows of a batch must not interact.
        loader: yields (inputs, targets).
        names: parameters to differentiate.
        likelihood: "classification" or "regression".
        sigma_noise: sd of the observation noise, or "predicted", for regression.
        curvature: "ggn" (exact, one backward pass per class or output), "mc" (type-I Fisher, MC: one
            target per row drawn from the network's own predictive, one backward pass; unbiased for
            "ggn", with noise that falls as 1 / sqrt(N) where rows are alike) or "ef" (empirical Fisher).
        chunk_size: rows whose gradients are held at once.
        progress: show a progress bar.
        seed: of the drawn targets, for "mc"; equal seeds and equal batches give equal curvature.

    Returns:
        curvature by parameter name (float32, without prior), the summed negative log-likelihood
        in nats, and the number of rows N.

    Raises:
        InvalidInput: an unknown curvature, an empty loader, or targets that do not fit.

    Source: Kunstner, Balles and Hennig 2019 (arXiv 1905.12558).
    """
    if curvature not in get_args(Curvature):
        msg = f"curvature must be one of {', '.join(map(repr, get_args(Curvature)))}; got {curvature!r}"
        raise InvalidInput(msg)
    random, outputs = row_outputs(model, names)
    totals = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in random.items()}
    loss, n_data = 0.0, 0

    generator = as_generator(seed, device_of(model))
    squares = _square_gradients(outputs, likelihood, sigma_noise, curvature)
    with torch.no_grad():
        for inputs, targets in track(labelled_batches(loader, device_of(model)), "curvature", show=progress):
            args, kwargs = call_arguments(inputs)
            batch_outputs = model_output(model(*args, **kwargs))
            targets = check_targets(batch_outputs, targets, likelihood, sigma_noise)
            loss += float(negative_log_likelihood(batch_outputs, targets, likelihood, sigma_noise))
            n_data += len(targets)
            if curvature == "mc":
                targets = drawn_targets(batch_outputs, likelihood, sigma_noise, generator)
            for rows, row_targets in chunks(inputs, targets, chunk_size):
                for name, value in squares(random, rows, row_targets).items():
                    totals[name] += value.float()
    return totals, loss, n_data


def _fisher_weights(out: Tensor, likelihood: Likelihood, sigma_noise: SigmaNoise | None) -> Tensor:
    """Weight of the squared gradient of each log probability (classification) or output, of the output's shape."""
    if likelihood == "classification":
        return torch.softmax(out, -1)
    if sigma_noise == "predicted":
        precision = torch.exp(-mean_and_log_variance(out)[1])
        return torch.stack([precision, torch.full_like(precision, 0.5)], -1)
    return torch.full_like(out, 1 / float(sigma_noise or 1.0) ** 2)


def _square_gradients(
    outputs: Callable[[Parameters, Any], Tensor],
    likelihood: Likelihood,
    sigma_noise: SigmaNoise | None,
    curvature: Curvature,
) -> Callable[[Parameters, Any, Tensor], Parameters]:
    """A function of (parameters, rows, targets) that returns the chunk's summed squared gradients.

    "mc" and "ef" differ only in the targets they are given: drawn, or observed. A model that cannot
    run on all rows of a chunk at once under `vmap` is differentiated row by row, with equal results.
    """

    def observed(theta: Parameters, row: Any, target: Tensor) -> Parameters:
        def loss(value: Parameters) -> Tensor:
            out = outputs(value, row)
            if sigma_noise == "predicted":
                return gaussian_log_losses(out, target).sum()
            if likelihood == "regression":  # up to a constant; F.gaussian_nll_loss does not run under vmap
                return ((target - out) / float(sigma_noise or 1.0)).square().sum() / 2
            return negative_log_likelihood(out.unsqueeze(0), target.unsqueeze(0), likelihood, None)

        return {name: g.square() for name, g in grad(loss)(theta).items()}

    def expected(theta: Parameters, row: Any, target: Tensor) -> Parameters:  # noqa: ARG001
        def per_output(index: Tensor, weight: Tensor) -> Parameters:
            def one(value: Parameters) -> Tensor:
                out = outputs(value, row)
                score = torch.log_softmax(out, -1) if likelihood == "classification" else out
                return score.flatten()[index]

            return {name: weight * g.square() for name, g in grad(one)(theta).items()}

        out = outputs(theta, row)
        weights = _fisher_weights(out, likelihood, sigma_noise).flatten()
        each = vmap(per_output, chunk_size=1 if weights.numel() > 64 else None)(
            torch.arange(weights.numel(), device=out.device), weights
        )
        return {name: value.sum(0) for name, value in each.items()}

    single = expected if curvature == "ggn" else observed

    together = True

    def summed(theta: Parameters, rows: Any, targets: Tensor) -> Parameters:
        nonlocal together
        if together:
            try:
                each = vmap(single, in_dims=(None, 0, 0))(theta, rows, targets)
                return {name: value.sum(0) for name, value in each.items()}
            except RuntimeError as error:
                if "vmap" not in str(error):
                    raise
                together = False  # the model branches on its data, as transformers does on padding masks
        found: Parameters = {}
        for (row, _), target in zip(chunks(rows, targets, 1), targets, strict=True):
            row = pytree.tree_map(lambda t: t.squeeze(0) if isinstance(t, Tensor) else t, row)
            for name, value in single(theta, row, target).items():
                found[name] = found[name] + value if name in found else value
        return found

    return summed
