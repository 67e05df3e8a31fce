"""J Sigma J^T of every structure against the dense product, in float64."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from bayespass.curvature.pushforward import OutputCovariance, covariance_grid, layer_paths
from bayespass.errors import InvalidInput
from bayespass.posterior.dropout import DropoutPosterior
from bayespass.posterior.empirical import Empirical
from bayespass.posterior.full import FullGaussian
from bayespass.posterior.kronecker import KroneckerGaussian
from bayespass.posterior.low_rank import LowRankGaussian
from bayespass.posterior.mean_field import DiagonalGaussian
from bayespass.posterior.mixture import Mixture
from bayespass.posterior.product import Product
from bayespass.posterior.sampled_gaussian import SampledGaussian


class Attentive(nn.Module):
    """A class token, attention, a layer norm."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.block, self.head = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.block(torch.cat([self.token.expand(len(x), -1, -1), x], 1))[:, 0])


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (6, 4)),
    "cnn": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.GELU(), nn.Flatten(), nn.Linear(8, 3)),
        (6, 1, 3, 3),
    ),
    "transformer": (Attentive, (6, 3, 4)),
    "positions": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), (6, 3, 4)),
}


def problem(name="mlp"):
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make().double().eval()
    mean = {n: p.detach().clone() for n, p in model.named_parameters()}
    return model, mean, torch.randn(shape, dtype=torch.float64)


def rotation(size):
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]


def posterior(kind, mean):
    """A posterior over these parameters, and its dense covariance in their order."""
    sizes = [m.numel() for m in mean.values()]
    total = sum(sizes)
    variance = {n: torch.rand_like(m) + 0.1 for n, m in mean.items()}
    if kind == "diagonal":
        return DiagonalGaussian(mean, variance), torch.diag(torch.cat([v.flatten() for v in variance.values()]))
    if kind == "kronecker":
        left = {n: rotation(len(m)) for n, m in mean.items()}
        right = {n: rotation(m[0].numel()) for n, m in mean.items() if m.dim() > 1}
        blocks = []
        for n in mean:
            turn = torch.kron(left[n], right.get(n, torch.eye(1, dtype=torch.float64)))
            blocks.append(turn @ torch.diag(variance[n].flatten()) @ turn.mT)
        return KroneckerGaussian(mean, variance, left, right), torch.block_diag(*blocks)
    if kind == "full":
        root = torch.randn(total, 7, dtype=torch.float64)
        return FullGaussian(mean, root), root @ root.mT
    if kind == "low rank":
        factors = {n: torch.randn(3, *m.shape, dtype=torch.float64) for n, m in mean.items()}
        flat = torch.cat([f.flatten(1) for f in factors.values()], 1)
        diagonal = torch.diag(torch.cat([v.flatten() for v in variance.values()]))
        return LowRankGaussian(mean, variance, factors), diagonal + flat.mT @ flat
    if kind == "sampled":
        draws = {n: torch.randn(9, *m.shape, dtype=torch.float64) for n, m in mean.items()}
        flat = torch.cat([d.flatten(1) for d in draws.values()], 1)
        return SampledGaussian(mean, draws), flat.mT @ flat / 9
    if kind == "members":
        members = [{n: m + torch.randn_like(m) for n, m in mean.items()} for _ in range(5)]
        q = Empirical(members)
        flat = torch.stack([torch.cat([(k[n] - q.mean[n]).flatten() for n in mean]) for k in members])
        return q, flat.mT @ flat / 4
    names = list(mean)
    first, second = ({n: mean[n] for n in part} for part in (names[:2], names[2:]))
    (a, cov_a), (b, cov_b) = posterior("kronecker", first), posterior("full", second)
    return Product([a, b]), torch.block_diag(cov_a, cov_b)


def dense(model, q, inputs, covariance):
    theta = {n: q.mean[n] for n in q.names}
    jacobian = jacrev(lambda t: functional_call(model, t, (inputs,)).reshape(len(inputs), -1))(theta)
    flat = torch.cat([jacobian[n].flatten(2) for n in q.names], 2)
    return flat @ covariance @ flat.mT


def placed(model, q):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in q.mean:
                parameter.copy_(q.mean[name])
    return model


