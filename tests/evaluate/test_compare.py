import io
import math

import pytest
import torch
from rich.console import Console
from torch import nn

from bayespass import DiagonalGaussian, InvalidInput, MonteCarlo, PosteriorInfo, VarianceScales, compare, evaluate
from bayespass.report.table import comparison_rows, comparison_table, table_caption, table_cells


@pytest.fixture(scope="module")
def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).eval()
    inputs = torch.randn(120, 4)
    labels = torch.distributions.Categorical(logits=3 * model(inputs).detach()).sample()
    mean = {name: p.detach() for name, p in model.named_parameters()}
    posterior = DiagonalGaussian(mean, {name: torch.full_like(p, 0.04) for name, p in mean.items()})
    return model, posterior, list(zip(inputs.split(50), labels.split(50), strict=True))


@pytest.fixture(scope="module")
def comparison(problem):
    scales = {"cvp": VarianceScales({"": 1.2}, "cvp")}
    return compare(
        *problem, ("map", "mc4", "streamlined", "cvp_uncalibrated", "cvp"), scales, n_reference=20, n_bootstrap=20
    )


def test_rows_are_what_they_say(comparison, problem):
    model, posterior, loader = problem
    inputs, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    reference = MonteCarlo(model, posterior, 20)(inputs)
    row = comparison.row("mc20")
    torch.testing.assert_close(row.prediction.probs, reference.probs)
    assert row.scores["nll"].value == pytest.approx(evaluate(reference, labels)["nll"].value, rel=1e-5)
    assert row.agreement is None
    assert comparison.gap == pytest.approx(comparison.row("map").scores["aurc"].value - row.scores["aurc"].value)
    low, high = comparison.gap_interval
    assert low <= comparison.gap <= high
    assert comparison.batch_rows == 50
    assert all(r.cost_ratio > 0 for r in comparison.rows)


def test_monte_carlo_rows_are_means_over_groups_with_their_error(comparison, problem):
    model, posterior, loader = problem
    inputs, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    draws = torch.stack(list(MonteCarlo(model, posterior, 20).outputs(inputs)))
    nlls = torch.tensor([-g.softmax(-1).mean(0).gather(-1, labels[:, None]).log().mean() for g in draws.split(4)])
    row = comparison.row("mc4")
    assert row.scores["nll"].value == pytest.approx(nlls.mean().item(), rel=1e-4)
    assert row.draw_errors["nll"] == pytest.approx((nlls.std() / 5**0.5).item(), rel=1e-3)
    assert comparison.row("mc20").draw_errors["nll"] > 0
    assert comparison.row("cvp").draw_errors == {}


def test_scales_are_used_where_they_belong(comparison):
    scaled, plain = (comparison.row(n).prediction.logit_variance for n in ("cvp", "cvp_uncalibrated"))
    torch.testing.assert_close(scaled, 1.2 * plain)


def test_tables_show_every_row(comparison):
    headings, body = table_cells(comparison)
    assert len(body) == len(comparison.rows) == 6
    assert all(len(cells) == len(headings) for cells in body)
    assert body[0][0] == "MAP (deterministic)"
    assert comparison_table(comparison, "title").row_count == 6
    rows = comparison_rows(comparison)
    assert rows[0]["agreement"]["spearman"] is None
    assert {"aurc_gap_closed", "aurc_gap_closed_se"} <= set(rows[-1])


def test_no_share_of_a_gap_that_is_not_there(comparison):
    """The labels come from the mean network, so that averaging over draws has nothing to gain."""
    assert comparison.gap_interval[0] <= 0
    assert not comparison.averaging_helps
    assert all(math.isnan(row.gap_closed) and math.isnan(row.gap_closed_error) for row in comparison.rows)
    assert comparison_rows(comparison)[0]["aurc_gap_closed"] is None
    headings, body = table_cells(comparison)
    assert {cells[headings.index("gap closed %")] for cells in body} == {"–"}
    assert "does not measurably help" in table_caption(comparison)


