"""Diagonal curvature from the per-row Jacobians of every layer, exact and matrix-free.

For a categorical likelihood the generalised Gauss-Newton matrix equals the Fisher matrix, J^T H J with
H = diag(p) - p p^T the curvature in the logits; for a Gaussian one H = I / sigma^2; for one whose network
predicts mean and log variance s the Fisher matrix of the two is diag(exp(-s), 1/2). With rows
H^(1/2) f the diagonal is the sum of J^2 over all rows. One target per row drawn from the network's own
predictive makes the same matrix in expectation for one backward pass instead of one per class. The
empirical Fisher uses the observed target instead and is another matrix (Kunstner, Balles and Hennig
2019, arXiv 1905.12558).

Source: Dangel, Kunstner and Hennig 2020 (arXiv 1912.10985).
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bayespass.batches import call_arguments, device_of, labelled_batches, model_output
from bayespass.curvature.blocks import DensePiece, EmbeddingPiece, Piece, squares
from bayespass.curvature.last_layer import Features, LastLayer
from bayespass.curvature.layers import DEFAULT_MEMORY, RowJacobian
from bayespass.curvature.output import Rows, curvature_rows, loss_rows
from bayespass.curvature.products import exact_products
from bayespass.curvature.rows import Parameters, drawn_targets
from bayespass.errors import InvalidInput
from bayespass.likelihood import Likelihood, SigmaNoise, check_targets, negative_log_likelihood
from bayespass.posterior.base import as_generator
from bayespass.progress import track

Curvature = Literal["ggn", "mc", "ef"]


class CurvaturePass:
    """One pass over the data: the pieces of J whose J^T J is the curvature of the negative log-likelihood.

    Args:
        model: in eval mode; rows of a batch must not interact.
        names: parameters to differentiate.
        likelihood: "classification" or "regression".
        sigma_noise: sd of the observation noise, or "predicted", for regression.
        curvature: "ggn", "mc" or "ef".
        max_memory: bytes that one chunk of rows may take, roughly.
        seed: of the drawn targets, for "mc".

    Raises:
        InvalidInput: an unknown curvature.
    """

    def __init__(
        self,
        model: nn.Module,
        names: tuple[str, ...],
        likelihood: Likelihood,
        sigma_noise: SigmaNoise | None = None,
        curvature: Curvature = "ggn",
        max_memory: int = DEFAULT_MEMORY,
        seed: int = 0,
    ) -> None:
        if curvature not in get_args(Curvature):
            msg = f"curvature must be one of {', '.join(map(repr, get_args(Curvature)))}; got {curvature!r}"
            raise InvalidInput(msg)
        self.model = model
        self.names = names
        self.likelihood: Likelihood = likelihood
        self.sigma_noise: SigmaNoise | None = sigma_noise
        self.curvature: Curvature = curvature
        self.jacobian = RowJacobian(model, names, max_memory)
        self.loss = 0.0
        self.n_data = 0
        self._verified = False
        self._generator = as_generator(seed, device_of(model))

    def pieces(
        self, loader: Iterable[Any], progress: bool = False, last_layer: bool = False
    ) -> Iterator[tuple[list[Piece | Features], bool]]:
        """The pieces of chunk after chunk; the loss and N are complete at the end.

        Args:
            loader: yields (inputs, targets).
            progress: show a progress bar.
            last_layer: where all parameters belong to a layer whose outputs are the model's, yield its
                `Features` in place of pieces ("ggn").

        Yields:
            the pieces, in float32 or better, and whether their rows are new: the scalars of the same rows
            may come in parts.

        Raises:
            InvalidInput: an empty loader, or targets that do not fit.
        """
        exact = self.curvature == "ggn"
        rows = (curvature_rows if exact else loss_rows)(self.likelihood, self.sigma_noise)
        last = LastLayer(self.model, self.names) if last_layer and exact else None
        for inputs, targets in track(labelled_batches(loader, device_of(self.model)), "curvature", show=progress):
            features = last.features(inputs) if last is not None else None
            if features is not None:
                self._count(features.outputs, targets)
                yield [features], True
                continue
            given = None if exact else self._targets(inputs, targets)
            found, start = [], -1
            with exact_products(self.model):
                if not self._verified:
                    self._verify(inputs, given, rows)
                for outputs, place, pieces in self.jacobian.chunks(inputs, given, rows, additive=True):
                    new, start = place.start != start, place.start
                    if new:
                        found.append(outputs)
                    yield [in_float32(piece) for piece in pieces], new
            if exact:
                self._count(torch.cat(found), targets)

    def _verify(self, inputs: Any, targets: Tensor | None, rows: Rows) -> None:
        """Let the Jacobian check its layers before the first sum, by two copies of a row if there is only one."""
        few = pytree.tree_map(lambda t: t[:2] if isinstance(t, Tensor) else t, inputs)
        targets = None if targets is None else targets[:2]
        if len(next(leaf for leaf in pytree.tree_leaves(few) if isinstance(leaf, Tensor))) == 1:
            few = pytree.tree_map(lambda t: torch.cat([t, t]) if isinstance(t, Tensor) else t, few)
            targets = None if targets is None else torch.cat([targets, targets])
        next(self.jacobian.chunks(few, targets, rows, additive=True))
        self._verified = True

    def _count(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The checked targets; adds their loss and their number."""
        targets = check_targets(outputs, targets, self.likelihood, self.sigma_noise)
        self.loss += float(negative_log_likelihood(outputs, targets, self.likelihood, self.sigma_noise))
        self.n_data += len(targets)
        return targets

    def _targets(self, inputs: Any, targets: Tensor) -> Tensor:
        """The observed targets, or drawn ones."""
        args, kwargs = call_arguments(inputs)
        with torch.no_grad():
            outputs = model_output(self.model(*args, **kwargs))
            targets = self._count(outputs, targets)
            if self.curvature == "ef":
                return targets
            return drawn_targets(outputs, self.likelihood, self.sigma_noise, self._generator)


