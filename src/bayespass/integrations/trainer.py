"""transformers' `Trainer` with a training method in place of its optimizer.

    method = IVON(model.named_parameters(), lr=0.1, n_data=len(data))
    trainer = Trainer(
        model, TrainingArguments(..., max_grad_norm=0), train_dataset=data,
        optimizers=(method, None), callbacks=[BayesianTrainingCallback(method)],
    )
    trainer.train()
    posterior = method.posterior()

Every update draws the weights once; its micro-batches share the draw, and the Trainer's own scaling
makes their gradients the gradient of one large batch. Evaluation, saving and everything else between
updates see the mean weights. `trainer.train(resume_from_checkpoint=True)` continues bit for bit: the
method's state lies in the Trainer's optimizer.pt.

transformers tells callbacks nothing of an error or of Ctrl-C, which may end training inside an update and
leave the weights a draw. `callback.attach(trainer)` makes `trainer.train` go back to the mean on every
way out; otherwise call `callback.abandon()`.

`n_data` counts what the model's loss averages over: rows for a classifier, predicted tokens for a
language model.
"""

from functools import wraps
from pathlib import Path
from typing import Any

from bayespass.errors import InvalidInput, MissingExtra
from bayespass.integrations.draws import OpenDraw, check_settings, prepare_ranks
from bayespass.posterior.method import TrainingMethod

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    msg = "bayespass.integrations.trainer needs transformers and accelerate; run: pip install bayespass[transformers]"
    raise MissingExtra(msg) from error

FILE = "posterior.safetensors"


class BayesianTrainingCallback(TrainerCallback):
    """Draws the weights for every update of transformers' `Trainer`.

    Args:
        method: given to the Trainer too, as `optimizers=(method, scheduler)`; a scheduler of None is the
            one of the training arguments.
        save_posterior: write `posterior.safetensors` into the output folder when training ends.

    Call `attach(trainer)` so that the weights are the mean again after an error or Ctrl-C, too.

    Several processes under `torchrun` work as they are. For draws of their own on every rank make the
    method with `distributed=True` and call `attach(trainer)`.

    Raises:
        InvalidInput: the method computes several draws per step, which the Trainer does not do.
    """

    def __init__(self, method: TrainingMethod, save_posterior: bool = False) -> None:
        if not isinstance(method, TrainingMethod):
            msg = f"method must be a training method such as IVON; got {type(method).__name__}"
            raise InvalidInput(msg)
        if method.n_samples > 1:
            name = type(method).__name__
            msg = f"the Trainer takes one draw per update; make {name} with n_samples=1 and antithetic=False"
            raise InvalidInput(msg)
        self.method = method
        self.save_posterior = save_posterior
        self._draw = OpenDraw(method)
        self._trainer: Trainer | None = None

    def attach(self, trainer: Trainer) -> None:
        """Make `trainer.train` restore the mean weights on every way out; `distributed=True` needs it, too.

        Args:
            trainer: that this callback was given to; attaching it again changes nothing.
        """
        if trainer is self._trainer:
            return
        self._trainer = trainer
        train = trainer.train

        @wraps(train)
        def restoring(*args: Any, **kwargs: Any) -> Any:
            try:
                return train(*args, **kwargs)
            finally:
                self.abandon()

        trainer.train = restoring  # errors reach no callback

    def abandon(self) -> None:
        """Go back to the mean weights after an error, forgetting the update under way; nothing if there is none."""
        self._draw.abandon()

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse what cannot work, as early as possible."""
        del state, control, kwargs
        self._check(args)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the Trainer's optimizer and prepare the ranks.

        Raises:
            InvalidInput: the Trainer steps another optimizer.
        """
        del state, control
        self.abandon()  # of a run that an error ended
        self._check(args)
        optimizer = kwargs.get("optimizer")
        if getattr(optimizer, "optimizer", optimizer) is not self.method:
            msg = "the Trainer steps another optimizer; pass optimizers=(method, scheduler) with the callback's method"
            raise InvalidInput(msg)
        prepare_ranks(self.method, None if self._trainer is None else self._trainer.model_wrapped)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the weights, before the first micro-batch of an update."""
        del args, state, control, kwargs
        self._draw.open()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the gradients and go back to the mean weights, before the update."""
        del args, state, control, kwargs
        self._draw.close()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop an update that another callback stopped halfway, so that what follows sees the mean."""
        del args, state, control, kwargs
        self.abandon()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the posterior, if asked to."""
        del control
        self.abandon()
        if self.save_posterior and state.is_world_process_zero:
            self.method.posterior().save(Path(str(args.output_dir)) / FILE, kwargs["model"])

    def _check(self, args: TrainingArguments) -> None:
        check_settings(self.method, args.max_grad_norm, "TrainingArguments(max_grad_norm=0)")
        if args.fp16:
            msg = "fp16=True scales the loss and skips updates; use bf16=True, which needs neither"
            raise InvalidInput(msg)
        if args.deepspeed or args.fsdp:
            name = "deepspeed" if args.deepspeed else "fsdp"
            msg = (
                f"{name} splits the weights and replaces the optimizer, so that no process could draw them; "
                f"use data parallelism (torchrun alone), or fewer random parameters (LoRA)"
            )
            raise InvalidInput(msg)
        if args.load_best_model_at_end:
            msg = (
                "load_best_model_at_end=True would put older mean weights under the last variances; set it to False "
                "and take the posterior of the best checkpoint by loading its optimizer.pt as well"
            )
            raise InvalidInput(msg)
        if args.weight_decay:
            msg = (
                f"weight_decay={args.weight_decay} has no effect, the prior is part of the method; set it to 0 and "
                f"prior_precision of the method to n_data times it"
            )
            raise InvalidInput(msg)
