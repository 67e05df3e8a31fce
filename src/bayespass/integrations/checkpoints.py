"""A posterior from checkpoints that lie on disk: an ensemble, or the Gaussian they walk through.

    posterior = from_checkpoints("runs/", model)                           # one network per seed
    posterior = from_checkpoints("run/", model, kind="swag", rank=20)      # late checkpoints of one run

Only safetensors is read, and reading it runs no code: one file per checkpoint, or a folder per checkpoint as
`save_pretrained` writes it (model.safetensors, or shards with model.safetensors.index.json). Files of PyTorch's
own format (.pt, .pth, .bin, .ckpt) are pickles; convert them once, with PyTorch's loader and
`weights_only=True`, and `safetensors.torch.save_file({k: v.contiguous().clone() for k, v in weights.items()}, path)`.

One checkpoint is in memory at a time, besides what the posterior keeps: all of them for an ensemble, the mean,
a square and `rank` deviations for SWAG.
"""

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bayespass.errors import InvalidInput
from bayespass.posterior.base import PosteriorInfo
from bayespass.posterior.empirical import Empirical
from bayespass.posterior.ensemble import ensemble
from bayespass.posterior.low_rank import LowRankGaussian
from bayespass.posterior.swag import SWAG

Kind = Literal["ensemble", "swag"]

SUFFIX = ".safetensors"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".pt", ".pth", ".bin", ".ckpt")
COMPILED = "_orig_mod."  # what torch.compile puts before the names inside a module that it wraps
PARALLEL = "module."  # what DataParallel and DistributedDataParallel put before all names


def from_checkpoints(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    model: nn.Module,
    kind: Kind = "ensemble",
    names: Iterable[str] | Callable[[str], bool] | None = None,
    rank: int = 20,
    info: PosteriorInfo | None = None,
) -> Empirical | LowRankGaussian:
    """The posterior of checkpoints of one architecture.

    Batch-norm statistics differ between checkpoints and are no parameters. For both kinds they are written into
    each checkpoint's affine weights, against the statistics of `model`, so that it computes the same function
    there in eval mode, as in `ensemble`; nothing has to be recomputed afterwards. All else outside `names` must be
    equal to the model's. Prefixes that `torch.compile` and data parallelism put before names are taken off.

    Args:
        paths: a folder of checkpoints, or a list of files and folders, each one checkpoint. In a folder they are
            taken by name, numbers in order, which for "swag" is the order of training.
        model: the network that will predict. It needs one checkpoint's weights where some are not random.
        kind: "ensemble" (`Empirical`, every checkpoint a member) or "swag" (`LowRankGaussian`).
        names: random parameters, a list or a predicate; by default all that require gradients.
        rank: deviations that "swag" keeps, the last ones, at least 2.
        info: what they were trained with.

    Raises:
        FileNotFoundError: there is no such file or folder.
        InvalidInput: an unknown kind, fewer than two checkpoints, a file that is no safetensors, or a checkpoint
            that does not fit the model; the message names the file.
    """
    if kind not in get_args(Kind):
        msg = f"kind must be 'ensemble' or 'swag'; got {kind!r}"
        raise InvalidInput(msg)
    found = _in_folder(Path(paths)) if isinstance(paths, str | os.PathLike) else [Path(path) for path in paths]
    if len(found) < 2:
        where = (
            f"; {paths} holds {', '.join(map(str, found)) or 'none'}" if isinstance(paths, str | os.PathLike) else ""
        )
        msg = f"a posterior needs at least two checkpoints{where}. Pass a folder of them, or a list of paths"
        raise InvalidInput(msg)
    chosen = names if names is None or callable(names) or isinstance(names, str) else list(names)
    settings = {"checkpoints": len(found)} | ({"rank": rank} if kind == "swag" else {})
    info = info or PosteriorInfo(method=kind, settings=settings)
    if kind == "ensemble":
        return Empirical([_member(path, model, chosen) for path in found], info)
    first = _member(found[0], model, chosen)
    walker = {name: nn.Parameter(value) for name, value in first.items()}
    swag = SWAG(walker.items(), info.n_data, rank, info.likelihood, info.sigma_noise)
    swag.info = replace(info, settings={**info.settings, "rank": rank})
    swag.collect()
    for path in found[1:]:
        with torch.no_grad():
            for name, value in _member(path, model, chosen).items():
                walker[name].copy_(value)
        swag.collect()
    return swag.posterior()


