"""First and last are what runs first and last, whatever the order of registration."""

import pytest
import torch
from torch import nn

from bayespass import IVON, InvalidInput
from bayespass.demo.models import SmallCNN, SmallViT
from bayespass.posterior.selection import first_layer, frozen_except, last_layer, select_parameters

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(0))


def names_of(*modules):
    return tuple(f"{module}.{kind}" for module in modules for kind in ("weight", "bias"))


class Backwards(nn.Module):
    """Registered last to first, with a parameter that never runs."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(3))
        self.head = nn.Linear(6, 4)
        self.norm = nn.BatchNorm1d(6)
        self.middle = nn.Linear(6, 6)
        self.stem = nn.Linear(8, 6)

    def forward(self, x):
        return self.head(self.middle(torch.relu(self.norm(self.stem(x)))))


def test_execution_decides_and_registration_does_not():
    model = Backwards()
    assert first_layer(model, X) == names_of("stem")
    assert last_layer(model, X) == names_of("head")


@pytest.mark.parametrize(
    ("model", "first", "last"),
    [(SmallCNN(), names_of("features.0"), names_of("head.2")), (SmallViT(), names_of("patches"), names_of("head"))],
    ids=["cnn", "vit"],
)
def test_the_networks_of_the_demo(model, first, last):
    assert first_layer(model, IMAGES) == first
    assert last_layer(model, IMAGES) == last


def test_a_class_token_that_only_meets_itself_is_no_layer():
    class TokenFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 1, 4))
            self.positions = nn.Embedding(10, 4)
            self.project = nn.Linear(8, 4)

        def forward(self, x):
            token = self.token.expand(len(x), -1, -1) * 2
            where = self.positions(torch.arange(2))
            x = self.project(x.type_as(self.token))[:, None]  # what lends its type alone is no layer either
            return torch.cat([token, x], 1) + where

    assert first_layer(TokenFirst(), X) == names_of("project")
    assert last_layer(TokenFirst(), X) == ("positions.weight",)


def test_layers_of_torch_that_run_in_one_call():
    attention = nn.MultiheadAttention(8, 2)
    sequence = torch.randn(5, 3, 8)
    assert first_layer(attention, (sequence, sequence, sequence)) == ("in_proj_weight", "in_proj_bias")
    assert last_layer(attention, (sequence, sequence, sequence)) == names_of("out_proj")
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert first_layer(encoder, sequence) == ("self_attn.in_proj_weight", "self_attn.in_proj_bias")
    assert last_layer(encoder, sequence) == names_of("norm2")
    recurrent = nn.Sequential(nn.LSTM(8, 4))
    assert set(first_layer(recurrent, sequence)) == {
        f"0.{n}" for n in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    }
    assert first_layer(nn.Linear(8, 2), X) == ("weight", "bias")


def test_a_weight_is_followed_through_what_is_made_of_it():
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.second = nn.Linear(4, 2)
            self.weight = nn.Parameter(torch.randn(4, 8))

        def forward(self, x):
            weight = (1 + self.weight).double().t()
            buffer = torch.zeros(len(x), 8, dtype=torch.float64)
            buffer[:, :] = x
            return self.second((buffer @ weight).float())

    assert first_layer(Cast(), X) == ("weight",)
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 4)), nn.Linear(4, 2))
    own = {"0.bias", "0.parametrizations.weight.original0", "0.parametrizations.weight.original1"}
    assert set(first_layer(normed, X)) == own
    assert last_layer(normed, X) == names_of("1")


def test_a_tied_weight_comes_once_under_its_first_name():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = nn.Linear(8, 50)
            self.embedding = nn.Embedding(50, 8)
            self.embedding.weight = self.decoder.weight
            self.mix = nn.Linear(8, 8)

        def forward(self, ids):
            return self.decoder(self.mix(self.embedding(ids)))

    model = Tied()
    assert first_layer(model, IDS) == ("decoder.weight",)  # without the bias, which only the decoder has
    assert last_layer(model, IDS) == names_of("decoder")
    assert [name for name, _ in select_parameters(model, ["embedding.weight"])] == ["decoder.weight"]


def test_frozen_layers_are_passed_over_unless_asked_for():
    model = Backwards()
    model.stem.requires_grad_(False)
    assert first_layer(model, X) == names_of("norm")
    assert first_layer(model, X, trainable_only=False) == names_of("stem")
    model.norm.bias.requires_grad_(False)
    assert first_layer(model, X) == ("norm.weight",)


def test_tracing_leaves_the_model_as_it_was():
    model = Backwards().train()
    model.middle.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first_layer(model, X)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == [True, True, True, False, True]
    with pytest.raises(RuntimeError, match="shape"):
        first_layer(model, torch.zeros(2, 9))
    assert model.training
    assert not model.middle.training


def test_inputs_of_every_form():
    class Keywords(Backwards):
        def forward(self, left, right=None):
            return super().forward(left + right)

    for inputs in ((X, X), [X, X], {"left": X, "right": X}):
        assert first_layer(Keywords(), inputs) == names_of("stem")
    with pytest.raises(InvalidInput, match="inputs must be"):
        first_layer(Keywords(), "text")


def test_models_that_show_no_parameter_say_so():
    for model in (nn.ReLU(), nn.Linear(8, 2).requires_grad_(False)):
        with pytest.raises(InvalidInput, match="uses no trainable floating-point parameter"):
            first_layer(model, X)


def test_selections_go_straight_to_a_method():
    model = Backwards()
    every = [name for name, _ in model.named_parameters()]
    assert [name for name, _ in select_parameters(model)] == every
    assert [name for name, _ in select_parameters(model, "first", X)] == list(names_of("stem"))
    assert [name for name, _ in select_parameters(model, "last", X)] == list(names_of("head"))
    assert [name for name, _ in select_parameters(model, ["stem.bias", "head.weight"])] == ["head.weight", "stem.bias"]
    assert [name for name, _ in select_parameters(model, "stem.bias")] == ["stem.bias"]
    assert [name for name, _ in select_parameters(model, lambda name: "norm" in name)] == list(names_of("norm"))
    assert IVON(select_parameters(model, "first", X), lr=0.1, n_data=3).posterior().names == names_of("stem")
    model.norm.requires_grad_(False)
    assert not [name for name, _ in select_parameters(model) if "norm" in name]


@pytest.mark.parametrize(
    ("names", "match"),
    [("first", "pass one batch"), ("last", "pass one batch"), (["tail.weight"], "no parameter named tail.weight"),
     (["norm.weight"], "norm.weight is frozen"), ([], "leaves no random parameter"), (lambda name: False, "leaves no random parameter")],
)  # fmt: skip
def test_selections_that_cannot_be_made(names, match):
    model = Backwards()
    model.norm.requires_grad_(False)
    with pytest.raises(InvalidInput, match=match):
        select_parameters(model, names)


def test_frozen_except_restores_everything_on_every_way_out():
    model = Backwards().train()
    model.norm.eval()
    model.head.bias.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    with frozen_except(model, ["stem.weight"]):
        assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == ["stem.weight"]
        assert not any(module.training for module in model.modules())
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert modes == [module.training for module in model.modules()]
    with pytest.raises(ZeroDivisionError), frozen_except(model, ["stem.weight"]):
        _ = 1 / 0
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert modes == [module.training for module in model.modules()]
    with pytest.raises(InvalidInput, match="no parameter named"), frozen_except(model, ["tail"]):
        pass
    assert flags == [parameter.requires_grad for parameter in model.parameters()]


def test_models_of_transformers():
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "num_labels": 3,
    }
    vit = transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1)
    )
    assert first_layer(vit, IMAGES) == names_of("vit.embeddings.patch_embeddings.projection")
    assert last_layer(vit, {"pixel_values": IMAGES}) == names_of("classifier")
    config = transformers.BertConfig(**sizes, vocab_size=50, max_position_embeddings=16)
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "token_type_ids": torch.zeros_like(IDS)}
    for bert in (transformers.BertForSequenceClassification(config), transformers.BertForMaskedLM(config)):
        assert first_layer(bert, batch) == ("bert.embeddings.word_embeddings.weight",)
    assert last_layer(bert, batch) == ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias")  # tied
