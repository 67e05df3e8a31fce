"""The Trainer with a callback. Run as a script, this file is one rank of several."""

import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from bayespass import IVON, InvalidInput, MissingExtra, NotFitted, Posterior
from bayespass.integrations.trainer import BayesianTrainingCallback

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(torch|transformers|accelerate).*")

ROWS = 24
GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(ROWS, 4, generator=GENERATOR)
LABELS = (INPUTS[:, 0] > 0).long()
DATA = [{"features": x, "labels": y} for x, y in zip(INPUTS, LABELS, strict=True)]


class Classifier(nn.Module):
    """Called as transformers calls its models; remembers the weights it was called with."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.drop, self.last = nn.Linear(4, 6), nn.Dropout(dropout), nn.Linear(6, 2)
        self.seen = []

    def forward(self, features, labels=None):
        self.seen.append((self.training, self.first.weight.detach().clone()))
        logits = self.last(self.drop(torch.tanh(self.first(features))))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def method_for(model, **settings):
    return IVON(model.named_parameters(), **({"lr": 0.1, "n_data": ROWS, "betas": (0.9, 0.9)} | settings))


def trainer_for(folder, model, method, *callbacks, callback=None, **arguments):
    defaults = {
        "num_train_epochs": 2, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, "max_grad_norm": 0,
        "report_to": "none", "use_cpu": True, "dataloader_pin_memory": False, "save_strategy": "no", "disable_tqdm": True,
        "logging_strategy": "no",
    }  # fmt: skip
    return Trainer(
        model=model, args=TrainingArguments(output_dir=str(folder), **(defaults | arguments)), train_dataset=DATA, eval_dataset=DATA,
        optimizers=(method, None), callbacks=[callback or BayesianTrainingCallback(method), *callbacks],
    )  # fmt: skip


def test_micro_batches_are_one_large_batch_at_one_draw(tmp_path):
    """Two micro-batches of 12 rows are the whole data, in whatever order: the loop by hand, up to rounding."""
    model, other = Classifier(), Classifier()
    method, by_hand = method_for(model), method_for(other)
    trainer_for(tmp_path, model, method, per_device_train_batch_size=12, lr_scheduler_type="constant").train()
    for _ in range(2):
        with by_hand.sampled():
            other(INPUTS, LABELS)["loss"].backward()
        by_hand.step()
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dict(method.posterior().variance), dict(by_hand.posterior().variance), rtol=1e-5, atol=0)


class Watch(TrainerCallback):
    def __init__(self, model, folder):
        self.model, self.folder, self.between = model, folder, []

    def on_step_end(self, args, state, control, **kwargs):
        self.between.append(self.model.first.weight.detach().clone())

    def on_save(self, args, state, control, **kwargs):
        saved = load_file(self.folder / f"checkpoint-{state.global_step}" / "model.safetensors")
        assert torch.equal(saved["first.weight"], self.between[-1])


def test_draws_inside_updates_and_the_mean_everywhere_else(tmp_path):
    model = Classifier()
    method = method_for(model)
    watch = Watch(model, tmp_path)
    trainer = trainer_for(
        tmp_path, model, method, watch, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, num_train_epochs=1,
    )  # fmt: skip
    start = model.first.weight.detach().clone()
    trainer.train()
    means = [start, *watch.between]
    update, last = 0, None
    for training, weight in model.seen:
        if training:
            assert not torch.equal(weight, means[update])
            assert last is None or torch.equal(weight, last)  # the second micro-batch
            last = weight if last is None else None
            update += last is None
        else:
            assert torch.equal(weight, means[update])
    assert update == 2
    assert trainer.state.log_history == [] or "eval_loss" in trainer.state.log_history[0]


def test_resuming_is_exact(tmp_path):
    """Shuffling, dropout, a schedule and accumulation; stopped in the middle of the second epoch."""

    def trained(folder, resume=None, **arguments):
        model = Classifier(dropout=0.3)
        method = method_for(model)
        trainer = trainer_for(
            folder, model, method, num_train_epochs=3, lr_scheduler_type="cosine", seed=4, **arguments
        )
        trainer.train(resume_from_checkpoint=resume)
        return model, method.posterior(), trainer

    saving = {"save_strategy": "steps", "save_steps": 3}
    model, posterior, _ = trained(tmp_path / "a", **saving)
    assert (tmp_path / "a" / "checkpoint-3" / "optimizer.pt").is_file()
    resumed, again, trainer = trained(tmp_path / "b", str(tmp_path / "a" / "checkpoint-3"), **saving)
    assert trainer.state.global_step == 6
    assert len(resumed.seen) == 6  # half of the micro-batches
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    for name, value in posterior.variance.items():
        assert torch.equal(value, again.variance[name]), name


def test_the_posterior_is_saved(tmp_path):
    model = Classifier()
    method = method_for(model)
    trainer_for(tmp_path, model, method, callback=BayesianTrainingCallback(method, save_posterior=True)).train()
    loaded = Posterior.load(tmp_path / "posterior.safetensors", model)
    assert torch.equal(loaded.variance["last.weight"], method.posterior().variance["last.weight"])


class StopHalfway(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


def test_an_update_that_is_stopped_halfway_leaves_the_mean(tmp_path):
    model = Classifier()
    method = method_for(model)
    start = model.first.weight.detach().clone()
    trainer_for(tmp_path, model, method, StopHalfway(), eval_strategy="epoch").train()
    assert torch.equal(model.first.weight, start)
    assert model.seen[0][0]
    assert all(torch.equal(weight, start) for training, weight in model.seen if not training)
    method.posterior()


def test_training_again_after_an_error_starts_from_the_mean(tmp_path):
    model = Classifier()
    method = method_for(model)
    start = model.first.weight.detach().clone()
    trainer = trainer_for(tmp_path, model, method)
    drop = model.drop.forward

    def fail(x):
        raise ArithmeticError

    model.drop.forward = fail
    with pytest.raises(ArithmeticError):
        trainer.train()
    with pytest.raises(NotFitted, match="inside sampled"):
        method.posterior()  # never a draw taken for the mean
    model.drop.forward = drop
    trainer.train()
    assert torch.equal(model.seen[0][1] == start, torch.zeros_like(start, dtype=torch.bool))
    method.posterior()


class Interrupt(TrainerCallback):
    """Ctrl-C between two micro-batches of the second update."""

    def __init__(self):
        self.armed = True

    def on_substep_end(self, args, state, control, **kwargs):
        if self.armed and state.global_step == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("attached", [True, False])
def test_an_interrupt_inside_an_update_leaves_the_mean(tmp_path, attached):
    model, straight = Classifier(), Classifier()
    method, other = method_for(model), method_for(straight)
    trainer_for(tmp_path, straight, other, max_steps=1, lr_scheduler_type="constant").train()
    callback, interrupt = BayesianTrainingCallback(method), Interrupt()
    trainer = trainer_for(tmp_path, model, method, interrupt, callback=callback, lr_scheduler_type="constant")
    for _ in range(2 * attached):
        callback.attach(trainer)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    if not attached:
        assert not torch.equal(model.first.weight, straight.first.weight)  # still the second update's draw
        callback.abandon()
    for left, right in zip(model.parameters(), straight.parameters(), strict=True):
        assert torch.equal(left, right)
        assert left.grad is None
    for name, variance in method.posterior().variance.items():
        assert torch.equal(variance, other.posterior().variance[name]), name
    callback.abandon()  # nothing is left to abandon
    interrupt.armed = False
    assert trainer.train().global_step == 4
    method.posterior()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"max_grad_norm": 1.0}, r"clips gradients at 1.0.*max_grad_norm=0.*max_grad_norm of IVON"),
        ({"weight_decay": 0.1}, "weight_decay=0.1 has no effect"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"},
            "load_best_model_at_end",
        ),
    ],
)
def test_settings_that_spoil_the_posterior_are_refused(tmp_path, arguments, match):
    model = Classifier()
    with pytest.raises(InvalidInput, match=match):
        trainer_for(tmp_path, model, method_for(model), **arguments)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"fp16": True}, "use bf16=True"), ({"deepspeed": "zero.json"}, "deepspeed splits the weights"), ({"fsdp": True}, "fsdp splits"),
    ],
)  # fmt: skip
def test_machinery_that_owns_the_weights_is_refused(changes, match):
    """Arguments as transformers would pass them; it makes them itself only where the machinery exists."""
    arguments = {
        "max_grad_norm": 0, "fp16": False, "deepspeed": None, "fsdp": None, "load_best_model_at_end": False, "weight_decay": 0.0,
    }  # fmt: skip
    callback = BayesianTrainingCallback(method_for(Classifier()))
    callback.on_init_end(SimpleNamespace(**arguments), None, None)
    with pytest.raises(InvalidInput, match=match):
        callback.on_init_end(SimpleNamespace(**(arguments | changes)), None, None)


def test_callback_and_optimizer_belong_together(tmp_path):
    model = Classifier()
    trainer = trainer_for(tmp_path, model, method_for(model), callback=BayesianTrainingCallback(method_for(model)))
    with pytest.raises(InvalidInput, match="steps another optimizer"):
        trainer.train()
    with pytest.raises(NotFitted, match="no gradient"):
        trainer_for(tmp_path, model, method_for(model), callback=TrainerCallback()).train()
    with pytest.raises(InvalidInput, match="got SGD"):
        BayesianTrainingCallback(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(InvalidInput, match="one draw per update"):
        BayesianTrainingCallback(method_for(model, n_samples=2))


def one_rank(folder, own_draws):
    """What every rank does: train on its half of every batch, and write down what it saw and ended with."""
    torch.set_num_threads(1)
    model = Classifier()
    rows = []
    model.register_forward_pre_hook(lambda module, args, inputs: rows.append(inputs), with_kwargs=True)
    method = method_for(model, distributed=own_draws)
    callback = BayesianTrainingCallback(method)
    trainer = trainer_for(folder, model, method, callback=callback, ddp_backend="gloo", lr_scheduler_type="constant")
    if own_draws:
        with pytest.raises(InvalidInput, match="distributed=True needs the DistributedDataParallel wrapper"):
            trainer.train()
        callback.attach(trainer)
    trainer.train()
    posterior = method.posterior()
    found = {f"mean {name}": value for name, value in posterior.mean.items()}
    found |= {f"variance {name}": value for name, value in posterior.variance.items()}
    found |= {f"{key} {call}": value for call, inputs in enumerate(rows) for key, value in inputs.items()}
    save_file(found, folder / f"{os.environ['RANK']}.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("own_draws", [False, True])
def test_two_ranks_are_one(tmp_path, own_draws):
    """One draw on the joint batch, or one per rank: the same noise by hand in one process gives the same posterior."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path), str(int(own_draws))],
            env={**os.environ, **settings, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    assert [process.wait(timeout=200) for process in ranks] == [0, 0]
    found = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]

    model = Classifier()
    method = method_for(model)
    for step in range(2):  # of two micro-batches on either rank
        halves = [[(f[f"features {call}"], f[f"labels {call}"]) for call in (2 * step, 2 * step + 1)] for f in found]
        for block in halves if own_draws else [halves[0] + halves[1]]:
            with method.sampled():
                for features, labels in block:
                    (model(features, labels)["loss"] / len(block)).backward()
        method.step()
    posterior = method.posterior()
    for name, value in posterior.mean.items():
        assert torch.equal(found[0][f"mean {name}"], found[1][f"mean {name}"])
        torch.testing.assert_close(found[0][f"mean {name}"], value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[0][f"variance {name}"], posterior.variance[name], rtol=1e-5, atol=0)


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "bayespass.integrations.trainer")
    with pytest.raises(MissingExtra, match=r"bayespass\[transformers\]"):
        import bayespass.integrations.trainer  # noqa: F401


if __name__ == "__main__":
    from pathlib import Path

    one_rank(Path(sys.argv[1]), bool(int(sys.argv[2])))
