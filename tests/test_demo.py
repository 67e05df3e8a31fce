"""The demo's parts, small: the split, the training and the page. `make demo` runs it whole."""

import json
from dataclasses import replace

import pytest
import torch

from bayespass import Posterior, load_scales
from bayespass.demo import run as demo
from bayespass.demo.digits import load_digits
from bayespass.demo.models import SmallCNN
from bayespass.demo.training import train


def test_splits_are_disjoint_and_complete():
    train_split, calibration, test = load_digits(0, 300, 200)
    assert (len(train_split.labels), len(calibration.labels), len(test.labels)) == (300, 200, 1297)
    everything = torch.cat([train_split.images, calibration.images, test.images]).flatten(1)
    assert len(torch.unique(everything, dim=0)) > 1750
    assert everything.mean().abs() < 0.01
    assert everything.std() == pytest.approx(1.0, abs=0.01)
    assert not torch.equal(load_digits(1, 300, 200)[0].labels, train_split.labels)


def test_training_is_reproducible_and_learns():
    data = load_digits(0, 100, 10)[0]
    recipe = replace(demo.NETWORKS["cnn"][2], epochs=30, ivon_epochs=2, temperature=1e-3)
    posteriors = []
    for _ in range(2):
        torch.manual_seed(0)
        model = SmallCNN(channels=8)
        posteriors.append(train(model, data, recipe, seed=0, progress=False))
    first, second = posteriors
    assert all(torch.equal(first.mean[name], second.mean[name]) for name in first.names)
    assert not model.training
    assert float((model(data.images).argmax(-1) == data.labels).double().mean()) > 0.5


def test_the_page_is_self_contained(tmp_path, monkeypatch):
    title, _, recipe = demo.NETWORKS["cnn"]
    small = (title, lambda: SmallCNN(channels=4), replace(recipe, epochs=4, ivon_epochs=2))
    monkeypatch.setattr(demo, "NETWORKS", {"cnn": small})
    results, seconds = demo.run_demo(tmp_path / "out", n_reference=64, progress=False)
    assert seconds > 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "<script" not in page
    assert 'src="http' not in page
    assert "Convolutional network" in page
    for label in ("MAP (deterministic)", "MC-4", "MC-64", "streamlined", "CVP, uncalibrated"):
        assert label in page
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["cnn"]
    assert [row["predictor"] for row in rows] == [*demo.PREDICTORS, "mc64"]
    assert (tmp_path / "out" / "demo.png").stat().st_size > 10_000
    file = tmp_path / "out" / "cnn.posterior.safetensors"
    assert Posterior.load(file, results[0].model).names == results[0].posterior.names
    assert dict(load_scales(file)) == dict(results[0].scales)
