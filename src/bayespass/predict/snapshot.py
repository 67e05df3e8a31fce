"""A private copy of the user's model that predictors run.

The copy shares storage with the model and has its own `nn.Parameter` objects and hooks, so moving
or hooking it never touches the user's model. Random parameters hold the posterior mean.
"""

import copy

import torch
from torch import nn

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
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, mean in posterior.mean.items():
        parameter = parameters[name]
        shared[id(parameter)] = nn.Parameter(mean.detach().to(parameter.device, parameter.dtype), requires_grad=False)
    for name, parameter in parameters.items():
        if not torch.isfinite(shared[id(parameter)]).all():
            msg = f"parameter {name} of {type(model).__name__} is NaN or infinite; check the training run"
            raise InvalidInput(msg)
    memo = {**shared, **{id(buffer): buffer.detach() for buffer in model.buffers()}}
    try:
        return copy.deepcopy(model, memo)
    except RuntimeError as error:
        msg = f"{type(model).__name__} cannot be copied ({error}); keep only parameters and buffers as its tensors"
        raise InvalidInput(msg) from error


def check_eval(model: nn.Module) -> None:
    """Raise if any part of the model is in training mode.

    Raises:
        InvalidInput: it is, with the first such module's path.
    """
    for path, module in model.named_modules():
        if module.training and (path == "" or module is not model):
            where = f"module {path!r}" if path else "the model"
            msg = f"{where} is in training mode; call model.eval() before predicting"
            raise InvalidInput(msg)
