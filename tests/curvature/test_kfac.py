"""Kronecker factors against the dense generalised Gauss-Newton matrix."""

import pytest
import torch
from test_layers import built, names_of
from torch import nn

from bayespass import InvalidInput, Laplace
from bayespass.curvature.dense import dense_ggn
from bayespass.curvature.diagonal import diagonal_curvature
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
    factors, _, loss, n = kfac(model, loader, ("weight", "bias"), "regression", 0.5)
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
    factors, _, _, _ = kfac(model, loader, every(model), likelihood, sigma)

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
    factors, _, _, _ = kfac(model, [(inputs, labels)], every(model), "classification")
    block, _, _ = dense_ggn(model, [(inputs, labels)], ("0.bias", "2.bias"), "classification")
    torch.testing.assert_close(factors["0"].outputs, block[:4, :4])
    torch.testing.assert_close(factors["2"].outputs, block[4:, 4:])


def test_positions_count_as_rows():
    """Tokens with a prediction each are the same as so many rows, where they do not interact."""
    model = network()
    inputs, labels = torch.randn(5, 6, 3, dtype=torch.float64), torch.randint(3, (5, 6))
    tokens, _, loss, n = kfac(model, [(inputs, labels)], every(model), "classification")
    rows, _, same_loss, _ = kfac(model, [(inputs.flatten(0, 1), labels.flatten())], every(model), "classification")
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
    factors, _, _, _ = kfac(model, [(inputs, targets)], ("0.weight",), "regression", 1.0)
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
    exact, _, _, _ = kfac(model, [(inputs, targets)], names, likelihood, sigma)
    draws = [kfac(model, [(inputs, targets)], names, likelihood, sigma, "mc", seed=seed)[0] for seed in range(200)]
    for path, factor in exact.items():
        found = torch.stack([draw[path].outputs for draw in draws])
        assert (((found.mean(0) - factor.outputs) / (found.std(0) / 200**0.5 + 1e-9)).abs() < 5).all()
        torch.testing.assert_close(draws[0][path].inputs, factor.inputs)


def test_empirical_fisher_equals_a_loop():
    model, (inputs, labels) = network(), data()
    factors, _, _, _ = kfac(model, [(inputs, labels)], every(model), "classification", curvature="ef")
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
    factors, _, _, _ = kfac(model, [(inputs, targets)], ("layer.weight",), "regression", 1.0)
    w = model.layer.weight.detach()
    both = torch.cat([inputs, inputs @ w.T])
    torch.testing.assert_close(factors["layer"].inputs, both.T @ both / 48)
    torch.testing.assert_close(factors["layer"].outputs, 24 * (w.T @ w + torch.eye(3, dtype=torch.float64)))


def linear_network(*layers):
    return nn.Sequential(*layers).double().eval()


def blocks_of(model, inputs, targets, approx):
    """The Kronecker product of every weight, and the true block beside it, with Gaussian noise."""
    factors, diagonal, _, _ = kfac(model, [(inputs, targets)], every(model), "regression", 0.5, kfac_approx=approx)
    assert not diagonal
    for factor in factors.values():
        true, _, _ = dense_ggn(model, [(inputs, targets)], (factor.weight,), "regression", 0.5)
        pair = (factor.inputs, factor.outputs) if factor.transposed else (factor.outputs, factor.inputs)
        yield torch.kron(*pair), true


def test_expand_is_exact_where_every_position_has_its_own_prediction():
    """Two linear layers on tokens, and a convolution as a linear layer on patches."""
    tokens = linear_network(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))
    inputs = torch.randn(5, 6, 3, dtype=torch.float64)
    for found, true in blocks_of(tokens, inputs, torch.randn(5, 6, 2, dtype=torch.float64), "expand"):
        torch.testing.assert_close(found, true)
    pictures = torch.randn(5, 2, 6, 6, dtype=torch.float64)
    convolution = linear_network(nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False))
    targets = torch.randn(5, 3, 3, 3, dtype=torch.float64)
    ((found, true),) = blocks_of(convolution, pictures, targets, "expand")
    torch.testing.assert_close(found, true)
    patches = nn.functional.unfold(pictures, 3, stride=2, padding=1).mT  # (5, 9, 18)
    same = linear_network(nn.Linear(18, 3, bias=False))
    ((as_linear, _),) = blocks_of(same, patches, torch.randn(5, 9, 3, dtype=torch.float64), "expand")
    torch.testing.assert_close(found, as_linear)


class Mean(nn.Module):
    def forward(self, x):
        return x.flatten(2).mean(2) if x.dim() == 4 else x.mean(1)


