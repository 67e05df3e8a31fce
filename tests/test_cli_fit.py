"""`bayespass fit` as a person uses it: every method, every kind of data, stopping and going on."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from bayespass import Posterior, load_scales
from bayespass.cli.app import app
from bayespass.cli.fit_settings import EPOCHS, UPDATES, Method, Settings, Start, resolve
from bayespass.cli.models import build_model
from bayespass.errors import BayespassError

NET = """
from torch import nn

def digits():
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

def dropped():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))

def wide():
    return nn.Sequential(nn.Linear(64, 40), nn.Tanh(), nn.Linear(40, 10))

def pixels():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))

def line():
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))

def noisy_line():
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))

class Sorts(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x):
        return self.layer(x).cumsum(-1).sort(-1).values

def sorts():
    return Sorts()
"""


def fit(*arguments):
    """The command in this process; returns what it printed."""
    result = CliRunner().invoke(app, ["fit", *map(str, arguments), "--quiet"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def log_of(folder):
    return json.loads((folder / "log.json").read_text())


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    path = tmp_path_factory.mktemp("project")
    (path / "fit_net.py").write_text(NET)
    images, labels = load_digits(return_X_y=True)
    images, labels = images[:300].astype("float32"), labels[:300]
    np.savez(path / "digits.npz", inputs=images / 16, targets=labels)
    pa = pytest.importorskip("pyarrow")
    from pyarrow import csv, parquet

    table = pa.table({**{f"p{i}": images[:, i] for i in range(64)}, "digit": [f"d{label}" for label in labels]})
    csv.write_csv(table, path / "digits.csv")
    parquet.write_table(table, path / "digits.parquet")
    for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        (path / "images" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels.reshape(8, 8) * 15).astype("uint8")).save(
            path / "images" / str(label) / f"{number}.png"
        )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 2))
    y = x @ [1.0, -2.0] + 0.1 * rng.normal(size=200)
    csv.write_csv(pa.table({"a": x[:, 0], "b": x[:, 1], "y": y}), path / "line.csv")
    words = [["good", "bad"][i % 2] for i in range(60)]
    texts = [f"a {word} film" + " indeed" * (i % 3) for i, word in enumerate(words)]
    csv.write_csv(pa.table({"review": texts, "mood": words, "id": list(range(60))}), path / "reviews.csv")
    return path


@pytest.fixture(autouse=True)
def _inside(project, monkeypatch):
    monkeypatch.chdir(project)


# --- every method ---


OTHERS = (Method.NULL_SPACE, Method.SWAG, Method.SGLD, Method.ENSEMBLE, Method.MC_DROPOUT, Method.SCORE_VI_MIXTURE)


@pytest.mark.parametrize("method", [method for method in Method if method not in OTHERS])
def test_every_method_ends_in_a_posterior_that_compare_reads(project, tmp_path, method):
    training = [] if method == Method.LAPLACE else ["--epochs", "8"]
    fit("fit_net:digits", "digits.npz", "-o", tmp_path / "out", "--method", method, "--map-epochs", "30",
        "--map-lr", "0.02", *training)  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "calibration.json", "data.json", "log.json", "model.safetensors", "posterior.safetensors", "settings.json",
    ]  # fmt: skip
    network = build_model("fit_net:digits", tmp_path / "out" / "model.safetensors")
    posterior = Posterior.load(tmp_path / "out" / "posterior.safetensors", network)
    assert posterior.info.method == method.replace("-", "_")
    assert posterior.info.n_data == 270
    first = method == Method.FIRST_LAYER
    assert list(posterior.names) == (["0.weight", "0.bias"] if first else ["0.weight", "0.bias", "2.weight", "2.bias"])
    for name, parameter in network.named_parameters():
        if name in posterior.names:
            assert torch.equal(parameter, posterior.mean[name])
    assert set(load_scales(tmp_path / "out" / "posterior.safetensors")) == ({"0", ""} if first else {"0", "2", ""})
    log = log_of(tmp_path / "out")
    assert log["validation_rows"] == 30
    own = {"linearised"} if method == Method.LAPLACE else set()
    assert set(log["validation"]) == {"map", "single_pass", "mc16"} | own
    assert log["validation"]["map"]["accuracy"]["value"] > 0.8
    for figures in log["validation"].values():
        assert figures["accuracy"]["value"] > 0.6
        assert figures["nll"]["se"] > 0
    assert len(log["warm_start"]["losses"]) == 30 * 5
    assert log["training"] is None if method == Method.LAPLACE else log["training"]["steps"] == 8 * 5
    calibration = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert set(calibration["temperature"]) == {"map", "single_pass", "mc16"} | own

    words = log["next"].split()
    assert words[:2] == ["bayespass", "compare"]
    compared = tmp_path / "compared.json"
    extra = ["--predictors", "map,faithful", "--reference", "16", "--quiet", "--output", str(compared)]
    assert CliRunner().invoke(app, [*words[1:], *extra]).exit_code == 0
    rows = {row["predictor"]: row["scores"] for row in json.loads(compared.read_text())["rows"]}
    for name, ours in (("map", "map"), ("faithful", "single_pass"), ("mc16", "mc16")):
        assert rows[name]["nll"]["value"] == pytest.approx(log["validation"][ours]["nll"]["value"], rel=1e-4)


FEW = {
    Method.NULL_SPACE: ("wide", ["--members", "8", "--validation", "0.4"], "sampled_gaussian", {"map", "linearised"}),
    Method.SWAG: ("digits", ["--epochs", "8"], "low_rank_gaussian", {"map", "single_pass", "mc16"}),
    Method.SGLD: ("digits", ["--epochs", "8", "--members", "10"], "empirical", {"map", "mc10"}),
    Method.ENSEMBLE: ("digits", ["--members", "3"], "empirical", {"map", "mc3"}),
    Method.MC_DROPOUT: ("dropped", [], "dropout", {"map", "single_pass", "mc16"}),
    Method.SCORE_VI_MIXTURE: ("digits", ["--epochs", "8"], "mixture", {"map", "single_pass", "mc16"}),
}


@pytest.mark.parametrize("method", OTHERS)
def test_posteriors_of_trained_networks(project, tmp_path, method):
    network, options, kind, predictors = FEW[method]
    out = tmp_path / "out"
    printed = fit(f"fit_net:{network}", "digits.npz", "-o", out, "--method", method, "--map-epochs", "30", "--map-lr", "0.02",
                  *options)  # fmt: skip
    model = build_model(f"fit_net:{network}", out / "model.safetensors")
    posterior = Posterior.load(out / "posterior.safetensors", model)
    assert posterior.kind == kind
    assert posterior.info.n_data == (180 if method == Method.NULL_SPACE else 270)
    log = log_of(out)
    assert set(log["validation"]) == predictors
    for figures in log["validation"].values():
        assert figures["accuracy"]["value"] > 0.8
    worst = max(figures["nll"]["value"] for figures in log["validation"].values())
    assert worst < 2 * log["validation"]["map"]["nll"]["value"]
    assert not list(out.glob("*.checkpoint"))
    if method == Method.NULL_SPACE:
        assert posterior.info.method == "null_space"
        assert "linearised network" in printed
    words = log["next"].split()[1:]
    result = CliRunner().invoke(app, [*words, "--quiet", *([] if "--reference" in words else ["--predictors", "map", "--reference", "16"])])  # fmt: skip
    assert result.exit_code == 0, result.exception


@pytest.mark.parametrize("structure", ["kron", "full"])
def test_laplace_structures(tmp_path, structure):
    out = tmp_path / "out"
    fit("fit_net:digits", "digits.npz", "-o", out, "--method", "laplace", "--hessian-structure", structure, "--names", "last",
        "--map-epochs", "30")  # fmt: skip
    network = build_model("fit_net:digits", out / "model.safetensors")
    posterior = Posterior.load(out / "posterior.safetensors", network)
    assert posterior.kind == {"kron": "kronecker_gaussian", "full": "full_gaussian"}[structure]
    assert posterior.names == ("2.weight", "2.bias")
    assert any("curvature" in note for note in log_of(out)["notes"])


@pytest.mark.parametrize(("method", "stage"), [("swag", "method"), ("sgld", "method"), ("ensemble", "member1")])
def test_collected_weights_survive_a_kill(tmp_path, method, stage):
    more = ["--epochs", "40"] if method != "ensemble" else ["--members", "3"]
    command = [
        "fit_net:digits",
        "digits.npz",
        "--method",
        method,
        "--map-epochs",
        "20",
        "--checkpoint-every",
        "3",
        *more,
    ]
    fit(*command, "-o", tmp_path / "whole")
    process = start(tmp_path / "cut", command)
    deadline = time.monotonic() + 120
    while (
        not (tmp_path / "cut" / f"{stage}.checkpoint").exists()
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "cut" / "log.json").exists()
    fit(*command, "-o", tmp_path / "cut")
    for name in ("posterior.safetensors", "model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name


def test_names_choose_what_is_random_and_the_rest_stays(tmp_path):
    base = ["digits.npz", "--epochs", "2", "--map-epochs", "3"]
    fit("fit_net:digits", *base, "-o", tmp_path / "last", "--names", "last")
    fit("fit_net:digits", *base, "-o", tmp_path / "regex", "--names", r"2\.b")
    last = build_model("fit_net:digits", tmp_path / "last" / "model.safetensors")
    regex = build_model("fit_net:digits", tmp_path / "regex" / "model.safetensors")
    assert Posterior.load(tmp_path / "last" / "posterior.safetensors", last).names == ("2.weight", "2.bias")
    assert Posterior.load(tmp_path / "regex" / "posterior.safetensors", regex).names == ("2.bias",)
    assert torch.equal(last[0].weight, regex[0].weight)  # of the same warm start
    assert not torch.equal(last[2].weight, regex[2].weight)


# --- every kind of data ---


def test_the_single_pass_can_be_distilled(tmp_path):
    out = tmp_path / "out"
    fit("fit_net:digits", "digits.npz", "-o", out, "--epochs", "5", "--map-epochs", "20", "--calibration", "distill")
    calibration = json.loads((out / "calibration.json").read_text())["scales"]
    assert "KL to Monte Carlo" in calibration["report"]
    kept = load_scales(out / "posterior.safetensors")
    assert dict(kept) == pytest.approx(calibration["factors"])
    assert kept.dampings == pytest.approx(calibration["dampings"])


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_are_standardised_and_read_again_in_the_same_way(tmp_path, kind):
    out = tmp_path / "out"
    fit("fit_net:digits", f"digits.{kind}", "--target", "digit", "-o", out, "--epochs", "5", "--map-epochs", "20")
    recipe = json.loads((out / "data.json").read_text())
    assert recipe["classes"] == [f"d{i}" for i in range(10)]
    assert recipe["features"][:2] == ["p0", "p1"]
    assert len(recipe["center"]) == 64
    log = log_of(out)
    assert log["validation"]["map"]["accuracy"]["value"] > 0.7
    words = log["next"].split()[1:]
    extra = ["--predictors", "map", "--reference", "16", "--quiet", "--output", str(tmp_path / "c.json")]
    assert CliRunner().invoke(app, [*words, *extra]).exit_code == 0
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert rows[0]["scores"]["nll"]["value"] == pytest.approx(log["validation"]["map"]["nll"]["value"], rel=1e-4)
    without = CliRunner().invoke(app, [*words[: words.index("--recipe")], "--quiet"])
    assert "needs --recipe" in str(without.exception)


def test_a_folder_of_images_and_batch_norm(tmp_path):
    out = tmp_path / "out"
    fit("fit_net:pixels", "images", "-o", out, "--epochs", "3", "--map-epochs", "10", "--validation", "0.2")
    log = log_of(out)
    assert (log["rows"], log["validation_rows"]) == (240, 60)
    assert log["validation"]["map"]["accuracy"]["value"] > 0.6
    recipe = json.loads((out / "data.json").read_text())
    assert (recipe["channels"], recipe["image_size"]) == (1, [8, 8])
    network = build_model("fit_net:pixels", out / "model.safetensors")
    assert Posterior.load(out / "posterior.safetensors", network).names[0] == "0.weight"


@pytest.mark.parametrize(("factory", "noise"), [("line", "0.1"), ("noisy_line", "predicted")])
def test_regression(tmp_path, factory, noise):
    out = tmp_path / "out"
    printed = fit(
        f"fit_net:{factory}", "line.csv", "--target", "y", "-o", out, "--likelihood", "regression", "--sigma-noise", noise,
        "--method", "elbo", "--map-epochs", "150", "--epochs", "30", "--map-lr", "0.01",
    )  # fmt: skip
    assert "RMSE" in printed
    log = log_of(out)
    assert log["validation"]["single_pass"]["rmse"]["value"] < 0.4
    assert json.loads((out / "calibration.json").read_text())["temperature"] is None
    assert log["posterior"]["sigma_noise"] == (0.1 if noise == "0.1" else "predicted")
    words = log["next"].split()[1:]
    result = CliRunner().invoke(app, [*words, "--predictors", "map", "--reference", "16", "--quiet"])
    assert result.exit_code == 0, result.exception


def test_a_validation_file(project, tmp_path):
    rows = np.load(project / "digits.npz")
    np.savez(tmp_path / "held_out.npz", inputs=rows["inputs"][:50], targets=rows["targets"][:50])
    out = tmp_path / "out"
    fit("fit_net:digits", "digits.npz", "-o", out, "--method", "laplace", "--map-epochs", "2",
        "--validation", tmp_path / "held_out.npz")  # fmt: skip
    log = log_of(out)
    assert (log["rows"], log["validation_rows"]) == (300, 50)
    assert "held_out.npz" in log["next"]
    assert "--rows" not in log["next"]


def test_a_model_without_rules_keeps_monte_carlo(tmp_path):
    printed = fit("fit_net:sorts", "digits.npz", "-o", tmp_path / "out", "--epochs", "1", "--map-epochs", "1")
    assert "no single pass" in printed
    assert set(log_of(tmp_path / "out")["validation"]) == {"map", "mc16"}
    assert load_scales(tmp_path / "out" / "posterior.safetensors") is None
    assert json.loads((tmp_path / "out" / "calibration.json").read_text())["scales"] is None


# --- Hugging Face folders ---


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_channels=3, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, num_labels=10,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(path)
    processor = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "do_rescale": True, "do_normalize": True,
        "size": {"height": 8, "width": 8}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25],
        "rescale_factor": 1 / 255,
    }  # fmt: skip
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return path


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "a", "good", "bad", "film", "indeed"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(path)
    config = transformers.BertConfig(
        vocab_size=7, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, num_labels=2,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(path)
    return path


def test_a_vision_folder_with_its_own_processor(vision_folder, project, tmp_path):
    out = tmp_path / "out"
    fit(
        vision_folder, "images", "-o", out, "--map-epochs", "4", "--map-lr", "0.01", "--epochs", "2", "--method", "elbo"
    )
    assert {path.name for path in (out / "model").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    config = json.loads((out / "model" / "config.json").read_text())
    assert config["id2label"] == {str(i): str(i) for i in range(10)}
    log = log_of(out)
    assert log["start"] == "trained"
    words = log["next"].split()[1:]
    assert words[1] == str(out / "model")
    extra = ["--predictors", "map,faithful", "--reference", "16", "--quiet", "--output", str(tmp_path / "c.json")]
    assert CliRunner().invoke(app, [*words, *extra]).exit_code == 0
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert rows[1]["scores"]["nll"]["value"] == pytest.approx(
        log["validation"]["single_pass"]["nll"]["value"], rel=1e-3
    )


def test_pixels_are_normalised_as_the_folder_says(vision_folder, tmp_path):
    from bayespass.cli.data import Recipe, read_data

    (tmp_path / "a").mkdir()
    Image.new("L", (5, 9), 51).save(tmp_path / "a" / "1.png")
    network = build_model(str(vision_folder), None)
    data, _ = read_data(tmp_path, Recipe(), network, vision_folder)
    assert data.inputs["pixel_values"].shape == (1, 3, 8, 8)
    assert torch.allclose(data.inputs["pixel_values"], torch.tensor((0.2 - 0.5) / 0.25))


def test_a_text_folder_with_its_own_tokenizer(text_folder, tmp_path):
    out = tmp_path / "out"
    fit(text_folder, "reviews.csv", "--text", "review", "--target", "mood", "-o", out, "--map-epochs", "30",
        "--map-lr", "0.01", "--epochs", "2", "--method", "elbo", "--batch-size", "16")  # fmt: skip
    log = log_of(out)
    assert log["validation"]["map"]["accuracy"]["value"] == 1.0
    assert json.loads((out / "data.json").read_text())["classes"] == ["bad", "good"]
    assert json.loads((out / "model" / "config.json").read_text())["label2id"] == {"bad": 0, "good": 1}
    words = log["next"].split()[1:]
    result = CliRunner().invoke(app, [*words, "--predictors", "map", "--reference", "16", "--quiet"])
    assert result.exit_code == 0, result.exception


def test_ivon_on_a_trained_folder_is_cold_and_on_random_weights_warm():
    asked = Settings(Method.IVON)
    tuned = resolve(asked, Start.TRAINED, 1000, folder=True)
    assert (tuned.temperature, tuned.map_epochs, tuned.hess_init) == (1e-3, 0, 0.01)
    fresh = resolve(asked, Start.RANDOM, 1000, folder=False)
    assert (fresh.temperature, fresh.hess_init, fresh.prior_precision) == (1.0, 0.5, pytest.approx(0.2))
    assert fresh.epochs == fresh.map_epochs == -(-UPDATES * 64 // 1000)
    assert resolve(asked, Start.RANDOM, 10**6, folder=False).epochs == EPOCHS
    told = resolve(Settings(Method.IVON, prior_precision=5.0), Start.RANDOM, 1000, folder=False)
    assert (told.prior_precision, told.weight_decay) == (5.0, 0.005)
    assert resolve(Settings(Method.LAPLACE), Start.TRAINED, 1000, folder=False).prior_precision is None


# --- stopping and going on ---

RUN = ("fit_net:digits", "digits.npz", "--map-epochs", "120", "--epochs", "120", "--checkpoint-every", "7")


def start(output, command=()):
    return subprocess.Popen(
        [sys.executable, "-m", "bayespass", "fit", *(command or RUN), "-o", str(output), "--quiet"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as many threads as the run here: sums are rounded alike
    )  # fmt: skip


def test_killed_and_run_again_it_ends_in_the_same_posterior(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fit(*RUN, "-o", whole)
    for stage in ("warm_start.checkpoint", "method.checkpoint"):
        process = start(cut)
        deadline = time.monotonic() + 120
        while not (cut / stage).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert (cut / stage).exists()
        assert not (cut / "log.json").exists()
    fit(*RUN, "-o", cut)
    for name in ("posterior.safetensors", "model.safetensors", "calibration.json", "data.json"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name
    assert log_of(whole)["training"]["losses"] == log_of(cut)["training"]["losses"]
    assert not list(cut.glob("*.checkpoint"))
    assert not list(cut.glob(".*"))


def test_a_finished_run_says_so_and_other_settings_are_refused(tmp_path):
    base = ("fit_net:digits", "digits.npz", "-o", tmp_path / "out", "--epochs", "1", "--map-epochs", "1")
    fit(*base)
    before = (tmp_path / "out" / "posterior.safetensors").stat().st_mtime_ns
    (tmp_path / "out" / "method.checkpoint").write_text("left by a run killed at its very end")
    (tmp_path / "out" / ".posterior.safetensors.x.part").write_text("half-written")
    printed = fit(*base)
    assert not (tmp_path / "out" / "method.checkpoint").exists()
    assert not list((tmp_path / "out").glob(".*"))
    assert "finished" in printed
    assert "Monte Carlo" in printed
    assert (tmp_path / "out" / "posterior.safetensors").stat().st_mtime_ns == before
    with pytest.raises(BayespassError, match=r"lr is 0.05 and was 0.1.*another folder"):
        fit(*base, "--lr", "0.05")
    np.savez(tmp_path / "other.npz", inputs=np.zeros((20, 64), "float32"), targets=np.arange(20) % 10)
    with pytest.raises(BayespassError, match=r"the training rows differ"):
        fit("fit_net:digits", tmp_path / "other.npz", *base[2:])


def test_warnings_of_a_run_that_fails_are_shown(capsys):
    import warnings

    from bayespass.cli.fit_run import _noted

    with pytest.raises(ZeroDivisionError), _noted():
        warnings.warn("the start is far", UserWarning, stacklevel=1)
        raise ZeroDivisionError
    assert "warning: the start is far" in capsys.readouterr().err
    with _noted() as notes:
        warnings.warn("the start is far", UserWarning, stacklevel=1)
    assert notes == ["the start is far"]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("mine")
    with pytest.raises(BayespassError, match=r"model.safetensors, which is not of a run"):
        fit("fit_net:digits", "digits.npz", "-o", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_text() == "mine"


# --- mistakes ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit_net:digits", "absent.npz"], "no data file"),
        (["fit_net:digits", "digits.csv"], "needs --target"),
        (["fit_net:line", "digits.npz"], "cannot be run on two rows"),
        (["fit_net:digits", "digits.npz", "--epochs", "3", "--method", "laplace"], "--epochs 3 does not apply to --method laplace"),
        (["fit_net:digits", "digits.npz", "--members", "3", "--method", "elbo"], "--members 3 does not apply to --method elbo"),
        (["fit_net:digits", "digits.npz", "--hessian-structure", "kron"], "--hessian-structure kron does not apply"),
        (["fit_net:digits", "digits.npz", "--rows", "pixels", "--method", "null-space"], "--rows must be outputs or loss"),
        (["fit_net:digits", "digits.npz", "--temperature", "2", "--method", "swag"], "--temperature 2.0 does not apply"),
        (["fit_net:digits", "digits.npz", "--method", "swag", "--epochs", "1"], "--epochs must be at least 2 for swag"),
        (["fit_net:digits", "digits.npz", "--method", "mc-dropout"], "no nn.Dropout"),
        (["fit_net:digits", "digits.npz", "--hess-init", "1", "--method", "elbo"], "--hess-init 1.0 does not apply"),
        (["fit_net:digits", "digits.npz", "--names", "last", "--method", "first-layer"], "--names last does not apply"),
        (["fit_net:digits", "digits.npz", "--names", "("], "regular expression"),
        (["fit_net:digits", "digits.npz", "--names", "absent"], "no random parameter"),
        (["fit_net:digits", "digits.npz", "--prior-precision", "1", "--weight-decay", "1"], "not both"),
        (["fit_net:digits", "digits.npz", "--lr", "-1"], "--lr must be positive"),
        (["fit_net:digits", "digits.npz", "--temperature", "nan"], "--temperature must be positive"),
        (["fit_net:digits", "digits.npz", "--samples", "3", "--antithetic"], "must be even"),
        (["fit_net:digits", "digits.npz", "--likelihood", "regression"], "needs sigma_noise"),
        (["fit_net:digits", "digits.npz", "--sigma-noise", "big"], "--sigma-noise must be a number"),
        (["fit_net:digits", "digits.npz", "--sigma-noise", "1"], "belongs to likelihood='regression'"),
        (["fit_net:digits", "digits.npz", "--validation", "1.5"], "--validation must be a share"),
        (["fit_net:digits", "digits.npz", "--validation", "absent.npz"], "no data file"),
        (["fit_net:digits", "digits.npz", "--standardize"], "--standardize is for numeric columns"),
        (["fit_net:digits", "digits.npz", "--device", "abacus"], "--device 'abacus' cannot be used"),
        (["fit_net:digits", "one_class.npz"], "at least two classes"),
        (["fit_net:digits", "labels.npz"], "[0, 10)"),
    ],
)  # fmt: skip
def test_mistakes(project, tmp_path, arguments, message):
    np.savez(project / "one_class.npz", inputs=np.zeros((20, 64), "float32"), targets=np.full(20, 3))
    np.savez(project / "labels.npz", inputs=np.zeros((20, 64), "float32"), targets=np.arange(20))
    with pytest.raises((BayespassError, FileNotFoundError)) as error:
        fit(*arguments, "-o", tmp_path / "out", "--map-epochs", "1")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "log.json").exists()


def test_a_mistake_ends_in_one_line_and_exit_code_1(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "bayespass", "fit", "fit_net:digits", "absent.npz", "-o", str(tmp_path / "out")],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.startswith("error: no data file")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
