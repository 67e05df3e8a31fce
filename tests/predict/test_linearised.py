"""The linearised network: exact where the network is linear, and against draws of f + J d elsewhere."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp, vmap

from bayespass.batches import device_of
from bayespass.errors import InvalidInput
from bayespass.link import softmax_link
from bayespass.posterior.base import PosteriorInfo
from bayespass.posterior.empirical import Empirical
from bayespass.posterior.full import FullGaussian
from bayespass.posterior.kronecker import KroneckerGaussian
from bayespass.posterior.mean_field import DiagonalGaussian
from bayespass.posterior.sampled_gaussian import SampledGaussian
from bayespass.predict.dataset import predict_dataset
from bayespass.predict.linearised import Linearised, covariance_root, position_blocks
from bayespass.predict.sampling import MonteCarlo

# The references use forward mode, whose first use in PyTorch warns.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

REGRESSION = PosteriorInfo("regression", sigma_noise=0.5)
PREDICTED = PosteriorInfo("regression", sigma_noise="predicted")


class Words(nn.Module):
    """Attention over word vectors, called with a mask by keyword; a class for every word."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)
        self.block = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)

    def forward(self, numbers, weight=None):
        x = self.block(self.table(numbers))
        return self.head(x if weight is None else x * weight[..., None])


def mlp(outputs=3):
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs)).eval()


def cnn():
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)).eval()


def diagonal(model, variance=0.01, info=None, names=None):
    mean = {n: p.detach() for n, p in model.named_parameters() if names is None or n in names}
    return DiagonalGaussian(mean, {n: torch.full_like(m, variance) for n, m in mean.items()}, info)


def linear_draws(model, q, inputs, n_samples, seed=5):
    """f + J d for draws d, (S, n, ...)."""
    mean, draws = dict(q.mean), list(q.sample(n_samples, seed))
    gaps = {n: torch.stack([draw[n] for draw in draws]) - m for n, m in mean.items()}

    def one(gap):
        return sum(jvp(lambda t: functional_call(model, t, (inputs,)), (mean,), (gap,)))

    return vmap(one)(gaps)


@pytest.mark.parametrize("covariance", ["auto", "samples"])
def test_a_linear_network_is_its_own_linearisation(covariance):
    """Equal to Monte Carlo up to standard errors of 4,000 draws."""
    model = nn.Linear(4, 3).eval()
    q, x = diagonal(model, 0.3), torch.randn(5, 4)
    found = Linearised(model, q, 2000, covariance=covariance)(x)
    truth = MonteCarlo(model, q, 4000, seed=3)(x)
    torch.testing.assert_close(found.logit_mean, model(x).detach())
    torch.testing.assert_close(found.logit_variance, truth.logit_variance, rtol=0.2, atol=0)
    torch.testing.assert_close(found.probs, truth.probs, rtol=0, atol=0.02)
    assert found.method == "linearised"


@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize("covariance", ["auto", "full", "marginal", "samples"])
def test_probabilities_against_draws(make, covariance):
    """Average softmax(f + J d) over 4,000 draws; the marginals drop the correlation of logits."""
    model = make()
    x = torch.randn(5, 4) if make is mlp else torch.randn(5, 1, 3, 3)
    q = diagonal(model, 0.1)
    found = Linearised(model, q, 1000, covariance=covariance)(x)
    draws = linear_draws(model, q, x, 4000).detach()
    torch.testing.assert_close(found.logit_variance, draws.var(0), rtol=0.25, atol=0)
    torch.testing.assert_close(found.probs, draws.softmax(-1).mean(0), rtol=0, atol=0.02)
    if covariance == "marginal":
        torch.testing.assert_close(found.probs, softmax_link(found.logit_mean, found.logit_variance))


def test_correlated_logits_matter():
    """A random bias with all classes together changes no probability; independent logits would."""
    model = nn.Linear(4, 3).eval()
    mean = {"bias": model.bias.detach()}
    q = FullGaussian(mean, 3 * torch.ones(3, 1))
    x = torch.randn(5, 4)
    certain = model(x).softmax(-1).detach()
    torch.testing.assert_close(Linearised(model, q)(x).probs, certain, rtol=0, atol=1e-3)
    assert float((Linearised(model, q, covariance="marginal")(x).probs - certain).abs().max()) > 0.05


def test_conjugate_regression_has_the_analytic_predictive():
    torch.manual_seed(1)
    inputs, x = torch.randn(30, 4), torch.randn(6, 4)
    precision = inputs.mT @ inputs / 0.25 + 2 * torch.eye(4)
    model = nn.Linear(4, 1, bias=False).eval()
    values, vectors = torch.linalg.eigh(precision)
    q = FullGaussian({"weight": model.weight.detach()}, vectors * values.rsqrt(), REGRESSION)
    found = Linearised(model, q)(x)
    variance = torch.einsum("nk,kl,nl->n", x, torch.linalg.inv(precision), x)[:, None]
    torch.testing.assert_close(found.epistemic, variance, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.mean, model(x).detach())
    torch.testing.assert_close(found.total, variance + 0.25, rtol=1e-4, atol=0)


