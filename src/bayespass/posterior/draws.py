"""Where the noise of a draw comes from, and how draws are averaged over ranks and updated in chunks."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bayespass.errors import InvalidInput

CHUNK = 2**22  # entries updated together: enough to fill a device, few enough for temporaries to stay small
Drawn = dict[Tensor, tuple[int, Tensor, Tensor]]  # by parameter: number of draws and two running means


def world(distributed: bool) -> tuple[int, int]:
    """Own rank, and the number of ranks that draw noise of their own; (0, 1) when not distributed.

    Raises:
        InvalidInput: asked for without a process group.
    """
    if not distributed:
        return 0, 1
    if not (dist.is_available() and dist.is_initialized()):
        msg = "distributed=True needs a process group; call torch.distributed.init_process_group first"
        raise InvalidInput(msg)
    return dist.get_rank(), dist.get_world_size()


def reduce_draws(parameters: list[Tensor], drawn: Drawn) -> Drawn:
    """Running means of all ranks together, weighted by their numbers of draws.

    Args:
        parameters: the same on every rank, in the same order.
        drawn: number of draws and two running means by parameter; a parameter may be missing here.
    """
    if not parameters:
        return drawn
    counts = torch.tensor([float(drawn[p][0]) if p in drawn else 0.0 for p in parameters], device=parameters[0].device)
    totals = counts.clone()
    dist.all_reduce(totals)
    result = {}
    for parameter, count, total in zip(parameters, counts.tolist(), totals.tolist(), strict=True):
        if total == 0:
            continue
        exact = torch.promote_types(parameter.dtype, torch.float32)
        blank = torch.zeros(parameter.shape, dtype=exact, device=parameter.device)
        _, first, second = drawn.get(parameter, (0, blank, blank))
        both = torch.stack([first, second]).mul_(count / total)
        dist.all_reduce(both)
        result[parameter] = (int(total), both[0], both[1])
    return result


def average(tensor: Tensor) -> None:
    """The mean over ranks, in place."""
    dist.all_reduce(tensor)
    tensor.div_(dist.get_world_size())


def stream_seed(seed: int, stream: int) -> int:
    """A 63-bit seed for one stream of noise, by the mixing function of SplitMix64 (Steele et al. 2014)."""
    mask = 2**64 - 1
    value = (seed * 0xD1342543DE82EF95 + (stream + 1) * 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return (value ^ (value >> 31)) >> 1


def chunks(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """The parameters in runs of one device and dtype and at most `CHUNK` entries."""
    run: list[Tensor] = []
    for parameter in parameters:
        alike = run and (parameter.device, parameter.dtype) == (run[0].device, run[0].dtype)
        if run and not (alike and sum(p.numel() for p in run) + parameter.numel() <= CHUNK):
            yield run
            run = []
        run.append(parameter)
    if run:
        yield run


def any_rank(problem: bool) -> bool:
    """Whether any rank has a problem, so that all stop together."""
    flag = torch.tensor(float(problem))
    if dist.get_backend() == "nccl":
        flag = flag.cuda()
    dist.all_reduce(flag)
    return bool(flag > 0)


@contextmanager
def exact_arithmetic(active: list[tuple[Tensor, dict[str, Any], str]]) -> Iterator[None]:
    """No autocast inside: a block opened under it still updates float32 state."""
    with ExitStack() as stack:
        for kind in {parameter.device.type for parameter, _, _ in active}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def add_draw(drawn: Drawn, parameter: Tensor, first: Tensor, second: Tensor) -> None:
    """Count one more draw into the running means of a parameter."""
    count = 0
    if parameter in drawn:
        count, old_first, old_second = drawn[parameter]
        first, second = old_first.lerp_(first, 1 / (count + 1)), old_second.lerp_(second, 1 / (count + 1))
    drawn[parameter] = (count + 1, first, second)


def first_not_finite(gradients: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first gradient with a NaN or an infinity, in one transfer from the device."""
    found = [(name, g.detach().coalesce().values() if g.is_sparse else g.detach()) for name, g in gradients]
    found = [(name, gradient) for name, gradient in found if gradient.numel()]
    if not found:
        return None
    finite = torch.isfinite(torch.stack([g.abs().max().float().to(found[0][1].device) for _, g in found])).tolist()
    return None if all(finite) else found[finite.index(False)][0]
