"""The wrapper: it never drops variance in silence, and it composes with PyTorch's transforms."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bayespass.approximation import CVP, STREAMLINED
from bayespass.errors import UnsupportedOp
from bayespass.gaussian import GaussianTensor, read
from bayespass.moments import Moments


@pytest.fixture
def x():
    return GaussianTensor(Moments(torch.randn(3, 4), torch.rand(3, 4)), CVP)


@pytest.mark.parametrize("name", ["data", "real", "imag"])
def test_attributes_that_hand_out_the_mean_raise(x, name):
    with pytest.raises(UnsupportedOp, match=name):
        getattr(x, name)


@pytest.mark.parametrize("call", [Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.argmax, Tensor.__bool__, torch.sort])
def test_reads_of_values_raise(x, call):
    with pytest.raises(UnsupportedOp, match="no Gaussian rule"):
        call(x)


def test_metadata_reads_pass(x):
    assert x.shape == (3, 4)
    assert x.size(1) == 4
    assert x.dim() == x.ndim == 2
    assert x.dtype == torch.float32
    assert x.device.type == "cpu"
    assert len(x) == 3
    assert x.is_floating_point()
    assert x.numel() == 12
    assert isinstance(x, Tensor)
    assert "GaussianTensor" in repr(x)


def test_an_operation_without_a_rule_names_itself(x):
    with pytest.raises(UnsupportedOp, match=r"torch\.cumprod \(got Gaussian \(3, 4\) float32, 1\)"):
        torch.cumprod(x, 1)


def test_operations_below_the_rules_raise(x):
    with pytest.raises(UnsupportedOp, match="below the level"):
        torch.ops.aten.sin.default.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.Python), x)


def test_mixing_approximations_raises(x):
    other = GaussianTensor(Moments(torch.zeros(4), torch.ones(4)), STREAMLINED)
    with pytest.raises(UnsupportedOp, match="two approximations"):
        x + other


def test_in_place_changes_the_tensor_itself(x):
    before = read(x)
    result = x.add_(2.0)
    assert result is x
    torch.testing.assert_close(read(x).mean, before.mean + 2)
    torch.testing.assert_close(read(x).var, before.var)
    y = x
    y *= 3
    torch.testing.assert_close(read(x).var, 9 * before.var)


def test_in_place_activation_changes_the_tensor_itself(x):
    expected = read(F.relu(x))
    assert F.relu(x, inplace=True) is x
    torch.testing.assert_close(read(x).mean, expected.mean)


def test_in_place_on_a_plain_tensor_is_refused(x):
    plain = torch.zeros(3, 4)
    with pytest.raises(UnsupportedOp, match="out of place"):
        plain += x


@pytest.mark.parametrize(
    "call", [lambda x: torch.add(x, 1, out=torch.zeros(3, 4)), lambda x: torch.cat([x, x], out=torch.zeros(6, 4))]
)
def test_out_arguments_are_refused(x, call):
    with pytest.raises(UnsupportedOp, match="out="):
        call(x)


def test_the_same_tensor_twice_is_recognised(x):
    v, m = read(x).var, read(x).mean
    assert isinstance(x - x, GaussianTensor)
    torch.testing.assert_close(read(x - x).var, torch.zeros(3, 4))
    torch.testing.assert_close(read(x + x).var, 4 * v)
    torch.testing.assert_close(read(x * x).var, 4 * m**2 * v + 2 * v**2)


def test_shared_variance_meets_only_rules_that_know_it():
    x = GaussianTensor(Moments(torch.zeros(3, 4), torch.ones(3, 4), shared=torch.full((3, 4), 0.5)), CVP)
    assert read(x.sum(0)).shared is not None
    with pytest.raises(UnsupportedOp, match="shared"):
        torch._weight_norm(x, torch.ones(3, 1), 0)


def test_gradients_flow_to_mean_and_variance():
    mean, var = torch.randn(4, requires_grad=True), torch.rand(4, requires_grad=True)
    y = read(F.gelu(GaussianTensor(Moments(mean, var), CVP)))
    (y.mean.sum() + y.var.sum()).backward()
    assert mean.grad.abs().sum() > 0
    assert var.grad.abs().sum() > 0


def test_vmap_over_moments():
    means, variances = torch.randn(5, 4), torch.rand(5, 4)

    def one(mean, var):
        y = read(F.silu(GaussianTensor(Moments(mean, var), CVP)))
        return y.mean, y.var

    batched = torch.func.vmap(one)(means, variances)
    single = [one(m, v) for m, v in zip(means, variances, strict=True)]
    torch.testing.assert_close(batched[1], torch.stack([v for _, v in single]))


def test_flatten_and_unflatten_round_trip(x):
    names, context = x.__tensor_flatten__()
    again = GaussianTensor.__tensor_unflatten__({n: getattr(x, n) for n in names}, context, x.shape, x.stride())
    torch.testing.assert_close(read(again).var, read(x).var)
    assert again.approximation is CVP


def test_lists_inside_arguments_are_unwrapped(x):
    joined = read(torch.cat([x, torch.ones(1, 4)]))
    assert joined.var.shape == (4, 4)
    assert float(joined.var[3].sum()) == 0.0


def test_a_view_is_stale_after_an_in_place_change_through_another():
    base = GaussianTensor(Moments(torch.zeros(2, 4), torch.ones(2, 4)), CVP)
    view = base.view(2, 2, 2)
    view.add_(10.0)
    assert float(read(view).mean[0, 0, 0]) == 10
    with pytest.raises(UnsupportedOp, match="changed in place through another view"):
        base + 1
    other = view.flatten(1)
    assert float(read(other + 1).mean[0, 0]) == 11


def test_copies_do_not_become_stale():
    base = GaussianTensor(Moments(torch.zeros(2, 4), torch.ones(2, 4)), CVP)
    copy = base.clone()
    copy.mul_(2.0)
    assert float(read(base + 0).var[0, 0]) == 1


def test_arguments_that_a_rule_does_not_take_are_refused_by_name(x):
    with pytest.raises(UnsupportedOp, match=r"rule of torch\.erf does not take these arguments.*out"):
        torch.erf(x, out=torch.empty(3, 4))
