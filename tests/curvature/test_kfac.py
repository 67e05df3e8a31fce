"""Kronecker factors against the dense generalised Gauss-Newton matrix."""

import pytest
import torch
from torch import nn

from bayespass import InvalidInput
from bayespass.curvature.dense import LARGEST, dense_ggn
from bayespass.curvature.kfac import kfac
from bayespass.curvature.output import output_root


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)).to(dtype).eval()


def data(n=24, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, generator=generator, dtype=dtype), torch.randint(3, (n,), generator=generator)


def every(model):
    return tuple(name for name, _ in model.named_parameters())


@pytest.mark.parametrize("split", [24, 7, 1])
def test_one_linear_layer_with_gaussian_noise_is_exact(split):
    """G kron A is the whole block of the weight, whatever the batches."""
    torch.manual_seed(0)
    model, (inputs, _) = nn.Linear(3, 2).double().eval(), data()
    targets = torch.randn(24, 2, dtype=torch.float64)
    loader = list(zip(inputs.split(split), targets.split(split), strict=True))
    factors, loss, n = kfac(model, loader, ("weight", "bias"), "regression", 0.5)
    block, expected_loss, _ = dense_ggn(model, [(inputs, targets)], ("weight", "bias"), "regression", 0.5)
    torch.testing.assert_close(torch.kron(factors[""].outputs, factors[""].inputs), block[:6, :6])
    torch.testing.assert_close(factors[""].outputs, block[6:, 6:])
    assert (n, loss) == (24, pytest.approx(expected_loss))


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_factors_by_their_definition(likelihood):
    """A = mean a a^T and G = sum J^T H J with J the Jacobian of the output in y, layer by layer and row by row."""
    model, (inputs, labels) = network(), data()
    sigma = None if likelihood == "classification" else 0.7
    targets = labels if sigma is None else torch.randn(24, 3, dtype=torch.float64)
    loader = list(zip(inputs.split(10), targets.split(10), strict=True))
    factors, _, _ = kfac(model, loader, every(model), likelihood, sigma)

    hidden = torch.relu(inputs @ model[0].weight.T + model[0].bias).detach()
    for path, a in (("0", inputs), ("2", hidden)):
        torch.testing.assert_close(factors[path].inputs, a.T @ a / 24)
    first = second = 0
    for x in inputs:
        y = (x @ model[0].weight.T + model[0].bias).detach()
        out = model[2](torch.relu(y)).detach()
        p = torch.softmax(out, -1)
        inner = torch.diag(p) - torch.outer(p, p) if sigma is None else torch.eye(3, dtype=torch.float64) / sigma**2
        jacobian = model[2].weight.detach() * (y > 0)
        first, second = first + jacobian.T @ inner @ jacobian, second + inner
    torch.testing.assert_close(factors["0"].outputs, first)
    torch.testing.assert_close(factors["2"].outputs, second)


def test_biases_without_positions_are_exact():
    model, (inputs, labels) = network(), data()
    factors, _, _ = kfac(model, [(inputs, labels)], every(model), "classification")
    block, _, _ = dense_ggn(model, [(inputs, labels)], ("0.bias", "2.bias"), "classification")
    torch.testing.assert_close(factors["0"].outputs, block[:4, :4])
    torch.testing.assert_close(factors["2"].outputs, block[4:, 4:])


def test_positions_count_as_rows():
    """Tokens with a prediction each are the same as so many rows, where they do not interact."""
    model = network()
    inputs, labels = torch.randn(5, 6, 3, dtype=torch.float64), torch.randint(3, (5, 6))
    tokens, loss, n = kfac(model, [(inputs, labels)], every(model), "classification")
    rows, same_loss, _ = kfac(model, [(inputs.flatten(0, 1), labels.flatten())], every(model), "classification")
    for path in ("0", "2"):
        torch.testing.assert_close(tokens[path].inputs, rows[path].inputs)
        torch.testing.assert_close(tokens[path].outputs, rows[path].outputs)
    assert n == 5
    assert loss == pytest.approx(same_loss)


