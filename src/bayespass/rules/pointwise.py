"""Pointwise functions beyond the common activations: clamps, shrinkages, maxima, ELUs, exponentials, roots.

Assumption: the input is Gaussian entry by entry. Functions made of polynomial pieces or of a line and
an exponential have closed moments, taken about f(m), where little cancels; so has exp.
Functions of a positive argument (sqrt, log, 1/x) are expanded to second order in the variance, meant
for an sd of at most 0.2 of the mean. At v = 0 every rule returns f(m) itself. Bounds are given as in
`activation`; those of linearising are the worst of a family, not of each function.

Sources: Clark 1961 (maxima); the rest is derived here, from
E[z^(n+1); a < z < b] = n E[z^(n-1); a < z < b] + a^n phi(a) - b^n phi(b).
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bayespass.approximation import Approximation
from bayespass.errors import UnsupportedOp
from bayespass.moments import Moments, apply, as_moments, cast, total
from bayespass.rules.activation import FLOOR, Function, Matched, curve_rule, elementwise, normal_pdf, safe_sd, spellings
from bayespass.rules.activation import quadrature as quadrature
from bayespass.rules.registry import Accuracy, in_place

FAR = 30.0  # sd, beyond which a probability is zero
SMALL = 0.05  # k s below which exp(k x) is a polynomial where the input is likely
KINK = Accuracy(0.8, 1.7)
NARROW = Accuracy(0.8, 6)  # between two bounds that may be closer than an sd


def _standard(gap: Tensor, sd: Tensor) -> Tensor:
    """gap / sd within [-FAR, FAR]; gap may be infinite."""
    most = FAR * sd
    return torch.minimum(torch.maximum(gap, -most), most) / sd


def _tail(z: Tensor) -> Tensor:
    """P(Z > z), accurate in the tail."""
    return 0.5 * torch.special.erfc(z * math.sqrt(0.5))


def _unless_known(v: Tensor, matched: Matched, value: Tensor, slope: Tensor) -> Matched:
    """The matched moments, or f(m) itself where the variance is zero."""
    mean, var, gain = matched
    random = v > FLOOR
    return torch.where(random, mean, value), torch.where(random, var, 0.0), torch.where(random, gain, slope)


def _pieces(x: Moments, approximation: Approximation, value: Function, knots: list[Any], pieces: list[Any]) -> Moments:
    """Exact moments of a function made of polynomials; pieces[i] holds between knots[i - 1] and knots[i].

    A piece is its coefficients, constant first, up to x^2. With z = (x - m) / s it is f(m) + A + B z + C z^2, and
    E[z^n; piece] is a truncated moment.
    """

    def slope(m: Tensor, piece: Any) -> Tensor:
        return (piece[1] if len(piece) == 2 else piece[1] + 2 * piece[2] * m) + torch.zeros_like(m)

    def derivative(m: Tensor) -> Tensor:
        found = slope(m, pieces[0])
        for knot, piece in zip(knots, pieces[1:], strict=True):
            found = torch.where(m > knot, slope(m, piece), found)
        return found

    def matched(m: Tensor, v: Tensor) -> Matched:
        sd = safe_sd(v)
        centre = value(m).detach()  # Var[f] = E[(f - c)^2] - E[f - c]^2 for any c
        first = second = gain = torch.zeros_like(centre)
        edges = [sd.new_tensor(-FAR), *(_standard(knot - m, sd) for knot in knots), sd.new_tensor(FAR)]
        for piece, lower, upper in zip(pieces, edges, edges[1:], strict=False):
            t = _truncated(lower, upper, 2 * len(piece) - 2)
            a = sum(c * m**n for n, c in enumerate(piece)) - centre
            a = torch.where(t[0] > 0, a, 0.0)  # a bound may be infinite
            b = slope(m, piece) * sd
            first = first + a * t[0] + b * t[1]
            second = second + a * a * t[0] + 2 * a * b * t[1] + b * b * t[2]
            gain = gain + (a * t[1] + b * t[2]) / sd  # E[f'], jumps included, is Cov(x, f) / v
            if len(piece) == 3:
                c = piece[2] * v
                first = first + c * t[2]
                second = second + 2 * a * c * t[2] + 2 * b * c * t[3] + c * c * t[4]
                gain = gain + c * t[3] / sd
        var = (second - first.square()).clamp(min=0)
        return _unless_known(v, (centre + first, var, gain), value(m), derivative(m))

    return elementwise(x, approximation, value, derivative, matched)


def _truncated(lower: Tensor, upper: Tensor, order: int) -> list[Any]:
    """E[z^n; lower < z < upper] for n up to `order`; the probability is 0 where the piece is FAR away."""
    inside = torch.where(lower > 0, _tail(lower) - _tail(upper), _tail(-upper) - _tail(-lower)).clamp(min=0)
    found: list[Any] = [torch.where(torch.maximum(lower, -upper) < 0.999 * FAR, inside, 0.0)]
    low, high = normal_pdf(lower), normal_pdf(upper)
    for n in range(order):
        found.append(low - high + (n * found[n - 1] if n else 0.0))
        low, high = lower * low, upper * high
    return found


@curve_rule(*spellings("clamp", "clip"), linear=NARROW)
def clamp(input: Any, min: Any = None, max: Any = None, *, approximation: Approximation) -> Moments:
    """min(max(x, low), high): exact by truncated moments; linear within 0.8 and 6.

    A random bound goes through `maximum` or `minimum`.
    """
    if not isinstance(input, Moments) or isinstance(min, Moments) or isinstance(max, Moments):
        input = input if min is None else maximum(input, min, approximation=approximation)
        return input if max is None else minimum(input, max, approximation=approximation)
    for bound in (min, max):
        input = input if bound is None else cast(input, torch.result_type(input.mean, bound))
    if min is not None and max is not None:
        min = min.clamp(max=max) if isinstance(min, Tensor) else min if min < max else max

    def value(m: Tensor) -> Tensor:
        m = m if min is None else m.clamp(min=min)
        return m if max is None else m.clamp(max=max)

    low, high = ([] if bound is None else [bound] for bound in (min, max))
    pieces = [*((bound, 0.0) for bound in low), (0.0, 1.0), *((bound, 0.0) for bound in high)]
    return _pieces(input, approximation, value, low + high, pieces)


@curve_rule(*spellings("clamp_min"), linear=KINK)
def clamp_min(input: Any, min: Any, *, approximation: Approximation) -> Moments:
    """max(x, low), see `clamp`: exact; linear within 0.8 and 1.7."""
    return clamp(input, min, None, approximation=approximation)


@curve_rule(*spellings("clamp_max"), linear=KINK)
def clamp_max(input: Any, max: Any, *, approximation: Approximation) -> Moments:
    """min(x, high), see `clamp`: exact; linear within 0.8 and 1.7."""
    return clamp(input, None, max, approximation=approximation)


@curve_rule(F.hardtanh, linear=NARROW)
def hardtanh(input: Moments, min_val: float = -1, max_val: float = 1, *, approximation: Approximation) -> Moments:
    """min(max(x, low), high), see `clamp`: exact; linear within 0.8 and 6."""
    return clamp(input, min_val, max_val, approximation=approximation)


@curve_rule(F.relu6, linear=KINK)
def relu6(input: Moments, *, approximation: Approximation) -> Moments:
    """min(max(x, 0), 6), see `clamp`: exact; linear within 0.8 and 1.7."""
    return clamp(input, 0.0, 6.0, approximation=approximation)


@curve_rule(F.hardsigmoid, linear=KINK)
def hardsigmoid(input: Moments, *, approximation: Approximation) -> Moments:
    """min(max(x / 6 + 1/2, 0), 1): exact; linear within 0.8 and 1.7."""
    return _pieces(input, approximation, F.hardsigmoid, [-3.0, 3.0], [(0.0, 0.0), (0.5, 1 / 6), (1.0, 0.0)])


@curve_rule(F.hardswish, linear=KINK)
def hardswish(input: Moments, *, approximation: Approximation) -> Moments:
    """X min(max(x / 6 + 1/2, 0), 1), quadratic between -3 and 3: exact; linear within 0.8 and 1.7."""
    return _pieces(input, approximation, F.hardswish, [-3.0, 3.0], [(0.0, 0.0), (0.0, 0.5, 1 / 6), (0.0, 1.0)])


@curve_rule(F.threshold, torch.threshold, linear=KINK)
def threshold(input: Moments, threshold: float, value: float, *, approximation: Approximation) -> Moments:
    """X above the threshold, else the value: exact, jump included; linear, which sees no jump, within 0.8 and 1.7."""
    return _pieces(input, approximation, lambda m: F.threshold(m, threshold, value), [threshold], [(value, 0), (0, 1)])


@curve_rule(F.softshrink, linear=KINK)
def softshrink(input: Moments, lambd: float = 0.5, *, approximation: Approximation) -> Moments:
    """X - l above l, x + l below -l, else 0: exact; linear within 0.8 and 1.7."""
    pieces = [(lambd, 1.0), (0.0, 0.0), (-lambd, 1.0)]
    return _pieces(input, approximation, lambda m: F.softshrink(m, lambd), [-lambd, lambd], pieces)


@curve_rule(*spellings("hardshrink"), linear=KINK)
def hardshrink(input: Moments, lambd: float = 0.5, *, approximation: Approximation) -> Moments:
    """X outside [-l, l], else 0: exact, jumps included; linear within 0.8 and 1.7."""
    pieces = [(0.0, 1.0), (0.0, 0.0), (0.0, 1.0)]
    return _pieces(input, approximation, lambda m: F.hardshrink(m, lambd), [-max(lambd, 0), max(lambd, 0)], pieces)


@curve_rule(*spellings("abs", "absolute"), linear=KINK)
def absolute(input: Moments, *, approximation: Approximation) -> Moments:
    """|x|: exact, the folded normal; linear within 0.8 and 1.7."""
    return _pieces(input, approximation, torch.abs, [0.0], [(0.0, -1.0), (0.0, 1.0)])


@curve_rule(F.rrelu, torch.rrelu, linear=KINK)
def rrelu(
    input: Moments, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, *, approximation: Approximation
) -> Moments:
    """Leaky ReLU of the average slope, as in evaluation: exact; linear within 0.8 and 1.7.

    Raises:
        UnsupportedOp: training mode, whose slopes are random.
    """
    if training:
        msg = "no Gaussian rule for rrelu with training=True; call model.eval()"
        raise UnsupportedOp(msg)
    slope = (lower + upper) / 2
    return _pieces(input, approximation, lambda m: F.leaky_relu(m, slope), [0.0], [(0.0, slope), (0.0, 1.0)])


@curve_rule(*spellings("prelu"), linear=KINK)
def prelu(input: Any, weight: Any, *, approximation: Approximation) -> Moments:
    """max(x, 0) + a min(x, 0): exact; linear within 0.8 and 1.7.

    A random slope adds V_a E[min(x, 0)^2], of which V_a E[min(x, 0)]^2 is common to all positions.
    """
    x, a = as_moments(input), as_moments(weight)
    shape = [-1, *[1] * (x.mean.dim() - 2)] if x.mean.dim() else []
    slope, spread = a.mean.reshape(shape), apply(lambda t: t.reshape(shape), a.var)
    y = _pieces(x, approximation, lambda m: torch.where(m > 0, m, slope * m), [0.0], [(0, slope), (0, 1)])
    if spread is None:
        return y
    below = clamp(x, None, 0.0, approximation=approximation)
    common = spread * below.mean.square()
    added = common if below.var is None or approximation.activation == "linear" else common + spread * below.var
    var = total(y.var, added)
    shared = None if approximation.shared == "ignore" else torch.minimum(total(y.shared, common), var)  # type: ignore[arg-type]
    return Moments(y.mean, var, shared)


def _extreme(a: Any, b: Any, sign: int, approximation: Approximation) -> Moments:
    """sign * max(sign a, sign b): Clark's moments, exact for independent Gaussians and for a known bound."""
    if a is b:
        return a
    a, b = as_moments(a), as_moments(b)
    if a.var is None or b.var is None:
        known, random = (a.mean, b) if a.var is None else (b.mean, a)
        return clamp(random, *((known, None) if sign > 0 else (None, known)), approximation=approximation)
    dtype = torch.result_type(a.mean, b.mean)
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    a, b = cast(a, wide), cast(b, wide)
    gap, spread = sign * (a.mean - b.mean), a.var + b.var  # type: ignore[operator]
    sd = safe_sd(spread)
    alpha = _standard(gap, sd)
    p, pdf = _tail(-alpha), normal_pdf(alpha)
    excess, less = gap.clamp(min=0), spread * (alpha * p + pdf) * (pdf - alpha * (1 - p))
    if approximation.activation == "linear":
        p, less = (gap >= 0).to(wide), 0
    else:
        excess = torch.where(spread > FLOOR, gap * p + sd * pdf, excess)
    var = (p * a.var + (1 - p) * b.var - less).clamp(min=0)
    shared = None
    if a.shared is not None or b.shared is not None:  # what is not first order goes with the squared correlation
        common = [torch.zeros_like(var) if x.shared is None else x.shared for x in (a, b)]
        rest = (var - p.square() * a.var - (1 - p).square() * b.var).clamp(min=0)
        ratio = ((common[0] + common[1]) / spread.clamp(min=FLOOR)).clamp(max=1)
        first = p.square() * common[0] + (1 - p).square() * common[1]
        shared = torch.minimum(first + rest * ratio.square(), var)
    return cast(Moments(b.mean + sign * excess, var, shared), dtype)


