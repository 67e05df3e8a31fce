import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bayespass import DiagonalGaussian, MonteCarlo, PosteriorInfo
from bayespass.calibrate.teacher import (
    LATENT,
    Taught,
    Teacher,
    answers,
    distance,
    groups_of,
    split_rows,
    total_variance,
)
from bayespass.posterior.empirical import Empirical


def isotropic(model, sd, info=None):
    mean = {name: p.detach() for name, p in model.named_parameters()}
    return DiagonalGaussian(mean, {name: torch.full_like(p, sd**2) for name, p in mean.items()}, info)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).eval()


def test_mirrored_draws_are_exact_in_the_mean_of_a_linear_network():
    model, inputs = nn.Linear(6, 3).eval(), torch.randn(40, 6)
    taught = Teacher(model, isotropic(model, 0.5), 200).taught(inputs, seed=3)
    torch.testing.assert_close(taught.mean, model(inputs).detach())
    exact = (0.25 * (inputs.square().sum(1, keepdim=True) + 1)).expand(-1, 3)
    assert float((taught.variance / exact).mean()) == pytest.approx(1, abs=0.15)


def test_its_moments_are_those_of_monte_carlo(network):
    posterior, inputs = isotropic(network, 0.3), torch.randn(10, 5)
    with torch.inference_mode():
        truth = MonteCarlo(network, posterior, 2000, seed=1)(inputs)
    teacher = Teacher(network, posterior, 20)
    found = [teacher.taught(inputs, seed) for seed in range(100)]
    sd = truth.logit_variance.sqrt()
    assert float(((torch.stack([t.mean for t in found]).mean(0) - truth.logit_mean) / sd).abs().max()) < 0.1
    variance = torch.stack([t.variance for t in found]).mean(0)
    assert float((variance / truth.logit_variance).mean()) == pytest.approx(1, abs=0.05)
    probs = torch.stack([t.probs for t in found if t.probs is not None]).mean(0)
    torch.testing.assert_close(probs, truth.probs, atol=0.02, rtol=0)


def test_mirror_images_make_the_mean_more_accurate(network):
    posterior, inputs = isotropic(network, 0.1), torch.randn(10, 5)
    mirrored, plain = (Teacher(network, posterior, 20) for _ in range(2))
    plain.mirrored, plain.n_draws = False, 20
    errors = []
    for teacher in (mirrored, plain):
        means = torch.stack([teacher.taught(inputs, seed).mean for seed in range(20)])
        errors.append(float(means.var(0).mean().sqrt()))
    assert errors[0] < 0.5 * errors[1]


def test_members_have_no_mirror_image(network):
    members = [{n: p.detach() + 0.1 * k for n, p in network.named_parameters()} for k in range(4)]
    assert not Teacher(network, Empirical(members), 20).mirrored


def test_a_predicted_noise_is_averaged_over_draws():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)).eval()
    posterior = isotropic(model, 0.3, PosteriorInfo("regression", sigma_noise="predicted"))
    inputs = torch.randn(10, 5)
    with torch.inference_mode():
        truth = MonteCarlo(model, posterior, 4000, seed=1)(inputs)
    found = Teacher(model, posterior, 4000).taught(inputs, seed=2)
    assert found.total is not None
    assert found.total.shape == (10, 1)
    torch.testing.assert_close(found.total[:, 0], truth.total, rtol=0.1, atol=0)


@pytest.mark.parametrize("sigma", [0.5, "predicted"])
def test_the_distance_of_regressions_is_that_of_observations(sigma):
    """Where noise hides the posterior's part, an error of it hardly counts; a true answer has none."""
    info = PosteriorInfo("regression", sigma_noise=sigma)
    mean, variance = torch.zeros(7, 2), torch.full((7, 2), 1e-4)
    truth = Taught(None, mean, variance, None, total_variance(mean, variance, info))
    answer = answers(info)
    torch.testing.assert_close(distance(answer(mean, variance), truth), torch.zeros(7))
    shifted = mean.clone()
    shifted[:, 0] = 0.3
    sigma2 = 0.25 if sigma == 0.5 else 1.0
    observed = 0.3**2 / (2 * sigma2) / (2 if sigma == 0.5 else 1)  # mean over outputs; a predicted noise has one
    latent = 0.5 * 0.3**2 / 1e-4 / 2
    found = distance(answer(shifted, variance), truth)
    torch.testing.assert_close(found, torch.full((7,), LATENT * latent + observed), rtol=1e-2, atol=0)


def test_regression_has_no_probabilities(network):
    posterior = isotropic(network, 0.1, PosteriorInfo(likelihood="regression", sigma_noise=0.1))
    assert Teacher(network, posterior, 10).taught(torch.randn(4, 5), 0).probs is None


@given(st.lists(st.integers(1, 9), min_size=3, max_size=8), st.floats(0.1, 0.5), st.integers(0, 99))
def test_every_row_is_kept_or_set_apart_once(sizes, share, seed):
    rows = torch.arange(sum(sizes))
    batches = [{"x": part, "y": part.unsqueeze(1)} for part in rows.split(sizes)]
    kept, apart = split_rows(batches, share, torch.Generator().manual_seed(seed))
    found = torch.cat([batch["x"] for batch in kept + apart])
    assert torch.equal(found.sort().values, rows)
    assert sum(len(batch["x"]) for batch in apart) == max(2, round(share * len(rows)))
    assert all(torch.equal(batch["x"], batch["y"][:, 0]) for batch in kept + apart)


def test_groups_are_parts_in_order():
    parts = groups_of([torch.arange(5), torch.arange(2)], 2)
    assert [part.tolist() for part in parts] == [[0, 1], [2, 3], [4], [0, 1]]
