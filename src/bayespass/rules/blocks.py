"""Blocks that are written out in small operations, recognised by what they compute.

Many libraries write an RMS norm or an activation function out, each in a class of its own. Seen
operation by operation, the factors of `x * rsqrt(mean(x^2))` or `x * sigmoid(1.7 x)` look
independent, which they are not. A block without inner modules is therefore tried on a few numbers:
if it computes an RMS norm, or maps every entry alone, the rule for that is used for the whole of it.
Nothing depends on names of classes. Outside a compiled graph the block is tried once more on the
mean it is really given, and answered operation by operation where it does something else there.
"""

import dis
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from bayespass.approximation import Approximation
from bayespass.moments import Moments, as_moments, cast
from bayespass.rules.activation import Matched, elementwise, hermite, quadrature
from bayespass.rules.affine import linear
from bayespass.rules.normalisation import rms_norm
from bayespass.rules.registry import BlockRule, recogniser, rules

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
    """What the module makes of x; None if it takes no single tensor or makes no tensor of the same shape."""
    try:
        with torch.no_grad():
            y = functional_call(module, parameters or {}, (x,))
    except Exception:  # whatever a foreign module raises on numbers it was not made for
        return None
    return y if isinstance(y, Tensor) and y.shape == x.shape and y.is_floating_point() else None


def _probe(*shape: int, like: Tensor | None = None) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return x if like is None else x.to(like.device)


# --- RMS norms --------------------------------------------------------------------------------------


@recogniser
def written_out_rms_norm(module: nn.Module) -> BlockRule | None:
    """X / sqrt(mean(x^2) + eps) g, see `normalisation.rms_norm`; g may be written as 1 + weight."""
    found = _offset_and_eps(module)
    if found is None:
        return None
    offset, eps = found

    def answer(module: nn.Module, x: Any, *, approximation: Approximation) -> Any:
        from bayespass.gaussian import moments_of  # the tensor type imports the rules

        x, weight = as_moments(x), moments_of(module).get("weight")
        wide = torch.float64 if x.mean.dtype == torch.float64 else torch.float32
        gain, parameters = None, {}
        if weight is not None:
            weight = as_moments(weight)
            parameters = {"weight": weight.mean}
            gain = cast(Moments(weight.mean + offset, weight.var), wide)
        result = rms_norm(cast(x, wide), x.mean.shape[-1:], gain, eps, approximation=approximation)
        if torch.compiler.is_compiling():
            return cast(result, x.mean.dtype)
        plain = _tried(module, x.mean, parameters)
        if plain is None or not _is_norm_of(plain, x.mean, None if gain is None else gain.mean, eps):
            return NotImplemented
        return cast(result, plain.dtype)

    return answer


def _offset_and_eps(module: nn.Module) -> tuple[float, float] | None:
    """(offset, eps) such that the module is x / sqrt(mean(x^2) + eps) (offset + weight); None if it is not."""
    own = dict(module.named_parameters())
    if list(own) not in ([], ["weight"]) or not _is_foreign_leaf(module):
        return None
    weight = own.get("weight")
    if weight is not None and weight.dim() != 1:
        return None
    size = 8 if weight is None else len(weight)
    named = (getattr(module, name, None) for name in EPSILON_NAMES)
    eps = next((value for value in named if isinstance(value, float)), None)
    if eps is None or size < 2:
        return None
    drawn = None if weight is None else _probe(3, size, like=weight)[2].to(weight.dtype)
    parameters = {} if drawn is None else {"weight": drawn}
    for offset in (0.0, 1.0):
        gain = None if drawn is None else offset + drawn.float()
        probes = [_probe(*shape, like=weight) for shape in ((4, size), (2, 3, size), (2, 3, 5, size))]
        for x in probes:
            x[0] *= max(eps, 1e-12) ** 0.5  # so small that eps decides
        made = [_tried(module, x, parameters) for x in probes]
        if all(y is not None and _is_norm_of(y, x, gain, eps) for x, y in zip(probes, made, strict=True)):
            return offset, eps
    return None


