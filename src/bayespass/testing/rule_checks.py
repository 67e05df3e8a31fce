"""The contract of a rule, checked: deterministic limit, Monte Carlo, gradients, dtype and shape.

    check_rule(torch.cumsum, Moments(mean, var), 0)

Bayespass runs this on every rule it has; run it on yours.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

import bayespass.rules  # noqa: F401  registers every rule
from bayespass.approximation import CVP, Approximation
from bayespass.gaussian import GaussianTensor, unwrap
from bayespass.moments import Moments, as_moments
from bayespass.rules.registry import operation_name, rules

Z_LIMIT = 5.5  # two-sided probability 4e-8 per entry
UNBATCHED_SAMPLES = 8000  # draws of an operation that runs one draw at a time
RARE = 0.01  # entries of rare events have no usable standard error; exact rules must still be this close


@dataclass(frozen=True)
class RuleErrors:
    """Measured errors of one rule on one case.

    Args:
        mean: largest |rule - Monte Carlo| of the mean, in units of the largest output sd.
        variance: the same of the variance, in units of the largest output variance.
        z_mean: the largest error of the mean in Monte-Carlo standard errors.
        z_variance: the same of the variance.
        rare: largest error of either, in output units, where the sampled kurtosis is so large (an
            event that few draws see) that standard errors mean nothing; such entries have no z.
    """

    mean: float
    variance: float
    z_mean: float
    z_variance: float
    rare: float


def through_dispatch(operation: Callable[..., Any], args: Any, kwargs: Any, approximation: Approximation) -> Any:
    """The operation on `GaussianTensor`s made of the `Moments` among the arguments, unwrapped again."""

    def lift(leaf: Any) -> Any:
        return GaussianTensor(leaf, approximation) if isinstance(leaf, Moments) else leaf

    result = operation(*_map(lift, args), **_map(lift, kwargs))
    return _map(lambda leaf: unwrap(leaf, []) if isinstance(leaf, Tensor) else leaf, result)


def check_rule(
    operation: Callable[..., Any],
    *args: Any,
    approximation: Approximation = CVP,
    n_samples: int = 40_000,
    seed: int = 0,
    **kwargs: Any,
) -> RuleErrors:
    """Check one rule on one case and return its measured errors.

    Args:
        operation: the function the rule is registered for.
        *args: its arguments, with float64 `Moments` where the rule meets Gaussian tensors.
        approximation: the approximation to check under.
        n_samples: Monte-Carlo draws.
        seed: of the draws.
        **kwargs: its keyword arguments, likewise.

    Raises:
        AssertionError: the rule breaks its contract; the message says how.
    """
    name = operation_name(operation)
    accuracy = rules()[operation].accuracy_under(approximation)
    mine = [as_moments(leaf) for leaf in _leaves(through_dispatch(operation, args, kwargs, approximation))]
    _check_deterministic_limit(name, operation, args, kwargs, approximation)
    draws = _monte_carlo(operation, args, kwargs, n_samples, seed)
    assert len(mine) == len(draws), f"{name}: {len(mine)} results where the operation returns {len(draws)}"
    errors = RuleErrors(0.0, 0.0, 0.0, 0.0, 0.0)
    for result, sample in zip(mine, draws, strict=True):
        expected_shape, dtype = sample.shape[1:], sample.dtype
        assert result.mean.shape == expected_shape, f"{name}: mean has shape {tuple(result.mean.shape)}"
        assert result.mean.dtype == dtype, f"{name}: mean has dtype {result.mean.dtype}, the operation {dtype}"
        variance = torch.zeros_like(result.mean) if result.var is None else result.var
        assert variance.shape == expected_shape, f"{name}: variance has shape {tuple(variance.shape)}"
        assert bool((variance >= 0).all()), f"{name}: negative variance {float(variance.min())}"
        errors = _worst(errors, _errors(result.mean, variance, sample))
    if accuracy.exact:
        assert errors.z_mean < Z_LIMIT, (
            f"{name}: declared exact, but the mean is {errors.z_mean:.1f} standard errors off"
        )
        assert errors.z_variance < Z_LIMIT, (
            f"{name}: declared exact, but the variance is {errors.z_variance:.1f} se off"
        )
        assert errors.rare <= RARE, (
            f"{name}: declared exact, but {errors.rare:.3f} of the output spread off in the tails"
        )
    else:
        assert errors.mean <= accuracy.mean, f"{name}: mean error {errors.mean:.3f} above its bound {accuracy.mean}"
        assert errors.variance <= accuracy.variance, (
            f"{name}: variance error {errors.variance:.3f} above its bound {accuracy.variance}"
        )
    return errors


def check_rule_gradient(
    operation: Callable[..., Any], *args: Any, approximation: Approximation = CVP, **kwargs: Any
) -> None:
    """Check that mean and variance are differentiable in the input's mean and variance.

    Args:
        operation: the function the rule is registered for.
        *args: its arguments, with float64 `Moments`.
        approximation: the approximation to check under.
        **kwargs: its keyword arguments.

    Raises:
        GradcheckError: a gradient differs from finite differences.
    """
    leaves, spec = _flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Moments)]

    def moments_of(*fields: Tensor) -> tuple[Tensor, ...]:
        filled = list(leaves)
        for i, place in enumerate(places):
            filled[place] = Moments(fields[2 * i], fields[2 * i + 1])
        call_args, call_kwargs = spec(filled)
        results = [as_moments(r) for r in _leaves(through_dispatch(operation, call_args, call_kwargs, approximation))]
        return tuple(field for r in results for field in (r.mean, r.var) if field is not None)

    inputs = [
        field.detach().clone().requires_grad_() for place in places for field in (leaves[place].mean, leaves[place].var)
    ]
    assert torch.autograd.gradcheck(moments_of, inputs, eps=1e-6, atol=1e-6)


def _check_deterministic_limit(
    name: str, operation: Callable[..., Any], args: Any, kwargs: Any, approximation: Approximation
) -> None:
    """At zero variance the rule returns the operation itself and no variance."""

    def quiet(leaf: Any) -> Any:
        return replace(leaf, var=torch.zeros_like(leaf.mean)) if isinstance(leaf, Moments) else leaf

    def plain(leaf: Any) -> Any:
        return leaf.mean if isinstance(leaf, Moments) else leaf

    limit = _leaves(through_dispatch(operation, _map(quiet, args), _map(quiet, kwargs), approximation))
    truth = _leaves(operation(*_map(plain, args), **_map(plain, kwargs)))
    for mine, expected in zip(map(as_moments, limit), truth, strict=True):
        torch.testing.assert_close(
            mine.mean, expected, rtol=1e-5, atol=1e-6, msg=lambda m: f"{name} at zero variance: {m}"
        )
        if mine.var is not None:
            assert float(mine.var.abs().max()) <= 1e-10, f"{name} makes variance out of none"


def _monte_carlo(operation: Callable[..., Any], args: Any, kwargs: Any, n_samples: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    leaves, spec = _flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Moments)]
    noise = [
        torch.randn((n_samples, *leaves[i].mean.shape), generator=generator, dtype=leaves[i].mean.dtype) for i in places
    ]

    def once(*standard: Tensor) -> Any:
        filled = list(leaves)
        for place, z in zip(places, standard, strict=True):
            x = leaves[place]
            filled[place] = x.mean if x.var is None else x.mean + x.var.sqrt() * z
        call_args, call_kwargs = spec(filled)
        return _leaves(operation(*call_args, **call_kwargs))

    with warnings.catch_warnings():  # a slow batching rule is no fault of the rule under test
        warnings.filterwarnings("ignore", message="There is a performance drop")
        try:
            return vmap(once, chunk_size=4096)(*noise)
        except RuntimeError as error:
            if "Batching rule not implemented" not in str(error):
                raise
    rows = zip(*(z[:UNBATCHED_SAMPLES] for z in noise), strict=True)
    return [torch.stack(each) for each in zip(*(once(*row) for row in rows), strict=True)]


def _errors(mean: Tensor, variance: Tensor, sample: Tensor) -> RuleErrors:
    n = len(sample)
    true_mean, true_variance = sample.mean(0), sample.var(0)
    fourth = (sample - true_mean).pow(4).mean(0)
    spread = true_variance.max().sqrt().clamp(min=1e-12)
    seen = (true_variance > 0) | (variance == 0)
    usable = seen & (fourth <= true_variance.square() * (n / 400))
    tiny = 1e-9 * (1 + true_mean.abs())  # rounding, where a standard error is exactly zero
    mean_se = (true_variance / n).sqrt() + tiny
    variance_se = ((fourth - true_variance.square()).clamp(min=0) / n).sqrt() + tiny
    mean_gap, variance_gap = (mean - true_mean).abs(), (variance - true_variance).abs()
    relative_mean, relative_variance = mean_gap / spread, variance_gap / spread.square()
    return RuleErrors(
        float(relative_mean.max()),
        float(relative_variance.max()),
        float((mean_gap / mean_se * usable).max()),
        float((variance_gap / variance_se * usable).max()),
        float((torch.maximum(relative_mean, relative_variance) * ~usable).max()),
    )


def _worst(a: RuleErrors, b: RuleErrors) -> RuleErrors:
    pairs = zip(vars(a).values(), vars(b).values(), strict=True)
    return RuleErrors(*(max(x, y) for x, y in pairs))


def _map(function: Callable[[Any], Any], tree: Any) -> Any:
    return pytree.tree_map(function, tree, is_leaf=lambda leaf: isinstance(leaf, Moments))


def _leaves(tree: Any) -> list[Any]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor | Moments)]


def _flatten(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    leaves, spec = pytree.tree_flatten(tree)
    return leaves, lambda filled: pytree.tree_unflatten(filled, spec)
