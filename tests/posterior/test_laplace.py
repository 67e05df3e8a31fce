import warnings

import pytest
import torch
from problems import linear_regression
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from bayespass import InvalidInput, Laplace, NotFitted
from bayespass.curvature.diagonal import diagonal_curvature

PROBLEM = linear_regression()


def fitted_regression(**settings):
    model = PROBLEM.model()
    with torch.no_grad():
        model.weight.copy_(PROBLEM.mean)
    defaults = {
        "likelihood": "regression",
        "sigma_noise": PROBLEM.sigma_noise,
        "prior_precision": PROBLEM.prior_precision,
    }
    loader = list(zip(PROBLEM.inputs.split(150), PROBLEM.targets.split(150), strict=True))
    return Laplace(model.eval(), **(defaults | settings)).fit(loader)


def small_classifier():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double().eval()
    inputs = torch.randn(20, 3, dtype=torch.float64)
    return model, inputs, torch.randint(3, (20,))


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_equals_the_analytic_posterior_on_linear_regression(temperature):
    posterior = fitted_regression(temperature=temperature).posterior()
    precision = (1 / posterior.variance["weight"]).squeeze(0)
    torch.testing.assert_close(precision, PROBLEM.precision.diagonal() / temperature, rtol=1e-5, atol=0)
    torch.testing.assert_close(posterior.mean["weight"].squeeze(0), PROBLEM.mean)


def test_ggn_equals_the_dense_matrix():
    """diag(sum_n J_n^T H_n J_n), H_n the Hessian of cross-entropy in the logits, computed densely."""
    model, inputs, labels = small_classifier()
    names = tuple(dict(model.named_parameters()))
    found, loss, n = diagonal_curvature(model, [(inputs, labels)], names, "classification", chunk_size=7)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    expected = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for x in inputs:

        def logits(theta, x=x):
            return functional_call(model, theta, (x,))

        p = torch.softmax(logits(parameters), -1)
        inner = torch.diag(p) - torch.outer(p, p)
        for name, jacobian in torch.func.jacrev(logits)(parameters).items():
            flat = jacobian.flatten(1)
            expected[name] += torch.einsum("cp,cd,dp->p", flat, inner, flat).reshape(expected[name].shape)
    for name in names:
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-4, atol=1e-6)
    assert n == 20
    assert loss == pytest.approx(F.cross_entropy(model(inputs), labels, reduction="sum").item(), rel=1e-6)


def test_ggn_of_a_linear_classifier_is_its_hessian():
    model, (inputs, labels) = nn.Linear(3, 3).double().eval(), small_classifier()[1:]
    found, _, _ = diagonal_curvature(model, [(inputs, labels)], ("weight", "bias"), "classification")

    def loss(weight):
        return F.cross_entropy(inputs @ weight.T + model.bias.detach(), labels, reduction="sum")

    second = torch.autograd.functional.hessian(loss, model.weight.detach())
    torch.testing.assert_close(
        found["weight"].double().flatten(), second.reshape(9, 9).diagonal(), rtol=1e-5, atol=1e-7
    )


def test_empirical_fisher_equals_a_loop():
    model, inputs, labels = small_classifier()
    names = tuple(dict(model.named_parameters()))
    found, _, _ = diagonal_curvature(
        model, [(inputs[:13], labels[:13]), (inputs[13:], labels[13:])], names, "classification", curvature="ef"
    )
    expected = {name: 0.0 for name in names}
    for x, y in zip(inputs, labels, strict=True):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for name, p in model.named_parameters():
            expected[name] = expected[name] + p.grad.square()
    for name in names:
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_sampled_labels_average_to_the_exact_ggn(likelihood):
    """Over 400 seeds: within 5 standard errors entry by entry, and the trace within 3 %."""
    model, inputs, labels = small_classifier()
    sigma = None if likelihood == "classification" else 0.5
    targets = labels if sigma is None else torch.randn(20, 3, dtype=torch.float64)  # the observed ones do not matter
    names = tuple(dict(model.named_parameters()))
    data = [(inputs[:13], targets[:13]), (inputs[13:], targets[13:])]

    def curvature(kind, seed=0):
        found, _, _ = diagonal_curvature(model, data, names, likelihood, sigma, kind, seed=seed)
        return torch.cat([found[name].flatten() for name in names])

    exact = curvature("ggn")
    draws = torch.stack([curvature("mc", seed) for seed in range(400)])
    z = (draws.mean(0) - exact) / (draws.std(0) / 400**0.5)
    assert z.abs().max() < 5
    assert draws.mean(0).sum() == pytest.approx(float(exact.sum()), rel=0.03)
    assert torch.equal(curvature("mc", 3), draws[3])
    assert not torch.equal(draws[0], draws[1])