def test_positions_that_are_pooled_sum_their_gradients_apart():
    class Pooled(nn.Sequential):
        def forward(self, x):
            return super().forward(x).mean(1)

    model = Pooled(nn.Linear(3, 2, bias=False)).double().eval()
    inputs, targets = torch.randn(5, 4, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    factors, _, _ = kfac(model, [(inputs, targets)], ("0.weight",), "regression", 1.0)
    flat = inputs.flatten(0, 1)
    torch.testing.assert_close(factors["0"].inputs, flat.T @ flat / 20)
    torch.testing.assert_close(factors["0"].outputs, torch.eye(2, dtype=torch.float64) * 5 * 4 / 16)


@pytest.mark.parametrize("sigma", [None, 0.5, "predicted"])
def test_drawn_targets_average_to_the_exact_factors(sigma):
    model, (inputs, labels) = network(), data()
    likelihood, targets = "classification", labels
    if sigma is not None:
        likelihood, targets = "regression", torch.randn(24, 3, dtype=torch.float64)
    if sigma == "predicted":
        model, targets = nn.Sequential(*network(), nn.Linear(3, 2).double()).eval(), targets[:, 0]
    names = every(model)
    exact, _, _ = kfac(model, [(inputs, targets)], names, likelihood, sigma)
    draws = [kfac(model, [(inputs, targets)], names, likelihood, sigma, "mc", seed=seed)[0] for seed in range(200)]
    for path, factor in exact.items():
        found = torch.stack([draw[path].outputs for draw in draws])
        assert (((found.mean(0) - factor.outputs) / (found.std(0) / 200**0.5 + 1e-9)).abs() < 5).all()
        torch.testing.assert_close(draws[0][path].inputs, factor.inputs)


def test_empirical_fisher_equals_a_loop():
    model, (inputs, labels) = network(), data()
    factors, _, _ = kfac(model, [(inputs, labels)], every(model), "classification", curvature="ef")
    residual = torch.softmax(model(inputs), -1).detach() - torch.nn.functional.one_hot(labels, 3)
    torch.testing.assert_close(factors["2"].outputs, residual.T @ residual)


def test_a_layer_that_is_called_twice_sums_its_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3, bias=False)

        def forward(self, x):
            return self.layer(self.layer(x))

    model = Twice().double().eval()
    inputs, targets = data()[0], torch.randn(24, 3, dtype=torch.float64)
    factors, _, _ = kfac(model, [(inputs, targets)], ("layer.weight",), "regression", 1.0)
    w = model.layer.weight.detach()
    both = torch.cat([inputs, inputs @ w.T])
    torch.testing.assert_close(factors["layer"].inputs, both.T @ both / 48)
    torch.testing.assert_close(factors["layer"].outputs, 24 * (w.T @ w + torch.eye(3, dtype=torch.float64)))


def test_parameters_elsewhere_are_refused_by_name():
    inputs, labels = torch.randn(4, 1, 6, 6), torch.tensor([0, 1, 2, 0])
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 3)).eval()
    with pytest.raises(InvalidInput, match=r"0\.weight belongs to a Conv2d; leave it out with names="):
        kfac(model, [(inputs, labels)], every(model), "classification")
    assert set(kfac(model, [(inputs, labels)], ("2.weight",), "classification")[0]) == {"2"}


def test_weights_that_are_used_elsewhere_are_refused_by_name():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0].mean(1))

    class ByHand(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return self.layer(x.mean(1)) + x[:, 0] @ self.layer.weight

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.last.weight = self.first.weight

        def forward(self, x):
            return self.last(self.first(x).tanh()).mean(1)

    loader = [(torch.randn(5, 3, 4), torch.tensor([0, 1, 2, 0, 1]))]
    with pytest.raises(InvalidInput, match=r"does not depend on attention\.out_proj\.weight through calls"):
        kfac(Attending().eval(), loader, ("attention.out_proj.weight",), "classification")
    with pytest.raises(
        InvalidInput, match=r"does not depend on layer\.weight through calls of that linear layer alone"
    ):
        kfac(ByHand().eval(), loader, ("layer.weight",), "classification")
    with pytest.raises(InvalidInput, match=r"first\.weight is tied: first, last share it"):
        kfac(Tied().eval(), loader, ("first.weight",), "classification")


def test_the_model_is_left_as_it_was():
    model, (inputs, labels) = network(), data()
    kfac(model, [(inputs, labels)], every(model), "classification")
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("outputs", "likelihood", "sigma"),
    [
        (torch.randn(4, 5, 3).double(), "classification", None),
        (torch.randn(4, 2).double(), "regression", 0.3),
        (torch.randn(4).double(), "regression", 0.3),
        (torch.randn(4, 3, 2).double(), "regression", "predicted"),
    ],
)
def test_the_root_squares_to_the_curvature_in_the_output(outputs, likelihood, sigma):
    root = output_root(outputs, likelihood, sigma)
    found = root.mT @ root
    assert found.shape[0] == 4
    if likelihood == "classification":
        p = outputs.softmax(-1)
        expected = torch.diag_embed(p) - p[..., None] * p[..., None, :]
    elif sigma == "predicted":
        expected = torch.diag_embed(torch.stack([torch.exp(-outputs[..., 1]), torch.full((4, 3), 0.5).double()], -1))
    else:
        expected = (torch.eye(outputs[0].numel()).double() / 0.09).expand(4, 1, -1, -1)
    torch.testing.assert_close(found, expected.view_as(found))


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
        found, _, n = dense_ggn(plain, loader, names, "classification", chunk_size=4)
        torch.testing.assert_close(found, expected)
        assert n == 24


def test_dense_of_a_model_that_branches_on_its_data():
    class Branching(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if bool((x < 100).all()) else super().forward(x) * 0

    model, (inputs, labels) = nn.Sequential(nn.Linear(3, 3)).double().eval(), data()
    plain = dense_ggn(model, [(inputs, labels)], every(model), "classification", chunk_size=5)[0]
    branching = dense_ggn(Branching(*model), [(inputs, labels)], every(model), "classification", chunk_size=5)[0]
    torch.testing.assert_close(branching, plain)


def test_dense_refuses_what_does_not_fit():
    model = nn.Linear(100, 60)
    assert sum(p.numel() for p in model.parameters()) > LARGEST
    with pytest.raises(InvalidInput, match=r"at most 5000 parameters, weight, bias, \.\.\. have 6060; choose fewer"):
        dense_ggn(model, [], every(model), "classification")
