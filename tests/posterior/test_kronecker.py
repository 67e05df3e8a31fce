import pytest
import torch
from torch import nn

from bayespass import DiagonalGaussian, InvalidInput, MonteCarlo, Posterior, PosteriorInfo, propagate
from bayespass.posterior.kronecker import KroneckerGaussian
from bayespass.testing import check_posterior


def orthogonal(size, seed, dtype=torch.float32):
    noise = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return torch.linalg.qr(noise)[0].contiguous()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.ReLU(), nn.Linear(16, 3)).eval()


@pytest.fixture
def posterior(model):
    """Both sides, one side only, and none."""
    mean = {name: p.detach() for name, p in model.named_parameters()}
    variance = {name: torch.rand_like(p) * 0.1 for name, p in mean.items()}
    left = {"0.weight": orthogonal(4, 1), "0.bias": orthogonal(4, 2)}
    right = {"0.weight": orthogonal(18, 3), "3.weight": orthogonal(16, 4)}
    return KroneckerGaussian(mean, variance, left, right, PosteriorInfo(n_data=7))


def dense(posterior, name):
    """The covariance of the flattened parameter, written out."""
    mean = posterior.mean[name]
    rows, columns = (mean.shape[0], mean[0].numel())
    left = posterior._left.get(name, torch.eye(rows))
    right = posterior._right.get(name, torch.eye(columns))
    basis = torch.kron(left, right)
    return basis @ torch.diag(posterior._variance_in_basis[name].flatten()) @ basis.T


def test_the_contract(posterior, model):
    check_posterior(posterior, model)


def test_variance_and_products_are_those_of_the_dense_covariance(posterior):
    vector = {name: torch.randn_like(mean) for name, mean in posterior.mean.items()}
    products = posterior.covariance_times(vector)
    for name in posterior.names:
        covariance = dense(posterior, name)
        torch.testing.assert_close(posterior.variance[name].flatten(), covariance.diagonal())
        torch.testing.assert_close(products[name].flatten(), covariance @ vector[name].flatten(), rtol=1e-4, atol=1e-6)


def test_draws_have_the_dense_covariance(posterior):
    name = "0.bias"
    draws = torch.stack([draw[name] for draw in posterior.subset([name]).sample(20_000, 1)])
    expected = dense(posterior, name)
    scale = expected.diagonal().sqrt()
    error = (draws.T.cov() - expected) / torch.outer(scale, scale)
    assert error.abs().max() < 5 * 2**0.5 / 20_000**0.5


def test_log_prob_is_that_of_the_dense_gaussian(posterior):
    draw = next(posterior.sample(1, 0))
    expected = sum(
        torch.distributions.MultivariateNormal(
            posterior.mean[n].flatten().double(), dense(posterior, n).double()
        ).log_prob(draw[n].flatten().double())
        for n in posterior.names
    )
    assert float(posterior.log_prob(draw)) == pytest.approx(float(expected), rel=1e-4)
    with pytest.raises(InvalidInput, match="missing"):
        posterior.log_prob({})


def test_without_bases_it_is_the_diagonal_gaussian(posterior):
    plain = KroneckerGaussian(posterior.mean, posterior._variance_in_basis)
    diagonal = DiagonalGaussian(posterior.mean, posterior._variance_in_basis)
    first, second = next(plain.sample(1, 5)), next(diagonal.sample(1, 5))
    for name in plain.names:
        torch.testing.assert_close(first[name], second[name])
        assert torch.equal(plain.variance[name], diagonal.variance[name])


def test_variance_may_be_given_as_a_matrix(posterior):
    variance = {name: v.flatten(1) if v.dim() > 1 else v[:, None] for name, v in posterior._variance_in_basis.items()}
    again = KroneckerGaussian(posterior.mean, variance, posterior._left, posterior._right)
    assert all(torch.equal(again.variance[name], posterior.variance[name]) for name in posterior.names)


def test_every_predictor_runs(posterior, model):
    inputs = torch.randn(5, 2, 4, 4)
    single = propagate(model, posterior, inputs)
    many = MonteCarlo(model, posterior, n_samples=400)(inputs)
    ratio = (single.logit_variance / many.logit_variance).mean()
    assert 0.5 < ratio < 2


def test_half_precision_weights_keep_float32_variances(tmp_path):
    model = nn.Linear(3, 2, bias=False).bfloat16().eval()
    mean = {"weight": model.weight.detach()}
    posterior = KroneckerGaussian(mean, {"weight": torch.ones(2, 3)}, {"weight": orthogonal(2, 0)})
    assert posterior.variance["weight"].dtype == torch.float32
    assert next(posterior.sample(1, 0))["weight"].dtype == torch.bfloat16
    posterior.save(tmp_path / "p.safetensors", model)
    assert isinstance(Posterior.load(tmp_path / "p.safetensors", model), KroneckerGaussian)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"left": {"nope": torch.eye(2)}}, "left has a basis for nope"),
        ({"left": {"w": torch.eye(3)}}, r"left basis of w must have shape \(2, 2\).*got \(3, 3\)"),
        ({"right": {"w": torch.eye(2)}}, r"right basis of w must have shape \(3, 3\)"),
        ({"right": {"w": 1.01 * torch.eye(3)}}, "right basis of w is not orthogonal"),
        ({"left": {"w": torch.full((2, 2), torch.nan)}}, "left basis of w is not orthogonal"),
        ({"variance_in_basis": {"w": -torch.ones(2, 3)}}, "negative variance"),
        ({"variance_in_basis": {"w": torch.ones(3, 2)}}, "differ in shape"),
        ({"variance_in_basis": {"v": torch.ones(2, 3)}}, "same parameter names"),
    ],
)
def test_bad_input_is_named(change, match):
    arguments = {"mean": {"w": torch.zeros(2, 3)}, "variance_in_basis": {"w": torch.ones(2, 3)}} | change
    with pytest.raises(InvalidInput, match=match):
        KroneckerGaussian(**arguments)
