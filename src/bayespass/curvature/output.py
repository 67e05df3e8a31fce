"""What is differentiated: the network's outputs, the root of the curvature there times them, or the loss.

Rows of a batch have R scalars each; `Rows` maps outputs (n, ...) and targets to them, (n, R).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bayespass.likelihood import Likelihood, SigmaNoise, gaussian_log_losses, mean_and_log_variance

Rows = Callable[[Tensor, Tensor | None], Tensor]


def output_root(outputs: Tensor, likelihood: Likelihood, sigma_noise: SigmaNoise | None = None) -> Tensor:
    """S with S^T S the Fisher matrix of every position's outputs, which for a categorical likelihood is the Hessian.

    Categorical: rows sqrt(p_c) (e_c - p), so that S^T S = diag(p) - p p^T. Gaussian: I / sigma. Gaussian with
    predicted (mean, log variance s): diag(exp(-s/2), sqrt(1/2)).

    Args:
        outputs: (N, ..., C) logits, means, or means and log variances; (N,) means one output per row.
        likelihood: which of the two.
        sigma_noise: sd of the observation noise, or "predicted", for regression.

    Returns:
        (N, K, C, C), K the number of positions of a row.
    """
    flat = outputs.detach().reshape(len(outputs), -1, outputs.shape[-1] if outputs.dim() > 1 else 1)
    identity = torch.eye(flat.shape[-1], dtype=flat.dtype, device=flat.device)
    if likelihood == "classification":
        p = torch.softmax(flat, -1)
        return p.sqrt()[..., None] * (identity - p[..., None, :])
    if sigma_noise == "predicted":
        precision = torch.exp(-mean_and_log_variance(flat)[1] / 2)
        return torch.diag_embed(torch.stack([precision, torch.full_like(precision, 0.5**0.5)], -1))
    return (identity / float(sigma_noise or 1.0)).expand(*flat.shape[:2], -1, -1)


def output_rows(outputs: Tensor, targets: Tensor | None = None) -> Tensor:  # noqa: ARG001
    """(n, R) all outputs of every row."""
    return outputs.reshape(len(outputs), -1)


def curvature_rows(likelihood: Likelihood, sigma_noise: SigmaNoise | None = None) -> Rows:
    """Rows H^(1/2) f with H the curvature of the negative log-likelihood in the outputs: J^T J is the GGN.

    Args:
        likelihood: "classification" or "regression".
        sigma_noise: sd of the observation noise, or "predicted", for regression.
    """

    def rows(outputs: Tensor, targets: Tensor | None = None) -> Tensor:  # noqa: ARG001
        root = output_root(outputs, likelihood, sigma_noise)
        flat = outputs.reshape(*root.shape[:2], root.shape[-1])
        return (root @ flat[..., None]).reshape(len(outputs), -1)

    return rows


def loss_rows(likelihood: Likelihood, sigma_noise: SigmaNoise | None = None) -> Rows:
    """(n, 1) the negative log-likelihood of every row, in nats and up to a constant.

    Args:
        likelihood: "classification" or "regression".
        sigma_noise: sd of the observation noise, or "predicted", for regression.
    """

    def rows(outputs: Tensor, targets: Tensor | None) -> Tensor:
        assert targets is not None
        if likelihood == "classification":
            each = -torch.log_softmax(outputs, -1).gather(-1, targets.long().unsqueeze(-1))
        elif sigma_noise == "predicted":
            each = gaussian_log_losses(outputs, targets)
        else:
            each = ((targets - outputs) / float(sigma_noise or 1.0)).square() / 2
        return each.reshape(len(outputs), -1).sum(1, keepdim=True)

    return rows
