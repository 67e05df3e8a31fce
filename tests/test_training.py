"""The training loop. Run as a script, this file is the process that a test kills."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, TensorDataset

from bayespass import IVON, InvalidInput, PosteriorInfo
from bayespass.checkpoint import read, write
from bayespass.posterior.elbo import MeanFieldVI
from bayespass.training import NonFiniteLoss, TrainingLog, likelihood_loss, train

ROWS, EPOCHS = 60, 3
GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(ROWS, 4, generator=GENERATOR)
LABELS = (INPUTS[:, 0] > 0).long() + (INPUTS[:, 1] > 0).long()


class Noisy(Dataset):
    """Rows with augmentation, from the global random state."""

    def __len__(self):
        return ROWS

    def __getitem__(self, row):
        return INPUTS[row] + 0.05 * torch.randn(4), LABELS[row]


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def setup(kind="ivon", schedule="cosine", **loader):
    model = network()
    if kind == "adamw":
        method = torch.optim.AdamW(model.parameters(), lr=0.01)
    elif kind == "sgd":
        method = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    elif kind == "elbo":
        method = MeanFieldVI(model.named_parameters(), lr=0.01, n_data=ROWS, n_samples=2)
    else:
        method = IVON(model.named_parameters(), lr=0.1, n_data=ROWS, hess_init=0.5, betas=(0.9, 0.99))
    schedules = {
        "cosine": lambda: CosineAnnealingLR(method, 60),
        "steps": lambda: MultiStepLR(method, [5, 9]),
        "cycle": lambda: OneCycleLR(method, 0.2, total_steps=60),
    }
    scheduler = schedules[schedule]() if schedule else None
    return model, method, scheduler, DataLoader(Noisy(), **({"batch_size": 8, "shuffle": True} | loader))


def bits(model, method):
    """Everything a run leaves behind."""
    found = dict(model.state_dict())
    if hasattr(method, "posterior"):
        posterior = method.posterior()
        found |= {f"{name} variance": value for name, value in posterior.variance.items()}
    for index, state in method.state_dict()["state"].items():
        found |= {f"{index} {name}": value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return found


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


class Killed(Exception):
    pass


def killer(at):
    def on_step(step, loss):
        if step == at:
            raise Killed

    return on_step


def run(path=None, on_step=None, kind="ivon", schedule="cosine", loader=(), epochs=EPOCHS, **options):
    model, method, scheduler, batches = setup(kind, schedule, **dict(loader))
    loss = nn.functional.cross_entropy if kind in ("adamw", "sgd") else None
    log = train(model, method, batches, epochs, loss, scheduler=scheduler, checkpoint=path, on_step=on_step, **options)
    return bits(model, method), log


def train_and_wait(path):
    """What the subprocess does: checkpoints every 3 of 24 steps, and waits for its end after step 14."""
    torch.set_num_threads(1)
    run(path, lambda step, loss: time.sleep(600 if step == 14 else 0.01), checkpoint_every=3)


def steps_in(path):
    with safe_open(path, framework="pt") as file:
        state = dict(json.loads(file.metadata()["bayespass"])["state"]["dict"])
    return 0 if state is None else len(read(path)["run"]["losses"])


def test_a_process_killed_with_sigkill_ends_in_the_same_bits(tmp_path):
    path = tmp_path / "run.safetensors"
    child = subprocess.Popen([sys.executable, __file__, str(path)])
    try:
        while child.poll() is None and not (path.exists() and steps_in(path) >= 6):
            time.sleep(0.01)
        assert child.poll() is None, "the process ended before it could be killed"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert child.returncode == -signal.SIGKILL
    done = steps_in(path)
    assert 6 <= done <= 12
    steps = []
    resumed, log = run(path, lambda step, loss: steps.append(step), checkpoint_every=3)
    straight, whole = run()
    assert steps == list(range(done + 1, 25))  # it went on, it did not start again
    assert_same_bits(resumed, straight)
    assert (log.losses, log.lrs) == (whole.losses, whole.lrs)
    assert log.steps == 24


@pytest.mark.parametrize("at", [1, 3, 4, 5, 8, 11])
def test_killed_anywhere_with_accumulation_it_ends_in_the_same_bits(tmp_path, at):
    """Four updates per epoch of two batches each, the last one of 4 rows: 4 and 8 are ends of epochs."""
    settings = {"gradient_accumulation": 2, "checkpoint_every": 1}
    with pytest.raises(Killed):
        run(tmp_path / "a", killer(at), **settings)
    resumed, log = run(tmp_path / "a", **settings)
    straight, whole = run(**settings)
    assert_same_bits(resumed, straight)
    assert log.losses == whole.losses
    assert log.steps == 12


@pytest.mark.parametrize(
    ("kind", "schedule", "loader"),
    [
        ("adamw", "steps", {}), ("sgd", "cycle", {}), ("elbo", None, {}), ("ivon", "cycle", {"generator": torch.Generator()}),
        ("adamw", None, {"num_workers": 1}),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
def test_every_kind_of_run_resumes(tmp_path, kind, schedule, loader):
    settings = {"kind": kind, "schedule": schedule, "loader": loader, "checkpoint_every": 4, "epochs": 2}
    with pytest.raises(Killed):
        run(tmp_path / "a", killer(11), **settings)
    resumed, log = run(tmp_path / "a", **settings)
    straight, whole = run(**settings)
    assert_same_bits(resumed, straight)
    assert (log.losses, log.lrs) == (whole.losses, whole.lrs)


def test_checkpoints_change_nothing_and_a_finished_one_returns_at_once(tmp_path):
    plain, log = run()
    saved, _ = run(tmp_path / "a", checkpoint_every=1)
    assert_same_bits(plain, saved)
    again, second = run(tmp_path / "a", lambda step, loss: pytest.fail("it trained again"), checkpoint_every=1)
    assert_same_bits(plain, again)
    assert second.losses == log.losses
    more, longer = run(tmp_path / "a", epochs=EPOCHS + 1)
    assert longer.steps == 32
    assert_same_bits(more, run(epochs=EPOCHS + 1)[0])


def test_a_run_leaves_the_callers_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(epochs=1, loader={"batch_size": 30})
    torch.manual_seed(5)
    state = torch.get_rng_state()
    model, method, scheduler, batches = setup()
    torch.set_rng_state(state)
    train(model, method, batches, 1, scheduler=scheduler)
    assert torch.equal(torch.rand(3), expected)


def test_the_seed_decides_order_and_dropout():
    assert run(epochs=1)[1].losses == run(epochs=1)[1].losses
    assert run(epochs=1)[1].losses != run(epochs=1, seed=1)[1].losses


def test_it_is_the_loop_that_users_write():
    def start():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        return model, IVON(model.named_parameters(), lr=0.1, n_data=ROWS)

    (model, method), (other, by_hand) = start(), start()
    batches = list(zip(INPUTS.split(20), LABELS.split(20), strict=True))
    train(model, method, batches, 2)
    for _ in range(2):
        for inputs, labels in batches:
            with by_hand.sampled():
                nn.functional.cross_entropy(other(inputs), labels).backward()
            by_hand.step()
    assert_same_bits(bits(model, method), bits(other, by_hand))
    assert not model.training


def test_accumulated_batches_are_one_large_batch_whatever_their_sizes():
    """The same weight draw, the same rows: only rounding differs."""

    def trained(sizes, accumulation):
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        method = IVON(model.named_parameters(), lr=0.1, n_data=ROWS, betas=(0.9, 0.9))
        batches = list(zip(INPUTS.split(sizes), LABELS.split(sizes), strict=True))
        log = train(model, method, batches, 5, gradient_accumulation=accumulation)
        return model, method.posterior(), log

    model, posterior, log = trained([60], 1)
    other, accumulated, log_other = trained([8, 40, 12], 3)
    assert log.steps == log_other.steps == 5
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(dict(posterior.variance), dict(accumulated.variance), rtol=1e-4, atol=0)
    torch.testing.assert_close(log.losses, log_other.losses, rtol=1e-5, atol=0)


def test_the_default_loss_is_a_mean_over_rows_and_a_sum_within_them():
    outputs, targets = torch.randn(5, 3), torch.randn(5, 3)
    regression = likelihood_loss(PosteriorInfo("regression", 5, sigma_noise=0.5))(outputs, targets)
    density = torch.distributions.Normal(outputs, 0.5).log_prob(targets)
    torch.testing.assert_close(regression, -density.sum(1).mean())
    logits, labels = torch.randn(5, 7, 3), torch.randint(3, (5, 7))
    tokens = likelihood_loss(PosteriorInfo("classification", 5))(logits, labels)
    expected = -torch.distributions.Categorical(logits=logits).log_prob(labels).sum(1).mean()
    torch.testing.assert_close(tokens, expected)
    predicted = likelihood_loss(PosteriorInfo("regression", 5, sigma_noise="predicted"))(torch.randn(5, 3, 2), targets)
    assert predicted.dim() == 0


def test_norm_statistics_can_be_those_of_the_final_weights():
    model, method, _, _ = setup(schedule=None)
    batches = [(INPUTS, LABELS)]
    train(model, method, batches, 3, update_norms=True)
    with torch.no_grad():
        features = model[0](INPUTS)
    torch.testing.assert_close(model[1].running_mean, features.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[1].running_var, features.var(0), rtol=1e-5, atol=1e-6)
    assert not model.training


def test_modes_can_be_kept():
    model, method, _, _ = setup(schedule=None)
    model[1].eval()
    before = model[1].running_mean.clone()
    train(model, method, [(INPUTS, LABELS)], 2, keep_modes=True)
    assert torch.equal(model[1].running_mean, before)
    assert [module.training for module in model] == [True, False, True, True, True]


def test_a_loss_that_is_not_finite_stops_with_the_checkpoint_intact(tmp_path):
    path, calls = tmp_path / "a", []

    def loss(outputs, targets):
        calls.append(1)
        return nn.functional.cross_entropy(outputs, targets) * (float("nan") if len(calls) == 6 else 1.0)

    model, method, scheduler, batches = setup()
    with pytest.raises(NonFiniteLoss, match=r"nan at step 6; lower the learning rate"):
        train(model, method, batches, 2, loss, scheduler=scheduler, checkpoint=path, checkpoint_every=5)
    assert steps_in(path) == 5
    resumed, _ = run(path, checkpoint_every=5)
    assert_same_bits(resumed, run()[0])


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    model = nn.Linear(4, 3)
    method = torch.optim.SGD(model.parameters(), lr=1e38)
    with pytest.raises(NonFiniteLoss, match="after step 1"):
        train(model, method, [(100 * INPUTS, LABELS)], 1, nn.functional.cross_entropy, checkpoint=tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda: setup("adamw"), "method is AdamW and was IVON"),
        (lambda: setup(schedule=None), "scheduler is NoneType and was CosineAnnealingLR"),
        (lambda: setup(batch_size=10), "batches per epoch is 6 and was 8"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, match):
    path = tmp_path / "a"
    run(path, epochs=1)
    model, method, scheduler, batches = change()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InvalidInput, match=match):
        train(model, method, batches, 2, nn.functional.cross_entropy, scheduler=scheduler, checkpoint=path)
    assert_same_bits(dict(model.state_dict()), before)
    with pytest.raises(InvalidInput, match="seed is 1 and was 0"):
        run(path, seed=1)
    with pytest.raises(InvalidInput, match="gradient_accumulation is 2 and was 1"):
        run(path, gradient_accumulation=2)


def test_a_checkpoint_of_another_model_or_prior_is_refused(tmp_path):
    for width, prior in ((3, 1.0), (5, 1.0), (3, 2.0)):
        model = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 3))
        method = IVON(model.named_parameters(), lr=0.1, n_data=ROWS, prior_precision=prior)
        if (width, prior) == (3, 1.0):
            train(model, method, [(INPUTS, LABELS)], 1, checkpoint=tmp_path / "a")
            continue
        match = "0.weight is" if width == 5 else "prior_precision of the method is 2.0 and was 1.0"
        with pytest.raises(InvalidInput, match=match):
            train(model, method, [(INPUTS, LABELS)], 1, checkpoint=tmp_path / "a")


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(InvalidInput, match=r"cannot be read.*delete it"):
        run(path)
    model, method, _, _ = setup()
    method.posterior().save(path, model)
    with pytest.raises(InvalidInput, match="not written by this version"):
        run(path)
    with pytest.raises(InvalidInput, match="has 2 epochs behind it"):
        run(tmp_path / "b", epochs=2)
        run(tmp_path / "b", epochs=1)


def test_nested_state_survives_exactly(tmp_path):
    from collections import Counter

    tied = torch.randn(2, 2)
    state = {
        "a": {0: tied, "b": (tied.t(), [1, 2.5, None, True, "word"])}, "c": Counter([3, 3, 5]), "d": [0.1 + 0.2, 1e-320],
        "e": torch.tensor(7), "f": float("inf"), "g": torch.tensor([1.5], dtype=torch.bfloat16), "h": (), "i": {},
    }  # fmt: skip
    write(tmp_path / "a", state)
    found = read(tmp_path / "a")
    for got, value in (
        (found["a"][0], tied),
        (found["a"]["b"][0], tied.t()),
        (found["e"], state["e"]),
        (found["g"], state["g"]),
    ):
        assert torch.equal(got, value)
        assert got.dtype == value.dtype
    assert found["a"]["b"][1] == [1, 2.5, None, True, "word"]
    assert found["c"] == state["c"]
    assert type(found["c"]) is Counter
    assert (found["d"], found["f"], found["h"], found["i"]) == (state["d"], float("inf"), (), {})
    with pytest.raises(InvalidInput, match="got function at /x/0"):
        write(tmp_path / "b", {"x": [test_nested_state_survives_exactly]})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"epochs": 0}, "epochs"), ({"gradient_accumulation": 0}, "gradient_accumulation"), ({"checkpoint_every": 1.5}, "checkpoint_every"),
        ({"loader": (INPUTS, LABELS)}, "re-iterable"), ({"loader": iter([(INPUTS, LABELS)])}, "re-iterable"), ({"loader": 3}, "re-iterable"),
        ({"loader": []}, "no batch"), ({"loader": [INPUTS]}, "every batch must be"), ({"loss": lambda o, t: o.sum(1)}, "one number"),
        ({"method": torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)}, "parameters that Linear lacks"),
        ({"scheduler": CosineAnnealingLR(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1), 3)}, "another optimizer"),
    ],
)  # fmt: skip
def test_bad_settings_name_themselves(options, match):
    model = nn.Linear(4, 3)
    defaults = {
        "method": IVON(model.named_parameters(), lr=0.1, n_data=ROWS),
        "loader": [(INPUTS, LABELS)],
        "epochs": 1,
    }
    with pytest.raises(InvalidInput, match=match):
        train(model, **(defaults | options))


def test_what_it_cannot_do_says_so():
    model = nn.Linear(4, 3)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InvalidInput, match="SGD has no likelihood"):
        train(model, sgd, [(INPUTS, LABELS)], 1)
    with pytest.raises(InvalidInput, match="ReduceLROnPlateau"):
        train(model, sgd, [(INPUTS, LABELS)], 1, nn.functional.cross_entropy, scheduler=ReduceLROnPlateau(sgd))


def test_dict_batches_and_the_log(capsys):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, features):
            return {"logits": self.layer(features)}

    model = Named()
    method = IVON(model.named_parameters(), lr=0.1, n_data=ROWS)
    seen = []
    log = train(
        model, method, [{"features": INPUTS, "labels": LABELS}], 2,
        progress=True, on_step=lambda step, loss: seen.append((step, loss)),
    )  # fmt: skip
    assert isinstance(log, TrainingLog)
    assert seen == list(zip((1, 2), log.losses, strict=True))
    assert json.loads(json.dumps(log.to_dict())) == {
        "losses": list(log.losses), "lrs": [0.1, 0.1], "epochs": 2, "seconds": log.seconds, "steps": 2,
    }  # fmt: skip
    assert capsys.readouterr().err == ""  # no terminal, no bar


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run(epochs=1, progress=True)
    shown = capsys.readouterr().err
    assert "training (IVON)" in shown
    assert "/8" in shown
    assert "loss" in shown


def test_it_learns():
    model, method, _, _ = setup(schedule=None)
    loader = DataLoader(TensorDataset(INPUTS, LABELS), batch_size=12, shuffle=True)
    log = train(model, method, loader, 40)
    assert sum(log.losses[-5:]) < 0.7 * sum(log.losses[:5])


if __name__ == "__main__":
    train_and_wait(sys.argv[1])
