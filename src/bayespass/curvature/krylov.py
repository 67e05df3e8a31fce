"""Iterative projections onto the kernel of J: sweeps over blocks of rows, and what makes them faster.

One block is projected out exactly, v <- v - J_b^T K_b^-1 J_b v with K_b = J_b J_b^T; a sweep Q does all
blocks in turn, and Q^t eps converges to the projection (von Neumann, Halperin). The solvers differ in what
they make of it:

    Sweeps   Q itself, or after every sweep the point of least norm in the affine hull of the last m
             iterates (generalised Gearhart-Koshy; all of them are at the same projection's feet)
    CGMN     conjugate gradients on I - Q^T Q, a sweep forth and back (Bjorck and Elfving 1979)
    LSMR     least squares min_y |J^T L^-T y - eps| with L L^T = diag(K_b), or L = 1; the preconditioned
             residual |L^-1 J v| falls at every step (Fong and Saunders 2011)

A state is a dict of tensors and numbers, "vectors" among them, so that it can be written and continued.

Source: Miani, Roy and Hauberg 2025 (arXiv 2410.16901); Tam 2021 for Gearhart-Koshy.
"""

from collections.abc import Iterable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from bayespass.curvature.operator import RowOperator
from bayespass.errors import InvalidInput

JITTER = {torch.float64: 1e-10, torch.float32: 1e-7}  # of the mean diagonal, by the dtype of the Gram matrix
LARGEST_JITTER = 1e-2
State = dict[str, Any]


class Solver(Protocol):
    """What `project` asks of an iterative solver."""

    epochs: ClassVar[int]

    def start(self, vectors: Tensor) -> State:
        """The state before the first step."""
        ...

    def step(self, state: State) -> None:
        """One step, in place; it passes over the data `epochs` times."""
        ...


def factorise(matrix: Tensor, ridge: float, jitter: float) -> tuple[Tensor, float]:
    """Cholesky factor of K + c I in float64, c at least `ridge`.

    What is added beyond the ridge is relative to the mean diagonal: none with a ridge, `jitter` without,
    and ten times more as long as K is not positive definite in floating-point numbers. Directions with
    eigenvalues far below it count as none of K's; no absolute cut is made.

    Args:
        matrix: K (n, n), overwritten.
        ridge: >= 0.
        jitter: of the mean diagonal.

    Returns:
        L, and c.

    Raises:
        InvalidInput: K is NaN or infinite, or far from positive semi-definite.
    """
    diagonal = matrix.diagonal()
    scale = float(diagonal.mean())
    if not torch.isfinite(diagonal).all():
        msg = "the Gram matrix of the Jacobian is NaN or infinite; check the model's weights and the data"
        raise InvalidInput(msg)
    scale = scale if scale > 0 else 1.0
    added, relative = 0.0, 0.0 if ridge else jitter
    while relative <= LARGEST_JITTER:
        wanted = ridge + relative * scale
        diagonal += wanted - added
        added = wanted
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            return factor, added
        relative = max(10 * relative, jitter)
    msg = (
        "the Gram matrix of the Jacobian has no Cholesky factor; do rows of a batch interact in the model? "
        "Give a ridge, or use solver='lsmr_plain'"
    )
    raise InvalidInput(msg)


class BlockFactors:
    """L_b with L_b L_b^T = J_b J_b^T + ridge, kept while they fit and made again otherwise.

    Args:
        operator: J.
        max_memory: bytes to keep.
    """

    def __init__(self, operator: RowOperator, max_memory: int) -> None:
        self.operator, self.room = operator, max_memory
        self._kept: dict[int, Tensor] = {}

    def __call__(self, block: int) -> Tensor:
        """The factor of one block, in float64."""
        if block in self._kept:
            return self._kept[block]
        matrix = self.operator.gram(block)
        jitter = JITTER[matrix.dtype]
        factor = factorise(matrix.to(exact_dtype(self.operator)), self.operator.ridge, jitter)[0]
        size = factor.numel() * factor.element_size()
        if size <= self.room:
            self.room -= size
            self._kept[block] = factor
        return factor


