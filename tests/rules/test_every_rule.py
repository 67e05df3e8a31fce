"""Every registered rule against Monte Carlo, its deterministic limit and its gradients."""

import dataclasses

import pytest
import torch
from cases import CASES, MOVED, plain
from torch import Tensor
from torch.nn import functional as F

from bayespass.approximation import CVP, STREAMLINED, Approximation
from bayespass.moments import Moments, as_moments
from bayespass.rules.moving import MOVES
from bayespass.rules.placing import COMPARISONS, CREATIONS, PREDICATES
from bayespass.rules.registry import operation_name, rules
from bayespass.testing import check_rule, check_rule_gradient
from bayespass.testing.rule_checks import through_dispatch

DELTA = Approximation("delta", norm="delta")
RANDOM = Approximation("random", scores="random")
NARROWING = {Tensor.float, Tensor.half, Tensor.bfloat16}  # Monte Carlo in float64 sees their rounding
# What check_rule cannot draw: results that hold indices, random slopes, packed rows (test_surface.py).
TESTED_ALONE = {
    torch.max, Tensor.max, torch.topk, Tensor.topk, getattr(torch, "_grouped_mm", None), F.rrelu, torch.rrelu, torch._pack_padded_sequence, torch._pad_packed_sequence,
}  # fmt: skip
ALL_CASES = [(op, i) for op, cases in CASES.items() for i in range(len(cases))]


def move_case(operations):
    op = operations[0]
    name = op.__self__.__name__ if op.__name__ == "__get__" else op.__name__
    return MOVED["im2col" if op is F.unfold else name]


def case_id(value):
    return operation_name(value) if callable(value) else str(value)


def under_approximations(cases):
    """Each case under every approximation that its rule tells apart."""
    differs = {
        None: [CVP],
        "activation": [STREAMLINED, CVP],
        "norm": [STREAMLINED, CVP, DELTA],
        "scores": [CVP, RANDOM],
    }
    return [
        pytest.param(op, i, approximation, id=f"{operation_name(op)}-{i}-{approximation.name}")
        for op, i in cases
        for approximation in differs[rules()[op].depends_on]
    ]


def test_every_rule_is_checked():
    checked = {id(rules()[op]) for op in CASES} | {id(rules()[ops[0]]) for ops in MOVES}
    elsewhere = {*CREATIONS, *sum(PREDICATES + COMPARISONS, ()), *TESTED_ALONE}
    missing = {operation_name(op) for op, entry in rules().items() if id(entry) not in checked and op not in elsewhere}
    assert missing == set()


@pytest.mark.parametrize(("operation", "index", "approximation"), under_approximations(ALL_CASES))
def test_moments_match_monte_carlo(operation, index, approximation):
    args, kwargs = CASES[operation][index]
    check_rule(operation, *args, approximation=approximation, **kwargs)


NO_BATCHING_RULE = {Tensor.moveaxis, Tensor.cuda}  # vmap lacks one; test_aliases covers torch.moveaxis


@pytest.mark.parametrize(
    "operations", [m for m in MOVES if m[0] not in NARROWING | NO_BATCHING_RULE], ids=lambda m: case_id(m[0])
)
def test_moves_match_monte_carlo(operations):
    args, kwargs = move_case(operations)
    check_rule(operations[0], *args, n_samples=5000, **kwargs)


@pytest.mark.parametrize("operation", sorted(NARROWING, key=operation_name), ids=case_id)
def test_casts_change_both_fields(operation):
    x = MOVED["float"][0][0]
    result = through_dispatch(operation, (x,), {}, CVP)
    assert result.mean.dtype == result.var.dtype == operation(x.mean).dtype
    torch.testing.assert_close(result.var.double(), x.var, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("operation", "index", "approximation"), under_approximations([c for c in ALL_CASES if c[0] is not F.dropout])
)
def test_rules_are_differentiable(operation, index, approximation):
    args, kwargs = CASES[operation][index]
    if approximation is RANDOM and operation is F.multi_head_attention_forward:
        pytest.skip("the case has a variance of exactly zero, an edge; test_attention.py checks inside")
    check_rule_gradient(operation, *args, approximation=approximation, **kwargs)


def aliases():
    for op, cases in CASES.items():
        for alias in rules()[op].operations:
            if alias is not op:
                yield pytest.param(op, alias, cases, id=operation_name(alias))
    for operations in MOVES:
        for alias in operations[1:]:
            yield pytest.param(operations[0], alias, [move_case(operations)], id=operation_name(alias))


@pytest.mark.parametrize(("operation", "alias", "cases"), list(aliases()))
def test_aliases_give_the_same(operation, alias, cases):
    reflected = alias.__name__ in ("__radd__", "__rmul__")
    for args, kwargs in cases:
        method = alias.__name__.startswith("__") or getattr(alias, "__objclass__", None) is not None
        if method and (kwargs or not isinstance(args[0], Moments | Tensor) or len(args) > 2):
            continue  # operators take no keywords
        args = tuple(reversed(args)) if reflected else args
        if method and not isinstance(args[0], Moments | Tensor):
            continue
        mine = through_dispatch(alias, args, kwargs, CVP)
        expected = through_dispatch(operation, args, kwargs, CVP)
        for a, b in zip(flat(mine), flat(expected), strict=True):
            torch.testing.assert_close(a.mean, b.mean)
            torch.testing.assert_close(a.var, b.var)


def flat(result):
    return [as_moments(r) for r in (result if isinstance(result, tuple | list) else [result])]


@pytest.mark.parametrize(
    "entry",
    sorted({id(e): e for e in rules().values()}.values(), key=lambda e: e.call.__name__),
    ids=lambda e: e.call.__name__,
)
def test_declared_bounds_are_in_the_docstring(entry):
    accuracies = entry.accuracy.values() if not hasattr(entry.accuracy, "exact") else [entry.accuracy]
    for accuracy in accuracies:
        if not accuracy.exact:
            for bound in dataclasses.astuple(accuracy):
                assert f"{bound:g}" in (entry.call.__doc__ or "") or f"{bound:.1f}" in entry.call.__doc__


def test_zero_samples_of_a_wrong_rule_fail():
    """The check itself can fail: an exact claim that is off by 10 % is caught."""
    from bayespass.rules.registry import _RULES, rule

    def ten_percent_off(input):
        return Moments(input.mean.sin(), 1.1 * input.var)

    previous = dict(_RULES)
    try:
        rule(torch.sin)(ten_percent_off)
        with pytest.raises(AssertionError, match=r"torch\.sin"):
            check_rule(torch.sin, Moments(plain(3), plain(3).square() + 0.5))
    finally:
        _RULES.clear()
        _RULES.update(previous)