def diagonal_curvature(
    model: nn.Module,
    loader: Iterable[Any],
    names: tuple[str, ...],
    likelihood: Likelihood,
    sigma_noise: SigmaNoise | None = None,
    curvature: Curvature = "ggn",
    max_memory: int = DEFAULT_MEMORY,
    progress: bool = False,
    seed: int = 0,
) -> tuple[Parameters, float, int]:
    """Diagonal of the curvature of the negative log-likelihood, summed over the data.

    Of a last layer, whose outputs are the model's, it is diag(H)^T phi^2 with phi the layer's inputs.

    Args:
        model: in eval mode; rows of a batch must not interact.
        loader: yields (inputs, targets).
        names: parameters to differentiate.
        likelihood: "classification" or "regression".
        sigma_noise: sd of the observation noise, or "predicted", for regression.
        curvature: "ggn" (exact, one backward pass per class or output), "mc" (type-I Fisher, MC: one
            target per row drawn from the network's own predictive, one backward pass; unbiased for
            "ggn", with noise that falls as 1 / sqrt(N) where rows are alike) or "ef" (empirical Fisher).
        max_memory: bytes that one chunk of rows may take, roughly.
        progress: show a progress bar.
        seed: of the drawn targets, for "mc"; equal seeds and equal batches give equal curvature.

    Returns:
        curvature by parameter name (float32, without prior), the summed negative log-likelihood
        in nats, and the number of rows N.

    Raises:
        InvalidInput: an unknown curvature, an empty loader, or targets that do not fit.

    Source: Kunstner, Balles and Hennig 2019 (arXiv 1905.12558).
    """
    one = CurvaturePass(model, names, likelihood, sigma_noise, curvature, max_memory, seed)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    totals = {name: torch.zeros_like(parameters[name], dtype=torch.float32) for name in names}
    for pieces, _ in one.pieces(loader, progress, last_layer=True):
        for piece in pieces:
            found = diagonal_of(piece, likelihood, sigma_noise) if isinstance(piece, Features) else squares(piece)
            for name, value in found.items():
                totals[name] += value.float()
    return totals, one.loss, one.n_data


def diagonal_of(features: Features, likelihood: Likelihood, sigma_noise: SigmaNoise | None) -> Parameters:
    """diag(H)^T phi^2 of a last layer's weight and diag(H) of its bias, summed over the rows, by name.

    Args:
        features: the layer's inputs and outputs.
        likelihood: "classification" or "regression".
        sigma_noise: sd of the observation noise, or "predicted", for regression.
    """
    weights = features.curvature_diagonals(likelihood, sigma_noise)
    found = {}
    if features.weight is not None:
        found[features.weight] = weights.mT @ features.inputs.square()
    if features.bias is not None:
        found[features.bias] = weights.sum(0)
    return found


def in_float32(piece: Piece) -> Piece:
    """The piece in float32 or better, for sums of squares."""

    def exact(value: Tensor) -> Tensor:
        return value.to(torch.promote_types(value.dtype, torch.float32))

    if isinstance(piece, DensePiece):
        return DensePiece({name: exact(block) for name, block in piece.blocks.items()})
    if isinstance(piece, EmbeddingPiece):
        return replace(piece, grads=exact(piece.grads))
    return replace(piece, inputs=exact(piece.inputs), grads=None if piece.grads is None else exact(piece.grads))