def test_sampled_labels_of_a_sequence_are_drawn_position_by_position():
    """Logits (B, T, C): one label per position; over 300 seeds the trace is that of the exact GGN within 5 %."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).eval()
    data = [(torch.randn(6, 5, 3), torch.randint(3, (6, 5)))]
    names = tuple(dict(model.named_parameters()))

    def trace(kind, seed=0):
        found, _, _ = diagonal_curvature(model, data, names, "classification", None, kind, seed=seed)
        return sum(float(value.sum()) for value in found.values())

    assert sum(trace("mc", seed) for seed in range(300)) / 300 == pytest.approx(trace("ggn"), rel=0.05)


def test_sampled_labels_make_a_posterior_that_says_so():
    model, inputs, labels = small_classifier()
    posterior = Laplace(model, curvature="mc").fit([(inputs, labels)]).posterior()
    assert posterior.info.settings["curvature"] == "mc"
    assert posterior.info.n_data == 20


def test_empirical_fisher_of_a_regression_equals_a_loop():
    model, inputs, _ = small_classifier()
    targets = torch.randn(20, 3, dtype=torch.float64)
    names = tuple(dict(model.named_parameters()))
    found, _, _ = diagonal_curvature(model, [(inputs, targets)], names, "regression", 0.5, "ef")
    expected = {name: 0.0 for name in names}
    for x, y in zip(inputs, targets, strict=True):
        model.zero_grad()
        ((model(x) - y).square().sum() / (2 * 0.25)).backward()
        for name, p in model.named_parameters():
            expected[name] = expected[name] + p.grad.square()
    for name in names:
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("curvature", ["ggn", "mc", "ef"])
def test_a_model_that_branches_on_its_data_is_differentiated_row_by_row(curvature):
    class Branching(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if bool((x < 100).all()) else super().forward(x) * 0

    plain, inputs, labels = small_classifier()
    branching = Branching(*plain).eval()
    names = tuple(dict(plain.named_parameters()))
    found, expected = (
        diagonal_curvature(model, [(inputs, labels)], names, "classification", curvature=curvature, chunk_size=7)[0]
        for model in (branching, plain)
    )
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)


def test_an_error_of_the_model_is_not_taken_for_one_of_vmap():
    class Broken(nn.Linear):
        def forward(self, x):
            if torch._C._functorch.maybe_current_level() is not None:  # inside a transform
                raise RuntimeError("no sensor")
            return super().forward(x)

    with pytest.raises(RuntimeError, match="no sensor"):
        diagonal_curvature(
            Broken(3, 3).eval(), [(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))], ("weight",), "classification"
        )


def test_marginal_likelihood_equals_the_evidence_of_a_diagonal_problem():
    """With orthogonal inputs the diagonal is the whole posterior and the evidence is exact."""
    q, _ = torch.linalg.qr(torch.randn(40, 4, dtype=torch.float64))
    problem = type(PROBLEM)(q * 5, torch.randn(40, 1, dtype=torch.float64), sigma_noise=0.7, prior_precision=1.3)
    model = problem.model()
    with torch.no_grad():
        model.weight.copy_(problem.mean)
    laplace = Laplace(model.eval(), "regression", sigma_noise=0.7, prior_precision=1.3).fit(
        [(problem.inputs, problem.targets)]
    )
    covariance = 0.49 * torch.eye(40, dtype=torch.float64) + problem.inputs @ problem.inputs.T / 1.3
    evidence = torch.distributions.MultivariateNormal(torch.zeros(40, dtype=torch.float64), covariance).log_prob(
        problem.targets.squeeze(1)
    )
    assert laplace.log_marginal_likelihood() == pytest.approx(float(evidence), rel=1e-6)


def test_marglik_tuning_finds_the_maximum_without_the_data():
    laplace = fitted_regression()
    search = laplace.optimize_prior_precision("marglik", grid=[0.01, 0.1, 1.0, 10.0, 100.0])
    values = [laplace.log_marginal_likelihood(a) for a in search.grid]
    assert search.best == search.grid[values.index(max(values))] == laplace.prior_precision
    assert not search.at_edge
    assert laplace.posterior().info.prior_precision == search.best


def noisy_classifier():
    """Labels that are half noise: a mean network that was trained on few rows is overconfident."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(400, 6, generator=generator)
    labels = ((inputs[:, 0] + torch.randn(400, generator=generator)) > 0).long()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[:60]), labels[:60]).backward()
        optimizer.step()
    return model.eval(), [(inputs[:60], labels[:60])], [(inputs[60:], labels[60:])]


