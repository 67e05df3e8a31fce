"""At least one case for every rule: the arguments of a call, with Moments where Gaussians go.

Input means lie within [-4, 4] and standard deviations up to 2, the range that declared bounds are for.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bayespass.moments import Moments
from bayespass.rules.moving import MOVES

Case = tuple[tuple[Any, ...], dict[str, Any]]


def gaussian(*shape: int, seed: int = 0, sd: float = 1.0, scale: float = 1.0) -> Moments:
    generator = torch.Generator().manual_seed(seed + 17 * sum(shape))
    mean = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    var = (sd * (0.2 + 0.8 * torch.rand(shape, generator=generator, dtype=torch.float64))) ** 2
    return Moments(mean.clamp(-4, 4), var)


def plain(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spread(sd: float) -> Moments:
    """Every mean in [-4, 4] at one standard deviation."""
    mean = torch.linspace(-4, 4, 32, dtype=torch.float64)
    return Moments(mean, torch.full_like(mean, sd**2))


def case(*args: Any, **kwargs: Any) -> Case:
    return args, kwargs


def scored(*shape: int) -> list[Case]:
    return [case(gaussian(*shape), 1), case(gaussian(*shape, sd=0.3), -1)]


INDEX = torch.tensor([0, 2, 1, 1])
ELEMENTWISE = [case(spread(sd)) for sd in (0.1, 0.5, 2.0)]
CASES: dict[Callable[..., Any], list[Case]] = {
    torch.add: [
        case(gaussian(3, 4), gaussian(4, seed=1)),
        case(gaussian(3, 4), plain(4), alpha=2.0),
        case(gaussian(3, 4), 2),
        case(plain(2, 3, 4), gaussian(3, 4)),
    ],
    torch.sub: [case(gaussian(3, 4), gaussian(3, 1, seed=1)), case(plain(3, 4), gaussian(4)), case(gaussian(3), 1.5)],
    torch.rsub: [case(gaussian(3, 4), 1), case(gaussian(3), plain(3), alpha=2)],
    torch.neg: [case(gaussian(3))],
    torch.mul: [
        case(gaussian(3, 4), gaussian(4, seed=1)),
        case(gaussian(3, 4), plain(4)),
        case(plain(3, 4), gaussian(4)),
        case(gaussian(3), 2),
    ],
    torch.div: [case(gaussian(3, 4), plain(4)), case(gaussian(3), 4.0)],
    torch.pow: [case(gaussian(5), 2), case(gaussian(5), 1)],
    torch.square: [case(gaussian(5))],
    F.linear: [
        case(gaussian(2, 3, 4), gaussian(5, 4, seed=1), gaussian(5, seed=2)),
        case(plain(2, 4), gaussian(5, 4), None),
        case(gaussian(2, 4), plain(5, 4), plain(5)),
        case(plain(2, 4), plain(5, 4), gaussian(5)),
    ],
    F.conv1d: [
        case(gaussian(2, 4, 7), gaussian(6, 2, 3, seed=1), gaussian(6), 2, 1, 1, 2),
        case(plain(2, 3, 6), gaussian(2, 3, 2), None, dilation=2),
    ],
    F.conv2d: [
        case(gaussian(2, 4, 5, 5), gaussian(6, 2, 3, 3, seed=1), gaussian(6), (2, 1), (1, 0), 1, 2),
        case(gaussian(1, 2, 4, 4), plain(2, 2, 3, 3), padding="same"),
        case(gaussian(2, 4, 4), gaussian(3, 2, 3, 3), None),
    ],
    torch.addmm: [
        case(gaussian(5), gaussian(3, 4), gaussian(4, 5, seed=1), beta=2.0, alpha=0.5),
        case(plain(5), plain(3, 4), gaussian(4, 5)),
    ],
    torch.matmul: [
        case(gaussian(2, 3, 4), gaussian(4, 2, seed=1)),
        case(plain(3, 4), gaussian(2, 4, 5)),
        case(gaussian(4), gaussian(4, seed=1)),
    ],
    Tensor.__rmatmul__: [case(gaussian(4, 5), plain(3, 4))],
    F.embedding: [case(torch.tensor([[0, 3], [2, 2]]), gaussian(4, 3)), case(torch.tensor([1]), gaussian(4, 3), 1)],
    torch.embedding: [case(gaussian(4, 3), torch.tensor([[0, 3], [2, 1]]))],
    F.relu: ELEMENTWISE,
    F.leaky_relu: [*ELEMENTWISE, case(spread(1.0), 0.3)],
    F.gelu: [*ELEMENTWISE, case(spread(1.0), approximate="tanh")],
    F.silu: ELEMENTWISE,
    F.sigmoid: ELEMENTWISE,
    F.tanh: ELEMENTWISE,
    F.layer_norm: [
        case(gaussian(3, 32), (32,), gaussian(32, seed=1, sd=0.3), gaussian(32, seed=2, sd=0.3)),
        case(gaussian(3, 4, 8, sd=0.3), (4, 8)),
        case(gaussian(3, 32, sd=1.0, scale=2.0), (32,), plain(32), None, 1e-12),
    ],
    F.batch_norm: [
        case(gaussian(3, 4, 2), plain(4), plain(4).square(), gaussian(4, seed=1), gaussian(4, seed=2)),
        case(gaussian(3, 4, 2, 2), plain(4), plain(4).square(), None, plain(4), False, 0.1, 1e-3),
        case(plain(3, 4), plain(4), plain(4).square(), gaussian(4), None),
    ],
    torch.batch_norm: [
        case(gaussian(3, 4, 2), gaussian(4, seed=1), plain(4), plain(4), plain(4).square(), False, 0.1, 1e-5, False)
    ],
    torch.softmax: [*scored(3, 5), case(gaussian(2, 3, 8, sd=0.1), -1)],
    F.scaled_dot_product_attention: [
        case(plain(2, 2, 4, 3), plain(2, 2, 5, 3), gaussian(2, 2, 5, 3)),
        case(plain(2, 4, 3), plain(2, 4, 3), gaussian(2, 4, 3), is_causal=True, scale=0.5),
        case(plain(1, 4, 3, 2), plain(1, 2, 3, 2), gaussian(1, 2, 3, 2), enable_gqa=True),
        case(plain(2, 4, 3), plain(2, 4, 3), gaussian(2, 4, 3), torch.tensor([[[True, True, False, True]]])),
        case(plain(2, 4, 3), plain(2, 4, 3), gaussian(2, 4, 3), plain(4, 4)),
    ],
    torch.mean: [case(gaussian(3, 4)), case(gaussian(2, 3, 4), 1), case(gaussian(2, 3, 4), (0, -1), True)],
    torch.sum: [case(gaussian(3, 4)), case(gaussian(2, 3, 4), 1), case(gaussian(2, 3, 4), dim=(0, -1), keepdim=True)],
    F.adaptive_avg_pool1d: [case(gaussian(2, 3, 7), 3), case(gaussian(2, 3, 6), (1,))],
    F.adaptive_avg_pool2d: [
        case(gaussian(2, 3, 5, 7), (2, 3)),
        case(gaussian(2, 3, 4, 4), 1),
        case(gaussian(2, 4, 6), (None, 2)),
    ],
    F.avg_pool1d: [case(gaussian(2, 3, 7), 3), case(gaussian(2, 3, 7), 3, 2, 1, False, False)],
    F.avg_pool2d: [
        case(gaussian(2, 3, 5, 6), 2),
        case(gaussian(2, 3, 5, 6), (2, 3), 2, 1),
        case(gaussian(2, 3, 5, 6), 3, 2, 1, False, False),
        case(gaussian(2, 3, 5, 6), 2, ceil_mode=True),
        case(gaussian(2, 3, 5, 6), 2, divisor_override=3),
    ],
    torch.max_pool1d: [case(gaussian(2, 3, 7), 2), case(gaussian(2, 3, 8), 3, 2, 1)],
    torch.max_pool2d: [
        case(gaussian(2, 3, 4, 6), 2),
        case(gaussian(2, 3, 6, 6), 3, 2, 1),
        case(gaussian(3, 6, 6), 2, 1, 0, 2),
    ],
    torch.cat: [case([gaussian(2, 3), plain(2, 3), gaussian(2, 3, seed=1)], 1), case([gaussian(2), gaussian(3)])],
    torch.stack: [case([gaussian(2, 3), plain(2, 3)], 1)],
    Tensor.__getitem__: [case(gaussian(3, 4), 0), case(gaussian(3, 4), (slice(None), slice(1, 3)))],
    F.dropout: [case(gaussian(3, 4), 0.5, False)],
}
MOVED: dict[str, Case] = {
    "reshape": case(gaussian(2, 6), (3, 4)), "view": case(gaussian(2, 6), 3, 4),
    "view_as": case(gaussian(2, 6), plain(3, 4)), "reshape_as": case(gaussian(2, 6), plain(3, 4)),
    "flatten": case(gaussian(2, 3, 4), 1), "unflatten": case(gaussian(2, 6), 1, (2, 3)), "ravel": case(gaussian(2, 3)),
    "transpose": case(gaussian(2, 3), 0, 1), "swapaxes": case(gaussian(2, 3), 0, 1), "swapdims": case(gaussian(2, 3), 0, 1),
    "permute": case(gaussian(2, 3, 4), (2, 0, 1)), "movedim": case(gaussian(2, 3, 4), 0, 2),
    "moveaxis": case(gaussian(2, 3, 4), 0, 2), "t": case(gaussian(2, 3)), "T": case(gaussian(2, 3)),
    "mT": case(gaussian(2, 3, 4)), "H": case(gaussian(2, 3)), "mH": case(gaussian(2, 3, 4)),
    "unsqueeze": case(gaussian(2, 3), 1), "squeeze": case(gaussian(2, 1, 3), 1), "expand": case(gaussian(1, 3), 4, -1),
    "expand_as": case(gaussian(1, 3), plain(4, 3)), "broadcast_to": case(gaussian(1, 3), (4, 3)),
    "repeat": case(gaussian(1, 3), 2, 2), "repeat_interleave": case(gaussian(2, 3), 2, 1), "tile": case(gaussian(2, 3), (2, 1)),
    "flip": case(gaussian(2, 3), (1,)), "roll": case(gaussian(2, 3), 1, 1), "rot90": case(gaussian(2, 3)),
    "narrow": case(gaussian(2, 5), 1, 1, 3), "select": case(gaussian(2, 3), 1, 0), "index_select": case(gaussian(4, 3), 0, INDEX),
    "gather": case(gaussian(4, 3), 0, torch.tensor([[0, 1, 2], [3, 2, 1]])), "unfold": case(gaussian(2, 5), 1, 2, 1),
    "diagonal": case(gaussian(3, 3)), "unbind": case(gaussian(2, 3)), "split": case(gaussian(2, 5), 2, 1),
    "chunk": case(gaussian(2, 5), 2, 1), "tensor_split": case(gaussian(2, 5), 2, 1), "contiguous": case(gaussian(2, 3)),
    "clone": case(gaussian(2, 3)), "detach": case(gaussian(2, 3)), "to": case(gaussian(2, 3), torch.float64),
    "type": case(gaussian(2, 3), torch.float64), "type_as": case(gaussian(2, 3), plain(1)), "float": case(gaussian(2, 3)),
    "double": case(gaussian(2, 3)), "half": case(gaussian(2, 3)), "bfloat16": case(gaussian(2, 3)), "cpu": case(gaussian(2, 3)),
    "take_along_dim": case(gaussian(4, 3), torch.tensor([[0, 1, 2], [3, 2, 1]]), 0), "take": case(gaussian(4, 3), INDEX),
    "masked_select": case(gaussian(2, 3), torch.tensor([True, False, True])), "tril": case(gaussian(3, 3)), "triu": case(gaussian(3, 3), 1),
    "diag": case(gaussian(3)), "diag_embed": case(gaussian(2, 3)), "fliplr": case(gaussian(2, 3)), "flipud": case(gaussian(2, 3)),
    "hsplit": case(gaussian(2, 4), 2), "vsplit": case(gaussian(4, 2), 2), "unsafe_split": case(gaussian(2, 5), 2, 1),
    "unsafe_chunk": case(gaussian(2, 5), 2, 1),
    "cuda": case(gaussian(2, 3)), "im2col": case(gaussian(1, 2, 3, 3), 2), "pixel_shuffle": case(gaussian(1, 4, 2, 2), 2),
    "pixel_unshuffle": case(gaussian(1, 1, 4, 4), 2), "channel_shuffle": case(gaussian(1, 4, 2, 2), 2),
}  # fmt: skip
MOVE_NAMES = {operations[0]: operations[0].__name__ for operations in MOVES}

from pointwise_cases import POINTWISE_CASES  # noqa: E402  it uses the helpers above
from surface_cases import EXTRA, SURFACE_CASES  # noqa: E402

CASES |= SURFACE_CASES | POINTWISE_CASES
for _operation, _cases in EXTRA.items():
    CASES[_operation] = [*CASES[_operation], *_cases]
