"""Every link against a million draws, with the errors that its notes state."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bayespass import InvalidInput, softmax_link
from bayespass.link import CORRELATED, SOBOL_CLASSES, Correlation, correlated_softmax_link, mutual_information, n_nodes

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


@pytest.mark.parametrize("variance", [0.1, 1.0])
@pytest.mark.parametrize("classes", [3, 50, SOBOL_CLASSES + 904])
def test_mutual_information_against_draws(classes, variance):
    generator = torch.Generator().manual_seed(3)
    mean = 2 * torch.randn(4, classes, generator=generator, dtype=torch.float64)
    var = variance * torch.rand(4, classes, generator=generator, dtype=torch.float64)
    p, entropy = torch.zeros_like(mean), torch.zeros(4, dtype=torch.float64)
    for _ in range(8):
        draws = (mean + var.sqrt() * torch.randn((125, *mean.shape), generator=generator, dtype=mean.dtype)).softmax(-1)
        p, entropy = p + draws.mean(0) / 8, entropy + torch.special.entr(draws).sum(-1).mean(0) / 8
    exact = torch.special.entr(p).sum(-1) - entropy
    found = mutual_information(mean, var)
    if classes > SOBOL_CLASSES:  # what the tail does not know is left out
        assert bool((found < exact).all())
        assert float((found / exact).min()) > 0.5
    else:
        torch.testing.assert_close(found, exact, rtol=0.1, atol=1e-3)
    assert float(mutual_information(mean, torch.zeros_like(var)).max()) < 1e-10


@pytest.mark.parametrize("link", ["auto", "sobol", "delta", "top_k", "mean_field", "probit"])
def test_parts_of_rows_do_not_change_the_result(link, monkeypatch):
    classes = 300 if link == "top_k" else 30
    mean, var = torch.randn(2, 5, classes), torch.rand(2, 5, classes)
    whole, information = softmax_link(mean, var, link), mutual_information(mean, var)
    monkeypatch.setattr("bayespass.link.ROW_ELEMENTS", 3 * classes)
    torch.testing.assert_close(softmax_link(mean, var, link), whole)
    torch.testing.assert_close(mutual_information(mean, var), information, rtol=1e-4, atol=1e-5)
    half = softmax_link(mean.bfloat16(), var.bfloat16(), link)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), whole, rtol=0.1, atol=0.01)


class PeakMemory(TorchDispatchMode):
    """Most bytes that tensors made inside held at any time, and the most that one of them held."""

    def __init__(self):
        super().__init__()
        self.held, self.now, self.peak, self.largest = {}, 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in (t for t in tree_leaves(result) if isinstance(t, torch.Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in known and storage._cdata not in self.held:
                self.held[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak, self.largest = max(self.peak, self.now), max(self.largest, storage.nbytes())
                weakref.finalize(storage, self.release, storage._cdata)
        return result

    def release(self, key):
        self.now -= self.held.pop(key)


def test_a_large_vocabulary_costs_no_copy_per_node():
    """Four texts of 64 tokens over GPT-2's vocabulary: 1.3 times the result, 0.24 for the information."""
    mean, var = torch.randn(4, 64, 50257), torch.rand(4, 64, 50257)
    size = mean.numel() * mean.element_size()
    with PeakMemory() as memory:
        softmax_link(mean, var)
    assert memory.largest == size  # the result; nothing larger was ever made
    assert memory.peak < 1.5 * size
    with PeakMemory() as memory:
        mutual_information(mean, var)
    assert memory.peak < 0.4 * size


