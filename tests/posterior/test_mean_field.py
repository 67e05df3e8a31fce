import pytest
import torch
from torch import nn

from bayespass import DiagonalGaussian, InvalidInput, Posterior, PosteriorInfo, PosteriorMismatch
from bayespass.testing import check_posterior


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)).eval()


@pytest.fixture
def posterior(model):
    mean = {name: p.detach() for name, p in model.named_parameters()}
    return DiagonalGaussian(mean, {name: torch.rand_like(p) for name, p in mean.items()}, PosteriorInfo(n_data=7))


def test_the_contract(posterior, model):
    check_posterior(posterior, model)


def test_the_contract_can_fail(posterior, model):
    class Biased(DiagonalGaussian):
        def sample(self, n_samples, generator=0):
            for draw in super().sample(n_samples, generator):
                yield {name: value * 1.1 for name, value in draw.items()}

    with pytest.raises(AssertionError, match="samples miss"):
        check_posterior(Biased(posterior.mean, posterior.variance), model)


def test_log_prob_is_that_of_independent_normals(posterior):
    draw = next(posterior.sample(1, 0))
    expected = sum(
        torch.distributions.Normal(posterior.mean[n], posterior.variance[n].sqrt()).log_prob(draw[n]).sum()
        for n in draw
    )
    torch.testing.assert_close(posterior.log_prob(draw), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(InvalidInput, match="missing"):
        posterior.log_prob({})


def test_subsets_by_name_and_predicate(posterior):
    assert posterior.subset(["2.bias"]).names == ("2.bias",)
    assert posterior.subset(lambda name: name.endswith("weight")).names == ("0.weight", "1.weight", "2.weight")
    with pytest.raises(InvalidInput, match="no parameter named nope"):
        posterior.subset(["nope"])
    with pytest.raises(InvalidInput, match="leaves no random parameter"):
        posterior.subset(lambda name: False)


@pytest.mark.parametrize(
    ("mean", "variance", "match"),
    [
        ({"a": torch.zeros(2)}, {"b": torch.ones(2)}, "same parameter names"),
        ({}, {}, "at least one"),
        ({"a": torch.zeros(2)}, {"a": torch.ones(3)}, "differ in shape"),
        ({"a": torch.tensor([torch.nan])}, {"a": torch.ones(1)}, "a has a mean or variance that is NaN"),
        ({"a": torch.zeros(1)}, {"a": torch.tensor([torch.inf])}, "NaN or infinite"),
        ({"a": torch.zeros(1)}, {"a": torch.tensor([-1.0])}, "negative variance"),
    ],
)
def test_bad_moments_name_the_parameter(mean, variance, match):
    with pytest.raises(InvalidInput, match=match):
        DiagonalGaussian(mean, variance)


def test_tied_weights_are_one_parameter():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.embed(tokens))

    model = Tied().eval()
    for name in ("embed.weight", "head.weight"):
        value = model.embed.weight.detach()
        check_posterior(DiagonalGaussian({name: value}, {name: torch.ones_like(value)}), model, n_samples=200)


def test_names_and_shapes_are_checked_against_the_model(posterior):
    with pytest.raises(PosteriorMismatch, match=r"lacks: 0\.weight, 0\.bias, 1\.weight and 3 more"):
        posterior.check_model(nn.Flatten())
    with pytest.raises(PosteriorMismatch, match=r"0\.weight has shape \(2, 3\)"):
        posterior.check_model(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)))


def test_kinds_are_found_by_name():
    assert Posterior._KINDS["diagonal_gaussian"] is DiagonalGaussian
