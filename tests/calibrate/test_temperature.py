import pytest
import torch
from torch.nn import functional as F

from bayespass import ClassificationPrediction, InvalidInput, NotFitted, RegressionPrediction, TemperatureScaling
from bayespass.evaluate.proper_scores import log_scores


def overconfident(n=4000, factor=3.0):
    logits = torch.randn(n, 5) * 1.5
    labels = torch.distributions.Categorical(logits=logits).sample()
    sharp = factor * logits
    return ClassificationPrediction(sharp.softmax(-1), sharp, torch.ones(n, 5), "map"), labels


def test_recovers_the_temperature_that_made_the_labels():
    prediction, labels = overconfident()
    scaler = TemperatureScaling().fit(prediction, labels)
    assert scaler.temperature_ == pytest.approx(3.0, rel=0.1)
    calmed = scaler(prediction)
    assert float(log_scores(calmed, labels).mean()) < float(log_scores(prediction, labels).mean())
    torch.testing.assert_close(calmed.logit_mean, prediction.logit_mean / scaler.temperature_)
    torch.testing.assert_close(calmed.logit_variance, prediction.logit_variance / scaler.temperature_**2)
    assert "temperature" in calmed.notes[-1]


def test_on_a_map_network_it_divides_the_logits():
    prediction, labels = overconfident(200)
    scaler = TemperatureScaling().fit(prediction, labels)
    expected = (prediction.logit_mean / scaler.temperature_).softmax(-1)
    torch.testing.assert_close(scaler(prediction).probs, expected, rtol=1e-4, atol=1e-6)


def test_no_other_temperature_is_better():
    prediction, labels = overconfident(500)
    scaler = TemperatureScaling().fit(prediction, labels)
    best = F.cross_entropy(prediction.logit_mean / scaler.temperature_, labels)
    for t in (0.9, 1.1):
        assert best <= F.cross_entropy(prediction.logit_mean / (t * scaler.temperature_), labels)


def test_mistakes():
    prediction, labels = overconfident(10)
    with pytest.raises(NotFitted, match="fit"):
        TemperatureScaling()(prediction)
    with pytest.raises(InvalidInput, match=r"\[0, 5\)"):
        TemperatureScaling().fit(prediction, labels + 5)
    with pytest.raises(InvalidInput, match="classification"):
        TemperatureScaling().fit(RegressionPrediction(*torch.ones(3, 4)), torch.ones(4))
    empty = ClassificationPrediction(*torch.ones(3, 0, 5))
    with pytest.raises(InvalidInput, match="at least one"):
        TemperatureScaling().fit(empty, torch.empty(0, dtype=torch.long))
