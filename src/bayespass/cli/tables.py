"""csv and parquet: numeric columns, or one column of texts for a model folder's tokenizer."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bayespass.cli.data import Data, Recipe, class_labels, show
from bayespass.errors import InvalidInput, MissingExtra

LONGEST_TEXT = 512  # tokens, where neither tokenizer nor model sets a limit


def read_table(path: Path, recipe: Recipe, network: nn.Module, folder: Path | None) -> tuple[Data, Recipe]:
    """Features or tokens, and targets, of a .csv or .parquet file with a header.

    Args:
        path: the file.
        recipe: needs `target`; `text` for texts.
        network: the model they are for.
        folder: its Hugging Face folder, for its tokenizer.

    Raises:
        MissingExtra: pyarrow is not installed.
        InvalidInput: the file or a column cannot be used; the message names it.
    """
    table = _load(path)
    columns: list[str] = table.column_names
    if table.num_rows == 0:
        msg = f"{path} has no rows; it needs a header and at least one row"
        raise InvalidInput(msg)
    if recipe.target is None:
        msg = f"{path} needs --target COLUMN, the column to predict; it has {show(columns)}"
        raise InvalidInput(msg)
    for name in (recipe.target, recipe.text, *(recipe.features or ())):
        if name is not None and columns.count(name) != 1:
            what = "no column" if name not in columns else "more than one column"
            msg = f"{path} has {what} named {name!r}; it has {show(columns)}"
            raise InvalidInput(msg)
    targets, recipe = _targets(path, table, recipe, network)
    if recipe.text is not None:
        texts = _texts(path, table, recipe.text)
        inputs, recipe = _tokens(texts, recipe, network, folder)
        return Data(inputs, targets), recipe
    features = recipe.features or tuple(name for name in columns if name != recipe.target)
    if not features or recipe.target in features:
        msg = f"{path}: the features must be columns other than the target {recipe.target!r}; it has {show(columns)}"
        raise InvalidInput(msg)
    values = torch.from_numpy(np.stack([_numbers(path, table, name) for name in features], 1))
    return Data(values, targets), replace(recipe, features=features)


def _load(path: Path) -> Any:
    try:
        import pyarrow
        from pyarrow import csv, parquet
    except ImportError as error:
        msg = f"reading {path} needs pyarrow; run: pip install bayespass[tables]"
        raise MissingExtra(msg) from error
    try:
        if path.suffix.lower() == ".csv":
            return csv.read_csv(path, parse_options=csv.ParseOptions(newlines_in_values=True))
        return parquet.read_table(path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        msg = f"{path} cannot be read as {path.suffix[1:]}: {' '.join(str(error).split())[:200]}"
        raise InvalidInput(msg) from error


def _column(path: Path, table: Any, name: str) -> Any:
    """One column without gaps.

    Raises:
        InvalidInput: it has rows without a value.
    """
    column = table.column(name)
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        msg = f"{path}: column {name!r} has no value in {column.null_count} rows, first row {row}; remove or fill them"
        raise InvalidInput(msg)
    return column


def _numbers(path: Path, table: Any, name: str) -> np.ndarray:
    import pyarrow

    column = _column(path, table, name)
    kind = column.type
    numeric = pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind) or pyarrow.types.is_decimal(kind)
    if not (numeric or pyarrow.types.is_boolean(kind)):
        value = str(column[0].as_py())[:40]
        msg = (
            f"{path}: column {name!r} is not numeric ({kind}, first value {value!r}); encode it as numbers, list the "
            f"columns to use with --features, or read it as text with --text"
        )
        raise InvalidInput(msg)
    return np.array(column.to_numpy(), dtype=np.float64)  # a copy: Arrow's own memory is read-only


def _texts(path: Path, table: Any, name: str) -> list[str]:
    texts = _column(path, table, name).to_pylist()
    wrong = [row for row, value in enumerate(texts) if not isinstance(value, str)]
    if wrong:
        msg = (
            f"{path}: column {name!r} is not text, row {wrong[0]} holds {texts[wrong[0]]!r}; --text names a text column"
        )
        raise InvalidInput(msg)
    return texts


def _targets(path: Path, table: Any, recipe: Recipe, network: nn.Module) -> tuple[Tensor, Recipe]:
    """Values, or class labels: whole numbers as they are, words by name.

    Raises:
        InvalidInput: class labels that are neither.
    """
    import pyarrow

    name = recipe.target
    assert name is not None
    if recipe.likelihood == "regression":
        return torch.from_numpy(_numbers(path, table, name)).float(), recipe
    column = _column(path, table, name)
    kind = column.type.value_type if pyarrow.types.is_dictionary(column.type) else column.type
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        return class_labels(path, column.to_pylist(), recipe, network)
    if recipe.classes is not None:
        return class_labels(path, [str(value) for value in column.to_pylist()], recipe, network)
    if not (pyarrow.types.is_integer(kind) or pyarrow.types.is_boolean(kind)):
        msg = (
            f"{path}: class labels in column {name!r} must be whole numbers from 0 or words; got {kind}. "
            f"For values, pass --likelihood regression"
        )
        raise InvalidInput(msg)
    return torch.from_numpy(_numbers(path, table, name)).long(), recipe


def _tokens(
    texts: list[str], recipe: Recipe, network: nn.Module, folder: Path | None
) -> tuple[dict[str, Tensor], Recipe]:
    """Token ids and masks by argument name, padded to the longest text.

    Raises:
        InvalidInput: there is no model folder, or no tokenizer in it that can pad.
    """
    if folder is None:
        msg = "--text needs a Hugging Face model folder with its tokenizer; MODEL is module:factory"
        raise InvalidInput(msg)
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = f"--text: {folder} holds no tokenizer ({' '.join(str(error).split())[:150]}); save it there"
        raise InvalidInput(msg) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            msg = f"--text: the tokenizer in {folder} has no padding token; set one and save it again"
            raise InvalidInput(msg)
        tokenizer.pad_token = tokenizer.eos_token
    limit = getattr(getattr(network, "config", None), "max_position_embeddings", None) or LONGEST_TEXT
    longest = recipe.max_length or min(tokenizer.model_max_length, limit, LONGEST_TEXT)
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    return dict(encoded), replace(recipe, max_length=longest)
