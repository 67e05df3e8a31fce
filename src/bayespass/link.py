"""Class probabilities from Gaussian logits: E[softmax(z)] for z ~ N(mean, diag(variance)) or N(mean, R R^T).

    "sobol"       64 to 256 fixed quasi-random nodes, deterministic; best up to a few thousand classes
    "delta"       second order in the variance (at most 1), clamped and renormalised
    "top_k"       Sobol nodes on the 256 largest logits, the rest at second order of their sum
    "mean_field"  one-sided mean field, 1 / sum_i exp((m_i - m_k) / sqrt(1 + pi/8 v_k))
    "probit"      softmax(m / sqrt(1 + pi/8 v)): worse than no variance for many classes
    "auto"        "sobol" up to 4,096 classes, "top_k" beyond

Correlated logits go by Sobol nodes in the space of the root R. Logits that a linear map made of independent
features have a `Correlation`, which "sobol" and "top_k" follow among the 32 largest of a row: features that move two
classes together do not make their order uncertain, and independence would count them as if they did.

Rows are worked on in parts, so that a large vocabulary costs little memory beyond the result itself.

Source: single_pass notes 3.5, with measured errors per link, class count and variance.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from bayespass.errors import InvalidInput

Link = Literal["auto", "sobol", "delta", "top_k", "mean_field", "probit"]

FEW_NODES, MANY_NODES = 64, 256
NODES_TIMES_CLASSES = 2**14  # within the two numbers above
CORRELATED = 32  # largest logits of a row whose correlation is followed
SHORT = 64  # classes up to which a softmax along the nodes is faster
DIAGONAL = 1e-4  # what is added to correlations so that they have a root
SOBOL_CLASSES = 4096
TOP_CLASSES = 256
DELTA_VARIANCE = 1.0
NODE_ELEMENTS = 2**22  # elements of logits that are held at once for all nodes
ROW_ELEMENTS = 2**20  # elements of logits whose rows are worked on at once


class Correlation(NamedTuple):
    """That logits are a linear map of independent features plus noise of their own.

    Args:
        features: (..., D) variances of the features.
        weight: (C, D) of the map.
        total: (..., C) variances of the logits that go with them, noise of their own included.
    """

    features: Tensor
    weight: Tensor
    total: Tensor

    def at(self, *places: Tensor) -> "Correlation":
        """That of some rows."""
        return Correlation(self.features[places], self.weight, self.total[places])


def softmax_link(mean: Tensor, variance: Tensor, link: Link = "auto", correlation: Correlation | None = None) -> Tensor:
    """E[softmax(z)] for Gaussian logits, independent or with the correlation of a linear map.

    Args:
        mean: (..., C) logit means.
        variance: (..., C) logit variances, >= 0.
        link: which approximation, see the module's table.
        correlation: how the noise of logits is correlated; None for not at all, and "delta", "mean_field"
            and "probit" leave it out.

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
    if link == "auto":
        link = "sobol" if mean.shape[-1] <= SOBOL_CLASSES else "top_k"
    if correlation is not None and link in ("sobol", "top_k"):
        return _correlated_by_rows(_correlated_sobol if link == "sobol" else _top_k, mean, variance, correlation)
    compute = {"sobol": _sobol, "delta": _delta, "top_k": _top_k, "mean_field": _mean_field, "probit": _probit}[link]
    return _by_rows(compute, mean, variance)


