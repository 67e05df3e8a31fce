"""Elementwise nonlinearities.

Assumption: the input is Gaussian entry by entry. With `activation="moments"` mean and variance of
the output are those of a Gaussian input, in closed form (ReLU) or by the series

    Var f(X) = sum_k v^k / k! (d^k/dm^k E f)^2

cut after three terms (GELU; sigmoid, SiLU and tanh through a mixture of three probits). With
`activation="linear"` the function is linearised at the mean. Corrections are written so that
they vanish with the variance: at v = 0 every rule returns f(m) itself.

Sources: Wright, Nakahira and Moura 2024 (arXiv 2403.16163), theorem 1; single_pass notes 3.2.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bayespass.approximation import Approximation
from bayespass.moments import Moments, in_float32, linearise
from bayespass.rules.registry import Accuracy, in_place, rule

# sigmoid(x) ~ sum_k p_k Phi(l_k x), largest error 4.8e-5 (single_pass notes 3.2).
PROBIT_WEIGHTS = (0.161086, 0.583138, 0.255775)
PROBIT_SLOPES = (0.363622, 0.576375, 0.905429)

Pair = tuple[Tensor, Tensor]


def normal_cdf(x: Tensor) -> Tensor:
    """Phi(x)."""
    return torch.rsub(torch.erf(x * math.sqrt(0.5)), 0.5, alpha=-0.5)


def normal_pdf(x: Tensor) -> Tensor:
    """phi(x)."""
    return torch.exp(torch.rsub(x * x, -0.5 * math.log(2 * math.pi), alpha=0.5))


def standardised(mean: Tensor, sd: Tensor) -> Tensor:
    """mean / sd, held within [-30, 30] so that a zero sd is a plain limit."""
    return (mean / sd.clamp(min=torch.finfo(sd.dtype).tiny)).clamp(-30, 30)


def _series(v: Tensor, first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """v d1^2 + v^2 d2^2 / 2 + v^3 d3^2 / 6, of which every term is positive."""
    higher = torch.addcmul(second * second, v, third * third, value=1 / 3)
    return v * torch.addcmul(first * first, v, higher, value=0.5)


def _elementwise(
    x: Moments,
    approximation: Approximation,
    value: Callable[[Tensor], Tensor],
    derivative: Callable[[Tensor], Tensor],
    matched: Callable[[Tensor, Tensor], Pair],
) -> Moments:
    """One activation under either approximation."""

    def compute(m: Tensor, v: Tensor) -> Moments:
        if approximation.activation == "linear":
            return linearise(value(m), derivative(m), Moments(m, v))
        return Moments(*matched(m, v))

    return in_float32(compute, x)


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


@rule(
    F.gelu,
    accuracy={"moments": Accuracy(0.02, 0.03), "linear": Accuracy(0.45, 0.75)},
    depends_on="activation",
)
def gelu(input: Moments, approximate: str = "none", *, approximation: Approximation) -> Moments:
    """X Phi(x): mean m Phi(h) + v/q phi(h), q = sqrt(1+v), h = m/q (exact); variance by the series.

    Bounds (mean in output sd, variance relative): 0.02 and 0.03 matched, 0.45 and 0.75 linear. The
    tanh form differs from the erf form by a term that is added at the mean.
    Source: single_pass notes 3.2.
    """

    def value(m: Tensor) -> Tensor:
        return F.gelu(m, approximate=approximate)

    def matched(m: Tensor, v: Tensor) -> Pair:
        mean, *derivatives = _gelu_terms(m, v)
        if approximate != "none":
            mean = mean + (value(m) - F.gelu(m))
        return mean, _series(v, *derivatives)

    def derivative(m: Tensor) -> Tensor:
        return normal_cdf(m) + m * normal_pdf(m)

    return _elementwise(input, approximation, value, derivative, matched)


def _rectified(m: Tensor, v: Tensor, slope: float) -> Pair:
    """Exact moments of max(x, slope x) for slope <= 1, with the cancellation-free ReLU variance."""
    sd = v.sqrt()
    a = standardised(m, sd)
    cdf, pdf = normal_cdf(a), normal_pdf(a)
    relu_mean = m * cdf + sd * pdf
    above, below = a * cdf + pdf, pdf - a * (1 - cdf)
    relu_var = v * (cdf - above * below).clamp(min=0)
    if slope == 0:
        return relu_mean, relu_var
    rest = 1 - slope
    return slope * m + rest * relu_mean, slope**2 * v + rest**2 * relu_var + 2 * slope * rest * v * cdf


@rule(
    F.leaky_relu,
    accuracy={"moments": Accuracy(), "linear": Accuracy(0.45, 0.75)},
    depends_on="activation",
)
def leaky_relu(input: Moments, negative_slope: float = 0.01, *, approximation: Approximation) -> Moments:
    """max(x, l x): exact moments matched; linear within 0.45 output sd and 0.75 of the variance."""
    return _elementwise(
        input,
        approximation,
        lambda m: F.leaky_relu(m, negative_slope),
        lambda m: torch.where(m > 0, 1.0, negative_slope).to(m.dtype),
        lambda m, v: _rectified(m, v, negative_slope),
    )


@rule(
    F.relu, torch.relu, Tensor.relu,
    accuracy={"moments": Accuracy(), "linear": Accuracy(0.45, 0.75)},
    depends_on="activation",
)  # fmt: skip
def relu(input: Moments, *, approximation: Approximation) -> Moments:
    """max(x, 0): mean m Phi(a) + s phi(a), variance v (Phi(a) - L(a) L(-a)), a = m/s. Exact matched.

    Linear within 0.45 output sd and 0.75 of the variance. Source: single_pass notes 3.2.
    """
    return _elementwise(input, approximation, F.relu, lambda m: (m > 0).to(m.dtype), lambda m, v: _rectified(m, v, 0.0))


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


def _sigmoid_matched(m: Tensor, v: Tensor) -> Pair:
    mean, *derivatives = _sigmoid_terms(m, v)
    at_zero = _sigmoid_terms(m, torch.zeros_like(v))[0]
    return (torch.sigmoid(m) + (mean - at_zero)).clamp(0, 1), _series(v, *derivatives)


@rule(
    F.sigmoid, torch.sigmoid, Tensor.sigmoid, torch.special.expit,
    accuracy={"moments": Accuracy(0.02, 0.03), "linear": Accuracy(0.4, 1.8)},
    depends_on="activation",
)  # fmt: skip
def sigmoid(input: Moments, *, approximation: Approximation) -> Moments:
    """1 / (1 + exp(-x)) as a mixture of three probits.

    Bounds (mean in output sd, variance relative): 0.02 and 0.03 matched, 0.4 and 1.8 linear.
    """

    def derivative(m: Tensor) -> Tensor:
        s = torch.sigmoid(m)
        return s * (1 - s)

    return _elementwise(input, approximation, torch.sigmoid, derivative, _sigmoid_matched)


@rule(
    F.silu,
    accuracy={"moments": Accuracy(0.02, 0.02), "linear": Accuracy(0.4, 0.5)},
    depends_on="activation",
)
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

    def matched(m: Tensor, v: Tensor) -> Pair:
        mean, *derivatives = mixture(m, v)
        at_zero = mixture(m, torch.zeros_like(v))[0]
        return F.silu(m) + (mean - at_zero), _series(v, *derivatives)

    return _elementwise(input, approximation, F.silu, derivative, matched)


@rule(
    F.tanh, torch.tanh, Tensor.tanh,
    accuracy={"moments": Accuracy(0.02, 0.1), "linear": Accuracy(0.6, 6.0)},
    depends_on="activation",
)  # fmt: skip
def tanh(input: Moments, *, approximation: Approximation) -> Moments:
    """2 sigmoid(2 x) - 1.

    Bounds (mean in output sd, variance relative): 0.02 and 0.1 matched, 0.6 and 6.0 linear.
    """

    def matched(m: Tensor, v: Tensor) -> Pair:
        mean, variance = _sigmoid_matched(2 * m, 4 * v)
        return torch.tanh(m) + 2 * (mean - torch.sigmoid(2 * m)), 4 * variance

    def derivative(m: Tensor) -> Tensor:
        return 1 - torch.tanh(m).square()

    return _elementwise(input, approximation, torch.tanh, derivative, matched)


in_place(
    {
        torch.relu_: torch.relu, Tensor.relu_: torch.relu, Tensor.tanh_: torch.tanh, torch.tanh_: torch.tanh,
        Tensor.sigmoid_: torch.sigmoid, torch.sigmoid_: torch.sigmoid, F.leaky_relu_: F.leaky_relu,
    }
)  # fmt: skip
