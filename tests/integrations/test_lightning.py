import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning")

import lightning
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from bayespass import IVON, InvalidInput, MissingExtra, Posterior
from bayespass.integrations.lightning import BayesianTrainingCallback
from bayespass.posterior.elbo import MeanFieldVI

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(torch|lightning).*"),
]

ROWS = 24
GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(ROWS, 4, generator=GENERATOR)
LABELS = (INPUTS[:, 0] > 0).long()
DATA = TensorDataset(INPUTS, LABELS)


class Classifier(lightning.LightningModule):
    def __init__(self, dropout=0.0, schedule=False, method=IVON, **settings):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.drop, self.last = nn.Linear(4, 6), nn.Dropout(dropout), nn.Linear(6, 2)
        self.method, self.settings, self.schedule, self.seen = method, settings, schedule, []

    def forward(self, inputs):
        self.seen.append((self.training, self.first.weight.detach().clone()))
        return self.last(self.drop(torch.tanh(self.first(inputs))))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        defaults = {"lr": 0.1, "n_data": ROWS} | ({"betas": (0.9, 0.9)} if self.method is IVON else {})
        method = self.method(self.named_parameters(), **(defaults | self.settings))
        if not self.schedule:
            return method
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(method, 30)
        return {"optimizer": method, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(module, folder, loader=None, epochs=2, callbacks=(), checkpoint=None, validation=None, **settings):
    defaults = {
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
    }  # fmt: skip
    trainer = lightning.Trainer(
        max_epochs=epochs,
        default_root_dir=folder,
        callbacks=[BayesianTrainingCallback(), *callbacks],
        **(defaults | settings),
    )
    loader = loader or DataLoader(DATA, batch_size=8)
    trainer.fit(module, loader, validation, ckpt_path=checkpoint, weights_only=True)
    return trainer


def posterior_of(trainer):
    return trainer.optimizers[0].posterior()


def assert_same(left, right, **tolerance):
    for name in left.names:
        torch.testing.assert_close(left.mean[name], right.mean[name], **tolerance)
        torch.testing.assert_close(left.variance[name], right.variance[name], **tolerance)


def by_hand(windows, epochs=2):
    """The same draws in the plain loop: one per micro-batch."""
    model = Classifier()
    method = model.configure_optimizers()
    for _ in range(epochs):
        for window in windows:
            for rows in window:
                with method.sampled():
                    nn.functional.cross_entropy(model(INPUTS[rows]), LABELS[rows]).backward()
            method.step()
    return method.posterior()


def test_without_accumulation_it_is_the_plain_loop(tmp_path):
    trainer = fit(Classifier(), tmp_path)
    expected = by_hand([[slice(0, 8)], [slice(8, 16)], [slice(16, 24)]])
    assert_same(posterior_of(trainer), expected, rtol=0, atol=0)


def test_micro_batches_have_their_own_draws_and_average(tmp_path):
    """Three batches, two per update: the last window of an epoch is half full."""
    trainer = fit(Classifier(), tmp_path, accumulate_grad_batches=2)
    expected = by_hand([[slice(0, 8), slice(8, 16)], [slice(16, 24)]])
    assert_same(posterior_of(trainer), expected, rtol=1e-5, atol=1e-7)


class Watch(Callback):
    """What others see between the batches."""

    def __init__(self):
        self.between = []

    def on_train_start(self, trainer, pl_module):
        self.between.append(pl_module.first.weight.detach().clone())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.between.append(pl_module.first.weight.detach().clone())


def test_draws_while_training_and_the_mean_everywhere_else(tmp_path):
    module, watch = Classifier(), Watch()
    fit(
        module, tmp_path, callbacks=[watch], accumulate_grad_batches=2, validation=DataLoader(DATA, batch_size=24), val_check_interval=1,
        num_sanity_val_steps=0, epochs=1,
    )  # fmt: skip
    means, done = watch.between, 0
    assert [training for training, _ in module.seen] == [True, False] * 3  # validated halfway through an update, too
    for training, weight in module.seen:
        if training:
            assert not torch.equal(weight, means[done])
            done += 1
        else:
            assert torch.equal(weight, means[done])
    assert torch.equal(means[0], means[1])  # no update yet
    assert not torch.equal(means[1], means[2])


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resuming_is_exact(tmp_path):
    """Shuffling, dropout, a schedule and accumulation, from the end of the second of four epochs."""

    def trained(epochs, checkpoint=None):
        torch.manual_seed(9 if checkpoint is None else 1234)
        state = torch.get_rng_state()
        module = Classifier(dropout=0.3, schedule=True)
        torch.set_rng_state(state)
        saver = ModelCheckpoint(dirpath=tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
        trainer = fit(
            module, tmp_path, DataLoader(DATA, batch_size=4, shuffle=True), epochs, [saver], checkpoint,
            validation=DataLoader(DATA, batch_size=24), accumulate_grad_batches=2, enable_checkpointing=True,
        )  # fmt: skip
        return trainer, module

    straight, module = trained(4)
    resumed, again = trained(4, tmp_path / "epoch=1.ckpt")
    assert sum(training for training, _ in again.seen) == 12  # of 24 micro-batches
    assert_same(posterior_of(straight), posterior_of(resumed), rtol=0, atol=0)
    assert straight.optimizers[0].param_groups[0]["lr"] == resumed.optimizers[0].param_groups[0]["lr"] != 0.1
    for name, value in module.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_checkpoint_between_micro_batches_holds_the_last_update(tmp_path):
    """Six batches, updates after the third and the last; validated and saved after the fourth."""
    saver = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{step}")
    trainer = fit(
        Classifier(), tmp_path, DataLoader(DATA, batch_size=4), 1, [saver], validation=DataLoader(DATA, batch_size=24),
        accumulate_grad_batches=3, val_check_interval=2, num_sanity_val_steps=0, enable_checkpointing=True,
    )  # fmt: skip
    saved = torch.load(tmp_path / "step=1.ckpt", weights_only=True)
    assert saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["completed"] == 4
    assert saved["optimizer_states"][0]["method"]["draws"] == 3  # the fourth is made again
    resumed = Classifier()
    resumed.load_state_dict(saved["state_dict"])
    method = resumed.configure_optimizers()
    method.load_state_dict(saved["optimizer_states"][0])
    windows = [[slice(4 * k, 4 * k + 4) for k in rows] for rows in (range(3), range(3, 6))]
    assert_same(method.posterior(), by_hand(windows[:1], epochs=1), rtol=1e-5, atol=1e-7)
    for rows in windows[1]:
        with method.sampled():
            nn.functional.cross_entropy(resumed(INPUTS[rows]), LABELS[rows]).backward()
    method.step()
    assert_same(method.posterior(), posterior_of(trainer), rtol=1e-5, atol=1e-7)  # saving disturbed nothing


@pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`")
@pytest.mark.parametrize(
    ("accumulate", "skipped", "windows"),
    [
        (1, (1,), [[0], [2], [3], [4], [5]]),
        (2, (0,), [[1], [2, 3], [4, 5]]),
        (2, (1,), [[0], [2, 3], [4, 5]]),
        (2, (2, 3), [[0, 1], [4, 5]]),
    ],
)
def test_a_skipped_batch_has_no_part_in_the_update(tmp_path, accumulate, skipped, windows):
    class Skipping(Classifier):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in skipped else super().training_step(batch, batch_idx)

    trainer = fit(Skipping(), tmp_path, DataLoader(DATA, batch_size=4), epochs=1, accumulate_grad_batches=accumulate)
    expected = by_hand([[slice(4 * k, 4 * k + 4) for k in window] for window in windows], epochs=1)
    assert_same(posterior_of(trainer), expected, rtol=1e-5, atol=1e-7)


def test_several_draws_per_step(tmp_path):
    module = Classifier(method=MeanFieldVI, lr=0.01, n_samples=2)
    trainer = fit(module, tmp_path, epochs=1)
    assert len(module.seen) == 6  # two draws for each of three updates
    assert trainer.optimizers[0].state_dict()["method"]["draws"] == 6


def test_the_posterior_is_saved(tmp_path):
    module, path = Classifier(), tmp_path / "posterior.safetensors"
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        callbacks=[BayesianTrainingCallback(save_posterior=path)],
    )  # fmt: skip
    trainer.fit(module, DataLoader(DATA, batch_size=8))
    assert_same(Posterior.load(path, module), posterior_of(trainer), rtol=0, atol=0)


def test_an_error_in_a_micro_batch_leaves_the_mean(tmp_path):
    class Failing(Classifier):
        def training_step(self, batch, batch_idx):
            self(batch[0])
            raise ArithmeticError

    module = Failing()
    start = module.first.weight.detach().clone()
    with pytest.raises(ArithmeticError):
        fit(module, tmp_path, accumulate_grad_batches=2)
    assert not torch.equal(module.seen[0][1], start)
    assert torch.equal(module.first.weight, start)


def test_manual_optimization_is_left_to_the_module(tmp_path):
    class Manual(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            method = self.optimizers().optimizer
            with method.sampled():
                self.manual_backward(super().training_step(batch, batch_idx))
            method.step()

    trainer = fit(Manual(), tmp_path)
    assert_same(posterior_of(trainer), by_hand([[slice(0, 8)], [slice(8, 16)], [slice(16, 24)]]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("module", "settings", "match"),
    [
        (dict, {"gradient_clip_val": 0.5}, r"clips gradients at 0.5.*gradient_clip_val=None.*max_grad_norm of IVON"),
        (lambda: {"n_samples": 2}, {"accumulate_grad_batches": 2}, "one draw per micro-batch"),
        (lambda: {"method": torch.optim.SGD}, {}, "one training method such as IVON; got SGD"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, module, settings, match):
    class Plain(Classifier):
        def configure_optimizers(self):
            if self.method is torch.optim.SGD:
                return torch.optim.SGD(self.parameters(), lr=0.1)
            return super().configure_optimizers()

    with pytest.raises(InvalidInput, match=match):
        fit(Plain(**module()), tmp_path, **settings)


def test_loss_scaling_and_split_weights_are_refused():
    """Trainers as Lightning makes them where the machinery exists."""
    from types import SimpleNamespace

    from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy

    from bayespass.integrations.lightning import _check

    module = Classifier()
    method = module.configure_optimizers()
    single = SingleDeviceStrategy()
    trainer = {
        "gradient_clip_val": None,
        "accumulate_grad_batches": 1,
        "strategy": single,
        "precision_plugin": object(),
    }
    _check(SimpleNamespace(**trainer), module, method)
    with pytest.raises(InvalidInput, match="bf16-mixed"):
        _check(SimpleNamespace(**{**trainer, "precision_plugin": SimpleNamespace(scaler=object())}), module, method)
    with pytest.raises(InvalidInput, match="FSDPStrategy may split the weights"):
        _check(SimpleNamespace(**{**trainer, "strategy": FSDPStrategy()}), module, method)


def test_without_lightning_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "bayespass.integrations.lightning")
    with pytest.raises(MissingExtra, match=r"bayespass\[lightning\]"):
        import bayespass.integrations.lightning  # noqa: F401
