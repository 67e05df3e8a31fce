"""What a forward pass costs, by counting operations and bytes instead of timing.

with Meter() as meter:
model(inputs)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

FLOP_PER_BYTE = 3.0
"""Time of moving a byte, in operations of a matrix product, fitted by `benchmarks/cost.py` on eager CPU
runs; its result file says how far predictions are off. Overhead per call, which rules forwards of
under a millisecond, is not counted."""


@dataclass(frozen=True)
class Cost:
    """What one single pass costs, in plain forward passes of the same inputs, by counting.

    Args:
        arithmetic_ratio: of operations in matrix products, convolutions and attention.
        traffic_ratio: of bytes read and written by everything else.
        predicted_ratio: of time, as operations plus `FLOP_PER_BYTE` times bytes.
    """

    arithmetic_ratio: float
    traffic_ratio: float
    predicted_ratio: float


class Meter(TorchDispatchMode):
    """Counts floating-point operations of products and bytes moved by everything else."""

    PICKS = ("embedding", "index", "index_select", "gather")  # read only what they return
    FREE = ("empty", "empty_like", "new_empty", "empty_strided", "_unsafe_view", "detach", "lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.utils.flop_counter import flop_registry, sdpa_flop_count

        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name == "_scaled_dot_product_flash_attention_for_cpu":  # the one that the registry forgets
            self.flops += int(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))
        elif name == "mkldnn_rnn_layer":  # a whole layer: two products per step, its gates written, read and squashed
            x, w_ih, w_hh = args[:3]
            rows = x.shape[0] * x.shape[1]
            self.flops += 2 * rows * (w_ih.numel() + w_hh.numel())
            self.bytes += 3 * rows * w_ih.shape[0] * x.element_size()
        elif func.overloadpacket in flop_registry:
            self.flops += int(flop_registry[func.overloadpacket](*args, **kwargs, out_val=result))
        elif not func.is_view and name not in self.FREE:
            written = sum(map(_bytes, pytree.tree_leaves(result)))
            reads = pytree.tree_leaves((args, kwargs))
            self.bytes += written + (written if name in self.PICKS else sum(map(_bytes, reads)))
        return result


def _bytes(value: Any) -> int:
    if not isinstance(value, Tensor):
        return 0
    size = value.numel() * value.element_size()
    return min(size, value.untyped_storage().nbytes()) if value.layout == torch.strided else size


def compared(spent: Meter, plain: Meter) -> Cost:
    """The cost of one run in units of another."""

    def ratio(of: Callable[[Meter], float]) -> float:
        return of(spent) / of(plain) if of(plain) else 1.0

    return Cost(ratio(lambda m: m.flops), ratio(lambda m: m.bytes), ratio(lambda m: m.flops + FLOP_PER_BYTE * m.bytes))
