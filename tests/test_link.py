"""Every link against a million draws, with the errors that its notes state."""

import pytest
import torch

from bayespass import InvalidInput, softmax_link
from bayespass.link import SOBOL_CLASSES

# (classes, variance): largest mean KL(truth || link) in nats; single_pass notes 3.5 has the originals.
BOUNDS = {
    "sobol": {(2, 1.0): 2e-4, (10, 1.0): 1e-3, (10, 4.0): 6e-3, (100, 1.0): 3e-3},
    "delta": {(2, 0.3): 5e-4, (10, 0.3): 5e-4, (100, 1.0): 4e-3},
    "mean_field": {(2, 1.0): 4e-3, (10, 1.0): 6e-3},
    "probit": {(2, 1.0): 4e-3, (10, 1.0): 1.5e-2},
}


def truth(mean, variance, n=40_000):
    generator = torch.Generator().manual_seed(7)
    total = torch.zeros_like(mean)
    for _ in range(10):
        z = torch.randn((n // 10, *mean.shape), generator=generator, dtype=mean.dtype)
        total += (mean + variance.sqrt() * z).softmax(-1).sum(0)
    return total / n


@pytest.mark.parametrize(("link", "classes", "variance"), [(k, *c) for k, v in BOUNDS.items() for c in v])
def test_links_against_monte_carlo(link, classes, variance):
    generator = torch.Generator().manual_seed(1)
    mean = 2 * torch.randn(8, classes, generator=generator, dtype=torch.float64)
    var = variance * (0.5 + torch.rand(8, classes, generator=generator, dtype=torch.float64))
    p, q = truth(mean, var), softmax_link(mean, var, link)
    kl = float((p * (p / q).log()).sum(-1).mean())
    assert kl < BOUNDS[link][classes, variance]
    torch.testing.assert_close(q.sum(-1), torch.ones(8, dtype=torch.float64))


@pytest.mark.parametrize("link", ["auto", "sobol", "delta", "top_k", "mean_field", "probit"])
def test_zero_variance_is_softmax(link):
    mean = 3 * torch.randn(4, 300)
    torch.testing.assert_close(softmax_link(mean, torch.zeros_like(mean), link), mean.softmax(-1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("link", ["auto", "sobol", "delta", "top_k", "mean_field", "probit"])
@pytest.mark.parametrize("variance", [1e-8, 1.0, 1e6])
def test_extreme_variances_give_probabilities(link, variance):
    mean = torch.tensor([[1000.0, -1000.0, 0.0], [0.0, 0.0, 0.0]])
    probs = softmax_link(mean, torch.full_like(mean, variance), link)
    assert bool(torch.isfinite(probs).all())
    assert bool((probs >= 0).all())
    torch.testing.assert_close(probs.sum(-1), torch.ones(2))


def test_many_classes_keep_the_tail():
    """Beyond the Sobol limit the head is integrated and the tail keeps its mass."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(2, SOBOL_CLASSES + 904, generator=generator, dtype=torch.float64)
    var = torch.full_like(mean, 0.5)
    p, q = truth(mean, var, n=4000), softmax_link(mean, var)
    assert float((p * (p / q).log()).sum(-1).mean()) < 2e-3
    torch.testing.assert_close(q.sum(-1), torch.ones(2, dtype=torch.float64))


def test_the_nodes_are_fixed():
    mean, var = torch.randn(3, 5), torch.rand(3, 5)
    torch.manual_seed(1)
    first = softmax_link(mean, var)
    torch.manual_seed(2)
    assert torch.equal(first, softmax_link(mean, var))


def test_chunks_of_nodes_do_not_change_the_result(monkeypatch):
    mean, var = torch.randn(3, 5), torch.rand(3, 5)
    whole = softmax_link(mean, var)
    monkeypatch.setattr("bayespass.link.NODE_ELEMENTS", 40)
    torch.testing.assert_close(softmax_link(mean, var), whole)


def test_an_unknown_link_is_named():
    with pytest.raises(InvalidInput, match="'bridge'"):
        softmax_link(torch.zeros(1, 2), torch.zeros(1, 2), "bridge")
