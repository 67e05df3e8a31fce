"""The whole matrix against its definition, and the closed forms of a last layer against it."""

import pytest
import torch
from test_kfac import data, every, network
from test_layers import built, names_of, reference
from torch import nn

from bayespass import InvalidInput, Laplace
from bayespass.curvature.dense import dense_ggn, largest_matrix
from bayespass.curvature.diagonal import diagonal_curvature
from bayespass.curvature.kfac import kfac
from bayespass.curvature.last_layer import Features, LastLayer

# The references differentiate attention under vmap, where PyTorch loops and says so.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def test_dense_is_the_definition_and_independent_of_batches():
    model, (inputs, labels) = network(), data()
    names = every(model)
    expected = 0
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    plain = nn.Sequential(model[0], nn.ReLU(), model[2])
    for x in inputs:

        def logits(theta, x=x):
            return torch.func.functional_call(plain, theta, (x,))

        p = torch.softmax(logits(parameters), -1)
        found = torch.func.jacrev(logits)(parameters)
        jacobian = torch.cat([found[name].flatten(1) for name in names], 1)
        expected = expected + jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
    for split in (24, 5):
        loader = list(zip(inputs.split(split), labels.split(split), strict=True))
        found, _, n = dense_ggn(plain, loader, names, "classification", max_memory=40_000)
        torch.testing.assert_close(found, expected)
        assert n == 24