def _is_norm_of(y: Tensor, x: Tensor, gain: Tensor | None, eps: float) -> bool:
    x = x.float()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    expected = normed if gain is None else normed * gain.float()
    rounding = 1e-4 if y.dtype in (torch.float32, torch.float64) else 0.05
    return torch.allclose(
        y.float(), expected, rtol=rounding, atol=rounding * (1e-6 + float(expected.detach().abs().max()))
    )


# --- activations ------------------------------------------------------------------------------------


@recogniser
def written_out_activation(module: nn.Module) -> BlockRule | None:
    """F(x) entry by entry: Gauss-Hermite moments with nine nodes, or linearised at the mean."""
    if not _is_written_out_activation(module):
        return None

    def slope(m: Tensor, sd: Any) -> Tensor:
        """E f' by Stein's identity, E[z f(m + sd z)] / sd."""
        centre = module(m)
        return sum(((w * z) * (module(m + z * sd) - centre) for z, w in hermite(NODES)), torch.zeros_like(centre)) / sd

    def matched(m: Tensor, v: Tensor) -> Matched:
        return *quadrature(module, m, v, NODES), slope(m, v.sqrt().clamp(min=SLOPE_SD))

    def answer(module: nn.Module, x: Any, *, approximation: Approximation) -> Any:
        x = as_moments(x)
        plain = x.mean if torch.compiler.is_compiling() else _tried_on(x.mean)
        if plain is None:
            return NotImplemented
        return cast(elementwise(x, approximation, run, lambda m: slope(m, SLOPE_SD), matched), plain.dtype)

    def run(m: Tensor) -> Tensor:
        return module(m)

    def _tried_on(m: Tensor) -> Tensor | None:
        return _tried(module, m) if _maps_entries_alone(module, m) else None

    return answer


def _calculates(module: nn.Module) -> bool:
    """Whether its forward holds an arithmetic operator; others are not tried, as trying may have side effects."""
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and any(step.opname == "BINARY_OP" for step in dis.get_instructions(code))


def _is_written_out_activation(module: nn.Module) -> bool:
    """Several operations that together map every entry alone."""
    if next(module.parameters(), None) is not None or not _is_foreign_leaf(module) or not _calculates(module):
        return False
    with _Calls() as calls:
        y = _tried(module, _probe(3, 4))
    if y is None or sum(function in rules() for function in calls.functions) < 2:
        return False
    return all(_maps_entries_alone(module, _probe(*shape)) for shape in ((3, 70), (2, 3, 4), (2, 3, 4, 5)))


def _maps_entries_alone(module: nn.Module, x: Tensor) -> bool:
    """Whether the first entries along every axis come out the same without the others, and the first entry alone."""
    y = _tried(module, x)
    if y is None or y.numel() == 0:
        return False

    def parts(t: Tensor) -> list[Tensor]:
        return [*(t.narrow(axis, 0, 1) for axis in range(t.dim())), t.flatten()[:1].reshape([1] * t.dim())]

    alone = [_tried(module, part) for part in parts(x)]
    rounding = 1e-2 if y.dtype in (torch.float16, torch.bfloat16) else 1e-5
    return all(a is not None and torch.allclose(a, b, rounding, rounding) for a, b in zip(alone, parts(y), strict=True))


# --- quantised layers -------------------------------------------------------------------------------


@recogniser
def quantised_linear(module: Any) -> BlockRule | None:
    """x W^T + b with the dequantised weight, which is known; the rounding of activations is left out.

    For layers that keep a packed int8 weight and hand it out on request, as PyTorch's dynamic
    quantisation leaves.
    """
    methods = (getattr(module, name, None) for name in ("weight", "bias"))
    if not (hasattr(module, "_packed_params") and hasattr(module, "out_features") and all(map(callable, methods))):
        return None

    def answer(module: Any, x: Any, *, approximation: Approximation) -> Any:
        return linear(x, module.weight().dequantize(), module.bias(), approximation=approximation)

    return answer
