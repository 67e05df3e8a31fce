"""Diagonals of any network, and of networks that predict their own noise; more in tests/posterior/test_laplace.py."""

import numpy as np
import pytest
import torch
from test_layers import MODELS, built, names_of, reference
from torch import nn
from torch.distributions import Normal
from torch.func import functional_call, jacrev

from bayespass import InvalidInput, Laplace, MonteCarlo, SinglePass
from bayespass.curvature.diagonal import diagonal_curvature

# The references differentiate attention under vmap, where PyTorch loops and says so.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


@pytest.fixture
def problem():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 6), nn.Unflatten(1, (3, 2))).double().eval()
    inputs = torch.randn(12, 3, dtype=torch.float64)
    return model, inputs, torch.randn(12, 3, dtype=torch.float64)


def curvature_of(model, inputs, targets, kind, seed=0):
    names = tuple(dict(model.named_parameters()))
    return diagonal_curvature(model, [(inputs, targets)], names, "regression", "predicted", kind, seed=seed)


def score(output, target):
    """Gradient of the log density in (mean, log variance), by autograd through torch's Normal."""
    output = output.detach().requires_grad_()
    return torch.autograd.grad(Normal(output[0], (output[1] / 2).exp()).log_prob(target), output)[0]


def fisher(output):
    """E[score score^T] by Gauss-Hermite quadrature, exact for the polynomials that occur."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    total = torch.zeros(2, 2, dtype=output.dtype)
    for node, weight in zip(nodes, weights / weights.sum(), strict=True):
        gradient = score(output, output[0].detach() + (output[1].detach() / 2).exp() * node)
        total += weight * torch.outer(gradient, gradient)
    return total


def test_ggn_equals_the_dense_fisher(problem):
    model, inputs, targets = problem
    found, loss, n = curvature_of(model, inputs, targets, "ggn")
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    expected = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for x in inputs:

        def output(theta, x=x):
            return functional_call(model, theta, (x.unsqueeze(0),)).squeeze(0)

        inner = torch.stack([fisher(pair) for pair in output(parameters)])
        for name, jacobian in jacrev(output)(parameters).items():
            flat = jacobian.flatten(2)  # (3, 2, P)
            expected[name] += torch.einsum("oap,oab,obp->p", flat, inner, flat).reshape(expected[name].shape)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-7)
    outputs = model(inputs).detach()
    density = Normal(outputs[..., 0], (outputs[..., 1] / 2).exp())
    assert (n, loss) == (12, pytest.approx(-density.log_prob(targets).sum().item()))


def test_drawn_targets_are_unbiased_for_it(problem):
    """Over 200 seeds the mean of each layer's sum lies within five standard errors of the exact one."""
    model, inputs, targets = problem
    exact = curvature_of(model, inputs, targets, "ggn")[0]
    runs = [curvature_of(model, inputs, targets, "mc", seed)[0] for seed in range(200)]
    for name, value in exact.items():
        drawn = torch.stack([run[name].sum() for run in runs]).double()
        assert abs(float(drawn.mean() - value.sum())) < 5 * float(drawn.std()) / 200**0.5
        assert float(drawn.std()) > 0


def test_empirical_fisher_equals_a_loop(problem):
    model, inputs, targets = problem
    found = curvature_of(model, inputs, targets, "ef")[0]
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x, y in zip(inputs, targets, strict=True):
        model.zero_grad()
        mean, log_variance = model(x.unsqueeze(0)).squeeze(0).unbind(-1)
        (-Normal(mean, (log_variance / 2).exp()).log_prob(y).sum()).backward()
        for name, parameter in model.named_parameters():
            expected[name] += parameter.grad.square()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-7)


def test_laplace_of_a_line_with_predicted_noise_is_its_closed_form():
    """Precision sum x^2 exp(-s) + a0 of the mean's weights and sum x^2 / 2 + a0 of the log variance's."""
    torch.manual_seed(0)
    model, inputs = nn.Linear(2, 2, bias=False).eval(), torch.randn(40, 2)
    loader = [(inputs, torch.randn(40))]
    posterior = Laplace(model, "regression", sigma_noise="predicted", prior_precision=0.5).fit(loader).posterior()
    precision = torch.exp(-model(inputs)[:, 1].detach())
    expected = torch.stack([inputs.square().T @ precision, inputs.square().sum(0) / 2]) + 0.5
    torch.testing.assert_close(1 / posterior.variance["weight"], expected)
    assert posterior.info.sigma_noise == "predicted"
    single, drawn = SinglePass(model, posterior)(inputs), MonteCarlo(model, posterior, 2000)(inputs)
    torch.testing.assert_close(single.total, drawn.total, rtol=0.2, atol=0)


def test_targets_that_do_not_fit():
    model = nn.Linear(2, 2).eval()
    with pytest.raises(InvalidInput, match="targets must have the shape of the means"):
        Laplace(model, "regression", sigma_noise="predicted").fit([(torch.randn(4, 2), torch.randn(4, 2))])
    with pytest.raises(InvalidInput, match="'predicted'"):
        Laplace(model, "regression", sigma_noise="learned")


@pytest.mark.parametrize("name", MODELS)
def test_of_any_network_it_is_the_diagonal_of_the_dense_matrix(name):
    """CNNs with batch and group norms, transformer layers, an LSTM, embeddings, tied and reused weights; in parts too."""
    model, inputs, _ = built(name)
    logits = model(inputs).detach()
    p = torch.softmax(logits, -1).flatten(0, -2)
    root = p.sqrt()[:, :, None] * (torch.eye(p.shape[1]) - p[:, None])
    labels = torch.arange(len(p)).view(logits.shape[:-1]) % p.shape[1]
    names = tuple(names_of(model))
    truth = reference(model, inputs)
    for max_memory in (2**30, 1):
        found, loss, n = diagonal_curvature(model, [(inputs, labels)], names, "classification", max_memory=max_memory)
        assert (n, loss) == (len(inputs), pytest.approx(-(p.log()[range(len(p)), labels.flatten()]).sum().item()))
        for key, value in found.items():
            jacobian = truth[key].reshape(*p.shape, -1)
            wanted = torch.einsum("nab,nbp->nap", root, jacobian).square().sum((0, 1))
            torch.testing.assert_close(value.flatten().double(), wanted, rtol=1e-5, atol=1e-9)


def test_half_precision_is_summed_in_single():
    """300 rows of equal squares, of which bfloat16 could not add the last."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).bfloat16().eval()
    loader = [(torch.ones(300, 1).bfloat16(), torch.zeros(300, 1).bfloat16())]
    found, _, _ = diagonal_curvature(model, loader, ("0.weight",), "regression", 1.0)
    assert float(found["0.weight"]) == pytest.approx(300 * float(model[1].weight.detach()) ** 2, rel=1e-3)