@pytest.mark.parametrize("covariance", ["auto", "samples"])
def test_a_predicted_noise(covariance):
    model = mlp(2)
    q, x = diagonal(model, 0.1, PREDICTED), torch.randn(5, 4)
    found = Linearised(model, q, 3000, covariance=covariance)(x)
    draws = linear_draws(model, q, x, 4000).detach()
    torch.testing.assert_close(found.mean, model(x)[..., 0].detach())
    torch.testing.assert_close(found.epistemic, draws[..., 0].var(0), rtol=0.15, atol=0)
    torch.testing.assert_close(found.aleatoric, draws[..., 1].exp().mean(0), rtol=0.1, atol=0)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_class_for_every_position():
    """Blocks of the covariance by position, against the whole; words and keyword arguments."""
    torch.manual_seed(0)
    model = Words().eval()
    q = diagonal(model, 0.05)
    numbers, weight = torch.randint(0, 7, (4, 5)), torch.rand(4, 5)
    predictor = Linearised(model, q)
    found = predictor(numbers, weight=weight)
    assert found.probs.shape == (4, 5, 3)
    whole = predictor.covariance(numbers, weight=weight)
    assert whole.shape == (4, 15, 15)
    torch.testing.assert_close(found.logit_variance.flatten(1), whole.diagonal(dim1=1, dim2=2))
    blocks = position_blocks(whole, found.logit_mean)
    torch.testing.assert_close(blocks[1, 2], whole[1, 6:9, 6:9])
    drawn = Linearised(model, q, 1000, covariance="samples")(numbers, weight=weight)
    torch.testing.assert_close(found.probs, drawn.probs, rtol=0, atol=0.02)


def test_a_last_layer_of_many_classes_is_exact():
    torch.manual_seed(0)
    model = mlp(200)
    names = ["2.weight", "2.bias"]
    mean = {n: p.detach() for n, p in model.named_parameters() if n in names}
    turn = torch.linalg.qr(torch.randn(200, 200))[0]
    q = KroneckerGaussian(mean, {n: torch.rand_like(m) * 0.3 for n, m in mean.items()}, dict.fromkeys(names, turn))
    x = torch.randn(5, 4)
    found = Linearised(model, q)(x)
    assert "exact" in found.notes[0]
    draws = torch.stack(list(MonteCarlo(model, q, 3000).outputs(x)))
    torch.testing.assert_close(found.logit_variance, draws.var(0), rtol=0.2, atol=0)
    torch.testing.assert_close(found.probs, draws.softmax(-1).mean(0), rtol=0, atol=0.005)
    wide = Linearised(model, diagonal(model, 0.001))(x)
    assert "draws" in wide.notes[0]  # 200 backward passes would cost more


def test_stored_draws_are_all_used_and_mirrored():
    model, x = mlp(), torch.randn(5, 4)
    mean = {n: p.detach() for n, p in model.named_parameters()}
    gaps = {n: 0.3 * torch.randn(6, *m.shape) for n, m in mean.items()}
    q = SampledGaussian(mean, gaps)
    found = Linearised(model, q, n_samples=2)(x)
    moved = torch.stack([
        jvp(lambda t: functional_call(model, t, (x,)), (mean,), ({n: g[s] for n, g in gaps.items()},))[1]
        for s in range(6)
    ])  # fmt: skip
    f = model(x).detach()
    torch.testing.assert_close(found.logit_mean, f)
    torch.testing.assert_close(found.logit_variance, moved.square().mean(0))
    torch.testing.assert_close(found.probs, torch.cat([f + moved, f - moved]).softmax(-1).mean(0))
    assert "6 draws and their mirror images" in found.notes[0]


def test_members_are_averaged_as_they_are():
    model, x = mlp(), torch.randn(5, 4)
    members = [{n: p.detach() + 0.1 * torch.randn_like(p) for n, p in model.named_parameters()} for _ in range(4)]
    q = Empirical(members)
    found = Linearised(model, q)(x)
    draws = torch.stack([
        sum(jvp(lambda t: functional_call(model, t, (x,)), (dict(q.mean),),
                ({n: member[n] - m for n, m in q.mean.items()},)))
        for member in members
    ])  # fmt: skip
    torch.testing.assert_close(found.probs, draws.softmax(-1).mean(0))
    torch.testing.assert_close(found.logit_variance, draws.var(0))
    assert "mirror" not in found.notes[0]


