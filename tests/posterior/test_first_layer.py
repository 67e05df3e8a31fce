"""STF-BNN phase 2: known posteriors of one layer, and nothing touched but that layer."""

from functools import partial

import pytest
import torch
from problems import linear_regression
from torch import nn

from bayespass import IVON, DiagonalGaussian, InvalidInput, MonteCarlo, PosteriorInfo, SinglePass
from bayespass.posterior.first_layer import fit_first_layer, kl_to_prior

PROBLEM = linear_regression()
# Antithetic pairs cancel the noise of the mean's gradient, sticking the landing most of the sd's.
EXACT = {"lr": 2e-2, "sd_lr": 1e-2, "n_samples": 4, "antithetic": True, "gradient": "stl"}
REGRESSION = {
    "likelihood": "regression",
    "sigma_noise": PROBLEM.sigma_noise,
    "prior_precision": PROBLEM.prior_precision,
}


def fit_linear(inputs, model=None, epochs=1200, **options):
    model = PROBLEM.model() if model is None else model
    settings = {**REGRESSION, **EXACT, "tolerance": None, **options}
    return fit_first_layer(model, [(inputs, PROBLEM.targets)], n_data=len(inputs), epochs=epochs, **settings)


def network():
    """Two convolutions with batch norm and dropout; registered last to first."""

    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 3)
            self.dropout = nn.Dropout(0.5)
            self.norm = nn.BatchNorm2d(8)
            self.body = nn.Conv2d(4, 8, 3)
            self.stem_norm = nn.BatchNorm2d(4)
            self.stem = nn.Conv2d(1, 4, 3)

        def forward(self, x):
            x = torch.relu(self.stem_norm(self.stem(x)))
            x = torch.relu(self.norm(self.body(x))).mean((2, 3))
            return self.head(self.dropout(x))

    torch.manual_seed(0)
    return Backwards()


def image_batches(n=64, size=16):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(n, 1, 8, 8, generator=generator)
    labels = (images.mean((1, 2, 3)) * 12).round().clamp(-1, 1).long() + 1
    return list(zip(images.split(size), labels.split(size), strict=True))


def fit_network(model, **options):
    return fit_first_layer(model, image_batches(), n_data=64, **({"epochs": 3} | options))


def test_one_linear_layer_recovers_the_conjugate_posterior():
    """The mean is exact and the variance is 1 over the diagonal of the precision, not of its inverse."""
    posterior = fit_linear(PROBLEM.inputs)
    precision = PROBLEM.precision.diagonal()
    mean, variance = posterior.mean["weight"][0], posterior.variance["weight"][0]
    assert float(((mean - PROBLEM.mean) * precision.sqrt()).abs().max()) < 0.1
    torch.testing.assert_close(variance * precision, torch.ones(5), rtol=0, atol=0.05)
    assert float((variance / torch.linalg.inv(PROBLEM.precision).diagonal()).min()) < 0.9


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_a_weight_on_a_dead_input_returns_to_the_prior(temperature):
    """No noise reaches it, so what is left is Adam's last step: below 1e-3 of the prior's sd."""
    inputs = PROBLEM.inputs.clone()
    inputs[:, 2] = 0
    model = PROBLEM.model()
    nn.init.constant_(model.weight, 0.3)
    posterior = fit_linear(inputs, model, n_samples=2, gradient="closed", temperature=temperature)
    sd = (temperature / PROBLEM.prior_precision) ** 0.5
    assert abs(float(posterior.mean["weight"][0, 2])) < 1e-3 * sd
    assert float(posterior.variance["weight"][0, 2].sqrt()) == pytest.approx(sd, rel=1e-3)
    assert float(posterior.variance["weight"][0, [0, 1, 3, 4]].sqrt().max()) < 0.1 * sd  # the others are not


@pytest.mark.parametrize("gradient", ["closed", "stl"])
@pytest.mark.parametrize("prior_mean", [None, "initial"])
def test_without_data_the_posterior_is_the_prior(prior_mean, gradient):
    model = PROBLEM.model()
    nn.init.constant_(model.weight, 0.3)
    posterior = fit_linear(
        PROBLEM.inputs, model, sigma_noise=1e5, n_samples=2, prior_mean=prior_mean, gradient=gradient
    )
    centre = 0.3 if prior_mean == "initial" else 0.0
    sd = PROBLEM.prior_precision**-0.5
    torch.testing.assert_close(posterior.mean["weight"], torch.full((1, 5), centre), rtol=0, atol=1e-3 * sd)
    torch.testing.assert_close(posterior.variance["weight"].sqrt(), torch.full((1, 5), sd), rtol=1e-3, atol=0)


