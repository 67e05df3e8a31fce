"""Every model of the zoo, unmodified: it runs, it has the deterministic limit, its variance is one.

Figures against 1,000 weight samples are in benchmarks/results/zoo.json.
"""

import pytest
import torch

from bayespass import SinglePass
from zoo import APPROXIMATIONS, TOLERANCE, built, deterministic_error, missing_library, random_posterior, reference
from zoo_models import ZOO

pytestmark = pytest.mark.filterwarnings("ignore")
# A wide band: 64 draws, several layers of assumptions, and tied or recurrent weights among the models.
BAND = (0.2, 5.0)


@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_a_model_of_the_zoo(entry):
    reason = missing_library(entry)
    if reason is not None:
        pytest.skip(reason)
    assert deterministic_error(entry) < TOLERANCE
    model, args, kwargs = built(entry)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    posterior = random_posterior(model)
    with torch.no_grad():
        truth = reference(model, posterior, args, kwargs, 64, seed=0).variance
        for name in APPROXIMATIONS:
            _, variance = SinglePass(model, posterior, name).moments(*args, **kwargs)
            assert bool(torch.isfinite(variance).all()), name
            assert bool((variance >= 0).all()), name
            ratio = float((variance / truth).median())
            assert name == "streamlined" or BAND[0] < ratio < BAND[1], (name, ratio)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not [path for path, module in model.named_modules() if "forward" in vars(module)]  # taken only in the copy


def test_the_shared_approximation_does_not_mix_the_rows_of_a_batch():
    for entry in ZOO:
        if entry.name in ("Swin", "ConvNeXt", "BERT", "U-Net", "LSTM forecaster") and missing_library(entry) is None:
            model, args, kwargs = built(entry)
            single_pass = SinglePass(model, random_posterior(model), "shared")

            def first(value):
                return value[:1] if isinstance(value, torch.Tensor) else value

            with torch.no_grad():
                together = single_pass.moments(*args, **kwargs)
                alone = single_pass.moments(*map(first, args), **{k: first(v) for k, v in kwargs.items()})
            for a, b in zip(together, alone, strict=True):
                torch.testing.assert_close(a[:1], b, rtol=1e-3, atol=1e-5)
