"""Shared variance against Monte Carlo: a common draw for all positions plus one for each."""

import torch

from bayespass.moments import Moments, ScoreNoise, add, average, bilinear, move, scale

N, POSITIONS = 200_000, 6


def correlated(seed=0):
    """Samples over POSITIONS entries with a shared and an own part, and their moments."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(POSITIONS, generator=generator, dtype=torch.float64)
    shared = torch.rand(POSITIONS, generator=generator, dtype=torch.float64)
    own = torch.rand(POSITIONS, generator=generator, dtype=torch.float64)
    common = torch.randn(N, 1, generator=generator, dtype=torch.float64)
    alone = torch.randn(N, POSITIONS, generator=generator, dtype=torch.float64)
    return mean + common * shared.sqrt() + alone * own.sqrt(), Moments(mean, shared + own, shared)


def close(sample, value):
    standard_error = float(sample.var(0).max()) * (2 / N) ** 0.5
    torch.testing.assert_close(value, sample.var(0), rtol=0, atol=5 * standard_error)


def test_average_keeps_shared_variance():
    sample, x = correlated()
    weights = torch.rand(POSITIONS, dtype=torch.float64)
    result = average(lambda t: t @ weights, lambda t: t @ weights.square(), x)
    close(sample @ weights, result.var)
    independent = average(lambda t: t @ weights, lambda t: t @ weights.square(), Moments(x.mean, x.var))
    assert float(independent.var) < float(result.var)


def test_fully_shared_average_is_the_square_of_the_mean_sd():
    x = Moments(torch.zeros(4), torch.full((4,), 9.0), torch.full((4,), 9.0))
    result = average(lambda t: t.mean(), lambda t: t.mean() / 4, x)
    torch.testing.assert_close(result.var, torch.tensor(9.0))


def test_scale_and_add_carry_shared_variance():
    sample, x = correlated()
    gain = torch.full((POSITIONS,), 1.5, dtype=torch.float64)
    scaled = scale(x, gain)
    torch.testing.assert_close(scaled.shared, x.shared * 2.25)
    other_sample, y = correlated(seed=1)
    total = add(scaled, y, alpha=2)
    torch.testing.assert_close(total.shared, scaled.shared + 4 * y.shared)
    close(1.5 * sample + 2 * other_sample, total.var)


def test_a_deterministic_linear_map_over_features_keeps_the_position_share():
    weight = torch.randn(3, 2, dtype=torch.float64)
    shared = torch.rand(5, 2, dtype=torch.float64)
    x = Moments(torch.randn(5, 2, dtype=torch.float64), shared + 0.5, shared)
    result = bilinear(torch.nn.functional.linear, x, weight)
    torch.testing.assert_close(result.shared, shared @ weight.square().T)
    assert bool((result.shared <= result.var).all())


def test_moves_move_every_field():
    _, x = correlated()
    x = Moments(x.mean, x.var, x.shared[:1], scores=ScoreNoise(x.var * 2, x.var))  # shared broadcasts
    moved = move(torch.Tensor.flip, x, (0,))
    for found, given in zip(moved.scores, x.scores, strict=True):
        torch.testing.assert_close(found, given.flip(0))
    assert moved.shared.shape == x.mean.shape
    first, second = move(torch.Tensor.split, x, 3)
    torch.testing.assert_close(torch.cat([first.var, second.var]), x.var)


def test_nothing_random_stays_nothing():
    x = Moments(torch.ones(3))
    assert add(x, torch.ones(3)).var is None
    assert scale(x, 2.0).var is None
    assert bilinear(torch.mul, x, torch.ones(3)).var is None
    assert average(lambda t: t.mean(), lambda t: t.mean(), x).var is None


def test_products_carry_shared_variance():
    sample, x = correlated()
    other_sample, y = correlated(seed=1)
    sample, other_sample = sample - x.mean + x.mean.abs(), other_sample - y.mean + y.mean.abs()  # gains of one sign
    x, y = Moments(x.mean.abs(), x.var, x.shared), Moments(y.mean.abs(), y.var, y.shared)
    product = bilinear(torch.mul, x, y)
    close(sample * other_sample, product.var)
    together = torch.cov((sample * other_sample).T)[0, 1]
    expected = (product.shared[0] * product.shared[1]).sqrt()
    assert float((together - expected).abs()) < 0.15 * float(product.var[:2].max())
