import math
import sys

import pytest
import torch
from torch import nn

from bayespass import (
    DiagonalGaussian,
    InvalidInput,
    MeanNetwork,
    MissingExtra,
    MonteCarlo,
    PosteriorInfo,
    SinglePass,
    evaluate,
    fit_scales,
)
from bayespass.forecasting import GaussianHead, KoopmanForecaster, PatchForecaster, windows
from bayespass.likelihood import gaussian_nll
from bayespass.posterior.ivon import IVON

CONTEXT, HORIZON, CHANNELS = 48, 20, 3
PREDICTED = PosteriorInfo("regression", sigma_noise="predicted")


def patch(**settings):
    return PatchForecaster(
        CONTEXT, HORIZON, CHANNELS, **({"patch_length": 8, "patch_stride": 4, "d_model": 16} | settings)
    )


def koopman(**settings):
    return KoopmanForecaster(CONTEXT, HORIZON, **({"segment": 8, "embedding": 16, "hidden": 32} | settings))


def posterior_of(model, sd, info=PREDICTED):
    mean = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return DiagonalGaussian(mean, {name: torch.full_like(p, sd**2) for name, p in mean.items()}, info)


@pytest.fixture(params=[patch, koopman], ids=["patch", "koopman"])
def build(request):
    torch.manual_seed(0)
    return request.param


@pytest.fixture
def inputs():
    return torch.randn(4, CONTEXT, CHANNELS).cumsum(1)


def test_shapes(build, inputs):
    assert build().eval()(inputs).shape == (4, HORIZON, CHANNELS, 2)
    assert build(heteroscedastic=False).eval()(inputs).shape == (4, HORIZON, CHANNELS)


def test_heads_end_in_mean_and_log_variance():
    features = torch.randn(5, 7)
    assert GaussianHead(7, 4)(features).shape == (5, 4, 2)
    assert GaussianHead(7, 4, channels=3)(features).shape == (5, 4, 3, 2)
    assert GaussianHead(7, 4, heteroscedastic=False)(features).shape == (5, 4)
    head = GaussianHead(7, 4)
    torch.testing.assert_close(head(features).flatten(1), head.linear(features))


def test_the_scale_of_a_window_is_undone(build, inputs):
    """y -> 100 y + 7 moves the mean likewise and adds log 100^2 to the log variance."""
    model = build().eval()
    before, after = model(inputs).detach(), model(100 * inputs + 7).detach()
    # The variance is floored by adding 1e-5 to it, which a larger window notices less.
    torch.testing.assert_close(after[..., 0], 100 * before[..., 0] + 7, rtol=1e-3, atol=0.05)
    torch.testing.assert_close(after[..., 1], before[..., 1] + 2 * math.log(100), rtol=0, atol=1e-3)


def test_a_constant_window_is_forecast_by_its_constant(build):
    found = build().eval()(torch.full((2, CONTEXT, CHANNELS), 5.0)).detach()
    torch.testing.assert_close(found[..., 0], torch.full((2, HORIZON, CHANNELS), 5.0), rtol=0, atol=0.05)
    assert bool(found.isfinite().all())


def test_the_floor_bounds_the_scale_of_a_window_that_stands_still(build, inputs):
    """Both see the window (x - mean) / sqrt(var + floor): a flat one is scaled by sqrt(floor) alone."""
    flat = torch.full((1, CONTEXT, CHANNELS), 2.0)
    small, large = build().eval(), build(variance_floor=0.1).eval()
    large.load_state_dict(small.state_dict())
    gap = large(flat)[..., 1] - small(flat)[..., 1]
    torch.testing.assert_close(gap.detach(), torch.full_like(gap, math.log(0.1 / 1e-5)), rtol=0, atol=1e-3)


