"""What `inspect_model` and `bayespass inspect` find in models where the answer is known."""

import io
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from bayespass import DiagonalGaussian, InvalidInput, MissingRule, SinglePass
from bayespass.cli.app import main
from bayespass.errors import MissingExtra
from bayespass.inspect import inspect_model
from bayespass.report.table import coverage_summary, coverage_table, merged_path
from bayespass.rules import registry

HERE = Path(__file__).name


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)).eval()


def gaussian(model, keep=lambda name: True):
    mean = {name: p.detach() for name, p in model.named_parameters() if keep(name)}
    return DiagonalGaussian(mean, {name: torch.full_like(p, 0.01) for name, p in mean.items()})


class Bessel(nn.Module):
    """Two operations without a rule, one of them in place, and more after them."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 3)
        self.idle = nn.Linear(2, 2)

    def forward(self, x):
        hidden = torch.special.bessel_j0(self.first(x))  # the line that the report names
        hidden = hidden + hidden.polygamma_(1)
        return F.relu(self.second(hidden))


def test_an_mlp():
    coverage = inspect_model(mlp(), torch.zeros(2, 4), approximation="cvp")
    assert [(row.path, row.class_name, row.operation.rpartition(".")[2], row.calls) for row in coverage.rows] == [
        ("0", "Linear", "linear", 1),
        ("1", "GELU", "gelu", 1),
        ("2", "Linear", "linear", 1),
    ]
    assert [row.status for row in coverage.rows] == ["exact", "approximate", "exact"]
    assert coverage.rows[1].variance_error > 0
    assert coverage.missing == ()
    assert coverage.parameters_total == coverage.parameters_random == 4 * 8 + 8 + 8 * 3 + 3
    assert [(m.path, m.total, m.random) for m in coverage.modules] == [("0", 40, 40), ("2", 27, 27)]
    assert coverage.unused == ()
    assert coverage.inputs == ("(2, 4) float32",)
    assert coverage.drops
    assert 2 < coverage.cost.arithmetic_ratio <= 3
    assert coverage.cost.predicted_ratio > 1


def test_a_subset_of_the_parameters():
    model = mlp()
    coverage = inspect_model(model, torch.zeros(2, 4), gaussian(model, lambda name: name.startswith("2.")))
    assert (coverage.parameters_total, coverage.parameters_random) == (67, 27)
    assert [row.path for row in coverage.rows] == ["2"]
    assert coverage.cost.arithmetic_ratio < inspect_model(model, torch.zeros(2, 4)).cost.arithmetic_ratio


def test_frozen_parameters_are_not_random_by_default():
    model = mlp()
    model[0].requires_grad_(False)
    assert inspect_model(model, torch.zeros(2, 4)).parameters_random == 27
    with pytest.raises(InvalidInput, match="pass posterior="):
        inspect_model(model.requires_grad_(False), torch.zeros(2, 4))


def test_tied_weights_count_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    coverage = inspect_model(model.eval(), torch.zeros(2, 4))
    assert coverage.parameters_total == coverage.parameters_random == 16 + 4 + 4
    assert [module.total for module in coverage.modules] == [20, 4]


def test_everything_missing_is_listed_with_its_place():
    model = Bessel().eval()
    coverage = inspect_model(model, torch.randn(2, 4))
    assert [(row.path, row.operation, row.status) for row in coverage.missing] == [
        ("", "torch.special.bessel_j0", "missing"),
        ("", "torch.Tensor.polygamma_", "missing"),
    ]
    source = Path(__file__).read_text(encoding="utf-8").splitlines()
    line = next(number for number, text in enumerate(source, 1) if text.endswith("# the line that the report names"))
    assert coverage.missing[0].location == f"{__file__}:{line}"
    assert "no Gaussian rule for torch.special.bessel_j0" in coverage.missing[0].reason
    assert [row.operation.rpartition(".")[2] for row in coverage.rows if row.status != "missing"][-2:] == [
        "linear",
        "relu",
    ]
    assert coverage.unused == ("idle.weight", "idle.bias")
    assert coverage.counts["missing"] == 2
    with pytest.raises(MissingRule, match="bessel_j0"):
        SinglePass(model, gaussian(model))(torch.randn(2, 4))


def test_what_a_plain_tensor_stores_is_followed():
    class Stores(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 8)

        def forward(self, x):
            buffer = torch.zeros(2, 8)
            buffer.lerp_(self.first(x), 0.5)
            return torch.relu(buffer)

    coverage = inspect_model(Stores().eval(), torch.randn(2, 4))
    assert coverage.missing
    assert coverage.rows[-1].operation == "torch.relu"


def test_the_model_is_untouched():
    model = Bessel().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inspect_model(model, torch.randn(2, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "forward" not in vars(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(type(p) is nn.Parameter and p.requires_grad for p in model.parameters())


def test_a_module_rule_is_one_row(monkeypatch):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return torch.special.bessel_j0(self.inner(x))

    monkeypatch.setattr(registry, "_MODULE_RULES", dict(registry._MODULE_RULES))
    registry.module_rule(Block)(lambda module, x: x)
    coverage = inspect_model(nn.Sequential(nn.Linear(4, 4), Block()).eval(), torch.randn(2, 4))
    assert [(row.path, row.module_rule, row.status) for row in coverage.rows] == [
        ("0", False, "exact"),
        ("1", True, "approximate"),
    ]
    assert coverage.unused == ()
    assert coverage.modules[1].path == "1.inner"

    def refuses(module, x):
        raise MissingRule("not for this block")

    registry.module_rule(Block)(refuses)
    coverage = inspect_model(nn.Sequential(nn.Linear(4, 4), Block()).eval(), torch.randn(2, 4))
    assert [row.path for row in coverage.rows] == ["0", "1", "1.inner", "1"]
    assert coverage.rows[1].reason == "not for this block"


def test_notes_about_the_output():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return {"parts": {"embedding": self.layer(x)}}

    assert "logits" in inspect_model(Named().eval(), torch.randn(2, 4)).notes[0]

    class Constant(Named):
        def forward(self, x):
            self.layer(x)
            return x

    assert "deterministic" in inspect_model(Constant().eval(), torch.randn(2, 4)).notes[0]


def test_mistakes_are_told_in_one_line():
    with pytest.raises(InvalidInput, match="training mode"):
        inspect_model(mlp().train(), torch.zeros(2, 4))
    with pytest.raises(InvalidInput, match=r"Sequential cannot be called with \(2, 5\) float32"):
        inspect_model(mlp(), torch.zeros(2, 5))
    with pytest.raises(InvalidInput, match="approximation"):
        inspect_model(mlp(), torch.zeros(2, 4), approximation="magic")


def test_attention_says_what_it_leaves_out():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            y = self.layer(x)
            return F.scaled_dot_product_attention(y, y, y)

    coverage = inspect_model(Attention().eval(), torch.randn(1, 3, 4), approximation="cvp")
    assert coverage.rows[-1].drops == coverage.drops
    assert coverage.drops[0] in coverage_summary(coverage).plain


def test_repeated_blocks_share_a_line():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.LayerNorm(4)) for _ in range(12)), Bessel())
    coverage = inspect_model(model.eval(), torch.randn(2, 4))
    for width in (80, 120):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(coverage_table(coverage, width))
        console.print(coverage_summary(coverage))
        text = console.export_text()
        assert "{0-11}" in text
        assert "x12" in text
        assert "missing: torch.special.bessel_j0 in 12 (Bessel)" in text
        assert HERE in text.replace("\n", "")
        assert len(text.splitlines()) < 40
        assert max(map(len, text.splitlines())) <= width
    everything = coverage_table(coverage, 120, every=True)
    assert everything.row_count == 39
    assert coverage_table(replace(coverage, rows=()), 80).row_count == 0


def test_merged_paths():
    assert merged_path(["a.0.b", "a.1.b", "a.2.b"]) == "a.{0-2}.b"
    assert merged_path(["a.0.b", "a.2.b"]) == "a.{0,2}.b"
    assert merged_path(["a.0", "b"]) == "a.0, b"
    assert merged_path([""]) == ""


# The command.

NET = """
import torch
from torch import nn

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return torch.special.bessel_j0(self.layer(x))

