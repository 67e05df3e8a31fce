"""Blocks of the Jacobian against `torch.func.jacrev`, and what is computed from them against dense matrices."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

from bayespass.curvature import blocks
from bayespass.curvature.layers import RowJacobian
from bayespass.curvature.output import curvature_rows, loss_rows, output_rows
from bayespass.errors import InvalidInput
from zoo_models import ZOO

# The references differentiate attention under vmap, where PyTorch loops and says so.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, numbers):
        return self.head(torch.tanh(self.mix(self.table(numbers))).mean(1))


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.second(F.relu(self.first(x), inplace=True))


class ByHand(nn.Module):
    """A weight that is used outside its layer, and one that is no layer's."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)
        self.shift = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)) + self.shift) + self.second.weight.square().sum(1)


class Tokens(nn.Module):
    """Class token, positions, fused attention, layer norm; tokens before rows inside."""

    def __init__(self, batch_first):
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 8)), nn.Embedding(5, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
        self.batch_first, self.head = batch_first, nn.Linear(8, 3)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1) + self.position(torch.arange(5)[None])
        x = self.block(x) if self.batch_first else self.block(x.transpose(0, 1)).transpose(0, 1)
        return self.head(x[:, 0])


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, numbers):
        return self.head(torch.tanh(self.mix(self.table(numbers))).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


def convolutional(**settings):
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, **settings), nn.BatchNorm2d(4), nn.GELU(), nn.Conv2d(4, 6, 2, stride=2, groups=2),
        nn.GroupNorm(3, 6), nn.Flatten(), nn.LazyLinear(3),
    )  # fmt: skip


def numbers(*shape):
    return torch.randint(0, 7, shape, generator=torch.Generator().manual_seed(1))


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3, bias=False)), (4, 5), 0),
    "cnn": (lambda: convolutional(padding=1), (4, 2, 6, 6), 0),
    "same padding": (lambda: convolutional(padding="same", dilation=2), (4, 2, 6, 6), 0),
    "circular": (lambda: convolutional(padding=1, padding_mode="circular"), (4, 2, 6, 6), 0),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3, padding=2), nn.Tanh(), nn.Flatten(), nn.LazyLinear(2)), (4, 2, 5), 0,
    ),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.LazyLinear(2)), (3, 1, 3, 3, 3), 2),
    "layer norm": (lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)), (4, 4, 5), 0),
    "tied": (Tied, numbers(4, 5), 1),
    "reused": (Reused, (4, 5), 0),
    "in place": (InPlace, (4, 5), 0),
    "by hand": (ByHand, (4, 5), 2),  # the weight, and the shift
    "words": (Words, numbers(4, 5), 0),
    "tokens": (lambda: Tokens(True), (4, 4, 3), None),
    "tokens first": (lambda: Tokens(False), (4, 4, 3), None),
    "as many tokens as rows": (lambda: Tokens(False), (5, 4, 3), None),
    "lstm": (Recurrent, (4, 6, 3), 4),
}  # fmt: skip


def built(name, dtype=torch.float64):
    torch.manual_seed(0)
    make, shape, others = MODELS[name]
    inputs = shape if isinstance(shape, torch.Tensor) else torch.randn(shape, dtype=dtype)
    model = make().to(dtype).eval()
    with torch.no_grad():
        model(inputs)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
                module.weight.normal_()
    return model, inputs, others


