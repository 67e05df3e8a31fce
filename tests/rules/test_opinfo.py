"""PyTorch's own operator database through the rules, at zero variance.

Every sample of every operation we have a rule for must give the operation's own result, or be
refused. This is what finds arguments that a rule silently ignores.
"""

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db

from bayespass.approximation import CVP
from bayespass.errors import UnsupportedOp
from bayespass.moments import Moments, as_moments
from bayespass.rules.registry import operation_name, rules
from bayespass.testing.rule_checks import through_dispatch

# Samples whose result is not a function of the entries (uninitialised, or random in training mode).
SKIPPED = {
    "nn.functional.dropout2d", "nn.functional.dropout3d", "empty_like", "new_empty", "rand_like", "randn_like",
    "nn.functional.rrelu",
}  # fmt: skip
REFUSED = {
    "dropout",
    "alpha_dropout",
    "feature_alpha_dropout",
    "__rdiv__",
    "norm",
    "pow",
}  # no sample at an honoured setting
COVERED = [info for info in op_db if info.op in rules() and info.name not in SKIPPED]


def test_the_database_covers_most_families():
    assert len(COVERED) >= 150


@pytest.mark.parametrize("info", COVERED, ids=lambda info: info.formatted_name)
@pytest.mark.filterwarnings("ignore")
def test_zero_variance_gives_the_operation_or_a_refusal(info):
    honoured = 0
    for sample in info.sample_inputs("cpu", torch.float32):
        if not isinstance(sample.input, torch.Tensor | list | tuple):
            continue
        given = sample.input if isinstance(sample.input, torch.Tensor) else list(sample.input)
        try:
            expected = info.op(given, *sample.args, **sample.kwargs)
            mine = through_dispatch(info.op, (lift(given), *sample.args), sample.kwargs, CVP)
        except UnsupportedOp:
            continue
        compare(mine, expected, f"{operation_name(info.op)} {sample.args} {sample.kwargs}")
        honoured += 1
    if info.name.removeprefix("nn.functional.") not in REFUSED and "rounding" not in info.variant_test_name:
        assert honoured > 0, "every sample was refused"


def lift(value):
    if isinstance(value, list):
        return [lift(part) for part in value]
    return Moments(value.detach(), torch.zeros_like(value.detach()))


def compare(mine, expected, where):
    if isinstance(expected, torch.Tensor):
        mine = as_moments(mine)
        torch.testing.assert_close(mine.mean, expected.detach(), equal_nan=True, msg=lambda m: f"{where}: {m}")
        assert mine.var is None or float(mine.var.nan_to_num().abs().sum()) == pytest.approx(0, abs=1e-8)
        return
    assert len(mine) == len(expected)
    for a, b in zip(mine, expected, strict=True):
        compare(a, b, where)
