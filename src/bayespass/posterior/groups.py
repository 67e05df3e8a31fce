"""What a training method accepts, checked before it starts: groups, settings, states, starts."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bayespass.errors import InvalidInput, require_positive

FAR = 10.0  # pulls beyond this many standard deviations of minibatch noise are no noise
COMPILED = "_orig_mod."  # what torch.compile puts into the names of a model's parameters


def named_parameters(params: Any, method: str) -> list[Any]:
    """The argument `params` of an optimizer as a list, of (name, parameter) pairs or of groups.

    Args:
        params: what the user passed.
        method: the class, for messages.

    Raises:
        InvalidInput: it is no such thing, or empty.
    """
    if isinstance(params, nn.Module):
        msg = f"{method} takes the model's named parameters; pass model.named_parameters()"
        raise InvalidInput(msg)
    if isinstance(params, Tensor | str | Mapping) or not isinstance(params, Iterable):
        msg = f"{method} takes model.named_parameters() or a list of groups; got {type(params).__name__}"
        raise InvalidInput(msg)
    found = list(params)
    if not found:
        msg = f"{method} got no parameter at all; pass model.named_parameters()"
        raise InvalidInput(msg)
    if not all(isinstance(entry, Mapping) or (isinstance(entry, tuple) and len(entry) == 2) for entry in found):
        msg = f"{method} needs names for its posterior; pass model.named_parameters() or groups of (name, parameter)"
        raise InvalidInput(msg)
    return found


def clean_group(group: Mapping[str, Any], others: Iterable[Mapping[str, Any]], method: str) -> dict[str, Any]:
    """A group whose parameters are real, have names of their own and are in no other group.

    Args:
        group: with "params", (name, parameter) pairs.
        others: the groups that the method has already.
        method: the class, for messages.

    Raises:
        InvalidInput: names are missing or taken, a parameter comes twice or is complex.
    """
    pairs = group.get("params", ())
    pairs = [pairs] if isinstance(pairs, Tensor) else list(pairs)
    if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Tensor) for pair in pairs):
        msg = f"{method} needs names for its posterior; give every group (name, parameter) pairs"
        raise InvalidInput(msg)
    names = {name for other in others for name in other["param_names"]}
    seen = {parameter for other in others for parameter in other["params"]}
    renamed: list[tuple[str, Tensor]] = [(str(name).replace(COMPILED, ""), parameter) for name, parameter in pairs]
    for name, parameter in renamed:
        if parameter in seen:
            msg = f"parameter {name} comes twice (a tied weight has several names); name each parameter once"
            raise InvalidInput(msg)
        if name in names:
            msg = f"two parameters are called {name}; give groups one model's names: named_parameters(prefix=...)"
            raise InvalidInput(msg)
        if parameter.is_complex():
            msg = f"parameter {name} is complex; posteriors are over real weights, freeze it or split it in two"
            raise InvalidInput(msg)
        names.add(name)
        seen.add(parameter)
    return {**group, "params": renamed}


def check_rates(group: Mapping[str, Any]) -> None:
    """Raise unless the numbers of a group, its own or the method's, are in their ranges.

    Raises:
        InvalidInput: one is not, by name.
    """
    if group.get("lr", 1.0) is None:
        msg = "lr must be a positive number; got None"
        raise InvalidInput(msg)
    positive = ("lr", "prior_precision", "hess_init", "precision_lr", "init_sd", "sd_lr_ratio")
    require_positive(**{name: group[name] for name in positive if group.get(name) is not None})
    radius = group.get("clip_radius", 1.0)
    if radius != float("inf"):
        require_positive(clip_radius=radius)
    betas = group.get("betas", (0.0,))
    if not isinstance(betas, tuple | list) or not all(isinstance(b, int | float) and 0 <= b < 1 for b in betas):
        msg = f"betas must be two numbers in [0, 1); got {betas}"
        raise InvalidInput(msg)
    if "betas" in group and len(betas) != 2:
        msg = f"betas must be two numbers in [0, 1); got {betas}"
        raise InvalidInput(msg)


def check_prior_mean(prior_mean: Any, names: Iterable[str]) -> None:
    """Raise unless a prior mean is None, "initial" or values for some of the names.

    Raises:
        InvalidInput: it is not.
    """
    if prior_mean is None or (isinstance(prior_mean, str) and prior_mean == "initial"):
        return
    if not isinstance(prior_mean, Mapping):
        msg = (
            f"prior_mean must be None (zero), 'initial' or a mapping from parameter names to values; got {prior_mean!r}"
        )
        raise InvalidInput(msg)
    known = set(names)
    unknown = [name for name in prior_mean if name not in known]
    if unknown:
        msg = f"prior_mean has values for {', '.join(map(str, unknown[:3]))}, which the method does not train"
        raise InvalidInput(msg)


def follow(state: dict[str, Any], parameter: Tensor) -> None:
    """Move state to where its parameter is now, and to a dtype that is exact enough for it."""
    exact = torch.promote_types(parameter.dtype, torch.float32)
    for key, value in state.items():
        if key != "step" and (value.device != parameter.device or value.dtype != exact):
            state[key] = value.to(parameter.device, exact)
    if exact != parameter.dtype and "mean" not in state:
        state["mean"] = parameter.detach().to(exact, copy=True)
    elif exact == parameter.dtype:
        state.pop("mean", None)


def check_identity(state_dict: Mapping[str, Any], mine: Mapping[str, Any]) -> Mapping[str, Any]:
    """The method's own part of a state, if it belongs to a method with this identity.

    Raises:
        InvalidInput: it belongs to another optimizer, scale or setting.
    """
    theirs = state_dict.get("method")
    if theirs is None:
        msg = f"this is no state of {mine['class']}; it was written by another optimizer"
        raise InvalidInput(msg)
    for key, value in mine.items():
        if theirs.get(key) != value:
            msg = f"the state was written with {key} = {theirs.get(key)!r}; make this method so, it has {value!r}"
            raise InvalidInput(msg)
    return theirs


def warn_of_far_start(pulls: list[Tensor], noise: float) -> None:
    """Warn if the first gradients pull further than minibatch noise can.

    Args:
        pulls: by parameter, in standard deviations of q.
        noise: N / (T B), the variance of a pull at the optimum, for batches of B rows.

    Warns:
        UserWarning: they do.
    """
    size = sum(float(pull.square().sum()) for pull in pulls) / max(1, sum(pull.numel() for pull in pulls))
    if size > FAR**2 * noise:
        msg = (
            f"the weights start far from the optimum: the data pull them by {size**0.5:.0f} standard deviations, and "
            f"the variance may collapse on the way; train them first, or choose a smaller init_sd"
        )
        warnings.warn(msg, UserWarning, stacklevel=5)


def warn_of_rounding(parameters: Iterable[tuple[str, torch.dtype, Tensor, Tensor]]) -> None:
    """Warn if half-precision weights cannot hold draws as close together as the posterior's.

    Args:
        parameters: name, dtype, mean and standard deviation.

    Warns:
        UserWarning: for most entries of a parameter they cannot.
    """
    coarse = []
    for name, dtype, mean, sd in parameters:
        if dtype in (torch.float16, torch.bfloat16) and mean.numel():
            half_step = mean.abs() * (torch.finfo(dtype).eps / 2)
            coarse += [name] if float((sd < half_step).float().mean()) > 0.5 else []
    if coarse:
        msg = (
            f"the standard deviation of most entries of {coarse[0]} ({len(coarse)} parameters in all) is below what "
            f"their dtype resolves: draws are rounded to a grid wider than the posterior. Keep random weights "
            f"in float32"
        )
        warnings.warn(msg, UserWarning, stacklevel=7)