@curve_rule(*spellings("maximum", "fmax"), linear=Accuracy(1, 1.1))
def maximum(input: Any, other: Any, *, approximation: Approximation) -> Moments:
    """max(x, y): exact for independent x and y; linear within 1 and 1.1.

    With t^2 = v_x + v_y, a = (m_x - m_y) / t, L(a) = a Phi(a) + phi(a): mean m_y + t L(a), variance
    v_x Phi(a) + v_y Phi(-a) - t^2 L(a) L(-a).
    """
    return _extreme(input, other, 1, approximation)


@curve_rule(*spellings("minimum", "fmin"), linear=Accuracy(1, 1.1))
def minimum(input: Any, other: Any, *, approximation: Approximation) -> Moments:
    """min(x, y) = -max(-x, -y), see `maximum`: exact for independent x and y; linear within 1 and 1.1."""
    return _extreme(input, other, -1, approximation)


def _exp(x: Tensor, share: float = 1.0, function: Function = torch.exp) -> Tensor:
    """exp(x), or another function of x, held below the largest number to the power `share`."""
    return function(x.clamp(max=share * 0.999999 * math.log(torch.finfo(x.dtype).max)))


def _elu(x: Moments, approximation: Approximation, value: Function, line: float, size: float, k: float) -> Moments:
    """Exact moments of l x above 0 and A (exp(k x) - 1) below.

    E[exp(k x); x < 0] is exp(k m + k^2 v / 2) Phi(-t) or erfcx(t / sqrt 2) phi(m / s) sqrt(pi / 2),
    t = m / s + k s, whichever cannot overflow. For small k s, where moments of exp(k x) - 1 would
    cancel, they are those of its polynomial in y = (x - min(m, 0)) / s.
    """

    def derivative(m: Tensor) -> Tensor:
        return torch.where(m > 0, line, size * k * torch.exp(k * m.clamp(max=0)))

    def below(k: float, m: Tensor, sd: Tensor, a: Tensor) -> Tensor:
        t = a + k * sd
        inner = _exp(k * m + 0.5 * (k * sd).square()) * _tail(t)
        outer = torch.special.erfcx(t.clamp(min=0) * math.sqrt(0.5)) * normal_pdf(a) * math.sqrt(math.pi / 2)
        return torch.where(t < 0, inner, outer)

    def matched(m: Tensor, v: Tensor) -> Matched:
        sd = safe_sd(v)
        a, up, down = _standard(m, sd), m.clamp(min=0), m.clamp(max=0)
        p, q, pdf = _tail(-a), _tail(a), normal_pdf(a)
        above, behind = a.clamp(min=0), -a.clamp(max=0)
        y, edge = [q], pdf  # E[y^n; x < 0]
        for n in range(5):
            y.append(above * y[n] - edge + (n * y[n - 1] if n else 0))
            edge = edge * behind
        once, twice, w = below(k, m, sd, a), below(2 * k, m, sd, a), torch.exp(k * down)
        i1, i2, i3, i4, i5 = ((k * sd).clamp(-SMALL, SMALL) ** n * y[n] for n in range(1, 6))
        small = abs(k) * sd < SMALL
        u1 = torch.where(small, w * (i1 + i2 / 2 + i3 / 6 + i4 / 24), once - w * q)  # E[exp(k x) - w; x < 0]
        u2 = torch.where(small, w * w * (i2 + i3 + 7 / 12 * i4 + i5 / 4), twice - 2 * w * once + w * w * q)
        r1, r2 = pdf - behind * p, p - (a + 2 * behind) * pdf + behind**2 * p  # E[((x - max(m, 0)) / s)^n; x > 0]
        rise, d = line * sd, -size * torch.expm1(k * down)
        first = size * u1 - line * up * q + rise * r1 + d * p  # of f - f(m)
        second = size**2 * u2 - 2 * size * line * up * u1 + (line * up) ** 2 * q
        second = second + rise**2 * r2 + 2 * rise * d * r1 + d * d * p
        found = value(m) + first, (second - first.square()).clamp(min=0), line * p + size * k * once
        return _unless_known(v, found, value(m), derivative(m))

    return elementwise(x, approximation, value, derivative, matched)


