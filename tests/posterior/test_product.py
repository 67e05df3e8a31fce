import pytest
import torch
from torch import nn

from bayespass import (
    DiagonalGaussian,
    InvalidInput,
    InvalidPosteriorFile,
    MonteCarlo,
    Posterior,
    PosteriorInfo,
    PosteriorMismatch,
)
from bayespass.posterior import store
from bayespass.posterior.dropout import DropoutPosterior
from bayespass.posterior.empirical import Empirical
from bayespass.posterior.full import FullGaussian
from bayespass.posterior.kronecker import KroneckerGaussian
from bayespass.posterior.mixture import Mixture
from bayespass.posterior.product import Product
from bayespass.testing import check_posterior

INFO = PosteriorInfo(n_data=9, prior_precision=0.5, method="test")
OTHER = PosteriorInfo(n_data=9, prior_precision=2.0, method="other")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).eval()


@pytest.fixture
def parts(model):
    generator = torch.Generator().manual_seed(1)
    mean = {name: p.detach() for name, p in model.named_parameters()}
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator))[0]
    first, last = ({n: m for n, m in mean.items() if n.startswith(path)} for path in "02")
    spread = {n: torch.rand(m.shape, generator=generator) + 0.1 for n, m in first.items()}
    return [
        KroneckerGaussian(first, spread, {"0.weight": turn}, info=INFO),
        FullGaussian(last, torch.randn(10, 10, generator=generator) / 3, OTHER),
    ]


def draws_of(posterior, n, seed=0):
    return torch.stack([torch.cat([d[name].flatten() for name in posterior.names]) for d in posterior.sample(n, seed)])


def test_the_contract(parts, model):
    check_posterior(Product(parts), model, n_samples=4000)


def test_parts_are_kept_as_they_are(parts):
    product = Product(parts)
    assert product.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert product.info == INFO  # the first part's; every part keeps its own
    assert [part.info for part in product.parts] == [INFO, OTHER]
    for part in parts:
        for name in part.names:
            assert torch.equal(product.mean[name], part.mean[name])
            assert torch.equal(product.variance[name], part.variance[name])
    draw = next(iter(product.sample(1, 0)))
    torch.testing.assert_close(product.log_prob(draw), parts[0].log_prob(draw) + parts[1].log_prob(draw))
    expected = parts[0].covariance_times(draw) | parts[1].covariance_times(draw)
    assert all(torch.equal(value, expected[name]) for name, value in product.covariance_times(draw).items())


def test_draws_correlate_inside_parts_alone(parts):
    """The empirical covariance of 8,000 draws is block diagonal, with the blocks of the parts."""
    product = Product(parts)
    found = draws_of(product, 8_000).double().T.cov()
    expected = torch.zeros_like(found)
    expected[16:, 16:] = parts[1].covariance.double()
    for k, unit in enumerate(torch.eye(16)):
        column = parts[0].covariance_times({"0.weight": unit[:12].view(4, 3), "0.bias": unit[12:]})
        expected[:16, k] = torch.cat([value.flatten() for value in column.values()]).double()
    sd = expected.diagonal().sqrt()
    assert ((found - expected) / torch.outer(sd, sd)).abs().max() < 5 * (2 / 8_000) ** 0.5
    assert (expected[16:, 16:] / torch.outer(sd[16:], sd[16:]) - torch.eye(10)).abs().max() > 0.3


def test_equal_parts_get_different_noise():
    at = [DiagonalGaussian({name: torch.zeros(500)}, {name: torch.ones(500)}, INFO) for name in "ab"]
    draw = next(iter(Product(at).sample(1, 0)))
    assert abs(torch.corrcoef(torch.stack([draw["a"], draw["b"]]))[0, 1]) < 5 / 500**0.5


def test_members_of_an_ensemble_stay_whole(model, parts):
    members = [{name: p.detach() + k for name, p in model[0].named_parameters("0")} for k in range(3)]
    product = Product([Empirical(members, INFO), parts[1]])
    for draw in product.sample(6, 0):
        offsets = {round(float((draw[n] - members[0][n]).mean()), 4) for n in members[0]}
        assert len(offsets) == 1
    with pytest.raises(NotImplementedError, match="'empirical' has no log_prob"):
        product.log_prob(draw)
    with pytest.raises(NotImplementedError, match="'empirical' has no covariance_times"):
        product.covariance_times(draw)


def test_subset_drops_parts(parts):
    product = Product(parts)
    kept = product.subset(["2.bias", "0.weight"])
    assert isinstance(kept, Product)
    assert kept.names == ("0.weight", "2.bias")
    torch.testing.assert_close(kept.variance["2.bias"], product.variance["2.bias"])
    alone = product.subset(lambda name: name.startswith("2"))
    assert isinstance(alone, FullGaussian)
    torch.testing.assert_close(alone.covariance, parts[1].covariance)
    with pytest.raises(InvalidInput, match=r"no parameter named 3\.weight"):
        product.subset(["3.weight"])


def test_subset_and_merge_are_inverse(parts):
    whole = Product(parts)
    again = whole.subset(["0.weight", "0.bias"]).merge(whole.subset(["2.weight", "2.bias"]))
    assert again.names == whole.names
    assert torch.equal(draws_of(again, 3), draws_of(whole, 3))


