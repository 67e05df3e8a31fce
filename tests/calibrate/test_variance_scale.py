import math

import pytest
import torch
from torch import nn

from bayespass import DiagonalGaussian, InvalidInput, MonteCarlo, SinglePass, VarianceScales, agreement, fit_scales
from bayespass.demo.models import SmallViT


def isotropic(model, sd):
    mean = {name: p.detach() for name, p in model.named_parameters()}
    return DiagonalGaussian(mean, {name: torch.full_like(p, sd**2) for name, p in mean.items()})


@pytest.fixture
def vit():
    torch.manual_seed(0)
    model = SmallViT(width=16, depth=1, heads=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    return model.eval()


def test_an_exact_network_needs_no_scales():
    """One linear layer is exact, so its factor is 1 within the noise of the Monte-Carlo variance."""
    model = nn.Sequential(nn.Linear(6, 20)).eval()
    scales = fit_scales(model, isotropic(model, 0.3), torch.randn(64, 6), n_samples=200)
    for factor in scales.values():
        assert factor == pytest.approx(1.0, abs=0.03)


def test_a_wrong_site_is_found_and_the_next_one_is_not_blamed():
    """Features that are all the same draw: the first site is right, the mean over them is 8 times too narrow."""

    class Copies(nn.Module):
        def __init__(self):
            super().__init__()
            self.source, self.head = nn.Linear(4, 1), nn.Linear(1, 3)

        def forward(self, x):
            return self.head(self.source(x).expand(-1, 8).mean(1, keepdim=True))

    model = Copies().eval()
    posterior = isotropic(model, 0.3)
    scales = fit_scales(
        model, posterior.subset(lambda name: name.startswith("source")), torch.randn(256, 4), "cvp", n_samples=400
    )
    assert scales["source"] == pytest.approx(1.0, rel=0.05)
    assert scales[""] == pytest.approx(8.0, rel=0.05)


def test_scales_bring_the_prediction_closer_to_monte_carlo(vit):
    posterior, held_out, test = isotropic(vit, 0.05), torch.randn(96, 1, 8, 8), torch.randn(64, 1, 8, 8)
    scales = fit_scales(vit, posterior, [(part,) for part in held_out.split(48)], "cvp", n_samples=60)
    with torch.inference_mode():
        truth = MonteCarlo(vit, posterior, 200, seed=5)(test)
        before = agreement(SinglePass(vit, posterior, "cvp")(test), truth)
        after = agreement(SinglePass(vit, posterior, "cvp", scales)(test), truth)
    assert abs(math.log(after.variance_ratio)) < abs(math.log(before.variance_ratio))
    assert after.variance_ratio == pytest.approx(1.0, abs=0.2)
    assert after.kl < before.kl
    assert set(scales) == set(SinglePass(vit, posterior).sites)
    assert all(0 <= error < 0.2 for error in scales.standard_errors.values())


def test_labels_are_never_read(vit):
    posterior, inputs = isotropic(vit, 0.05), torch.randn(16, 1, 8, 8)
    plain = fit_scales(vit, posterior, inputs, n_samples=10)
    labelled = fit_scales(vit, posterior, [(inputs, torch.full((16,), -1))], n_samples=10)
    assert dict(plain) == dict(labelled)


def test_equal_seeds_give_equal_scales(vit):
    posterior, inputs = isotropic(vit, 0.05), torch.randn(8, 1, 8, 8)
    first, second = (fit_scales(vit, posterior, inputs, n_samples=10, seed=3) for _ in range(2))
    assert dict(first) == dict(second)
    assert dict(fit_scales(vit, posterior, inputs, n_samples=10, seed=4)) != dict(first)


def test_a_module_that_runs_twice_has_one_factor():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 5)

        def forward(self, x):
            return self.layer(torch.tanh(self.layer(x)))

    model = Twice().eval()
    assert set(fit_scales(model, isotropic(model, 0.2), torch.randn(32, 5), n_samples=50)) == {"layer", ""}


def test_in_place_activations_do_not_disturb_the_record():
    model = nn.Sequential(nn.Linear(5, 30), nn.ReLU(inplace=True), nn.Linear(30, 2)).eval()
    scales = fit_scales(model, isotropic(model, 0.2), torch.randn(64, 5), n_samples=200)
    assert scales["0"] == pytest.approx(1.0, abs=0.05)


def test_mistakes(vit):
    posterior = isotropic(vit, 0.05)
    with pytest.raises(InvalidInput, match="at least 10"):
        fit_scales(vit, posterior, torch.randn(2, 1, 8, 8), n_samples=5)
    with pytest.raises(InvalidInput, match="no batch"):
        fit_scales(vit, posterior, [])


def test_they_read_like_a_mapping():
    scales = VarianceScales({"a": 2.0, "": 0.5}, "cvp")
    assert dict(scales) == {"a": 2.0, "": 0.5}
    assert repr(scales) == "VarianceScales(cvp; a: 2, (output): 0.5)"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_posterior_and_model_may_differ_in_dtype(dtype):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).eval()
    posterior = isotropic(model, 0.3)
    scales = fit_scales(model.to(dtype), posterior, torch.randn(64, 4, dtype=dtype), n_samples=200)
    assert scales["0"] == pytest.approx(1.0, abs=0.1)


def test_a_pair_given_as_the_loader_is_one_batch():
    model = nn.Sequential(nn.Linear(4, 2)).eval()
    inputs = torch.randn(8, 4)
    pair = fit_scales(model, isotropic(model, 0.1), (inputs, torch.zeros(8)), n_samples=10)
    assert dict(pair) == dict(fit_scales(model, isotropic(model, 0.1), inputs, n_samples=10))
