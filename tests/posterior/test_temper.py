import math

import pytest
import torch
from torch import nn

from bayespass import DiagonalGaussian, InvalidInput, PosteriorInfo
from bayespass.posterior.dropout import DropoutPosterior
from bayespass.posterior.empirical import Empirical
from bayespass.posterior.full import FullGaussian
from bayespass.posterior.kronecker import KroneckerGaussian
from bayespass.posterior.laplace import Laplace
from bayespass.posterior.low_rank import LowRankGaussian
from bayespass.posterior.mixture import Mixture
from bayespass.posterior.product import Product

INFO = PosteriorInfo(n_data=9, prior_precision=0.5, temperature=0.2)
MEAN = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.tensor([1.0, -1.0])}


def gaussians():
    generator = torch.Generator().manual_seed(0)
    variance = {name: torch.rand(m.shape, generator=generator) + 0.1 for name, m in MEAN.items()}
    factors = {name: torch.randn(2, *m.shape, generator=generator) for name, m in MEAN.items()}
    basis = torch.linalg.qr(torch.randn(3, 3, generator=generator))[0]
    return {
        "diagonal": DiagonalGaussian(MEAN, variance, INFO),
        "kronecker": KroneckerGaussian(MEAN, variance, right={"weight": basis}, info=INFO),
        "low_rank": LowRankGaussian(MEAN, variance, factors, INFO),
        "full": FullGaussian(MEAN, torch.randn(8, 8, generator=generator), INFO),
        "product": Product(
            [
                FullGaussian({"weight": MEAN["weight"]}, torch.randn(6, 6, generator=generator), INFO),
                DiagonalGaussian({"bias": MEAN["bias"]}, {"bias": variance["bias"]}, INFO),
            ]
        ),
    }


def dense(posterior):
    columns = []
    for unit in torch.eye(8):
        vector = {"weight": unit[:6].view(2, 3), "bias": unit[6:]}
        product = posterior.covariance_times(vector)
        columns.append(torch.cat([product[name].flatten() for name in ("weight", "bias")]))
    return torch.stack(columns, 1)


@pytest.mark.parametrize("kind", sorted(gaussians()))
def test_covariance_is_multiplied(kind):
    posterior = gaussians()[kind]
    colder = posterior.temper(0.25)
    assert type(colder) is type(posterior)
    assert colder.info == PosteriorInfo(n_data=9, prior_precision=0.5, temperature=0.05)
    torch.testing.assert_close(dense(colder), 0.25 * dense(posterior))
    torch.testing.assert_close(torch.cat([v.flatten() for v in colder.variance.values()]), dense(colder).diagonal())
    for name in MEAN:
        assert torch.equal(colder.mean[name], posterior.mean[name])
    for before, after in zip(posterior.sample(3, 0), colder.sample(3, 0), strict=True):
        for name in MEAN:  # equal seeds: the same draw, half as far from the mean
            torch.testing.assert_close(after[name] - MEAN[name], (before[name] - MEAN[name]) / 2)


@pytest.mark.parametrize("kind", sorted(gaussians()))
def test_draws_have_the_tempered_covariance(kind):
    hotter = gaussians()[kind].temper(3)
    draws = torch.stack([torch.cat([d["weight"].flatten(), d["bias"]]) for d in hotter.sample(8_000, 1)]).double()
    expected, sd = dense(hotter).double(), dense(hotter).diagonal().double().sqrt()
    assert ((draws.T.cov() - expected) / torch.outer(sd, sd)).abs().max() < 5 * (2 / 8_000) ** 0.5


@pytest.mark.parametrize("kind", sorted(gaussians()))
def test_the_density_is_the_power(kind):
    """log q_T(a) - log q_T(b) = (log q(a) - log q(b)) / T."""
    posterior = gaussians()[kind]
    a, b = posterior.sample(2, 3)
    gap, tempered = (q.log_prob(a) - q.log_prob(b) for q in (posterior, posterior.temper(2.5)))
    torch.testing.assert_close(tempered, gap / 2.5, rtol=1e-4, atol=1e-4)


def test_twice_is_the_product():
    posterior = gaussians()["full"]
    torch.testing.assert_close(dense(posterior.temper(2.0).temper(0.5)), dense(posterior))
    assert posterior.temper(2.0).temper(0.5).info == INFO


def test_laplace_at_a_temperature_is_laplace_tempered():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).eval()
    batches = [(torch.randn(20, 3), torch.randint(2, (20,)))]
    cold, plain = (Laplace(model, temperature=t).fit(batches).posterior() for t in (0.1, 1.0))
    tempered = plain.temper(0.1)
    assert tempered.info == cold.info
    for name in cold.names:
        torch.testing.assert_close(tempered.variance[name], cold.variance[name])


def test_a_mixture_keeps_its_weights():
    at = [DiagonalGaussian({"w": torch.tensor([m])}, {"w": torch.tensor([1.0])}, INFO) for m in (-5.0, 5.0)]
    tempered = Mixture(at, [3, 1], INFO).temper(0.01)
    assert tempered.weights.tolist() == [0.75, 0.25]
    assert math.isclose(tempered.info.temperature, 0.002)
    assert [math.isclose(q.info.temperature, 0.002) for q in tempered.components] == [True, True]
    draws = torch.cat([draw["w"] for draw in tempered.sample(4000, 0)])
    assert abs((draws < 0).float().mean() - 0.75) < 5 * (0.75 * 0.25 / 4000) ** 0.5
    assert abs(draws[draws < 0].std() / 0.1 - 1) < 5 / (2 * 3000) ** 0.5


@pytest.mark.parametrize("bad", [0, -1.0, math.nan, math.inf, True, "cold"])
def test_no_temperature(bad):
    with pytest.raises(InvalidInput, match="temperature must be a positive number"):
        gaussians()["diagonal"].temper(bad)


def test_what_has_no_temperature_says_so():
    members = Empirical([MEAN, MEAN])
    with pytest.raises(NotImplementedError, match=r"make them at the other temperature: SGLD\(temperature=\)"):
        members.temper(0.5)
    with pytest.raises(NotImplementedError, match="train the network with another rate"):
        DropoutPosterior({"weight": MEAN["weight"]}, {"weight": 0.1}).temper(0.5)
    with pytest.raises(NotImplementedError, match="members are trained networks"):
        Mixture([members]).temper(0.5)
    with pytest.raises(NotImplementedError, match="members are trained networks"):
        Product([members]).temper(0.5)
    with pytest.raises(InvalidInput, match="temperature must be"):  # the argument first
        members.temper(0)