def test_grid_search_picks_the_lowest_held_out_nll_and_says_how_it_compares():
    model, train, held_out = noisy_classifier()
    laplace = Laplace(model).fit(train)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        search = laplace.optimize_prior_precision("gridsearch", held_out, grid=[0.01, 0.1, 1.0, 10.0, 1e6])
    assert search.scores[search.grid.index(search.best)] == min(search.scores)
    assert search.best < 1e6
    assert min(search.scores) < search.map_score
    assert "MAP" in search.verdict
    assert "temperature" in search.verdict


def test_an_edge_and_a_useless_posterior_are_said_plainly():
    model, train, held_out = noisy_classifier()
    laplace = Laplace(model).fit(train)
    with pytest.warns(UserWarning, match=r"edge of the grid.*does not beat a temperature"):
        search = laplace.optimize_prior_precision("gridsearch", held_out, grid=[1e-6, 1e-5])
    assert search.at_edge
    with pytest.warns(UserWarning, match=r"does not beat the MAP network .* or a temperature"):
        laplace.optimize_prior_precision("gridsearch", held_out, grid=[1e12])


def test_frozen_parameters_and_names_are_left_out():
    model, inputs, labels = small_classifier()
    model[0].weight.requires_grad_(False)
    assert "0.weight" not in Laplace(model).fit([(inputs, labels)]).posterior().names
    assert Laplace(model, names=lambda name: name.startswith("2.")).fit([(inputs, labels)]).posterior().names == (
        "2.weight",
        "2.bias",
    )
    with pytest.raises(InvalidInput, match=r"no parameter named 0\.weight"):
        Laplace(model, names=["0.weight"])


def test_dict_batches():
    class FromDict(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, values, scale):
            return {"logits": self.linear(values) * scale}

    model = FromDict().eval()
    batch = {"values": torch.randn(5, 3), "scale": torch.ones(5, 1), "labels": torch.tensor([0, 1, 1, 0, 1])}
    assert Laplace(model).fit([batch]).posterior().info.n_data == 5


def test_mistakes_name_themselves():
    model, inputs, labels = small_classifier()
    with pytest.raises(NotFitted, match="fit"):
        Laplace(model).posterior()
    with pytest.raises(InvalidInput, match="no batch"):
        Laplace(model).fit([])
    with pytest.raises(InvalidInput, match=r"\[0, 3\)"):
        Laplace(model).fit([(inputs, labels + 1)])
    with pytest.raises(InvalidInput, match="integers"):
        Laplace(model).fit([(inputs, labels.double())])
    with pytest.raises(InvalidInput, match=r"shape \(20,\)"):
        Laplace(model).fit([(inputs, labels[:, None])])
    with pytest.raises(InvalidInput, match="val_loader"):
        Laplace(model).fit([(inputs, labels)]).optimize_prior_precision("gridsearch")
    with pytest.raises(InvalidInput, match="method"):
        Laplace(model).fit([(inputs, labels)]).optimize_prior_precision("guess")
    with pytest.raises(InvalidInput, match="grid"):
        Laplace(model).fit([(inputs, labels)]).optimize_prior_precision("marglik", grid=[])
    with pytest.raises(InvalidInput, match="curvature"):
        Laplace(model, curvature="hessian").fit([(inputs, labels)])
    with pytest.raises(InvalidInput, match="hessian_structure"):
        Laplace(model, hessian_structure="block")
    with pytest.raises(InvalidInput, match="training mode"):
        Laplace(small_classifier()[0].train())
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(InvalidInput, match="NaN"):
        Laplace(model).fit([(inputs, labels)])


def test_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    torch.manual_seed(0)
    model, inputs, labels = Tied().eval(), torch.randn(6, 3), torch.randint(3, (6,), dtype=torch.uint8)
    posterior = Laplace(model, curvature="ef", prior_precision=1.0).fit([(inputs, labels)]).posterior()
    expected = 0.0
    for x, y in zip(inputs, labels.long(), strict=True):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        expected = expected + model.first.weight.grad.square()
    assert posterior.names == ("first.weight",)
    torch.testing.assert_close(1 / posterior.variance["first.weight"], expected + 1, rtol=1e-4, atol=1e-5)


def test_the_posterior_keeps_the_weights_it_was_fitted_at():
    model, inputs, labels = small_classifier()
    laplace = Laplace(model).fit([(inputs, labels)])
    before = laplace.posterior().mean["0.bias"].clone()
    with torch.no_grad():
        model[0].bias.add_(1)
    assert torch.equal(laplace.posterior().mean["0.bias"], before)
