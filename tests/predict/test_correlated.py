"""The single pass with exact linearised variances: against the full Jacobian, Monte Carlo, and closed forms."""

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from bayespass import CorrelatedPass, Linearised, MonteCarlo, SinglePass
from bayespass.errors import InvalidInput
from bayespass.posterior.base import PosteriorInfo
from bayespass.posterior.mean_field import DiagonalGaussian
from bayespass.predict.correlated import merged


class Pooled(nn.Module):
    """Convolutions that end in a mean over all pixels."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1))
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.features(x).relu().mean((2, 3)))


def isotropic(model, variance, **info):
    mean = {name: p.detach() for name, p in model.named_parameters()}
    return DiagonalGaussian(
        mean, {name: torch.full_like(p, variance) for name, p in mean.items()}, PosteriorInfo(**info)
    )


@pytest.fixture
def pooled():
    torch.manual_seed(0)
    model = Pooled().eval()
    images = torch.randn(120, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    sizes = torch.rand(120, 1, 1, 1, generator=torch.Generator().manual_seed(2))
    return model, isotropic(model, 2e-3), images * sizes


def test_the_largest_logits_have_the_variance_of_the_full_jacobian(pooled):
    model, posterior, images = pooled
    prediction = CorrelatedPass(model, posterior, n_outputs=2)(images)
    exact = Linearised(model, posterior).covariance(images).diagonal(dim1=-2, dim2=-1)
    places = model(images).topk(2, -1).indices
    torch.testing.assert_close(
        prediction.logit_variance.gather(-1, places), exact.gather(-1, places), rtol=1e-3, atol=1e-6
    )
    all_exact = CorrelatedPass(model, posterior, n_outputs=9)(images)
    torch.testing.assert_close(all_exact.logit_variance, exact, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(prediction.logit_mean, SinglePass(model, posterior)(images).logit_mean)
    assert "2 of 5 outputs, exact" in prediction.notes[0]


def test_after_a_global_pool_rows_rank_as_under_monte_carlo(pooled):
    model, posterior, images = pooled
    truth = MonteCarlo(model, posterior, 400, seed=3)(images).logit_variance.sum(-1)
    found = CorrelatedPass(model, posterior)(images).logit_variance.sum(-1)
    assert spearmanr(found, truth)[0] > 0.9


def test_a_linear_network_keeps_its_exact_variance():
    torch.manual_seed(4)
    model, x = nn.Linear(6, 4), torch.randn(7, 6)
    posterior = isotropic(model.eval(), 0.3)
    closed_form = (0.3 * (x.square().sum(-1, keepdim=True) + 1)).expand(7, 4)
    torch.testing.assert_close(CorrelatedPass(model, posterior, n_outputs=2)(x).logit_variance, closed_form)


def test_others_change_as_the_exact_ones_did():
    variance = torch.tensor([[1.0, 2.0, 4.0], [1.0, 1.0, 1.0]])
    found = merged(variance, torch.tensor([[0, 1], [2, 0]]), torch.tensor([[2.0, 8.0], [1.0, 16.0]]))
    torch.testing.assert_close(found, torch.tensor([[2.0, 8.0, 4.0 * 8**0.5], [16.0, 4.0, 1.0]]))


def test_regression_spreads_over_all_outputs_of_a_row():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 6), nn.Unflatten(1, (3, 2))).eval()
    posterior = isotropic(model, 0.01, likelihood="regression", sigma_noise=0.5)
    x = torch.randn(4, 3)
    prediction = CorrelatedPass(model, posterior, n_outputs=2)(x)
    exact = Linearised(model, posterior).covariance(x).diagonal(dim1=-2, dim2=-1).reshape(4, 6)
    assert prediction.epistemic.shape == (4, 3, 2)
    torch.testing.assert_close(prediction.epistemic.reshape(4, 6)[:, [0, 5]], exact[:, [0, 5]], rtol=1e-3, atol=1e-6)


def test_fit_brings_the_variance_to_monte_carlo(pooled):
    model, _, images = pooled
    posterior = isotropic(model, 0.05)  # wide: not linear any more
    truth = MonteCarlo(model, posterior, 400, seed=6)(images[60:]).logit_variance
    predictor = CorrelatedPass(model, posterior)
    before = (predictor(images[60:]).logit_variance / truth).log()
    after = (predictor.fit(images[:60], n_samples=100)(images[60:]).logit_variance / truth).log()
    assert float(after.square().mean()) < 0.5 * float(before.square().mean())


def test_mistakes(pooled):
    model, posterior, images = pooled
    with pytest.raises(InvalidInput, match="n_samples must be at least 10"):
        CorrelatedPass(model, posterior).fit(images, n_samples=3)
    with pytest.raises(InvalidInput, match="n_outputs"):
        CorrelatedPass(model, posterior, n_outputs=0)
    flat = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)).eval()
    with pytest.raises(InvalidInput, match="needs logits"):
        CorrelatedPass(flat, isotropic(flat, 0.1))(torch.randn(4, 3))