def test_the_closed_kl_is_that_of_sampling():
    generator = torch.Generator().manual_seed(0)
    mean = {"a": torch.randn(3, 2, generator=generator), "b": torch.randn(4, generator=generator)}
    variance = {name: torch.rand(value.shape, generator=generator) + 0.1 for name, value in mean.items()}
    centre = {"a": torch.full((3, 2), 0.5)}
    posterior = DiagonalGaussian(mean, variance, PosteriorInfo(prior_precision=2.0, temperature=0.5))
    prior = DiagonalGaussian(
        centre | {"b": torch.zeros(4)}, {name: torch.full_like(value, 0.5 / 2.0) for name, value in mean.items()}
    )
    gaps = torch.stack([posterior.log_prob(draw) - prior.log_prob(draw) for draw in posterior.sample(5000, 0)])
    error = float(gaps.std()) / 5000**0.5
    assert float(kl_to_prior(posterior, centre)) == pytest.approx(float(gaps.mean()), abs=4 * error)
    assert float(kl_to_prior(posterior)) != pytest.approx(float(gaps.mean()), abs=4 * error)
    assert abs(float(kl_to_prior(DiagonalGaussian(prior.mean, prior.variance, posterior.info), prior.mean))) < 1e-6


def test_nothing_but_the_first_layer_moves():
    model = network().train()
    model.body.eval()
    model.head.bias.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    posterior = fit_network(model)
    after = model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"stem.weight", "stem.bias"}
    assert set(posterior.names) == {"stem.weight", "stem.bias"}
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert model.training
    assert model.dropout.training
    assert not model.body.training
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(after["stem.weight"], posterior.mean["stem.weight"], rtol=0, atol=0)


def test_without_spread_the_prediction_is_the_deterministic_one():
    model = network().eval()
    posterior = fit_network(model)
    images, _ = image_batches()[0]
    with torch.no_grad():
        logits = model(images)
        for scale, tolerance in ((0.0, 1e-6), (1e-10, 1e-4)):
            narrow = {name: scale * value for name, value in posterior.variance.items()}
            narrowed = DiagonalGaussian(posterior.mean, narrow, posterior.info)
            for output in MonteCarlo(model, narrowed, 3).outputs(images):
                torch.testing.assert_close(output, logits, rtol=0, atol=tolerance)
            torch.testing.assert_close(SinglePass(model, narrowed)(images).logit_mean, logits, rtol=0, atol=tolerance)
        assert float((next(MonteCarlo(model, posterior, 3).outputs(images)) - logits).abs().max()) > 1e-2


def test_it_stops_when_elbo_and_sd_have_come_to_rest():
    """400 epochs are allowed; what Adam's noise leaves at the default rates is 30 % of a variance."""
    batches = list(zip(PROBLEM.inputs.split(40), PROBLEM.targets.split(40), strict=True))
    model = PROBLEM.model()
    with torch.no_grad():
        model.weight.copy_(PROBLEM.mean)
    posterior = fit_first_layer(model, batches, n_data=400, epochs=400, **REGRESSION, n_samples=2, antithetic=True)
    assert 20 <= posterior.info.settings["epochs"] < 200
    ratio = posterior.variance["weight"][0] * PROBLEM.precision.diagonal()
    torch.testing.assert_close(ratio, torch.ones(5), rtol=0, atol=0.3)


def test_all_epochs_run_without_a_tolerance():
    seen = []

    class Counting(list):
        def __iter__(self):
            seen.append(1)
            return super().__iter__()

    batches = Counting(image_batches())
    posterior = fit_first_layer(network(), batches, n_data=64, epochs=8, tolerance=None)
    assert posterior.info.settings["epochs"] == 8
    assert len(seen) == 1 + 8  # one look at the first batch


def test_any_training_method_and_any_choice_of_names():
    model = network()
    posterior = fit_network(model, make_method=IVON, names="last", lr=0.1, hess_init=1.0)
    assert set(posterior.names) == {"head.weight", "head.bias"}
    assert (posterior.info.method, posterior.info.settings["vi_method"]) == ("first_layer", "ivon")
    own = fit_network(model, make_method=partial(IVON, lr=0.1), names=lambda name: name.startswith("body."))
    assert set(own.names) == {"body.weight", "body.bias"}


def test_equal_seeds_give_equal_posteriors():
    first, second, other = (fit_network(network(), seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(first.variance[name], second.variance[name]) for name in first.names)
    assert not torch.equal(first.variance["stem.weight"], other.variance["stem.weight"])


def test_an_error_on_the_way_restores_flags_and_modes():
    model = network().train()
    images, labels = image_batches()[0]
    with pytest.raises(InvalidInput, match="class labels"):
        fit_first_layer(model, [(images, labels), (images, labels + 7)], n_data=32, epochs=1)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_frozen_first_layer_is_refused():
    model = network()
    model.stem.requires_grad_(False)
    with pytest.raises(InvalidInput, match=r"first layer that runs \(stem.weight, stem.bias\) is frozen"):
        fit_network(model)
    assert set(fit_network(model, names=["body.weight"]).names) == {"body.weight"}


@pytest.mark.parametrize(
    ("options", "match"),
    [({"epochs": 0}, "epochs"), ({"patience": 0}, "patience"), ({"names": ["stem"]}, "no parameter named stem"), ({"lr": 0.0}, "lr"),
     ({"prior_precision": -1.0}, "prior_precision"), ({"likelihood": "regression"}, "sigma_noise")],
)  # fmt: skip
def test_bad_settings_name_themselves(options, match):
    with pytest.raises(InvalidInput, match=match):
        fit_network(network(), **options)


def test_batches_without_targets_are_refused():
    with pytest.raises(InvalidInput, match="every batch must be"):
        fit_first_layer(network(), [image_batches()[0][0]], n_data=64)
