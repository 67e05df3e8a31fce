"""Laplace with a structured Hessian, against conjugate regression and dense matrices."""

import warnings

import pytest
import torch
from problems import linear_regression
from torch import nn

from bayespass import DiagonalGaussian, InvalidInput, Laplace, MonteCarlo, propagate
from bayespass.curvature.dense import dense_ggn
from bayespass.posterior.full import FullGaussian
from bayespass.posterior.kronecker import KroneckerGaussian
from bayespass.testing import check_posterior

PROBLEM = linear_regression(dtype=torch.float64)


def regression(structure, **settings):
    model = PROBLEM.model()
    with torch.no_grad():
        model.weight.copy_(PROBLEM.mean)
    defaults = {"sigma_noise": PROBLEM.sigma_noise, "prior_precision": PROBLEM.prior_precision}
    loader = list(zip(PROBLEM.inputs.split(150), PROBLEM.targets.split(150), strict=True))
    return Laplace(model.eval(), "regression", structure, **(defaults | settings)).fit(loader)


def classifier():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    inputs = torch.randn(60, 3)
    return model, inputs, (inputs @ torch.randn(3, 3)).argmax(-1)


def covariance(posterior):
    """Of one weight, from products with unit vectors."""
    name, size = posterior.names[0], posterior.mean[posterior.names[0]].numel()
    columns = [posterior.covariance_times({name: e.view_as(posterior.mean[name])})[name] for e in torch.eye(size)]
    return torch.stack([column.flatten() for column in columns])


@pytest.mark.parametrize("structure", ["kron", "full"])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_conjugate_regression_is_recovered_with_its_correlations(structure, temperature):
    posterior = regression(structure, temperature=temperature).posterior()
    expected = temperature * torch.linalg.inv(PROBLEM.precision)
    torch.testing.assert_close(covariance(posterior).double(), expected, rtol=1e-4, atol=1e-6 * temperature)
    torch.testing.assert_close(posterior.mean["weight"].squeeze(0), PROBLEM.mean.float())
    assert posterior.info.settings["hessian_structure"] == structure


@pytest.mark.parametrize("structure", ["kron", "full"])
def test_marginal_likelihood_is_the_evidence(structure):
    laplace = regression(structure)
    noise = PROBLEM.sigma_noise**2 * torch.eye(400, dtype=torch.float64)
    gram = PROBLEM.inputs @ PROBLEM.inputs.T / PROBLEM.prior_precision
    evidence = torch.distributions.MultivariateNormal(torch.zeros(400, dtype=torch.float64), noise + gram)
    assert laplace.log_marginal_likelihood() == pytest.approx(
        float(evidence.log_prob(PROBLEM.targets.squeeze(1))), rel=1e-6
    )


