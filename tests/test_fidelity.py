"""The fidelity benchmark: its figures against plain formulas, and a small cell from training to the page."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional as F

import fidelity
import fidelity_tasks
from bayespass import ClassificationPrediction, PosteriorInfo, risk_coverage_curve
from bayespass.predict.sampling import prediction_from_draws
from fidelity_cases import Case, Reordered, Task, first_rows, in_batches, targets_of
from fidelity_cells import as_row, predict_cell, prediction_path
from fidelity_measure import (
    FITTED_GROUPS,
    RESAMPLES,
    derived,
    figures,
    interval,
    monte_carlo,
    rank_correlation,
    resampled_counts,
    resampled_ranks,
    rows_of,
    selective_figures,
)
from fidelity_pages import END, START, draw_gap_closed, main, page
from fidelity_summary import pooled, summarise
from fidelity_tasks import FURTHER, Cell, Reference, Store

CLASSES = 3


def test_ranked_figures_are_those_of_the_resampled_rows():
    rng = np.random.default_rng(0)
    confidence, counts = rng.random(300), resampled_counts(300)
    losses = (rng.random(300) > confidence).astype(float)
    spread, true = rng.random(300), rng.random(300)
    found = selective_figures(confidence, losses, counts)
    correlation = rank_correlation(spread, resampled_ranks(true, counts), counts)
    for place in (0, 1, 250, RESAMPLES):
        rows = np.repeat(np.arange(300), counts[place])
        curve = risk_coverage_curve(confidence[rows], losses[rows])
        assert found["coverage_at_1"][place] == pytest.approx(curve.coverage_at_risk(0.01))
        assert correlation[place] == pytest.approx(spearmanr(spread[rows], true[rows])[0], abs=1e-5)
        assert found["aurc"][place] == pytest.approx(curve.aurc, abs=0.002)  # repeated rows are ties there


def test_ties_are_answered_together_in_the_data_themselves():
    rng = np.random.default_rng(1)
    confidence = np.round(rng.random(200), 1)
    losses = (rng.random(200) > confidence).astype(float)
    found, curve = selective_figures(confidence, losses, resampled_counts(200)), risk_coverage_curve(confidence, losses)
    assert found["aurc"][0] == curve.aurc
    assert found["coverage_at_0.5"][0] == curve.coverage_at_risk(0.005)


def test_blocks_are_drawn_whole():
    counts = resampled_counts(10, block=4)
    assert counts.shape == (1 + RESAMPLES, 10)
    assert (counts[0] == 1).all()
    assert all((counts[:, a] == counts[:, b]).all() for a, b in ((0, 3), (4, 7), (8, 9)))
    assert (resampled_counts(10, block=4) == counts).all()


@pytest.fixture(scope="module")
def measured():
    """Logits of 600 rows from known Gaussians: 128 reference draws, 64 further ones."""
    generator = torch.Generator().manual_seed(0)
    center = 2 * torch.randn(600, CLASSES, generator=generator)
    draws = center + torch.randn(128 + FURTHER, 600, CLASSES, generator=generator)
    reference = Reference(center, draws[:128], draws[128:])
    many = center + torch.randn(4000, 600, CLASSES, generator=generator)
    truth = prediction_from_draws(many, PosteriorInfo(), 4000)
    targets = torch.multinomial(truth.probs, 1, generator=generator).squeeze(-1)
    members = monte_carlo(reference, PosteriorInfo())
    members["map"] = [ClassificationPrediction(center.softmax(-1), center, torch.zeros_like(center))]
    members["exact"] = [truth]
    by_row = {name: [rows_of(each, members["mc"][0], targets) for each in own] for name, own in members.items()}
    counts = resampled_counts(600)
    ranks = resampled_ranks(by_row["mc"][0].spread, counts)
    confident = resampled_ranks(by_row["mc"][0].confidence, counts)
    return derived({name: figures(own, ranks, counts, confident) for name, own in by_row.items()}, 128)


def test_equivalent_samples_are_those_of_monte_carlo_itself(measured):
    for size in FITTED_GROUPS:
        low, high = interval(measured[f"mc{size}"]["equivalent_samples"])
        assert 0.7 * size < low < high < 1.5 * size
    assert measured["exact"]["equivalent_samples"][0] > 500  # the reference's own noise is taken out
    assert measured["map"]["equivalent_samples"][0] < 16


def test_the_gap_goes_from_map_to_the_reference(measured):
    assert (measured["map"]["gap_closed"] == 0).all()
    assert np.allclose(measured["mc"]["gap_closed"], 1)
    assert np.allclose(measured["map"]["over_mc16"], -(measured["mc16"]["aurc"] - measured["map"]["aurc"]))


def test_closeness_to_the_reference(measured):
    assert measured["mc"]["kl_to_mc"][0] == pytest.approx(0, abs=1e-7)
    for figure in ("spearman", "confidence_spearman", "same_answer"):
        assert measured["mc"][figure][0] == pytest.approx(1)
        assert measured["mc16"][figure][0] < measured["mc64"][figure][0] < 1
    assert measured["exact"]["variance_ratio"][0] == pytest.approx(1, abs=0.03)
    assert measured["exact"]["mean_error"][0] == pytest.approx(128**-0.5, rel=0.1)  # the reference's own
    assert "variance_ratio" not in measured["map"]
    assert measured["moments_link"]["kl_to_mc"][0] < measured["mc64"]["kl_to_mc"][0]


def test_rows_are_cut_and_reordered():
    batches = in_batches(torch.arange(10.0)[:, None], torch.arange(10), 4)
    assert targets_of(first_rows(batches, 6)).tolist() == [0, 1, 2, 3, 4, 5]
    torch.manual_seed(0)
    seen = [(inputs, targets) for inputs, targets in Reordered(batches)]
    assert [len(targets) for _, targets in seen] == [4, 4, 2]
    assert sorted(targets_of(seen).tolist()) == list(range(10))
    assert all(torch.equal(inputs[:, 0].long(), targets) for inputs, targets in seen)


def _case(data, cache, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(260, 4, generator=generator)
    labels = (inputs[:, :CLASSES] + torch.randn(260, CLASSES, generator=generator)).argmax(-1)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    parts = [in_batches(inputs[a:b], labels[a:b], 20) for a, b in ((0, 60), (60, 100), (100, 260))]
    tests = {"test": parts[2], "shift": in_batches(2 * inputs[100:], labels[100:], 20)}
    return Case(model, parts[0], parts[1], tests, 60, F.cross_entropy)


SMALL = Task(
    _case,
    scales=(1.0,),
    adamw={"epochs": 3, "lr": 0.01},
    ivon={"epochs": 3, "lr": 0.1, "hess_init": 0.5},
    grid=(1.0, 10.0),
    reference=32,
)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store whose only task is small and made up."""
    monkeypatch.setattr(fidelity_tasks, "TASKS", {"small": SMALL})
    monkeypatch.setattr(fidelity_tasks, "CODE", {"small": b"code"})
    monkeypatch.setenv("BAYESPASS_PEERS_PYTHON", "no-such-interpreter")
    return Store(Path("nowhere"), folder=tmp_path)


