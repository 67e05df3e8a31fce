"""Full covariance through one pass: closed forms for one layer, Monte Carlo for several, SinglePass for diagonals."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bayespass.approximation import CVP, STREAMLINED
from bayespass.errors import InvalidInput, UnsupportedOp
from bayespass.link import softmax_link
from bayespass.posterior.base import PosteriorInfo
from bayespass.posterior.empirical import Empirical
from bayespass.posterior.full import FullGaussian
from bayespass.posterior.kronecker import KroneckerGaussian
from bayespass.posterior.low_rank import LowRankGaussian
from bayespass.posterior.mean_field import DiagonalGaussian
from bayespass.predict.dataset import predict_dataset
from bayespass.predict.joint import JointPass
from bayespass.predict.propagation import SinglePass
from bayespass.predict.sampling import MonteCarlo

KINDS = ["diagonal", "kronecker", "full", "low rank"]


class Custom(nn.Module):
    """A chain written by hand, with sizes asked for, behind a deterministic convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = nn.Conv1d(1, 2, 2), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        x = torch.relu(self.conv(x[:, None]))
        x = torch.tanh(self.first(x.view(x.size(0), -1)))
        x = F.dropout(F.relu(x, inplace=True), 0.5, self.training)
        return self.second(x.reshape(x.shape[0], -1))


def mlp(*sizes, act=nn.Tanh):
    torch.manual_seed(0)
    layers = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Sequential(nn.Linear(a, b)), act()]
    return nn.Sequential(nn.Flatten(), *layers[:-1], nn.Dropout()).double().eval()


def posterior(kind, model, scale=1.0, info=None, names=None):
    mean = {n: p.detach() for n, p in model.named_parameters() if names is None or n in names}
    variance = {n: scale * (torch.rand_like(m) + 0.1) for n, m in mean.items()}
    if kind == "diagonal":
        return DiagonalGaussian(mean, variance, info)
    if kind == "kronecker":
        left = {n: torch.linalg.qr(torch.randn(len(m), len(m), dtype=m.dtype))[0] for n, m in mean.items()}
        right = {
            n: torch.linalg.qr(torch.randn(m.shape[1], m.shape[1], dtype=m.dtype))[0]
            for n, m in mean.items() if m.dim() > 1
        }  # fmt: skip
        return KroneckerGaussian(mean, variance, left, right, info)
    total = sum(m.numel() for m in mean.values())
    if kind == "full":
        return FullGaussian(mean, scale**0.5 * torch.randn(total, total, dtype=torch.float64) / total**0.5, info)
    factors = {n: scale**0.5 * torch.randn(2, *m.shape, dtype=m.dtype) for n, m in mean.items()}
    return LowRankGaussian(mean, variance, factors, info)