def test_share_of_the_gap_where_averaging_helps():
    """Every row's target comes from a draw of its own, which is what Monte Carlo predicts and MAP does not."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1).eval()
    mean = {name: p.detach() for name, p in model.named_parameters()}
    posterior = DiagonalGaussian(
        mean, {name: torch.full_like(p, 0.25) for name, p in mean.items()}, PosteriorInfo("regression", sigma_noise=0.2)
    )
    inputs = torch.randn(200, 3)
    variance = 0.25 * (inputs.square().sum(1, keepdim=True) + 1) + 0.04
    targets = model(inputs).detach() + variance.sqrt() * torch.randn(200, 1)
    result = compare(model, posterior, [(inputs, targets)], ("map", "cvp"), n_reference=500, n_bootstrap=50)
    assert result.averaging_helps
    assert (result.row("map").gap_closed, result.row("mc500").gap_closed) == (0.0, 1.0)
    assert result.row("cvp").gap_closed == pytest.approx(1, abs=0.02)  # exact for a linear model, up to 500 draws
    assert result.row("cvp").gap_closed_error < 0.02
    assert "averaging helps" in table_caption(result)


def test_regression_is_compared_on_nll():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)).eval()
    mean = {name: p.detach() for name, p in model.named_parameters()}
    info = PosteriorInfo("regression", sigma_noise=0.2)
    posterior = DiagonalGaussian(mean, {name: torch.full_like(p, 0.01) for name, p in mean.items()}, info)
    inputs = torch.randn(40, 3)
    result = compare(
        model, posterior, [(inputs, model(inputs).detach() + 0.2)], ("map", "cvp"), n_reference=20, n_bootstrap=10
    )
    assert result.gap_metric == "nll"
    assert set(result.row("cvp").scores) == {"nll", "rmse", "coverage_95", "interval_width_95"}
    assert comparison_table(result, "title").row_count == 3


def test_mistakes(problem):
    model, posterior, loader = problem
    for name in ("mc1", "mc300", "exact"):
        with pytest.raises(InvalidInput, match=f"unknown predictor '{name}'"):
            compare(model, posterior, loader, (name,), n_reference=20)
    with pytest.raises(InvalidInput, match="no batch"):
        compare(model, posterior, [])
    with pytest.raises(InvalidInput, match="every batch must be"):
        compare(model, posterior, [torch.randn(3, 4)])


def test_memory_is_bounded(problem, monkeypatch):
    import sys

    monkeypatch.setattr(sys.modules["bayespass.evaluate.compare"], "MAX_DRAWS_BYTES", 1000)
    with pytest.raises(InvalidInput, match="fewer rows or lower n_reference"):
        compare(*problem, ("map",), n_reference=20)


def test_an_unknown_row_is_named(comparison):
    with pytest.raises(InvalidInput, match="'mc5' was not compared"):
        comparison.row("mc5")


def test_vector_and_sequence_outputs():
    """(N,) regression, and (N, T, C) classification where every position is a row of the gap."""

    class Squeeze(nn.Module):
        def forward(self, x):
            return x.squeeze(-1)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 1), Squeeze()).eval()
    mean = {name: p.detach() for name, p in model.named_parameters()}
    spread = {name: torch.full_like(p, 0.01) for name, p in mean.items()}
    posterior = DiagonalGaussian(mean, spread, PosteriorInfo("regression", sigma_noise=0.2))
    inputs = torch.randn(30, 3)
    assert (
        compare(model, posterior, [(inputs, torch.randn(30))], ("map",), n_reference=10, n_bootstrap=5).gap_metric
        == "nll"
    )
    tagger = nn.Sequential(nn.Linear(3, 4)).eval()
    mean = {name: p.detach() for name, p in tagger.named_parameters()}
    posterior = DiagonalGaussian(mean, {name: torch.full_like(p, 0.5) for name, p in mean.items()})
    words, tags = torch.randn(4, 50, 3), torch.randint(4, (4, 50))
    result = compare(tagger, posterior, [(words, tags)], ("map",), n_reference=10, n_bootstrap=5)
    aurc = result.row("map").scores["aurc"].value - result.row("mc10").scores["aurc"].value
    assert result.gap == pytest.approx(aurc)


@pytest.mark.parametrize("width", [80, 100, 127, 128, 140, 163, 164])
def test_no_figure_is_split_in_any_terminal(comparison, width):
    table = comparison_table(comparison, "title", width)
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(table)
    words = console.file.getvalue().split()
    for column in table.columns:
        for cell in column.cells:
            assert all(word in words for word in cell.split()), f"{cell!r} is broken at {width} columns"
