"""Properties over shapes, dtypes and extreme values: variance is never negative, NaN or of another shape."""

import pytest
import torch
from cases import CASES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from bayespass.approximation import CVP, SHARED, STREAMLINED, Approximation
from bayespass.moments import Moments
from bayespass.rules.registry import rules
from bayespass.testing.rule_checks import through_dispatch

APPROXIMATIONS = st.sampled_from([STREAMLINED, CVP, Approximation("delta", norm="delta")])
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
ELEMENTWISE = [F.relu, F.leaky_relu, F.gelu, F.silu, F.sigmoid, F.tanh]
SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


@st.composite
def moments(draw, shape=None, dtype=None, largest=1e4):
    shape = draw(SHAPES) if shape is None else shape
    dtype = draw(DTYPES) if dtype is None else dtype
    bound = min(largest, 100.0) if dtype == torch.float16 else largest
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(shape, generator=generator) * draw(st.sampled_from([0.0, 1e-6, 1.0, bound]))
    var = torch.rand(shape, generator=generator) * draw(st.sampled_from([0.0, 1e-12, 1e-4, 1.0, bound]))
    return Moments(mean.to(dtype), var.to(dtype))


def assert_valid(result, shape, dtype):
    assert result.mean.shape == shape
    assert result.mean.dtype == dtype
    assert bool(torch.isfinite(result.mean).all())
    if result.var is not None:
        assert result.var.shape == shape
        assert result.var.dtype == (torch.float32 if dtype == torch.float16 else dtype)
        assert bool(torch.isfinite(result.var).all())
        assert bool((result.var >= 0).all())


@pytest.mark.parametrize("operation", ELEMENTWISE, ids=lambda f: f.__name__)
@given(x=moments(), approximation=APPROXIMATIONS)
@settings(max_examples=60)
def test_activations(operation, x, approximation):
    result = through_dispatch(operation, (x,), {}, approximation)
    assert_valid(result, x.mean.shape, x.mean.dtype)
    if float(x.var.max()) == 0:
        torch.testing.assert_close(result.mean, operation(x.mean))
        assert float(result.var.abs().max()) == 0


@pytest.mark.parametrize("operation", ELEMENTWISE, ids=lambda f: f.__name__)
@given(scale=st.floats(1e-3, 1e3), m=st.floats(-50, 50))
@settings(max_examples=60)
def test_matched_variance_never_exceeds_what_the_slope_allows(operation, scale, m):
    """Every activation here has a slope of at most 1.13, so the variance is at most 1.28 times the input's."""
    x = Moments(torch.tensor([m], dtype=torch.float64), torch.tensor([scale**2], dtype=torch.float64))
    assert float(through_dispatch(operation, (x,), {}, CVP).var) <= 1.28 * scale**2


@given(data=st.data(), approximation=APPROXIMATIONS, dtype=DTYPES, width=st.integers(2, 8), rows=st.integers(1, 3))
@settings(max_examples=80)
def test_layer_norm(data, approximation, dtype, width, rows):
    x = data.draw(moments((rows, width), dtype, largest=100.0))
    weight = data.draw(moments((width,), dtype, largest=1.0))
    result = through_dispatch(F.layer_norm, (x, (width,), weight, weight.mean), {}, approximation)
    if dtype not in (torch.float16, torch.bfloat16) or approximation.norm != "at_mean":
        assert_valid(result, (rows, width), dtype)


@given(data=st.data(), approximation=APPROXIMATIONS, dtype=DTYPES)
@settings(max_examples=60)
def test_linear_broadcasts_over_any_leading_shape(data, approximation, dtype):
    leading = data.draw(SHAPES)
    x, w = data.draw(moments((*leading, 3), dtype, 10.0)), data.draw(moments((2, 3), dtype, 10.0))
    b = data.draw(moments((2,), dtype, 10.0))
    assert_valid(through_dispatch(F.linear, (x, w, b), {}, approximation), (*leading, 2), dtype)


@given(data=st.data())
@settings(max_examples=60)
def test_sums_and_products_broadcast_like_torch(data):
    x = data.draw(moments((3, 1, 2), torch.float64, 10.0))
    y = data.draw(moments(data.draw(st.sampled_from([(2,), (4, 1), (1, 4, 2), (3, 4, 2)])), torch.float64, 10.0))
    for operation in (torch.add, torch.sub, torch.mul):
        result = through_dispatch(operation, (x, y), {}, CVP)
        assert_valid(result, operation(x.mean, y.mean).shape, torch.float64)
        swapped = through_dispatch(operation, (y, x), {}, CVP)
        torch.testing.assert_close(result.var, swapped.var)


