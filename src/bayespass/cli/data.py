"""What DATA means on the command line: npz, csv, parquet or a folder of images, in memory.

A `Recipe` says how a file becomes inputs and targets: which column is the target, the class names,
means and standard deviations of features, the size of images. `bayespass fit` completes it from the
training data and writes it as data.json, so that other data are read in the same way later.

Nothing is unpickled, nothing is downloaded.
"""

import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bayespass.errors import InvalidInput
from bayespass.likelihood import Likelihood
from bayespass.posterior.store import hash_tensors

TABLES = (".csv", ".parquet", ".pq")
Inputs = Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class Data:
    """Inputs and targets of one data set.

    Args:
        inputs: (N, ...) or such tensors by argument name of the model's forward.
        targets: (N, ...) class labels or values.
    """

    inputs: Inputs
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def select(self, rows: Any) -> "Data":
        """The data set of some rows: indices or a slice."""
        if isinstance(self.inputs, dict):
            return Data({name: value[rows] for name, value in self.inputs.items()}, self.targets[rows])
        return Data(self.inputs[rows], self.targets[rows])

    def to(self, device: torch.device) -> "Data":
        """The same on a device."""
        inputs = self.inputs
        moved = {k: v.to(device) for k, v in inputs.items()} if isinstance(inputs, dict) else inputs.to(device)
        return Data(moved, self.targets.to(device))

    def batches(self, batch_size: int) -> list[tuple[Inputs, Tensor]]:
        """All rows in order, in batches (inputs, targets)."""
        parts = [self.select(slice(i, i + batch_size)) for i in range(0, len(self), batch_size)]
        return [(part.inputs, part.targets) for part in parts]

    def fingerprint(self) -> str:
        """SHA-256 of every value."""
        inputs = self.inputs if isinstance(self.inputs, dict) else {"": self.inputs}
        return hash_tensors({"targets": self.targets, **{f"inputs/{k}": v for k, v in inputs.items()}})


class Shuffled:
    """Batches in a new order every time, taken from PyTorch's global random numbers.

    Args:
        data: the rows.
        batch_size: rows per batch; a single row that would be left over joins the batch before.
    """

    def __init__(self, data: Data, batch_size: int) -> None:
        self.data, self.batch_size = data, batch_size

    def __len__(self) -> int:
        full, rest = divmod(len(self.data), self.batch_size)
        return max(1, full + (rest > 1 or (rest == 1 and self.batch_size == 1)))

    def __iter__(self) -> Iterator[tuple[Inputs, Tensor]]:
        order = torch.randperm(len(self.data))
        bounds = [self.batch_size * i for i in range(len(self))] + [len(self.data)]
        for start, stop in pairwise(bounds):
            part = self.data.select(order[start:stop])
            yield part.inputs, part.targets


@dataclass(frozen=True)
class Recipe:
    """How a file becomes inputs and targets. What is None is found in the data and filled in.

    Args:
        likelihood: decides what targets are: class labels or values.
        target: name of the target's array (npz, by default `targets`) or column.
        features: columns that are inputs; by default all but the target.
        center: subtracted from the features, in their order; None leaves them as they are.
        spread: features are divided by it.
        text: column of texts for the tokenizer in the model folder.
        max_length: tokens per text; longer ones are cut.
        image_size: (height, width) that images are resized to, without a model folder.
        channels: of images, 1 or 3.
        classes: names of the class labels 0, 1, ...; None where labels are numbers already.
        trailing_axis: regression targets get a last axis of size one, as the model's outputs have.
        fraction: share of rows that were held out, if any.
        seed: of that choice.
        held_out_of: hash of the targets it was made from.
    """

    likelihood: Likelihood = "classification"
    target: str | None = None
    features: tuple[str, ...] | None = None
    center: tuple[float, ...] | None = None
    spread: tuple[float, ...] | None = None
    text: str | None = None
    max_length: int | None = None
    image_size: tuple[int, int] | None = None
    channels: int | None = None
    classes: tuple[str, ...] | None = None
    trailing_axis: bool = False
    fraction: float | None = None
    seed: int = 0
    held_out_of: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def load(cls, path: Path) -> "Recipe":
        """The recipe in a data.json that `bayespass fit` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            InvalidInput: it holds something else.
        """
        if not path.is_file():
            msg = f"no recipe at {path}; `bayespass fit` writes data.json into its output folder"
            raise FileNotFoundError(msg)
        try:
            fields: Any = json.loads(path.read_text(encoding="utf-8"))
            values: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
            return cls(**values)
        except (ValueError, TypeError, AttributeError) as error:
            msg = f"{path} is no recipe for data ({error}); pass the data.json that `bayespass fit` wrote"
            raise InvalidInput(msg) from error


