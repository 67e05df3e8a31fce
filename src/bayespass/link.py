"""Class probabilities from Gaussian logits: E[softmax(z)] for z ~ N(mean, diag(variance)).

    "sobol"       64 fixed quasi-random nodes, deterministic; best up to a few thousand classes
    "delta"       second order in the variance (at most 1), clamped and renormalised
    "top_k"       Sobol nodes on the 256 largest logits, the rest at second order of their sum
    "mean_field"  one-sided mean field, 1 / sum_i exp((m_i - m_k) / sqrt(1 + pi/8 v_k))
    "probit"      softmax(m / sqrt(1 + pi/8 v)): worse than no variance for many classes
    "auto"        "sobol" up to 4,096 classes, "top_k" beyond

Source: single_pass notes 3.5, with measured errors per link, class count and variance.
"""

import math
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from bayespass.errors import InvalidInput

Link = Literal["auto", "sobol", "delta", "top_k", "mean_field", "probit"]

N_NODES = 64
SOBOL_CLASSES = 4096
TOP_CLASSES = 256
DELTA_VARIANCE = 1.0
NODE_ELEMENTS = 2**22  # elements of logits that are held at once for all nodes


def softmax_link(mean: Tensor, variance: Tensor, link: Link = "auto") -> Tensor:
    """E[softmax(z)] for independent Gaussian logits.

    Args:
        mean: (..., C) logit means.
        variance: (..., C) logit variances, >= 0.
        link: which approximation, see the module's table.

    Returns:
        probabilities (..., C), rows sum to one.

    Raises:
        InvalidInput: an unknown link.

    >>> softmax_link(torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2))
    tensor([[0.8808, 0.1192]])
    """
    if link not in get_args(Link):
        msg = f"link must be one of {', '.join(map(repr, get_args(Link)))}; got {link!r}"
        raise InvalidInput(msg)
    if mean.dtype in (torch.float16, torch.bfloat16):
        return softmax_link(mean.float(), variance.float(), link).to(mean.dtype)
    if link == "auto":
        link = "sobol" if mean.shape[-1] <= SOBOL_CLASSES else "top_k"
    if link == "probit":
        return torch.softmax(_damped(mean, variance), -1)
    return {"sobol": _sobol, "delta": _delta, "top_k": _top_k, "mean_field": _mean_field}[link](mean, variance)


def _damped(mean: Tensor, variance: Tensor) -> Tensor:
    return mean * torch.rsqrt(1 + math.pi / 8 * variance)


@lru_cache(maxsize=16)
def _standard_nodes(n_classes: int) -> np.ndarray:
    """(64, C) quasi-random standard normal nodes: 32 and their mirror images, of unit variance per class."""
    uniform = torch.quasirandom.SobolEngine(n_classes, scramble=True, seed=0).draw(N_NODES // 2, dtype=torch.float64)
    nodes = torch.special.ndtri(uniform.clamp(1e-7, 1 - 1e-7))
    nodes = nodes * torch.rsqrt(nodes.square().mean(0))
    return torch.cat([nodes, -nodes]).numpy()


def _nodes(n_classes: int) -> Tensor:
    with torch.inference_mode(mode=False):
        return torch.from_numpy(_standard_nodes(n_classes).copy())


# What torch.compiler.assume_constant_result sets, without importing the compiler for everyone.
_nodes._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _sobol(mean: Tensor, variance: Tensor) -> Tensor:
    nodes = _nodes(mean.shape[-1]).to(mean.device, mean.dtype)
    sd = variance.sqrt()
    chunk = max(1, min(N_NODES, NODE_ELEMENTS // max(1, mean.numel())))
    probs = torch.zeros_like(mean)
    for part in nodes.split(chunk):
        logits = mean + sd * part.reshape(-1, *[1] * (mean.dim() - 1), mean.shape[-1])
        probs = probs + torch.softmax(logits, -1).sum(0)
    return probs / N_NODES


def _delta(mean: Tensor, variance: Tensor) -> Tensor:
    """p (1 + ((1 - 2 p) v - sum p v + 2 sum p^2 v) / 2) with v held to at most 1."""
    p, v = torch.softmax(mean, -1), variance.clamp(max=DELTA_VARIANCE)
    pv = p * v
    correction = (1 - 2 * p) * v - pv.sum(-1, keepdim=True) + 2 * (p * pv).sum(-1, keepdim=True)
    probs = (p * (1 + correction / 2)).clamp(min=0)
    return probs / probs.sum(-1, keepdim=True)


def _top_k(mean: Tensor, variance: Tensor) -> Tensor:
    """Sobol nodes on the largest logits; the tail keeps its delta mass and its own proportions."""
    k = min(TOP_CLASSES, mean.shape[-1])
    if k == mean.shape[-1]:
        return _sobol(mean, variance)
    tail_probs = torch.softmax(mean + variance.clamp(max=DELTA_VARIANCE) / 2, -1)
    top = mean.topk(k, -1).indices
    outside = tail_probs.scatter(-1, top, 0.0)
    # The tail enters the nodes as one more logit without variance: many independent terms average out.
    lse = torch.logsumexp(mean + variance.clamp(max=DELTA_VARIANCE) / 2, -1, keepdim=True)
    tail_logit = lse + outside.sum(-1, keepdim=True).clamp(min=torch.finfo(mean.dtype).tiny).log()
    head_mean = torch.cat([mean.gather(-1, top), tail_logit], -1)
    head_variance = torch.cat([variance.gather(-1, top), torch.zeros_like(tail_logit)], -1)
    head = _sobol(head_mean, head_variance)
    share = head[..., -1:] / outside.sum(-1, keepdim=True).clamp(min=torch.finfo(mean.dtype).tiny)
    return (outside * share).scatter(-1, top, head[..., :-1])


def _mean_field(mean: Tensor, variance: Tensor) -> Tensor:
    """1 / sum_i exp((m_i - m_k) / sqrt(1 + pi/8 v_k)), renormalised; one row of classes at a time."""
    slope = torch.rsqrt(1 + math.pi / 8 * variance)
    rows = [
        torch.logsumexp(mean * slope[..., k : k + 1], -1) - mean[..., k] * slope[..., k] for k in range(mean.shape[-1])
    ]
    return torch.softmax(-torch.stack(rows, -1), -1)
