import pytest
import torch
from torch import nn

from bayespass import InvalidInput, MonteCarlo, NotFitted, Posterior, PosteriorInfo, propagate
from bayespass.posterior.empirical import Empirical
from bayespass.testing import check_posterior


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).eval()


def members(model, size):
    generator = torch.Generator().manual_seed(1)
    return [
        {name: p.detach() + 0.3 * torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
        for _ in range(size)
    ]


@pytest.mark.parametrize("size", [20, 100])
def test_the_contract(model, size):
    check_posterior(Empirical(members(model, size), PosteriorInfo(n_data=5)), model)


def test_moments_are_those_of_the_members(model):
    found = members(model, 7)
    posterior = Empirical(found)
    for name in posterior.names:
        stacked = torch.stack([member[name] for member in found])
        torch.testing.assert_close(posterior.mean[name], stacked.mean(0))
        torch.testing.assert_close(posterior.variance[name], stacked.var(0, correction=1))


def test_every_round_has_every_member_once(model):
    found = members(model, 5)
    posterior = Empirical(found)

    def indices(n, seed):
        return [
            next(k for k, m in enumerate(found) if torch.equal(m["2.bias"], draw["2.bias"]))
            for draw in posterior.sample(n, seed)
        ]

    order = indices(12, 0)
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5))
    assert len(set(order[10:])) == 2
    assert indices(3, 7) == indices(5, 7)[:3]
    assert len({tuple(indices(5, seed)) for seed in range(6)}) > 1


def test_monte_carlo_averages_the_ensemble_itself(model):
    found, inputs = members(model, 6), torch.randn(5, 3)
    prediction = MonteCarlo(model, Empirical(found), n_samples=6)(inputs)
    outputs = torch.stack([torch.func.functional_call(model, member, (inputs,)) for member in found])
    torch.testing.assert_close(prediction.probs, outputs.softmax(-1).mean(0))
    torch.testing.assert_close(prediction.logit_variance, outputs.var(0))
    assert propagate(model, Empirical(found), inputs).logit_variance.min() > 0


def test_draws_are_copies(model):
    posterior = Empirical(members(model, 2))
    before = {name: value.clone() for name, value in posterior.mean.items()}
    for draw in posterior.sample(2, 0):
        for value in draw.values():
            value.zero_()
    assert all(torch.equal(Empirical(posterior.members).mean[name], before[name]) for name in before)


def test_one_member_has_a_mean_only(model, tmp_path):
    posterior = Empirical(members(model, 1))
    torch.testing.assert_close(posterior.mean["2.bias"], posterior.members[0]["2.bias"])
    with pytest.raises(NotFitted, match="one member has no variance"):
        _ = posterior.variance
    posterior.save(tmp_path / "p.safetensors", model)
    assert len(Posterior.load(tmp_path / "p.safetensors", model).members) == 1  # type: ignore[attr-defined]


def test_bad_members_are_named():
    good = {"w": torch.zeros(2), "b": torch.zeros(1)}
    with pytest.raises(InvalidInput, match="at least one member"):
        Empirical([])
    with pytest.raises(InvalidInput, match="at least one parameter"):
        Empirical([{}])
    with pytest.raises(InvalidInput, match="member 1 differs from member 0 in b"):
        Empirical([good, {"w": torch.zeros(2)}])
    with pytest.raises(InvalidInput, match="member 2 differs from member 0 in w"):
        Empirical([good, good, good | {"w": torch.zeros(3)}])
    with pytest.raises(InvalidInput, match="parameter w of member 1 is NaN"):
        Empirical([good, good | {"w": torch.full((2,), torch.nan)}])