def read_data(path: Path, recipe: Recipe, network: nn.Module, folder: Path | None) -> tuple[Data, Recipe]:
    """The data set in a file or folder, and the recipe completed with what was found there.

    Numbers are as in the file; `prepared` makes of them what the model takes.

    Args:
        path: .npz, .csv or .parquet, or a folder with one subfolder of images per class.
        recipe: what is wanted; a completed one reads other data in the same way.
        network: the model that the inputs are for.
        folder: the Hugging Face folder it came from, whose tokenizer or image processor is used.

    Raises:
        FileNotFoundError: there is nothing at the path.
        InvalidInput: a file that cannot be read, or whose contents do not fit the recipe.
    """
    if not path.exists():
        msg = f"no data file at {path}"
        raise FileNotFoundError(msg)
    if path.is_dir():
        from bayespass.cli.images import read_images

        _refuse(path, "a folder of images", target=recipe.target, text=recipe.text, features=recipe.features)
        data, recipe = read_images(path, recipe, network, folder)
    elif path.suffix.lower() in TABLES:
        from bayespass.cli.tables import read_table

        _refuse(path, "a table", image_size=recipe.image_size)
        data, recipe = read_table(path, recipe, network, folder)
    else:
        _refuse(path, "an npz file", text=recipe.text, features=recipe.features, image_size=recipe.image_size)
        data, recipe = _read_npz(path, recipe)
    _check_finite(path, data)
    return (_with_axis(data) if recipe.trailing_axis else data), recipe


def fit_to_model(data: Data, recipe: Recipe, network: nn.Module, sigma_noise: Any) -> tuple[Data, Recipe]:
    """The data with targets in the shape of the model's outputs, or an error unless they belong together.

    Args:
        data: all rows.
        recipe: how they were read.
        network: in eval mode; it is run once, on two rows.
        sigma_noise: of the likelihood.

    Raises:
        InvalidInput: the model cannot be run on the inputs, labels lie outside its logits, or shapes differ.
    """
    from bayespass.batches import call_arguments, device_of, model_output
    from bayespass.likelihood import check_class_labels, check_targets, mean_and_log_variance

    sample = prepared(data.select(slice(0, 2)), recipe, network).to(device_of(network))
    args, kwargs = call_arguments(sample.inputs)
    try:
        with torch.no_grad():
            outputs = model_output(network(*args, **kwargs))
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        shapes = {k: tuple(v.shape) for k, v in sample.inputs.items()} if kwargs else tuple(args[0].shape)  # type: ignore[union-attr]
        reason = " ".join(str(error).split())[:200]
        msg = f"the model cannot be run on two rows of the data, inputs of shape {shapes}: {reason}"
        raise InvalidInput(msg) from error
    if recipe.likelihood == "regression":
        means = mean_and_log_variance(outputs)[0] if sigma_noise == "predicted" else outputs
        if means.dim() == sample.targets.dim() + 1 and means.shape[-1] == 1:
            data, sample = _with_axis(data), _with_axis(sample)
            recipe = replace(recipe, trailing_axis=True)
    else:
        check_class_labels(data.targets, outputs.shape[-1])
    check_targets(outputs, sample.targets, recipe.likelihood, sigma_noise)
    return data, recipe


def split_rows(data: Data, fraction: float, seed: int) -> tuple[Data, Data]:
    """Training rows and held-out rows; the same seed on the same number of rows gives the same split.

    Args:
        data: all rows.
        fraction: share that is held out.
        seed: of the choice.

    Raises:
        InvalidInput: a fraction outside (0, 1), or fewer than two rows on either side.
    """
    if not 0 < fraction < 1:
        msg = f"--validation must be a share of the rows in (0, 1), such as 0.1, or a file; got {fraction}"
        raise InvalidInput(msg)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    n_held_out = round(fraction * len(data))
    if n_held_out < 2 or len(data) - n_held_out < 2:
        msg = f"--validation {fraction} of {len(data)} rows leaves fewer than two on one side; use more data or a file"
        raise InvalidInput(msg)
    return data.select(order[n_held_out:].sort().values), data.select(order[:n_held_out].sort().values)


def held_out_rows(path: Path, data: Data, recipe: Recipe) -> Data:
    """The rows that `bayespass fit` did not train on.

    Raises:
        InvalidInput: the recipe held out none, or out of other data.
    """
    if recipe.fraction is None:
        msg = (
            "--rows validation needs the data that `bayespass fit` split; that run took its validation rows from a file"
        )
        raise InvalidInput(msg)
    if hash_tensors({"targets": data.targets}) != recipe.held_out_of:
        msg = f"--rows validation: {path} is not the data that `bayespass fit` split; drop --rows to use all its rows"
        raise InvalidInput(msg)
    return split_rows(data, recipe.fraction, recipe.seed)[1]


