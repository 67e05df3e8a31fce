import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from bayespass import (
    DiagonalGaussian,
    InvalidPosteriorFile,
    Posterior,
    PosteriorInfo,
    PosteriorMismatch,
    VarianceScales,
    load_scales,
)
from bayespass.posterior import store


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)).eval()


@pytest.fixture
def posterior(model):
    mean = {name: p.detach() for name, p in model.named_parameters() if name.startswith("2.")}
    info = PosteriorInfo(n_data=7, prior_precision=0.5, method="test", settings={"lr": 0.1})
    return DiagonalGaussian(mean, {name: torch.rand_like(p) for name, p in mean.items()}, info)


@pytest.fixture
def file(tmp_path, model, posterior):
    path = tmp_path / "folder" / "posterior.safetensors"
    posterior.save(path, model, scales=VarianceScales({"2": 1.5, "": 0.9}, "cvp"))
    return path


def test_scales_come_back_with_their_approximation(file, tmp_path, model, posterior):
    scales = load_scales(file)
    assert dict(scales) == {"2": 1.5, "": 0.9}
    assert scales.approximation == "cvp"
    posterior.save(tmp_path / "plain.safetensors", model)
    assert load_scales(tmp_path / "plain.safetensors") is None


def test_the_manifest_says_what_and_holds_no_data(file, posterior):
    with safe_open(file, framework="pt") as opened:
        manifest = json.loads(opened.metadata()["bayespass"])
        assert set(opened.keys()) == {"mean/2.weight", "variance/2.weight", "mean/2.bias", "variance/2.bias"}
    assert manifest["names"] == ["2.weight", "2.bias"]
    assert manifest["shapes"]["2.weight"] == [2, 2]
    assert manifest["info"]["n_data"] == 7
    assert manifest["mean_hash"] == store.hash_tensors(posterior.mean)
    assert {"bayespass_version", "frozen_hash", "kind", "format", "content_hash"} <= set(manifest)


def test_frozen_weights_and_buffers_must_match(file, model):
    Posterior.load(file, model)
    with torch.no_grad():
        model[2].weight.add_(1)  # random weights may differ: the file holds the mean
    Posterior.load(file, model)
    model[1].running_mean.add_(1)
    with pytest.raises(PosteriorMismatch, match="frozen weights or buffers differ"):
        Posterior.load(file, model)
    model[1].running_mean.sub_(1)
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    with pytest.raises(PosteriorMismatch, match="hash"):
        Posterior.load(file, model)


def test_another_architecture_is_refused(file):
    with pytest.raises(PosteriorMismatch, match="shape"):
        Posterior.load(file, nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 5)))
    with pytest.raises(PosteriorMismatch, match="lacks"):
        Posterior.load(file, nn.Linear(3, 2))


def test_damaged_and_foreign_files(file, tmp_path, model):
    content = file.read_bytes()
    flipped = bytearray(content)
    flipped[-1] ^= 1
    header_end = 8 + int.from_bytes(content[:8], "little")
    for name, wrong, match in [
        ("truncated", content[: len(content) // 2], "not a readable"),
        ("header", content[: header_end - 3] + b"xxx" + content[header_end:], "not a readable"),
        ("flipped", bytes(flipped), "do not match the hash"),
        ("text", b"hello", "not a readable"),
        ("empty", b"", "not a readable"),
    ]:
        path = tmp_path / name
        path.write_bytes(wrong)
        with pytest.raises(InvalidPosteriorFile, match=match):
            Posterior.load(path, model)
    torch.save({"a": torch.ones(1)}, tmp_path / "pickle")
    save_file({"a": torch.ones(1)}, tmp_path / "foreign")
    with pytest.raises(InvalidPosteriorFile, match="not a readable"):
        Posterior.load(tmp_path / "pickle", model)
    with pytest.raises(InvalidPosteriorFile, match="no bayespass posterior"):
        Posterior.load(tmp_path / "foreign", model)
    with pytest.raises(FileNotFoundError, match="no posterior file"):
        Posterior.load(tmp_path / "absent", model)


def test_unknown_versions_and_kinds(tmp_path, model, posterior):
    path = tmp_path / "posterior"
    store.write(path, {"a": torch.ones(1)}, {"kind": "flow"})
    with pytest.raises(InvalidPosteriorFile, match="kind 'flow'"):
        Posterior.load(path, model)
    store.write(path, {"a": torch.ones(1)}, {"kind": "diagonal_gaussian", "names": ["a"], "info": {}})
    with pytest.raises(InvalidPosteriorFile, match="not those of a posterior"):
        Posterior.load(path, model)
    store.write(path, posterior._tensors(), {"kind": "diagonal_gaussian", "format_version": 99})
    with pytest.raises(InvalidPosteriorFile, match="format 99"):
        Posterior.load(path, model)


def rewrite_header(path, change):
    """The same file with another manifest, as someone with an editor would leave it."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    manifest = json.loads(header["__metadata__"]["bayespass"])
    change(manifest)
    header["__metadata__"]["bayespass"] = json.dumps(manifest, sort_keys=True)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["info"].update(temperature=9.0),
        lambda m: m["info"].update(n_data=0),
        lambda m: m["scales"].update(factors={}),
        lambda m: m.update(mean_hash="0"),
        lambda m: m.pop("info"),
    ],
)
def test_an_edited_manifest_is_refused(file, model, change):
    rewrite_header(file, change)
    with pytest.raises(InvalidPosteriorFile, match="damaged"):
        Posterior.load(file, model)
    with pytest.raises(InvalidPosteriorFile, match="damaged"):
        load_scales(file)


def test_a_failed_write_leaves_the_old_file(file, model, posterior, monkeypatch):
    before = file.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(store, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        posterior.save(file, model)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]
