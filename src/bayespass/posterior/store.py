"""The posterior file: one safetensors file of tensors, with a manifest in its header.

The manifest holds names and shapes, hashes of the tensors and of the model's frozen weights and
buffers, what the posterior was fitted with, and the library version. It never holds a row of
training data, and reading it runs no code.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bayespass.errors import InvalidPosteriorFile
from bayespass.files import replacing

FORMAT = "bayespass-posterior"
FORMAT_VERSION = 1
HEADER = "bayespass"


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def frozen_tensors(model: nn.Module, random_names: set[str]) -> dict[str, Tensor]:
    """The model's parameters outside `random_names` (under any of their names) and its saved buffers."""
    random = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in random_names}
    frozen = {name: p for name, p in model.named_parameters() if id(p) not in random}
    persistent = model.state_dict()
    return {**frozen, **{name: buffer for name, buffer in model.named_buffers() if name in persistent}}


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
    """Write the file beside its destination, then rename it into place."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, **manifest}
    header["content_hash"] = _hash_content(plain, header)
    with replacing(Path(path)) as temporary:
        save_file(plain, temporary, metadata={HEADER: json.dumps(header, sort_keys=True)})


def _hash_content(tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> str:
    """SHA-256 over the tensors and everything the manifest says."""
    rest = json.dumps({key: value for key, value in manifest.items() if key != "content_hash"}, sort_keys=True)
    return hashlib.sha256((hash_tensors(tensors) + rest).encode()).hexdigest()


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and manifest of a posterior file.

    Raises:
        FileNotFoundError: there is no such file.
        InvalidPosteriorFile: the file is damaged, or not a posterior of this library or version.
    """
    if not Path(path).is_file():
        msg = f"no posterior file at {path}"
        raise FileNotFoundError(msg)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        manifest = json.loads(metadata.get(HEADER, "{}"))
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, ValueError, OSError) as error:
        msg = f"{path} is not a readable safetensors file ({error}); it is damaged or of another kind. Save it again"
        raise InvalidPosteriorFile(msg) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        msg = (
            f"{path} holds no bayespass posterior; it was written by something else. Write one with posterior.save(...)"
        )
        raise InvalidPosteriorFile(msg)
    if manifest.get("format_version") != FORMAT_VERSION:
        msg = f"{path} has posterior format {manifest.get('format_version')}; this version reads {FORMAT_VERSION}"
        raise InvalidPosteriorFile(msg)
    if manifest.get("content_hash") != _hash_content(tensors, manifest):
        msg = f"{path} is damaged: its contents do not match the hash in its manifest. Save it again"
        raise InvalidPosteriorFile(msg)
    return tensors, manifest
