"""Checkpoints of a training run: nested state in one safetensors file. Reading one runs no code.

A checkpoint holds model, method and scheduler, where the run stands with PyTorch's random state, and
a fingerprint of what the run was started with.

Tensors become tensors of the file; the structure around them (dicts, lists, tuples, numbers, words)
becomes JSON in its header. Floats survive exactly, JSON writes them with every digit they have.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from bayespass.errors import InvalidInput
from bayespass.files import replacing

FORMAT = "bayespass-checkpoint"
FORMAT_VERSION = 1
HEADER = "bayespass"
SEQUENCES = {"list": list, "tuple": tuple}
MAPPINGS = {"dict": dict, "counter": Counter}


@dataclass
class Run:
    """Where a run stands: what changes outside model, method and scheduler.

    Args:
        epoch: epochs that are complete.
        windows: updates done in the epoch after them.
        losses: of every update so far.
        lrs: learning rates of every update so far.
        seconds: spent so far.
        rng: PyTorch's random state after the last update, until it was restored.
    """

    epoch: int = 0
    windows: int = 0
    losses: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    seconds: float = 0.0
    rng: dict[str, Any] | None = None

    def restore_rng(self) -> None:
        """Set the random state that the run stopped with, once, if it stopped inside an epoch."""
        state, self.rng = self.rng, None
        if state is None or not self.windows:
            return
        torch.set_rng_state(state["cpu"])
        if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
            torch.cuda.set_rng_state_all(state["cuda"])


def save_run(path: Path, parts: Mapping[str, Any], identity: Mapping[str, str], run: Run) -> None:
    """Write a checkpoint.

    Args:
        path: the file; it is replaced in one step.
        parts: by name, anything with a `state_dict`, or None.
        identity: the run's `fingerprint`.
        run: where it stands.
    """
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    history = {name: torch.tensor(getattr(run, name), dtype=torch.float64) for name in ("losses", "lrs")}
    place = {**vars(run), **history, "rng": {"cpu": torch.get_rng_state(), "cuda": cuda}}
    states = {name: None if part is None else part.state_dict() for name, part in parts.items()}
    write(path, {"fingerprint": identity, "run": place, **states})


def resume(path: Path, parts: Mapping[str, Any], identity: Mapping[str, str]) -> Run:
    """Load a checkpoint into the parts of a run.

    Args:
        path: the file.
        parts: as in `save_run`.
        identity: the fingerprint of the run that wants to continue.

    Raises:
        InvalidInput: the file is damaged or belongs to another run.
    """
    for leftover in path.parent.glob(f".{path.name}.*.part"):
        leftover.unlink(missing_ok=True)  # of a run killed while it wrote
    state = read(path)
    theirs = state["fingerprint"]
    different = [key for key in {**identity, **theirs} if identity.get(key) != theirs.get(key)]
    if different:
        shown = "; ".join(f"{key} is {identity.get(key)} and was {theirs.get(key)}" for key in different[:3])
        msg = f"checkpoint {path} belongs to another run: {shown}. Give this run a path of its own, or delete the file"
        raise InvalidInput(msg)
    for name, part in parts.items():
        if part is not None:
            part.load_state_dict(state[name])
    place = state["run"]
    return Run(**{**place, "losses": place["losses"].tolist(), "lrs": place["lrs"].tolist()})


def fingerprint(
    model: nn.Module, method: Optimizer, loader: Any, scheduler: Any, settings: Mapping[str, Any]
) -> dict[str, str]:
    """What must be the same when a run continues, in words.

    Args:
        model: its class, the shapes of its state, and which parameters are trained.
        method: its class, parameter groups and settings.
        loader: its number of batches.
        scheduler: its class.
        settings: of the loop.
    """
    info = getattr(method, "info", None)
    options = dict(method.defaults) | dict(getattr(info, "settings", {}))
    for holder, names in (
        (info, ("likelihood", "n_data", "prior_precision", "temperature", "sigma_noise")),
        (method, ("n_samples", "antithetic", "max_grad_norm")),
    ):
        options |= {name: getattr(holder, name) for name in names if hasattr(holder, name)}
    state = model.state_dict()
    found: dict[str, Any] = {
        "model": type(model).__name__,
        "method": type(method).__name__,
        "scheduler": type(scheduler).__name__,
        "batches per epoch": length(loader),
        "parameter groups": [[tuple(p.shape) for p in group["params"]] for group in method.param_groups],
    }
    found |= settings
    found |= {f"{name} of the method": value for name, value in options.items()}
    found |= {f"shape of {name}": tuple(tensor.shape) for name, tensor in state.items() if isinstance(tensor, Tensor)}
    found |= {f"{name} is trained": parameter.requires_grad for name, parameter in model.named_parameters()}
    return {key: str(value) for key, value in found.items()}


def length(loader: Any) -> int | None:
    """Number of batches; None where the loader does not know."""
    try:
        return len(loader)
    except TypeError:
        return None


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Write nested state, in one step: a reader finds the old file or the new one, whole.

    Args:
        path: the file; it is replaced.
        state: dicts, lists and tuples of tensors, numbers, words and None.

    Raises:
        InvalidInput: a value of another type.
    """
    tensors: dict[str, Tensor] = {}
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "state": encode(state, "", tensors)}
    plain = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(plain, temporary, metadata={HEADER: json.dumps(header)})


def read(path: Path) -> dict[str, Any]:
    """The state in a file.

    Raises:
        InvalidInput: the file is damaged, of another kind or of another version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(HEADER, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as error:
        msg = f"checkpoint {path} cannot be read ({error}); delete it to train from the start"
        raise InvalidInput(msg) from error
    if header.get("format") != FORMAT or header.get("format_version") != FORMAT_VERSION:
        msg = (
            f"checkpoint {path} was not written by this version's train() (found {header.get('format')!r}, version "
            f"{header.get('format_version')}); choose another path, or delete it to train from the start"
        )
        raise InvalidInput(msg)
    return decode(header["state"], tensors)


def encode(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for a nested value; its tensors go into `tensors` under their paths.

    Args:
        value: what to encode.
        key: path to it.
        tensors: filled.

    Raises:
        InvalidInput: a value that is no tensor, container, number or word.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Tensor):
        tensors[key] = value
        return {"tensor": key}
    if isinstance(value, Mapping):
        kind = "counter" if isinstance(value, Counter) else "dict"
        for name in value:
            if not isinstance(name, bool | int | str):
                msg = f"a checkpoint holds dicts with numbers or words as keys; got {type(name).__name__} in {key}"
                raise InvalidInput(msg)
        return {kind: [[name, encode(item, f"{key}/{name}", tensors)] for name, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [encode(item, f"{key}/{index}", tensors) for index, item in enumerate(value)]}
    if isinstance(value, np.generic):
        return encode(value.item(), key, tensors)
    msg = (
        f"a checkpoint holds tensors, numbers, words and containers of them, never pickled objects; "
        f"got {type(value).__name__} at {key}. Leave checkpoint=None, or use a scheduler or model without it"
    )
    raise InvalidInput(msg)


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The reverse of `encode`."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind in SEQUENCES:
        return SEQUENCES[kind](decode(item, tensors) for item in content)
    return MAPPINGS[kind]({name: decode(item, tensors) for name, item in content})