def test_a_last_layer_is_bayesian_regression_on_its_features():
    """Weights and bias together: precision sum phi phi^T / s^2 + a0 with phi = (features, 1)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double().eval()
    inputs, targets, sigma, a0 = torch.randn(80, 3).double(), torch.randn(80, 1).double(), 0.4, 1.7
    features = torch.cat([model[:2](inputs).detach(), torch.ones(80, 1).double()], 1)
    precision = features.T @ features / sigma**2 + a0 * torch.eye(6).double()
    best = torch.linalg.solve(precision, features.T @ targets / sigma**2).squeeze(1)
    with torch.no_grad():
        model[2].weight.copy_(best[:5])
        model[2].bias.copy_(best[5:])
    laplace = Laplace(
        model, "regression", "full", prior_precision=a0, sigma_noise=sigma, names=lambda name: name.startswith("2.")
    )
    posterior = laplace.fit([(inputs, targets)]).posterior()
    assert posterior.names == ("2.weight", "2.bias")
    torch.testing.assert_close(posterior.covariance.double(), torch.linalg.inv(precision), rtol=1e-4, atol=1e-6)
    new = torch.randn(7, 3).double()
    phi = torch.cat([model[:2](new).detach(), torch.ones(7, 1).double()], 1)
    exact = (phi @ torch.linalg.inv(precision) * phi).sum(1)
    found = MonteCarlo(model, posterior, n_samples=4000)(new)
    torch.testing.assert_close(found.mean.squeeze(1), phi @ best, atol=0.01, rtol=0)
    assert (found.epistemic.squeeze(1) / exact).log().abs().max() < 5 * (2 / 4000) ** 0.5


def test_kron_lies_between_the_diagonal_and_the_whole():
    """The posterior of a small classifier: closer to the full covariance than the diagonal one, by KL of the weights."""
    model, inputs, labels = classifier()
    posteriors = {
        s: Laplace(model, hessian_structure=s, prior_precision=1.0).fit([(inputs, labels)]).posterior()
        for s in ("diag", "kron", "full")
    }
    full = torch.distributions.MultivariateNormal(
        torch.cat([m.flatten() for m in posteriors["full"].mean.values()]).double(),
        posteriors["full"].covariance.double(),
    )
    gaps = {}
    for structure in ("diag", "kron"):
        posterior = posteriors[structure]
        draws = list(posterior.sample(3000, 0))
        flat = torch.stack([torch.cat([value.flatten() for value in draw.values()]) for draw in draws]).double()
        own = torch.stack([posterior.log_prob(draw) for draw in draws]).double()
        gaps[structure] = float((own - full.log_prob(flat)).mean())
    assert 0 < gaps["kron"] < 0.7 * gaps["diag"]


@pytest.mark.parametrize("structure", ["kron", "full"])
def test_the_posterior_keeps_its_contract_and_predicts(structure):
    model, inputs, labels = classifier()
    posterior = Laplace(model, hessian_structure=structure).fit([(inputs, labels)]).posterior()
    assert type(posterior) is {"kron": KroneckerGaussian, "full": FullGaussian}[structure]
    assert posterior.names == tuple(name for name, _ in model.named_parameters())
    check_posterior(posterior, model)
    single, many = propagate(model, posterior, inputs), MonteCarlo(model, posterior, n_samples=300)(inputs)
    assert 0.3 < (single.logit_variance / many.logit_variance).mean() < 3


@pytest.mark.parametrize("structure", ["kron", "full"])
@pytest.mark.parametrize("method", ["marglik", "gridsearch"])
def test_the_prior_is_tuned_from_cached_eigenvalues(structure, method):
    model, inputs, labels = classifier()
    laplace = Laplace(model, hessian_structure=structure).fit([(inputs, labels)])
    spectrum = laplace.spectrum_
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whether the posterior beats the mean is not the question
        search = laplace.optimize_prior_precision(method, [(inputs, labels)], grid=[0.1, 1.0, 10.0, 1000.0])
    assert laplace.spectrum_ is spectrum
    assert search.best == laplace.prior_precision == laplace.posterior().info.prior_precision
    fresh = Laplace(model, hessian_structure=structure, prior_precision=search.best).fit([(inputs, labels)])
    for name, variance in fresh.posterior().variance.items():
        torch.testing.assert_close(laplace.posterior().variance[name], variance)
    if method == "marglik":
        assert search.scores == tuple(-laplace.log_marginal_likelihood(a) for a in search.grid)


def test_log_det_of_the_whole_matrix():
    model, inputs, labels = classifier()
    names = tuple(name for name, _ in model.named_parameters())
    matrix = dense_ggn(model, [(inputs, labels)], names, "classification")[0].double()
    laplace = Laplace(model, hessian_structure="full").fit([(inputs, labels)])
    expected = torch.linalg.slogdet(matrix / 0.3 + torch.eye(len(matrix))).logabsdet
    assert laplace.spectrum_.log_det(0.3) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("curvature", ["mc", "ef"])
def test_kron_takes_the_other_curvatures(curvature):
    model, inputs, labels = classifier()
    posterior = Laplace(model, hessian_structure="kron", curvature=curvature).fit([(inputs, labels)]).posterior()
    assert posterior.info.settings["curvature"] == curvature
    assert min(float(v.min()) for v in posterior.variance.values()) > 0


def test_weights_alone_and_biases_alone():
    model, inputs, labels = classifier()
    both = Laplace(model, hessian_structure="kron").fit([(inputs, labels)]).posterior()
    for kind in ("weight", "bias"):
        one = Laplace(model, hessian_structure="kron", names=lambda name, kind=kind: name.endswith(kind))
        found = one.fit([(inputs, labels)]).posterior()
        assert all(name.endswith(kind) for name in found.names)
        assert all(torch.equal(found.variance[name], both.variance[name]) for name in found.names)


def test_diag_is_as_it_was():
    model, inputs, labels = classifier()
    assert isinstance(Laplace(model).fit([(inputs, labels)]).posterior(), DiagonalGaussian)


def test_mistakes_name_themselves():
    model, inputs, labels = classifier()
    with pytest.raises(InvalidInput, match="'diag', 'kron' or 'full'; got 'block'"):
        Laplace(model, hessian_structure="block")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="has curvature='ggn' only; got 'mc'"):
        Laplace(model, hessian_structure="full", curvature="mc")
    with pytest.raises(InvalidInput, match="kfac_approx must be 'expand' or 'reduce'; got 'both'"):
        Laplace(model, hessian_structure="kron", kfac_approx="both")  # type: ignore[arg-type]
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    for structure, what in (("diag", "parameter"), ("kron", "layer"), ("full", "parameters")):
        with pytest.raises(InvalidInput, match=rf"curvature of {what} 0.* is NaN or infinite"):
            Laplace(model, hessian_structure=structure).fit([(inputs, labels)])


def test_networks_with_norms_and_convolutions_mix_factors_and_diagonals():
    """The posterior keeps its contract, and its diagonal part is the diagonal Laplace's own."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 2, groups=2), nn.Flatten(), nn.Linear(36, 3)
    ).eval()
    loader = [(torch.randn(12, 1, 6, 6), torch.arange(12) % 3)]
    for approx in ("expand", "reduce"):
        laplace = Laplace(model, hessian_structure="kron", kfac_approx=approx).fit(loader)
        posterior = laplace.posterior()
        check_posterior(posterior, model)
        plain = Laplace(model).fit(loader).posterior()
        for name in ("1.weight", "1.bias", "3.weight", "3.bias"):
            torch.testing.assert_close(posterior.variance[name], plain.variance[name])
        assert set(laplace.spectrum_.left) == {"0.weight", "0.bias", "5.weight", "5.bias"}


@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
def test_a_small_memory_gives_the_same_posterior(structure):
    model, inputs, labels = classifier()
    small = 40 * 45**2 if structure == "full" else 1
    one, other = (
        Laplace(model, hessian_structure=structure, max_memory=room).fit([(inputs, labels)]).posterior()
        for room in (2**30, small)
    )
    for name, variance in one.variance.items():
        torch.testing.assert_close(other.variance[name], variance, rtol=1e-4, atol=1e-6)
