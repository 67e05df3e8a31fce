"""How a batch is called and where a model's output is.

A loader yields `inputs` or the pair `(inputs, targets)`. Inputs are a tensor, a tuple of positional
arguments or a dict of keyword arguments; a dict may carry its targets under "labels".
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bayespass.errors import InvalidInput

LABEL_KEYS = ("labels", "label", "targets")


def call_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for the model: a tensor, a tuple or a dict.

    Raises:
        InvalidInput: inputs of another type.
    """
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    msg = f"inputs must be a tensor, a tuple of arguments or a dict of keyword arguments; got {type(inputs).__name__}"
    raise InvalidInput(msg)


def split_batch(batch: Any) -> tuple[Any, Tensor | None]:
    """Inputs and targets of one batch; targets are None where the batch has none."""
    if isinstance(batch, Mapping):
        for key in LABEL_KEYS:
            if key in batch:
                return {name: value for name, value in batch.items() if name != key}, batch[key]
        return batch, None
    if isinstance(batch, tuple | list):
        if len(batch) == 1:
            return batch[0], None
        if len(batch) == 2:
            return batch[0], batch[1]
    return batch, None


def input_batches(batches: Any, device: torch.device | None = None) -> Iterator[Any]:
    """The inputs of every batch, targets left out, on the device.

    Args:
        batches: a loader, or one batch (a tensor, a tuple or a dict).
        device: where to put them; None leaves them where they are.

    Yields:
        inputs: a tensor, a tuple or a dict.

    Raises:
        InvalidInput: there is no batch at all.
    """
    if isinstance(batches, Tensor | Mapping | tuple):
        batches = [batches]
    empty = True
    for batch in batches:
        empty = False
        yield to_device(split_batch(batch)[0], device)
    if empty:
        msg = "the loader yields no batch; pass a re-iterable loader (a DataLoader or a list) with at least one"
        raise InvalidInput(msg)


def labelled_batches(batches: Iterable[Any], device: torch.device | None = None) -> Iterator[tuple[Any, Tensor]]:
    """Inputs and targets of every batch, on the device.

    Yields:
        inputs and targets.

    Raises:
        InvalidInput: there is no batch at all, or one without targets or without an axis of rows.
    """
    empty = True
    for batch in batches:
        empty = False
        inputs, targets = split_batch(batch)
        if targets is None:
            msg = (
                f"every batch must be (inputs, targets), or a dict with one of {LABEL_KEYS}; got {type(batch).__name__}"
            )
            raise InvalidInput(msg)
        targets = torch.as_tensor(targets)
        if targets.dim() == 0:
            msg = "targets must have a leading axis, one entry per row; pass a DataLoader of the data set, not itself"
            raise InvalidInput(msg)
        yield to_device(inputs, device), targets.to(device)
    if empty:
        msg = "the loader yields no batch; pass a re-iterable loader (a DataLoader or a list) with at least one"
        raise InvalidInput(msg)


def to_device(inputs: Any, device: torch.device | None) -> Any:
    """Every tensor inside on the device."""
    if device is None:
        return inputs
    return pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, inputs)


def batch_size(inputs: Any) -> int:
    """Rows of a batch: the leading axis of its first tensor."""
    return next(len(leaf) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))


def rows_of(inputs: Any, place: slice | Tensor) -> Any:
    """Some rows of a batch, by a slice or by their indices."""

    def some(t: Tensor) -> Tensor:
        return t[place.to(t.device) if isinstance(place, Tensor) else place]

    return pytree.tree_map(lambda t: some(t) if isinstance(t, Tensor) else t, inputs)


def model_output(output: Any) -> Any:
    """The tensor that a model's output is about.

    Itself, its `logits`, else the first floating-point tensor of the mapping or tuple that is not
    a loss (`last_hidden_state`, `prediction_outputs`, ...).

    Raises:
        InvalidInput: an output of another form.
    """
    if isinstance(output, Tensor):
        return output
    if getattr(output, "logits", None) is not None:
        return output.logits
    if isinstance(output, Mapping):
        named = {"logits": output["logits"]} if output.get("logits") is not None else output
        values = [value for name, value in named.items() if name != "loss"]
    else:
        values = list(output[:1]) if isinstance(output, tuple | list) else []
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    msg = (
        f"the model must return a tensor, an object or dict with `logits`, or a tuple that starts with a tensor; "
        f"got {type(output).__name__}. Wrap the model in a module whose forward picks the tensor"
    )
    raise InvalidInput(msg)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU when it has neither."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
