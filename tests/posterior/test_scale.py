import pytest
from hypothesis import given
from hypothesis import strategies as st

from bayespass import InvalidInput
from bayespass.posterior.scale import LIBRARIES, Scale

POSITIVE = st.floats(1e-6, 1e6)


@pytest.mark.parametrize("library", LIBRARIES)
@given(n_data=st.integers(1, 10**7), prior_precision=POSITIVE, temperature=POSITIVE, curvature=POSITIVE)
def test_there_and_back(library, n_data, prior_precision, temperature, curvature):
    scale = Scale(n_data, prior_precision, temperature)
    again = Scale.from_library(library, n_data, **scale.to(library))
    assert again.prior_precision == pytest.approx(prior_precision, rel=1e-9)
    assert again.temperature == pytest.approx(temperature, rel=1e-9)
    assert again.precision(curvature) == pytest.approx((n_data * curvature + prior_precision) / temperature, rel=1e-9)


# The posterior precision that each library's own formula gives for a curvature h of the mean loss.
FORMULAS = {
    "ivon-opt": lambda h, n, a: a["ess"] * (h + a["weight_decay"]),
    "bayes-by-backprop": lambda h, n, a: h / a["kl_weight"] + 1 / a["prior_sd"] ** 2,
    "laplace-torch": lambda h, n, a: n * h / a["temperature"] + a["prior_precision"],
    "bayesdll-vi": lambda h, n, a: n / a["kld"] * h + 1 / a["prior_sig"] ** 2,
    "bayesdll-sgld": lambda h, n, a: n * a["Ninflate"] * h + 1 / a["prior_sig"] ** 2,
    "posteriors": lambda h, n, a: (n * h + a["prior_precision"]) / (n * a["temperature"]),
}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_every_spelling_means_the_same_posterior(library, temperature):
    scale = Scale(50_000, prior_precision=10.0, temperature=temperature)
    precision = FORMULAS[library](0.3, 50_000, scale.to(library))
    assert precision == pytest.approx((50_000 * 0.3 + 10.0) / temperature, rel=1e-12)


def test_bayes_correct_settings():
    """Temperature 1 is ess = N, a KL weight of 1 / N, kld = 1 and Ninflate = 1."""
    scale = Scale(1000, prior_precision=4.0)
    assert scale.to("ivon-opt") == {"ess": 1000.0, "weight_decay": 0.004}
    assert scale.to("bayes-by-backprop") == {"kl_weight": 0.001, "prior_sd": 0.5}
    assert scale.to("bayesdll-vi")["kld"] == scale.to("bayesdll-sgld")["Ninflate"] == 1
    assert scale.to("posteriors")["temperature"] == 0.001


def test_bad_scales_name_themselves():
    with pytest.raises(InvalidInput, match="temperature"):
        Scale(10, temperature=0.0)
    with pytest.raises(InvalidInput, match="library must be"):
        Scale(10).to("pyro")
    with pytest.raises(InvalidInput, match="ess, weight_decay"):
        Scale.from_library("ivon-opt", 10, ess=10.0)
