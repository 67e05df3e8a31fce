"""Per-row Jacobians layer by layer: everything that is asked of J, without ever holding J.

Row n of a batch has R scalars r_nr, its outputs or a loss, and J_nr = d r_nr / d theta. A linear layer
y_t = W a_t + b has the block sum_t g_nrt a_nt^T with g_nrt = d r_nr / d y_t, so that its inputs and output
gradients are enough: one forward pass with hooks and R backward passes for all layers together. A
convolution is the same on unfolded inputs. Norms and embeddings have small blocks of their own, and what
no layer answers for (class tokens, fused attention, recurrent cells) is differentiated row by row.

Nothing is taken on trust: on the first batch the blocks of two rows are compared with what autograd says,
and parameters that differ (a tied weight, a fused attention, positions before rows) are differentiated
row by row instead.

Source: Dangel, Kunstner and Hennig 2020 (arXiv 1912.10985).
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.utils import _pytree as pytree

from bayespass.batches import batch_size, call_arguments, model_output, rows_of
from bayespass.curvature.blocks import Call, DensePiece, Piece, dense, has_block, make_piece, unfolded_size
from bayespass.curvature.output import Rows, output_rows
from bayespass.curvature.rows import Parameters, row_outputs
from bayespass.errors import InvalidInput

DEFAULT_MEMORY = 2**30


@dataclass
class _Calls:
    """What the hooks saw in one forward pass, by module path, and what the layers returned."""

    found: dict[str, list[Call]] = field(default_factory=dict)
    returned: dict[str, list[Tensor]] = field(default_factory=dict)


class RowJacobian:
    """The Jacobian of some scalars of every row in some parameters, as pieces of one layer each.

    Args:
        model: in eval mode; rows of a batch must not interact.
        names: parameters, a tied weight under one of its names.
        max_memory: bytes that one chunk of rows may take, roughly.

    Raises:
        InvalidInput: (from `chunks`) one row alone exceeds `max_memory`.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], max_memory: int = DEFAULT_MEMORY) -> None:
        self.model = model
        self.names = tuple(names)
        self.max_memory = max_memory
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._random = {name: parameters[name].detach() for name in self.names}
        self.layers = _layers(model, self.names)
        self._verified = False
        self._batched_backward = True
        self._together = True

    @property
    def others(self) -> tuple[str, ...]:
        """Parameters that no layer answers for; complete once a batch of two rows has been seen."""
        taken = {name for own in self.layers.values() for name in own.values()}
        return tuple(name for name in self.names if name not in taken)

    def chunks(
        self, inputs: Any, targets: Tensor | None, rows: Rows = output_rows, additive: bool = False
    ) -> Iterator[tuple[Tensor, slice, list[Piece]]]:
        """One batch in parts that fit the memory.

        Args:
            inputs: a batch as the model takes it.
            targets: its targets, where the rows need them.
            rows: maps outputs (n, ...) and targets to the (n, R) scalars that are differentiated.
            additive: sums over the R scalars are all that is wanted, so that these may come in parts
                too, the same rows several times.

        Yields:
            outputs (n, ...) without gradient, the rows' slice of the batch, and the pieces.

        Raises:
            InvalidInput: one row alone exceeds `max_memory`, and its scalars may not come in parts.
        """
        count = batch_size(inputs)
        if not self._verified:
            self._verify(inputs, targets, rows)
        size, width = self._sizes(inputs, targets, rows, additive)
        for start in range(0, count, size):
            place = slice(start, min(start + size, count))
            yield from self._chunk(
                rows_of(inputs, place), None if targets is None else targets[place], rows, place, width
            )

    def _chunk(
        self, inputs: Any, targets: Tensor | None, rows: Rows, place: slice, width: int | None
    ) -> Iterator[tuple[Tensor, slice, list[Piece]]]:
        args, kwargs = call_arguments(inputs)
        with torch.enable_grad(), self._hooked() as calls:
            outputs = model_output(functional_call(self.model, self._leaves(), args, kwargs))
            scalars = rows(outputs, targets)
        n, total = scalars.shape
        final = self._final(outputs, calls) if rows is output_rows and width is None else None
        for first in range(0, total, width or total):
            part = slice(first, min(first + (width or total), total))
            if misplaced := [p for p, found in calls.found.items() if any(len(y) % n for _, y in found)]:
                for path in misplaced:  # its leading axis is not the rows
                    del self.layers[path]
                    del calls.found[path]
            pieces = [
                make_piece(self.model.get_submodule(path), self.layers[path], found, grads, n)
                for path, found, grads in self._gradients(scalars, part, calls, final)
            ]
            if self.others:
                pieces.append(self._other_piece(inputs, targets, rows, part))
            yield outputs.detach(), place, pieces

    def _gradients(
        self, scalars: Tensor, part: slice, calls: _Calls, final: str | None
    ) -> Iterator[tuple[str, list[Call], list[Tensor] | None]]:
        """Path, calls and the gradient (R, ...) of the summed rows in every call's output."""
        wanted = [(path, found) for path, found in calls.found.items() if path != final]
        ys = [y for _, found in wanted for _, y in found]
        if ys:
            n, total = scalars.shape
            unit = torch.eye(total, dtype=scalars.dtype, device=scalars.device)[part]
            vectors = unit[:, None].expand(-1, n, -1)
            grads = self._backward(scalars, ys, vectors)
            for path, found in wanted:
                own, grads = grads[: len(found)], grads[len(found) :]
                yield path, found, own
        if final is not None:
            yield final, calls.found[final], None

    def _backward(self, scalars: Tensor, ys: list[Tensor], vectors: Tensor) -> list[Tensor]:
        if not scalars.requires_grad:  # they depend on none of the parameters
            return [y.new_zeros(len(vectors), *y.shape) for y in ys]
        options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
        found: Iterable[Tensor | None]
        if self._batched_backward and len(vectors) > 1:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="There is a performance drop")
                    found = torch.autograd.grad(scalars, ys, vectors, is_grads_batched=True, **options)
                return [
                    g if g is not None else y.new_zeros(len(vectors), *y.shape) for g, y in zip(found, ys, strict=True)
                ]
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                self._batched_backward = False  # an operation's backward does not run under vmap
        each = [torch.autograd.grad(scalars, ys, vector, **options) for vector in vectors]
        return [torch.stack([torch.zeros_like(y) if g[k] is None else g[k] for g in each]) for k, y in enumerate(ys)]

    def _other_piece(self, inputs: Any, targets: Tensor | None, rows: Rows, part: slice) -> Piece:
        random, outputs = row_outputs(self.model, self.others)

        def scalars(theta: Parameters, row: Any, target: Tensor | None) -> Tensor:
            with_batch = outputs(theta, row).unsqueeze(0)
            return rows(with_batch, None if target is None else target.unsqueeze(0))[0, part]

        if self._together:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="There is a performance drop")
                    places = (None, 0, None if targets is None else 0)
                    return DensePiece(vmap(jacrev(scalars), in_dims=places)(random, inputs, targets))
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError):
                self._together = False  # the model branches on its data, or an operation does not run under vmap
        leaves = {name: value.requires_grad_() for name, value in random.items()}
        each = []
        for k in range(batch_size(inputs)):
            row = pytree.tree_map(lambda t, k=k: t[k] if isinstance(t, Tensor) else t, inputs)
            with torch.enable_grad():
                wanted = scalars(leaves, row, None if targets is None else targets[k])
            grads = [_gradient(one, leaves) for one in wanted]
            each.append([torch.stack(found) for found in zip(*grads, strict=True)])
        return DensePiece(
            {name: torch.stack(found) for name, found in zip(leaves, zip(*each, strict=True), strict=True)}
        )

    def _final(self, outputs: Tensor, calls: _Calls) -> str | None:
        """The linear layer whose result is the output itself, if its gradient in the output is the identity."""
        for path, results in calls.returned.items():
            layer = self.model.get_submodule(path)
            unchanged = len(results) == 1 and results[0] is outputs and not outputs._version
            if unchanged and outputs.dim() == 2 and isinstance(layer, nn.Linear):
                return path
        return None

    def _leaves(self) -> Parameters:
        taken = {name for own in self.layers.values() for name in own.values()}
        return {name: value.requires_grad_() for name, value in self._random.items() if name in taken}

    @contextmanager
    def _hooked(self) -> Iterator[_Calls]:
        calls, handles = _Calls(), []
        for path in self.layers:

            def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor, path: str = path) -> Tensor:  # noqa: ARG001
                given = args[0] if args else kwargs["input"]
                result = output.clone()  # so that a later change in place leaves the gradient in y alone
                calls.found.setdefault(path, []).append((given.detach(), output))
                calls.returned.setdefault(path, []).append(result)
                return result

            handles.append(self.model.get_submodule(path).register_forward_hook(hook, with_kwargs=True))
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()

    @torch.enable_grad()
    def _verify(self, inputs: Any, targets: Tensor | None, rows: Rows) -> None:
        """Hand to `others` whatever a layer does not answer for, by the gradients of two rows."""
        count = batch_size(inputs)
        place = torch.tensor([0, count - 1])  # one row alone is taken twice, and does not settle it
        few = pytree.tree_map(lambda t: t[place.to(t.device)] if isinstance(t, Tensor) else t, inputs)
        few_targets = None if targets is None else targets[place.to(targets.device)]
        args, kwargs = call_arguments(few)
        leaves = self._leaves()
        with torch.enable_grad(), self._hooked() as calls:
            outputs = model_output(functional_call(self.model, leaves, args, kwargs))
            scalars = rows(outputs, few_targets)
            weight = torch.linspace(0.5, 1.5, scalars.shape[1], dtype=scalars.dtype, device=scalars.device)
            mixed = scalars @ weight
        for path in [path for path in self.layers if path not in calls.found]:
            del self.layers[path]
        ys = [y for found in calls.found.values() for _, y in found]
        if ys:
            truth = [dict(zip(leaves, _gradient(one, leaves), strict=True)) for one in mixed]
            # A gradient may be zero but for rounding, as that of a key's bias in attention.
            negligible = [1e-6 * float(torch.stack([g.norm() for g in true.values()]).norm()) for true in truth]
            own = self._backward(mixed[:, None], ys, torch.ones_like(mixed)[None, :, None])
            for path, found in calls.found.items():
                grads, own = own[: len(found)], own[len(found) :]
                self._keep(path, self._agreeing(path, found, grads, truth, negligible))
        self._verified = count > 1

    def _agreeing(
        self, path: str, found: list[Call], grads: list[Tensor], truth: list[Parameters], negligible: list[float]
    ) -> dict[str, str]:
        """The parameters of a layer whose blocks are what autograd says of two rows."""
        own = self.layers[path]
        if any(y.shape[0] % 2 for _, y in found):
            return {}
        blocks = dense(make_piece(self.model.get_submodule(path), own, found, grads, 2))
        tolerance = 1e-3 if grads[0].dtype in (torch.float32, torch.float64) else 0.1
        agreeing = dict(own)
        for row, true in enumerate(truth):
            for key, name in own.items():
                error = float((true[name] - blocks[name][row, 0]).norm())
                if error > tolerance * float(true[name].norm()) + negligible[row]:  # NaN passes
                    agreeing.pop(key, None)
        return agreeing

    def _keep(self, path: str, names: dict[str, str]) -> None:
        if names:
            self.layers[path] = names
        else:
            del self.layers[path]

    def _sizes(self, inputs: Any, targets: Tensor | None, rows: Rows, additive: bool) -> tuple[int, int | None]:
        """How many rows at a time, and how many of their scalars (None: all).

        Raises:
            InvalidInput: one row is too much.
        """
        one = rows_of(inputs, slice(0, 1))
        args, kwargs = call_arguments(one)
        with torch.enable_grad(), self._hooked() as calls:  # with gradients on, as layers take other paths without
            outputs = model_output(functional_call(self.model, self._leaves(), args, kwargs))
            total = rows(outputs, None if targets is None else targets[:1]).shape[1]
        final = self._final(outputs, calls) if rows is output_rows else None
        size = outputs.element_size()
        kept = sum(given.numel() for found in calls.found.values() for given, _ in found)
        flowing = sum(y.numel() for path, found in calls.found.items() if path != final for _, y in found)
        kept += sum(unfolded_size(self.model.get_submodule(p), y) for p, found in calls.found.items() for _, y in found)
        positions = {path: sum(y.numel() // y.shape[-1] for _, y in found) for path, found in calls.found.items()}
        blocks = [
            sum(self._random[name].numel() for name in self.layers[path].values())
            for path in calls.found
            if positions[path] > 1
        ]
        other = sum(self._random[name].numel() for name in self.others)
        fixed = size * 2 * kept
        per_scalar = size * (3 * flowing + 2 * max(blocks, default=0) + 2 * other)
        room = self.max_memory - fixed
        if per_scalar * total <= room or not per_scalar:
            return max(1, int(self.max_memory // max(1, fixed + per_scalar * total))), None
        if not additive:
            needed = (fixed + per_scalar * total) / 2**20
            msg = (
                f"the Jacobian of one row, {total} outputs, takes about {needed:,.0f} MiB, more than max_memory "
                f"({self.max_memory / 2**20:,.0f} MiB). Raise max_memory, choose fewer parameters (names=), or draw "
                f"samples (n_samples=)"
            )
            raise InvalidInput(msg)
        return 1, max(1, int(room // per_scalar))


def _layers(model: nn.Module, names: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """By module path, the wanted parameters of layers with a block of their own: {"weight": name, "bias": name}."""
    owners: dict[int, list[tuple[str, str]]] = {}
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((path, key))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    layers: dict[str, dict[str, str]] = {}
    for name in names:
        owning = owners[id(parameters[name])]
        path, key = owning[0]
        if len(owning) == 1 and key in ("weight", "bias") and has_block(model.get_submodule(path)):
            layers.setdefault(path, {})[key] = name
    return layers


def _gradient(scalar: Tensor, leaves: Parameters) -> tuple[Tensor, ...]:
    """The gradient in every leaf, zero where the scalar does not depend on it."""
    if not scalar.requires_grad:
        return tuple(torch.zeros_like(leaf) for leaf in leaves.values())
    return torch.autograd.grad(scalar, list(leaves.values()), retain_graph=True, materialize_grads=True)
