"""The noise that positions share, against closed forms and Monte Carlo."""

import pytest
import torch
from cases import plain
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from bayespass import DiagonalGaussian, SinglePass
from bayespass.approximation import CVP, SHARED
from bayespass.moments import Moments
from bayespass.rules.registry import operation_name, rules
from bayespass.testing.rule_checks import through_dispatch

N = 100_000


def weight(*shape, sd=0.3, seed=0):
    mean = plain(*shape, seed=seed)
    return Moments(mean, torch.full_like(mean, sd**2))


def chain(*steps):
    """Operations one after the other on moments, under SHARED."""

    def run(x):
        for operation, args, kwargs in steps:
            x = through_dispatch(operation, (x, *args), kwargs, SHARED)
        return x

    return run


def test_the_average_over_tokens_of_a_random_linear_map_is_exact():
    """ybar = W xbar + b: variance sum_i V_i xbar_i^2 + V_b, whatever the tokens are."""
    x, w, b = plain(2, 7, 5) + 0.5, weight(3, 5), weight(3, seed=1)
    y = chain((F.linear, (w, b), {}), (torch.mean, (1,), {}))(x)
    expected = F.linear(x.mean(1).square(), w.var) + b.var
    torch.testing.assert_close(y.mean, F.linear(x.mean(1), w.mean, b.mean))
    low, high = 0.95 * expected, expected + F.linear(x.square(), w.var).mean(1) / 7
    assert bool((y.var >= low).all()), "shared noise was averaged away"
    assert bool((y.var <= high).all()), "at most the idiosyncratic part is added"


def test_equal_tokens_share_everything():
    x = plain(1, 1, 5).expand(2, 6, 5)
    y = chain((F.linear, (weight(3, 5), None), {}))(x)
    torch.testing.assert_close(y.shared, y.var)


def test_global_pooling_of_a_random_convolution_matches_monte_carlo():
    x, w, b = plain(1, 3, 8, 8).abs() + 0.2, weight(4, 3, 3, 3, sd=0.1), weight(4, sd=0.1, seed=1)
    y = chain((F.conv2d, (w, b), {"padding": 1}), (torch.mean, ((2, 3),), {}))(x)
    draws = torch.randn(N // 10, *w.mean.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pooled = torch.stack([F.conv2d(x, w.mean + 0.1 * z, padding=1).mean((2, 3))[0] for z in draws[:4000]])
    truth = pooled.var(0) + b.var
    torch.testing.assert_close(y.var[0], truth, rtol=0.2, atol=0)  # borders, and what is left of the rest
    independent = through_dispatch(
        torch.mean, (through_dispatch(F.conv2d, (x, w, b), {"padding": 1}, CVP), (2, 3)), {}, CVP
    )
    assert float((independent.var[0] / truth).max()) < 0.2  # what is lost otherwise


def test_constant_noise_passes_a_kernel_by_the_square_of_its_sum():
    """x = m + u_c with one u_c for all pixels of a channel: v = sum_c (sum_o w_co)^2 s_c, exact."""
    m, s, w = (
        plain(1, 3, 6, 6),
        torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).reshape(1, 3, 1, 1),
        plain(2, 3, 3, 3, seed=1),
    )
    x = Moments(m, s.expand_as(m), s.expand_as(m))
    y = through_dispatch(F.conv2d, (x, w), {}, SHARED)
    expected = (w.sum((2, 3)).square() * s.flatten()).sum(1)
    torch.testing.assert_close(y.var, expected.reshape(1, 2, 1, 1).expand_as(y.var))
    torch.testing.assert_close(y.shared, y.var)


@pytest.mark.parametrize(("alike", "tolerance"), [(0.0, 0.6), (0.5, 0.25), (0.95, 0.15)])
def test_attention_over_values_of_one_random_weight(alike, tolerance):
    """Spec table 3.4: P^2 v alone is 14 to 23 times too small at token cosines .5 and .9."""
    generator = torch.Generator().manual_seed(0)
    common, own = (torch.randn(1, n, 24, generator=generator, dtype=torch.float64) for n in (1, 16))
    x = alike**0.5 * common + (1 - alike) ** 0.5 * own
    q, k, w = plain(1, 16, 8), plain(1, 16, 8, seed=1), weight(8, 24, sd=0.2)
    values = through_dispatch(F.linear, (x, w), {}, SHARED)
    mixed = through_dispatch(F.scaled_dot_product_attention, (q, k, values), {}, SHARED)
    p = torch.softmax(q @ k.mT / 8**0.5, -1)
    truth = F.linear((p @ x).square(), w.var)  # exact: o = W (P x)
    assert abs(float((mixed.var.mean() / truth.mean()).log())) < torch.tensor(1 + tolerance).log()