def test_products_are_flat(parts, model):
    third = DiagonalGaussian({"x": torch.zeros(1)}, {"x": torch.ones(1)}, INFO)
    fourth = DiagonalGaussian({"y": torch.zeros(1)}, {"y": torch.ones(1)}, INFO)
    left = parts[0].merge(parts[1]).merge(third.merge(FullGaussian({"y": torch.zeros(1)}, torch.ones(1, 1), INFO)))
    assert [part.kind for part in left.parts] == [
        "kronecker_gaussian",
        "full_gaussian",
        "diagonal_gaussian",
        "full_gaussian",
    ]
    kinds = [part.kind for part in third.merge(Product([parts[0], fourth])).parts]
    assert kinds == ["diagonal_gaussian", "kronecker_gaussian", "diagonal_gaussian"]


def test_two_diagonals_with_one_story_are_one_diagonal():
    at = {name: DiagonalGaussian({name: torch.ones(2)}, {name: torch.ones(2) * 3}, INFO) for name in "abc"}
    merged = at["b"].merge(at["a"]).merge(at["c"])
    assert type(merged) is DiagonalGaussian
    assert merged.names == ("b", "a", "c")
    assert merged.info == INFO
    assert torch.equal(merged.variance["a"], torch.ones(2) * 3)
    other = DiagonalGaussian({"d": torch.ones(2)}, {"d": torch.ones(2)}, OTHER)
    assert isinstance(merged.merge(other), Product)


def test_what_cannot_be_merged(parts, model):
    with pytest.raises(InvalidInput, match=r"2\.weight, 2\.bias would be in two"):
        Product(parts).merge(parts[1])
    with pytest.raises(InvalidInput, match=r"a, b, c and 1 more would be in two"):
        many = DiagonalGaussian({n: torch.ones(1) for n in "abcd"}, {n: torch.ones(1) for n in "abcd"})
        many.merge(many)
    differing = {
        "likelihood": PosteriorInfo("regression", 9, sigma_noise=0.1),
        "n_data": PosteriorInfo(n_data=8),
    }
    for name, info in differing.items():
        with pytest.raises(InvalidInput, match=f"must share {name}; the first has"):
            parts[0].merge(DiagonalGaussian({"x": torch.ones(1)}, {"x": torch.ones(1)}, info))
    noisy = [
        DiagonalGaussian({n: torch.ones(1)}, {n: torch.ones(1)}, PosteriorInfo("regression", sigma_noise=s))
        for n, s in (("a", 0.1), ("b", 0.2))
    ]
    with pytest.raises(InvalidInput, match=r"must share sigma_noise; the first has 0\.1, the other 0\.2"):
        noisy[0].merge(noisy[1])
    with pytest.raises(InvalidInput, match=r"must share sigma_noise; the first has 0\.1, part 1 0\.2"):
        Product(noisy)
    with pytest.raises(InvalidInput, match="needs at least one part"):
        Product([])


def test_tied_names_of_one_model_are_caught():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    at = [DiagonalGaussian({n: torch.zeros(3, 3)}, {n: torch.ones(3, 3)}) for n in ("0.weight", "1.weight")]
    with pytest.raises(PosteriorMismatch, match=r"0\.weight and 1\.weight are one tied parameter"):
        at[0].merge(at[1]).check_model(model)
    with pytest.raises(PosteriorMismatch, match="one tied parameter"):
        Product([FullGaussian({"0.weight": torch.zeros(3, 3)}, torch.eye(9)), at[1]]).check_model(model)


def test_files_inside_files(parts, model, tmp_path):
    """A product inside a mixture inside a product: structure, infos and draws come back."""
    body = Mixture([Product([q]) for q in (parts[0], parts[0].temper(0.1))], [2, 1], INFO)
    head = DropoutPosterior({"2.weight": model[2].weight}, {"2.weight": 0.3}, info=OTHER)
    product = Product([body, head], OTHER)
    product.save(tmp_path / "p.safetensors", model)
    loaded = Posterior.load(tmp_path / "p.safetensors", model)
    assert loaded.info == OTHER
    assert [part.kind for part in loaded.parts] == ["mixture", "dropout"]
    assert [part.info for part in loaded.parts] == [INFO, OTHER]
    assert torch.equal(draws_of(loaded, 5), draws_of(product, 5))
    tensors, manifest = store.read(tmp_path / "p.safetensors")
    manifest["structure"]["parts"][1]["kind"] = "of tomorrow"
    store.write(tmp_path / "q.safetensors", tensors, manifest)
    with pytest.raises(InvalidPosteriorFile, match="part 1 of the posterior is of kind 'of tomorrow'"):
        Posterior.load(tmp_path / "q.safetensors", model)
    store.write(tmp_path / "r.safetensors", tensors, {k: v for k, v in manifest.items() if k != "structure"})
    with pytest.raises(InvalidPosteriorFile, match="without its list of parts"):
        Posterior.load(tmp_path / "r.safetensors", model)


def test_a_prediction_spreads_by_both_parts(parts, model):
    """With the hidden layer fixed the logits are linear: variance of the product is exact for its last part."""
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    both, last = (MonteCarlo(model, q, n_samples=2000)(inputs).logit_variance for q in (Product(parts), parts[1]))
    assert (both > last).all()
    hidden = torch.cat([torch.tanh(model[0](inputs)), torch.ones(4, 1)], 1)
    blocks = parts[1].covariance.new_zeros(2, 5, 10)
    for k in range(2):
        blocks[k, :4, 4 * k : 4 * k + 4], blocks[k, 4, 8 + k] = torch.eye(4), 1
    exact = torch.einsum("nf,kfp,pq,kgq,ng->nk", hidden, blocks, parts[1].covariance, blocks, hidden)
    assert ((last / exact).log().abs() < 5 * (2 / 2000) ** 0.5).all()