@given(data=st.data(), dtype=DTYPES, causal=st.booleans(), tokens=st.integers(1, 5), keys=st.integers(1, 5))
@settings(max_examples=60)
def test_attention(data, dtype, causal, tokens, keys):
    keys = tokens if causal else keys
    q, k, v = (data.draw(moments((2, n, 3), dtype, 10.0)) for n in (tokens, keys, keys))
    result = through_dispatch(F.scaled_dot_product_attention, (q, k, v), {"is_causal": causal}, CVP)
    assert_valid(result, (2, tokens, 3), dtype)
    assert float(result.var.max()) <= 1.05 * float(v.var.max()) + 1e-6  # rows of weights sum to one


@given(x=moments(largest=30.0), dim=st.sampled_from([0, -1]))
@settings(max_examples=60)
def test_softmax(x, dim):
    assert_valid(through_dispatch(torch.softmax, (x, dim), {}, CVP), x.mean.shape, x.mean.dtype)


@given(data=st.data(), dtype=DTYPES, approximation=APPROXIMATIONS, kernel=st.integers(1, 3), padding=st.integers(0, 1))
@settings(max_examples=60)
def test_pooling(data, dtype, approximation, kernel, padding):
    padding = min(padding, kernel // 2)
    x = data.draw(moments((2, 2, 5, 4), dtype, 100.0))
    for operation in (F.max_pool2d, F.avg_pool2d):
        result = through_dispatch(operation, (x, kernel, 1, padding), {}, approximation)
        assert_valid(result, operation(x.mean, kernel, 1, padding).shape, dtype)


EVERY_CASE = [(operation, args, kwargs) for operation, cases in CASES.items() for args, kwargs in cases]
# Where torch itself gives NaN or infinity for these inputs, or has no kernel for the dtype, there is nothing to check.
UNDEFINED = (RuntimeError, NotImplementedError, ValueError)


def as_drawn(tree, dtype, mean_scale, var_scale, share):
    """The case in another precision, with other sizes and a shared part."""

    def changed(leaf):
        if isinstance(leaf, Moments):
            var = (leaf.var * var_scale).to(dtype)
            return Moments((leaf.mean * mean_scale).to(dtype), var, None if share is None else (share * var).to(dtype))
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            return leaf.to(dtype)
        return leaf

    return pytree.tree_map(changed, tree, is_leaf=lambda leaf: isinstance(leaf, Moments))


@given(
    case=st.sampled_from(EVERY_CASE),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    mean_scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0]),
    var_scale=st.sampled_from([0.0, 1e-8, 1.0, 100.0, 1e6]),
    approximation=st.sampled_from([STREAMLINED, CVP, SHARED]),
    share=st.sampled_from([0.0, 0.5, 1.0]),
)
@settings(max_examples=800, derandomize=True)
@pytest.mark.filterwarnings("ignore")
def test_every_rule_in_every_precision_and_size(case, dtype, mean_scale, var_scale, approximation, share):
    operation, args, kwargs = case
    var_scale = min(var_scale, 100.0) if dtype == torch.float16 else var_scale
    share = share if approximation.shared == "carry" and rules()[operation].knows_shared else None
    args, kwargs = as_drawn((args, kwargs), dtype, mean_scale, var_scale, share)
    at_mean = pytree.tree_map(
        lambda leaf: leaf.mean if isinstance(leaf, Moments) else leaf,
        (args, kwargs),
        is_leaf=lambda leaf: isinstance(leaf, Moments),
    )
    try:
        plain = operation(*at_mean[0], **at_mean[1])
    except UNDEFINED:
        return
    results = pytree.tree_leaves(
        through_dispatch(operation, args, kwargs, approximation), is_leaf=lambda leaf: isinstance(leaf, Moments)
    )
    for result, expected in zip(results, pytree.tree_leaves(plain), strict=True):
        if not isinstance(result, Moments) or not bool(torch.isfinite(expected).all()):
            continue
        assert result.mean.shape == expected.shape
        assert result.mean.dtype == expected.dtype
        assert not bool(torch.isnan(result.mean).any())
        if result.var is None:
            continue
        assert result.var.shape == expected.shape
        assert not bool(torch.isnan(result.var).any())
        assert bool((result.var >= 0).all())
        if result.shared is not None:
            assert not bool(torch.isnan(result.shared).any())
            assert bool((result.shared >= 0).all())
