"""The command line as a person uses it."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_model
from torch import nn

from bayespass import DiagonalGaussian, VarianceScales

NET = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

def not_a_module():
    return 3
"""


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "bayespass", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("project")
    (path / "net.py").write_text(NET)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    mean = {name: p.detach() for name, p in model.named_parameters()}
    posterior = DiagonalGaussian(mean, {name: torch.full_like(p, 0.02) for name, p in mean.items()})
    posterior.save(path / "posterior.safetensors", model, scales=VarianceScales({"": 1.1}, "cvp"))
    save_model(model, str(path / "weights.safetensors"))
    rng = np.random.default_rng(0)
    np.savez(path / "data.npz", inputs=rng.normal(size=(40, 4)).astype("float32"), targets=rng.integers(0, 3, 40))
    np.savez(path / "wrong.npz", inputs=np.zeros((3, 4), "float32"))
    np.savez(path / "labels.npz", inputs=np.zeros((3, 4), "float32"), targets=np.array([0, 1, 7]))
    (path / "empty.npz").write_bytes(b"")
    (path / "cut.npz").write_bytes((path / "data.npz").read_bytes()[:200])
    return path


def test_help_names_the_commands(folder):
    result = run("--help", cwd=folder)
    assert result.returncode == 0
    assert "demo" in result.stdout
    assert "compare" in result.stdout
    assert "inspect" in result.stdout
    assert "bayespass demo" in result.stdout
    for command in ("demo", "compare", "inspect", "fit"):
        assert run(command, "--help", cwd=folder).returncode == 0


def test_compare_prints_a_table_and_writes_json(folder):
    result = run(
        "compare", "net:build", "posterior.safetensors", "data.npz", "--weights", "weights.safetensors", "--reference", "20",
        "--predictors", "map,mc4,cvp", "--output", "out/result.json", "--quiet", cwd=folder,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for word in ("MAP", "MC-4", "CVP", "MC-20", "AURC", "cost"):
        assert word in result.stdout
    written = json.loads((folder / "out" / "result.json").read_text())
    assert [row["predictor"] for row in written["rows"]] == ["map", "mc4", "cvp", "mc20"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere:build", "posterior.safetensors", "data.npz"], "cannot be imported"),
        (["net", "posterior.safetensors", "data.npz"], "module:factory"),
        ([".", "posterior.safetensors", "data.npz"], "without config.json"),
        (["net:not_a_module", "posterior.safetensors", "data.npz"], "not a torch.nn.Module"),
        (["net:build", "absent.safetensors", "data.npz"], "no posterior file"),
        (["net:build", "data.npz", "data.npz"], "not a readable"),
        (["net:build", "posterior.safetensors", "absent.npz"], "no data file"),
        (["net:build", "posterior.safetensors", "net.py"], "npz file"),
        (["net:build", "posterior.safetensors", "empty.npz"], "npz file"),
        (["net:build", "posterior.safetensors", "cut.npz"], "npz file"),
        (["net:build", "posterior.safetensors", "data.npz", "--weights", "net.py"], "cannot be loaded"),
        (["net:build", "posterior.safetensors", "wrong.npz"], "targets"),
        (["net:build", "posterior.safetensors", "labels.npz"], "[0, 3)"),
        (["net:build", "posterior.safetensors", "data.npz", "--predictors", "exact"], "unknown predictor"),
    ],
)
def test_mistakes_end_in_one_line(folder, arguments, message):
    result = run("compare", *arguments, "--quiet", cwd=folder)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
