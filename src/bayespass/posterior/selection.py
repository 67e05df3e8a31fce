"""Which parameters are random: all, the first or last layer that runs, a list, or a predicate.

    method = IVON(select_parameters(model, "first", images), lr=0.1, n_data=len(data))

First and last are read off one forward pass, never off the order in which a model registers its
modules. A layer runs where an operation takes one of its parameters together with something that was
computed from the inputs, so a class token that is only expanded, or a position table that never sees
the inputs, is not the first layer of a transformer: its patch projection or word embedding is.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from bayespass.batches import call_arguments, device_of, to_device
from bayespass.errors import InvalidInput
from bayespass.posterior.base import choose_names

Names = Literal["all", "first", "last"] | Iterable[str] | Callable[[str], bool]

# Operations that read only the form of an argument: of the second and later ones, or of all.
FORM_OF_REST = {"to", "type_as", "expand_as", "view_as", "reshape_as"}
FORM_OF_ALL = ("new_", "_like")


def first_layer(model: nn.Module, inputs: Any, trainable_only: bool = True) -> tuple[str, ...]:
    """Names of the parameters of the first layer that runs, its bias included.

    A vision transformer's is its patch projection, a convolutional network's its stem. Where several
    embeddings are summed it is the one looked up first with something from the inputs (BERT: words);
    name the others to make them random too.

    Args:
        model: any `nn.Module`; run once in eval mode without gradients, its modes are restored.
        inputs: one batch as the model takes it: a tensor, a tuple of arguments or a dict of keywords.
        trainable_only: pass over parameters with `requires_grad=False`, so that the first layer with
            something to train is returned.

    Returns:
        names as in `model.named_parameters()`, a tied weight once under its first name.

    Raises:
        InvalidInput: no such parameter is used by the forward pass.
    """
    parameters = _float_parameters(model, trainable_only)
    used = _trace(model, inputs, parameters)[0]
    return _layer(model, parameters, used, used[0])


def last_layer(model: nn.Module, inputs: Any, trainable_only: bool = True) -> tuple[str, ...]:
    """Names of the parameters of the last layer that runs, its bias included.

    Args:
        model: see `first_layer`.
        inputs: see `first_layer`.
        trainable_only: see `first_layer`.

    Returns:
        names as in `model.named_parameters()`, a tied weight once under its first name.

    Raises:
        InvalidInput: no such parameter is used by the forward pass.
    """
    parameters = _float_parameters(model, trainable_only)
    used = _trace(model, inputs, parameters)[-1]
    return _layer(model, parameters, used, used[-1])


def select_parameters(model: nn.Module, names: Names = "all", inputs: Any = None) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters to hand to a training method, in the model's order.

    Args:
        model: any `nn.Module`.
        names: "all" that require gradients, "first" or "last" layer that runs, a list of names, or a
            predicate on names.
        inputs: one batch as the model takes it, for "first" and "last".

    Raises:
        InvalidInput: inputs are missing, a name is unknown or frozen, or nothing is left.
    """
    parameters = _float_parameters(model, trainable_only=True)
    if isinstance(names, str) and names in ("first", "last"):
        if inputs is None:
            msg = f"names={names!r} is found by running the model once; pass one batch, select_parameters(..., inputs)"
            raise InvalidInput(msg)
        names = first_layer(model, inputs) if names == "first" else last_layer(model, inputs)
    elif isinstance(names, str) and names == "all":
        names = tuple(parameters)
    elif not callable(names):
        names = _canonical_names(model, [names] if isinstance(names, str) else names)
        frozen = sorted(name for name in names if name not in parameters)
        if frozen:
            msg = f"parameter {frozen[0]} is frozen or not floating-point; call requires_grad_(True) on what is random"
            raise InvalidInput(msg)
    return [(name, parameters[name]) for name in choose_names(parameters, names)]


