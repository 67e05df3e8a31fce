"""How sure the two likeliest classes are of their order: the exact linearised variance of their margin.

The margin of a row is its largest logit minus the next. Under the linearised network its variance is
g^T Sigma g with g the gradient of that one difference, so that one forward and one backward pass of a batch
give it exactly, all correlations between logits, positions and layers kept, whatever the number of classes.

Source: single_pass notes 4 and 9, "margin-GLM".
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bayespass.curvature.layers import DEFAULT_MEMORY
from bayespass.curvature.pushforward import PlacedCovariance
from bayespass.errors import InvalidInput, require_positive
from bayespass.posterior.base import Posterior
from bayespass.predict.linearised import in_single_precision, ordinary_inputs
from bayespass.predict.snapshot import check_eval, snapshot


@dataclass(frozen=True, eq=False)
class MarginPrediction:
    """The likeliest class, the next, and the Gaussian over the difference of their logits.

    Args:
        labels: (...) the likeliest class of the mean network.
        runner_up: (...) the next.
        margin: (...) logit of the first minus logit of the second, >= 0.
        variance: (...) of the margin, epistemic.
        method: how it was made, one word.
        notes: assumptions made.
    """

    labels: Tensor
    runner_up: Tensor
    margin: Tensor
    variance: Tensor
    method: str = ""
    notes: tuple[str, ...] = ()

    @property
    def error_probability(self) -> Tensor:
        """(...) Phi(-margin / sd), the probability that the two change places; at most a half."""
        tiny = torch.finfo(self.variance.dtype).tiny
        return 0.5 * torch.special.erfc(self.margin * torch.rsqrt(2 * self.variance.clamp(min=tiny)))

    @property
    def confidence(self) -> Tensor:
        """(...) one minus `error_probability`: a score to rank answers by, not the probability of the class."""
        return 1 - self.error_probability


class Margin(nn.Module):
    """The linearised variance of the top-1 minus top-2 logit, for about the cost of training on the batch.

    Linear layers and convolutions with several positions write out one gradient per row, one layer at a time,
    and parameters that no layer answers for (class tokens, fused attention, recurrent cells) take a second,
    per-row pass. A posterior that has only draws takes forward-mode passes of its draws instead.

    Args:
        model: a classifier in eval mode; it is copied, never modified. Rows of a batch must not interact. A
            half-precision model is computed in float32.
        posterior: over any subset of its parameters.
        max_memory: bytes that one part of a batch may take, roughly.

    `forward` takes what the model takes and returns a `MarginPrediction`.

    Raises:
        PosteriorMismatch: posterior and model do not fit.
        InvalidInput: a regression posterior, or a model in training mode.
    """

    def __init__(self, model: nn.Module, posterior: Posterior, max_memory: int = DEFAULT_MEMORY) -> None:
        super().__init__()
        require_positive(max_memory=max_memory)
        if posterior.info.likelihood != "classification":
            msg = "a margin is between classes; use Linearised for likelihood='regression'"
            raise InvalidInput(msg)
        with torch.inference_mode(mode=False):
            self.model = in_single_precision(snapshot(model, posterior))
        self.posterior = posterior
        self.info = posterior.info
        self.max_memory = max_memory
        self._pushed = PlacedCovariance(self.model, posterior, max_memory)
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> MarginPrediction:
        """The prediction for one batch, called as the model is called.

        Raises:
            InvalidInput: fewer than two classes, or one row exceeds `max_memory`.
        """
        check_eval(self.model)
        with torch.inference_mode(mode=False):
            inputs = ordinary_inputs(self.model, args, kwargs)
            found = [(part.outputs, part.marginals()) for part in self._pushed().chunks(inputs, margin_rows)]
        outputs = torch.cat([value for value, _ in found])
        top = outputs.topk(2, -1)
        margin = top.values[..., 0] - top.values[..., 1]
        variance = torch.cat([value for _, value in found]).to(margin.dtype).reshape(margin.shape).clamp(min=0)
        kind = "exact variance" if self._pushed().exact else f"variance by {self._pushed().n_draws} draws"
        notes = (f"{kind} of the linearised margin",)
        return MarginPrediction(top.indices[..., 0], top.indices[..., 1], margin, variance, "margin", notes)


def margin_rows(outputs: Tensor, targets: Tensor | None = None) -> Tensor:  # noqa: ARG001
    """(n, K) largest minus second largest logit of every position.

    Raises:
        InvalidInput: fewer than two classes.
    """
    if outputs.dim() < 2 or outputs.shape[-1] < 2:
        msg = f"a margin needs at least two logits on the last axis; got outputs of shape {tuple(outputs.shape)}"
        raise InvalidInput(msg)
    top = outputs.detach().topk(2, -1).indices
    pair = outputs.gather(-1, top)
    return (pair[..., 0] - pair[..., 1]).reshape(len(outputs), -1)
