"""Readers of the command line: npz, csv, parquet, texts and folders of images."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bayespass import InvalidInput
from bayespass.cli.data import (
    Data,
    Recipe,
    Shuffled,
    fit_to_model,
    held_out_rows,
    prepared,
    read_data,
    split_rows,
    standardizer,
)

pa = pytest.importorskip("pyarrow")
from pyarrow import csv, parquet  # noqa: E402

NET = nn.Linear(2, 3).eval()


def read(path, network=NET, folder=None, **recipe):
    return read_data(path, Recipe(**recipe), network, folder)


def write_table(path, **columns):
    table = pa.table(columns)
    if path.suffix == ".csv":
        csv.write_csv(table, path)
    else:
        parquet.write_table(table, path)
    return path


def image(path, value, size=(4, 4), mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


# --- npz ---


def test_npz_inputs_and_targets(tmp_path):
    np.savez(tmp_path / "a.npz", inputs=np.arange(6.0).reshape(3, 2), targets=np.array([0, 1, 2]))
    data, recipe = read(tmp_path / "a.npz")
    assert recipe.target == "targets"
    assert data.inputs.dtype == torch.float64
    assert prepared(data, recipe, NET).inputs.dtype == torch.float32
    assert data.targets.tolist() == [0, 1, 2]


def test_npz_arrays_by_argument_name(tmp_path):
    np.savez(tmp_path / "a.npz", ids=np.ones((3, 4), "int64"), mask=np.ones((3, 4)), y=np.zeros(3))
    data, _ = read(tmp_path / "a.npz", target="y", likelihood="regression")
    assert set(data.inputs) == {"ids", "mask"}
    ready = prepared(data, Recipe(), NET.half())
    NET.float()
    assert ready.inputs["mask"].dtype == torch.float16
    assert ready.inputs["ids"].dtype == torch.int64
    assert data.targets.dtype == torch.float32


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"inputs": np.zeros((3, 2))}, "array 'targets'"),
        ({"inputs": np.zeros((3, 2)), "targets": np.zeros(2, int)}, "equally long"),
        ({"inputs": np.zeros((0, 2)), "targets": np.zeros(0, int)}, "not empty"),
        ({"targets": np.zeros(2, int)}, "equally long"),
        ({"inputs": np.array([[0.0], [np.nan]]), "targets": np.zeros(2, int)}, "first row 1"),
        ({"inputs": np.array([object()]), "targets": np.zeros(1, int)}, "npz file"),
        ({"inputs": np.array(["a"]), "targets": np.zeros(1, int)}, "npz file"),
    ],
)
def test_npz_mistakes(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InvalidInput, match=message):
        read(tmp_path / "a.npz")


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data file"):
        read(tmp_path / "absent.csv")
    for name in ("a.npz", "a.csv", "a.parquet", "a.txt"):
        (tmp_path / name).write_bytes(b"\x80\x04nonsense")
        with pytest.raises(InvalidInput, match=f"{name}.*(npz file|cannot be read|--target)"):
            read(tmp_path / name)


def test_options_of_another_kind_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", inputs=np.zeros((3, 2)), targets=np.zeros(3, int))
    with pytest.raises(InvalidInput, match="--text does not apply"):
        read(tmp_path / "a.npz", text="t")
    path = write_table(tmp_path / "a.csv", x=[1.0], y=[0])
    with pytest.raises(InvalidInput, match="--image-size does not apply"):
        read(path, target="y", image_size=(4, 4))
    image(tmp_path / "images" / "a" / "1.png", 3)
    with pytest.raises(InvalidInput, match="--target does not apply"):
        read(tmp_path / "images", target="y")


# --- tables ---


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_table_features_and_words_as_classes(tmp_path, suffix):
    path = write_table(tmp_path / f"a{suffix}", x=[1.5, 2.0, 4.0], y=["cat", "ant", "cat"], z=[1, 0, 1])
    data, recipe = read(path, target="y")
    assert data.inputs.tolist() == [[1.5, 1.0], [2.0, 0.0], [4.0, 1.0]]
    assert data.targets.tolist() == [1, 0, 1]
    assert recipe.classes == ("ant", "cat")
    assert recipe.features == ("x", "z")
    other = write_table(tmp_path / f"b{suffix}", z=[7], y=["cat"], x=[8.0])
    assert read_data(other, recipe, NET, None)[0].inputs.tolist() == [[8.0, 7.0]]
    assert read_data(other, recipe, NET, None)[0].targets.tolist() == [1]
    strange = write_table(tmp_path / f"c{suffix}", z=[7], y=["dog"], x=[8.0])
    with pytest.raises(InvalidInput, match="class 'dog'"):
        read_data(strange, recipe, NET, None)


def test_words_that_are_numbers_are_in_numeric_order(tmp_path):
    path = write_table(tmp_path / "a.parquet", x=[0.0] * 3, y=["10", "9", "2"])
    assert read(path, target="y")[1].classes == ("2", "9", "10")


def test_the_models_own_class_names_come_first(tmp_path):
    network = nn.Linear(2, 3)
    network.config = type("Config", (), {"id2label": {0: "dog", 1: "cat"}})()
    path = write_table(tmp_path / "a.csv", x=[0.0, 1.0], y=["cat", "dog"])
    assert read(path, network, target="y")[0].targets.tolist() == [1, 0]
    network.config.id2label = {0: "bird", 1: "fish"}
    with pytest.raises(InvalidInput, match="none of 'bird', 'fish'"):
        read(path, network, target="y")


def test_table_regression_targets_are_values(tmp_path):
    path = write_table(tmp_path / "a.csv", x=[0.0, 1.0], y=[3, 4])
    data, _ = read(path, target="y", likelihood="regression")
    assert data.targets.dtype == torch.float32
    assert data.targets.tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    ("columns", "recipe", "message"),
    [
        ({"x": [1.0], "y": [0]}, {}, "needs --target"),
        ({"x": [1.0], "y": [0]}, {"target": "z"}, "no column named 'z'"),
        ({"x": [1.0], "y": [0]}, {"target": "y", "features": ("w",)}, "no column named 'w'"),
        ({"x": [1.0], "y": [0]}, {"target": "y", "features": ("y",)}, "other than the target"),
        ({"y": [0]}, {"target": "y"}, "other than the target"),
        ({"x": ["red"], "y": [0]}, {"target": "y"}, "column 'x' is not numeric.*'red'.*--features"),
        ({"x": [1.0, None], "y": [0, 1]}, {"target": "y"}, "column 'x' has no value in 1 rows, first row 1"),
        ({"x": [1.0, 2.0], "y": [None, 1]}, {"target": "y"}, "column 'y' has no value in 1 rows, first row 0"),
        ({"x": [1.0, float("nan")], "y": [0, 1]}, {"target": "y"}, "NaN or infinite in 1 rows, first row 1"),
        ({"x": [1.0], "y": [0.5]}, {"target": "y"}, "whole numbers from 0 or words.*--likelihood regression"),
        ({"x": [1.0], "y": ["a"]}, {"target": "y", "likelihood": "regression"}, "column 'y' is not numeric"),
        ({"x": [1.0], "y": [0]}, {"target": "y", "text": "x"}, "not text, row 0"),
        ({"x": ["a"], "y": [0]}, {"target": "y", "text": "x"}, "needs a Hugging Face model folder"),
    ],
)
def test_table_mistakes(tmp_path, columns, recipe, message):
    path = write_table(tmp_path / "a.parquet", **columns)
    with pytest.raises(InvalidInput, match=message):
        read(path, **recipe)


def test_an_empty_table(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n")
    with pytest.raises(InvalidInput, match="has no rows"):
        read(tmp_path / "a.csv", target="y")


def test_standardizing_uses_the_training_rows_alone():
    training = Data(torch.tensor([[1e9, 5.0], [1e9 + 2, 5.0]], dtype=torch.float64), torch.tensor([0, 1]))
    recipe = standardizer(training, Recipe())
    assert recipe.spread == (1.0, 1.0)  # of a constant column: 1
    assert prepared(training, recipe, NET).inputs.tolist() == [[-1.0, 0.0], [1.0, 0.0]]
    other = Data(torch.tensor([[1e9 + 4, 6.0]], dtype=torch.float64), torch.tensor([0]))
    assert prepared(other, recipe, NET).inputs.tolist() == [[3.0, 1.0]]


# --- images ---


def test_images_become_pixels_between_0_and_1(tmp_path):
    image(tmp_path / "b" / "1.png", 255)
    image(tmp_path / "a" / "2.png", 0)
    image(tmp_path / "a" / "1.png", 51)
    (tmp_path / "a" / ".hidden").write_text("")
    data, recipe = read(tmp_path)
    assert data.inputs.shape == (3, 1, 4, 4)
    assert data.inputs[:, 0, 0, 0].tolist() == pytest.approx([0.2, 0.0, 1.0])
    assert data.targets.tolist() == [0, 0, 1]
    assert (recipe.classes, recipe.channels, recipe.image_size) == (("a", "b"), 1, (4, 4))


def test_images_are_resized_and_coloured_on_request(tmp_path):
    image(tmp_path / "a" / "1.png", (255, 0, 51), (8, 6), "RGB")
    image(tmp_path / "b" / "1.png", 255, (3, 3))
    data, _ = read(tmp_path, image_size=(5, 5))
    assert data.inputs.shape == (2, 3, 5, 5)
    assert data.inputs[0, :, 2, 2].tolist() == pytest.approx([1.0, 0.0, 0.2])
    with pytest.raises(InvalidInput, match=r"several sizes.*--image-size"):
        read(tmp_path)


def test_image_mistakes_name_the_file(tmp_path):
    with pytest.raises(InvalidInput, match="one subfolder of images per class"):
        read(tmp_path)
    image(tmp_path / "a" / "1.png", 0)
    (tmp_path / "b").mkdir()
    with pytest.raises(InvalidInput, match="b is empty"):
        read(tmp_path)
    whole = (tmp_path / "a" / "1.png").read_bytes()
    (tmp_path / "b" / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidInput, match=r"cut.png cannot be read as an image"):
        read(tmp_path)
    (tmp_path / "b" / "cut.png").write_text("no image")
    with pytest.raises(InvalidInput, match=r"cut.png cannot be read as an image"):
        read(tmp_path)
    (tmp_path / "b" / "cut.png").unlink()
    Image.fromarray(np.full((4, 4), 4000, "uint16")).save(tmp_path / "b" / "deep.png")
    with pytest.raises(InvalidInput, match=r"deep.png has more than 8 bits"):
        read(tmp_path)
    with pytest.raises(InvalidInput, match="for regression use an npz file"):
        read(tmp_path, likelihood="regression")
    image(tmp_path / "b" / "deeper" / "1.png", 0)
    with pytest.raises(InvalidInput, match=r"holds folders \(deeper\)"):
        read(tmp_path)


# --- together with a model ---


def test_labels_outside_the_logits_and_inputs_of_another_shape():
    data = Data(torch.zeros(3, 2), torch.tensor([0, 1, 3]))
    with pytest.raises(InvalidInput, match=r"\[0, 3\)"):
        fit_to_model(data, Recipe(), NET, None)
    with pytest.raises(InvalidInput, match=r"cannot be run on two rows.*\(2, 5\)"):
        fit_to_model(Data(torch.zeros(3, 5), torch.zeros(3, dtype=torch.long)), Recipe(), NET, None)


def test_regression_targets_get_the_axis_of_the_outputs():
    data = Data(torch.zeros(3, 2), torch.zeros(3))
    fitted, recipe = fit_to_model(data, Recipe("regression"), nn.Linear(2, 1), 1.0)
    assert fitted.targets.shape == (3, 1)
    assert recipe.trailing_axis
    fitted, recipe = fit_to_model(data, Recipe("regression"), nn.Linear(2, 2), "predicted")
    assert fitted.targets.shape == (3,)
    with pytest.raises(InvalidInput, match="targets must have the shape"):
        fit_to_model(data, Recipe("regression"), nn.Linear(2, 2), 1.0)


def test_a_split_is_repeatable_and_complete(tmp_path):
    data = Data(torch.arange(10.0).unsqueeze(1), torch.arange(10))
    training, held_out = split_rows(data, 0.3, seed=1)
    assert (len(training), len(held_out)) == (7, 3)
    assert sorted(training.targets.tolist() + held_out.targets.tolist()) == list(range(10))
    assert split_rows(data, 0.3, seed=1)[1].targets.tolist() == held_out.targets.tolist()
    assert split_rows(data, 0.3, seed=2)[1].targets.tolist() != held_out.targets.tolist()
    for share in (0.0, 1.0, 0.01, float("nan")):
        with pytest.raises(InvalidInput, match="--validation"):
            split_rows(data, share, seed=0)
    with pytest.raises(InvalidInput, match="took its validation rows from a file"):
        held_out_rows(tmp_path, data, Recipe())
    with pytest.raises(InvalidInput, match="is not the data"):
        held_out_rows(tmp_path, data, Recipe(fraction=0.3, held_out_of="other"))


def test_shuffled_batches_hold_every_row_once_and_never_one_alone():
    data = Data({"x": torch.arange(9.0)}, torch.arange(9))
    loader = Shuffled(data, 4)
    batches = list(loader)
    assert [len(targets) for _, targets in batches] == [4, 5]
    assert len(loader) == 2
    assert sorted(torch.cat([targets for _, targets in batches]).tolist()) == list(range(9))
    assert all((inputs["x"] == targets).all() for inputs, targets in batches)
    assert [len(targets) for _, targets in Shuffled(data, 3)] == [3, 3, 3]
    assert [len(targets) for _, targets in Shuffled(data, 7)] == [7, 2]
    assert [len(targets) for _, targets in Shuffled(data, 20)] == [9]
    assert len(list(Shuffled(data, 1))) == len(Shuffled(data, 1)) == 9


def test_a_recipe_survives_its_file(tmp_path):
    recipe = Recipe("regression", "y", ("a", "b"), (0.1, 1e-30), (1.0, 3.0), classes=None, image_size=(3, 4), seed=2)
    (tmp_path / "data.json").write_text(json.dumps(recipe.to_dict()))
    assert Recipe.load(tmp_path / "data.json") == recipe
    for text in ("[]", "{", '{"colour": 1}'):
        (tmp_path / "data.json").write_text(text)
        with pytest.raises(InvalidInput, match="is no recipe"):
            Recipe.load(tmp_path / "data.json")
    with pytest.raises(FileNotFoundError, match="no recipe"):
        Recipe.load(tmp_path / "absent.json")
