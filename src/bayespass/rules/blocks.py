"""Blocks that are written out in small operations, recognised by what they compute.

Many libraries write an RMS norm or an activation function out, each in a class of its own. Seen
operation by operation, the factors of `x * rsqrt(mean(x^2))` or `x * sigmoid(1.7 x)` look
independent, which they are not. A block without inner modules is therefore tried on a few numbers:
if it computes an RMS norm, or maps every entry alone, the rule for that is used for the whole of it.
Nothing depends on names of classes.
"""

import dis
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from bayespass.approximation import Approximation
from bayespass.moments import Moments, as_moments
from bayespass.rules.activation import Matched, elementwise, hermite, quadrature
from bayespass.rules.affine import linear
from bayespass.rules.normalisation import rms_norm
from bayespass.rules.registry import recognised_rule, rules

EPSILON_NAMES = ("eps", "variance_epsilon", "epsilon")
NODES = 9
SLOPE_SD = 0.03  # over which a derivative is taken


class _Calls(TorchFunctionMode):
    """Which torch functions ran."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


def _is_foreign_leaf(module: nn.Module) -> bool:
    """No inner modules and no class of torch.nn, whose functions have rules of their own."""
    inside = type(module).__module__.startswith("torch.nn") or next(module.children(), None) is not None
    return not inside and not list(module.buffers())


def _tried(module: nn.Module, x: Tensor, parameters: dict[str, Tensor] | None = None) -> Tensor | None:
    """What the module makes of x; None if it takes no single tensor or makes no tensor of the same kind."""
    try:
        with torch.no_grad():
            y = functional_call(module, parameters or {}, (x,))
    except Exception:
        return None
    return y if isinstance(y, Tensor) and y.shape == x.shape and y.is_floating_point() else None


def _probe(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _rms_offset(module: nn.Module) -> tuple[float, float] | None:
    """(offset, eps) such that the module is x / sqrt(mean(x^2) + eps) (offset + weight); None if it is not."""
    parameters = dict(module.named_parameters())
    if list(parameters) not in ([], ["weight"]) or not _is_foreign_leaf(module):
        return None
    weight = parameters.get("weight")
    if weight is not None and weight.dim() != 1:
        return None
    size = 8 if weight is None else len(weight)
    eps = next(
        (getattr(module, name) for name in EPSILON_NAMES if isinstance(getattr(module, name, None), float)), None
    )
    if eps is None or size < 2:
        return None
    x = torch.cat([_probe(2, size), max(eps, 1e-12) ** 0.5 * _probe(2, size)])
    drawn = _probe(3, size)[2]
    y = _tried(module, x, None if weight is None else {"weight": drawn})
    if y is None:
        return None
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    for offset in (0.0, 1.0):
        expected = normed if weight is None else normed * (offset + drawn)
        if torch.allclose(y.float(), expected, rtol=1e-4, atol=1e-5):
            return offset, eps
    return None


@recognised_rule(lambda module: _rms_offset(module) is not None)
def written_out_rms_norm(module: nn.Module, x: Any, *, approximation: Approximation) -> Moments:
    """X / sqrt(mean(x^2) + eps) g, see `normalisation.rms_norm`; g may be written as 1 + weight."""
    from bayespass.gaussian import moments_of  # the tensor type imports the rules

    found = _rms_offset(module)
    assert found is not None
    offset, eps = found
    weight = moments_of(module).get("weight")
    if weight is not None:
        w = as_moments(weight)
        weight = Moments(w.mean + offset, w.var)
    x = as_moments(x)
    return rms_norm(x, x.mean.shape[-1:], weight, eps, approximation=approximation)


def _calculates(module: nn.Module) -> bool:
    """Whether its forward holds an arithmetic operator; others are not tried, as trying may have side effects."""
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and any(step.opname == "BINARY_OP" for step in dis.get_instructions(code))


def _is_written_out_activation(module: nn.Module) -> bool:
    """Several operations that together map every entry alone."""
    if next(module.parameters(), None) is not None or not _is_foreign_leaf(module) or not _calculates(module):
        return False
    x = _probe(3, 4)
    with _Calls() as calls:
        y = _tried(module, x)
    if y is None or len(calls.functions) < 2 or torch.equal(x, y):
        return False
    if sum(function in rules() for function in calls.functions) < 2:
        return False
    one = _tried(module, x[1:2, 2:3])
    turned = _tried(module, x.T)
    return one is not None and turned is not None and torch.allclose(one[0, 0], y[1, 2]) and torch.allclose(turned.T, y)


@recognised_rule(_is_written_out_activation)
def written_out_activation(module: nn.Module, x: Any, *, approximation: Approximation) -> Moments:
    """F(x) entry by entry: Gauss-Hermite moments with nine nodes, or linearised at the mean."""

    def slope(m: Tensor, sd: Tensor | float) -> Tensor:
        """E f' by Stein's identity, E[z f(m + sd z)] / sd."""
        centre = module(m)
        return sum(((w * z) * (module(m + z * sd) - centre) for z, w in hermite(NODES)), torch.zeros_like(m)) / sd

    def matched(m: Tensor, v: Tensor) -> Matched:
        return *quadrature(module, m, v, NODES), slope(m, v.sqrt().clamp(min=SLOPE_SD))

    return elementwise(as_moments(x), approximation, module, lambda m: slope(m, SLOPE_SD), matched)


def _is_quantised_linear(module: nn.Module) -> bool:
    """A layer that keeps a packed int8 weight and hands it out on request, as PyTorch's dynamic quantisation leaves."""
    methods = (getattr(module, name, None) for name in ("weight", "bias"))
    return hasattr(module, "_packed_params") and hasattr(module, "out_features") and all(map(callable, methods))


@recognised_rule(_is_quantised_linear)
def quantised_linear(module: Any, x: Any, *, approximation: Approximation) -> Moments:
    """x W^T + b with the dequantised weight, which is known; the rounding of activations is left out."""
    return linear(x, module.weight().dequantize(), module.bias(), approximation=approximation)