def test_reduce_is_exact_where_positions_are_averaged():
    inputs, targets = torch.randn(5, 6, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    tokens = linear_network(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False), Mean())
    for found, true in blocks_of(tokens, inputs, targets, "reduce"):
        torch.testing.assert_close(found, true)
    pictures = torch.randn(5, 2, 6, 6, dtype=torch.float64)
    convolution = linear_network(nn.Conv2d(2, 3, 3, bias=False), Mean(), nn.Linear(3, 2, bias=False))
    for found, true in blocks_of(convolution, pictures, targets, "reduce"):
        torch.testing.assert_close(found, true)
    for found, true in blocks_of(tokens, inputs, targets, "expand"):  # of which "expand" keeps a sixth
        assert not torch.allclose(found, true, rtol=0.5)


def test_without_positions_the_two_are_one():
    model, (inputs, labels) = network(), data()
    expand, reduce = (
        kfac(model, [(inputs, labels)], every(model), "classification", kfac_approx=approx)[0]
        for approx in ("expand", "reduce")
    )
    for path, factor in expand.items():
        torch.testing.assert_close(factor.inputs, reduce[path].inputs)
        torch.testing.assert_close(factor.outputs, reduce[path].outputs)
    with pytest.raises(InvalidInput, match="'expand' or 'reduce'; got 'mean'"):
        kfac(model, [(inputs, labels)], every(model), "classification", kfac_approx="mean")


def test_the_transposed_layer_of_gpt2_swaps_its_sides():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    plain, turned = nn.Linear(3, 2).double().eval(), Conv1D(2, 3).double().eval()
    with torch.no_grad():
        turned.weight.copy_(plain.weight.T)
        turned.bias.copy_(plain.bias)
    inputs, targets = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    ((found, true),) = blocks_of(turned, inputs, targets, "expand")
    torch.testing.assert_close(found, true)
    wanted = Laplace(plain, "regression", "kron", sigma_noise=0.5).fit([(inputs, targets)]).posterior()
    other = Laplace(turned, "regression", "kron", sigma_noise=0.5).fit([(inputs, targets)]).posterior()
    torch.testing.assert_close(other.variance["weight"].T, wanted.variance["weight"])


KRON = {
    "cnn": {"0", "6"},  # not the grouped convolution, the norms
    "conv1d": {"0", "3"},
    "layer norm": {"0", "2"},
    "tied": {"mix"},
    "reused": {"layer", "head"},
    "by hand": {"first", "second"},  # the bias of "second"
    "words": {"mix", "head"},
    "tokens": {"embed", "block.linear1", "block.linear2", "head"},  # not the fused attention, the class token
    "lstm": {"head"},
}


@pytest.mark.parametrize("name", KRON)
def test_other_parameters_get_their_diagonal_in_the_same_pass(name):
    model, inputs, _ = built(name)
    outputs = model(inputs)
    labels = torch.arange(outputs[..., 0].numel()).view(outputs.shape[:-1]) % outputs.shape[-1]
    loader = [(inputs, labels)]
    names = tuple(names_of(model))
    factors, diagonal, _, _ = kfac(model, loader, names, "classification")
    assert set(factors) == KRON[name]
    whole, _, _ = diagonal_curvature(model, loader, names, "classification")
    paired = {n for factor in factors.values() for n in (factor.weight, factor.bias) if n is not None}
    assert set(diagonal) == set(names) - paired
    for key, value in diagonal.items():
        torch.testing.assert_close(value, whole[key])


@pytest.mark.parametrize("name", ["cnn", "tokens", "reused"])
def test_a_small_memory_changes_nothing(name):
    model, inputs, _ = built(name)
    loader, names = [(inputs, torch.arange(len(inputs)) % 3)], tuple(names_of(model))
    factors, diagonal, loss, n = kfac(model, loader, names, "classification")
    small, rest, same_loss, same_n = kfac(model, loader, names, "classification", max_memory=1)
    assert (n, loss) == (same_n, pytest.approx(same_loss))
    for path, factor in factors.items():
        torch.testing.assert_close(small[path].inputs, factor.inputs)
        torch.testing.assert_close(small[path].outputs, factor.outputs)
    for key, value in diagonal.items():
        torch.testing.assert_close(rest[key], value)


def test_a_first_batch_of_one_row_is_checked_too():
    model, inputs, _ = built("by hand")
    labels = torch.arange(len(inputs)) % 3
    one = list(zip(inputs.split(1), labels.split(1), strict=True))
    names = tuple(names_of(model))
    factors, diagonal, _, _ = kfac(model, one, names, "classification")
    _, wanted, _, _ = kfac(model, [(inputs, labels)], names, "classification")
    assert factors["second"].weight is None
    for key, value in wanted.items():
        torch.testing.assert_close(diagonal[key], value)


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
