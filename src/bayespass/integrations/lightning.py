"""Lightning with a training method in place of the optimizer.

    class Classifier(lightning.LightningModule):
        def configure_optimizers(self):
            return IVON(self.named_parameters(), lr=0.1, n_data=self.n_data)

    trainer = lightning.Trainer(..., callbacks=[BayesianTrainingCallback()])
    trainer.fit(module, loader)
    posterior = trainer.optimizers[0].posterior()

Under automatic optimization Lightning hands the whole of a training step to `method.step(closure)`,
which runs it at drawn weights. The callback adds what is missing: with `accumulate_grad_batches` every
micro-batch gets a draw of its own, and their gradients are averaged. Without it Lightning runs all but
the last outside of any draw, and their gradients are discarded when the last one's block opens: an
update would learn from one micro-batch only. Validation, logging and checkpoints see the mean weights.

A `training_step` that returns None skips its batch; an update without any gradient does not happen.

A checkpoint holds the method's state and loads with `weights_only=True`. The callback adds PyTorch's
random state, so that a run resumed from a checkpoint made at the end of an epoch continues bit for
bit, with shuffling and dropout. From the middle of an epoch Lightning needs a loader that can resume.
A checkpoint made between the micro-batches of an update holds the state of the last update.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayespass.errors import InvalidInput, MissingExtra
from bayespass.integrations.draws import OpenDraw, check_settings, prepare_ranks
from bayespass.posterior.method import TrainingMethod

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
except ImportError as error:
    msg = "bayespass.integrations.lightning needs Lightning; run: pip install bayespass[lightning]"
    raise MissingExtra(msg) from error


class BayesianTrainingCallback(Callback):
    """Draws the weights for every micro-batch of Lightning's `Trainer`.

    Args:
        save_posterior: a file for the posterior of the module when training ends; names in the method
            must be those of the module then, `self.named_parameters()`.

    With manual optimization write `with method.sampled(): self.manual_backward(loss)` and
    `method.step()` yourself, where method is `self.optimizers().optimizer`.
    """

    def __init__(self, save_posterior: str | Path | None = None) -> None:
        self.save_posterior = save_posterior
        self._draw: OpenDraw | None = None
        self._random_state: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put PyTorch's random state back to where a checkpoint left it, before the data is shuffled."""
        del pl_module
        state, self._random_state = self._random_state, None
        if state is None or trainer.world_size > 1:  # the file has that of one rank only
            return
        torch.set_rng_state(state["cpu"].cpu())
        if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
            torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot work and prepare the ranks."""
        method = _method_of(trainer)
        _check(trainer, pl_module, method)
        prepare_ranks(method, trainer.strategy.model)
        self._draw = OpenDraw(method) if pl_module.automatic_optimization else None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Draw the weights for a micro-batch that no update follows; `method.step` does it for the last."""
        del pl_module, batch, batch_idx
        if self._draw is not None and trainer.fit_loop._should_accumulate():
            self._draw.open()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Undo Lightning's division by the number of micro-batches: the method averages over them."""
        del pl_module
        if self._draw is None or trainer.accumulate_grad_batches == 1:
            return
        groups = self._draw.method.param_groups
        gradients: list[Tensor] = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        torch._foreach_mul_(gradients, float(trainer.accumulate_grad_batches))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the gradients of a micro-batch and go back to the mean weights."""
        del trainer, pl_module, outputs, batch, batch_idx
        if self._draw is not None:
            self._draw.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Go back to the mean weights."""
        del trainer, pl_module, exception
        if self._draw is not None:
            self._draw.abandon()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the posterior, if asked to."""
        if self.save_posterior is not None and trainer.is_global_zero:
            _method_of(trainer).posterior().save(self.save_posterior, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """PyTorch's random state, for Lightning's checkpoint."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return {"cpu": torch.get_rng_state(), "cuda": cuda}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the random state until training starts."""
        self._random_state = state_dict


def _method_of(trainer: Trainer) -> TrainingMethod:
    methods = [one for one in trainer.optimizers if isinstance(one, TrainingMethod)]
    if len(methods) != 1:
        found = ", ".join(type(one).__name__ for one in trainer.optimizers) or "none"
        msg = f"configure_optimizers must return one training method such as IVON; got {found}"
        raise InvalidInput(msg)
    return methods[0]


def _check(trainer: Trainer, module: LightningModule, method: TrainingMethod) -> None:
    check_settings(method, trainer.gradient_clip_val, "Trainer(gradient_clip_val=None)")
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        msg = (
            f"strategy {type(trainer.strategy).__name__} may split the weights, so that no process could draw them; "
            f"use one device or strategy='ddp'"
        )
        raise InvalidInput(msg)
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        msg = "precision='16-mixed' scales the loss and skips updates; use precision='bf16-mixed', which needs neither"
        raise InvalidInput(msg)
    if module.automatic_optimization and trainer.accumulate_grad_batches > 1 and method.n_samples > 1:
        msg = (
            f"accumulate_grad_batches={trainer.accumulate_grad_batches} already takes one draw per micro-batch; make "
            f"{type(method).__name__} with n_samples=1, antithetic=False"
        )
        raise InvalidInput(msg)
