"""What a posterior says of the outputs of the linearised network: J Sigma J^T for every row.

With Sigma the covariance of the parameters and J the Jacobian of a row's R scalars at the mean, the outputs
of f(mean) + J (theta - mean) have covariance J Sigma J^T, exactly, for any structure of Sigma:

    diagonal, Kronecker    layer by layer, as g V g^T in the eigenbasis; a random last layer alone has g = Q_L
                           for all rows, so that C classes need (n, C) numbers and never (n, C, C)
    full, low rank         J times the root R of Sigma = R R^T, so that J R is a root of the outputs'
    product                the sum over its parts
    anything else          draws d of theta - mean, J d by forward mode: the mean of (J d) (J d)^T

Source: Immer, Korzepa and Bauer 2021 (arXiv 2008.08711).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from bayespass.batches import batch_size, call_arguments, device_of, input_batches, model_output, rows_of
from bayespass.curvature.blocks import Bases, DensePiece, LinearPiece, Piece
from bayespass.curvature.blocks import parameter_names as names_of
from bayespass.curvature.forms import (
    Basis,
    Form,
    Root,
    closed_forms,
    displacements,
    form_covariance,
    form_marginals,
    placed,
    sum_of,
    times,
)
from bayespass.curvature.layers import DEFAULT_MEMORY, RowJacobian
from bayespass.curvature.output import Rows, output_rows
from bayespass.curvature.products import Products, exact_products
from bayespass.curvature.rows import Parameters
from bayespass.errors import require_positive
from bayespass.posterior.base import Posterior


@dataclass(frozen=True)
class RowCovariance:
    """J Sigma J^T of some rows, in the form that is asked for.

    Args:
        outputs: (n, ...) the network's at the mean, without gradient.
        rows: their place in the batch.
        pieces: of J, with the forms that Sigma is made of; or
        moved: (S, n, R) J d for draws d, with the divisor of their squares.
    """

    outputs: Tensor
    rows: slice
    pieces: tuple[Piece, ...] = ()
    forms: tuple[Form, ...] = ()
    moved: Tensor | None = None
    divisor: int = 1
    room: int = DEFAULT_MEMORY

    def marginals(self) -> Tensor:
        """(n, R) variances."""
        if self.moved is not None:
            return self.moved.square().sum(0) / self.divisor
        parts = [form_marginals(self.pieces, form)[0] for form in self.forms if isinstance(form, Basis)]
        for form in self.forms:
            if isinstance(form, Root):
                parts.append(sum_of(part.square().sum(-1) for part in self._roots(form)))
        return sum_of(parts)

    def covariance(self) -> Tensor:
        """(n, R, R) covariances."""
        if self.moved is not None:
            return torch.einsum("snr,snq->nrq", self.moved, self.moved) / self.divisor
        parts = [form_covariance(self.pieces, form)[0] for form in self.forms if isinstance(form, Basis)]
        for form in self.forms:
            if isinstance(form, Root):
                parts.append(sum_of(part @ part.mT for part in self._roots(form)))
        return sum_of(parts)

    def shared_root(self) -> tuple[Tensor, Tensor] | None:
        """G (R, K) and s (n, K) with covariance G diag(s^2) G^T, where a last layer alone is random; else None.

        No backward pass was needed for it, and no (n, R, R).
        """
        (piece, *more), forms = self.pieces or (None,), self.forms
        if more or not isinstance(piece, LinearPiece) or piece.grads is not None or len(forms) != 1:
            return None
        form = forms[0]
        if not isinstance(form, Basis):
            return None
        size = piece.shape[0]
        spreads: list[tuple[Tensor | None, Tensor]] = []
        if piece.weight is not None:
            turn, variance = form.right.get(piece.weight), form.variance[piece.weight][0]
            inputs = piece.inputs[:, 0, 0].to(variance.dtype)
            inputs = inputs if turn is None else inputs @ turn
            spreads.append((form.left.get(piece.weight), inputs.square() @ variance.mT))
        if piece.bias is not None:
            own = form.left.get(piece.bias), form.variance[piece.bias][0].expand(len(piece.inputs), -1)
            if spreads and _same(spreads[0][0], own[0]):
                spreads = [(own[0], spreads[0][1] + own[1])]
            else:
                spreads.append(own)
        unit = torch.eye(size, dtype=spreads[0][1].dtype, device=spreads[0][1].device)
        return (
            torch.cat([unit if turn is None else turn for turn, _ in spreads], 1),
            torch.cat([spread for _, spread in spreads], 1).clamp(min=0).sqrt(),
        )

    def _roots(self, form: Root) -> Iterator[Tensor]:
        """J R (n, R, k), some columns of R at a time."""
        n = len(self.outputs)
        width = next(iter(form.columns.values())).shape[-1]
        largest = max(
            max(p.shape[0] if isinstance(p, LinearPiece) else 1, self.outputs[0].numel()) for p in self.pieces
        )
        step = max(1, self.room // (4 * n * largest * self.outputs.element_size()))
        for start in range(0, width, step):
            columns = {name: value[..., start : start + step] for name, value in form.columns.items()}
            yield sum_of(times(piece, columns) for piece in self.pieces if set(names_of(piece)) & set(columns))


class OutputCovariance:
    """J Sigma J^T of every row of a batch, for any posterior.

    Args:
        model: in eval mode, in float32 or better, at the posterior mean (`predict.snapshot.snapshot`); rows
            of a batch must not interact.
        posterior: over any subset of its parameters.
        max_memory: bytes that one part of a batch may take, roughly.
        by_draws: go by draws even where there is a closed form.
        n_samples: draws, where there is no closed form or none is wanted.
        seed: of the draws.

    Raises:
        InvalidInput: a value outside its range.
    """

    def __init__(
        self,
        model: nn.Module,
        posterior: Posterior,
        max_memory: int = DEFAULT_MEMORY,
        by_draws: bool = False,
        n_samples: int = 64,
        seed: int = 0,
    ) -> None:
        require_positive(max_memory=max_memory)
        self.model, self.max_memory = model, max_memory
        self.names = posterior.names
        device = device_of(model)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.dtype = parameters[self.names[0]].dtype
        forms = None if by_draws else closed_forms(posterior)
        self.exact = forms is not None
        self._forms = tuple(placed(form, device, self.dtype) for form in forms or ())
        self._draws: Parameters = {}
        self._divisor = 1
        if forms is None:
            draws, self._divisor = displacements(posterior, n_samples, seed)
            self._draws = {name: value.to(device, parameters[name].dtype) for name, value in draws.items()}
        self._jacobian = RowJacobian(model, self.names, max(1, max_memory // 2))

    @property
    def n_draws(self) -> int:
        """S; 0 for a closed form."""
        return next((len(value) for value in self._draws.values()), 0)

    def chunks(self, inputs: Any, rows: Rows = output_rows, square: bool = False) -> Iterator[RowCovariance]:
        """One batch in parts that fit the memory.

        Args:
            inputs: a batch as the model takes it.
            rows: maps outputs (n, ...) to the (n, R) scalars that are asked about; all outputs by default.
            square: whether (n, R, R) will be asked for.

        Yields:
            their covariance.

        Raises:
            InvalidInput: one row alone exceeds `max_memory`.
        """
        first = rows(outputs_of(self.model, rows_of(inputs, slice(0, 1))), None)
        size, width = first.element_size(), first.shape[1]
        per_row = 4 * size * (width**2 if square else width)
        if not self.exact:
            per_row += size * width * self.n_draws
        for place in parts(inputs, max(1, int(self.max_memory // (2 * per_row)))):
            part = rows_of(inputs, place)
            for found in self._drawn(part, rows) if not self.exact else self._closed(part, rows):
                start = place.start + found.rows.start
                yield replace(found, rows=slice(start, start + len(found.outputs)))

    def _closed(self, inputs: Any, rows: Rows) -> Iterator[RowCovariance]:
        with exact_products(self.model):
            for outputs, place, pieces in self._jacobian.chunks(inputs, None, rows):
                yield RowCovariance(outputs, place, tuple(pieces), self._forms, room=self.max_memory)

    def _drawn(self, inputs: Any, rows: Rows) -> Iterator[RowCovariance]:
        point, function = linear_function(self.model, self.names)
        products, count = Products(self.model, point), self.n_draws
        together = self._together(inputs, count)
        moved = products.times(lambda theta: rows(function(theta, inputs), None), self._draws, together)
        outputs = outputs_of(self.model, inputs)
        whole = slice(0, len(outputs))
        yield RowCovariance(outputs, whole, moved=moved, divisor=self._divisor, room=self.max_memory)

    def _together(self, inputs: Any, count: int) -> int:
        """Draws whose forward-mode passes fit the memory at once."""
        kept: list[int] = []

        def note(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
            kept.extend(t.numel() * t.element_size() for t in pytree.tree_leaves(output) if isinstance(t, Tensor))

        handles = [module.register_forward_hook(note) for module in self.model.modules()]
        try:
            outputs_of(self.model, rows_of(inputs, slice(0, 1)))
        finally:
            for handle in handles:
                handle.remove()
        weights = sum(value[0].numel() * value.element_size() for value in self._draws.values())
        rows = max(1, batch_size(inputs))
        return max(1, min(count, int(self.max_memory // (2 * (weights + rows * max(1, sum(kept)))))))


class PlacedCovariance:
    """The covariance in the outputs of a module that may be moved: called, it is the one for where the model is now.

    Args:
        model: see `OutputCovariance`.
        posterior: over any subset of its parameters.
        max_memory: bytes that one part of a batch may take, roughly.
    """

    def __init__(self, model: nn.Module, posterior: Posterior, max_memory: int) -> None:
        self.model, self.posterior, self.max_memory = model, posterior, max_memory
        self._computing: tuple[tuple[int, ...], OutputCovariance] | None = None

    def __call__(self) -> OutputCovariance:
        """Made anew where the parameters lie elsewhere than last time."""
        place = tuple(parameter.data_ptr() for parameter in self.model.parameters())
        if self._computing is None or self._computing[0] != place:
            self._computing = place, OutputCovariance(self.model, self.posterior, self.max_memory)
        return self._computing[1]


def covariance_grid(
    model: nn.Module,
    batches: Iterable[Any],
    names: Iterable[str],
    variances: Mapping[str, Tensor],
    left: Bases,
    right: Bases,
    by_layer: bool = False,
    max_memory: int = DEFAULT_MEMORY,
) -> tuple[Tensor, Tensor]:
    """J Sigma_m J^T of all rows for M covariances with one eigenbasis, such as a grid of prior precisions.

    One pass over the data whatever M is; with `by_layer` every combination of precisions by layer is a sum
    over the first axis.

    Args:
        model: as in `OutputCovariance`, at the mean.
        batches: re-iterable loader of inputs or (inputs, targets).
        names: random parameters.
        variances: (M, *shape) by name, in the basis.
        left: Q_L by name, the identity for names left out.
        right: Q_R by name.
        by_layer: keep layers, the modules that own the parameters, apart; see `layer_paths` for their order.
        max_memory: bytes of the result and of one part of a batch, roughly.

    Returns:
        outputs (N, ...), and covariances (M, N, R, R), or their diagonals (M, N, R) where all of them would
        exceed `max_memory`; with `by_layer` (L, M, N, ...).

    Raises:
        InvalidInput: no batch at all, or one row alone exceeds `max_memory`.
    """
    names, device = tuple(names), device_of(model)
    given = list(input_batches(batches, device))
    dtype = dict(model.named_parameters(remove_duplicate=False))[names[0]].dtype
    form = placed(Basis(dict(variances), left, right), device, dtype)
    assert isinstance(form, Basis)
    jacobian, paths = RowJacobian(model, names, max(1, max_memory // 2)), layer_paths(names)
    first = outputs_of(model, rows_of(given[0], slice(0, 1)))
    kinds = (len(paths) if by_layer else 1) * len(next(iter(form.variance.values())))
    width, n_rows = first.numel(), sum(batch_size(inputs) for inputs in given)
    full = kinds * n_rows * width**2 * first.element_size() <= max_memory
    compute = form_covariance if full else form_marginals
    outputs, found = [], []
    for inputs in given:
        room = max(1, int(max_memory // (8 * first.element_size() * kinds * (width**2 if full else width))))
        for place in parts(inputs, room):
            with exact_products(model):
                for value, _, pieces in jacobian.chunks(rows_of(inputs, place), None):
                    outputs.append(value)
                    if by_layer:
                        each = [[p for p in map(_only(path), pieces) if p is not None] for path in paths]
                        like = value.new_zeros(len(form.variance[names[0]]), len(value), *[width] * (1 + full))
                        found.append(torch.stack([compute(own, form) if own else like for own in each]))
                    else:
                        found.append(compute(pieces, form))
    return torch.cat(outputs), torch.cat(found, 2 if by_layer else 1)


def layer_paths(names: Iterable[str]) -> tuple[str, ...]:
    """Paths of the modules that own these parameters, in order of first appearance."""
    return tuple(dict.fromkeys(name.rpartition(".")[0] for name in names))


def _only(path: str) -> Callable[[Piece], Piece | None]:
    """The part of a piece that belongs to the module."""

    def part(piece: Piece) -> Piece | None:
        own = [name for name in names_of(piece) if name.rpartition(".")[0] == path]
        return (
            DensePiece({n: piece.blocks[n] for n in own})
            if own and isinstance(piece, DensePiece)
            else (piece if own else None)
        )

    return part


def linear_function(model: nn.Module, names: Iterable[str]) -> tuple[Parameters, Callable[[Parameters, Any], Tensor]]:
    """The named parameters' values, and the output for a batch as a function of them, everything else fixed."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    random = {name: parameters[name].detach() for name in names}
    own = {id(parameters[name]) for name in random}  # a tied weight has several names and must appear once
    rest = {n: p.detach() for n, p in model.named_parameters() if id(p) not in own} | dict(model.named_buffers())

    def outputs(theta: Parameters, inputs: Any) -> Tensor:
        args, kwargs = call_arguments(inputs)
        return model_output(functional_call(model, (theta, rest), args, kwargs))

    return random, outputs


def outputs_of(model: nn.Module, inputs: Any) -> Tensor:
    """The network's outputs for a batch, without gradients."""
    args, kwargs = call_arguments(inputs)
    with torch.no_grad():
        return model_output(model(*args, **kwargs))


def parts(inputs: Any, size: int) -> Iterator[slice]:
    """A batch's rows in runs of at most so many."""
    count = batch_size(inputs)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
