"""Every figure against a hand-made example or an independent formula."""

import numpy as np
import pytest
import torch

from bayespass import (
    ClassificationPrediction,
    InvalidInput,
    RegressionPrediction,
    agreement,
    evaluate,
    reliability_curve,
    risk_coverage_curve,
)
from bayespass.evaluate.proper_scores import brier_scores, log_scores


def classified(probs, variance=None):
    probs = torch.as_tensor(probs)
    return ClassificationPrediction(probs, probs.log(), torch.ones_like(probs) if variance is None else variance)


def test_aurc_by_hand():
    curve = risk_coverage_curve(np.array([0.9, 0.8, 0.7, 0.6]), np.array([0, 1, 0, 1]))
    np.testing.assert_allclose(curve.risk, [0, 1 / 2, 1 / 3, 1 / 2])
    assert curve.aurc == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    best = (0 + 0 + 1 / 3 + 2 / 4) / 4
    assert curve.excess_aurc == pytest.approx(curve.aurc - best)


def test_a_perfect_ranking_has_no_excess():
    curve = risk_coverage_curve(np.linspace(1, 0, 100), np.r_[np.zeros(80), np.ones(20)])
    assert curve.excess_aurc == pytest.approx(0, abs=1e-12)
    error = 0.2
    assert curve.aurc == pytest.approx(error + (1 - error) * np.log(1 - error), abs=0.01)


def test_coverage_at_risk_is_the_last_crossing():
    losses = np.array([1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1])
    curve = risk_coverage_curve(np.linspace(1, 0, 11), losses)
    assert curve.coverage_at_risk(0.1) == pytest.approx(10 / 11)  # above 10 % at first, at 10 % after ten rows
    assert curve.coverage_at_risk(0.05) == 0.0
    assert curve.coverage_at_risk(1.0) == 1.0


def test_ties_are_answered_together():
    confidence, losses = np.array([0.9, 0.5, 0.5, 0.5]), np.array([0, 0, 1, 0])
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        curve = risk_coverage_curve(confidence[order], losses[order])
        assert curve.aurc == pytest.approx((0 + 1 / 6 + 2 / 9 + 1 / 4) / 4)
        assert curve.coverage_at_risk(0.2) == 0.25  # no threshold separates the three


def test_top_label_ece_by_hand():
    curve = reliability_curve(np.array([0.95, 0.95, 0.55, 0.55]), np.array([1, 1, 1, 0]), n_bins=10)
    assert curve.expected_calibration_error == pytest.approx((2 * 0.05 + 2 * 0.05) / 4)
    assert curve.count.sum() == 4
    with pytest.raises(InvalidInput, match="vectors of rows"):
        reliability_curve(np.ones((3, 5)), np.ones((3, 5)))
    assert reliability_curve(np.array([0.0, 1.0]), np.array([0, 1])).expected_calibration_error == 0


