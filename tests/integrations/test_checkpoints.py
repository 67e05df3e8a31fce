import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bayespass import Empirical, InvalidInput, LowRankGaussian, MonteCarlo, PosteriorInfo
from bayespass.integrations.checkpoints import from_checkpoints
from bayespass.posterior.ensemble import ensemble
from bayespass.posterior.swag import SWAG

INFO = PosteriorInfo(n_data=70, method="test")


def network(seed=0, norm=False):
    torch.manual_seed(seed)
    middle = nn.BatchNorm1d(4) if norm else nn.Identity()
    return nn.Sequential(nn.Linear(3, 4), middle, nn.Tanh(), nn.Linear(4, 2)).eval()


def trained(seed, norm=False):
    """Another network with its own weights, and with statistics of its own."""
    model = network(seed, norm)
    if norm:
        model.train()(torch.randn(64, 3) * (1 + seed))
        nn.init.normal_(model[1].weight, 1.0, 0.2)
    return model.eval()


def store(models, folder, prefix=""):
    folder.mkdir(exist_ok=True)
    for k, model in enumerate(models):
        state = {prefix + name: value.contiguous().clone() for name, value in model.state_dict().items()}
        save_file(state, folder / f"epoch{k}.safetensors")
    return folder


def flat(draw):
    return torch.cat([value.flatten() for value in draw.values()])


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_an_ensemble_is_that_of_the_models(tmp_path, prefix):
    models = [network(k) for k in range(3)]
    posterior = from_checkpoints(store(models, tmp_path / "runs", prefix), network(9), info=INFO)
    expected = ensemble(models)
    assert isinstance(posterior, Empirical)
    assert posterior.info == INFO
    assert [torch.equal(flat(a), flat(b)) for a, b in zip(posterior.members, expected.members, strict=True)] == [
        True
    ] * 3


def test_swag_is_that_of_the_walk(tmp_path):
    models = [network(k) for k in range(12)]  # epoch10 after epoch9
    posterior = from_checkpoints(store(models, tmp_path / "run"), network(9), "swag", rank=3, info=INFO)
    walker = network()
    swag = SWAG(walker.named_parameters(), 70, rank=3)
    for model in models:
        walker.load_state_dict(model.state_dict())
        swag.collect()
    expected = swag.posterior()
    assert isinstance(posterior, LowRankGaussian)
    assert posterior.rank == 3
    assert (posterior.info.n_data, posterior.info.settings["rank"]) == (70, 3)
    for name in expected.names:
        assert torch.equal(posterior.mean[name], expected.mean[name])
        assert torch.equal(posterior.variance[name], expected.variance[name])
    assert torch.equal(flat(next(posterior.sample(1, 0))), flat(next(expected.sample(1, 0))))


def test_batch_norm_statistics_go_into_the_weights(tmp_path):
    """With them a member computes what its checkpoint did, on a model with other statistics."""
    models, base, inputs = [trained(k, norm=True) for k in range(3)], trained(7, norm=True), torch.randn(5, 3)
    folder = store(models, tmp_path / "runs")
    posterior = from_checkpoints(folder, base)
    for member, model in zip(posterior.members, models, strict=True):
        found = torch.func.functional_call(base, dict(member), (inputs,))
        torch.testing.assert_close(found, model(inputs), rtol=1e-4, atol=1e-5)
    swag = from_checkpoints(folder, base, "swag", rank=2)
    torch.testing.assert_close(flat(swag.mean), flat(posterior.mean))
    with pytest.raises(InvalidInput, match=r"checkpoint \S+epoch0\.safetensors does not fit: running statistics of 1"):
        from_checkpoints(folder, base, names=["3.weight"])


def test_folders_of_transformers(tmp_path):
    """checkpoint-N folders, one file or shards; the tensors of a shard index are read from their files."""
    models = [network(k) for k in range(3)]
    for step, model in zip((500, 1000, 1500), models, strict=True):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        state = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
        if step == 1000:
            shards = {name: f"model-0000{1 + (name[0] == '3')}-of-00002.safetensors" for name in state}
            for shard in set(shards.values()):
                save_file({n: v for n, v in state.items() if shards[n] == shard}, folder / shard)
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
        else:
            save_file(state, folder / "model.safetensors")
    posterior = from_checkpoints(tmp_path, network(9))
    for member, model in zip(posterior.members, models, strict=True):
        assert torch.equal(flat(member), flat({n: p.detach() for n, p in model.named_parameters()}))
    paths = [tmp_path / "checkpoint-1000", tmp_path / "checkpoint-500" / "model.safetensors"]
    assert torch.equal(flat(from_checkpoints(paths, network(9)).members[1]), flat(posterior.members[0]))
    with pytest.raises(InvalidInput, match=r"at least two checkpoints; \S+checkpoint-1000 holds"):
        from_checkpoints(tmp_path / "checkpoint-1000", network(9))
    (tmp_path / "checkpoint-1000" / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file at \S+model-00001-of-00002"):
        from_checkpoints(tmp_path, network(9))
    index = tmp_path / "checkpoint-1000" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"0.weight": "../../elsewhere.safetensors"}}))
    with pytest.raises(InvalidInput, match=r"names '\.\./\.\./elsewhere.safetensors', which is no file of its own"):
        from_checkpoints(tmp_path, network(9))
    index.write_text("{}")
    with pytest.raises(InvalidInput, match=r"index\.json is no index of shards"):
        from_checkpoints(tmp_path, network(9))


