"""What a rule does not honour, it refuses by name."""

import pytest
import torch
from cases import gaussian, plain
from torch import Tensor, nn
from torch.nn import functional as F

from bayespass.approximation import CVP, STREAMLINED
from bayespass.errors import UnsupportedOp
from bayespass.moments import Moments
from bayespass.testing.rule_checks import through_dispatch

REFUSED = {
    "three random factors": (torch.einsum, ("i,i,i->", gaussian(3), gaussian(3), gaussian(3)), {}, "two steps"),
    "sum of outer products": (torch.einsum, ("i,j->", gaussian(3), gaussian(3)), {}, "two steps"),
    "bilinear of two random inputs": (torch.bilinear, (gaussian(2, 3), gaussian(2, 3), plain(2, 3, 3)), {}, "two random"),
    "random condition": (torch.where, (gaussian(3), gaussian(3), 0.0), {}, "condition"),
    "length by another norm": (torch.linalg.vector_norm, (gaussian(3), 1), {}, "Euclidean"),
    "grid with weights": (F.grid_sample, (gaussian(1, 1, 3, 3), plain(1, 2, 2, 2)), {"align_corners": False}, "nearest"),
    "indices by scatter reduction": (torch.scatter, (gaussian(3), 0, torch.tensor([0]), gaussian(1)), {"reduce": "add"}, "reduction"),
    "static keys": (F.multi_head_attention_forward, (gaussian(2, 1, 4),) * 3 + (4, 2, None, None, None, None, False, 0.1, plain(4, 4), None), {}, "dropout"),
    "rounding mode": (torch.div, (gaussian(3), 2.0), {"rounding_mode": "floor"}, "rounding_mode"),
    "random exponent": (torch.pow, (plain(3), gaussian(3)), {}, "number as exponent"),
    "dropout in training": (F.dropout, (gaussian(3), 0.5, True), {}, r"model\.eval"),
    "batch norm in training": (F.batch_norm, (gaussian(3, 2), plain(2), plain(2), None, None, True), {}, r"model\.eval"),
    "batch norm without statistics": (F.batch_norm, (gaussian(3, 2), None, None), {}, "track_running_stats"),
    "attention dropout": (F.scaled_dot_product_attention, (plain(2, 3), plain(2, 3), gaussian(2, 3), None, 0.1), {}, "dropout"),
    "indices of maxima": (torch.max_pool2d, (gaussian(1, 2, 4, 4), 2), {"return_indices": True}, "indices"),
    "counted padding with ceil": (F.avg_pool2d, (gaussian(1, 2, 5, 5), 2, 2, 1, True), {}, "ceil_mode"),
    "max norm": (F.embedding, (torch.tensor([1]), gaussian(3, 2)), {"max_norm": 1.0}, "max_norm"),
    "random index": (Tensor.__getitem__, (plain(3), gaussian(3)), {}, "index"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    operation, args, kwargs, match = REFUSED[name]
    with pytest.raises((UnsupportedOp, TypeError), match=match):
        through_dispatch(operation, args, kwargs, CVP)


def test_linear_max_pool_picks_the_entry_with_the_largest_mean():
    x = Moments(torch.tensor([[[1.0, 5.0], [2.0, 3.0]]]), torch.tensor([[[1.0, 7.0], [2.0, 3.0]]]))
    result = through_dispatch(torch.max_pool2d, (x, 2), {}, STREAMLINED)
    assert (result.mean.item(), result.var.item()) == (5.0, 7.0)


def test_modules_reach_the_rules():
    """nn.MaxPool2d and friends arrive under the names that rules are registered for."""
    from bayespass.gaussian import GaussianTensor

    image = GaussianTensor(gaussian(2, 4, 6, 6), CVP)
    for module in (nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d((2, None)), nn.Dropout2d().eval(),
                   nn.ReLU(), nn.LeakyReLU(), nn.GELU(), nn.SiLU(), nn.Tanh(), nn.Sigmoid(), nn.Flatten(), nn.Identity(),
                   nn.LayerNorm([4, 6, 6]).double(), nn.BatchNorm2d(4).double().eval(), nn.Conv2d(4, 2, 3).double(), nn.Softmax(dim=1)):  # fmt: skip
        assert isinstance(module(image), GaussianTensor), module
    line = GaussianTensor(gaussian(2, 4, 6), CVP)
    for module in (
        nn.MaxPool1d(2),
        nn.AvgPool1d(2),
        nn.AdaptiveAvgPool1d(1),
        nn.Conv1d(4, 2, 3).double(),
        nn.Linear(6, 2).double(),
    ):
        assert isinstance(module(line), GaussianTensor), module
