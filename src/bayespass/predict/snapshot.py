"""A private copy of the user's model that predictors run.

The copy shares nothing with the model, so moving it, loading a state into it or hooking it never
touches the user's model, and training the model later never changes a predictor. Random parameters
hold the posterior mean.
"""

import copy

import torch
from torch import Tensor, nn

from bayespass.errors import InvalidInput
from bayespass.posterior.base import Posterior


def snapshot(model: nn.Module, posterior: Posterior) -> nn.Module:
    """The model at the posterior mean, in eval mode, as an independent module.

    Args:
        model: in eval mode; not modified.
        posterior: over any subset of its parameters.

    Raises:
        PosteriorMismatch: names or shapes do not fit.
        InvalidInput: the model is in training mode, cannot be copied, or has weights that are not
            finite.
    """
    posterior.check_model(model)
    check_eval(model)
    shared = {id(p): nn.Parameter(p.detach().clone(), requires_grad=False) for p in model.parameters()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, mean in posterior.mean.items():
        parameter = parameters[name]
        shared[id(parameter)] = nn.Parameter(
            mean.detach().to(parameter.device, parameter.dtype, copy=True), requires_grad=False
        )
    for name, parameter in parameters.items():
        if not torch.isfinite(shared[id(parameter)]).all():
            msg = f"parameter {name} of {type(model).__name__} is NaN or infinite; check the training run"
            raise InvalidInput(msg)
    try:
        return copy.deepcopy(model, dict(shared))
    except RuntimeError as error:
        msg = f"{type(model).__name__} cannot be copied ({error}); keep only parameters and buffers as its tensors"
        raise InvalidInput(msg) from error


def check_eval(model: nn.Module) -> None:
    """Raise if any part of the model is in training mode.

    Raises:
        InvalidInput: it is, with the first such module's path.
    """
    for path, module in model.named_modules():
        if module.training:
            where = f"module {path!r}" if path else "the model"
            msg = f"{where} is in training mode; call model.eval() before predicting"
            raise InvalidInput(msg)


def place(draw: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Drawn weights on the device and in the dtype of the parameters they stand for."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: value.to(parameters[name].device, parameters[name].dtype) for name, value in draw.items()}