class Sweeps:
    """Cyclic projections, with the last `memory` iterates used if any.

    Args:
        operator: J.
        factors: of its blocks.
        memory: m, iterates kept; 0 for plain sweeps.
    """

    epochs: ClassVar[int] = 1

    def __init__(self, operator: RowOperator, factors: BlockFactors, memory: int = 0) -> None:
        self.operator, self.factors, self.memory = operator, factors, memory

    def start(self, vectors: Tensor) -> State:
        """The state before the first step."""
        return {"vectors": vectors.clone(), "past": []}

    def step(self, state: State) -> None:
        """One sweep."""
        before = state["vectors"]
        found = before.clone()
        sweep(self.operator, self.factors, found, range(len(self.operator.blocks)))
        if self.memory:
            past = [*state["past"], before][-self.memory :]
            state["past"] = past
            found = _least_norm(found, past)
        state["vectors"] = found


class CGMN:
    """Conjugate gradients on the symmetric sweep: (I - Q^T Q) d = (I - Q^T Q) eps, v = eps - d.

    Args:
        operator: J.
        factors: of its blocks.
    """

    epochs: ClassVar[int] = 2

    def __init__(self, operator: RowOperator, factors: BlockFactors) -> None:
        self.operator, self.factors = operator, factors

    def start(self, vectors: Tensor) -> State:
        """The state before the first step; it takes one forth and back of its own."""
        residual = self._applied(vectors)
        return {"vectors": vectors.clone(), "residual": residual, "direction": residual.clone()}

    def step(self, state: State) -> None:
        """One iteration, two sweeps."""
        direction, residual = state["direction"], state["residual"]
        applied = self._applied(direction)
        before = _dot(residual, residual)
        length = _ratio(before, _dot(direction, applied))
        state["vectors"].sub_(_each(length, direction))
        residual.sub_(_each(length, applied))
        direction.mul_(_ratio(_dot(residual, residual), before)[:, None].to(direction.dtype)).add_(residual)

    def _applied(self, vectors: Tensor) -> Tensor:
        """(I - Q^T Q) v."""
        found, blocks = vectors.clone(), range(len(self.operator.blocks))
        sweep(self.operator, self.factors, found, blocks)
        sweep(self.operator, self.factors, found, reversed(blocks))
        return vectors - found


class LSMR:
    """LSMR on A = J^T L^-T with the residual eps - A y kept by recurrence, so that y is never formed.

    Args:
        operator: J.
        factors: of its blocks; None for L = 1.
    """

    epochs: ClassVar[int] = 1

    def __init__(self, operator: RowOperator, factors: BlockFactors | None = None) -> None:
        self.operator, self.factors = operator, factors

    def start(self, vectors: Tensor) -> State:
        """The state before the first step."""
        beta = _norm(vectors)
        u = _each(_ratio(torch.ones_like(beta), beta), vectors)
        v = self._across(u)
        alpha = _norm(v)
        v = _each(_ratio(torch.ones_like(alpha), alpha), v)
        one, zero = torch.ones_like(beta), torch.zeros_like(beta)
        scalars = {"alpha": alpha, "alpha_bar": alpha.clone(), "zeta_bar": alpha * beta, "theta": zero, "s_bar": zero}
        blank = {"h": torch.zeros_like(u), "h_bar": torch.zeros_like(u)}
        return {
            "vectors": vectors.clone(),
            "u": u,
            "v": v,
            "rho": one,
            "rho_bar": one,
            "c_bar": one,
            **scalars,
            **blank,
        }

    def step(self, state: State) -> None:
        """One iteration, a product with A and one with A^T."""
        x = state
        along = self._along(x["v"])
        x["h"].mul_(-_ratio(x["theta"], x["rho"])[:, None].to(along.dtype)).add_(along)
        u = along.sub_(_each(x["alpha"], x["u"]))
        beta = _norm(u)
        x["u"] = _each(_ratio(torch.ones_like(beta), beta), u)
        v = self._across(x["u"]).sub_(_each(beta, x["v"]))
        x["alpha"] = _norm(v)
        x["v"] = _each(_ratio(torch.ones_like(beta), x["alpha"]), v)
        rho = torch.hypot(x["alpha_bar"], beta)
        theta = _ratio(beta * x["alpha"], rho)
        x["alpha_bar"] = _ratio(x["alpha_bar"] * x["alpha"], rho)
        theta_bar, c_rho = x["s_bar"] * rho, x["c_bar"] * rho
        rho_bar = torch.hypot(c_rho, theta)
        x["c_bar"], x["s_bar"] = _ratio(c_rho, rho_bar), _ratio(theta, rho_bar)
        zeta, x["zeta_bar"] = x["c_bar"] * x["zeta_bar"], -x["s_bar"] * x["zeta_bar"]
        back = _ratio(theta_bar * rho, x["rho"] * x["rho_bar"])
        x["h_bar"].mul_(-back[:, None].to(u.dtype)).add_(x["h"])
        x["vectors"].sub_(_each(_ratio(zeta, rho * rho_bar), x["h_bar"]))
        x["rho"], x["rho_bar"], x["theta"] = rho, rho_bar, theta

    def _along(self, weights: Tensor) -> Tensor:
        """A y, (S, width)."""
        op = self.operator
        total = torch.zeros(len(weights), op.width, dtype=op.dtype, device=op.device)
        for block, part in enumerate(weights.split(op.sizes, 1)):
            part = self._preconditioned(block, part, transposed=True)
            op.add_transposed(block, total, part.to(op.dtype))
        return total

    def _across(self, vectors: Tensor) -> Tensor:
        """A^T v, (S, R)."""
        parts = []
        for block in range(len(self.operator.blocks)):
            part = self.operator.times(block, vectors)
            part = self._preconditioned(block, part, transposed=False)
            parts.append(part.to(vectors.dtype))
        return torch.cat(parts, 1)

    def _preconditioned(self, block: int, weights: Tensor, transposed: bool) -> Tensor:
        """L_b^-1 w or L_b^-T w."""
        if self.factors is None:
            return weights
        factor = self.factors(block)
        factor = factor.mT if transposed else factor
        return torch.linalg.solve_triangular(factor, weights.to(factor.dtype).mT, upper=transposed).mT


