import pytest
import torch
from torch import nn

from bayespass import DiagonalGaussian, InvalidInput, MeanNetwork, MonteCarlo, PosteriorInfo, predict_dataset
from bayespass.predict.sampling import prediction_from_draws


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).eval()


def posterior_of(model, info=None):
    mean = {name: p.detach() for name, p in model.named_parameters()}
    return DiagonalGaussian(mean, {name: torch.full_like(p, 0.04) for name, p in mean.items()}, info)


def test_streaming_moments_equal_those_of_the_stacked_draws(model):
    predictor, x = MonteCarlo(model, posterior_of(model), 50), torch.randn(5, 3)
    prediction, draws = predictor(x), torch.stack(list(predictor.outputs(x)))
    torch.testing.assert_close(prediction.probs, draws.softmax(-1).mean(0))
    torch.testing.assert_close(prediction.logit_mean, draws.mean(0))
    torch.testing.assert_close(prediction.logit_variance, draws.var(0))
    stacked = prediction_from_draws(draws, posterior_of(model).info, 50)
    torch.testing.assert_close(stacked.probs, prediction.probs)


def test_every_batch_sees_the_same_draws(model):
    predictor, x = MonteCarlo(model, posterior_of(model), 8), torch.randn(6, 3)
    halves = [predictor(part).logit_mean for part in x.split(3)]
    torch.testing.assert_close(torch.cat(halves), predictor(x).logit_mean)
    other = MonteCarlo(model, posterior_of(model), 8, seed=1)
    assert not torch.allclose(other(x).logit_mean, predictor(x).logit_mean)


def test_a_linear_model_converges_to_its_exact_moments():
    model = nn.Linear(3, 2).eval()
    posterior, x = posterior_of(model, PosteriorInfo("regression", sigma_noise=0.5)), torch.randn(4, 3)
    prediction = MonteCarlo(model, posterior, 4000)(x)
    exact = 0.04 * (x.square().sum(-1, keepdim=True) + 1).expand(4, 2)
    torch.testing.assert_close(prediction.epistemic, exact, rtol=6 * (2 / 4000) ** 0.5, atol=0)
    torch.testing.assert_close(prediction.aleatoric, torch.full((4, 2), 0.25))


def test_the_mean_network_is_the_model_at_the_posterior_mean(model):
    posterior = posterior_of(model)
    shifted = DiagonalGaussian({n: m + 0.1 for n, m in posterior.mean.items()}, posterior.variance)
    x = torch.randn(5, 3)
    found = MeanNetwork(model, shifted)(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
        torch.testing.assert_close(found.logit_mean, model(x))
    assert float(found.logit_variance.abs().sum()) == 0
    assert found.method == "map"
    regression = MeanNetwork(model, posterior_of(model, PosteriorInfo("regression", sigma_noise=2.0)))(x)
    torch.testing.assert_close(regression.total, torch.full((5, 3), 4.0))


def test_mistakes(model):
    with pytest.raises(InvalidInput, match="at least 2"):
        MonteCarlo(model, posterior_of(model), 1)
    with pytest.raises(InvalidInput, match="training mode"):
        MonteCarlo(model.train(), posterior_of(model))


def test_half_precision_draws_are_averaged_in_single_precision():
    model = nn.Linear(3, 2).eval()
    posterior, x = posterior_of(model), torch.randn(4, 3)
    predictor = MonteCarlo(model.bfloat16(), posterior, 256)
    draws = torch.stack(list(predictor.outputs(x.bfloat16()))).float()
    torch.testing.assert_close(predictor(x.bfloat16()).logit_mean, draws.mean(0))
    torch.testing.assert_close(predictor(x.bfloat16()).logit_variance, draws.var(0))


def test_a_whole_loader_at_once(model):
    x = torch.randn(6, 3)
    predictor = MeanNetwork(model, posterior_of(model))
    found = predict_dataset(predictor, [(part, torch.zeros(len(part))) for part in x.split(4)])
    torch.testing.assert_close(found.probs, predictor(x).probs)