@pytest.mark.parametrize("approximation", ["cvp", "shared"])
def test_zero_variance_gives_the_plain_forward(build, inputs, approximation):
    model = build().eval()
    plain, found = model(inputs).detach(), SinglePass(model, posterior_of(model, 0.0), approximation)(inputs)
    torch.testing.assert_close(found.mean, plain[..., 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.aleatoric, plain[..., 1].exp(), rtol=1e-4, atol=1e-6)
    assert float(found.epistemic.abs().max()) == 0.0
    torch.testing.assert_close(MeanNetwork(model, posterior_of(model, 0.1))(inputs).mean, plain[..., 0])


@pytest.mark.parametrize("approximation", ["cvp", "shared"])
def test_against_monte_carlo(build, inputs, approximation):
    """Geometric mean of variance ratios within 15 % at a weight sd of 0.02, each forecast step within 30 %.

    The draws alone leave 2 % on the mean and about 4 % on a step (400 draws, 12 series). Noise
    variance within 2 %, means within 0.15 Monte-Carlo sd on average, of which draws make 0.04.
    """
    model = build().eval()
    posterior = posterior_of(model, 0.02)
    with torch.inference_mode():
        single = SinglePass(model, posterior, approximation)(inputs)
        drawn = MonteCarlo(model, posterior, 400)(inputs)
    log_ratio = (single.epistemic / drawn.epistemic).log()
    assert abs(float(log_ratio.mean())) < math.log(1.15)
    assert float(log_ratio.mean((0, 2)).abs().max()) < math.log(1.3)
    assert float((single.aleatoric / drawn.aleatoric).log().abs().max()) < 0.02
    assert float(((single.mean - drawn.mean) / drawn.epistemic.sqrt()).abs().mean()) < 0.15
    low, high = single.interval(0.9)
    torch.testing.assert_close((high - low) / 2, 1.6448536 * single.total.sqrt())


def test_scales_bring_the_output_variance_to_monte_carlo(build, inputs):
    model = build().eval()
    posterior = posterior_of(model, 0.05)
    scales = fit_scales(model, posterior, inputs, n_samples=100)
    with torch.inference_mode():
        single = SinglePass(model, posterior, scales=scales)(inputs)
        drawn = MonteCarlo(model, posterior, 400)(inputs)
    # One factor serves mean and log variance together, hence a bound on each and not an equality.
    assert abs(float((single.epistemic / drawn.epistemic).log().mean())) < 0.15


@pytest.mark.parametrize("make", [patch, koopman])
def test_training_finds_signal_and_noise(make):
    """A sine whose noise is five times larger in its second channel: IVON learns both from windows."""
    torch.manual_seed(0)
    time = torch.arange(600.0)
    noise = torch.tensor([0.1, 0.5])
    series = torch.sin(time * 2 * math.pi / 12).unsqueeze(1) + noise * torch.randn(600, 2)
    train, held_out = windows(series[:450], 24, 12), windows(series[450:], 24, 12)
    if make is patch:
        model = PatchForecaster(24, 12, 2, patch_length=8, patch_stride=4, d_model=16, num_hidden_layers=1)
    else:
        model = KoopmanForecaster(24, 12, segment=12, embedding=16, hidden=32)
    method = IVON(
        model.named_parameters(),
        lr=1.0,
        n_data=train[1].numel(),
        hess_init=0.1,
        betas=(0.9, 0.999),
        clip_radius=0.01,
        likelihood="regression",
        sigma_noise="predicted",
    )
    for _ in range(250):
        rows = torch.randint(len(train[0]), (32,))
        with method.sampled():
            gaussian_nll(model(train[0][rows]), train[1][rows]).backward()
        method.step()
    model.eval()
    with torch.inference_mode():
        found = SinglePass(model, method.posterior())(held_out[0])
    scores = evaluate(found, held_out[1])
    baseline = float(series.var().log() / 2 + 0.5 * math.log(2 * math.pi) + 0.5)  # one Gaussian for everything
    assert scores["nll"].value < baseline - 0.5
    assert 0.9 < scores["coverage_95"].value < 0.99
    sd = found.aleatoric.sqrt().mean((0, 1))
    assert float(sd[1]) > 1.2 * float(sd[0])


def test_the_operator_advances_segment_by_segment(inputs):
    """With K = 2 I and a linear decoder every segment is forecast from twice the state before it."""
    model = koopman(heteroscedastic=False).eval()
    head = nn.Linear(16, 8, bias=False)
    model.decoder = head
    with torch.no_grad():
        model.operator.weight.mul_(2)
    loc, scale = inputs.mean(1, keepdim=True), (inputs.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    segments = ((model(inputs) - loc) / scale).detach().transpose(1, 2)
    torch.testing.assert_close(segments[..., 8:16], 2 * segments[..., :8], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(segments[..., 16:20], 4 * segments[..., :4], rtol=1e-4, atol=1e-5)


def test_windows_hold_what_follows_them():
    series = torch.stack([torch.arange(10.0), -torch.arange(10.0)], 1)
    inputs, targets = windows(series, 4, 2, stride=3)
    assert inputs.shape == (2, 4, 2)
    assert targets.shape == (2, 2, 2)
    assert inputs[1, :, 0].tolist() == [3, 4, 5, 6]
    assert targets[1, :, 1].tolist() == [-7, -8]
    assert len(windows(series, 4, 2)[0]) == 5
    alone = windows(series[:, 0], 4, 2)
    torch.testing.assert_close(alone[1], windows(series, 4, 2)[1][..., 0])
    assert len(windows(series[:6], 4, 2)[0]) == 1


def test_mistakes(inputs):
    with pytest.raises(InvalidInput, match="context must be a multiple of segment"):
        KoopmanForecaster(50, 20, segment=8)
    with pytest.raises(InvalidInput, match="horizon must be a whole"):
        KoopmanForecaster(48, 0)
    with pytest.raises(InvalidInput, match="channels must be a whole"):
        GaussianHead(3, 4, channels=0)
    with pytest.raises(InvalidInput, match="variance_floor must be a positive"):
        koopman(variance_floor=0.0)
    with pytest.raises(InvalidInput, match="patch_length < context"):
        PatchForecaster(16, 4, 2)
    with pytest.raises(InvalidInput, match="no masking"):
        patch(do_mask_input=True)
    with pytest.raises(InvalidInput, match=r"\(B, 48, 3\).*got \(4, 48, 2\)"):
        patch()(inputs[..., :2])
    with pytest.raises(InvalidInput, match=r"\(B, 48, C\).*got \(4, 40, 3\)"):
        koopman()(inputs[:, :40])
    with pytest.raises(InvalidInput, match="context \\+ horizon = 11"):
        windows(torch.zeros(10, 2), 8, 3)
    with pytest.raises(InvalidInput, match="stride"):
        windows(torch.zeros(10, 2), 4, 3, stride=0)


def test_without_transformers_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"bayespass\[transformers\]"):
        patch()
    assert koopman().eval()(torch.randn(1, CONTEXT, 1)).shape == (1, HORIZON, 1, 2)
