import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

from bayespass import InvalidInput
from bayespass.curvature.operator import RowOperator
from bayespass.curvature.output import curvature_rows, output_rows
from bayespass.curvature.products import exact_products
from bayespass.curvature.row_blocks import join_blocks, shuffled_blocks, split_blocks
from bayespass.demo.models import SmallCNN, SmallViT


class Recurrent(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell, self.head = cell(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(x)[:, 0])


class OldCube(torch.autograd.Function):
    """Without `setup_context` and `jvp`: torch.func refuses it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class Old(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(OldCube.apply(self.first(x)))


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "cnn": (lambda: SmallCNN(2, 3), (1, 8, 8)),
    "vit": (lambda: SmallViT(8, 1, 2, 3), (1, 8, 8)),
    "encoder": (Fused, (5, 8)),
    "lstm": (lambda: Recurrent(nn.LSTM), (4, 3)),
    "gru": (lambda: Recurrent(nn.GRU), (4, 3)),
    "old": (Old, (4,)),
}


def problem(kind="mlp", n=7, dtype=torch.float64):
    torch.manual_seed(0)
    make, shape = MODELS[kind]
    model = make().to(dtype).eval()
    inputs = torch.randn(n, *shape, dtype=dtype)
    with torch.no_grad():
        classes = model(inputs).shape[-1]
    return model, inputs, torch.arange(n) % classes


def names_of(model):
    return [name for name, _ in model.named_parameters()]


def dense_jacobian(model, inputs, rows, targets=None):
    """J (R, P) by the chain rule of plain autograd."""
    theta = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    with exact_products(model):
        scalars = rows(functional_call(model, theta, (inputs,)), targets).flatten()
        grads = [
            torch.autograd.grad(s, list(theta.values()), retain_graph=True, materialize_grads=True) for s in scalars
        ]
    return torch.stack([torch.cat([g.flatten() for g in each]) for each in grads])


@pytest.mark.parametrize("kind", MODELS)
def test_products_and_gram_are_those_of_the_dense_jacobian(kind):
    model, inputs, targets = problem(kind)
    operator = RowOperator(model, names_of(model), split_blocks([(inputs, targets)], 3))
    jacobian = dense_jacobian(model, inputs, output_rows)
    vectors = torch.randn(2, operator.width, dtype=torch.float64)
    weights = torch.randn(2, operator.n_rows, dtype=torch.float64)
    blocks = range(len(operator.blocks))
    products = torch.cat([operator.times(b, vectors) for b in blocks], 1)
    torch.testing.assert_close(products, vectors @ jacobian.mT, rtol=1e-8, atol=1e-9)
    back = sum(operator.transposed(b, w) for b, w in enumerate(weights.split(operator.sizes, 1)))
    torch.testing.assert_close(back, weights @ jacobian, rtol=1e-8, atol=1e-9)
    grams = torch.cat([torch.cat([operator.gram(i, j) for j in blocks], 1) for i in blocks])
    torch.testing.assert_close(grams, jacobian @ jacobian.mT, rtol=1e-8, atol=1e-9)
    assert operator._products.functional == (kind != "old")


def test_every_kind_of_rows():
    model, inputs, targets = problem()
    blocks = split_blocks([(inputs, targets)], 4)

    def dense(**options):
        operator = RowOperator(model, names_of(model), blocks, **options)
        unit = torch.eye(operator.width, dtype=torch.float64)
        return torch.cat([operator.times(b, unit) for b in range(len(blocks))], 1).mT

    outputs = dense_jacobian(model, inputs, output_rows)
    curvature = dense(rows="curvature")
    torch.testing.assert_close(curvature, dense_jacobian(model, inputs, curvature_rows("classification")))
    with torch.no_grad():
        p = model(inputs).softmax(-1)
    hessian = torch.block_diag(*(torch.diag_embed(p) - p[:, :, None] * p[:, None]))
    torch.testing.assert_close(curvature.mT @ curvature, outputs.mT @ hessian @ outputs)
    slope = torch.block_diag(*(p - F.one_hot(targets, 3))[:, None])
    torch.testing.assert_close(dense(rows="loss"), slope @ outputs)
    weighted = dense(rows=lambda f, y: f[:, :1] * (1 + y[:, None]))
    torch.testing.assert_close(weighted, outputs[::3] * (1 + targets[:, None]))
    scaled = dense(scale={"0.weight": 2.0, "2.bias": 0.5})
    factors = torch.cat([torch.full((k,), v) for k, v in ((20, 2.0), (5, 1.0), (15, 1.0), (3, 0.5))]).double()
    torch.testing.assert_close(scaled, outputs * factors)


def test_scaled_grams_and_the_primal_gram():
    model, inputs, targets = problem()
    operator = RowOperator(model, names_of(model), split_blocks([(inputs, targets)], 4), scale={"0.weight": 2.0})
    unit = torch.eye(operator.width, dtype=torch.float64)
    jacobian = torch.cat([operator.times(b, unit) for b in range(2)], 1).mT
    torch.testing.assert_close(operator.gram(0, 1), jacobian[:12] @ jacobian[12:].mT)
    torch.testing.assert_close(operator.primal_gram(), jacobian.mT @ jacobian)
    values = operator.unflatten(unit)
    torch.testing.assert_close(values["0.weight"].flatten(1)[0, 0], torch.tensor(2.0).double())
    torch.testing.assert_close(operator.flatten(values), unit * torch.diagonal(operator.flatten(values)))


def test_random_rows_are_fixed_projections_and_average_to_the_outputs():
    model, inputs, targets = problem(n=4)
    outputs = dense_jacobian(model, inputs, output_rows)
    total, draws = 0, 400
    for seed in range(draws):
        operator = RowOperator(model, names_of(model), [(inputs, targets)], "random", n_projections=2, seed=seed)
        assert operator.n_rows == 8
        unit = torch.eye(operator.width, dtype=torch.float64)
        found = operator.times(0, unit).mT
        if seed == 0:
            again = operator.resized(3)
            torch.testing.assert_close(torch.cat([again.times(b, unit) for b in range(2)], 1).mT, found)
            inside = torch.linalg.lstsq(outputs.mT, found.mT).solution.reshape(4, 3, 4, 2)
            signs = torch.stack([inside[k, :, k] for k in range(4)])
            torch.testing.assert_close(signs.abs(), torch.full((4, 3, 2), 0.5**0.5).double())
            assert len({str(s.sign()) for s in signs}) > 1
        total = total + found.mT @ found
    expected = outputs.mT @ outputs
    assert float((total / draws - expected).norm() / expected.norm()) < 4 / draws**0.5


def test_a_ridge_appends_one_entry_per_row():
    model, inputs, targets = problem()
    operator = RowOperator(model, names_of(model), split_blocks([(inputs, targets)], 4), ridge=0.25)
    assert operator.width == operator.n_params + operator.n_rows
    vectors = torch.randn(2, operator.width, dtype=torch.float64)
    jacobian = dense_jacobian(model, inputs, output_rows)
    both = torch.cat([jacobian, 0.5 * torch.eye(21, dtype=torch.float64)], 1)
    torch.testing.assert_close(torch.cat([operator.times(b, vectors) for b in range(2)], 1), vectors @ both.mT)
    weights = torch.randn(2, 21, dtype=torch.float64)
    total = torch.zeros_like(vectors)
    for b, part in enumerate(weights.split(operator.sizes, 1)):
        operator.add_transposed(b, total, part, -2.0)
    torch.testing.assert_close(total, -2 * weights @ both)


def test_little_memory_changes_nothing_but_the_parts():
    model, inputs, targets = problem("cnn", n=5)
    small, large = (
        RowOperator(model, names_of(model), [(inputs, targets)], max_memory=memory) for memory in (20_000, 2**30)
    )
    vectors = torch.randn(3, large.width, dtype=torch.float64)
    assert len(list(small._chunks(0, 3))) > len(list(large._chunks(0, 3)))
    torch.testing.assert_close(small.times(0, vectors), large.times(0, vectors))
    torch.testing.assert_close(small.transposed(0, vectors[:, :15]), large.transposed(0, vectors[:, :15]))
    torch.testing.assert_close(small.gram(0), large.gram(0))


def test_some_names_only_and_tied_weights():
    model, inputs, targets = problem()
    operator = RowOperator(model, ["2.weight"], [(inputs, targets)])
    whole = dense_jacobian(model, inputs, output_rows)
    unit = torch.eye(15, dtype=torch.float64)
    torch.testing.assert_close(operator.times(0, unit).mT, whole[:, 25:40])
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False)).double().eval()
    tied[2].weight = tied[0].weight
    operator = RowOperator(tied, ["0.weight"], [(inputs, targets)])
    truth = jacrev(lambda w: torch.tanh(inputs @ w.mT) @ w.mT)(tied[0].weight.detach()).flatten(0, 1).flatten(1)
    torch.testing.assert_close(operator.times(0, torch.eye(16, dtype=torch.float64)).mT, truth)
    torch.testing.assert_close(operator.gram(0), truth @ truth.mT)


def test_data_sorted_by_class_are_mixed_and_pairs_stay_together():
    inputs = torch.arange(40.0)[:, None]
    targets = (torch.arange(40) >= 20).long()
    loader = list(zip(inputs.split(8), targets.split(8), strict=True))
    blocks = shuffled_blocks(loader, 10, seed=1)
    assert [len(y) for _, y in blocks] == [10] * 4
    assert all(0 < int(y.sum()) < 10 for _, y in blocks)
    assert all(torch.equal(y, (x[:, 0] >= 20).long()) for x, y in blocks)
    assert sorted(torch.cat([x for x, _ in blocks]).flatten().tolist()) == list(range(40))
    again, other = shuffled_blocks(loader, 10, seed=1), shuffled_blocks(loader, 10, seed=2)
    assert torch.equal(again[0][0], blocks[0][0])
    assert not torch.equal(other[0][0], blocks[0][0])
    ragged = [({"x": torch.ones(2, length)}, torch.zeros(2, dtype=torch.int64)) for length in (3, 4, 5)]
    assert sorted(x["x"].shape[1] for x, _ in shuffled_blocks(ragged, 10)) == [3, 4, 5]
    assert len(join_blocks(ragged)) == 3


def test_settings_are_put_back():
    model, *_ = problem("lstm")
    before = (
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cudnn.enabled,
        torch.get_float32_matmul_precision(),
    )
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(RuntimeError, match="inside"), exact_products(model):
            assert not torch.backends.mha.get_fastpath_enabled()
            assert torch.get_float32_matmul_precision() == "highest"
            raise RuntimeError("inside")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before[2])
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.cudnn.enabled) == before[:2]


def test_wrong_arguments_are_named():
    model, inputs, targets = problem()
    names, blocks = names_of(model), [(inputs, targets)]
    for options, message in (
        ({"ridge": -1.0}, "ridge must be a number of at least 0"),
        ({"rows": "logits"}, "rows must be 'outputs'"),
        ({"rows": "random"}, "n_projections, the rows per datum"),
        ({"n_projections": 2}, "n_projections, the rows per datum"),
        ({"rows": "random", "n_projections": 3}, "n_projections must be less than the 3 outputs"),
        ({"rows": lambda f, y: f.sum()}, r"rows must map outputs .* got shape \(\)"),
        ({"scale": {"0.weight": 0.0}}, "scale of 0.weight must be a positive number"),
        ({"likelihood": "regression"}, "needs sigma_noise"),
    ):
        with pytest.raises(InvalidInput, match=message):
            RowOperator(model, names, blocks, **options)
    with pytest.raises(InvalidInput, match="class labels must lie in"):
        RowOperator(model, names, [(inputs, targets + 1)])
    with pytest.raises(InvalidInput, match="no block of data"):
        RowOperator(model, names, [])
    with pytest.raises(InvalidInput, match="training mode"):
        RowOperator(nn.Sequential(nn.Linear(4, 3)).train(), ["0.weight"], blocks)
    with pytest.raises(InvalidInput, match="float32 or float64"):
        RowOperator(nn.Linear(4, 3).bfloat16().eval(), ["weight"], [(inputs.bfloat16(), targets)])


def test_a_padding_row_that_matters_moves_in_neither_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3, padding_idx=0), nn.Flatten(), nn.Linear(9, 2)).double().eval()
    nn.init.normal_(model[0].weight)
    numbers = torch.tensor([[1, 2, 0], [3, 0, 0], [4, 1, 2]])
    jacobian = RowOperator(model, names_of(model), [(numbers, torch.zeros(3, dtype=torch.long))])
    unit = torch.eye(jacobian.n_params, dtype=torch.float64)
    forward = jacobian.times(0, unit).T
    torch.testing.assert_close(forward, jacobian.transposed(0, torch.eye(6, dtype=torch.float64)))
    torch.testing.assert_close(forward @ forward.T, jacobian.gram(0))
    assert torch.equal(forward[:, :3], torch.zeros(6, 3, dtype=torch.float64))
    assert not model[0]._forward_hooks


class TiedWords(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.table.weight

    def forward(self, numbers):
        return self.head(torch.tanh(self.mix(self.table(numbers).mean(1))))


def test_a_tied_weight_may_be_fixed():
    torch.manual_seed(0)
    model, numbers = TiedWords().double().eval(), torch.randint(0, 6, (3, 4))
    jacobian = RowOperator(model, ["mix.weight"], [(numbers, torch.zeros(3, dtype=torch.long))])
    expected = jacrev(lambda w: functional_call(model, {"mix.weight": w}, (numbers,)))(model.mix.weight.detach())
    unit = torch.eye(16, dtype=torch.float64)
    torch.testing.assert_close(jacobian.times(0, unit).T, expected.reshape(18, 16))


class Unused(nn.Module):
    """Of two parameters one does nothing; the other goes through a function that torch.func refuses."""

    def __init__(self):
        super().__init__()
        self.idle, self.layer = nn.Parameter(torch.ones(2)), nn.Linear(3, 2)

    def forward(self, x):
        return OldCube.apply(self.layer(x))


def test_parameters_that_do_nothing_have_zero_products():
    model = Unused().eval().requires_grad_(False)
    jacobian = RowOperator(model, ["idle"], [(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))])
    assert torch.equal(jacobian.times(0, torch.ones(2, 2)), torch.zeros(2, 8))
    assert torch.equal(jacobian.transposed(0, torch.ones(3, 8)), torch.zeros(3, 2))
    assert torch.equal(jacobian.gram(0), torch.zeros(8, 8))
