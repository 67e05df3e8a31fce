"""A folder of images: one subfolder per class, read with Pillow.

For a Hugging Face folder its own image processor resizes and normalises. For module:factory pixels
are scaled to [0, 1]; `--image-size` resizes, without it all images must have one size.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from bayespass.cli.data import Data, Recipe, class_labels, show
from bayespass.errors import InvalidInput

AT_ONCE = 64  # images that are decoded together


def read_images(path: Path, recipe: Recipe, network: nn.Module, folder: Path | None) -> tuple[Data, Recipe]:
    """Images and the label of the subfolder that each is in; hidden files are passed over.

    Args:
        path: the folder of class folders.
        recipe: with `image_size` and `channels` if they are decided.
        network: the model they are for.
        folder: its Hugging Face folder.

    Raises:
        InvalidInput: no class folder, an empty one, or a file that is no image; the message names it.
    """
    if recipe.likelihood == "regression":
        msg = f"{path}: folders of images give class labels; for regression use an npz file"
        raise InvalidInput(msg)
    files = _files(path)
    labels, recipe = class_labels(path, [file.parent.name for file in files], recipe, network)
    if folder is None:
        recipe = replace(recipe, channels=recipe.channels or _channels(files))
        pixels, recipe = _plain(files, recipe)
        return Data(pixels, labels), recipe
    if recipe.image_size is not None:
        msg = f"--image-size does not apply: the preprocessor_config.json in {folder} sets the size"
        raise InvalidInput(msg)
    recipe = replace(recipe, channels=recipe.channels or int(getattr(network.config, "num_channels", 3) or 3))  # type: ignore[union-attr]
    return Data(_processed(files, recipe, folder), labels), recipe


def image_processor(folder: Path) -> Any:
    """The image processor of a model folder.

    Raises:
        InvalidInput: there is none.
    """
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        msg = f"{folder} holds no preprocessor_config.json that can be used ({' '.join(str(error).split())[:150]})"
        raise InvalidInput(msg) from error


def _files(path: Path) -> list[Path]:
    """Every image file, class by class.

    Raises:
        InvalidInput: no class folder, an empty one, or folders inside one.
    """
    classes = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    if not classes:
        msg = f"{path} must hold one subfolder of images per class; it has none"
        raise InvalidInput(msg)
    files = []
    for one in classes:
        inside = sorted(child for child in one.iterdir() if not child.name.startswith("."))
        deeper = [child for child in inside if child.is_dir()]
        if deeper:
            msg = (
                f"the class folder {one} holds folders ({show(child.name for child in deeper[:3])}) instead of images; "
                f"pass the folder whose subfolders are the classes"
            )
            raise InvalidInput(msg)
        if not inside:
            msg = f"the class folder {one} is empty; remove it, or add its images"
            raise InvalidInput(msg)
        files += inside
    return files


def _open(file: Path, mode: str) -> Image.Image:
    """The decoded image.

    Raises:
        InvalidInput: it is no image, or damaged.
    """
    try:
        with Image.open(file) as image:
            deep = image.mode.startswith(("I", "F"))  # 16 or 32 bits, which converting would cut off at 255
            decoded = image.convert(mode)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        msg = f"{file} cannot be read as an image ({' '.join(str(error).split())[:150]}); remove or replace it"
        raise InvalidInput(msg) from error
    if deep:
        msg = f"{file} has more than 8 bits per channel; save it with 8"
        raise InvalidInput(msg)
    return decoded


def _channels(files: list[Path]) -> int:
    """1 where every image is grey, else 3; modes are in the headers, nothing is decoded."""
    for file in files:
        try:
            with Image.open(file) as image:
                if image.mode not in ("L", "1"):
                    return 3
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            _open(file, "RGB")
    return 1


def _mode(recipe: Recipe) -> str:
    return "L" if recipe.channels == 1 else "RGB"


def _plain(files: list[Path], recipe: Recipe) -> tuple[Tensor, Recipe]:
    """(N, C, H, W) in [0, 1].

    Raises:
        InvalidInput: images of several sizes, and none to resize them to.
    """
    rows: list[Tensor] = []
    size = recipe.image_size
    for file in files:
        image = _open(file, _mode(recipe))
        shape = (image.height, image.width)
        if recipe.image_size is not None:
            image = image.resize((recipe.image_size[1], recipe.image_size[0]), Image.Resampling.BILINEAR)
        elif shape != (size or shape):
            msg = f"images have several sizes: {file} is {shape[0]}x{shape[1]}, others {size}; pass --image-size"  # type: ignore[str-format]
            raise InvalidInput(msg)
        size = size or shape
        pixels = np.asarray(image, dtype=np.float32) / 255
        rows.append(torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1))
    return torch.stack(rows), replace(recipe, image_size=size)


def _processed(files: list[Path], recipe: Recipe, folder: Path) -> dict[str, Tensor]:
    """What the folder's image processor makes of the images, by argument name.

    Raises:
        InvalidInput: the processor does not bring them to one size, or fails.
    """
    processor = image_processor(folder)
    parts: list[dict[str, Tensor]] = []
    for start in range(0, len(files), AT_ONCE):
        images = [_open(file, _mode(recipe)) for file in files[start : start + AT_ONCE]]
        try:
            parts.append(dict(processor(images=images, return_tensors="pt")))
        except (RuntimeError, ValueError, TypeError) as error:
            msg = (
                f"the image processor of {folder} fails on {files[start].parent}: {' '.join(str(error).split())[:200]}"
            )
            raise InvalidInput(msg) from error
    try:
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    except RuntimeError as error:
        msg = f"the image processor of {folder} gives images of several sizes; let its config resize or crop them"
        raise InvalidInput(msg) from error