def test_scores_by_hand():
    prediction = classified([[0.8, 0.2], [0.4, 0.6]])
    labels = torch.tensor([0, 0])
    torch.testing.assert_close(
        log_scores(prediction, labels), -torch.tensor([0.8, 0.4]).double().log(), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(brier_scores(prediction, labels), torch.tensor([0.08, 0.72]).double(), rtol=1e-6, atol=0)


def test_evaluate_agrees_with_its_parts_and_has_standard_errors():
    torch.manual_seed(0)
    prediction, labels = classified(torch.randn(500, 4).softmax(-1)), torch.randint(4, (500,))
    scores = evaluate(prediction, labels)
    assert scores["nll"].value == pytest.approx(log_scores(prediction, labels).mean().item(), rel=1e-6)
    assert scores["brier"].value == pytest.approx(brier_scores(prediction, labels).mean().item(), rel=1e-6)
    accuracy = (prediction.labels == labels).double().mean().item()
    assert scores["accuracy"].value == pytest.approx(accuracy)
    assert scores["accuracy"].standard_error == pytest.approx((accuracy * (1 - accuracy) / 500) ** 0.5, rel=0.01)
    assert set(scores) == {
        "accuracy",
        "nll",
        "brier",
        "ece",
        "aurc",
        "e_aurc",
        "coverage_at_0.5",
        "coverage_at_1",
        "coverage_at_5",
    }
    assert all(estimate.standard_error >= 0 for estimate in scores.values())
    assert scores["aurc"].standard_error > 0
    assert "±" in str(scores["aurc"])


def test_the_bootstrap_error_matches_repeated_data():
    rng = np.random.default_rng(0)

    def data(n):
        confidence = rng.uniform(size=n)
        return confidence, rng.uniform(size=n) < confidence

    aurcs = [risk_coverage_curve(c, ~r).aurc for c, r in (data(300) for _ in range(300))]
    confidence, right = data(300)
    probs = torch.tensor(np.stack([0.5 + confidence / 2, 0.5 - confidence / 2], 1))
    scores = evaluate(classified(probs), torch.tensor(np.where(right, 0, 1)), n_bootstrap=300)
    assert scores["aurc"].standard_error == pytest.approx(np.std(aurcs), rel=0.35)


def test_regression_figures():
    torch.manual_seed(0)
    mean = torch.zeros(20_000)
    prediction = RegressionPrediction(mean, torch.full_like(mean, 0.36), torch.full_like(mean, 0.64))
    scores = evaluate(prediction, torch.randn(20_000))
    assert scores["rmse"].value == pytest.approx(1, abs=0.02)
    assert scores["coverage_95"].value == pytest.approx(0.95, abs=0.01)
    assert scores["interval_width_95"].value == pytest.approx(2 * 1.96, rel=1e-3)
    assert scores["nll"].value == pytest.approx(0.5 * np.log(2 * np.pi) + 0.5, abs=0.03)


def test_agreement_with_itself_and_with_a_known_distance():
    torch.manual_seed(0)
    mean, variance = torch.randn(200, 3), torch.rand(200, 3) + 0.1
    reference = ClassificationPrediction(mean.softmax(-1), mean, variance)
    same = agreement(reference, reference)
    assert (same.kl, same.mean_error) == (pytest.approx(0, abs=1e-9), 0)
    assert same.variance_ratio == pytest.approx(1)
    assert same.spearman == pytest.approx(1)
    shifted = ClassificationPrediction(mean.softmax(-1), mean + variance.sqrt(), 4 * variance)
    other = agreement(shifted, reference)
    assert other.mean_error == pytest.approx(1, rel=1e-5)
    assert other.variance_ratio == pytest.approx(4, rel=1e-5)
    flat = ClassificationPrediction(mean.softmax(-1), mean, torch.zeros_like(variance))
    assert np.isnan(agreement(flat, reference).spearman)
    gaussian = RegressionPrediction(mean, variance, variance)
    wide = RegressionPrediction(mean, 2 * variance, 2 * variance)
    expected = 3 * 0.5 * (0.5 - 1 + np.log(2))
    assert agreement(wide, gaussian).kl == pytest.approx(expected, rel=1e-5)
    with pytest.raises(InvalidInput, match="same kind and shape"):
        agreement(gaussian, reference)


def test_mistakes_in_labels_are_named():
    prediction = classified([[0.8, 0.2], [0.4, 0.6]])
    with pytest.raises(InvalidInput, match=r"\[0, 2\).*\[0, 2\]"):
        evaluate(prediction, torch.tensor([0, 2]))
    with pytest.raises(InvalidInput, match="integers"):
        evaluate(prediction, torch.tensor([0.0, 1.0]))
    with pytest.raises(InvalidInput, match=r"shape \(2,\)"):
        evaluate(prediction, torch.tensor([0]))
    with pytest.raises(InvalidInput, match="at least one row"):
        evaluate(classified(torch.empty(0, 2)), torch.empty(0, dtype=torch.long))
    with pytest.raises(InvalidInput, match="NaN"):
        risk_coverage_curve(np.array([np.nan]), np.array([1]))


def test_being_certain_and_wrong_is_not_clipped_away():
    prediction, labels = classified(torch.tensor([[1.0, 1e-30], [0.5, 0.5]])), torch.tensor([1, 0])
    assert evaluate(prediction, labels)["nll"].value == pytest.approx((30 * np.log(10) + np.log(2)) / 2, rel=1e-4)


def test_outputs_of_one_row_are_no_independent_evidence():
    torch.manual_seed(0)
    noise = torch.randn(400, 1).expand(400, 50)
    prediction = RegressionPrediction(torch.zeros(400, 50), torch.ones(400, 50), torch.zeros(400, 50))
    one = RegressionPrediction(torch.zeros(400, 1), torch.ones(400, 1), torch.zeros(400, 1))
    wide, narrow = evaluate(prediction, noise)["nll"], evaluate(one, noise[:, :1])["nll"]
    assert wide.standard_error == pytest.approx(narrow.standard_error, rel=1e-5)


def test_labels_of_any_integer_type():
    prediction = classified([[0.8, 0.2], [0.4, 0.6]])
    for dtype in (torch.uint8, torch.int32, torch.int64):
        assert evaluate(prediction, torch.tensor([0, 1], dtype=dtype))["accuracy"].value == 1
