"""Elementwise nonlinearities.

Assumption: the input is Gaussian entry by entry. With `activation="moments"` mean and variance of
the output are those of a Gaussian input, in closed form (ReLU) or by the series

    Var f(X) = sum_k v^k / k! (d^k/dm^k E f)^2

cut after three terms (GELU; sigmoid, SiLU, tanh and softplus through a mixture of three probits),
or at Gauss-Hermite nodes (Mish, softsign). With `activation="linear"` the function is linearised at
the mean. Corrections are written so that they vanish with the variance: at v = 0 every rule returns
f(m) itself. Bounds: error of the mean in output sd, then of the variance, relative.

Sources: Wright, Nakahira and Moura 2024 (arXiv 2403.16163), theorem 1; single_pass notes 3.2.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bayespass.approximation import Approximation
from bayespass.moments import Moments, Source, finite_slope, in_float32, linearise, root, scale
from bayespass.rules.registry import EXACT, Accuracy, Operation, rule

# sigmoid(x) ~ sum_k p_k Phi(l_k x), largest error 4.8e-5 (single_pass notes 3.2).
PROBIT_WEIGHTS = (0.161086, 0.583138, 0.255775)
PROBIT_SLOPES = (0.363622, 0.576375, 0.905429)
FLOOR = 1e-30  # of a variance: below it the input counts as known
NODES = 24

Function = Callable[[Tensor], Tensor]
Matched = tuple[Tensor, Tensor, Tensor]  # mean, variance and gain E[f'] of f(x)


def curve_rule(*operations: Operation, moments: Accuracy = EXACT, linear: Accuracy) -> Callable[..., Any]:
    """`rule` with one accuracy when moments are matched and one when the function is linearised."""
    accuracy = {"moments": moments, "linear": linear}
    return rule(*operations, accuracy=accuracy, depends_on="activation", knows_shared=True)


def spellings(*names: str) -> list[Operation]:
    """Every public function of these names: torch.exp, Tensor.exp, torch.special.expm1."""
    return [getattr(home, name) for name in names for home in (torch, Tensor, torch.special) if hasattr(home, name)]


def normal_cdf(x: Tensor) -> Tensor:
    """Phi(x)."""
    return torch.rsub(torch.erf(x * math.sqrt(0.5)), 0.5, alpha=-0.5)


def normal_pdf(x: Tensor) -> Tensor:
    """phi(x)."""
    return torch.exp(torch.rsub(x * x, -0.5 * math.log(2 * math.pi), alpha=0.5))


def standardised(mean: Tensor, sd: Tensor) -> Tensor:
    """mean / sd, held within [-30, 30] so that a zero sd is a plain limit."""
    return (mean / sd.clamp(min=torch.finfo(sd.dtype).tiny)).clamp(-30, 30)


def safe_sd(v: Tensor) -> Tensor:
    """The standard deviation, never below a floor, so that dividing by it and its gradient are finite."""
    return v.clamp(min=FLOOR).sqrt()


@cache
def hermite(nodes: int) -> list[tuple[float, float]]:
    """Nodes and weights of Gauss-Hermite quadrature for a standard normal."""
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    return list(zip(points.tolist(), (weights / weights.sum()).tolist(), strict=True))


def quadrature(function: Function, m: Tensor, v: Tensor, nodes: int = NODES) -> tuple[Tensor, Tensor]:
    """Mean and variance of function(x), x ~ N(m, v), by Gauss-Hermite nodes about function(m); not for kinks."""
    sd = torch.where(v > FLOOR, safe_sd(v), 0.0)
    centre = function(m)
    first = second = torch.zeros_like(centre)
    for point, weight in hermite(nodes):
        gap = function(m + point * sd) - centre
        first, second = first + weight * gap, second + weight * gap.square()
    return centre + first, (second - first.square()).clamp(min=0)


def _series(v: Tensor, first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """v d1^2 + v^2 d2^2 / 2 + v^3 d3^2 / 6, of which every term is positive."""
    higher = torch.addcmul(second * second, v, third * third, value=1 / 3)
    return v * torch.addcmul(first * first, v, higher, value=0.5)


def elementwise(
    x: Moments,
    approximation: Approximation,
    value: Function,
    derivative: Function,
    matched: Callable[[Tensor, Tensor], Matched],
) -> Moments:
    """One activation under either approximation.

    Args:
        x: the input.
        approximation: its field `activation` chooses.
        value: f.
        derivative: f'.
        matched: (m, v) to mean, variance and gain E[f'] of f(x) for x ~ N(m, v).

    The covariance of two entries whose inputs have covariance c is gain^2 c to first order and the
    whole variance at c = v; between them the rest goes with (c / v)^2, its next order.
    """
    if x.var is None:
        return Moments(value(x.mean))

    def compute(x: Moments) -> Moments:
        assert x.var is not None
        if approximation.activation == "linear":
            gain = finite_slope(derivative(x.mean))
            result = linearise(value(x.mean), gain, x)
            return replace(result, source=_through(x.source, gain))
        mean, var, gain = matched(x.mean, x.var)
        shared = None
        if x.shared is not None:
            first = finite_slope(gain).square()
            ratio = (x.shared / x.var.clamp(min=torch.finfo(var.dtype).tiny)).clamp(max=1)
            rest = torch.addcmul(var, first, x.var, value=-1).clamp(min=0)
            shared = torch.minimum(torch.addcmul(first * x.shared, rest, ratio.square()), var)
        return Moments(mean, var, shared, source=_through(x.source, gain))

    return in_float32(compute, x)


def _through(source: Source | None, gain: Tensor) -> Source | None:
    if source is None:
        return None
    return source._replace(gain=gain if source.gain is None else gain * source.gain)


def _gelu_terms(m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """E f and its first three derivatives in m, for f = x Phi(x); the mean is exact.

    With r = 1/sqrt(1+v), h = m r and t = phi(h) r: d1 = Phi(h) + h t r, d2 = t w2, d3 = -h t r w3, where
    w2 = 1 + (1 - h^2) r^2 and w3 = w2 + 2 r^2. Passes over memory are what this costs, so they are few.
    """
    r = torch.rsqrt(1 + v)
    h = m * r
    cdf, t = normal_cdf(h), normal_pdf(h) * r
    mean = torch.addcmul(m * cdf, v, t)
    htr, r2 = h * t * r, r * r
    w2 = torch.addcmul(1 + r2, h * h, r2, value=-1)
    w3 = torch.add(w2, r2, alpha=2)
    return mean, cdf + htr, t * w2, -htr * w3


@curve_rule(F.gelu, moments=Accuracy(0.02, 0.03), linear=Accuracy(0.45, 0.75))
def gelu(input: Moments, approximate: str = "none", *, approximation: Approximation) -> Moments:
    """X Phi(x): mean m Phi(h) + v/q phi(h), q = sqrt(1+v), h = m/q (exact); variance by the series.

    Bounds (mean in output sd, variance relative): 0.02 and 0.03 matched, 0.45 and 0.75 linear. The
    tanh form differs from the erf form by a term that is added at the mean.
    Source: single_pass notes 3.2.
    """

    def value(m: Tensor) -> Tensor:
        return F.gelu(m, approximate=approximate)

    def matched(m: Tensor, v: Tensor) -> Matched:
        mean, *derivatives = _gelu_terms(m, v)
        if approximate != "none":
            mean = mean + (value(m) - F.gelu(m))
        return mean, _series(v, *derivatives), derivatives[0]

    def derivative(m: Tensor) -> Tensor:
        return normal_cdf(m) + m * normal_pdf(m)

    return elementwise(input, approximation, value, derivative, matched)


def _rectified(m: Tensor, v: Tensor, slope: float) -> Matched:
    """Exact moments of max(x, slope x) for slope <= 1, with the cancellation-free ReLU variance."""
    sd = root(v)
    a = standardised(m, sd)
    cdf, pdf = normal_cdf(a), normal_pdf(a)
    relu_mean = m * cdf + sd * pdf
    above, below = a * cdf + pdf, pdf - a * (1 - cdf)
    relu_var = v * (cdf - above * below).clamp(min=0)
    if slope == 0:
        return relu_mean, relu_var, cdf
    rest = 1 - slope
    var = slope**2 * v + rest**2 * relu_var + 2 * slope * rest * v * cdf
    return slope * m + rest * relu_mean, var, slope + rest * cdf


@curve_rule(F.leaky_relu, linear=Accuracy(0.45, 0.75))
def leaky_relu(input: Moments, negative_slope: float = 0.01, *, approximation: Approximation) -> Moments:
    """max(x, l x): exact moments matched; linear within 0.45 output sd and 0.75 of the variance."""
    return elementwise(
        input,
        approximation,
        lambda m: F.leaky_relu(m, negative_slope),
        lambda m: torch.where(m > 0, 1.0, negative_slope).to(m.dtype),
        lambda m, v: _rectified(m, v, negative_slope),
    )


@curve_rule(F.relu, *spellings("relu"), linear=Accuracy(0.45, 0.75))
def relu(input: Moments, *, approximation: Approximation) -> Moments:
    """max(x, 0): mean m Phi(a) + s phi(a), variance v (Phi(a) - L(a) L(-a)), a = m/s. Exact matched.

    Linear within 0.45 output sd and 0.75 of the variance. Source: single_pass notes 3.2.
    """
    return elementwise(input, approximation, F.relu, lambda m: (m > 0).to(m.dtype), lambda m, v: _rectified(m, v, 0.0))


def _sigmoid_terms(m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """E f and three derivatives for the sigmoid as a mixture of three probits."""
    terms: list[Any] = [0.0, 0.0, 0.0, 0.0]
    for weight, slope in zip(PROBIT_WEIGHTS, PROBIT_SLOPES, strict=True):
        a = slope * torch.rsqrt(1 + slope**2 * v)
        h = a * m
        pdf = weight * normal_pdf(h)
        terms[0] = terms[0] + weight * normal_cdf(h)
        terms[1] = terms[1] + a * pdf
        terms[2] = terms[2] - a.square() * h * pdf
        terms[3] = terms[3] + a.square() * a * (h.square() - 1) * pdf
    return terms[0], terms[1], terms[2], terms[3]


def _sigmoid_matched(m: Tensor, v: Tensor) -> Matched:
    mean, *derivatives = _sigmoid_terms(m, v)
    at_zero = _sigmoid_terms(m, torch.zeros_like(v))[0]
    return (torch.sigmoid(m) + (mean - at_zero)).clamp(0, 1), _series(v, *derivatives), derivatives[0]


@curve_rule(F.sigmoid, *spellings("sigmoid", "expit"), moments=Accuracy(0.02, 0.03), linear=Accuracy(0.4, 1.8))
def sigmoid(input: Moments, *, approximation: Approximation) -> Moments:
    """1 / (1 + exp(-x)) as a mixture of three probits.

    Bounds (mean in output sd, variance relative): 0.02 and 0.03 matched, 0.4 and 1.8 linear.
    """

    def derivative(m: Tensor) -> Tensor:
        s = torch.sigmoid(m)
        return s * (1 - s)

    return elementwise(input, approximation, torch.sigmoid, derivative, _sigmoid_matched)


@curve_rule(F.silu, moments=Accuracy(0.02, 0.02), linear=Accuracy(0.4, 0.5))
def silu(input: Moments, *, approximation: Approximation) -> Moments:
    """X sigmoid(x) as a mixture of three GELUs, x Phi(l x) = GELU(l x) / l.

    Bounds (mean in output sd, variance relative): 0.02 and 0.02 matched, 0.4 and 0.5 linear.
    """

    def derivative(m: Tensor) -> Tensor:
        s = torch.sigmoid(m)
        return s * (1 + m * (1 - s))

    def mixture(m: Tensor, v: Tensor) -> list[Any]:
        terms: list[Any] = [0.0, 0.0, 0.0, 0.0]
        for weight, slope in zip(PROBIT_WEIGHTS, PROBIT_SLOPES, strict=True):
            for order, term in enumerate(_gelu_terms(slope * m, slope**2 * v)):
                terms[order] = terms[order] + weight * slope ** (order - 1) * term
        return terms

    def matched(m: Tensor, v: Tensor) -> Matched:
        mean, *derivatives = mixture(m, v)
        at_zero = mixture(m, torch.zeros_like(v))[0]
        return F.silu(m) + (mean - at_zero), _series(v, *derivatives), derivatives[0]

    return elementwise(input, approximation, F.silu, derivative, matched)


@curve_rule(F.tanh, *spellings("tanh"), moments=Accuracy(0.02, 0.1), linear=Accuracy(0.6, 6.0))
def tanh(input: Moments, *, approximation: Approximation) -> Moments:
    """2 sigmoid(2 x) - 1.

    Bounds (mean in output sd, variance relative): 0.02 and 0.1 matched, 0.6 and 6.0 linear.
    """

    def matched(m: Tensor, v: Tensor) -> Matched:
        mean, variance, gain = _sigmoid_matched(2 * m, 4 * v)
        return torch.tanh(m) + 2 * (mean - torch.sigmoid(2 * m)), 4 * variance, 4 * gain

    def derivative(m: Tensor) -> Tensor:
        return 1 - torch.tanh(m).square()

    return elementwise(input, approximation, torch.tanh, derivative, matched)


@curve_rule(F.tanhshrink, moments=Accuracy(0.02, 0.03), linear=Accuracy(0.5, 1))
def tanhshrink(input: Moments, *, approximation: Approximation) -> Moments:
    """X - tanh(x), the tanh as a mixture of probits: within 0.02 and 0.03 matched, 0.5 and 1 linear."""

    def matched(m: Tensor, v: Tensor) -> Matched:
        mixture, first, second, third = _sigmoid_terms(2 * m, 4 * v)
        mean = F.tanhshrink(m) - 2 * (mixture - _sigmoid_terms(2 * m, torch.zeros_like(v))[0])
        return mean, _series(v, 1 - 4 * first, 8 * second, 16 * third), 1 - 4 * first

    return elementwise(input, approximation, F.tanhshrink, lambda m: torch.tanh(m).square(), matched)


def _softplus_terms(m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """E f - max(m, 0) and three derivatives for softplus as a mixture of ReLUs, input variances 1 / l^2 larger."""
    terms: list[Any] = [0.0, 0.0, 0.0, 0.0]
    for weight, slope in zip(PROBIT_WEIGHTS, PROBIT_SLOPES, strict=True):
        sd = (v + slope**-2).sqrt()
        h = m / sd
        cdf, pdf = normal_cdf(h), normal_pdf(h)
        beyond = sd * (pdf - h.abs() * torch.minimum(cdf, 1 - cdf))
        for order, term in enumerate((beyond, cdf, pdf / sd, -h * pdf / sd.square())):
            terms[order] = terms[order] + weight * term
    return terms[0], terms[1], terms[2], terms[3]


@curve_rule(F.softplus, moments=Accuracy(0.02, 0.03), linear=Accuracy(0.3, 0.3))
def softplus(input: Moments, beta: float = 1.0, threshold: float = 20.0, *, approximation: Approximation) -> Moments:
    """log(1 + exp(b x)) / b as a mixture of smoothed ReLUs: within 0.02 and 0.03 matched, 0.3 and 0.3 linear.

    Above the threshold the function is x, a difference that is taken at the mean only.
    """
    value = partial(F.softplus, beta=beta, threshold=threshold)

    def matched(m: Tensor, v: Tensor) -> Matched:
        mean, first, second, third = _softplus_terms(beta * m, beta**2 * v)
        at_zero = _softplus_terms(beta * m, torch.zeros_like(v))[0]
        return value(m) + (mean - at_zero) / beta, _series(v, first, beta * second, beta**2 * third), first

    return elementwise(input, approximation, value, lambda m: torch.sigmoid(beta * m), matched)


@curve_rule(F.logsigmoid, moments=Accuracy(0.02, 0.03), linear=Accuracy(0.3, 0.3))
def logsigmoid(input: Moments, *, approximation: Approximation) -> Moments:
    """-softplus(-x), see `softplus`: within 0.02 and 0.03 matched, 0.3 and 0.3 linear."""
    return scale(softplus(scale(input, -1), approximation=approximation), -1)


@curve_rule(*spellings("erf"), moments=Accuracy(0.02, 0.12), linear=Accuracy(0.7, 7))
def erf(input: Moments, *, approximation: Approximation) -> Moments:
    """2 Phi(sqrt 2 x) - 1: mean erf(m / sqrt(1 + 2 v)) (exact); within 0.02 and 0.12 matched, 0.7 and 7 linear."""

    def derivative(m: Tensor, a: Any = 2**0.5) -> Tensor:
        return 2 * a * normal_pdf(a * m)

    def matched(m: Tensor, v: Tensor) -> Matched:
        a = torch.rsqrt(0.5 + v)
        h, first = a * m, derivative(m, a)
        return torch.erf(h * math.sqrt(0.5)), _series(v, first, -a * h * first, a * a * (h * h - 1) * first), first

    return elementwise(input, approximation, torch.erf, derivative, matched)


def _integrated(x: Moments, approximation: Approximation, value: Function, derivative: Function) -> Moments:
    def matched(m: Tensor, v: Tensor) -> Matched:
        return *quadrature(value, m, v), quadrature(derivative, m, v)[0]

    return elementwise(x, approximation, value, derivative, matched)


@curve_rule(F.mish, moments=Accuracy(0.02, 0.03), linear=Accuracy(0.45, 0.75))
def mish(input: Moments, *, approximation: Approximation) -> Moments:
    """X tanh(softplus(x)) at 24 Gauss-Hermite nodes: within 0.02 and 0.03 matched, 0.45 and 0.75 linear."""

    def derivative(m: Tensor) -> Tensor:
        t = torch.tanh(F.softplus(m))
        return t + m * (1 - t.square()) * torch.sigmoid(m)

    return _integrated(input, approximation, F.mish, derivative)


@curve_rule(F.softsign, moments=Accuracy(0.03, 0.04), linear=Accuracy(0.5, 7))
def softsign(input: Moments, *, approximation: Approximation) -> Moments:
    """X / (1 + |x|) at 24 Gauss-Hermite nodes: within 0.03 and 0.04 matched, 0.5 and 7 linear."""
    return _integrated(input, approximation, F.softsign, lambda m: (1 + m.abs()).reciprocal().square())


def _wave(x: Moments, approximation: Approximation, value: Function, slope: Function) -> Moments:
    """sin or cos: mean exp(-v/2) f(m), variance (1 - q) (1 - q + 2 q f'(m)^2) / 2, q = exp(-v)."""

    def matched(m: Tensor, v: Tensor) -> Matched:
        lost, kept = -torch.expm1(-v), torch.exp(-v / 2)
        return kept * value(m), 0.5 * lost * (lost + 2 * (kept * slope(m)).square()), kept * slope(m)

    return elementwise(x, approximation, value, slope, matched)


@curve_rule(*spellings("sin"), linear=Accuracy(1.4, 8))
def sin(input: Moments, *, approximation: Approximation) -> Moments:
    """sin x: mean exp(-v/2) sin m, variance as in `_wave`: exact; linear within 1.4 and 8."""
    return _wave(input, approximation, torch.sin, torch.cos)


@curve_rule(*spellings("cos"), linear=Accuracy(1.4, 8))
def cos(input: Moments, *, approximation: Approximation) -> Moments:
    """cos x: mean exp(-v/2) cos m, variance as in `_wave`: exact; linear within 1.4 and 8."""
    return _wave(input, approximation, torch.cos, lambda m: -torch.sin(m))
