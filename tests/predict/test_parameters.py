"""Parameters that are tied, frozen, absent from the posterior, of low precision, or quantised."""

import pytest
import torch
from torch import nn

from bayespass import DiagonalGaussian, MonteCarlo, SinglePass


def around(model, variance=1e-3, keep=lambda name, p: True):
    mean = {name: p.detach() for name, p in model.named_parameters() if keep(name, p)}
    return DiagonalGaussian(mean, {name: torch.full_like(p, variance) for name, p in mean.items()})


class Tied(nn.Module):
    """An embedding whose table is also the output layer, as language models have."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)))


def test_a_tied_weight_is_random_at_both_ends():
    model, ids = Tied().eval(), torch.randint(0, 11, (4, 3))
    posterior = around(model)
    assert posterior.names == ("embed.weight",)
    for approximation in ("cvp", "shared"):
        _, variance = SinglePass(model, posterior, approximation).moments(ids)
        truth = torch.stack(list(MonteCarlo(model, posterior, 2000).outputs(ids))).var(0)
        assert 0.8 < float((variance / truth).median()) < 1.25


def test_frozen_and_absent_parameters_are_deterministic():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    model[0].requires_grad_(False)
    trainable = around(model, keep=lambda name, p: p.requires_grad)
    subset = around(model).subset(lambda name: name.startswith("2."))
    x = torch.randn(5, 4)
    for posterior in (trainable, subset):
        _, variance = SinglePass(model, posterior).moments(x)
        hidden = torch.relu(model[0](x)).detach()
        torch.testing.assert_close(variance, 1e-3 * (hidden.square().sum(-1, keepdim=True) + 1).expand_as(variance))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("approximation", ["streamlined", "cvp", "shared"])
def test_half_precision_is_close_to_single(dtype, approximation):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ).eval()
    x = torch.randn(2, 2, 8, 8)
    mean, variance = SinglePass(model, around(model), approximation).moments(x)
    half = model.to(dtype)
    low_mean, low_variance = SinglePass(half, around(half), approximation).moments(x.to(dtype))
    assert low_mean.dtype == dtype
    assert low_variance.dtype == (torch.float32 if dtype == torch.float16 else dtype)  # small ones need its range
    torch.testing.assert_close(low_mean.float(), mean, rtol=0.1, atol=0.05)
    torch.testing.assert_close(low_variance.float(), variance, rtol=0.1, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_quantised_layers_are_known_weights():
    from torch.ao.quantization import quantize_dynamic

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    quantised = quantize_dynamic(model, {"2"}, dtype=torch.qint8).eval()
    posterior, x = around(quantised), torch.randn(5, 4)
    assert posterior.names == ("0.weight", "0.bias", "4.weight", "4.bias")
    mean, variance = SinglePass(quantised, posterior).moments(x)
    plain_mean, plain_variance = SinglePass(model, posterior).moments(x)
    torch.testing.assert_close(mean, plain_mean, rtol=0, atol=0.02)
    torch.testing.assert_close(variance, plain_variance, rtol=0.05, atol=0)
