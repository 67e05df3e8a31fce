"""The likelihoods: their names, their losses and what they ask of targets.

`"classification"` is categorical over the last axis of the logits; `"regression"` is Gaussian with
a known standard deviation `sigma_noise`.
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from bayespass.errors import InvalidInput

Likelihood = Literal["classification", "regression"]


def check_likelihood(likelihood: str, sigma_noise: float | None) -> None:
    """Raise unless the likelihood is known and has the noise it needs.

    Raises:
        InvalidInput: an unknown name, or `sigma_noise` missing, not positive or out of place.
    """
    if likelihood not in get_args(Likelihood):
        msg = f"likelihood must be 'classification' or 'regression'; got {likelihood!r}"
        raise InvalidInput(msg)
    if likelihood == "regression" and (sigma_noise is None or not sigma_noise > 0):
        msg = f"likelihood='regression' needs sigma_noise > 0, the sd of the observation noise; got {sigma_noise!r}"
        raise InvalidInput(msg)
    if likelihood == "classification" and sigma_noise is not None:
        msg = f"sigma_noise belongs to likelihood='regression'; got {sigma_noise!r} with 'classification'"
        raise InvalidInput(msg)


def check_class_labels(labels: Tensor, n_classes: int) -> None:
    """Raise unless labels are whole numbers in [0, n_classes).

    Raises:
        InvalidInput: another dtype or a label out of range.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        msg = f"class labels must be integers in [0, {n_classes}); got dtype {labels.dtype}. Use labels.long()"
        raise InvalidInput(msg)
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= n_classes):
        msg = (
            f"class labels must lie in [0, {n_classes}), the number of logits; got a range of "
            f"[{int(labels.min())}, {int(labels.max())}]"
        )
        raise InvalidInput(msg)


def check_targets(outputs: Tensor, targets: Tensor, likelihood: Likelihood) -> Tensor:
    """The targets, class labels as int64, or an error unless they fit the outputs.

    Args:
        outputs: (..., C) logits, or the predicted means.
        targets: (...,) class labels, or values of the outputs' shape.
        likelihood: which of the two.

    Raises:
        InvalidInput: wrong shape, dtype or range.
    """
    if likelihood == "classification":
        if outputs.shape[-1] < 2:
            shape = tuple(outputs.shape)
            msg = f"classification needs at least two logits on the last axis; got outputs of shape {shape}"
            raise InvalidInput(msg)
        if targets.shape != outputs.shape[:-1]:
            msg = (
                f"labels must have shape {tuple(outputs.shape[:-1])}, one per row of logits; got {tuple(targets.shape)}"
            )
            raise InvalidInput(msg)
        check_class_labels(targets, outputs.shape[-1])
        return targets.long()
    if targets.shape != outputs.shape:
        msg = f"targets must have the shape of the outputs, {tuple(outputs.shape)}; got {tuple(targets.shape)}"
        raise InvalidInput(msg)
    return targets


def negative_log_likelihood(
    outputs: Tensor, targets: Tensor, likelihood: Likelihood, sigma_noise: float | None
) -> Tensor:
    """-log p(target | output) summed over all rows, in nats.

    Args:
        outputs: (..., C) logits, or the predicted means.
        targets: (...,) class labels, or values of the outputs' shape.
        likelihood: which of the two.
        sigma_noise: sd of the observation noise, for regression.
    """
    if likelihood == "classification":
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="sum")
    variance = torch.full_like(outputs, float(sigma_noise or 1.0) ** 2)
    return F.gaussian_nll_loss(outputs, targets, variance, full=True, reduction="sum", eps=0.0)