def test_names_and_frozen_weights(tmp_path):
    base = network(0)
    heads = [copy.deepcopy(base) for _ in range(3)]
    for k, model in enumerate(heads):
        nn.init.normal_(model[3].weight, k, 0.1)
    posterior = from_checkpoints(store(heads, tmp_path / "runs"), base, names=lambda name: name == "3.weight")
    assert posterior.names == ("3.weight",)
    with pytest.raises(
        InvalidInput, match=r"epoch0\.safetensors does not fit: 0\.weight differs in it but is not random"
    ):
        from_checkpoints(store([network(5), network(6)], tmp_path / "others"), base, names=["3.weight"])


def test_tied_weights_and_half_precision(tmp_path):
    def tied(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        return model.eval()

    models = [tied(k) for k in range(2)]
    (tmp_path / "runs").mkdir()
    for k, model in enumerate(models):  # a safetensors file holds one name of the two
        state = {n: p.detach().half() for n, p in model.named_parameters()}
        save_file(state, tmp_path / "runs" / f"{k}.safetensors")
    posterior = from_checkpoints(tmp_path / "runs", tied(7))
    assert posterior.names == ("0.weight", "0.bias", "1.bias")
    assert posterior.members[1]["0.weight"].dtype == torch.float32
    torch.testing.assert_close(posterior.members[1]["0.weight"], models[1][0].weight.detach(), rtol=1e-3, atol=1e-3)


def test_predictions(tmp_path):
    models, inputs = [network(k) for k in range(4)], torch.randn(5, 3)
    posterior = from_checkpoints(store(models, tmp_path / "runs"), models[0])
    expected = torch.stack([model(inputs).softmax(-1) for model in models]).mean(0)
    torch.testing.assert_close(MonteCarlo(models[0], posterior, n_samples=4)(inputs).probs, expected)


def test_mistakes_name_the_file(tmp_path):
    folder = store([network(0), network(1)], tmp_path / "runs")
    with pytest.raises(InvalidInput, match="kind must be 'ensemble' or 'swag'; got 'soup'"):
        from_checkpoints(folder, network(), "soup")
    with pytest.raises(FileNotFoundError, match="no folder of checkpoints at"):
        from_checkpoints(tmp_path / "nowhere", network())
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file at \S+epoch7"):
        from_checkpoints([folder / "epoch0.safetensors", folder / "epoch7.safetensors"], network())
    with pytest.raises(InvalidInput, match="rank must be at least 2"):
        from_checkpoints(folder, network(), "swag", rank=1)
    with pytest.raises(InvalidInput, match=r"at least two checkpoints\. Pass"):
        from_checkpoints([folder / "epoch0.safetensors"], network())
    wide = nn.Sequential(nn.Linear(3, 5), nn.Identity(), nn.Tanh(), nn.Linear(5, 2))
    with pytest.raises(
        InvalidInput, match=r"epoch0\.safetensors does not fit: 0\.weight has shape \(4, 3\) in it and \(5, 3\)"
    ):
        from_checkpoints(folder, wide)
    with pytest.raises(InvalidInput, match=r"epoch0\.safetensors does not fit: it lacks 4\.weight"):
        from_checkpoints(folder, nn.Sequential(*network(), nn.Linear(2, 2)))
    (folder / "epoch1.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(InvalidInput, match=r"epoch1\.safetensors is not a readable safetensors file"):
        from_checkpoints(folder, network())
    broken = network(1)
    broken[0].weight.data[0, 0] = torch.nan
    store([network(0), broken], folder)
    with pytest.raises(
        InvalidInput, match=r"checkpoint \S+epoch1\.safetensors does not fit: parameter 0\.weight of it is NaN"
    ):
        from_checkpoints(folder, network(), "swag")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_pickles_are_refused_with_the_way_out(tmp_path, suffix):
    path = tmp_path / f"epoch0{suffix}"
    path.write_bytes(b"a pickle")
    for paths in (tmp_path, [path, path]):
        with pytest.raises(InvalidInput, match=r"weights_only=True.*save_file\(.*'epoch0\.safetensors'"):
            from_checkpoints(paths, network())
    (tmp_path / "checkpoint-5").mkdir()
    path.rename(tmp_path / "checkpoint-5" / path.name)
    with pytest.raises(InvalidInput, match="a pickle, which is never read here"):
        from_checkpoints([tmp_path / "checkpoint-5"] * 2, network())
