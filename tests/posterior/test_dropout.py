import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bayespass import InvalidInput, MonteCarlo, PosteriorInfo, propagate
from bayespass.posterior.dropout import DropoutPosterior, dropout_posterior
from bayespass.testing import check_posterior


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 5), nn.Dropout(0.5), nn.ReLU(), nn.Linear(5, 2)
    ).eval()


@pytest.fixture
def posterior(model):
    return dropout_posterior(model, torch.zeros(2, 3), PosteriorInfo(n_data=4, method="dropout"))


def test_the_contract(posterior, model):
    check_posterior(posterior, model)


def test_variance_against_many_masks():
    """theta^2 p / (1 - p) and the mean theta, from 1e5 masks."""
    p, n = 0.1, 100_000
    theta = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
    posterior = DropoutPosterior({"w": theta}, {"w": p})
    draws = torch.stack([draw["w"] for draw in posterior.sample(n, 0)])
    expected = theta**2 * p / (1 - p)
    torch.testing.assert_close(posterior.variance["w"], expected)
    kurtosis = 1 / (p * (1 - p)) - 3
    assert ((draws.mean(0) - theta).abs() <= 4 * (expected / n).sqrt()).all()
    assert ((draws.var(0) - expected).abs() <= 4 * expected * ((kurtosis - 1) / n) ** 0.5 + 1e-12).all()
    columns = draws / theta.where(theta != 0, 1)
    assert torch.equal(columns[:, 0, 0], columns[:, 1, 0])  # one mask for the whole column
    assert not torch.equal(columns[:, 0, 0], columns[:, 0, 1])


def test_sites_and_rates_are_found(posterior, model):
    assert posterior.rates == {"3.weight": 0.2, "6.weight": 0.5}
    assert torch.equal(posterior.mean["3.weight"], model[3].weight)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model)


def test_a_draw_is_the_network_with_that_mask(posterior, model):
    """Dropping units by hand and drawing weights give the same output distribution, row by row."""
    inputs = torch.randn(1, 3)
    prediction = MonteCarlo(model, posterior, n_samples=4000)(inputs)
    torch.manual_seed(1)
    model.train()
    with torch.no_grad():
        outputs = model(inputs.expand(4000, 3))
    error = (outputs.var(0) / prediction.logit_variance[0]).log().abs()
    assert error.max() < 0.2
    se = (outputs.var(0) / 2000).sqrt()
    assert ((outputs.mean(0) - prediction.logit_mean[0]).abs() < 5 * se).all()
    model.eval()
    assert propagate(model, posterior, inputs).logit_variance.min() > 0


def test_layers_behind_one_dropout_share_its_mask():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.left, self.right = nn.Dropout(0.5), nn.Linear(8, 2, bias=False), nn.Linear(8, 2, bias=False)
            self.both = nn.Linear(4, 2, bias=False)

        def forward(self, x):
            x = self.drop(x)
            return self.both(self.drop(torch.cat([self.left(x), self.right(x)], -1)))

    model = Branches().eval()
    posterior = dropout_posterior(model, torch.zeros(1, 8))
    assert posterior.names == ("left.weight", "right.weight", "both.weight")
    draw = next(posterior.sample(1, 0))
    kept = [(draw[name] != 0).any(0) for name in posterior.names]
    assert torch.equal(kept[0], kept[1])
    assert posterior.sites["both.weight"] != posterior.sites["left.weight"]  # the second call draws a mask of its own
    assert {posterior.rates[name] for name in posterior.names} == {0.5}
    check_posterior(posterior, model)


def test_moves_of_axes_keep_the_mask():
    model = nn.Sequential(nn.Dropout(0.3), nn.Flatten(), nn.Linear(8, 2)).eval()
    assert dropout_posterior(model, torch.zeros(1, 2, 4)).rates == {"2.weight": 0.3}


class Residual(nn.Module):
    def __init__(self, kind=nn.Dropout):
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(4, 4), kind(0.1), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(x + self.drop(self.first(x)))


class Functional(Residual):
    def forward(self, x):
        return self.last(F.dropout(self.first(x), 0.1, self.training))


class InPart(Residual):
    def forward(self, x):
        return self.last(self.drop(torch.cat([x, x], -1))[..., :4])


class Twice(Residual):
    def forward(self, x):
        return self.last(x) + self.last(self.drop(self.first(x)))


class InPlace(Residual):
    def forward(self, x):
        y = self.drop(self.first(x))
        y += x
        return self.last(y)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (Residual(), r"dropout drop goes into (__radd__|add|__add__).*ignore=\['drop'\]"),
        (Residual(nn.AlphaDropout), "drop is a AlphaDropout"),
        (Functional(), r"calls F\.dropout outside a module"),
        (InPart(), "a linear layer only in part"),
        (Twice(), "last.weight is also used without the mask of dropout drop"),
        (InPlace(), "after a change in place"),
        (nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)), "dropout 1 feeds no linear layer"),
        (nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0)), r"no nn\.Dropout with p > 0"),
        (nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.Tanh(), nn.Linear(4, 4)), "dropout 1 goes into tanh"),
        (nn.Sequential(nn.Dropout(0.1), nn.MultiheadAttention(4, 1)), "goes into multi_head_attention_forward"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_what_no_weight_stands_for_is_refused(model, match):
    if isinstance(model, nn.Sequential) and isinstance(model[-1], nn.MultiheadAttention):

        class Attending(nn.Sequential):
            def forward(self, x):
                x = self[0](x)
                return self[1](x, x, x)[0]

        model = Attending(*model)
    with pytest.raises(InvalidInput, match=match):
        dropout_posterior(model.eval(), torch.zeros(1, 4))


def test_what_is_ignored_stays_off():
    model = nn.Sequential(nn.Dropout(0.1), nn.Linear(4, 4), Residual(), nn.Dropout(0.2)).eval()
    with pytest.raises(InvalidInput, match=r"ignore=\['2\.drop', '3'\]"):
        dropout_posterior(model, torch.zeros(1, 4))
    assert dropout_posterior(model, torch.zeros(1, 4), ignore=["2.drop", "3"]).names == ("1.weight",)
    with pytest.raises(InvalidInput, match=r"ignore names nope.*there are 0, 2\.drop, 3"):
        dropout_posterior(model, torch.zeros(1, 4), ignore=["nope"])


def test_a_model_in_training_mode_is_refused(model):
    with pytest.raises(InvalidInput, match="training mode"):
        dropout_posterior(model.train(), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (({}, {}), "at least one"),
        (({"w": torch.ones(2, 2)}, {"v": 0.1}), "same parameter names"),
        (({"w": torch.ones(2)}, {"w": 0.1}), r"w must be a finite matrix.*\(2,\)"),
        (({"w": torch.ones(2, 2)}, {"w": 1.0}), "rate of w must lie between 0 and 1"),
        (
            ({"w": torch.ones(2, 2), "v": torch.ones(2, 3)}, {"w": 0.1, "v": 0.1}, {"w": "a", "v": "a"}),
            r"v has \(rate, columns\) \(0\.1, 3\), but site 'a' has \(0\.1, 2\)",
        ),
    ],
)
def test_bad_input_is_named(arguments, match):
    with pytest.raises(InvalidInput, match=match):
        DropoutPosterior(*arguments)
