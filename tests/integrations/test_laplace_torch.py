"""The adapter against numbers that laplace-torch made: benchmarks/adapters_check.py --record wrote them."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from adapters_check import NETWORKS, dense, places_of
from bayespass import (
    DiagonalGaussian,
    FullGaussian,
    InvalidInput,
    KroneckerGaussian,
    NotFitted,
    Posterior,
    PosteriorMismatch,
)
from bayespass.integrations.laplace_torch import from_laplace_torch

DATA = Path(__file__).parent / "data"
RECORD = json.loads((DATA / "laplace_torch.json").read_text(encoding="utf-8"))["cases"]
TENSORS = load_file(DATA / "laplace_torch.safetensors")
KINDS = {"diag": DiagonalGaussian, "kron": KroneckerGaussian, "full": FullGaussian}
TOLERANCE = 1e-4  # of the covariance in standard deviations: laplace-torch inverts in float32


class FeatureExtractor:
    """As laplace-torch wraps the network for a last layer: a copy, and its last module."""

    def __init__(self, model):
        self.model, self.last_layer = model, model[-1]


class Recorded:
    """The attributes of a fitted laplace-torch object, as they were recorded."""

    def __init__(self, name, model):
        entry = RECORD[name]
        own = {key.removeprefix(f"{name}/"): value for key, value in TENSORS.items() if key.startswith(f"{name}/")}
        self.model, self.likelihood = model, entry["likelihood"]
        self.n_data, self.temperature = entry["n_data"], entry["temperature"]
        self.sigma_noise, self.prior_precision = torch.tensor(entry["sigma_noise"]), own["prior"]
        self.mean, self.H = own["mean"], "of the recorded precision"
        self.params = list(model.parameters())
        if entry["subset"] == "last_layer":
            copy = NETWORKS[entry["network"]]()
            self.model, self._last_layer_name = FeatureExtractor(copy), "2"
            self.params = list(copy.parameters())
        if entry["subset"] == "subnetwork":
            diagonal = own["covariance"].diagonal()
            self.n_params_subnet = int((diagonal > 0).sum())
            self.backend = SimpleNamespace(subnetwork_indices=(diagonal > 0).nonzero().flatten())
        if entry["structure"] == "kron":
            counts = entry["factors"]
            self.posterior_precision = SimpleNamespace(
                eigenvectors=[[own[f"vectors/{i}/{j}"] for j in range(n)] for i, n in enumerate(counts)],
                eigenvalues=[[own[f"values/{i}/{j}"] for j in range(n)] for i, n in enumerate(counts)],
                deltas=own["deltas"],
                damping=entry["is_damped"],
            )
        else:
            self.posterior_precision = own["precision"]


def recorded(name="mlp-classification-all-diag-scalar"):
    model = NETWORKS[RECORD[name]["network"]]()
    return Recorded(name, model), model


@pytest.mark.parametrize("name", sorted(RECORD))
def test_mean_and_covariance_are_those_of_laplace_torch(name):
    la, model = recorded(name)
    entry = RECORD[name]
    posterior = from_laplace_torch(la, model)
    assert type(posterior) is KINDS[entry["structure"]]
    places = places_of(posterior, model, entry["subset"])
    expected = TENSORS[f"{name}/covariance"]
    outside = torch.ones(len(expected), dtype=torch.bool)
    outside[places] = False
    assert not expected[outside].any()
    assert torch.equal(torch.cat([m.flatten() for m in posterior.mean.values()]), la.mean[places])
    sd = expected.diagonal()[places].clamp(min=1e-12).sqrt()
    error = (dense(posterior) - expected[places[:, None], places]) / torch.outer(sd, sd)
    assert error.abs().max() < TOLERANCE
    marginal = torch.cat([v.flatten() for v in posterior.variance.values()])
    torch.testing.assert_close(marginal, expected.diagonal()[places], rtol=TOLERANCE, atol=1e-7)


@pytest.mark.parametrize("name", sorted(RECORD))
def test_what_it_was_fitted_with(name):
    la, model = recorded(name)
    entry, info = RECORD[name], from_laplace_torch(la, model).info
    assert (info.n_data, info.method, info.likelihood) == (60, "laplace-torch", entry["likelihood"])
    assert info.temperature == entry["temperature"]
    assert info.sigma_noise == (pytest.approx(entry["sigma_noise"]) if entry["likelihood"] == "regression" else None)
    assert info.settings["subset_of_weights"] == entry["subset"]
    assert info.settings["hessian_structure"] == entry["structure"]
    prior = TENSORS[f"{name}/prior"]
    assert info.settings["prior_precisions"] == len(prior)
    if len(prior) == 1:
        assert info.prior_precision == pytest.approx(2.0 * entry["temperature"])
    else:
        assert float(prior.min()) < info.prior_precision / entry["temperature"] < float(prior.max())


def test_the_average_prior_counts_parameters():
    la, _ = recorded("mlp-regression-all-kron-layerwise-sigma_noise=0.3-temperature=0.5")
    weights = torch.tensor([12.0, 4.0, 8.0, 2.0])
    expected = 0.5 * float((la.prior_precision * weights).sum() / 26)
    assert from_laplace_torch(la).info.prior_precision == pytest.approx(expected)


def test_a_file_and_draws(tmp_path):
    la, model = recorded("conv-classification-all-kron-layerwise")
    posterior = from_laplace_torch(la)
    posterior.save(tmp_path / "p.safetensors", model)
    assert Posterior.load(tmp_path / "p.safetensors", model).info == posterior.info
    expected = TENSORS["conv-classification-all-kron-layerwise/covariance"].double()
    draws = torch.stack([torch.cat([v.flatten() for v in d.values()]) for d in posterior.sample(6000, 0)]).double()
    sd = expected.diagonal().sqrt()
    assert ((draws.T.cov() - expected) / torch.outer(sd, sd)).abs().max() < 5.5 * (2 / 6000) ** 0.5


def test_factors_mixed_with_their_prior():
    """With damping an eigenvalue is (l_1 + delta^.5) (l_2 + delta^.5)."""
    la, _ = recorded("mlp-classification-all-kron-scalar")
    la.posterior_precision.damping = True
    found = dense(from_laplace_torch(la))
    precision = la.posterior_precision
    for start, k, size in ((0, 0, 12), (16, 2, 8)):
        basis = torch.kron(*precision.eigenvectors[k])
        shifted = [values + precision.deltas[k].sqrt() for values in precision.eigenvalues[k]]
        expected = basis @ torch.diag(1 / torch.outer(*shifted).flatten()) @ basis.T
        torch.testing.assert_close(found[start : start + size, start : start + size], expected, rtol=1e-4, atol=1e-6)


def test_names_of_the_model_that_predicts():
    la, model = recorded()
    wrapped = nn.ModuleDict({"inside": model})  # holds the very parameters, under other names
    assert from_laplace_torch(la, wrapped).names[0] == "inside.0.weight"
    assert from_laplace_torch(la).names[0] == "0.weight"
    assert from_laplace_torch(la, NETWORKS["mlp"]()).names[0] == "0.weight"  # a copy, by name
    with pytest.raises(PosteriorMismatch, match=r"Sequential lacks: 2\.weight"):
        from_laplace_torch(la, NETWORKS["mlp"]()[:2])


def test_frozen_parameters_are_left_out():
    la, model = recorded("mlp-classification-last_layer-full-scalar")
    model[0].requires_grad_(False)
    plain = SimpleNamespace(**{k: v for k, v in vars(la).items() if k not in ("_last_layer_name", "params")})
    plain.model = model  # as "all" over what requires gradients
    assert from_laplace_torch(plain).names == ("2.weight", "2.bias")


def test_a_tied_last_layer_is_refused():
    la, _ = recorded("mlp-classification-last_layer-diag-scalar")
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    network[1].weight = network[0].weight
    la.model = FeatureExtractor(network)
    with pytest.raises(InvalidInput, match=r"shares a parameter: 0\.weight and 1\.weight are one"):
        from_laplace_torch(la)


def test_what_cannot_be_read():
    la, _ = recorded()
    with pytest.raises(InvalidInput, match="Linear is no Laplace object of laplace-torch"):
        from_laplace_torch(nn.Linear(1, 1))
    la.n_data = 0
    with pytest.raises(NotFitted, match=r"has seen no data; call its fit\(train_loader\)"):
        from_laplace_torch(la)
    la, _ = recorded()
    la.H = None
    with pytest.raises(NotFitted, match="has seen no data"):
        from_laplace_torch(la)
    la, _ = recorded()
    del la.posterior_precision  # functional Laplace, "gp"
    with pytest.raises(InvalidInput, match="has no posterior over weights; fit Laplace with"):
        from_laplace_torch(la)
    la, _ = recorded()
    la.posterior_precision = ((torch.eye(26), torch.ones(26)), torch.ones(26))  # "lowrank"
    with pytest.raises(InvalidInput, match="neither a diagonal, Kronecker factors nor a matrix"):
        from_laplace_torch(la)
    la, _ = recorded()
    la.likelihood = "reward_modeling"
    with pytest.raises(InvalidInput, match="'reward_modeling' has no counterpart here"):
        from_laplace_torch(la)
    la, _ = recorded()
    la.posterior_precision = -la.posterior_precision
    with pytest.raises(InvalidInput, match="not positive everywhere; raise the prior precision"):
        from_laplace_torch(la)
    la, _ = recorded("mlp-classification-all-full-scalar")
    la.posterior_precision = torch.zeros(26, 26)
    with pytest.raises(InvalidInput, match="not positive definite"):
        from_laplace_torch(la)
    la, _ = recorded()
    la.mean = la.mean[:5]
    with pytest.raises(InvalidInput, match=r"has shape \(5,\) for 26 parameters"):
        from_laplace_torch(la)
    la, _ = recorded("mlp-classification-all-kron-scalar")
    la.posterior_precision.eigenvalues[0] = [torch.ones(12)]
    with pytest.raises(InvalidInput, match=r"0\.weight of shape \(4, 3\) has Kronecker factors of sizes \[12\]"):
        from_laplace_torch(la)