def sweep(operator: RowOperator, factors: BlockFactors, vectors: Tensor, order: Iterable[int]) -> None:
    """Project out one block after the other, in place.

    Args:
        operator: J.
        factors: of its blocks.
        vectors: (S, width), changed.
        order: of the blocks.
    """
    for block in order:
        factor = factors(block)
        found = operator.times(block, vectors).to(factor.dtype)
        weights = torch.cholesky_solve(found.mT, factor).mT
        operator.add_transposed(block, vectors, weights.to(vectors.dtype), -1.0)


def exact_dtype(operator: RowOperator) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if operator.device.type == "mps" else torch.float64


def _least_norm(last: Tensor, past: list[Tensor]) -> Tensor:
    """The point of least norm in the affine hull of the last iterate and earlier ones, for every sample."""
    size = len(past)
    inner = torch.stack([torch.stack([_dot(a - last, b - last) for b in past]) for a in past]).permute(2, 0, 1)
    target = -torch.stack([_dot(a - last, last) for a in past], 1)
    scale = inner.diagonal(dim1=1, dim2=2).clamp(min=torch.finfo(inner.dtype).tiny).rsqrt()
    normal = inner * scale[:, :, None] * scale[:, None, :]
    inverse = torch.linalg.pinv(normal, rtol=1e-10 if last.dtype == torch.float64 else 1e-6, hermitian=True)
    weights = (scale * (inverse @ (scale * target)[..., None])[..., 0]).to(last.dtype)
    total = last * (1 - weights.sum(1, keepdim=True))
    for k in range(size):
        total += weights[:, k : k + 1] * past[k]
    return total


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(S,) inner products, summed in float64."""
    return (a * b).sum(1, dtype=torch.float32 if a.device.type == "mps" else torch.float64)


def _norm(a: Tensor) -> Tensor:
    return _dot(a, a).sqrt()


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is: a sample that is done stays where it is."""
    return torch.where(b != 0, a / torch.where(b != 0, b, torch.ones_like(b)), torch.zeros_like(a))


def _each(factor: Tensor, vectors: Tensor) -> Tensor:
    """Every sample times its own number."""
    return factor[:, None].to(vectors.dtype) * vectors