@pytest.mark.parametrize(("classes", "bound"), [(3, 2e-4), (10, 2e-3), (50, 1e-2)])
def test_correlated_logits_against_monte_carlo(classes, bound):
    """Largest mean KL(truth || link) in nats, for eigenvectors by falling eigenvalue and variances about 1."""
    generator = torch.Generator().manual_seed(2)
    mean = 2 * torch.randn(6, classes, generator=generator, dtype=torch.float64)
    root = torch.linalg.qr(torch.randn(6, classes, classes, generator=generator, dtype=torch.float64))[0]
    root = root * torch.logspace(0.5, -1, classes, dtype=torch.float64)
    p = torch.zeros_like(mean)
    for _ in range(10):
        noise = torch.randn(6, 4000, classes, generator=generator, dtype=torch.float64)
        p += (mean[:, None] + noise @ root.mT).softmax(-1).mean(1) / 10
    q = correlated_softmax_link(mean, root)
    assert float((p * (p / q).log()).sum(-1).mean()) < bound
    torch.testing.assert_close(q.sum(-1), torch.ones(6, dtype=torch.float64))


def test_uncorrelated_roots_are_the_independent_link():
    mean, variance = torch.randn(2, 3, 7), torch.rand(2, 3, 7)
    whole = softmax_link(mean, variance)
    torch.testing.assert_close(correlated_softmax_link(mean, torch.diag_embed(variance.sqrt())), whole)
    torch.testing.assert_close(correlated_softmax_link(mean, torch.eye(7), variance.sqrt()), whole)


def test_a_shared_root_is_a_root_for_every_row(monkeypatch):
    mean, scale, root = torch.randn(2, 5, 4), torch.rand(2, 5, 6), torch.randn(4, 6)
    own = root * scale[..., None, :]
    whole = correlated_softmax_link(mean, own)
    torch.testing.assert_close(correlated_softmax_link(mean, root, scale), whole)
    monkeypatch.setattr("bayespass.link.NODE_ELEMENTS", 1500)  # two rows at a time
    torch.testing.assert_close(correlated_softmax_link(mean, root, scale), whole)
    torch.testing.assert_close(correlated_softmax_link(mean, own), whole)
    half = correlated_softmax_link(mean.bfloat16(), root.bfloat16(), scale.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), whole, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("root", [torch.zeros(3, 5, 2), torch.zeros(4, 2), torch.zeros(2, 4, 2), torch.zeros(4)])
def test_a_root_that_does_not_fit_is_refused(root):
    with pytest.raises(InvalidInput, match="root must have shape"):
        correlated_softmax_link(torch.zeros(3, 4), root)


def mixed(rows, classes, features, seed, dtype=torch.float64, own=0.1):
    """Logits that are a linear map of independent features plus noise of their own, and their correlation."""
    generator = torch.Generator().manual_seed(seed)
    mean = 2 * torch.randn(rows, classes, generator=generator, dtype=dtype)
    weight = torch.randn(classes, features, generator=generator, dtype=dtype) / features**0.5
    var = 3 * torch.rand(rows, features, generator=generator, dtype=dtype)
    total = var @ weight.square().T + own
    return mean, weight, Correlation(var, weight, total)


