"""Cases for the rules of `pointwise` and for the later ones of `activation`, in the form of `cases.CASES`."""

from collections.abc import Callable
from typing import Any

import torch
from cases import ELEMENTWISE, Case, case, gaussian, plain, spread
from torch.nn import functional as F

from bayespass.moments import Moments


def positive(*relative_sd: float, shift: float = 0.0) -> list[Case]:
    """Means in [0.5, 4] less the shift, the sd a share of the argument."""
    argument = torch.linspace(0.5, 4, 8, dtype=torch.float64)
    return [case(Moments(argument - shift, (share * argument) ** 2)) for share in relative_sd]


NARROW = ELEMENTWISE[:2]  # exp(x) for an sd of 2 has no usable Monte Carlo
# F.rrelu has no case: vmap, which draws the Monte Carlo, has no batching rule for it.
BOUND = torch.linspace(-1, 1, 32, dtype=torch.float64)
POINTWISE_CASES: dict[Callable[..., Any], list[Case]] = {
    torch.clamp: [
        *(case(x, -1.0, 1.5) for (x,), _ in ELEMENTWISE),
        case(spread(1.0), min=0.3),
        case(spread(1.0), max=0.3),
        case(spread(1.0), BOUND, BOUND + 2),
        case(gaussian(3, 4), -1, 1),
        case(gaussian(3, 4), plain(2, 1, 4), None),
    ],
    torch.clamp_min: [case(spread(0.5), -1.0), case(gaussian(3, 4), plain(4))],
    torch.clamp_max: [case(spread(0.5), 1.0), case(gaussian(3, 4), plain(4))],
    F.hardtanh: [*ELEMENTWISE, case(spread(1.0), 0.0, 6.0)],
    F.relu6: ELEMENTWISE,
    F.hardsigmoid: ELEMENTWISE,
    F.hardswish: ELEMENTWISE,
    F.threshold: [*(case(x, 0.1, 0.1) for (x,), _ in ELEMENTWISE), case(spread(1.0), 0.5, 0.2)],
    F.softshrink: [*ELEMENTWISE, case(spread(1.0), 1.2)],
    F.hardshrink: [*ELEMENTWISE, case(spread(1.0), 0.2)],
    torch.abs: ELEMENTWISE,
    F.prelu: [
        *(case(x, torch.tensor([0.25], dtype=torch.float64)) for (x,), _ in ELEMENTWISE),
        case(gaussian(2, 3, 4), plain(3)),
        case(gaussian(2, 3), gaussian(3, seed=1, sd=0.3)),
    ],
    torch.maximum: [
        case(gaussian(3, 4), gaussian(3, 4, seed=1)),
        case(gaussian(3, 4, sd=0.2), gaussian(4, seed=1, sd=2.0)),
        case(gaussian(3, 4), plain(2, 1, 4)),
        case(plain(3, 4), gaussian(4)),
    ],
    torch.minimum: [case(gaussian(3, 4), gaussian(4, seed=1, sd=0.3)), case(gaussian(3, 4), plain(4))],
    F.elu: [*ELEMENTWISE, case(spread(1.0), 0.4)],
    F.selu: ELEMENTWISE,
    F.celu: [*ELEMENTWISE, case(spread(1.0), 0.4), case(spread(1.0), alpha=3.0)],
    torch.exp: NARROW,
    torch.expm1: NARROW,
    torch.sin: ELEMENTWISE,
    torch.cos: ELEMENTWISE,
    torch.erf: ELEMENTWISE,
    F.softplus: [*ELEMENTWISE, case(spread(1.0), 2.0), case(spread(1.0), beta=0.5, threshold=10.0)],
    F.logsigmoid: ELEMENTWISE,
    F.tanhshrink: ELEMENTWISE,
    F.mish: ELEMENTWISE,
    F.softsign: ELEMENTWISE,
    torch.sqrt: positive(0.02, 0.1, 0.2),
    torch.rsqrt: positive(0.02, 0.1, 0.2),
    torch.reciprocal: positive(0.02, 0.1, 0.15),
    torch.log: positive(0.02, 0.1, 0.2),
    torch.log1p: positive(0.02, 0.1, 0.2, shift=1.0),
}