def test_inference_mode_loaders_and_little_memory():
    model, x = mlp(), torch.randn(9, 4)
    q = diagonal(model)
    plain = Linearised(model, q)(x)
    with torch.inference_mode():
        inside = Linearised(model, q)(x.clone())
    torch.testing.assert_close(inside.probs, plain.probs)
    whole = predict_dataset(Linearised(model, q, max_memory=3000), [(part, None) for part in x.split(4)])
    torch.testing.assert_close(whole.probs, plain.probs)
    torch.testing.assert_close(whole.logit_variance, plain.logit_variance)
    by_draws = predict_dataset(Linearised(model, q, max_memory=300), list(x.split(4)))
    assert "draws" in by_draws.notes[0]  # one exact row is beyond it
    assert not by_draws.probs.requires_grad


def test_the_model_is_left_alone_and_may_move():
    model, x = mlp(), torch.randn(5, 4)
    predictor = Linearised(model, diagonal(model))
    before = predictor(x).logit_variance
    with torch.no_grad():
        model[0].weight.zero_()
    torch.testing.assert_close(predictor(x).logit_variance, before)
    predictor.double()
    torch.testing.assert_close(predictor(x.double()).logit_variance, before.double(), rtol=1e-4, atol=1e-6)
    assert device_of(predictor) == device_of(model)


def test_half_precision_is_computed_in_single():
    model, x = mlp(), torch.randn(5, 4).bfloat16()
    rounded = model.bfloat16()
    q = diagonal(rounded)
    found = Linearised(rounded, q)(x)
    exact = Linearised(model.float(), diagonal(model))(x.float())
    assert found.logit_variance.dtype == torch.float32
    torch.testing.assert_close(found.probs, exact.probs, rtol=1e-2, atol=1e-3)


def test_a_link_by_name_goes_by_the_marginals():
    model, x = mlp(), torch.randn(5, 4)
    found = Linearised(model, diagonal(model, 0.1), link="probit")(x)
    torch.testing.assert_close(found.probs, softmax_link(found.logit_mean, found.logit_variance, "probit"))


def test_the_root_of_a_singular_covariance():
    half = torch.randn(4, 5, 2, dtype=torch.float64)
    root = covariance_root(half @ half.mT)
    torch.testing.assert_close(root @ root.mT, half @ half.mT)
    assert bool((root.norm(dim=-2).diff() <= 1e-9).all())


def test_mistakes():
    model = mlp()
    q = diagonal(model)
    with pytest.raises(InvalidInput, match="'exact'"):
        Linearised(model, q, covariance="exact")
    with pytest.raises(InvalidInput, match="'bridge'"):
        Linearised(model, q, link="bridge")
    with pytest.raises(InvalidInput, match="n_samples"):
        Linearised(model, q, n_samples=0)
    with pytest.raises(InvalidInput, match="covariance='samples'"):
        Linearised(model, Empirical([dict(q.mean)] * 2), covariance="full")
    with pytest.raises(InvalidInput, match="training mode"):
        Linearised(mlp().train(), q)
    with pytest.raises(InvalidInput, match="Raise max_memory"):
        Linearised(model, q, covariance="full", max_memory=100)(torch.randn(2, 4))


def test_a_row_of_nan_leaves_the_others_alone():
    torch.manual_seed(0)
    model, inputs = mlp(), torch.randn(3, 4)
    mean = {name: p.detach() for name, p in model.named_parameters()}
    predictor = Linearised(model, DiagonalGaussian(mean, {n: torch.full_like(m, 0.1) for n, m in mean.items()}))
    expected = predictor(inputs)
    inputs[1] = torch.nan
    found = predictor(inputs)
    torch.testing.assert_close(found.probs[[0, 2]], expected.probs[[0, 2]])
    assert found.probs[1].isnan().all()


def test_outputs_of_draws_make_the_prediction():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double().eval()
    mean = {name: p.detach() for name, p in model.named_parameters()}
    drawn = {name: torch.randn(6, *p.shape, dtype=p.dtype) for name, p in mean.items()}
    posterior = SampledGaussian(mean, drawn)
    predictor, inputs = Linearised(model, posterior), torch.randn(5, 3, dtype=torch.float64)
    found = torch.stack(list(predictor.outputs(inputs)))
    assert found.shape == (12, 5, 3)
    prediction = predictor(inputs)
    torch.testing.assert_close(found.softmax(-1).mean(0), prediction.probs)
    torch.testing.assert_close((found - model(inputs)).square().mean(0), prediction.logit_variance)
    moved = torch.func.jvp(
        lambda theta: torch.func.functional_call(model, theta, (inputs,)),
        (mean,),
        ({n: d[0] for n, d in drawn.items()},),
    )[1]
    torch.testing.assert_close(found[0], model(inputs) + moved)
