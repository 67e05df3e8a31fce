"""Kronecker factors of the curvature of linear layers and convolutions (KFAC), and the diagonal of all else.

For y_t = W a_t + b at positions t of a row (tokens, or the patches of a convolution) the block of W is
approximated by G kron A. With g_nrt the gradient in y_t of scalar r of row n, of which J^T J is the curvature:

    "expand"    A = mean_nt a_nt a_nt^T                     G = sum_nrt g_nrt g_nrt^T
    "reduce"    A = mean_n (mean_t a_nt)(mean_t a_nt)^T     G = sum_nr (sum_t g_nrt)(sum_t g_nrt)^T

They are one without positions. For networks of linear layers with a Gaussian likelihood "expand" is exact
where every position has a prediction of its own, and "reduce" where positions are averaged. Both are plain
sums over the data, so the split into batches does not matter. The bias has the block G, exact without
positions; its correlation with W is dropped. Calls of one layer are further positions.

Of norms, embeddings, grouped convolutions, recurrent cells, fused attention and weights that several layers
share, the diagonal is taken.

Source: Martens and Grosse 2015 (arXiv 1503.05671); Eschenhagen et al. 2023 (arXiv 2311.00636).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn

from bayespass.curvature.blocks import LinearPiece, Piece, squares
from bayespass.curvature.diagonal import Curvature, CurvaturePass
from bayespass.curvature.last_layer import Features
from bayespass.curvature.layers import DEFAULT_MEMORY
from bayespass.curvature.rows import Parameters
from bayespass.errors import InvalidInput
from bayespass.likelihood import Likelihood, SigmaNoise

KFACApprox = Literal["expand", "reduce"]


@dataclass(frozen=True)
class KroneckerFactors:
    """The block G kron A of one layer, without prior.

    Args:
        inputs: A (columns, columns), the mean of a a^T over rows and positions.
        outputs: G (rows, rows), the curvature in y summed over rows and positions.
        weight: the weight's name, None where only the bias is wanted.
        bias: the bias's name, None where there is none, or it is not wanted.
        transposed: the weight is (columns, rows), and its block A kron G.
    """

    inputs: Tensor
    outputs: Tensor
    weight: str | None = None
    bias: str | None = None
    transposed: bool = False


@dataclass
class _Sums:
    """A and G so far, and how many vectors A is of."""

    inputs: Tensor
    outputs: Tensor
    count: int = 0

    def add_inputs(self, inputs: Tensor) -> None:
        """Add the outer products of (m, k) vectors to A."""
        self.inputs.addmm_(inputs.mT, inputs)
        self.count += len(inputs)


Key = tuple[str | None, str | None, bool]  # weight, bias, transposed


def kfac(
    model: nn.Module,
    loader: Iterable[Any],
    names: tuple[str, ...],
    likelihood: Likelihood,
    sigma_noise: SigmaNoise | None = None,
    curvature: Curvature = "ggn",
    kfac_approx: KFACApprox = "expand",
    max_memory: int = DEFAULT_MEMORY,
    progress: bool = False,
    seed: int = 0,
) -> tuple[dict[str, KroneckerFactors], Parameters, float, int]:
    """Kronecker factors and diagonals of the curvature of the negative log-likelihood, in one pass.

    Args:
        model: in eval mode; rows of a batch must not interact.
        loader: yields (inputs, targets).
        names: parameters.
        likelihood: "classification" or "regression".
        sigma_noise: sd of the observation noise, or "predicted", for regression.
        curvature: "ggn" (exact curvature in the outputs: one backward pass per class or output of every
            position), "mc" (one backward pass, from targets drawn from the network's own predictive) or
            "ef" (empirical Fisher, from the observed targets).
        kfac_approx: "expand" or "reduce", what positions of a row are.
        max_memory: bytes that one chunk of rows may take, roughly.
        progress: show a progress bar.
        seed: of the drawn targets, for "mc".

    Returns:
        factors by module path (float32 or better), the diagonal (float32) by name of the parameters
        without factors, the summed negative log-likelihood in nats, and the number of rows N.

    Raises:
        InvalidInput: an unknown curvature or kfac_approx, an empty loader, or targets that do not fit.
    """
    if kfac_approx not in get_args(KFACApprox):
        msg = f"kfac_approx must be 'expand' or 'reduce'; got {kfac_approx!r}"
        raise InvalidInput(msg)
    one = CurvaturePass(model, names, likelihood, sigma_noise, curvature, max_memory, seed)
    sums: dict[Key, _Sums] = {}
    diagonal: Parameters = {}
    for pieces, new in one.pieces(loader, progress, last_layer=True):
        for piece in pieces:
            if isinstance(piece, Features):
                own = _sums_of(sums, (piece.weight, piece.bias, False), piece.inputs, piece.outputs)
                own.add_inputs(piece.inputs)
                own.outputs += piece.curvature(likelihood, sigma_noise)
            elif isinstance(piece, LinearPiece) and has_factors(piece):
                inputs, grads = _positions(piece, kfac_approx)
                own = _sums_of(sums, (piece.weight, piece.bias, piece.transposed), inputs, grads)
                if new:
                    own.add_inputs(inputs)
                own.outputs.addmm_(grads.mT, grads)
            else:
                for name, value in squares(piece).items():
                    diagonal[name] = diagonal[name] + value.float() if name in diagonal else value.float()
    factors = {
        (weight or bias or "").rpartition(".")[0]: KroneckerFactors(
            own.inputs / own.count, own.outputs, weight, bias, transposed
        )
        for (weight, bias, transposed), own in sums.items()
    }
    return factors, diagonal, one.loss, one.n_data


def has_factors(piece: Piece) -> bool:
    """Whether the block is a linear layer's: one weight matrix applied to vectors."""
    return isinstance(piece, LinearPiece) and piece.inputs.shape[2] == 1


def _positions(piece: LinearPiece, kfac_approx: KFACApprox) -> tuple[Tensor, Tensor]:
    """The vectors a (m, k) and g (l, c) whose outer products are averaged and summed."""
    assert piece.grads is not None  # only plain outputs have the identity there
    inputs, grads = piece.inputs[:, :, 0], piece.grads[:, :, :, 0]  # (n, T, k), (n, R, T, c)
    if kfac_approx == "reduce":
        inputs, grads = inputs.mean(1, keepdim=True), grads.sum(2, keepdim=True)
    return inputs.flatten(0, 1), grads.flatten(0, 2)


def _sums_of(sums: dict[Key, _Sums], key: Key, inputs: Tensor, outputs: Tensor) -> _Sums:
    """The layer's sums, zero at first."""
    if key not in sums:
        k, c = inputs.shape[1], outputs.shape[1]
        sums[key] = _Sums(inputs.new_zeros(k, k), outputs.new_zeros(c, c))
    return sums[key]