def test_dense_of_a_model_that_branches_on_its_data():
    class Branching(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if bool((x < 100).all()) else super().forward(x) * 0

    model, (inputs, labels) = nn.Sequential(nn.Linear(3, 3)).double().eval(), data()
    plain = dense_ggn(model, [(inputs, labels)], every(model), "classification")[0]
    branching = dense_ggn(Branching(*model), [(inputs, labels)], every(model), "classification")[0]
    torch.testing.assert_close(branching, plain)


def test_dense_refuses_what_does_not_fit():
    model = nn.Linear(100, 60)
    with pytest.raises(InvalidInput, match=r"6060 parameters .* 1,401 MiB, more than max_memory .* with names= "):
        dense_ggn(model, [], every(model), "classification")
    assert largest_matrix(2**30) == 5181
    laplace = Laplace(model.eval(), hessian_structure="full", max_memory=10**6)
    with pytest.raises(InvalidInput, match=r"more than max_memory \(1 MiB, 158 parameters\)"):
        laplace.fit([(torch.randn(2, 100), torch.tensor([0, 1]))])


@pytest.mark.parametrize("name", ["cnn", "words", "tokens", "reused", "lstm"])
@pytest.mark.parametrize("max_memory", [2**30, 250_000])
def test_of_any_network_it_is_jacobians_and_curvature(name, max_memory):
    model, inputs, _ = built(name)
    names = [n for n in names_of(model) if "bias" in n or "norm" in n][:6]
    logits = model(inputs).detach()
    p = torch.softmax(logits, -1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    truth = reference(model, inputs)
    jacobian = torch.cat([truth[n].flatten(2) for n in names], -1)
    labels = torch.zeros(len(inputs), dtype=torch.long)
    found, _, _ = dense_ggn(model, [(inputs, labels)], tuple(names), "classification", max_memory=max_memory)
    torch.testing.assert_close(found, torch.einsum("nap,nab,nbq->pq", jacobian, inner, jacobian))


def seven_classes(likelihood="classification", sigma=None):
    """A last layer of seven outputs and the same through an identity that hides it."""
    torch.manual_seed(0)
    classes = 2 if sigma == "predicted" else 7
    layers = nn.Sequential(nn.Linear(3, 5), nn.Tanh()), nn.Linear(5, classes)
    plain = nn.Sequential(*layers).double().eval()
    hidden = nn.Sequential(*layers, nn.Unflatten(1, (classes, 1)), nn.Flatten()).double().eval()
    inputs = torch.randn(30, 3, dtype=torch.float64)
    targets = torch.randn(30, classes, dtype=torch.float64)
    if likelihood == "classification":
        targets = torch.randint(classes, (30,))
    return plain, hidden, inputs, targets[:, 0] if sigma == "predicted" else targets


@pytest.mark.parametrize("sigma", [None, 0.5, "predicted"])
@pytest.mark.parametrize("names", [("1.weight", "1.bias"), ("1.bias", "1.weight"), ("1.weight",), ("1.bias",)])
def test_a_last_layer_has_closed_forms(sigma, names):
    """Its diagonal, factors and matrix equal those by backward passes, which the hidden layer takes."""
    likelihood = "classification" if sigma is None else "regression"
    plain, hidden, inputs, targets = seven_classes(likelihood, sigma)
    assert isinstance(LastLayer(plain, names).features(inputs), Features)
    assert LastLayer(hidden, names).features(inputs) is None
    loader = list(zip(inputs.split(11), targets.split(11), strict=True))
    one, other = (dense_ggn(model, loader, names, likelihood, sigma) for model in (plain, hidden))
    torch.testing.assert_close(one[0], other[0])
    assert one[1:] == (pytest.approx(other[1]), 30)
    diagonal, by_passes = (diagonal_curvature(model, loader, names, likelihood, sigma)[0] for model in (plain, hidden))
    for name in names:
        torch.testing.assert_close(diagonal[name], by_passes[name])
    torch.testing.assert_close(
        torch.cat([diagonal[name].flatten() for name in names]), other[0].diagonal().float(), rtol=1e-5, atol=1e-6
    )
    found, same = (kfac(model, loader, names, likelihood, sigma)[0]["1"] for model in (plain, hidden))
    torch.testing.assert_close(found.inputs, same.inputs)
    torch.testing.assert_close(found.outputs, same.outputs)
    assert (found.weight, found.bias) == (same.weight, same.bias)


def test_what_is_no_last_layer_is_not_taken_for_one():
    class Changed(nn.Sequential):
        def forward(self, x):
            return super().forward(x).mul_(2)

    class ByHand(nn.Sequential):
        def forward(self, x):
            return self[2](x[:, :5] + self[2].weight.square().sum(0))

    plain, _, inputs, targets = seven_classes()
    layers = [plain[0], nn.Identity(), plain[1]]
    for model, given in ((Changed(*layers), inputs), (ByHand(*layers), torch.randn(30, 5, dtype=torch.float64))):
        assert LastLayer(model.eval(), ("2.weight",)).features(given) is None
        truth = reference(model, given)["2.weight"].flatten(2)
        p = torch.softmax(model(given), -1).detach()
        inner = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        found, _, _ = dense_ggn(model, [(given, targets)], ("2.weight",), "classification")
        torch.testing.assert_close(found, torch.einsum("nap,nab,nbq->pq", truth, inner, truth))
    assert LastLayer(plain, ("0.0.weight",)).features(inputs) is None
    assert LastLayer(plain, ("0.0.bias", "1.weight")).features(inputs) is None


def test_a_thousand_classes_take_no_backward_pass(monkeypatch):
    """The features' forward pass is all; J of one row alone would have half a billion entries."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 512), nn.Tanh(), nn.Linear(512, 1000)).eval()
    loader = [(torch.randn(16, 8), torch.randint(1000, (16,)))] * 2
    names = ("2.weight", "2.bias")
    passes = []
    backward = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: passes.append(1) or backward(*a, **k))
    values, _, n = diagonal_curvature(model, loader, names, "classification")
    factors, _, _, _ = kfac(model, loader, names, "classification")
    assert len(passes) == 2  # to check, once each, that the weight is used nowhere else
    assert n == 32
    p = torch.softmax(torch.cat([model(x) for x, _ in loader]), -1).detach()
    torch.testing.assert_close(values["2.bias"], (p * (1 - p)).sum(0))
    torch.testing.assert_close(factors["2"].outputs.diagonal(), values["2.bias"])