def standardizer(data: Data, recipe: Recipe) -> Recipe:
    """The recipe with the mean and standard deviation of every feature; 1 where a feature is constant."""
    assert isinstance(data.inputs, Tensor)
    values = data.inputs.double()
    spread = values.std(0, correction=0)
    spread = torch.where(spread > 0, spread, torch.ones_like(spread))
    return replace(recipe, center=tuple(values.mean(0).tolist()), spread=tuple(spread.tolist()))


def prepared(data: Data, recipe: Recipe, network: nn.Module) -> Data:
    """The data as the model takes them: features centred and scaled as the recipe says, in its dtype.

    Args:
        data: as read.
        recipe: with `center` and `spread`, or neither.
        network: whose dtype floating-point inputs are cast to.
    """
    inputs = data.inputs
    if recipe.center is not None and recipe.spread is not None:
        assert isinstance(inputs, Tensor)
        center, spread = (torch.tensor(value, dtype=torch.float64) for value in (recipe.center, recipe.spread))
        inputs = (inputs.double() - center) / spread
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    if isinstance(inputs, dict):
        return Data({k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}, data.targets)
    return Data(inputs.to(dtype) if inputs.is_floating_point() else inputs, data.targets)


def class_labels(path: Path, found: list[str], recipe: Recipe, network: nn.Module) -> tuple[Tensor, Recipe]:
    """Numbers for class names: the recipe's, else the model's own, else in sorted order.

    Args:
        path: of the data, for messages.
        found: the class name of every row.
        recipe: with `classes` if they are known.
        network: a transformers model may name its classes.

    Returns:
        (N,) labels, and the recipe with the names in force.

    Raises:
        InvalidInput: a name that is not among them.
    """
    names = recipe.classes or model_classes(network)
    if names is None:
        present = set(found)
        numbers = all(name.isdecimal() for name in present)
        names = tuple(sorted(present, key=lambda name: (int(name), name)) if numbers else sorted(present))
    index = {name: label for label, name in enumerate(names)}
    unknown = sorted(set(found) - set(index))
    if unknown:
        msg = f"{path} has the class {unknown[0]!r}, which is none of {', '.join(map(repr, names[:10]))}; rename it"
        raise InvalidInput(msg)
    return torch.tensor([index[name] for name in found]), replace(recipe, classes=names)


def model_classes(network: nn.Module) -> tuple[str, ...] | None:
    """The class names in a transformers model's config; None where it has only LABEL_0, LABEL_1, ..."""
    names: Mapping[int, str] = getattr(getattr(network, "config", None), "id2label", None) or {}
    ordered = tuple(str(names[key]) for key in sorted(names))
    return None if not ordered or ordered == tuple(f"LABEL_{i}" for i in range(len(ordered))) else ordered


def _read_npz(path: Path, recipe: Recipe) -> tuple[Data, Recipe]:
    """The array `inputs`, or all arrays by argument name, and the targets.

    Raises:
        InvalidInput: it is no npz file, or an array is missing, empty or of another length.
    """
    target = recipe.target or "targets"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (ValueError, TypeError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        msg = f"{path} must be an npz file with numeric arrays, .csv, .parquet or a folder of images ({error})"
        raise InvalidInput(msg) from error
    if target not in tensors:
        msg = f"{path} must be an npz file with the array {target!r}; it has {', '.join(tensors) or 'none'}"
        raise InvalidInput(msg)
    targets = tensors.pop(target)
    inputs: Inputs = tensors["inputs"] if list(tensors) == ["inputs"] else tensors
    lengths = {name: len(value) if value.dim() else 0 for name, value in {**tensors, target: targets}.items()}
    if not tensors or len(set(lengths.values())) > 1 or 0 in lengths.values():
        shown = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        msg = f"{path}: inputs and {target!r} must be equally long and not empty; got rows {shown}"
        raise InvalidInput(msg)
    if recipe.likelihood == "regression":
        targets = targets.to(torch.float32)
    return Data(inputs, targets), replace(recipe, target=target)


def _with_axis(data: Data) -> Data:
    return Data(data.inputs, data.targets.unsqueeze(-1))


def _check_finite(path: Path, data: Data) -> None:
    named = data.inputs if isinstance(data.inputs, dict) else {"inputs": data.inputs}
    for name, value in {**named, "targets": data.targets}.items():
        bad = ~torch.isfinite(value.reshape(len(value), -1)).all(1)
        if bool(bad.any()):
            rows = bad.nonzero().flatten().tolist()
            msg = f"{path}: {name} is NaN or infinite in {len(rows)} rows, first row {rows[0]}; remove or fill them"
            raise InvalidInput(msg)


def _refuse(path: Path, what: str, **options: Any) -> None:
    """Raise if an option was given that this kind of data does not have.

    Raises:
        InvalidInput: one was.
    """
    for name, value in options.items():
        if value is not None:
            msg = f"--{name.replace('_', '-')} does not apply to {path}, {what}; leave it out"
            raise InvalidInput(msg)


def show(names: Iterable[str], most: int = 8) -> str:
    """Names for a message, the first few."""
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
