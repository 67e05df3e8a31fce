"""What MODEL means on the command line: `module:factory`, or a local Hugging Face folder.

Nothing is downloaded, no code from a model folder is run, and no pickle is read.
"""

import importlib
import os
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayespass.errors import InvalidInput, MissingExtra

if TYPE_CHECKING:
    from torch import nn

Model = Annotated[
    str,
    typer.Argument(
        help="module:factory that returns the nn.Module, e.g. my_project.net:build; or a local Hugging Face folder."
    ),
]
Weights = Annotated[
    Path | None, typer.Option(help="safetensors file with the model's weights, if the factory or folder has none.")
]
SAFE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
TOKENS = 32  # length of a made-up text


def build_model(spec: str, weights: Path | None) -> "nn.Module":
    """The trained module that MODEL names, in eval mode.

    Raises:
        InvalidInput: see `open_model`; also weights that nobody trained.
    """
    network, notes = open_model(spec, weights)
    if notes:
        msg = f"MODEL {spec!r} has no trained weights: {notes[0]}. Pass --weights, or save the model with its weights"
        raise InvalidInput(msg)
    return network


def open_model(spec: str, weights: Path | None) -> "tuple[nn.Module, tuple[str, ...]]":
    """The module that MODEL names, in eval mode, and notes about weights that are random.

    Args:
        spec: module:factory, or a folder with a config.json.
        weights: safetensors file to load into it.

    Raises:
        InvalidInput: the text is neither, the module cannot be imported, it returns no module, or
            the weights do not fit.
    """
    from torch import nn

    notes: tuple[str, ...] = ()
    if Path(spec).is_dir():
        network, notes = _from_folder(Path(spec), blank=weights is not None)
    else:
        network = getattr(*_factory(spec))()
    if not isinstance(network, nn.Module):
        msg = f"MODEL {spec!r} returned {type(network).__name__}, not a torch.nn.Module"
        raise InvalidInput(msg)
    if weights is not None:
        from safetensors import SafetensorError
        from safetensors.torch import load_model

        try:
            load_model(network, weights)
        except (SafetensorError, RuntimeError, OSError) as error:
            msg = f"--weights {weights} cannot be loaded into {spec}: {error}"
            raise InvalidInput(msg) from error
        notes = ()
    return network.eval(), notes


def example_inputs(spec: str, network: "nn.Module", file: Path | None) -> Any:
    """Inputs to trace the model with: from --inputs, from the factory's module, or made up from the config.

    Args:
        spec: as for `open_model`.
        network: what it returned.
        file: npz file; its arrays are keyword arguments of forward, the single array `inputs` the only argument.

    Raises:
        InvalidInput: there are none and none can be made up.
    """
    if file is not None:
        return _read_inputs(file, network)
    if Path(spec).is_dir():
        return made_up_inputs(network)
    module, _ = _factory(spec)
    example = getattr(module, "example_inputs", None)
    if example is None:
        msg = (
            f"no inputs to trace MODEL {spec!r} with; pass --inputs FILE.npz, "
            f"or define example_inputs (a tensor, or a function that returns one) in {module.__name__}"
        )
        raise InvalidInput(msg)
    return example() if callable(example) else example


def _factory(spec: str) -> tuple[Any, str]:
    """The imported module and the name of the factory in it.

    Raises:
        InvalidInput: the text is no module:factory, or it cannot be imported.
    """
    module_name, colon, factory_name = spec.partition(":")
    if not colon or not module_name or not factory_name:
        msg = f"MODEL must be module:factory, such as my_project.net:build, or a local model folder; got {spec!r}"
        raise InvalidInput(msg)
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
        getattr(module, factory_name)
    except (ImportError, AttributeError) as error:
        msg = f"MODEL {spec!r} cannot be imported: {error}. Run from the folder that holds the module, or install it"
        raise InvalidInput(msg) from error
    finally:
        sys.path.pop(0)
    return module, factory_name