@curve_rule(F.elu, linear=KINK)
def elu(input: Moments, alpha: float = 1.0, *, approximation: Approximation) -> Moments:
    """X above 0, a (exp(x) - 1) below: exact to 1e-4; linear within 0.8 and 1.7."""
    return _elu(input, approximation, lambda m: F.elu(m, alpha), 1.0, alpha, 1.0)


@curve_rule(F.selu, torch.selu, linear=KINK)
def selu(input: Moments, *, approximation: Approximation) -> Moments:
    """1.0507 (x above 0, 1.6733 (exp(x) - 1) below): exact to 1e-4; linear within 0.8 and 1.7."""
    line, alpha = 1.0507009873554805, 1.6732632423543772
    return _elu(input, approximation, F.selu, line, line * alpha, 1.0)


@curve_rule(F.celu, torch.celu, linear=KINK)
def celu(input: Moments, alpha: float = 1.0, *, approximation: Approximation) -> Moments:
    """X above 0, a (exp(x / a) - 1) below: exact to 1e-4; linear within 0.8 and 1.7."""
    return _elu(input, approximation, lambda m: F.celu(m, alpha), 1.0, alpha, 1 / alpha)


def _finite(x: Moments) -> Moments:
    """Overflow held at the largest number."""
    most = torch.finfo(x.mean.dtype).max
    var, shared = (apply(lambda t: t.clamp(max=most), field) for field in (x.var, x.shared))
    return Moments(x.mean.clamp(-most, most), var, shared)


