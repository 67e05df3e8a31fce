"""What trainers of other libraries share: weight draws that hooks open and close, and data parallelism.

Assumption under data parallelism: with `distributed=False` all ranks draw the same weights and the
wrapper averages their gradients, which is one draw on the joint batch, exactly. With
`distributed=True` each rank draws its own and the method averages; gradients must then stay local.
"""

from contextlib import AbstractContextManager
from weakref import WeakSet

import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel

from bayespass.errors import InvalidInput
from bayespass.posterior.method import TrainingMethod

_LOCAL: WeakSet[nn.Module] = WeakSet()


class OpenDraw:
    """One `method.sampled()` block whose ends lie in two hooks.

    Args:
        method: whose weights are drawn.
    """

    def __init__(self, method: TrainingMethod) -> None:
        self.method = method
        self._block: AbstractContextManager[None] | None = None

    def open(self) -> None:
        """Draw the weights."""
        block = self.method.sampled()
        block.__enter__()
        self._block = block

    def close(self) -> None:
        """Take the gradients and return to the mean weights; nothing if no block is open."""
        block, self._block = self._block, None
        if block is not None:
            block.__exit__(None, None, None)

    def abandon(self) -> None:
        """Return to the mean weights and forget the gradients; nothing if no block is open."""
        block, self._block = self._block, None
        if block is not None:
            reason = InterruptedError("the trainer left the step before it was complete")
            block.__exit__(type(reason), reason, None)


def prepare_ranks(method: TrainingMethod, wrapped: nn.Module | None) -> None:
    """Make several processes agree on the draws, see the module's assumption.

    Args:
        method: in training.
        wrapped: the model as the trainer calls it; None if the trainer did not say.

    Raises:
        InvalidInput: draws of the ranks would not fit the gradients they get.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    if method.distributed:
        if not isinstance(wrapped, DistributedDataParallel):
            msg = (
                f"distributed=True needs the DistributedDataParallel wrapper, to leave gradients local; got "
                f"{type(wrapped).__name__}. Use distributed=False: every rank draws the same weights then, and the "
                f"average of their gradients is exact"
            )
            raise InvalidInput(msg)
        if wrapped not in _LOCAL:
            wrapped.register_comm_hook(None, noop_hook)
            _LOCAL.add(wrapped)
        return
    seeds: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(seeds, method.seed)
    if len(set(seeds)) > 1:
        msg = f"with distributed=False every rank must draw the same weights; got the method's seeds {seeds}, use one"
        raise InvalidInput(msg)


def check_settings(method: TrainingMethod, max_grad_norm: float | None, remedy: str) -> None:
    """Raise if the trainer clips gradients.

    Args:
        method: in training.
        max_grad_norm: of the trainer.
        remedy: the trainer's setting that turns clipping off.

    Raises:
        InvalidInput: it does.
    """
    if max_grad_norm is not None and max_grad_norm > 0:
        msg = (
            f"the trainer clips gradients at {max_grad_norm} inside sampled(), which also shrinks the curvature that "
            f"{type(method).__name__} learns the variance from; set {remedy}, and max_grad_norm of "
            f"{type(method).__name__} instead"
        )
        raise InvalidInput(msg)
