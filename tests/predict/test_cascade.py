"""The cascade against its two predictors, row by row."""

import math

import pytest
import torch
from torch import nn

from bayespass import DiagonalGaussian, InvalidInput, MeanNetwork, MonteCarlo, NotFitted, PosteriorInfo, SinglePass
from bayespass.predict.cascade import Cascade
from bayespass.predict.dataset import predict_dataset

SCORES = ["epistemic", "entropy", "confidence", "margin"]


class Pair(nn.Module):
    """Two inputs of one model, by position or by name."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, left, right):
        return {"logits": torch.tanh(self.first(left)) + self.second(right)}


def posterior_of(model, info=None):
    mean = {name: p.detach() for name, p in model.named_parameters()}
    return DiagonalGaussian(mean, {name: torch.full_like(p, 0.05) for name, p in mean.items()}, info)


def predictors(outputs=3, info=None):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs)).eval()
    q = posterior_of(model, info)
    return SinglePass(model, q), MonteCarlo(model, q, 8)


REGRESSION = PosteriorInfo("regression", sigma_noise=0.5)


def tensors(prediction):
    names = ("probs", "logit_mean", "logit_variance") if hasattr(prediction, "probs") else ("mean", "epistemic")
    return [getattr(prediction, name) for name in names]


@pytest.mark.parametrize("info", [None, REGRESSION])
def test_no_budget_is_the_cheap_one_and_all_of_it_the_expensive_one(info):
    cheap, expensive = predictors(info=info)
    x = torch.randn(7, 4)
    for budget, alone in ((0, cheap), (1, expensive)):
        cascade = Cascade(cheap, expensive, budget)
        assert cascade.fit(x) is cascade
        found = cascade(x)
        for got, expected in zip(tensors(found), tensors(alone(x)), strict=True):
            torch.testing.assert_close(got, expected)
        assert found.method == "cascade"
        assert found.notes[-1].startswith(f"{7 * budget} of 7 rows")


@pytest.mark.parametrize("score", SCORES)
def test_rows_of_a_high_score_are_the_expensive_ones_and_no_others(score):
    cheap, expensive = predictors()
    x = torch.randn(50, 4)
    cascade = Cascade(cheap, expensive, 0.3, score).fit(torch.randn(200, 4))
    found, first, second = cascade(x), cheap(x), expensive(x)
    sent = cascade.scores(first) > cascade.threshold
    assert 0 < int(sent.sum()) < 50
    for got, low, high in zip(tensors(found), tensors(first), tensors(second), strict=True):
        torch.testing.assert_close(got[sent], high[sent])
        torch.testing.assert_close(got[~sent], low[~sent], rtol=0, atol=0)
    assert f"{int(sent.sum())} of 50 rows by the expensive predictor (mc8)" in found.notes


def test_what_the_scores_are():
    cheap, expensive = predictors()
    prediction = cheap(torch.randn(9, 4))
    top = prediction.probs.sort(-1, descending=True).values
    expected = {
        "epistemic": prediction.logit_variance.sum(-1),
        "entropy": prediction.entropy,
        "confidence": 1 - top[:, 0],
        "margin": 1 - top[:, 0] + top[:, 1],
    }
    for score, values in expected.items():
        torch.testing.assert_close(Cascade(cheap, expensive, score=score).scores(prediction), values)


@pytest.mark.parametrize("budget", [0.1, 0.5])
@pytest.mark.parametrize("info", [None, REGRESSION])
def test_the_share_is_met_on_the_rows_of_the_fit_and_nearly_on_others(budget, info):
    cheap, expensive = predictors(info=info)
    held_out, new = torch.randn(1000, 4), torch.randn(1000, 4)
    cascade = Cascade(cheap, expensive, budget).fit(list(held_out.split(300)))

    def share(x):
        return float((cascade.scores(cheap(x)) > cascade.threshold).float().mean())

    assert share(held_out) == pytest.approx(budget, abs=1e-6)
    assert share(new) == pytest.approx(budget, abs=5 * math.sqrt(2 * budget * (1 - budget) / 1000))
    sent = torch.cat([cascade(part).probs if info is None else cascade(part).mean for part in new.split(64)])
    assert share(new) == pytest.approx(float((sent != tensors(cheap(new))[0]).any(-1).float().mean()), abs=0.005)


def test_a_row_does_not_depend_on_its_batch():
    cheap, expensive = predictors()
    cascade = Cascade(cheap, expensive, 0.4).fit(torch.randn(100, 4))
    x = torch.randn(20, 4)
    whole = cascade(x)
    alone = predict_dataset(cascade, list(x.split(1)))
    order = torch.randperm(20)
    for got, single, mixed in zip(tensors(whole), tensors(alone), tensors(cascade(x[order])), strict=True):
        torch.testing.assert_close(single, got)
        torch.testing.assert_close(mixed, got[order])


def test_several_inputs_by_position_and_by_name():
    model = Pair().eval()
    q = posterior_of(model)
    cheap, expensive = SinglePass(model, q), MonteCarlo(model, q, 8)
    left, right = torch.randn(30, 4), torch.randn(30, 2)
    named = {"left": left, "right": right}
    by_name = Cascade(cheap, expensive, 0.5).fit([named, named])
    by_place = Cascade(cheap, expensive, 0.5).fit([((left, right), None)])
    assert by_name.threshold == by_place.threshold
    torch.testing.assert_close(by_name(**named).probs, by_place(left, right).probs)
    torch.testing.assert_close(
        by_name(left, right=right).probs[by_name.scores(cheap(left, right)) > by_name.threshold],
        expensive(left, right).probs[by_name.scores(cheap(left, right)) > by_name.threshold],
    )


def test_positions_share_the_fate_of_their_row():
    cheap, expensive = predictors()
    x = torch.randn(40, 5, 4)
    cascade = Cascade(cheap, expensive, 0.25, "entropy").fit(x)
    found, first, second = cascade(x), cheap(x), expensive(x)
    sent = first.entropy.mean(-1) > cascade.threshold
    assert int(sent.sum()) == 10
    torch.testing.assert_close(found.probs, torch.where(sent[:, None, None], second.probs, first.probs))


def test_a_threshold_kept_from_before_and_a_score_of_ones_own():
    cheap, expensive = predictors()
    x = torch.randn(60, 4)

    def third_class(prediction):
        return prediction.probs[:, 2]

    fitted = Cascade(cheap, expensive, 0.2, third_class).fit(x)
    again = Cascade(cheap, expensive, 0.2, third_class, threshold=fitted.threshold)
    loaded = Cascade(cheap, expensive, 0.2, third_class)
    assert loaded.threshold is None
    loaded.load_state_dict(fitted.state_dict())
    assert loaded.threshold == fitted.threshold
    torch.testing.assert_close(again(x).probs, fitted(x).probs)
    assert int((third_class(cheap(x)) > again.threshold).sum()) == 12


def test_ties_stay_together_at_the_nearest_share():
    cheap, expensive = predictors()
    values = torch.tensor([3.0] * 4 + [2.0] * 10 + [1.0] * 6)

    def fitted(budget):
        return Cascade(cheap, expensive, budget, lambda _: values).fit(torch.randn(20, 4)).threshold

    assert fitted(0.1) == 2.0  # 4 of 20 are sent rather than none
    assert fitted(0.4) == 2.0  # 4 are nearer to 8 than 14
    assert fitted(0.6) == 1.0  # 14 are nearer to 12 than 4


def test_cost_gradients_and_inference_mode():
    cheap, expensive = predictors()
    cascade = Cascade(cheap, expensive, 0.25).fit(torch.randn(40, 4))
    assert cascade.expected_cost(5, 64) == 21
    x = torch.randn(8, 4, requires_grad=True)
    cascade(x).logit_mean.sum().backward()
    assert float(x.grad.abs().sum()) > 0
    with torch.inference_mode():
        torch.testing.assert_close(cascade(x.detach()).probs, cascade(x).probs)
    with pytest.raises(InvalidInput, match="expensive must be a positive"):
        cascade.expected_cost(1, 0)


def test_mistakes():
    cheap, expensive = predictors()
    x = torch.randn(20, 4)
    with pytest.raises(NotFitted, match="call fit"):
        Cascade(cheap, expensive)(x)
    for budget in (-0.1, 1.1, float("nan"), "some", True):
        with pytest.raises(InvalidInput, match="budget is a share"):
            Cascade(cheap, expensive, budget)
    with pytest.raises(InvalidInput, match="score must be one of"):
        Cascade(cheap, expensive, score="energy")
    with pytest.raises(InvalidInput, match="threshold is NaN"):
        Cascade(cheap, expensive, threshold=float("nan"))
    with pytest.raises(InvalidInput, match="needs more inputs than 4"):
        Cascade(cheap, expensive, 0.1).fit(x[:4])
    with pytest.raises(InvalidInput, match="the loader yields no batch"):
        Cascade(cheap, expensive).fit([])
    mean = MeanNetwork(cheap.model, posterior_of(cheap.model))
    with pytest.raises(InvalidInput, match="the score is 0 for every input"):
        Cascade(mean, expensive).fit(x)
    with pytest.raises(InvalidInput, match="one number per row"):
        Cascade(cheap, expensive, score=lambda p: p.probs).fit(x)
    with pytest.raises(InvalidInput, match="one number per row"):
        Cascade(cheap, expensive, score=lambda _: 1.0, threshold=0.0)(x)
    with pytest.raises(InvalidInput, match="score is NaN"):
        Cascade(cheap, expensive, threshold=0.0)(x * float("nan"))


def test_two_predictors_that_do_not_fit_together():
    cheap, _ = predictors()
    regression = predictors(info=REGRESSION)[1]
    with pytest.raises(InvalidInput, match="one likelihood"):
        Cascade(cheap, regression)
    for other in (predictors(outputs=5)[1], nn.Sequential(regression)):
        with pytest.raises(InvalidInput, match="one kind of prediction, the second of 20 rows"):
            Cascade(cheap, other, 1)(torch.randn(20, 4))
    single, sampled = predictors(info=REGRESSION)
    with pytest.raises(InvalidInput, match="use 'epistemic' for a regression"):
        Cascade(single, sampled, score="margin", threshold=0.5)(torch.randn(20, 4))