KINDS = ["diagonal", "kronecker", "full", "low rank", "sampled", "members", "product"]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_against_the_dense_product(kind, name):
    model, mean, x = problem(name)
    q, covariance = posterior(kind, mean)
    model = placed(model, q)
    pushed = OutputCovariance(model, q)
    (part,) = pushed.chunks(x, square=True)
    truth = dense(model, q, x, covariance)
    torch.testing.assert_close(part.covariance(), truth)
    torch.testing.assert_close(part.marginals(), truth.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(part.outputs, model(x).detach())
    assert pushed.exact == (kind not in ("sampled", "members"))


@pytest.mark.parametrize("kind", ["kronecker", "full", "sampled"])
def test_little_memory_gives_the_same(kind):
    model, mean, x = problem()
    q, _ = posterior(kind, mean)
    pushed = OutputCovariance(model, q)
    (whole,) = pushed.chunks(x, square=True)
    parts = list(OutputCovariance(model, q, max_memory=4000).chunks(x, square=True))
    assert len(parts) > 1
    assert [k for part in parts for k in range(len(x))[part.rows]] == list(range(len(x)))
    torch.testing.assert_close(torch.cat([part.covariance() for part in parts]), whole.covariance())
    torch.testing.assert_close(torch.cat([part.marginals() for part in parts]), whole.marginals())


@pytest.mark.parametrize("make", [
    lambda mean: Mixture([DiagonalGaussian(mean, {n: v + 0.1 for n, v in spread(mean).items()})] * 2),
    lambda mean: DropoutPosterior({n: m for n, m in mean.items() if m.dim() == 2}, {"0.weight": 0.3, "2.weight": 0.1}),
])  # fmt: skip
def test_other_posteriors_go_by_draws(make):
    """4,000 draws against the dense product of their exact covariance; relative standard error of a variance 0.03."""
    model, mean, x = problem()
    q = make(mean)
    if isinstance(q, Mixture):
        covariance = torch.diag(torch.cat([q.variance[n].flatten() for n in q.names]))
    else:
        blocks = []
        for name, m in q.mean.items():  # entries of one column share their mask
            same = torch.kron(torch.ones(len(m), len(m)), torch.eye(m.shape[1])).double()
            odds = q.rates[name] / (1 - q.rates[name])
            blocks.append(odds * same * torch.outer(m.flatten(), m.flatten()))
        covariance = torch.block_diag(*blocks)
    (part,) = OutputCovariance(model, q, n_samples=4000).chunks(x)
    truth = dense(model, q, x, covariance).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(part.marginals(), truth, rtol=0.15, atol=0)


def spread(mean):
    return {n: torch.full_like(m, 0.2) for n, m in mean.items()}


def test_draws_of_a_closed_form_converge_to_it():
    model, mean, x = problem()
    q, covariance = posterior("kronecker", mean)
    (part,) = OutputCovariance(model, q, by_draws=True, n_samples=4000).chunks(x)
    truth = dense(model, q, x, covariance).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(part.marginals(), truth, rtol=6 * (2 / 4000) ** 0.5, atol=0)


@pytest.mark.parametrize("kind", ["diagonal", "kronecker"])
@pytest.mark.parametrize("names", [("2.weight", "2.bias"), ("2.weight",), ("2.bias",)])
def test_a_last_layer_of_200_classes_needs_no_square(kind, names):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 200)).double().eval()
    mean = {n: p.detach() for n, p in model.named_parameters() if n in names}
    variance = {n: torch.rand_like(m) for n, m in mean.items()}
    left = {n: rotation(200) for n in names} if kind == "kronecker" else {}
    right = {"2.weight": rotation(16)} if left and "2.weight" in names else {}
    x = torch.randn(3, 4, dtype=torch.float64)
    (part,) = OutputCovariance(model, KroneckerGaussian(mean, variance, left, right)).chunks(x)
    phi = model[1](model[0](x)).detach()
    eye = torch.eye(200, dtype=torch.float64)
    truth = torch.zeros(3, 200, 200, dtype=torch.float64)
    for name in names:
        turned = (phi @ right.get(name, torch.eye(16, dtype=torch.float64))).square() if mean[name].dim() > 1 else None
        u = variance[name].expand(3, -1) if turned is None else turned @ variance[name].mT
        basis = left.get(name, eye)
        truth = truth + (basis * u[:, None]) @ basis.mT
    root, scale = part.shared_root()
    torch.testing.assert_close((root * scale.square()[:, None]) @ root.mT, truth)
    torch.testing.assert_close(part.marginals(), truth.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(part.covariance(), truth)


def test_a_shared_root_is_for_a_last_layer_alone():
    model, mean, x = problem()
    (part,) = OutputCovariance(model, posterior("diagonal", mean)[0]).chunks(x)
    assert part.shared_root() is None


@pytest.mark.parametrize("name", ["mlp", "transformer"])
@pytest.mark.parametrize("by_layer", [False, True])
def test_a_grid_of_precisions(name, by_layer):
    model, mean, x = problem(name)
    q, _ = posterior("kronecker", mean)
    grid = (0.5, 1.0, 3.0)
    variances = {n: torch.stack([1 / (1 / v + a) for a in grid]) for n, v in q._variance_in_basis.items()}
    outputs, found = covariance_grid(model, list(x.split(4)), q.names, variances, q._left, q._right, by_layer)
    torch.testing.assert_close(outputs, model(x).detach())
    paths = layer_paths(q.names)
    for k in range(len(grid)):
        each = KroneckerGaussian(mean, {n: v[k] for n, v in variances.items()}, q._left, q._right)
        if not by_layer:
            (truth,) = OutputCovariance(model, each).chunks(x)
            torch.testing.assert_close(found[k], truth.covariance())
            continue
        for layer, path in enumerate(paths):
            own = each.subset(lambda n, path=path: n.rpartition(".")[0] == path)
            (truth,) = OutputCovariance(model, own).chunks(x)
            torch.testing.assert_close(found[layer, k], truth.covariance())
    _, small = covariance_grid(model, list(x.split(4)), q.names, variances, q._left, q._right, by_layer, 10**6)
    torch.testing.assert_close(small, found)


def test_a_grid_beyond_the_memory_is_of_marginals():
    torch.manual_seed(0)
    model = nn.Linear(3, 40).double().eval()
    x = torch.randn(50, 3, dtype=torch.float64)
    variances = {n: torch.rand(2, *p.shape, dtype=torch.float64) for n, p in model.named_parameters()}
    _, full = covariance_grid(model, [x], ["weight", "bias"], variances, {}, {})
    _, marginal = covariance_grid(model, [x], ["weight", "bias"], variances, {}, {}, max_memory=10**6)
    assert marginal.shape == (2, 50, 40)
    torch.testing.assert_close(marginal, full.diagonal(dim1=2, dim2=3))


def test_mistakes():
    model, mean, x = problem("cnn")
    q, _ = posterior("diagonal", mean)
    with pytest.raises(InvalidInput, match="max_memory"):
        OutputCovariance(model, q, max_memory=0)
    with pytest.raises(InvalidInput, match="n_samples"):
        OutputCovariance(model, q, by_draws=True, n_samples=0)
    with pytest.raises(InvalidInput, match="Raise max_memory"):
        next(OutputCovariance(model, q, max_memory=100).chunks(x))


class Gated(nn.Module):
    """With a parameter that is a number."""

    def __init__(self):
        super().__init__()
        self.gate, self.layer = nn.Parameter(torch.tensor(0.7)), nn.Linear(3, 2)

    def forward(self, x):
        return self.gate * torch.tanh(self.layer(x))


@pytest.mark.parametrize("kind", ["diagonal", "full", "low_rank"])
def test_a_parameter_without_axes(kind):
    torch.manual_seed(0)
    model, inputs = Gated().double().eval(), torch.randn(4, 3, dtype=torch.float64)
    mean = {name: p.detach() for name, p in model.named_parameters()}
    spread = {name: 0.1 + torch.rand_like(p) for name, p in mean.items()}
    diagonal = torch.diag(torch.cat([s.flatten() for s in spread.values()]))
    root = torch.randn(9, 9, dtype=torch.float64)
    factors = {name: torch.randn(2, *p.shape, dtype=torch.float64) for name, p in mean.items()}
    flat = torch.cat([f.reshape(2, -1) for f in factors.values()], 1)
    posterior, covariance = {
        "diagonal": (DiagonalGaussian(mean, spread), diagonal),
        "full": (FullGaussian(mean, root), root @ root.T),
        "low_rank": (LowRankGaussian(mean, spread, factors), diagonal + flat.T @ flat),
    }[kind]
    found = jacrev(lambda theta: functional_call(model, theta, (inputs,)))(mean)
    dense = torch.cat([block.reshape(4, 2, -1) for block in found.values()], 2)
    (part,) = OutputCovariance(model, posterior).chunks(inputs, square=True)
    expected = dense @ covariance @ dense.mT
    torch.testing.assert_close(part.covariance(), expected)
    torch.testing.assert_close(part.marginals(), expected.diagonal(dim1=1, dim2=2))
    if kind != "diagonal":
        vector = {name: torch.randn_like(p) for name, p in mean.items()}
        product = torch.cat([value.flatten() for value in posterior.covariance_times(vector).values()])
        torch.testing.assert_close(product, covariance @ torch.cat([value.flatten() for value in vector.values()]))
