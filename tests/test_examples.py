"""The examples run, at a small size, and end in figures."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
RUNS = {
    "plain_loop.py": (["--epochs", "4"], ("torch",), r"single pass .*'accuracy': '0\.[89]"),
    "huggingface_trainer.py": (
        ["--epochs", "1", "--images", "200"],
        ("transformers", "accelerate"),
        r"single pass .*'accuracy': '0\.\d+ ± .*'nll'",
    ),
    "lora_posterior.py": (["--epochs", "12"], ("transformers", "peft"), r"single pass .*'accuracy': '0\.[5-9]"),
    "after_training.py": (["--epochs", "30"], ("torch",), r"null space: .*AUROC .* (1|0\.9)"),
    "lightning_module.py": (["--epochs", "20"], ("lightning",), r"single pass .*'coverage_95': '(1|0\.[89])"),
}


@pytest.mark.parametrize("name", RUNS)
def test_it_runs(name, tmp_path):
    options, packages, expected = RUNS[name]
    for package in packages:
        pytest.importorskip(package)
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), "--output", str(tmp_path), *options],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert re.search(expected, result.stdout), result.stdout[-2000:]
