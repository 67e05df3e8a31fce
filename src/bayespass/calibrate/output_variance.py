"""The last step of a calibration: the variance of every output from what the single pass says of its row.

    log v' = log v + w . phi(m, v)

What marginals lose of an output's variance depends on the row: noise of attention and features moves
logits along the directions in which they already stand out. A few numbers of the row tell most of it,
so that a linear map fitted on a few hundred unlabelled inputs narrows the spread of log(v' / v_MC) and
costs next to nothing at prediction. Features and corrections are held within what was seen when
fitting, so that inputs unlike those are not extrapolated to.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bayespass.calibrate.teacher import Answer, Taught, distance
from bayespass.errors import InvalidInput
from bayespass.link import softmax_link

RIDGE = 10.0
SHRINKAGE = 0.1
MAX_STEPS = 100
LARGEST = 10.0  # correction of a log variance while fitting


@dataclass(frozen=True)
class OutputVariance:
    """A fitted correction of the output's variance.

    Args:
        weights: of the features.
        centre: of each feature, subtracted.
        spread: of each feature, divided by.
        low: smallest value of each standardised feature.
        high: largest.
        bounds: smallest and largest correction of log v.
        classifies: whether outputs are logits.
        predicts_noise: whether they are pairs of a mean and a log variance.
    """

    weights: tuple[float, ...]
    centre: tuple[float, ...]
    spread: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    bounds: tuple[float, float]
    classifies: bool
    predicts_noise: bool = False

    def __call__(self, mean: Tensor, variance: Tensor) -> Tensor:
        """The corrected variance.

        Args:
            mean: (..., C) of the outputs.
            variance: (..., C), >= 0; no variance stays none.
        """
        dtype = torch.float32 if mean.dtype in (torch.float16, torch.bfloat16) else mean.dtype
        m, v = mean.to(dtype), variance.to(dtype)
        features = output_features(m, v, self.classifies, self.predicts_noise)
        z = (features - m.new_tensor(self.centre)) / m.new_tensor(self.spread)
        z = torch.minimum(torch.maximum(z, m.new_tensor(self.low)), m.new_tensor(self.high))
        correction = (z @ m.new_tensor(self.weights)).clamp(*self.bounds)
        return (v * correction.exp()).to(variance.dtype)

    def as_dict(self) -> dict[str, Any]:
        """For the manifest of a posterior's file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "OutputVariance":
        """The reverse of `as_dict`."""
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()
        }
        return cls(**fields)


def fit_output_variance(
    mean: Tensor, variance: Tensor, truth: Taught, answer: Callable[[Tensor, Tensor], Answer]
) -> OutputVariance:
    """Least squares of log(v_MC / v) on the features, then from there the distance to the teacher by L-BFGS.

    Args:
        mean: (R, C) of the outputs, by the single pass.
        variance: (R, C).
        truth: the same rows by Monte Carlo; with probabilities the outputs are logits.
        answer: from mean and variance of these rows to what is said of them.

    Raises:
        InvalidInput: no output has variance by both.
    """
    classifies = truth.probs is not None
    predicts_noise = truth.total is not None and truth.total.shape[-1] < truth.mean.shape[-1]
    with torch.inference_mode(mode=False), torch.enable_grad():
        m, v = mean.detach().clone(), variance.detach().clone()
        known = (v > 0) & (truth.variance > 0)
        if not known.any():
            msg = "the output has no variance to correct; the posterior does not reach it"
            raise InvalidInput(msg)
        features = output_features(m, v, classifies, predicts_noise)
        centre, spread = features[known].mean(0), features[known].std(0, correction=0)
        spread = torch.where(spread > 1e-6 * (1 + centre.abs()), spread, torch.ones_like(spread))
        centre[0] = 0.0  # the constant
        z = (features - centre) / spread
        design, target = z[known].double(), (truth.variance / v)[known].log().double()
        gram = design.T @ design + RIDGE * torch.eye(design.shape[1], dtype=torch.double, device=m.device)
        start = torch.linalg.solve(gram, design.T @ target).to(m.dtype)
        weights = _descend(start, z, lambda factor: distance(answer(m, v * factor), truth))
        fitted = z[known] @ weights
        return OutputVariance(
            *(tuple(t.tolist()) for t in (weights, centre, spread, z[known].amin(0), z[known].amax(0))),
            bounds=(float(fitted.min()), float(fitted.max())),
            classifies=classifies,
            predicts_noise=predicts_noise,
        )


def _descend(start: Tensor, z: Tensor, distances: Callable[[Tensor], Tensor]) -> Tensor:
    """The weights of the smallest distance near the start, or the start where the search fails."""
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=MAX_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        factor = (z @ weights).clamp(-LARGEST, LARGEST).exp()
        found = distances(factor).mean() + SHRINKAGE / len(z) * (weights - start).square().sum()
        found.backward()
        return found

    optimizer.step(loss)
    return weights.detach() if bool(torch.isfinite(weights).all()) else start


def output_features(mean: Tensor, variance: Tensor, classifies: bool, predicts_noise: bool = False) -> Tensor:
    """What the correction sees of every output, (..., C, F): the first is the constant.

    Args:
        mean: (..., C).
        variance: (..., C).
        classifies: whether outputs are logits; else only the variances are seen.
        predicts_noise: whether they are pairs of a mean and a log variance, which differ in level.
    """
    v = variance.clamp(min=torch.finfo(variance.dtype).tiny)
    columns = [torch.ones_like(mean), v.log(), v.mean(-1, keepdim=True).log().expand_as(v)]
    if predicts_noise:
        second = torch.zeros_like(mean)
        second[..., 1] = 1.0
        return torch.stack([*columns, second, second * v.log()], -1)
    if not classifies:
        return torch.stack(columns, -1)
    gap = mean - mean.mean(-1, keepdim=True)
    height = gap.square().mean(-1, keepdim=True)
    p = softmax_link(mean, variance, "probit")
    entropy = torch.special.entr(p).sum(-1, keepdim=True)
    of_row = [t.expand_as(mean) for t in (height, height.sqrt(), entropy, p.amax(-1, keepdim=True))]
    return torch.stack([*columns, gap, gap.square(), gap.abs(), p, p * (1 - p), *of_row], -1)