def correlated_softmax_link(mean: Tensor, root: Tensor, scale: Tensor | None = None) -> Tensor:
    """E[softmax(z)] for z = mean + R diag(scale) e, e standard normal, at fixed Sobol nodes.

    Largest first: nodes cover the first columns of R best, so that eigenvectors times the square roots of
    falling eigenvalues are better than a Cholesky factor.

    Args:
        mean: (..., C) logit means.
        root: R (..., C, K); with `scale` also (C, K), one for all rows.
        scale: (..., K) standard deviations along the columns of R; 1 by default.

    Returns:
        probabilities (..., C), rows sum to one.

    Raises:
        InvalidInput: shapes that do not fit.

    >>> common = torch.ones(1, 2, 1)  # both logits move together, which changes no probability
    >>> correlated_softmax_link(torch.tensor([[2.0, 0.0]]), common)
    tensor([[0.8808, 0.1192]])
    """
    n_classes, width = root.shape[-2:] if root.dim() > 1 else (0, 0)
    shared = scale is not None and root.dim() == 2
    fits = n_classes == mean.shape[-1] and (shared or root.shape[:-2] == mean.shape[:-1])
    if not fits or (scale is not None and scale.shape != (*mean.shape[:-1], width)):
        scaled = "" if scale is None else f" and {tuple(scale.shape)}"
        msg = (
            f"root must have shape (*{tuple(mean.shape)}, K), or (C, K) with a scale of shape "
            f"(*{tuple(mean.shape[:-1])}, K); got {tuple(root.shape)}{scaled}"
        )
        raise InvalidInput(msg)
    dtype = torch.float32 if mean.dtype in (torch.float16, torch.bfloat16) else mean.dtype
    nodes = _nodes(width).to(mean.device, dtype)
    means = mean.reshape(-1, n_classes)
    roots = root if shared else root.reshape(-1, n_classes, width)
    scales = None if scale is None else scale.reshape(-1, width)
    n_rows = max(1, NODE_ELEMENTS // (len(nodes) * (n_classes + width) + (0 if shared else n_classes * width)))
    found = []
    for start in range(0, len(means), n_rows):
        rows = slice(start, start + n_rows)
        along = nodes if scales is None else nodes * scales[rows, None].to(dtype)
        gap = along @ (roots if shared else roots[rows]).to(dtype).mT  # (rows, nodes, C)
        found.append(torch.softmax(means[rows, None].to(dtype) + gap, -1).mean(1).to(mean.dtype))
    return torch.cat(found).reshape(mean.shape) if found else mean


def mutual_information(mean: Tensor, variance: Tensor) -> Tensor:
    """H(E[softmax(z)]) - E[H(softmax(z))]: what knowing z would tell about the class, in nats.

    The epistemic part of the predictive entropy, at the fixed nodes whatever the link. Beyond
    4,096 classes the nodes move the 256 largest logits, and the rest is one class of known inner
    proportions, so that what is uncertain inside the tail is left out.

    Args:
        mean: (..., C) logit means.
        variance: (..., C) logit variances, >= 0.

    Returns:
        (...), at least 0.
    """
    return _by_rows(_information, mean, variance)


def _by_rows(compute: Callable[[Tensor, Tensor], Tensor], mean: Tensor, variance: Tensor) -> Tensor:
    """compute(mean, variance), a part of the rows at a time, in float32 where the input is half precision."""
    dtype = torch.float32 if mean.dtype in (torch.float16, torch.bfloat16) else mean.dtype
    n_classes = mean.shape[-1]
    n_rows = max(1, ROW_ELEMENTS // max(1, n_classes))
    if torch.compiler.is_compiling() or mean.numel() <= n_rows * n_classes:
        return compute(mean.to(dtype), variance.to(dtype)).to(mean.dtype)
    means, variances = mean.reshape(-1, n_classes), variance.expand_as(mean).reshape(-1, n_classes)
    result, start = means, 0
    for m, v in zip(means.split(n_rows), variances.split(n_rows), strict=True):
        part = compute(m.to(dtype), v.to(dtype))
        if start == 0:
            result = mean.new_empty((len(means), *part.shape[1:]))
        result[start : start + n_rows] = part.to(mean.dtype)
        start += n_rows
    return result.reshape(*mean.shape[:-1], *result.shape[1:])


def _correlated_by_rows(
    compute: Callable[[Tensor, Tensor, Correlation], Tensor], mean: Tensor, variance: Tensor, correlation: Correlation
) -> Tensor:
    """compute(mean, variance, correlation), as `_by_rows`, with (n, C) logits.

    Raises:
        InvalidInput: shapes that do not fit.
    """
    features, weight, total = correlation
    n_classes, n_features = mean.shape[-1], weight.shape[-1]
    fits = features.shape == (*mean.shape[:-1], n_features) and total.shape == mean.shape
    if not fits or weight.shape[0] != n_classes:
        msg = (
            f"for logits {tuple(mean.shape)} a correlation has features (..., D), weight ({n_classes}, D) and total "
            f"{tuple(mean.shape)}; got {tuple(features.shape)}, {tuple(weight.shape)} and {tuple(total.shape)}"
        )
        raise InvalidInput(msg)
    dtype = torch.float32 if mean.dtype in (torch.float16, torch.bfloat16) else mean.dtype
    weight = weight.to(dtype)
    width = min(n_classes, CORRELATED)
    per_row = n_nodes(n_classes) * (n_classes + width) + width * n_features
    size = len(mean.reshape(-1, n_classes)) if torch.compiler.is_compiling() else max(1, NODE_ELEMENTS // per_row)
    parts = zip(
        *(t.reshape(-1, t.shape[-1]).to(dtype).split(max(1, size)) for t in (mean, variance, features, total)),
        strict=True,
    )
    found = [compute(m, v, Correlation(f, weight, t)) for m, v, f, t in parts]
    return torch.cat(found).reshape(mean.shape).to(mean.dtype)


def _probit(mean: Tensor, variance: Tensor) -> Tensor:
    return torch.softmax(_damped(mean, variance), -1)


def _damped(mean: Tensor, variance: Tensor) -> Tensor:
    return mean * torch.rsqrt(1 + math.pi / 8 * variance)


@lru_cache(maxsize=16)
def _standard_nodes(n_classes: int) -> np.ndarray:
    """(n, C) quasi-random standard normal nodes: a half and its mirror images, of unit variance per class."""
    count = n_nodes(n_classes) // 2
    uniform = torch.quasirandom.SobolEngine(n_classes, scramble=True, seed=0).draw(count, dtype=torch.float64)
    nodes = torch.special.ndtri(uniform.clamp(1e-7, 1 - 1e-7))
    nodes = nodes * torch.rsqrt(nodes.square().mean(0))
    return torch.cat([nodes, -nodes]).numpy()


def _nodes(n_classes: int) -> Tensor:
    with torch.inference_mode(mode=False):
        return torch.from_numpy(_standard_nodes(n_classes).copy())


# What torch.compiler.assume_constant_result sets, without importing the compiler for everyone.
_nodes._dynamo_marked_constant = True  # type: ignore[attr-defined]


def n_nodes(n_classes: int) -> int:
    """How many nodes so many logits take: a power of two from 64 to 256."""
    wished = max(1, NODES_TIMES_CLASSES // max(1, n_classes))
    return min(MANY_NODES, max(FEW_NODES, 2 ** (wished.bit_length() - 1)))


def _sobol(mean: Tensor, variance: Tensor) -> Tensor:
    probs, sd = torch.zeros_like(mean), variance.sqrt()
    for part in _node_parts(mean):
        if mean.shape[-1] <= SHORT:
            along = part.reshape(len(part), -1).T
            probs = probs + _summed_softmax(mean.unsqueeze(-1) + sd.unsqueeze(-1) * along)
        else:
            probs = probs + torch.softmax(mean + sd * part, -1).sum(0)
    return probs / n_nodes(mean.shape[-1])


def _summed_softmax(logits: Tensor) -> Tensor:
    """(..., C) sum over nodes of the softmax of (..., C, nodes): several times faster for few classes."""
    z = (logits - logits.amax(-2, keepdim=True)).exp()
    return (z @ z.sum(-2).reciprocal().unsqueeze(-1)).squeeze(-1)


def _correlated_sobol(mean: Tensor, variance: Tensor, correlation: Correlation) -> Tensor:
    """The nodes with the largest logits of each row correlated; (n, C) throughout."""
    top = mean.topk(min(mean.shape[-1], CORRELATED), -1).indices
    return _sobol_by_root(mean, variance, top, _root_of_largest(variance.gather(-1, top), correlation, top))


def _sobol_by_root(mean: Tensor, variance: Tensor, places: Tensor, root: Tensor) -> Tensor:
    """The nodes for logits (n, C) of which those in K places have this root (n, K, K), the others are independent."""
    n_classes, width = mean.shape[-1], places.shape[-1]
    nodes = _nodes(n_classes if width == n_classes else n_classes + width).to(mean.device, mean.dtype)
    if width == n_classes:
        probs = _summed_softmax(mean.gather(-1, places).unsqueeze(-1) + root @ nodes.T) / len(nodes)
        return torch.zeros_like(mean).scatter(-1, places, probs)
    moved = nodes[:, :width] @ root.mT  # (n, nodes, width)
    gap = variance.sqrt().unsqueeze(1) * nodes[:, width:]
    gap = gap.scatter(-1, places.unsqueeze(1).expand_as(moved), moved)
    return torch.softmax(mean.unsqueeze(1) + gap, -1).mean(1)


def _root_of_largest(variance: Tensor, correlation: Correlation, top: Tensor) -> Tensor:
    """(n, K, K) lower root of the covariance of the logits in these places, with variances (n, K); largest first.

    Where rounding leaves a matrix without a root the row's logits are independent.
    """
    features, weight, total = correlation
    rows = weight[top]
    sd = total.gather(-1, top).clamp(min=torch.finfo(total.dtype).tiny).sqrt()
    found = (rows * features.unsqueeze(-2)) @ rows.mT / (sd.unsqueeze(-1) * sd.unsqueeze(-2))
    found = found.nan_to_num(0.0).clamp(-1, 1) * (1 - DIAGONAL)
    found = found - torch.diag_embed(found.diagonal(dim1=-2, dim2=-1) - 1)
    root, failed = torch.linalg.cholesky_ex(found)
    independent = torch.eye(top.shape[-1], dtype=found.dtype, device=found.device)
    root = torch.where((failed == 0)[:, None, None], root, independent)
    return root * variance.sqrt().unsqueeze(-1)


def _information(mean: Tensor, variance: Tensor) -> Tensor:
    if mean.shape[-1] > SOBOL_CLASSES:
        mean, variance, *_ = _head(mean, variance)
    probs, entropy, sd = torch.zeros_like(mean), torch.zeros_like(mean[..., 0]), variance.sqrt()
    for part in _node_parts(mean):
        p = torch.softmax(mean + sd * part, -1)
        probs, entropy = probs + p.sum(0), entropy + torch.special.entr(p).sum((0, -1))
    count = n_nodes(mean.shape[-1])
    return (torch.special.entr(probs / count).sum(-1) - entropy / count).clamp(min=0)


def _node_parts(mean: Tensor) -> tuple[Tensor, ...]:
    """The nodes (n, 1, ..., C) for logits like these, as many at a time as memory allows."""
    nodes = _nodes(mean.shape[-1]).to(mean.device, mean.dtype)
    chunk = max(1, min(len(nodes), NODE_ELEMENTS // max(1, mean.numel())))
    return nodes.reshape(len(nodes), *[1] * (mean.dim() - 1), mean.shape[-1]).split(chunk)


def _delta(mean: Tensor, variance: Tensor) -> Tensor:
    """p (1 + ((1 - 2 p) v - sum p v + 2 sum p^2 v) / 2) with v held to at most 1."""
    p, v = torch.softmax(mean, -1), variance.clamp(max=DELTA_VARIANCE)
    pv = p * v
    correction = (1 - 2 * p) * v - pv.sum(-1, keepdim=True) + 2 * (p * pv).sum(-1, keepdim=True)
    probs = (p * (1 + correction / 2)).clamp(min=0)
    return probs / probs.sum(-1, keepdim=True)


def _top_k(mean: Tensor, variance: Tensor, correlation: Correlation | None = None) -> Tensor:
    """Sobol nodes on the largest logits; the tail keeps its delta mass and its own proportions."""
    if mean.shape[-1] <= TOP_CLASSES:
        return _sobol(mean, variance) if correlation is None else _correlated_sobol(mean, variance, correlation)
    head_mean, head_variance, top, tail = _head(mean, variance)
    if correlation is None:
        head = _sobol(head_mean, head_variance)
    else:
        largest = top[:, :CORRELATED]
        root = _root_of_largest(head_variance[:, :CORRELATED], correlation, largest)
        places = torch.arange(CORRELATED, device=top.device).expand_as(largest)  # `top` is sorted
        head = _sobol_by_root(head_mean, head_variance, places, root)
    return (tail * head[..., -1:]).scatter(-1, top, head[..., :-1])


def _head(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The largest logits and the tail as one more without variance: many independent terms average out.

    Returns:
        mean and variance (..., K + 1), the places (..., K) of the largest, and the tail's inner
        proportions (..., C), zero at those places.
    """
    shifted = mean + variance.clamp(max=DELTA_VARIANCE) / 2
    top = mean.topk(TOP_CLASSES, -1).indices
    outside = torch.softmax(shifted, -1).scatter(-1, top, 0.0)
    mass = outside.sum(-1, keepdim=True).clamp(min=torch.finfo(mean.dtype).tiny)
    tail_logit = torch.logsumexp(shifted, -1, keepdim=True) + mass.log()
    head_mean = torch.cat([mean.gather(-1, top), tail_logit], -1)
    head_variance = torch.cat([variance.gather(-1, top), torch.zeros_like(tail_logit)], -1)
    return head_mean, head_variance, top, outside / mass


def _mean_field(mean: Tensor, variance: Tensor) -> Tensor:
    """1 / sum_i exp((m_i - m_k) / sqrt(1 + pi/8 v_k)), renormalised; one row of classes at a time."""
    slope = torch.rsqrt(1 + math.pi / 8 * variance)
    rows = [
        torch.logsumexp(mean * slope[..., k : k + 1], -1) - mean[..., k] * slope[..., k] for k in range(mean.shape[-1])
    ]
    return torch.softmax(-torch.stack(rows, -1), -1)