@pytest.mark.parametrize(
    "operation", [F.relu, F.gelu, F.silu, torch.tanh, torch.sigmoid, F.softplus, F.elu], ids=operation_name
)
def test_activations_keep_the_covariance_of_two_positions(operation):
    """Cov(f(x_p), f(x_q)) for a bivariate Gaussian, within 4 % of the variance of f(x)."""
    for mean in (-1.0, 0.0, 1.5):
        for share in (0.2, 0.6, 1.0):
            x = Moments(
                torch.full((1,), mean, dtype=torch.float64),
                torch.ones(1, dtype=torch.float64),
                torch.full((1,), share, dtype=torch.float64),
            )
            z = torch.randn(3, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            first, second = (operation(mean + share**0.5 * z[0] + (1 - share) ** 0.5 * z[i]) for i in (1, 2))
            truth = torch.cov(torch.stack([first, second]))[0, 1]
            result = through_dispatch(operation, (x,), {}, SHARED)
            assert abs(float(result.shared - truth)) < 0.04 * float(result.var) + 0.005


def test_the_largest_of_fully_shared_entries_moves_with_them():
    x = Moments(
        plain(1, 1, 4, 4), torch.ones(1, 1, 4, 4, dtype=torch.float64), torch.ones(1, 1, 4, 4, dtype=torch.float64)
    )
    y = through_dispatch(torch.max_pool2d, (x, 2), {}, SHARED)
    torch.testing.assert_close(y.mean, torch.max_pool2d(x.mean, 2))
    torch.testing.assert_close(y.var, torch.ones_like(y.var))
    torch.testing.assert_close(y.shared, y.var)


def test_instance_norm_takes_shared_noise_away():
    g = torch.ones(1, 2, 5, 5, dtype=torch.float64)
    x = Moments(plain(1, 2, 5, 5), g, g)
    assert float(through_dispatch(F.instance_norm, (x,), {}, SHARED).shared.abs().max()) < 1e-9
    assert float(through_dispatch(F.group_norm, (x, 1), {}, SHARED).shared.mean()) > 0.1


@given(seed=st.integers(0, 1000), share=st.sampled_from([0.0, 0.3, 1.0]), spread=st.sampled_from([0.0, 1e-8, 1.0, 1e4]),
       dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))  # fmt: skip
@settings(max_examples=40)
def test_shared_stays_between_zero_and_the_variance(seed, share, spread, dtype):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.GELU(), nn.Conv2d(4, 4, 3, stride=2, groups=2), nn.BatchNorm2d(4),
        nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(2), nn.Linear(4, 6), nn.LayerNorm(6), nn.SiLU(),
    ).to(dtype).eval()  # fmt: skip
    from bayespass.gaussian import GaussianTensor, read

    mean = torch.randn(2, 2, 10, 10).to(dtype)
    var = torch.full_like(mean, spread)
    x = GaussianTensor(Moments(mean, var, (share * var).to(dtype)), SHARED)
    for layer in model:
        with torch.no_grad():
            x = layer(x)
        fields = read(x)
        assert bool(torch.isfinite(fields.mean).all())
        assert bool(torch.isfinite(fields.var).all())
        assert bool((fields.var >= 0).all())
        assert bool((fields.shared >= 0).all())
        assert bool((fields.shared.float() <= fields.var.float() * 1.01 + 1e-30).all()), layer


def test_every_rule_of_the_zoo_knows_shared_variance():
    unaware = {operation_name(op) for op, entry in rules().items() if not entry.knows_shared}
    assert unaware <= {
        "torch._weight_norm",
        "torch.rrelu",
        "torch.nn.functional.rrelu",
        "torch.nn.functional.embedding",
        "torch.embedding",
    }


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def test_a_pooled_network_is_repaired():
    """Uncalibrated, the variance that independence loses by tens comes back to within three times."""
    from bayespass import MonteCarlo

    torch.manual_seed(0)
    model = Pooled().eval()
    mean = {name: p.detach() for name, p in model.named_parameters()}
    posterior = DiagonalGaussian(mean, {name: torch.full_like(p, 0.02**2) for name, p in mean.items()})
    x = torch.rand(16, 1, 12, 12)
    with torch.no_grad():
        truth = torch.stack(list(MonteCarlo(model, posterior, 400).outputs(x))).var(0)
        ratios = {
            name: (SinglePass(model, posterior, name).moments(x)[1] / truth).median() for name in ("cvp", "shared")
        }
    assert 1 / 3 < float(ratios["shared"]) < 3
    assert abs(float(ratios["shared"].log())) < abs(float(ratios["cvp"].log()))
