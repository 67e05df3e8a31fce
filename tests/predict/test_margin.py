"""The margin's variance against the whole covariance of the logits, and against Monte Carlo."""

import pytest
import torch
from torch import nn

from bayespass.curvature.pushforward import OutputCovariance
from bayespass.errors import InvalidInput
from bayespass.posterior.base import PosteriorInfo
from bayespass.posterior.empirical import Empirical
from bayespass.posterior.full import FullGaussian
from bayespass.posterior.kronecker import KroneckerGaussian
from bayespass.posterior.mean_field import DiagonalGaussian
from bayespass.predict.dataset import predict_dataset
from bayespass.predict.linearised import Linearised
from bayespass.predict.margin import Margin, margin_rows
from bayespass.predict.sampling import MonteCarlo

MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)), (6, 4)),
    "cnn": (lambda: nn.Sequential(nn.Conv2d(1, 3, 2), nn.GELU(), nn.Flatten(), nn.Linear(12, 5)), (6, 1, 3, 3)),
    "positions": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 5)), (6, 3, 4)),
    "transformer": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True), nn.Flatten(), nn.Linear(12, 5)
        ),
        (6, 3, 4),
    ),
}
KINDS = ["diagonal", "kronecker", "full"]


def problem(name, kind="diagonal", scale=0.05):
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make().double().eval()
    mean = {n: p.detach() for n, p in model.named_parameters()}
    variance = {n: scale * torch.rand_like(m) for n, m in mean.items()}
    if kind == "full":
        root = torch.randn(sum(m.numel() for m in mean.values()), 4, dtype=torch.float64)
        q = FullGaussian(mean, scale * root)
    elif kind == "kronecker":
        left = {n: torch.linalg.qr(torch.randn(len(m), len(m), dtype=torch.float64))[0] for n, m in mean.items()}
        q = KroneckerGaussian(mean, variance, left)
    else:
        q = DiagonalGaussian(mean, variance)
    return model, q, torch.randn(shape, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_the_variance_is_that_of_the_difference(name, kind):
    model, q, x = problem(name, kind)
    found = Margin(model, q)(x)
    logits = model(x).detach()
    top = logits.topk(2, -1)
    assert torch.equal(found.labels, top.indices[..., 0])
    assert torch.equal(found.runner_up, top.indices[..., 1])
    torch.testing.assert_close(found.margin, top.values[..., 0] - top.values[..., 1])
    (part,) = OutputCovariance(model, q).chunks(x, square=True)
    picks = nn.functional.one_hot(top.indices, 5).double()
    pick = (picks[..., 0, :] - picks[..., 1, :]).reshape(len(x), -1, 5)
    positions = torch.zeros(len(x), pick.shape[1], logits[0].numel(), dtype=torch.float64)
    for k in range(pick.shape[1]):
        positions[:, k, 5 * k : 5 * k + 5] = pick[:, k]
    truth = (positions @ part.covariance() @ positions.mT).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(found.variance, truth.reshape(found.margin.shape))


def test_a_linear_network_against_monte_carlo():
    """Variance within 6 standard errors of 4,000 draws, and how often the two classes change places."""
    model = nn.Linear(4, 5).eval()
    q = DiagonalGaussian(*({n: f(p.detach()) for n, p in model.named_parameters()} for f in (torch.clone, torch.abs)))
    x = torch.randn(6, 4)
    found = Margin(model, q)(x)
    draws = torch.stack(list(MonteCarlo(model, q, 4000).outputs(x)))
    pair = torch.stack([found.labels, found.runner_up], -1).expand(len(draws), -1, -1)
    gap = draws.gather(-1, pair)
    gap = (gap[..., 0] - gap[..., 1]).detach()
    torch.testing.assert_close(found.variance, gap.var(0), rtol=6 * (2 / 4000) ** 0.5, atol=0)
    torch.testing.assert_close(found.error_probability, (gap < 0).float().mean(0), rtol=0, atol=6 * 0.5 / 4000**0.5)
    torch.testing.assert_close(found.confidence, 1 - found.error_probability)


def test_little_memory_loaders_and_inference_mode():
    model, q, x = problem("cnn")
    whole = Margin(model, q)(x)
    found = predict_dataset(Margin(model, q, max_memory=6000), [(part, None) for part in x.split(4)])
    torch.testing.assert_close(found.variance, whole.variance)
    torch.testing.assert_close(found.error_probability, whole.error_probability)
    assert found.method == "margin"
    assert "exact" in found.notes[0]


def test_posteriors_with_draws_alone():
    model, q, x = problem("mlp")
    members = Empirical([{n: m + 0.1 * torch.randn_like(m) for n, m in q.mean.items()} for _ in range(5)])
    found = Margin(model, members)(x)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(members.mean[name])
    whole = Linearised(model, members).covariance(x)
    top = model(x).topk(2, -1).indices
    pick = nn.functional.one_hot(top, 5).double()
    pick = pick[:, 0] - pick[:, 1]
    torch.testing.assert_close(found.variance, torch.einsum("nr,nrq,nq->n", pick, whole, pick))
    assert "5 draws" in found.notes[0]


def test_no_variance_means_no_doubt():
    model, q, x = problem("mlp", scale=0.0)
    found = Margin(model, q)(x)
    assert float(found.variance.max()) == 0
    assert float(found.error_probability.max()) == 0
    assert float(found.confidence.min()) == 1


def test_mistakes():
    model, q, _ = problem("mlp")
    regression = DiagonalGaussian(q.mean, q.variance, PosteriorInfo("regression", sigma_noise=1.0))
    with pytest.raises(InvalidInput, match="use Linearised"):
        Margin(model, regression)
    with pytest.raises(InvalidInput, match="at least two logits"):
        margin_rows(torch.zeros(3, 1))
    with pytest.raises(InvalidInput, match="max_memory"):
        Margin(model, q, max_memory=0)