def _exponential(x: Moments, approximation: Approximation, function: Function) -> Moments:
    def matched(m: Tensor, v: Tensor) -> Matched:
        return _exp(m + v / 2, 1, function), _exp(2 * m + 2 * v) * -torch.expm1(-v), _exp(m + v / 2, 0.5)

    return _finite(elementwise(x, approximation, lambda m: _exp(m, 1, function), lambda m: _exp(m, 0.5), matched))


@curve_rule(*spellings("exp"), linear=Accuracy(0.3, 0.5))
def exp(input: Moments, *, approximation: Approximation) -> Moments:
    """exp(x), lognormal: mean exp(m + v/2), variance exp(2m + 2v) (1 - exp(-v)): exact.

    Linear, for an sd up to 0.5, within 0.3 and 0.5. What overflows is held at the largest number.
    """
    return _exponential(input, approximation, torch.exp)


@curve_rule(*spellings("expm1"), linear=Accuracy(0.3, 0.5))
def expm1(input: Moments, *, approximation: Approximation) -> Moments:
    """exp(x) - 1, see `exp`: exact; linear, for an sd up to 0.5, within 0.3 and 0.5."""
    return _exponential(input, approximation, torch.expm1)


def _positive(name: str, text: str, value: Function, scale: Function, d: Any, shift: float = 0.0) -> None:
    """Register f of a positive argument y = x + shift, whose n-th derivative is scale(y) d[n - 1] / y^n."""
    reach = 0.15 if name == "reciprocal" else 0.2

    def derivative(m: Tensor) -> Tensor:
        return scale(m + shift) * d[0] / (m + shift)

    def matched(m: Tensor, v: Tensor) -> Matched:
        y = m + shift
        size = scale(y)
        c = (v / y.square().clamp(min=FLOOR)).clamp(max=1)  # beyond an sd of the mean there are no moments
        slope = d[0] + d[2] * c / 2  # of E f, in scale / y
        mean = value(m) + size * (d[1] * c / 2 + d[3] * c * c / 8)
        var = size.square() * (c * slope.square() + (d[1] * c).square() / 2)
        return _unless_known(v, (mean, var, size / y * slope), value(m), derivative(m))

    def call(input: Moments, *, approximation: Approximation) -> Moments:
        return _finite(elementwise(input, approximation, value, derivative, matched))

    call.__name__ = name
    call.__doc__ = f"{text}: for an sd up to {reach} of the argument within 0.02 and 0.1, linear within 0.2 and 0.25."
    curve_rule(*spellings(name), moments=Accuracy(0.02, 0.1), linear=Accuracy(0.2, 0.25))(call)


LOG = (1.0, -1.0, 2.0, -6.0)
_positive("sqrt", "Square root", torch.sqrt, torch.sqrt, (0.5, -0.25, 0.375, -0.9375))
_positive("rsqrt", "1 / sqrt(x)", torch.rsqrt, torch.rsqrt, (-0.5, 0.75, -1.875, 6.5625))
_positive("reciprocal", "1 / x", torch.reciprocal, torch.reciprocal, (-1.0, 2.0, -6.0, 24.0))
_positive("log", "Natural logarithm", torch.log, torch.ones_like, LOG)
_positive("log1p", "log(1 + x)", torch.log1p, torch.ones_like, LOG, shift=1.0)

STORING = "clamp clip clamp_min clamp_max abs absolute exp expm1 sin cos erf sqrt rsqrt reciprocal log log1p selu celu"
for _name in f"{STORING} rrelu threshold relu tanh sigmoid".split():
    in_place({operation: getattr(torch, _name) for operation in spellings(_name + "_")})
in_place({F.hardtanh_: F.hardtanh, F.elu_: F.elu, F.leaky_relu_: F.leaky_relu})