def names_of(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def reference(model, inputs, targets=None, rows=output_rows):
    """(n, R, *shape) by name."""
    theta = {name: p.detach() for name, p in model.named_parameters()}

    def scalars(values):
        return rows(functional_call(model, values, (inputs,)), targets)

    return jacrev(scalars)(theta)


def pieces_of(model, inputs, targets=None, rows=output_rows, **settings):
    jacobian = RowJacobian(model, names_of(model), **settings)
    return jacobian, list(jacobian.chunks(inputs, targets, rows))


@pytest.mark.parametrize("name", MODELS)
def test_blocks_equal_autograd(name):
    model, inputs, others = built(name)
    jacobian, ((outputs, place, pieces),) = pieces_of(model, inputs)
    torch.testing.assert_close(outputs, model(inputs))
    assert place == slice(0, len(inputs))
    found = {k: v for piece in pieces for k, v in blocks.dense(piece).items()}
    truth = reference(model, inputs)
    assert set(found) == set(names_of(model))
    assert others is None or len(jacobian.others) == others, jacobian.others
    for key, value in found.items():
        torch.testing.assert_close(value, truth[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["mlp", "cnn", "layer norm", "words", "tokens", "reused"])
def test_what_is_computed_from_blocks_equals_dense_matrices(name):
    model, inputs, _ = built(name)
    _, ((_, _, pieces),) = pieces_of(model, inputs)
    _, ((_, _, fewer),) = pieces_of(model, inputs[:3])
    truth, some = reference(model, inputs), reference(model, inputs[:3])
    for piece, other in zip(pieces, fewer, strict=True):
        names = blocks.parameter_names(piece)
        flat = torch.cat([truth[n].flatten(2) for n in names], -1)
        flat_other = torch.cat([some[n].flatten(2) for n in names], -1)
        for key, value in blocks.squares(piece).items():
            torch.testing.assert_close(value, truth[key].square().sum((0, 1)), rtol=1e-8, atol=1e-10)
        expected = flat.flatten(0, 1) @ flat_other.flatten(0, 1).mT
        torch.testing.assert_close(blocks.gram(piece, other), expected, rtol=1e-8, atol=1e-10)
        spread = {n: torch.rand(2, *truth[n].shape[2:], dtype=torch.float64) for n in names}
        for bases in ({}, {n: _basis(truth[n].shape[2]) for n in names}):
            right = {n: _basis(truth[n][0, 0].numel() // len(truth[n][0, 0])) for n in names if bases}
            sigma = torch.stack([_dense_covariance(truth, spread, names, bases, right, k) for k in range(2)])
            expected = flat @ sigma[:, None] @ flat.mT
            torch.testing.assert_close(blocks.covariance(piece, spread, bases, right), expected, rtol=1e-8, atol=1e-10)
            diagonal = expected.diagonal(dim1=-2, dim2=-1)
            torch.testing.assert_close(blocks.marginals(piece, spread, bases, right), diagonal, rtol=1e-8, atol=1e-10)


def _basis(size):
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]


def _dense_covariance(truth, spread, names, left, right, k):
    parts = []
    for n in names:
        turn = torch.kron(left[n], right[n]) if n in left else torch.eye(spread[n][k].numel(), dtype=torch.float64)
        parts.append(turn @ torch.diag(spread[n][k].flatten()) @ turn.mT)
    return torch.block_diag(*parts)


def test_the_output_layer_needs_no_gradients():
    model, inputs, _ = built("mlp")
    _, ((_, _, pieces),) = pieces_of(model, inputs)
    assert [piece.grads is None for piece in pieces] == [False, True]


@pytest.mark.parametrize("name", ["mlp", "tokens", "cnn"])
@pytest.mark.parametrize("kind", ["loss", "curvature"])
def test_other_scalars(name, kind):
    model, inputs, _ = built(name)
    targets = torch.arange(len(inputs)) % 2
    rows = loss_rows("classification") if kind == "loss" else curvature_rows("classification")
    _, ((_, _, pieces),) = pieces_of(model, inputs, targets, rows)
    truth = reference(model, inputs, targets, rows)
    for key, value in ((k, v) for piece in pieces for k, v in blocks.dense(piece).items()):
        torch.testing.assert_close(value, truth[key], rtol=1e-8, atol=1e-10)


def test_memory_splits_rows_and_sums_may_split_scalars():
    model, inputs, _ = built("tokens")
    whole = reference(model, inputs)
    jacobian, parts = pieces_of(model, inputs, max_memory=60_000)
    assert len(parts) > 1
    for key in names_of(model):
        joined = torch.cat([blocks.dense(p)[key] for _, _, ps in parts for p in ps if key in blocks.parameter_names(p)])
        torch.testing.assert_close(joined, whole[key], rtol=1e-8, atol=1e-10)
    with pytest.raises(InvalidInput, match=r"more than max_memory .* Raise max_memory, choose fewer parameters"):
        list(jacobian.__class__(model, names_of(model), 9_000).chunks(inputs, None))
    total = {}
    for _, _, pieces in RowJacobian(model, names_of(model), 9_000).chunks(inputs, None, additive=True):
        for key, value in ((k, v) for piece in pieces for k, v in blocks.squares(piece).items()):
            total[key] = total.get(key, 0) + value
    for key, value in total.items():
        torch.testing.assert_close(value, whole[key].square().sum((0, 1)), rtol=1e-8, atol=1e-10)


ZOO_NAMES = ("ViT", "Swin", "BERT", "GPT-2 (classification)", "ConvNeXt", "GPT-2 (LM)")


@pytest.mark.parametrize("entry", [e for e in ZOO if e.name in ZOO_NAMES], ids=lambda e: e.name)
def test_models_of_transformers(entry):
    torch.manual_seed(0)
    model, _, inputs = entry.build()
    inputs = {key: value[:2] for key, value in inputs.items()}
    model = model.double()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    names = names_of(model)
    jacobian = RowJacobian(model, names)
    rows = mixed_rows
    ((_, _, pieces),) = jacobian.chunks(inputs, None, rows)
    theta = {name: p.detach() for name, p in model.named_parameters()}
    for k in range(2):
        leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
        scalars = rows(functional_call(model, leaves, (), inputs).logits, None)[k]
        truth = dict(
            zip(names, torch.autograd.grad(scalars[0], [leaves[n] for n in names], allow_unused=True), strict=True)
        )
        for piece in pieces:
            for name, block in blocks.dense(piece).items():
                expected = torch.zeros_like(theta[name]) if truth[name] is None else truth[name]
                torch.testing.assert_close(block[k, 0], expected, rtol=1e-6, atol=1e-9)
    share = sum(theta[name].numel() for name in jacobian.others) / sum(map(torch.numel, theta.values()))
    assert share < 0.3, jacobian.others


def mixed_rows(outputs, targets):
    flat = outputs.reshape(len(outputs), -1)
    return torch.stack([flat @ torch.linspace(-1, 1, flat.shape[1], dtype=flat.dtype), flat.square().sum(1)], 1)


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_weights_computed_from_other_parameters_are_left_to_autograd(wrap):
    torch.manual_seed(0)
    model = nn.Sequential(wrap(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    inputs = torch.randn(3, 4, dtype=torch.float64)
    _, ((_, _, pieces),) = pieces_of(model, inputs)
    found = {name: part for piece in pieces for name, part in blocks.dense(piece).items()}
    for name, expected in reference(model, inputs).items():
        torch.testing.assert_close(found[name], expected)


class Routed(nn.Module):
    """Every row through one of two layers, so that some scalars do not depend on some parameters."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 2), nn.ModuleList([nn.Linear(4, 3) for _ in range(2)])

    def forward(self, x):
        gate = self.gate(x).softmax(-1)
        out = x.new_zeros(len(x), 3)
        for k, expert in enumerate(self.experts):
            rows = (gate.argmax(-1) == k).nonzero()[:, 0]
            if len(rows):
                out = out.index_copy(0, rows, expert(x[rows]) * gate[rows, k : k + 1])
        return out


def test_rows_that_some_parameters_do_not_move():
    torch.manual_seed(0)
    model = Routed().double().eval().requires_grad_(False)
    inputs = torch.randn(8, 4, dtype=torch.float64)
    assert 0 < int(model.gate(inputs).argmax(-1).sum()) < 8
    jacobian = RowJacobian(model, [name for name, _ in model.named_parameters()])
    for rows in (slice(0, 2), slice(0, 8), slice(3, 4)):
        ((_, _, pieces),) = jacobian.chunks(inputs[rows], None)
        found = {name: part for piece in pieces for name, part in blocks.dense(piece).items()}
        for k, row in enumerate(inputs[rows]):
            theta = {name: p.clone().requires_grad_() for name, p in model.named_parameters()}
            outputs = functional_call(model, theta, (row[None],))[0]
            for r in range(3):
                options = {"retain_graph": True, "materialize_grads": True}
                grads = torch.autograd.grad(outputs[r], list(theta.values()), **options)
                for name, grad in zip(theta, grads, strict=True):
                    torch.testing.assert_close(found[name][k, r], grad)


class Shifted(Tied):
    """Tied weights, and a parameter that no layer answers for."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, numbers):
        return self.head(torch.tanh(self.mix(self.table(numbers) + self.shift)).mean(1))


def test_a_fixed_tied_weight_beside_a_parameter_that_goes_row_by_row():
    torch.manual_seed(0)
    model, inputs = Shifted().double().eval(), numbers(3, 5)
    ((_, _, pieces),) = RowJacobian(model, ["shift"]).chunks(inputs, None)
    truth = jacrev(lambda shift: functional_call(model, {"shift": shift}, (inputs,)))(model.shift.detach())
    torch.testing.assert_close(blocks.dense(pieces[0])["shift"], truth)


def test_it_runs_where_gradients_are_off_and_on_one_row():
    model, inputs, _ = built("by hand")
    jacobian = RowJacobian(model, names_of(model))
    with torch.no_grad():
        ((_, _, pieces),) = jacobian.chunks(inputs[:1], None)
    truth = reference(model, inputs[:1])
    for key, value in ((k, v) for piece in pieces for k, v in blocks.dense(piece).items()):
        torch.testing.assert_close(value, truth[key], rtol=1e-9, atol=1e-11)


def test_an_output_that_is_changed_in_place_is_not_its_layers():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(5, 3), nn.ReLU(inplace=True)).double().eval(), torch.randn(4, 5).double()
    ((_, _, pieces),) = RowJacobian(model, names_of(model)).chunks(inputs, None)
    truth = reference(model, inputs)
    for key, value in ((k, v) for piece in pieces for k, v in blocks.dense(piece).items()):
        torch.testing.assert_close(value, truth[key], rtol=1e-9, atol=1e-11)
