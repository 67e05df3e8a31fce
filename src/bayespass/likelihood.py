"""The likelihoods: their names, their losses and what they ask of targets.

`"classification"` is categorical over the last axis of the logits; `"regression"` is Gaussian. Its
noise has a known standard deviation `sigma_noise`, or, with `sigma_noise="predicted"`, one that the
network predicts for every input: its output then ends in an axis of two, (mean, log variance).
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from bayespass.errors import InvalidInput

Likelihood = Literal["classification", "regression"]
SigmaNoise = float | Literal["predicted"]


def check_likelihood(likelihood: str, sigma_noise: SigmaNoise | None) -> None:
    """Raise unless the likelihood is known and has the noise it needs.

    Raises:
        InvalidInput: an unknown name, or `sigma_noise` missing, not positive or out of place.
    """
    if likelihood not in get_args(Likelihood):
        msg = f"likelihood must be 'classification' or 'regression'; got {likelihood!r}"
        raise InvalidInput(msg)
    known = not isinstance(sigma_noise, str) and sigma_noise is not None and sigma_noise > 0
    if likelihood == "regression" and not known and sigma_noise != "predicted":
        msg = (
            f"likelihood='regression' needs sigma_noise > 0, the sd of the observation noise, or 'predicted' "
            f"for a network that outputs (mean, log variance); got {sigma_noise!r}"
        )
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


def check_targets(
    outputs: Tensor, targets: Tensor, likelihood: Likelihood, sigma_noise: SigmaNoise | None = None
) -> Tensor:
    """The targets, class labels as int64, or an error unless they fit the outputs.

    Args:
        outputs: (..., C) logits, the predicted means, or (..., 2) means and log variances.
        targets: (...,) class labels, or values of the means' shape.
        likelihood: which of the two.
        sigma_noise: "predicted" where outputs hold means and log variances.

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
    means = mean_and_log_variance(outputs)[0] if sigma_noise == "predicted" else outputs
    if targets.shape != means.shape:
        what = "means, the outputs without their last axis" if sigma_noise == "predicted" else "outputs"
        msg = f"targets must have the shape of the {what}, {tuple(means.shape)}; got {tuple(targets.shape)}"
        raise InvalidInput(msg)
    return targets


def mean_and_log_variance(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """The two entries of the last axis of a network that predicts its noise.

    Args:
        outputs: (..., 2) mean and log variance.

    Returns:
        two tensors of shape (...).

    Raises:
        InvalidInput: the last axis is not of size two.
    """
    if outputs.dim() == 0 or outputs.shape[-1] != 2:
        msg = (
            f"with sigma_noise='predicted' the network's output must end in an axis of size 2, (mean, log variance); "
            f"got shape {tuple(outputs.shape)}. Add that axis to the last layer, or give sigma_noise as a number"
        )
        raise InvalidInput(msg)
    return outputs[..., 0], outputs[..., 1]


def gaussian_nll(outputs: Tensor, targets: Tensor) -> Tensor:
    """(s + (y - m)^2 exp(-s) + log 2 pi) / 2, the mean over all targets in nats: a loss to train with.

    It is a mean over targets, not rows: where a row has several, `n_data` of a training method is
    the number of targets.

    Args:
        outputs: (..., 2) mean m and log variance s.
        targets: (...) values y.

    Raises:
        InvalidInput: shapes that do not fit.

    >>> gaussian_nll(torch.zeros(3, 2), torch.zeros(3))  # log(2 pi) / 2
    tensor(0.9189)
    """
    targets = check_targets(outputs, targets, "regression", "predicted")
    return gaussian_log_losses(outputs, targets).mean()


def gaussian_log_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """-log N(y; m, exp(s)) of every target, in nats; runs under `torch.func.vmap`.

    Args:
        outputs: (..., 2) mean m and log variance s.
        targets: (...) values y.
    """
    mean, log_variance = mean_and_log_variance(outputs)
    # F.gaussian_nll_loss takes the variance itself, whose log is lost where it under- or overflows.
    standardised = (targets - mean) * torch.exp(-log_variance / 2)
    return 0.5 * (log_variance + standardised.square() + math.log(2 * math.pi))


def negative_log_likelihood(
    outputs: Tensor, targets: Tensor, likelihood: Likelihood, sigma_noise: SigmaNoise | None
) -> Tensor:
    """-log p(target | output) summed over all rows, in nats.

    Args:
        outputs: (..., C) logits, the predicted means, or (..., 2) means and log variances.
        targets: (...,) class labels, or values of the means' shape.
        likelihood: which of the two.
        sigma_noise: sd of the observation noise, or "predicted", for regression.
    """
    if likelihood == "classification":
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="sum")
    if sigma_noise == "predicted":
        return gaussian_log_losses(outputs, targets).sum()
    variance = torch.full_like(outputs, float(sigma_noise or 1.0) ** 2)
    return F.gaussian_nll_loss(outputs, targets, variance, full=True, reduction="sum", eps=0.0)
