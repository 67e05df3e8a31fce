"""The rules of the house that a machine can check."""

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import bayespass

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.py"))
HEAVY = {
    "sklearn",
    "scipy",
    "matplotlib",
    "rich",
    "typer",
    "jinja2",
    "transformers",
    "torchvision",
    "accelerate",
    "lightning",
    "peft",
    "pyarrow",
    "PIL",
}


def test_everything_public_has_a_docstring():
    for name in dir(bayespass):
        value = getattr(bayespass, name)
        if not name.startswith("_") and callable(value):
            assert value.__doc__, name


def test_files_are_short_and_none_is_called_utils():
    for path in SOURCES:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path
        assert "util" not in path.stem


def test_importing_loads_nothing_heavy():
    code = f"import sys, bayespass; print([n for n in {sorted(HEAVY)} if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_nothing_unpickles():
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert "torch.load" not in text, path
        assert "import pickle" not in text, path
        assert "allow_pickle=True" not in text, path


def test_imports_are_absolute_and_of_one_package():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno} uses a relative import"


def test_the_version_is_one():
    from importlib.metadata import version

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert declared["tool"]["hatch"]["version"]["path"] == "src/bayespass/version.py"
    assert version("bayespass") == bayespass.__version__


def test_results_have_their_header():
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        assert {"command", "versions", "machine", "seeds", "table", "summary"} <= set(result), path
        assert all(isinstance(value, int | float) for value in result["summary"].values())
        assert (ROOT / result["command"].split()[1]).exists()


def test_no_rule_knows_a_models_class():
    """Blocks are known by torch's own classes or by what they compute, never as a part of somebody's model."""
    from bayespass.rules import registry

    assert all(cls.__module__.startswith("torch.nn") for cls in registry._MODULE_RULES)
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if "rules" in path.parts or "predict" in path.parts:
            assert not {"transformers", "torchvision", "timm"} & set(
                text.replace(".", " ").replace("import", " ").split()
            ), path
