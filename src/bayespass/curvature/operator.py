"""J v and J^T w over a data set, block by block, without ever holding J.

Every datum has R scalars, its rows: all outputs, the root of the curvature in them times them, the loss,
or a few random projections of the outputs. J stacks their gradients at the trained weights, one block of
data after the other. `times` and `transposed` are one forward-mode and one reverse-mode pass for all
vectors together, so any architecture will do. A ridge appends sqrt(ridge) I to J, and with it one entry
per row to every vector: the projection onto the kernel of [J, sqrt(ridge) I] is then a ridge filter.

Source: Miani, Roy and Hauberg 2025 (arXiv 2410.16901).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from bayespass.batches import call_arguments, device_of, model_output, to_device
from bayespass.curvature.blocks import DensePiece, EmbeddingPiece, Piece, dense, gram
from bayespass.curvature.layers import DEFAULT_MEMORY, RowJacobian
from bayespass.curvature.output import Rows
from bayespass.curvature.products import Products, exact_products
from bayespass.curvature.row_blocks import Block, RowKind, join_blocks, row_function, split_blocks
from bayespass.curvature.rows import Parameters
from bayespass.errors import InvalidInput, require_count, require_positive
from bayespass.likelihood import Likelihood, SigmaNoise, check_likelihood, check_targets
from bayespass.predict.snapshot import check_eval

BACKWARD_ROWS = 512  # data times vectors that go backwards at once on a CPU


class RowOperator:
    """J, and sqrt(ridge) I beside it, as a linear map.

    A vector is one flat row of a (S, P) tensor, parameters one after the other in the order of `names`;
    with a ridge it is (S, P + R), with an entry for each of the R rows of J.

    Args:
        model: in eval mode; rows of a batch must not interact.
        names: random parameters, in float32 or float64.
        blocks: the data, (inputs, targets); see `shuffled_blocks`.
        rows: what is differentiated: "outputs", "curvature" (H^(1/2) times outputs, so that J^T J is the
            generalised Gauss-Newton matrix), "loss" (one row per datum), "random" (`n_projections` random
            signed sums of a datum's outputs, other ones for every datum), or a function of
            (outputs, targets) that returns (n, R), such as a per-datum loss of your own.
        likelihood: "classification" or "regression".
        sigma_noise: sd of the observation noise, or "predicted", for regression.
        ridge: >= 0.
        n_projections: rows per datum, for "random"; fewer than outputs.
        scale: prior sd by name, 1 for names left out: J becomes J diag(scale).
        seed: of the random projections.
        max_memory: bytes that one product or Gram matrix may take, roughly.

    Raises:
        InvalidInput: a value outside its range, a model in training mode, or targets that do not fit.

    >>> model = nn.Linear(2, 1, bias=False).eval()
    >>> jacobian = RowOperator(model, ["weight"], [(torch.eye(2), torch.zeros(2, 1))], "outputs", "regression", 1.0)
    >>> jacobian.times(0, torch.tensor([[3.0, 4.0]]))
    tensor([[3., 4.]])
    """

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str],
        blocks: Sequence[Block],
        rows: RowKind | Rows = "outputs",
        likelihood: Likelihood = "classification",
        sigma_noise: SigmaNoise | None = None,
        ridge: float = 0.0,
        n_projections: int | None = None,
        scale: Mapping[str, float] | None = None,
        seed: int = 0,
        max_memory: int = DEFAULT_MEMORY,
    ) -> None:
        check_eval(model)
        check_likelihood(likelihood, sigma_noise)
        require_count(max_memory=max_memory)
        if isinstance(ridge, bool) or not ridge >= 0:
            msg = f"ridge must be a number of at least 0; got {ridge!r}"
            raise InvalidInput(msg)
        self.model, self.names = model, tuple(names)
        self.blocks: list[Block] = pytree.tree_map(_ordinary, list(blocks))
        self.ridge, self.max_memory, self.seed = float(ridge), max_memory, seed
        self.likelihood: Likelihood = likelihood
        self.sigma_noise: SigmaNoise | None = sigma_noise
        self.n_projections = n_projections
        self.kind: RowKind | Rows = rows
        self.scale = {name: float((scale or {}).get(name, 1.0)) for name in self.names}
        require_positive(**{f"scale of {name}": value for name, value in self.scale.items()})
        self._rows = row_function(rows, likelihood, sigma_noise, n_projections, seed)
        self._theta, self._rest = _split(model, self.names)
        self.shapes = {name: value.shape for name, value in self._theta.items()}
        self.n_params = sum(value.numel() for value in self._theta.values())
        self.dtype, self.device = next(iter(self._theta.values())).dtype, device_of(model)
        if any(value.dtype not in (torch.float32, torch.float64) for value in self._theta.values()):
            msg = "products with the Jacobian need float32 or float64 parameters; call model.float() first"
            raise InvalidInput(msg)
        self._products = Products(model, self._theta)
        self._jacobians: dict[tuple[str, ...], RowJacobian] = {}
        self._widths: list[int] = []
        self._row_bytes: list[int] = []
        self._measure()
        sizes = [width * len(targets) for width, (_, targets) in zip(self._widths, self.blocks, strict=True)]
        self._starts = [sum(sizes[:k]) for k in range(len(sizes))]
        self.sizes = tuple(sizes)
        self.n_rows = sum(sizes)
        self.n_data = sum(len(targets) for _, targets in self.blocks)
        self.width = self.n_params + (self.n_rows if self.ridge else 0)

    def resized(self, size: int, ridge: float | None = None) -> "RowOperator":
        """The same rows in blocks of at most so many data, in the same order.

        Args:
            size: data per block.
            ridge: another ridge; by default the present one.
        """
        blocks = split_blocks(join_blocks(self.blocks), size)
        return RowOperator(
            self.model,
            self.names,
            blocks,
            self.kind,
            self.likelihood,
            self.sigma_noise,
            self.ridge if ridge is None else ridge,
            self.n_projections,
            self.scale,
            self.seed,
            self.max_memory,
        )

    def times(self, block: int, vectors: Tensor) -> Tensor:
        """J_b v, the ridge's part included.

        Args:
            block: b.
            vectors: (S, width).

        Returns:
            (S, R_b).
        """
        primal = vectors[:, : self.n_params]
        found = self._times(block, primal)
        return found + self.ridge**0.5 * vectors[:, self._slot(block)] if self.ridge else found

    def transposed(self, block: int, weights: Tensor) -> Tensor:
        """J_b^T w, the parameters' part; the ridge's part is sqrt(ridge) w itself.

        Args:
            block: b.
            weights: (S, R_b).

        Returns:
            (S, P).
        """
        total = torch.zeros(len(weights), self.n_params, dtype=self.dtype, device=self.device)
        start, width = 0, self._widths[block]
        together = self._together(block, len(weights))
        if self.device.type == "cpu":  # where batched convolution gradients are slower than one after the other
            together = min(together or len(weights), max(1, BACKWARD_ROWS // len(self.blocks[block][1])))
        for chunk in self._chunks(block, len(weights)):
            stop = start + width * len(chunk[1])
            part = weights[:, start:stop].to(self.dtype).reshape(len(weights), -1, width)
            total += self.flatten(self._products.transposed(self._function(chunk), part, together))
            start = stop
        return total

    def add_transposed(self, block: int, vectors: Tensor, weights: Tensor, factor: float = 1.0) -> None:
        """Add factor [J_b, sqrt(ridge) I]^T w, in place.

        Args:
            block: b.
            vectors: (S, width), changed.
            weights: (S, R_b).
            factor: a number.
        """
        vectors[:, : self.n_params].add_(self.transposed(block, weights), alpha=factor)
        if self.ridge:
            vectors[:, self._slot(block)].add_(weights.to(vectors.dtype), alpha=factor * self.ridge**0.5)

    def gram(self, i: int, j: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """J_i J_j^T, without the ridge: layer by layer, or by columns where one row's layers exceed the memory.

        Args:
            i: a block.
            j: another; by default the same.
            dtype: of the sums and the result; by default the parameters'.

        Returns:
            (R_i, R_j).
        """
        j, dtype = i if j is None else j, dtype or self.dtype
        if self._products.functional:
            total = torch.zeros(self.sizes[i], self.sizes[j], dtype=dtype, device=self.device)
            try:
                for names, factor in self._scale_groups():
                    self._add_gram(total, i, j, self._jacobian(names), factor)
            except InvalidInput:  # one row's layers exceed the memory
                return self._gram_by_columns(i, j).to(dtype)
            return total
        return self._gram_by_columns(i, j).to(dtype)

    def _add_gram(self, total: Tensor, i: int, j: int, jacobian: RowJacobian, factor: float) -> None:
        kept = list(self._pieces(jacobian, j, total.dtype, limit=2))
        for rows_i, pieces_i in self._pieces(jacobian, i, total.dtype):
            for rows_j, pieces_j in kept if len(kept) < 2 else self._pieces(jacobian, j, total.dtype):
                if i == j and rows_j.start < rows_i.start:
                    continue
                for a, b in zip(pieces_i, pieces_j, strict=True):
                    part = factor * gram(a, b)
                    total[rows_i, rows_j] += part
                    if i == j and rows_j.start > rows_i.start:
                        total[rows_j, rows_i] += part.mT

    def primal_gram(self) -> Tensor:
        """J^T J (P, P) over all blocks, in float64 and without the ridge."""
        total = torch.zeros(self.n_params, self.n_params, dtype=_exact(self.device), device=self.device)
        jacobian = self._jacobian(self.names)
        for block in range(len(self.blocks)):
            for _, pieces in self._pieces(jacobian, block, None, additive=True):
                found = {name: part for piece in pieces for name, part in dense(piece).items()}
                rows = torch.cat([found[n].reshape(-1, self.shapes[n].numel()) * self.scale[n] for n in self.names], 1)
                rows = rows.to(total.dtype)
                total.addmm_(rows.mT, rows)
        return total

    def outputs(self, block: int) -> Tensor:
        """The network's outputs for a block, (n, ...)."""
        with torch.no_grad(), exact_products(self.model):
            return torch.cat([self._outputs(self._theta, inputs) for inputs, _ in self._chunks(block, 1)])

    def unflatten(self, vectors: Tensor) -> Parameters:
        """(S, P) as (S, *shape) by name, in the parameters' own units: multiplied by `scale`."""
        parts = vectors[:, : self.n_params].split([shape.numel() for shape in self.shapes.values()], 1)
        return {
            name: (part if self.scale[name] == 1 else part * self.scale[name]).reshape(len(part), *shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def flatten(self, values: Mapping[str, Tensor]) -> Tensor:
        """The transposed of `unflatten`: (S, *shape) by name, multiplied by `scale`, as (S, P)."""
        parts = ((values[name].reshape(len(values[name]), -1), self.scale[name]) for name in self.names)
        return torch.cat([part if scale == 1 else part * scale for part, scale in parts], 1)

    def _slot(self, block: int) -> slice:
        start = self.n_params + self._starts[block]
        return slice(start, start + self.sizes[block])

    def _outputs(self, theta: Parameters, inputs: Any) -> Tensor:
        args, kwargs = call_arguments(inputs)
        return model_output(functional_call(self.model, (theta, self._rest), args, kwargs))

    def _function(self, chunk: Block) -> Callable[[Parameters], Tensor]:
        inputs, targets = chunk
        return lambda theta: self._rows(self._outputs(theta, inputs), targets)

    def _times(self, block: int, vectors: Tensor) -> Tensor:
        """(S, R_b): J_b v of the parameters' part (S, P)."""
        tangents, together = self.unflatten(vectors), self._together(block, len(vectors))
        chunks = self._chunks(block, len(vectors))
        parts = [self._products.times(self._function(chunk), tangents, together) for chunk in chunks]
        return torch.cat([part.flatten(1) for part in parts], 1)

    def _jacobian(self, names: tuple[str, ...]) -> RowJacobian:
        if names not in self._jacobians:
            self._jacobians[names] = RowJacobian(self.model, names, max(1, self.max_memory // 3))
        return self._jacobians[names]

    def _together(self, block: int, n_vectors: int) -> int | None:
        room = self.max_memory // (4 * max(1, self._row_bytes[block])) - 1
        return None if room >= n_vectors else max(1, room)

    def _chunks(self, block: int, n_vectors: int) -> Iterator[Block]:
        """A block in parts whose activations, once and for every vector, take a quarter of the memory."""
        inputs, targets = self.blocks[block]
        room = max(1, self.max_memory // (4 * max(1, self._row_bytes[block]) * (1 + n_vectors)))
        for start in range(0, len(targets), room):
            rows = slice(start, start + room)
            part = pytree.tree_map(lambda t, rows=rows: t[rows] if isinstance(t, Tensor) else t, inputs)
            yield to_device(part, self.device), targets[rows].to(self.device)

    def _pieces(
        self,
        jacobian: RowJacobian,
        block: int,
        dtype: torch.dtype | None,
        limit: int | None = None,
        additive: bool = False,
    ) -> Iterator[tuple[slice, list[Piece]]]:
        """A block's pieces by its scalars' place in the block."""
        inputs, targets = self.blocks[block]
        width = self._widths[block]
        with exact_products(self.model):
            found = jacobian.chunks(
                to_device(inputs, self.device), targets.to(self.device), self._rows, additive=additive
            )
            for count, (_, rows, pieces) in enumerate(found, start=1):
                yield slice(rows.start * width, rows.stop * width), [_cast(piece, dtype) for piece in pieces]
                if count == limit:
                    return

    def _gram_by_columns(self, i: int, j: int) -> Tensor:
        columns = []
        unit = torch.eye(self.sizes[j], dtype=self.dtype, device=self.device)
        for part in unit.split(max(1, self.max_memory // (3 * self.n_params * unit.element_size()))):
            vectors = self.transposed(j, part)
            columns.append(self._times(i, vectors))
        return torch.cat(columns).mT

    def _scale_groups(self) -> list[tuple[tuple[str, ...], float]]:
        """Parameters of one prior variance together, as a layer's block is not split by parameter."""
        values = sorted(set(self.scale.values()))
        return [(tuple(n for n in self.names if self.scale[n] == value), value**2) for value in values]

    def _measure(self) -> None:
        """Rows of a datum and the bytes that its forward pass keeps, for every block.

        Raises:
            InvalidInput: no data, or targets that do not fit.
        """
        known: dict[str, tuple[int, int, torch.Size]] = {}
        if not self.blocks:
            msg = "there is no block of data; pass at least one (inputs, targets)"
            raise InvalidInput(msg)
        for k, (inputs, targets) in enumerate(self.blocks):
            one = pytree.tree_map(lambda t: t[:1] if isinstance(t, Tensor) else t, inputs)
            form = str([leaf.shape for leaf in pytree.tree_leaves(one) if isinstance(leaf, Tensor)])
            if form not in known:
                known[form] = self._measure_one(to_device(one, self.device), targets[:1].to(self.device))
            width, kept, shape = known[form]
            self._widths.append(width)
            self._row_bytes.append(kept)
            if self.kind == "random":  # a datum's projections are drawn from its place in the whole
                first = sum(len(t) for _, t in self.blocks[:k])
                self.blocks[k] = (inputs, torch.arange(first, first + len(targets)))
            elif not callable(self.kind):
                blank = torch.zeros(1, device=targets.device).expand(len(targets), *shape[1:])
                check_targets(blank, targets, self.likelihood, self.sigma_noise)

    def _measure_one(self, inputs: Any, targets: Tensor) -> tuple[int, int, torch.Size]:
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        own = {value.data_ptr() for value in (*self._theta.values(), *self._rest.values())}
        theta = {name: value.detach().requires_grad_() for name, value in self._theta.items()}
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with torch.enable_grad(), exact_products(self.model), hooks:
            outputs = self._outputs(theta, inputs)
            targets = torch.zeros(1, dtype=torch.int64, device=outputs.device) if self.kind == "random" else targets
            scalars = self._rows(outputs, targets)
        if scalars.dim() != 2 or len(scalars) != 1:
            msg = f"rows must map outputs (n, ...) and targets to (n, R); got shape {tuple(scalars.shape)} for n = 1"
            raise InvalidInput(msg)
        activations = sum(size for place, size in kept.items() if place not in own)
        return scalars.shape[1], activations + 8 * outputs.numel(), outputs.shape


def _split(model: nn.Module, names: Iterable[str]) -> tuple[Parameters, Parameters]:
    """The named parameters, and everything else; a tied weight appears once."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    random = {name: parameters[name].detach() for name in names}
    own = {id(parameters[name]) for name in random}
    rest = {name: p.detach() for name, p in model.named_parameters() if id(p) not in own}
    return random, rest | dict(model.named_buffers())


def _ordinary(leaf: Any) -> Any:
    """A copy of what was made in inference mode, which autograd refuses."""
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf


def _exact(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _cast(piece: Piece, dtype: torch.dtype | None) -> Piece:
    if dtype is None:
        return piece
    if isinstance(piece, DensePiece):
        return DensePiece({name: block.to(dtype) for name, block in piece.blocks.items()})
    if isinstance(piece, EmbeddingPiece):
        return replace(piece, grads=piece.grads.to(dtype))
    return replace(piece, inputs=piece.inputs.to(dtype), grads=None if piece.grads is None else piece.grads.to(dtype))