@contextmanager
def frozen_except(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Only these parameters require gradients inside, and the whole model is in eval mode.

    Statistics of batch norms stay fixed and dropout is off. On every way out, errors included, the
    `requires_grad` flags and the modes are what they were.

    Args:
        model: any `nn.Module`.
        names: the parameters that stay trainable.

    Yields:
        nothing.

    Raises:
        InvalidInput: a name is unknown.
    """
    chosen = set(_canonical_names(model, [names] if isinstance(names, str) else names))
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen and parameter.is_floating_point())
        model.eval()
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


class _Uses(TorchFunctionMode):
    """Follows parameters and inputs through a forward pass and notes where they meet.

    Values are remembered by identity: those computed from inputs, and those computed from parameters
    alone (a transposed, cast or normalised weight) with the parameters they stand for.
    """

    def __init__(self, inputs: Any, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.met: list[list[int]] = []  # ids of the parameters of every operation on data, in order
        self.alone: list[list[int]] = []  # the same for operations on parameters alone
        self._data = WeakTensorKeyDictionary(dict.fromkeys(_tensors(inputs), True))
        self._derived = WeakTensorKeyDictionary({parameter: [id(parameter)] for parameter in parameters})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name.startswith(FORM_OF_ALL[0]) or name.endswith(FORM_OF_ALL[1]):
            return result
        arguments = _tensors(args[:1] if name in FORM_OF_REST else (args, kwargs))
        results = _tensors(args[:1] if name == "__setitem__" else result)
        if not results:
            return result  # a shape, a dtype, a flag
        from_data = any(tensor in self._data for tensor in arguments)
        used = [key for tensor in arguments if tensor in self._derived for key in self._derived[tensor]]
        if used:
            (self.met if from_data else self.alone).append(used)
        for tensor in results:
            if from_data:
                self._data[tensor] = True
            elif used and tensor not in self._derived:
                self._derived[tensor] = used
        return result


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def _trace(model: nn.Module, inputs: Any, parameters: dict[str, nn.Parameter]) -> list[list[int]]:
    """Ids of the parameters of every operation that has some, in the order of execution.

    Raises:
        InvalidInput: there is none.
    """
    args, kwargs = call_arguments(to_device(inputs, device_of(model)))
    modes = [(module, module.training) for module in model.modules()]
    uses = _Uses((args, kwargs), parameters.values())
    try:
        model.eval()
        with torch.no_grad(), uses:
            model(*args, **kwargs)
    finally:
        for module, mode in modes:
            module.training = mode
    found = uses.met or uses.alone  # inputs that are no tensors cannot be followed
    if not found:
        msg = (
            f"the forward pass of {type(model).__name__} uses no trainable floating-point parameter that can be "
            f"seen; unfreeze one, or give names=[...] instead (scripted modules hide theirs)"
        )
        raise InvalidInput(msg)
    return found


def _layer(model: nn.Module, parameters: dict[str, nn.Parameter], used: list[int], key: int) -> tuple[str, ...]:
    """The parameters of the module that owns one parameter of an operation.

    A tied weight has several owners; the layer is the one whose parameters the operation takes.
    """
    owned: dict[str, set[int]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owned.setdefault(_owner(name), set()).add(id(parameter))
    owners = [keys for keys in owned.values() if key in keys]
    layer = max(owners, key=lambda keys: len(keys & set(used)) - len(keys - set(used)))
    return tuple(name for name, parameter in parameters.items() if id(parameter) in layer)


def _owner(name: str) -> str:
    """Path of the module that a parameter belongs to; a parametrized weight belongs to its layer."""
    layer, parametrized, _ = f".{name}".partition(".parametrizations.")
    return (layer if parametrized else f".{name}".rpartition(".")[0]).removeprefix(".")


def _float_parameters(model: nn.Module, trainable_only: bool) -> dict[str, nn.Parameter]:
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and (parameter.requires_grad or not trainable_only)
    }


def _canonical_names(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The names under which `named_parameters` lists the parameters: a tied weight has one.

    Raises:
        InvalidInput: a name is unknown.
    """
    every = dict(model.named_parameters(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return [first[id(every[name])] for name in choose_names(every, names)]
