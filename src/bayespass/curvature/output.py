"""The curvature of the negative log-likelihood in the network's output, as a root."""

import torch
from torch import Tensor

from bayespass.likelihood import Likelihood, SigmaNoise, mean_and_log_variance


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