def test_a_cell_from_training_to_the_page(store, tmp_path, monkeypatch):
    cells = [Cell("small", kind, 1.0, seed) for kind in ("ivon", "laplace") for seed in (0, 1)]
    for cell in cells:
        store.make_reference(cell)
        predict_cell(cell, store)
    reference = store.reference(cells[0], "shift")
    assert reference.draws.shape == (32, 160, CLASSES)
    assert not torch.equal(reference.draws[0], reference.further[0])
    monkeypatch.setattr(fidelity, "Store", lambda *given: store)
    asked = Namespace(tasks=["small"], seeds=[0, 1], kinds=["ivon", "laplace"], scales=None, data=Path(), smoke=False)
    rows, resamples = fidelity.gather(asked)
    assert {row["predictor"] for row in rows} >= {"map", "cvp", "shared", "last_layer_laplace", "mc16", "mc"}
    assert {row["test"] for row in rows} == {"test", "shift"}
    assert all(row["gap_closed"] is None for row in rows if not row["mc_helps"])
    summary = summarise(pooled(rows, resamples))
    assert summary["settings"] == 2
    assert "small/ivon/x1/shared/kl_to_mc" in summary
    assert "small+shift/laplace/x1/gap" in summary
    helped = [name for name in summary if name.endswith("/mc/gap_closed")]
    assert all(summary[name] == 1 for name in helped)
    result = {"seeds": [0, 1], "summary": summary, "table": rows}
    assert "| MC-16 |" in page(result)
    draw_gap_closed(result, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_predictions_are_kept_until_asked_for_again(store):
    cell = Cell("small", "ivon", 1.0, 0)
    store.make_reference(cell)
    predict_cell(cell, store)
    paths = [prediction_path(cell, store, name) for name in ("cvp", "shared")]
    stamps = [path.stat().st_mtime_ns for path in paths]
    predict_cell(cell, store, again=("cvp",))
    assert paths[0].stat().st_mtime_ns > stamps[0]
    assert paths[1].stat().st_mtime_ns == stamps[1]
    assert not prediction_path(cell, store, "suq").exists()  # its environment is missing: tried again later


def test_files_go_by_the_settings_of_their_task(store, monkeypatch):
    before = store.key("small")
    monkeypatch.setitem(fidelity_tasks.TASKS, "small", replace(SMALL, scales=(2.0,), block=3, few_rows=True))
    assert store.key("small") == before
    monkeypatch.setitem(fidelity_tasks.TASKS, "small", replace(SMALL, reference=33))
    assert store.key("small") != before


def test_too_few_rows_have_no_coverage_at_a_small_risk(store, monkeypatch, measured):
    cell = Cell("small", "ivon", 1.0, 0)
    assert as_row(cell, store, "test", "mc16", measured["mc16"], "aurc", 600)["coverage_at_0.5"] is not None
    monkeypatch.setitem(fidelity_tasks.TASKS, "small", replace(SMALL, few_rows=True))
    row = as_row(cell, store, "test", "mc16", measured["mc16"], "aurc", 600)
    assert row["coverage_at_0.5"] is None
    assert row["note"]


def test_the_page_keeps_what_stands_around_its_tables(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    (tmp_path / "fidelity.md").write_text(f"before\n{START}\nold\n{END}\nafter\n")
    (tmp_path / "result.json").write_text('{"seeds": [0], "summary": {}, "table": []}')
    monkeypatch.setattr("sys.argv", ["pages", "--result", f"{tmp_path}/result.json", "--docs", str(tmp_path)])
    main()
    text = (tmp_path / "fidelity.md").read_text()
    assert text.startswith("before\n" + START)
    assert text.endswith(END + "\nafter\n")
    assert "old" not in text
