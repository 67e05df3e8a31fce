import dataclasses

import pytest
import torch
from torch.utils import _pytree as pytree

from bayespass import ClassificationPrediction, InvalidInput, RegressionPrediction
from bayespass.prediction import concatenate, regression_prediction


@pytest.fixture
def classified():
    probs = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    return ClassificationPrediction(probs, probs.clone(), torch.ones(2, 2), "mc4", ("4 draws",))


def test_entropy_and_confidence(classified):
    torch.testing.assert_close(classified.entropy, torch.tensor([torch.log(torch.tensor(2.0)), 0.0]))
    assert classified.confidence.tolist() == [0.5, 1.0]
    assert classified.labels.tolist()[1] == 0


def test_intervals_cover_what_they_say():
    torch.manual_seed(0)
    prediction = RegressionPrediction(torch.zeros(100_000), torch.full((100_000,), 0.5), torch.full((100_000,), 1.5))
    y = torch.randn(100_000) * 2**0.5
    for level in (0.5, 0.95):
        low, high = prediction.interval(level)
        assert ((y > low) & (y < high)).double().mean().item() == pytest.approx(level, abs=0.01)
    assert prediction.interval(0.95)[1][0].item() == pytest.approx(1.959964 * 2**0.5, rel=1e-5)
    with pytest.raises(InvalidInput, match="level"):
        prediction.interval(1.0)


def test_it_is_a_pytree_of_its_tensors(classified):
    halved = pytree.tree_map(lambda t: t / 2, classified)
    torch.testing.assert_close(halved.logit_variance, torch.full((2, 2), 0.5))
    assert (halved.method, halved.notes) == ("mc4", ("4 draws",))
    assert len(pytree.tree_leaves(classified)) == 3


def test_it_is_frozen(classified):
    with pytest.raises(dataclasses.FrozenInstanceError):
        classified.probs = torch.zeros(1)


def test_batches_join(classified):
    joined = concatenate([classified, classified])
    assert joined.probs.shape == (4, 2)
    assert joined.method == "mc4"
    with pytest.raises(InvalidInput, match="no prediction"):
        concatenate([])


def test_predicted_noise_is_the_mean_of_a_log_normal():
    mean, variance = torch.tensor([[1.0, -0.5]], dtype=torch.float64), torch.tensor([[0.2, 0.7]], dtype=torch.float64)
    found = regression_prediction(mean, variance, "predicted", "cvp")
    draws = -0.5 + 0.7**0.5 * torch.randn(1_000_000, dtype=torch.float64)
    noise = draws.exp()
    assert (found.mean.item(), found.epistemic.item(), found.method) == (1.0, 0.2, "cvp")
    assert found.aleatoric.item() == pytest.approx(noise.mean().item(), abs=5 * noise.std().item() / 1e3)
    assert found.aleatoric.item() == pytest.approx(2.718281828459045 ** (-0.5 + 0.35), rel=1e-12)
    assert found.total.item() == pytest.approx(0.2 + found.aleatoric.item())


def test_known_and_averaged_noise_are_taken_as_given():
    known = regression_prediction(torch.zeros(3, 2), torch.ones(3, 2), 0.5)
    torch.testing.assert_close(known.aleatoric, torch.full((3, 2), 0.25))
    averaged = regression_prediction(torch.zeros(3, 2), torch.ones(3, 2), "predicted", noise=torch.full((3,), 9.0))
    assert averaged.mean.shape == averaged.epistemic.shape == (3,)
    assert averaged.aleatoric.tolist() == [9.0] * 3
    with pytest.raises(InvalidInput, match="axis of size 2"):
        regression_prediction(torch.zeros(3, 1), torch.ones(3, 1), "predicted")
