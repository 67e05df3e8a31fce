"""Rows one by one: a model as a function of some parameters, targets that it would draw itself."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from bayespass.batches import call_arguments, model_output
from bayespass.likelihood import Likelihood, SigmaNoise, mean_and_log_variance

Parameters = dict[str, Tensor]


def row_outputs(model: nn.Module, names: Iterable[str]) -> tuple[Parameters, Callable[[Parameters, Any], Tensor]]:
    """The named parameters, and the output for one row as a function of them, everything else fixed.

    Args:
        model: in eval mode; rows of a batch must not interact.
        names: a tied weight under one of its names.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    random = {name: parameters[name].detach() for name in names}
    tied = {id(parameters[name]) for name in random}  # a tied weight has several names and must appear once
    rest = {n: p.detach() for n, p in model.named_parameters() if id(p) not in tied} | dict(model.named_buffers())

    def outputs(theta: Parameters, row: Any) -> Tensor:
        args, kwargs = call_arguments(pytree.tree_map(lambda t: t.unsqueeze(0) if isinstance(t, Tensor) else t, row))
        return model_output(functional_call(model, (theta, rest), args, kwargs)).squeeze(0)

    return random, outputs


def drawn_targets(
    outputs: Tensor, likelihood: Likelihood, sigma_noise: SigmaNoise | None, generator: torch.Generator
) -> Tensor:
    """One target per row from p(y | output): a class label, N(output, sigma^2), or N(mean, exp(log variance))."""
    if likelihood == "regression":
        mean, sd = outputs, 1.0
        if sigma_noise == "predicted":
            mean, log_variance = mean_and_log_variance(outputs)
            sd = torch.exp(log_variance / 2)
        elif sigma_noise is not None:
            sd = float(sigma_noise)
        return mean + sd * torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    probabilities = torch.softmax(outputs.float(), -1)
    return torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator).view(outputs.shape[:-1])