def _from_folder(folder: Path, *, blank: bool) -> "tuple[nn.Module, tuple[str, ...]]":
    """The transformers model in a folder, and notes about weights that are random.

    Args:
        folder: with a config.json that names its architecture.
        blank: leave the folder's weights alone, others are loaded later.

    Raises:
        MissingExtra: transformers is not installed.
        InvalidInput: the folder holds no model that transformers itself defines, or only pickled weights.
    """
    if not (folder / "config.json").is_file():
        msg = f"MODEL {str(folder)!r} is a folder without config.json; pass a folder written by save_pretrained"
        raise InvalidInput(msg)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
    except ImportError as error:
        msg = f"reading the model folder {folder} needs transformers; run: pip install bayespass[transformers]"
        raise MissingExtra(msg) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError) as error:
        msg = f"{folder}/config.json cannot be read by transformers: {_one_line(error)}"
        raise InvalidInput(msg) from error
    name = (config.architectures or ["none"])[0]
    architecture = getattr(transformers, name, None)
    if not (isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)):
        msg = (
            f"{folder}/config.json names the architecture {name!r}, which transformers does not define; code from a "
            f"model folder is never run. Build the model yourself and pass module:factory"
        )
        raise InvalidInput(msg)
    if not any((folder / file).is_file() for file in SAFE_WEIGHTS):
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        if pickled and not blank:
            msg = f"{folder} holds only pickled weights ({pickled[0]}), which are never read; convert to safetensors"
            raise InvalidInput(msg)
        return architecture._from_config(config), ("the folder has no weights; they are random",)
    if blank:
        return architecture._from_config(config), ()
    try:
        network, loading = architecture.from_pretrained(  # type: ignore[misc]  it returns a pair if asked
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (ValueError, OSError, RuntimeError) as error:
        msg = f"the weights in {folder} cannot be loaded: {_one_line(error)}"
        raise InvalidInput(msg) from error
    absent = sorted(loading["missing_keys"])
    notes = (f"{len(absent)} weights are not in the folder and random: {', '.join(absent[:3])}",) if absent else ()
    return network, notes


def made_up_inputs(network: Any) -> dict[str, Any]:
    """Small inputs of the kind that a transformers model takes, from its config.

    Raises:
        InvalidInput: its main input is of a kind that this does not know.
    """
    import inspect

    import torch

    config, main = network.config, network.main_input_name
    generator = torch.Generator().manual_seed(0)

    def number(*names: str, default: int) -> int:
        for part in (config, getattr(config, "vision_config", None), getattr(config, "text_config", None)):
            for name in names:
                value = getattr(part, name, None)
                if isinstance(value, list | tuple) and value:
                    value = value[0]
                if isinstance(value, int):
                    return value
        return default

    def noise(*shape: int) -> torch.Tensor:
        dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
        return torch.randn(*shape, generator=generator).to(dtype)

    def text() -> torch.Tensor:
        rows = 1 if getattr(config, "pad_token_id", None) is None else 2
        length = min(TOKENS, number("max_position_embeddings", "n_positions", default=TOKENS))
        ids = torch.randint(min(5, vocabulary - 1), vocabulary, (rows, length), generator=generator)
        ids[:, -1] = min(number("eos_token_id", default=2), vocabulary - 1)
        return ids

    vocabulary = number("vocab_size", default=1000)
    size, bins = number("image_size", default=224), number("num_mel_bins", default=80)
    makers = {
        "pixel_values": lambda: noise(2, number("num_channels", default=3), size, size),
        "input_ids": text,
        "input_values": lambda: (
            noise(2, number("max_length", default=1024), bins) if hasattr(config, "num_mel_bins") else noise(2, 16000)
        ),
        "input_features": lambda: noise(2, bins, 2 * number("max_source_positions", default=1500)),
        "past_values": lambda: noise(
            2, number("context_length", default=64), number("num_input_channels", "input_size", default=1)
        ),
    }
    if main not in makers:
        msg = f"{type(network).__name__} takes {main!r}, for which no inputs can be made up; pass --inputs FILE.npz"
        raise InvalidInput(msg)
    inputs = {main: makers[main]()}
    accepted = inspect.signature(network.forward).parameters
    if main == "input_ids" and "pixel_values" in accepted:
        rows = len(inputs[main])
        inputs["pixel_values"] = noise(rows, number("num_channels", default=3), size, size)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = text()[:1].expand(len(inputs[main]), -1).contiguous()
    return inputs


def _read_inputs(path: Path, network: "nn.Module") -> Any:
    """The arrays of an npz file as the model takes them, floating-point ones in its dtype; nothing is unpickled.

    Raises:
        FileNotFoundError: there is no such file.
        InvalidInput: it is no npz file of numbers, or empty.
    """
    import numpy as np
    import torch

    if not path.is_file():
        msg = f"no inputs file at {path}"
        raise FileNotFoundError(msg)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (ValueError, TypeError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        msg = f"--inputs {path} must be an npz file of numeric arrays ({error})"
        raise InvalidInput(msg) from error
    if not tensors:
        msg = f"--inputs {path} holds no array; name them after the arguments of forward, or a single one `inputs`"
        raise InvalidInput(msg)
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    tensors = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
    return tensors["inputs"] if list(tensors) == ["inputs"] else tensors


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
