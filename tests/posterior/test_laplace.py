import math
import warnings
from itertools import product

import expecttest
import pytest
import torch
from problems import linear_regression
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from bayespass import InvalidInput, Laplace, NotFitted
from bayespass.curvature.diagonal import diagonal_curvature
from bayespass.evaluate.proper_scores import log_scores
from bayespass.predict.dataset import predict_dataset
from bayespass.predict.linearised import Linearised

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
    found, loss, n = diagonal_curvature(model, [(inputs, labels)], names, "classification", max_memory=2000)
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
    """Over 200 seeds: within 5 standard errors entry by entry, and the trace within 3 %."""
    model, inputs, labels = small_classifier()
    sigma = None if likelihood == "classification" else 0.5
    targets = labels if sigma is None else torch.randn(20, 3, dtype=torch.float64)  # the observed ones do not matter
    names = tuple(dict(model.named_parameters()))
    data = [(inputs[:13], targets[:13]), (inputs[13:], targets[13:])]

    def curvature(kind, seed=0):
        found, _, _ = diagonal_curvature(model, data, names, likelihood, sigma, kind, seed=seed)
        return torch.cat([found[name].flatten() for name in names])

    exact = curvature("ggn")
    draws = torch.stack([curvature("mc", seed) for seed in range(200)])
    z = (draws.mean(0) - exact) / (draws.std(0) / 200**0.5)
    assert z.abs().max() < 5
    assert draws.mean(0).sum() == pytest.approx(float(exact.sum()), rel=0.03)
    assert torch.equal(curvature("mc", 3), draws[3])
    assert not torch.equal(draws[0], draws[1])


def test_sampled_labels_of_a_sequence_are_drawn_position_by_position():
    """Logits (B, T, C): one label per position; over 150 seeds the trace is that of the exact GGN within 5 %."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).eval()
    data = [(torch.randn(6, 5, 3), torch.randint(3, (6, 5)))]
    names = tuple(dict(model.named_parameters()))

    def trace(kind, seed=0):
        found, _, _ = diagonal_curvature(model, data, names, "classification", None, kind, seed=seed)
        return sum(float(value.sum()) for value in found.values())

    assert sum(trace("mc", seed) for seed in range(150)) / 150 == pytest.approx(trace("ggn"), rel=0.05)


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
        diagonal_curvature(model, [(inputs, labels)], names, "classification", curvature=curvature, max_memory=2000)[0]
        for model in (branching, plain)
    )
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)


def test_an_error_of_the_model_is_its_own():
    class Broken(nn.Linear):
        def forward(self, x):
            raise RuntimeError("no sensor")

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
    with pytest.raises(InvalidInput, match=r"parameter 0\.weight is frozen"):
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


def brute_force(laplace, grid):
    """The precisions by layer with the highest marginal likelihood, each of all combinations on a grid."""
    layers = sorted({name.rpartition(".")[0] for name in laplace.names})
    best = max(
        product(grid, repeat=len(layers)),
        key=lambda values: laplace.log_marginal_likelihood(
            {name: values[layers.index(name.rpartition(".")[0])] for name in laplace.names}
        ),
    )
    return dict(zip(layers, best, strict=True))


@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_marglik_by_layer_is_the_best_of_all_combinations(structure):
    model, train, _ = noisy_classifier()
    laplace = Laplace(model, hessian_structure=structure).fit(train)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search = laplace.optimize_prior_precision("marglik", per_layer=True)
    assert laplace.prior_precision == search.by_name
    best = -laplace.log_marginal_likelihood()
    assert best < min(search.scores)
    for name in laplace.names:  # a step of 5 % for one layer is worse
        for factor in (0.95, 1.05):
            layer = name.rpartition(".")[0]
            moved = {n: a * factor if n.rpartition(".")[0] == layer else a for n, a in search.by_name.items()}
            assert -laplace.log_marginal_likelihood(moved) > best
    fine = [10 ** (0.1 * k) for k in range(-10, 21)]
    for layer, value in brute_force(laplace, fine).items():
        assert abs(math.log10(search.by_name[f"{layer}.weight"] / value)) <= 0.05 + 1e-9


def test_a_prior_by_name_is_what_the_posterior_has():
    model, inputs, labels = small_classifier()
    given = {"0.weight": 1.0, "0.bias": 2.0, "2.weight": 3.0, "2.bias": 4.0}
    for structure in ("diag", "kron"):
        laplace = Laplace(model, hessian_structure=structure, prior_precision=given).fit([(inputs, labels)])
        posterior = laplace.posterior()
        for name, a0 in given.items():
            torch.testing.assert_close(posterior.variance[name], laplace.posterior(a0).variance[name])
            assert posterior.info.settings[f"prior_precision/{name}"] == a0
        logs = sum(math.log(a0) * posterior.mean[name].numel() for name, a0 in given.items())
        assert posterior.info.prior_precision == pytest.approx(math.exp(logs / 31))
        same = laplace.log_marginal_likelihood(dict.fromkeys(given, 1.7))
        assert same == pytest.approx(laplace.log_marginal_likelihood(1.7))
    with pytest.raises(InvalidInput, match=r"every random parameter; 2\.bias differ"):
        laplace.posterior({name: 1.0 for name in list(given)[:3]})
    with pytest.raises(InvalidInput, match=r"prior_precision of 0\.bias must be a positive number"):
        laplace.posterior(given | {"0.bias": 0.0})
    with pytest.raises(InvalidInput, match="a full matrix has one prior precision"):
        Laplace(model, hessian_structure="full", prior_precision=given)


@pytest.mark.parametrize("structure", ["diag", "kron"])
@pytest.mark.parametrize("likelihood", ["classification", "regression", "predicted"])
def test_cached_grid_search_equals_a_pass_per_grid_point(structure, likelihood):
    """Relative to the scores, 1e-4: float32 eigenvectors in another order of summation."""
    torch.manual_seed(0)
    sigma = {"classification": None, "regression": 0.5, "predicted": "predicted"}[likelihood]
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 2 if sigma else 3)).eval()
    inputs = torch.randn(40, 3)
    targets = {None: torch.arange(40) % 3, 0.5: torch.randn(40, 2), "predicted": torch.randn(40)}[sigma]
    kind = "classification" if sigma is None else "regression"
    laplace = Laplace(model, kind, structure, sigma_noise=sigma).fit([(inputs, targets)])
    held_out = list(zip(inputs.split(15), targets.split(15), strict=True))
    grid = [0.1, 1.0, 10.0, 100.0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cached = laplace.optimize_prior_precision("gridsearch", held_out, grid, Linearised)
        passes = laplace.optimize_prior_precision("gridsearch", held_out, grid, lambda m, p: Linearised(m, p))
    assert cached.scores == pytest.approx(passes.scores, rel=1e-4)
    assert cached.best == passes.best
    assert cached.map_score == passes.map_score


def test_grid_search_by_layer_descends_from_the_best_shared_precision(monkeypatch):
    model, train, held_out = noisy_classifier()
    held_out = [(x[:120], y[:120]) for x, y in held_out]
    laplace = Laplace(model, hessian_structure="kron").fit(train)
    grid = [0.01, 0.1, 1.0, 10.0, 100.0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        search = laplace.optimize_prior_precision("gridsearch", held_out, grid, Linearised, per_layer=True)
        scores = {}
        for first, last in product(grid, repeat=2):
            given = {name: first if name.startswith("0.") else last for name in laplace.names}
            predictor = Linearised(model, laplace.posterior(given))
            scores[first, last] = float(log_scores(predict_dataset(predictor, held_out), held_out[0][1]).mean())
    chosen = search.by_name["0.weight"], search.by_name["2.weight"]
    assert scores[chosen] == pytest.approx(min(scores.values()), rel=1e-3)
    assert scores[chosen] <= min(search.scores) * 1.0001
    assert all(scores[chosen] <= scores[other, chosen[1]] * 1.0001 for other in grid)
    with pytest.raises(InvalidInput, match="needs predictor=Linearised"):
        laplace.optimize_prior_precision("gridsearch", held_out, grid, per_layer=True)
    with pytest.raises(InvalidInput, match="one prior precision"):
        Laplace(model, hessian_structure="full").fit(train).optimize_prior_precision(per_layer=True)
    laplace.max_memory = 1000
    with pytest.raises(InvalidInput, match=r"use fewer rows or a smaller grid, or raise max_memory"):
        laplace.optimize_prior_precision("gridsearch", held_out, grid, Linearised)


class Mixed(nn.Module):
    """One of each: convolution, norm, grouped convolution, class token, recurrent cell, tied weights."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 2, bias=False)
        self.norm = nn.GroupNorm(2, 4)
        self.grouped = nn.Conv1d(4, 4, 1, groups=2)
        self.token = nn.Parameter(torch.randn(1, 4, 1))
        self.cell = nn.GRU(4, 4, batch_first=True, bias=False)
        self.tie, self.other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.other.weight = self.tie.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.grouped(self.norm(self.conv(x))) + self.token
        return self.head(self.other(torch.tanh(self.tie(self.cell(x.mT)[0][:, -1]))))