@pytest.mark.parametrize(("classes", "features"), [(2, 3), (10, 4), (10, 40), (60, 8)])
def test_logits_of_a_linear_map_against_monte_carlo(classes, features):
    mean, weight, correlation = mixed(6, classes, features, 3)
    noise = torch.randn(200_000, features + classes, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    sd = correlation.features.sqrt()
    truth = torch.stack(
        [
            (m + (noise[:, :features] * s) @ weight.T + 0.1**0.5 * noise[:, features:]).softmax(-1).mean(0)
            for m, s in zip(mean, sd, strict=True)
        ]
    )
    kl = [
        float((truth * (truth / softmax_link(mean, correlation.total, correlation=c)).log()).sum(-1).mean())
        for c in (correlation, None)
    ]
    assert kl[0] < (2e-3 if classes <= CORRELATED else 5e-3)  # the smaller logits of a row stay independent
    assert kl[0] < (0.3 if classes <= CORRELATED else 0.6) * kl[1]


@pytest.mark.parametrize("classes", [5, 200, SOBOL_CLASSES + 50])
def test_own_noise_alone_is_no_correlation(classes):
    mean, _, correlation = mixed(3, classes, 4, 5, torch.float32)
    alone = correlation._replace(features=torch.zeros_like(correlation.features))
    found = softmax_link(mean, correlation.total, correlation=alone)
    torch.testing.assert_close(found, softmax_link(mean, correlation.total), rtol=0.2, atol=0.02)


def test_a_large_vocabulary_keeps_the_correlation_of_its_largest_logits():
    """Beyond the Sobol limit, where a handful competes: a tail of large mass is as independent as it always was."""
    classes, features = SOBOL_CLASSES + 50, 6
    generator = torch.Generator().manual_seed(9)
    mean, weight, correlation = mixed(2, classes, features, 9, own=0.01)
    mean[:, :5] += 20.0
    weight[:5] *= 2.0
    correlation = Correlation(correlation.features, weight, correlation.features @ weight.square().T + 0.01)
    truth = torch.zeros_like(mean)
    for _ in range(40):
        noise = torch.randn(100, 2, features, generator=generator, dtype=mean.dtype)
        own = 0.1 * torch.randn(100, *mean.shape, generator=generator, dtype=mean.dtype)
        truth += (mean + noise * correlation.features.sqrt() @ weight.T + own).softmax(-1).mean(0) / 40
    kl = [
        float((truth * (truth / softmax_link(mean, correlation.total, correlation=c)).log()).sum(-1).mean())
        for c in (correlation, None)
    ]
    assert kl[0] < 3e-3
    assert kl[0] < 0.3 * kl[1]


def test_noise_that_all_logits_share_changes_nothing():
    mean = torch.tensor([[2.0, 0.0, -1.0]])
    common = Correlation(torch.full((1, 1), 9.0), torch.ones(3, 1), torch.full((1, 3), 9.0))
    torch.testing.assert_close(
        softmax_link(mean, common.total, correlation=common), mean.softmax(-1), rtol=0.02, atol=1e-3
    )


def test_corrected_variances_keep_the_correlation():
    mean, _, correlation = mixed(4, 6, 5, 6)
    doubled = correlation._replace(features=2 * correlation.features, total=2 * correlation.total)
    left = softmax_link(mean, 2 * correlation.total, correlation=correlation)
    torch.testing.assert_close(left, softmax_link(mean, doubled.total, correlation=doubled))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e6])
def test_extreme_correlations_give_probabilities(dtype, scale):
    mean, weight, correlation = mixed(3, 40, 2, 7, torch.float32, own=0.0)
    features = (scale * correlation.features).clamp(max=6e4).to(dtype)
    total = (features.float() @ weight.square().T).clamp(max=6e4).to(dtype)
    probs = softmax_link(mean.to(dtype), total, correlation=Correlation(features, weight.to(dtype), total))
    assert probs.dtype == dtype
    assert bool(torch.isfinite(probs).all())
    torch.testing.assert_close(probs.float().sum(-1), torch.ones(3), rtol=0.02, atol=0.02)


def test_correlations_take_leading_axes_and_refuse_other_shapes():
    mean, _, correlation = mixed(6, 4, 3, 8)
    flat = softmax_link(mean, correlation.total, correlation=correlation)
    lifted = Correlation(correlation.features.view(2, 3, 3), correlation.weight, correlation.total.view(2, 3, 4))
    found = softmax_link(mean.view(2, 3, 4), lifted.total, correlation=lifted)
    torch.testing.assert_close(found.view(6, 4), flat)
    with pytest.raises(InvalidInput, match="features"):
        softmax_link(mean, correlation.total, correlation=correlation._replace(features=correlation.features[:2]))


def test_few_classes_get_more_nodes():
    assert [n_nodes(c) for c in (2, 64, 100, 128, 1000, 4096)] == [256, 256, 128, 128, 64, 64]
