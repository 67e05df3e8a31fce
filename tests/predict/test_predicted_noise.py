"""A network that predicts its own observation noise, under every predictor and what follows it."""

import pytest
import torch
from torch import nn

from bayespass import (
    DiagonalGaussian,
    InvalidInput,
    MeanNetwork,
    MonteCarlo,
    Posterior,
    PosteriorInfo,
    SinglePass,
    agreement,
    compare,
    evaluate,
    fit_scales,
    predict_dataset,
)
from bayespass.predict.sampling import prediction_from_draws

PREDICTED = PosteriorInfo("regression", n_data=50, sigma_noise="predicted")


def posterior_of(model, sd, info=PREDICTED):
    mean = {name: p.detach() for name, p in model.named_parameters()}
    return DiagonalGaussian(mean, {name: torch.full_like(p, sd**2) for name, p in mean.items()}, info)


@pytest.fixture
def network():
    return nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 2)).eval()


@pytest.mark.parametrize("approximation", ["cvp", "shared", "streamlined"])
def test_a_linear_model_has_its_exact_split(approximation):
    """Both entries are Gaussian with Var = v (|x|^2 + 1): exact for the single pass, 20,000 draws for the rest."""
    model, x, v = nn.Linear(3, 2).double().eval(), torch.randn(4, 3, dtype=torch.float64), 0.04
    exact = v * (x.square().sum(-1) + 1)
    mean, log_noise = model(x).detach().unbind(-1)
    noise = (log_noise + exact / 2).exp()
    single = SinglePass(model, posterior_of(model, v**0.5), approximation)(x)
    torch.testing.assert_close(single.mean, mean)
    torch.testing.assert_close(single.epistemic, exact)
    torch.testing.assert_close(single.aleatoric, noise)
    drawn = MonteCarlo(model, posterior_of(model, v**0.5), 20_000)(x)
    torch.testing.assert_close(drawn.epistemic, exact, rtol=6 * (2 / 20_000) ** 0.5, atol=0)
    relative = (exact.exp() - 1).sqrt() / 20_000**0.5  # standard error of a log-normal's mean
    assert bool(((drawn.aleatoric / noise - 1).abs() < 6 * relative).all())


def test_streaming_equals_stacked_draws(network):
    predictor, x = MonteCarlo(network, posterior_of(network, 0.2), 30), torch.randn(5, 3)
    draws = torch.stack(list(predictor.outputs(x)))
    found, stacked = predictor(x), prediction_from_draws(draws, PREDICTED, 30)
    for prediction in (found, stacked):
        torch.testing.assert_close(prediction.mean, draws[..., 0].mean(0))
        torch.testing.assert_close(prediction.epistemic, draws[..., 0].var(0))
        torch.testing.assert_close(prediction.aleatoric, draws[..., 1].exp().mean(0))


def test_the_mean_network_exponentiates_its_own_output(network):
    x = torch.randn(5, 3)
    found = MeanNetwork(network, posterior_of(network, 0.2))(x)
    torch.testing.assert_close(found.mean, network(x)[:, 0].detach())
    torch.testing.assert_close(found.aleatoric, network(x)[:, 1].exp().detach())
    assert float(found.epistemic.abs().max()) == 0.0


def test_single_pass_without_variance_is_the_mean_network(network):
    x, posterior = torch.randn(5, 3), posterior_of(network, 0.0)
    single, plain = SinglePass(network, posterior)(x), MeanNetwork(network, posterior)(x)
    torch.testing.assert_close(single.mean, plain.mean)
    torch.testing.assert_close(single.aleatoric, plain.aleatoric)
    assert float(single.epistemic.max()) == 0.0


@pytest.mark.parametrize("predictor", [SinglePass, MonteCarlo, MeanNetwork])
def test_a_network_of_another_shape_is_refused(predictor):
    model = nn.Linear(3, 1).eval()
    with pytest.raises(InvalidInput, match=r"axis of size 2, \(mean, log variance\); got shape \(5, 1\)"):
        predictor(model, posterior_of(model, 0.1))(torch.randn(5, 3))


def test_saved_and_loaded(network, tmp_path):
    posterior = posterior_of(network, 0.1)
    posterior.save(tmp_path / "posterior.safetensors", network)
    loaded = Posterior.load(tmp_path / "posterior.safetensors", network)
    assert loaded.info == PREDICTED
    x = torch.randn(4, 3)
    torch.testing.assert_close(SinglePass(network, loaded)(x).total, SinglePass(network, posterior)(x).total)


def test_scales_scores_and_comparisons_take_it(network):
    """Figures are those of the (N,) means; calibrated variance is closer to Monte Carlo than a wrong one."""
    x = torch.randn(120, 3)
    posterior = posterior_of(network, 0.15)
    targets = network(x).detach()[:, 0] + torch.randn(120) * (network(x).detach()[:, 1] / 2).exp()
    loader = list(zip(x.split(50), targets.split(50), strict=True))
    scales = fit_scales(network, posterior, x, n_samples=100)
    reference = MonteCarlo(network, posterior, 400)(x)
    calibrated = predict_dataset(SinglePass(network, posterior, scales=scales), loader)
    faithful = agreement(calibrated, reference)
    wrong = agreement(SinglePass(network, posterior, scales={"": 3.0})(x), reference)
    assert abs(faithful.variance_ratio - 1) < 0.15 < abs(wrong.variance_ratio - 1)
    assert faithful.kl < wrong.kl
    scores = evaluate(calibrated, targets)
    density = torch.distributions.Normal(calibrated.mean, calibrated.total.sqrt())
    assert scores["nll"].value == pytest.approx(-density.log_prob(targets).mean().item(), rel=1e-5)
    rows = compare(network, posterior, loader, ("map", "mc4", "cvp"), n_reference=20, n_bootstrap=5)
    assert rows.gap_metric == "nll"
    assert rows.row("cvp").prediction.mean.shape == (120,)


def test_compile_and_export_give_the_eager_result(network):
    predictor, x = SinglePass(network, posterior_of(network, 0.1)), torch.randn(4, 3)
    with torch.no_grad():
        expected = predictor(x)
        compiled = torch.compile(predictor, backend="eager", fullgraph=True)(x)
        exported = torch.export.export(predictor, (x,)).module()(x)
    for found in (compiled, exported):
        torch.testing.assert_close(found.total, expected.total)
        torch.testing.assert_close(found.mean, expected.mean)