def _in_folder(folder: Path) -> list[Path]:
    """The checkpoints in a folder, by name with numbers in order.

    Raises:
        FileNotFoundError: there is no such folder.
        InvalidInput: it holds only pickled weights.
    """
    if not folder.is_dir():
        msg = f"no folder of checkpoints at {folder}; pass a folder, or a list of paths"
        raise FileNotFoundError(msg)
    if (folder / INDEX).is_file():
        return [folder]
    files = [path for path in folder.iterdir() if path.suffix == SUFFIX and path.is_file()]
    folders = [path for path in folder.iterdir() if (path / SINGLE).is_file() or (path / INDEX).is_file()]
    if not files and not folders:
        pickled = sorted(path for path in folder.rglob("*") if path.suffix in PICKLED)
        if pickled:
            _refuse_pickle(pickled[0])
    return sorted([*files, *folders], key=_natural)


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """epoch9 before epoch10."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", path.name)]


def _refuse_pickle(path: Path) -> None:
    msg = (
        f"{path} is in PyTorch's own format, a pickle, which is never read here. Convert it where you trust it: load "
        f"it with PyTorch and weights_only=True, take the model's state dict out of it, and write that with "
        f"safetensors.torch.save_file({{k: v.contiguous().clone() for k, v in weights.items()}}, "
        f"{path.with_suffix(SUFFIX).name!r})"
    )
    raise InvalidInput(msg)


def _member(path: Path, model: nn.Module, names: "Iterable[str] | Callable[[str], bool] | None") -> dict[str, Tensor]:
    """The random parameters of one checkpoint, as the model would need them to compute its function.

    Raises:
        InvalidInput: it does not fit the model.
    """
    state = _read(path, model)
    try:
        return dict(ensemble([state], model=model, names=names).members[0])
    except InvalidInput as error:
        msg = f"checkpoint {path} does not fit: {str(error).replace('member 0', 'it')}"
        raise InvalidInput(msg) from error


def _read(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint's tensors under the model's names, with its dtypes and devices; other tensors are left out.

    Raises:
        FileNotFoundError: there is no such file or folder.
        InvalidInput: it is not of this format, or damaged.
    """
    expected = model.state_dict()
    state: dict[str, Tensor] = {}
    for file in _files(path):
        try:
            with safe_open(file, framework="pt") as opened:
                keys = list(opened.keys())
                own = _own_names(keys, expected)
                state |= {
                    own[key]: opened.get_tensor(key).to(expected[own[key]]) for key in keys if own[key] in expected
                }
        except (SafetensorError, OSError, ValueError) as error:
            msg = f"{file} is not a readable safetensors file ({error}); save the checkpoint again"
            raise InvalidInput(msg) from error
    return state | _tied(state, model, expected)


def _files(path: Path) -> list[Path]:
    """The safetensors files of one checkpoint.

    Raises:
        FileNotFoundError: one is missing.
        InvalidInput: the path is of another format, or the index of shards is damaged.
    """
    if path.suffix in PICKLED:
        _refuse_pickle(path)
    if path.is_dir() and (path / INDEX).is_file():
        try:
            shards = sorted(set(json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            msg = f"{path / INDEX} is no index of shards ({error}); save the checkpoint again"
            raise InvalidInput(msg) from error
        if strange := [shard for shard in shards if not isinstance(shard, str) or Path(shard).name != shard]:
            msg = f"{path / INDEX} names {strange[0]!r}, which is no file of its own folder; save the checkpoint again"
            raise InvalidInput(msg)
        files = [path / shard for shard in shards]
    else:
        files = [path / SINGLE if path.is_dir() else path]
    for file in files:
        if not file.is_file():
            pickled = sorted(p for p in path.iterdir() if p.suffix in PICKLED) if path.is_dir() else []
            if pickled:
                _refuse_pickle(pickled[0])
            msg = f"no checkpoint file at {file}"
            raise FileNotFoundError(msg)
    return files


def _own_names(keys: list[str], expected: Iterable[str]) -> dict[str, str]:
    """The model's name for every key, wrappers' prefixes taken off where the model itself has none."""
    known = set(expected)
    compiled = any(COMPILED in name for name in known)
    names = {key: key if compiled or key in known else key.replace(COMPILED, "") for key in keys}
    wrapped = all(name.startswith(PARALLEL) for name in names.values()) and not known & set(names.values())
    return {key: name.removeprefix(PARALLEL) if wrapped else name for key, name in names.items()}


def _tied(state: dict[str, Tensor], model: nn.Module, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Further names of tied parameters, of which a safetensors file holds one."""
    first: dict[int, str] = {}
    every = list(model.named_parameters(remove_duplicate=False))
    for name, parameter in every:
        if name in state:
            first.setdefault(id(parameter), name)
    return {n: state[first[id(p)]] for n, p in every if n in expected and n not in state and id(p) in first}