def build():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

def odd():
    return Odd()
"""


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(monkeypatch, capsys):
    """The command in this process; one subprocess per case would take most of the tests' time."""

    def command(*arguments, cwd):
        monkeypatch.chdir(cwd)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr(sys, "argv", ["bayespass", "inspect", *arguments])
        for name in ("net", "example"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        return Result(code, *capsys.readouterr())

    return command


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "example.py").write_text(NET + "\ndef example_inputs():\n    return torch.zeros(2, 4)\n")
    np.savez(tmp_path / "inputs.npz", inputs=np.zeros((5, 4)))
    np.savez(tmp_path / "named.npz", input=np.zeros((5, 4), "float32"))
    np.savez(tmp_path / "wide.npz", inputs=np.zeros((5, 7)))
    return tmp_path


def test_the_command_on_a_factory(run, folder):
    result = run("example:build", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "linear" in result.stdout
    assert "67 of 67 random" in result.stdout
    result = run("net:build", "--inputs", "named.npz", "--json", "--approximation", "streamlined", cwd=folder)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["complete"], found["approximation"], found["parameters_random"]) == (True, "streamlined", 67)
    assert found["inputs"] == ["input (5, 4) float32"]
    result = run("net:odd", "--inputs", "inputs.npz", "--json", cwd=folder)
    assert result.returncode == 2, result.stderr
    found = json.loads(result.stdout)
    assert [row["operation"] for row in found["rows"] if row["status"] == "missing"] == ["torch.special.bessel_j0"]
    assert found["rows"][-1]["location"].endswith("net.py:11")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["net:build"], "pass --inputs"),
        (["net:build", "--inputs", "absent.npz"], "no inputs file"),
        (["net:build", "--inputs", "net.py"], "npz file"),
        (["net:build", "--inputs", "wide.npz"], "cannot be called with (5, 7)"),
        (["net:build", "--inputs", "inputs.npz", "--approximation", "magic"], "approximation must be"),
        (["."], "without config.json"),
        (["nowhere"], "local model folder"),
    ],
)
def test_mistakes_end_in_one_line(run, folder, arguments, message):
    result = run(*arguments, cwd=folder)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_model_folder(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "vit")
    gaussian(model, lambda name: name.startswith("classifier")).save(tmp_path / "posterior.safetensors", model)
    result = run("vit", "--posterior", "posterior.safetensors", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["model"] == "ViTForImageClassification"
    assert found["parameters_total"] == sum(p.numel() for p in model.parameters())
    assert found["parameters_random"] == 16 * 2 + 2
    assert found["inputs"] == ["pixel_values (2, 3, 16, 16) float32"]
    assert found["notes"] == []

    (tmp_path / "vit" / "model.safetensors").rename(tmp_path / "vit" / "pytorch_model.bin")
    result = run("vit", cwd=tmp_path)
    assert (result.returncode, "never read" in result.stderr) == (1, True)
    (tmp_path / "vit" / "pytorch_model.bin").unlink()
    result = run("vit", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert "random" in found["notes"][0]
    assert found["parameters_random"] == found["parameters_total"]

    settings = json.loads((tmp_path / "vit" / "config.json").read_text())
    (tmp_path / "vit" / "config.json").write_text(json.dumps(settings | {"architectures": ["pipeline"]}))
    result = run("vit", cwd=tmp_path)
    assert (result.returncode, "never run" in result.stderr) == (1, True)


def test_without_transformers(tmp_path, monkeypatch):
    from bayespass.cli.models import open_model

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"pip install bayespass\[transformers\]"):
        open_model(str(tmp_path), None)
