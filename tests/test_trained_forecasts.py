"""The forecasting cells of the benchmark, on a made-up data set and a few steps."""

import gzip

import numpy as np
import pytest
import torch

import trained_forecasts
from bayespass import RegressionPrediction
from trained_forecasts import METHODS, SETTINGS, cells, run_cell, scores, series, summarise

ROWS = {"train": (0, 1000), "validation": (1000, 1450), "test": (1450, 1900)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Hourly waves, in the layout of the ETT files; columns differ in level and scale."""
    time, rng = np.arange(2000)[:, None], np.random.default_rng(0)
    values = np.sin(time * 2 * np.pi / 24) * np.arange(1, 8) + 10 * np.arange(7) + rng.normal(size=(2000, 7))
    (tmp_path / "timeseries").mkdir()
    with gzip.open(tmp_path / "timeseries" / "ETTh1.csv.gz", "wt", encoding="utf-8") as file:
        file.write("date,HUFL,HULL,MUFL,MULL,LUFL,LULL,OT\n")
        file.writelines(f"2016-07-01 00:00:00,{','.join(map(str, row))}\n" for row in values)
    monkeypatch.setattr(trained_forecasts, "ROWS", ROWS)
    monkeypatch.setattr(trained_forecasts, "STEPS", {"koopman": 6, "patchtst": 4})
    return tmp_path


def test_rows_are_standardised_by_the_training_rows(folder):
    values = series("ETTh1", folder)
    assert values.shape == (1900, 7)
    torch.testing.assert_close(values[:1000].mean(0), torch.zeros(7), rtol=0, atol=1e-5)
    torch.testing.assert_close(values[:1000].std(0, correction=0), torch.ones(7))


def test_scores_of_a_known_forecast():
    targets = torch.randn(500, 20, 3)
    exact = RegressionPrediction(
        torch.zeros(500, 20, 3), torch.full((500, 20, 3), 0.25), torch.full((500, 20, 3), 0.75)
    )
    found = scores(exact, targets)
    assert found["mse"] == pytest.approx(1, abs=0.05)
    assert found["mae"] == pytest.approx((2 / np.pi) ** 0.5, abs=0.02)
    assert found["nll"] == pytest.approx(0.5 * np.log(2 * np.pi) + 0.5, abs=0.02)
    assert found["epistemic_share"] == pytest.approx(0.25)
    for level, z in {50: 0.67449, 80: 1.28155, 90: 1.64485, 95: 1.95996}.items():
        assert found[f"coverage_{level}"] == pytest.approx(level / 100, abs=0.01)
        assert found[f"width_{level}"] == pytest.approx(2 * z, rel=1e-4)


@pytest.mark.parametrize(
    ("model", "method"), [("koopman", method) for method in METHODS] + [("patchtst", "ivon/shared")]
)
def test_every_method_makes_a_cell(folder, model, method):
    first = run_cell(f"ETTh1-{model}", method, 0, folder)
    assert all(np.isfinite(value) for value in first.values() if isinstance(value, float))
    assert (first["epistemic_share"] > 0) == (method != "map")
    again = run_cell(f"ETTh1-{model}", method, 0, folder)
    timed = ("seconds", "train_seconds", "predict_seconds")
    assert {k: v for k, v in first.items() if k not in timed} == {k: v for k, v in again.items() if k not in timed}
    assert run_cell(f"ETTh1-{model}", method, 1, folder)["mse"] != first["mse"]


def test_every_cell_has_its_settings():
    assert all((task.split("-")[1], method.partition("/")[0]) in SETTINGS for task, method, _ in cells([0]))


def test_the_summary_averages_over_seeds():
    figures = dict.fromkeys(("mse", "nll", "coverage_50", "coverage_90", "coverage_95", "epistemic_share"), 1.0)
    rows = [{"task": "ETTh1-koopman", "method": "ivon/shared", **figures, "mse": value} for value in (1.0, 3.0)]
    summary = summarise(rows)
    assert summary["ETTh1-koopman.ivon_shared.mse"] == 2.0
    assert summary["ETTh1-koopman.ivon_shared.mse_sd"] == pytest.approx(2**0.5)