def dense_covariance(q):
    if isinstance(q, FullGaussian):
        return q.covariance
    columns = []
    sizes = [m.numel() for m in q.mean.values()]
    if isinstance(q, LowRankGaussian):
        flat = torch.cat([f.flatten(1) for f in q._factors.values()], 1)
        return torch.diag(torch.cat([d.flatten() for d in q._diagonal.values()])) + flat.mT @ flat
    if isinstance(q, DiagonalGaussian):
        return torch.diag(torch.cat([v.flatten() for v in q.variance.values()]))
    for unit in torch.eye(sum(sizes), dtype=torch.float64):
        given = {n: part.view(m.shape) for (n, m), part in zip(q.mean.items(), unit.split(sizes), strict=True)}
        columns.append(torch.cat([v.flatten() for v in q.covariance_times(given).values()]))
    return torch.stack(columns)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_one_layer_is_exact(kind, wrapped):
    """Cov[W x + b] = (I kron [x, 1]) Cov[W, b] (I kron [x, 1])^T."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    model = (nn.Sequential(layer) if wrapped else layer).eval()
    q, x = posterior(kind, model), torch.randn(5, 4, dtype=torch.float64)
    mean, found = JointPass(model, q).moments(x)
    jacobian = torch.stack([torch.cat([torch.kron(torch.eye(3), row[None]), torch.eye(3)], 1) for row in x])
    truth = jacobian @ dense_covariance(q) @ jacobian.mT
    torch.testing.assert_close(mean, model(x).detach())
    torch.testing.assert_close(found, truth)
    _, marginal = JointPass(model, q, "diagonal").moments(x)
    torch.testing.assert_close(marginal, truth.diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("kind", KINDS)
def test_two_linear_layers_are_exact_against_monte_carlo(kind):
    """Without activations only products of two weights, which the second moment holds: 10,000 draws."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Identity(), nn.Linear(4, 2)).double().eval()
    q, x = posterior(kind, model, 0.3), torch.randn(3, 3, dtype=torch.float64)
    if kind in ("full", "low rank"):  # correlations between layers are dropped: take the first alone
        q = q.subset(["0.weight", "0.bias"])
    _, found = JointPass(model, q).moments(x)
    weights = [torch.stack(each) for each in zip(*[list(d.values()) for d in q.sample(10_000, 1)], strict=True)]
    drawn = dict(zip(q.names, weights, strict=True))
    first = torch.einsum("sok,nk->sno", drawn["0.weight"], x) + drawn["0.bias"][:, None]
    last = (drawn[n] if n in drawn else p.detach()[None] for n, p in model[2].named_parameters(prefix="2"))
    weight, bias = last
    outputs = torch.einsum("sno,sco->snc", first, weight.expand(len(first), -1, -1)) + bias[:, None]
    gap = outputs - outputs.mean(0)
    truth = torch.einsum("snc,snd->ncd", gap, gap) / len(gap)
    size = truth.diagonal(dim1=1, dim2=2)
    error = (found - truth).abs() / (size[:, :, None] * size[:, None]).sqrt()
    assert float(error.max()) < 0.08  # standard error about 0.014, more for the heavy tails of products


@pytest.mark.parametrize("kind", ["diagonal", "kronecker"])
@pytest.mark.parametrize("activation", ["linear", "moments"])
def test_three_layers_of_small_variance(kind, activation):
    """Against 4,000 draws of the network: covariances within 0.12 of the geometric mean of the variances."""
    model = mlp(3, 6, 5, 3)
    q, x = posterior(kind, model, 2e-3), torch.randn(4, 3, dtype=torch.float64)
    _, found = JointPass(model, q, activation=activation).moments(x)
    draws = torch.stack(list(MonteCarlo(model, q, 4000).outputs(x)))
    gap = draws - draws.mean(0)
    truth = torch.einsum("snc,snd->ncd", gap, gap) / len(gap)
    size = truth.diagonal(dim1=1, dim2=2)
    error = (found - truth).abs() / (size[:, :, None] * size[:, None]).sqrt()
    assert float(error.max()) < 0.12
    assert float(torch.linalg.eigvalsh(found).min()) > 0
    probs = JointPass(model, q, activation=activation)(x).probs
    torch.testing.assert_close(probs, draws.softmax(-1).mean(0), rtol=0, atol=5e-3)


def test_full_covariance_beats_independent_activations():
    """Random first layer, deterministic second with equal columns: independence drops what is shared."""
    model = nn.Sequential(nn.Linear(3, 8, bias=False), nn.Linear(8, 1, bias=False)).double().eval()
    nn.init.ones_(model[1].weight)
    weight = model[0].weight.detach()
    root = torch.ones(8, 1, dtype=torch.float64)[:, None] * torch.eye(3, dtype=torch.float64)  # rows all alike
    q = FullGaussian({"0.weight": weight}, root.reshape(24, 3))
    x = torch.randn(4, 3, dtype=torch.float64)
    truth = 64 * x.square().sum(1)
    torch.testing.assert_close(JointPass(model, q).moments(x)[1][:, 0, 0], truth)
    torch.testing.assert_close(JointPass(model, q, "diagonal").moments(x)[1][:, 0], truth / 8)


@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.Softplus])
@pytest.mark.parametrize(("activation", "named"), [("linear", STREAMLINED), ("moments", CVP)])
def test_diagonals_are_the_single_pass(act, activation, named):
    model = mlp(4, 6, 5, 3, act=act)
    q, x = posterior("diagonal", model, 0.05), torch.randn(5, 4, dtype=torch.float64)
    found = JointPass(model, q, "diagonal", activation)(x)
    truth = SinglePass(model, q, named)(x)
    torch.testing.assert_close(found.logit_mean, truth.logit_mean)
    torch.testing.assert_close(found.logit_variance, truth.logit_variance)
    torch.testing.assert_close(found.probs, truth.probs)