def test_the_coverage_says_what_every_parameter_got():
    model = Mixed().eval()
    model.head.bias.requires_grad_(False)
    laplace = Laplace(model, hessian_structure="kron", names=lambda name: name != "norm.bias")
    with pytest.raises(NotFitted):
        laplace.coverage()
    laplace.fit([(torch.randn(5, 3, 6), torch.tensor([0, 1, 2, 0, 1]))])
    coverage = laplace.coverage()
    expecttest.assert_expected_inline(
        str(coverage),
        """\
parameter          shape      count  structure    reason
token              1 x 4 x 1      4  diagonal     Mixed
conv.weight        4 x 3 x 2     24  kron expand  Conv1d
norm.weight        4              4  diagonal     GroupNorm
norm.bias          4              4  frozen       left out by names=
grouped.weight     4 x 2 x 1      8  diagonal     Conv1d in 2 groups
grouped.bias       4              4  diagonal     Conv1d in 2 groups
cell.weight_ih_l0  12 x 4        48  diagonal     GRU
cell.weight_hh_l0  12 x 4        48  diagonal     GRU
tie.weight         4 x 4         16  diagonal     tied: tie, other share it
head.weight        3 x 4         12  kron expand  Linear
head.bias          3              3  frozen       requires_grad=False
175 parameters: 75.4 % diagonal, 20.6 % kron expand, 4.0 % frozen""",
    )
    assert coverage.totals == {"diagonal": 132, "kron expand": 36, "frozen": 7}
    assert sum(coverage.totals.values()) == sum(p.numel() for p in model.parameters())
    assert set(laplace.posterior().names) == {p.name for p in coverage.parameters if p.structure != "frozen"}


def test_the_coverage_of_the_other_structures():
    model, inputs, labels = small_classifier()
    for structure, name in (("diag", "diagonal"), ("full", "full")):
        coverage = Laplace(model, hessian_structure=structure).fit([(inputs, labels)]).coverage()
        assert coverage.totals == {name: 31}
        assert {p.reason for p in coverage.parameters} == {f"hessian_structure={structure!r}"}
    reduced = Laplace(model, hessian_structure="kron", kfac_approx="reduce").fit([(inputs, labels)])
    assert reduced.coverage().totals == {"kron reduce": 31}
    assert reduced.posterior().info.settings["kfac_approx"] == "reduce"