def test_a_custom_forward_behind_a_deterministic_front():
    torch.manual_seed(0)
    model = Custom().double().eval()
    names = [n for n, _ in model.named_parameters() if not n.startswith("conv")]
    q, x = posterior("kronecker", model, 2e-3, names=names), torch.randn(4, 4, dtype=torch.float64)
    found = JointPass(model, q)(x)
    draws = torch.stack(list(MonteCarlo(model, q, 3000).outputs(x)))
    torch.testing.assert_close(found.logit_mean, model(x).detach())
    torch.testing.assert_close(found.logit_variance, draws.var(0), rtol=0.3, atol=0)
    torch.testing.assert_close(JointPass(model, q)(x=x).probs, found.probs)


def test_regression_little_memory_and_inference_mode():
    model = mlp(4, 6, 2)
    q = posterior("kronecker", model, 0.01, PosteriorInfo("regression", sigma_noise=0.5))
    x = torch.randn(9, 4, dtype=torch.float64)
    whole = JointPass(model, q)(x)
    small = predict_dataset(JointPass(model, q, max_memory=6000), [x])
    torch.testing.assert_close(small.epistemic, whole.epistemic)
    torch.testing.assert_close(whole.aleatoric, torch.full_like(whole.mean, 0.25))
    with torch.inference_mode():
        torch.testing.assert_close(JointPass(model, q)(x).epistemic, whole.epistemic)


def test_what_is_dropped_is_said():
    model = mlp(4, 6, 3)
    assert "between layers" in JointPass(model, posterior("full", model)).notes[-1]
    assert len(JointPass(model, posterior("kronecker", model)).notes) == 1
    q = Empirical([{n: p.detach() + 0.1 * k for n, p in model.named_parameters()} for k in range(3)])
    predictor = JointPass(model, q)
    assert "marginal" in predictor.notes[-1]
    x = torch.randn(2, 4, dtype=torch.float64)
    torch.testing.assert_close(predictor(x).probs.sum(-1), torch.ones(2, dtype=torch.float64))


def test_a_link_by_name_goes_by_the_marginals():
    model = mlp(4, 6, 3)
    found = JointPass(model, posterior("kronecker", model, 0.1), link="probit")(torch.randn(3, 4).double())
    torch.testing.assert_close(found.probs, softmax_link(found.logit_mean, found.logit_variance, "probit"))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)

    def forward(self, x):
        y = self.first(x)
        return y + torch.tanh(y)


class ByHand(Residual):
    def forward(self, x):
        return F.linear(x, self.first.weight)


class Branching(Residual):
    def forward(self, x):
        return self.first(x) if x.sum() > 0 else x


class Twice(Residual):
    def forward(self, x):
        return self.first(torch.tanh(self.first(x)))


@pytest.mark.parametrize(("make", "message"), [
    (Residual, "add"),
    (ByHand, "first.weight, which ByHand uses outside"),
    (Branching, "cannot follow Branching"),
    (Twice, r"first \(Linear\), which has weights that are used twice"),
    (lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), r"1 \(LayerNorm\)"),
    (lambda: nn.Sequential(nn.Linear(3, 3), nn.Softmax(-1)), "softmax"),
    (lambda: nn.Sequential(nn.Conv1d(1, 2, 1), nn.Flatten()), r"0 \(Conv1d\)"),
])  # fmt: skip
def test_anything_else_is_refused_by_name(make, message):
    model = make().eval()
    with pytest.raises(UnsupportedOp, match=f"{message}.*; use Linearised"):
        JointPass(model, posterior("diagonal", model))


def test_mistakes():
    model = mlp(3, 4, 2).float()
    q = posterior("diagonal", model)
    with pytest.raises(InvalidInput, match="covariance must be one of"):
        JointPass(model, q, "kron")
    with pytest.raises(InvalidInput, match="activation must be one of"):
        JointPass(model, q, activation="exact")
    with pytest.raises(InvalidInput, match="link must be one of"):
        JointPass(model, q, link="bridge")
    plain = nn.Sequential(nn.Linear(3, 2)).eval()
    with pytest.raises(UnsupportedOp, match="one vector per row"):
        JointPass(plain, posterior("diagonal", plain))(torch.randn(2, 4, 3))
