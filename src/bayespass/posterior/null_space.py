"""Null-space posteriors: uncertainty only where the training outputs do not feel it.

Linearise the trained network, f(theta) ~ f(theta*) + J (theta - theta*). Displacements from
N(0, P / alpha) with P = I - J^T (J J^T)^+ J leave every training output as it is, so that the linearised
predictive cannot underfit, and vary everything else as much as the prior allows. The same solver makes
samples of two more Gaussians:

    "null"        d = alpha^-1/2 P eps
    "ridge_null"  d = alpha^-1/2 delta (J^T J + delta)^-1 eps: the kernel up to directions of J weaker than
                  sqrt(delta), which is all there is where rows outnumber parameters
    "laplace"     d ~ N(0, (M^T M + alpha)^-1), M = H^(1/2) J: the linearised Laplace posterior itself, by
                  projecting (eps, eta) onto the kernel of [M, sqrt(alpha) I] (Matheron's rule)

Predict with the linearised network: sampled networks leave the region where these draws mean anything.

Source: Miani, Roy and Hauberg 2025 (arXiv 2410.16901); samples of Laplace: Antoran et al. 2022 (arXiv 2210.04994).
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from bayespass.batches import labelled_batches
from bayespass.curvature.layers import DEFAULT_MEMORY
from bayespass.curvature.operator import RowOperator
from bayespass.curvature.output import Rows, output_rows
from bayespass.curvature.projection import Projection, SolverName, plan, project
from bayespass.curvature.row_blocks import Block, RowKind, shuffled_blocks
from bayespass.errors import InvalidInput, NotFitted, require_count, require_positive
from bayespass.likelihood import Likelihood, SigmaNoise, check_likelihood, check_targets
from bayespass.posterior.base import PosteriorInfo
from bayespass.posterior.precision_search import search_precision
from bayespass.posterior.prior_tuning import PriorTuning
from bayespass.posterior.sampled_gaussian import SampledGaussian
from bayespass.posterior.selection import select_parameters
from bayespass.predict.snapshot import check_eval, snapshot

Kind = Literal["null", "ridge_null", "laplace"]
DEFAULT_GRID = tuple(10 ** (k / 8) for k in range(-32, 49))  # 1e-4 to 1e6
RIDGE = 1e-4  # of the mean squared length of a row of J
METHODS = {"null": "null_space", "ridge_null": "ridge_null", "laplace": "linearised_laplace"}
REPORTED = 1000  # training data whose outputs' spread is reported


@dataclass(frozen=True)
class NullSpaceReport:
    """What was fitted, and how well.

    Args:
        method: "null_space", "ridge_null" or "linearised_laplace".
        solver: that ran.
        residual: |J d| / |J eps| over all rows.
        converged: it is within the tolerance.
        epochs: passes over the data.
        n_rows: R, rows of J.
        n_params: P.
        ridge: delta, or alpha for "linearised_laplace"; 0 for none.
        rank: directions that the data take away, tr of I - P.
        rank_error: None where the rank is exact; otherwise the standard error of Hutchinson's estimate
            P - mean <eps, d>, a small difference of large numbers that comes out too small in addition
            where the projection has not converged.
        prior_precision: alpha at present.
        train_logit_sd: root mean square of J d over training outputs (1,000 data at most), at that alpha.
        val_logit_sd: the same over the held-out data of `optimize_prior_precision`; None before.
    """

    method: str
    solver: str
    residual: float
    converged: bool
    epochs: int
    n_rows: int
    n_params: int
    ridge: float
    rank: float
    rank_error: float | None
    prior_precision: float
    train_logit_sd: float
    val_logit_sd: float | None


class NullSpace:
    """Samples of a null-space posterior at the model's present weights.

        method = NullSpace(model, likelihood="classification").fit(train_loader)
        method.optimize_prior_precision(val_loader)
        posterior = method.posterior()

    `fit` holds all training data at once, and `n_samples` vectors of the parameters several times.

    Args:
        model: trained, in eval mode, float32 or float64; not modified.
        likelihood: "classification" or "regression".
        sigma_noise: sd of the observation noise, or "predicted" where the network outputs (mean, log
            variance), for regression.
        rows: what stays fixed: all "outputs" (default); the "loss" of every datum, a weaker promise for
            large outputs, and next to none where the network fits its data perfectly; `n_projections`
            "random" signed sums of every datum's outputs; "curvature", H^(1/2) times outputs; or a function
            of (outputs, targets) returning (n, R). For kind="laplace" it is "curvature" (the generalised
            Gauss-Newton matrix, default) or "loss" (the empirical Fisher).
        kind: "null", "ridge_null" or "laplace", see above.
        ridge: delta of "ridge_null"; by default 1e-4 of the mean squared length of a row of J.
        prior_precision: alpha.
        names: random parameters, a list or a predicate; by default all that require gradients.
        n_samples: S.
        solver: see `bayespass.curvature.projection`.
        tolerance: of the residual; by default 1e-3 for the direct solver and 1e-2 for those that iterate.
        max_epochs: passes over the data at most.
        max_memory: bytes for matrices and factors.
        n_projections: for rows="random".
        prior_scale: sd of the prior by parameter name, in units of alpha^-1/2, 1 for names left out:
            d = Lambda^1/2 P(J Lambda^1/2) xi.
        seed: of the samples and of the data's order.

    Raises:
        InvalidInput: a value outside its range, or a model in training mode.

    Source: Miani, Roy and Hauberg 2025 (arXiv 2410.16901).
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood = "classification",
        sigma_noise: SigmaNoise | None = None,
        rows: RowKind | Rows | None = None,
        kind: Kind = "null",
        ridge: float | None = None,
        prior_precision: float = 1.0,
        names: Iterable[str] | Callable[[str], bool] | None = None,
        n_samples: int = 32,
        solver: SolverName = "auto",
        tolerance: float | None = None,
        max_epochs: int = 500,
        max_memory: int = DEFAULT_MEMORY,
        n_projections: int | None = None,
        prior_scale: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        check_likelihood(likelihood, sigma_noise)
        check_eval(model)
        if kind not in get_args(Kind):
            msg = f"kind must be 'null', 'ridge_null' or 'laplace'; got {kind!r}"
            raise InvalidInput(msg)
        if kind == "laplace" and rows not in (None, "curvature", "loss"):
            msg = f"kind='laplace' takes rows='curvature' or 'loss'; got {rows!r}"
            raise InvalidInput(msg)
        if solver not in get_args(SolverName):
            msg = f"solver must be one of {', '.join(map(repr, get_args(SolverName)))}; got {solver!r}"
            raise InvalidInput(msg)
        if ridge is not None and kind != "ridge_null":
            msg = f"ridge belongs to kind='ridge_null'; got {ridge!r} with {kind!r}"
            raise InvalidInput(msg)
        given = {"ridge": ridge, "tolerance": tolerance, "prior_precision": prior_precision}
        require_positive(**{name: value for name, value in given.items() if value is not None})
        require_count(n_samples=n_samples, max_epochs=max_epochs, max_memory=max_memory)
        self.model, self.kind, self.ridge = model, kind, ridge
        self.likelihood: Likelihood = likelihood
        self.sigma_noise: SigmaNoise | None = sigma_noise
        self.rows: RowKind | Rows = rows or ("curvature" if kind == "laplace" else "outputs")
        self.prior_precision, self.n_samples = float(prior_precision), n_samples
        self.solver: SolverName = solver
        self.tolerance, self.max_epochs, self.max_memory = tolerance, max_epochs, max_memory
        self.n_projections, self.seed = n_projections, seed
        self.names = tuple(name for name, _ in select_parameters(model, "all" if names is None else names))
        self.prior_scale = dict(prior_scale or {})
        if unknown := set(self.prior_scale) - set(self.names):
            msg = f"prior_scale names {', '.join(sorted(unknown)[:3])}, which is no random parameter; see names"
            raise InvalidInput(msg)
        require_positive(**{f"prior_scale of {name}": value for name, value in self.prior_scale.items()})
        self.mean_: dict[str, Tensor] = {}
        self.displacements_: dict[str, Tensor] = {}
        self.projection_: Projection | None = None
        self.n_data_ = 0

    @torch.inference_mode(mode=False)
    def fit(
        self, train_loader: Iterable[Any], checkpoint: str | Path | None = None, progress: bool = False
    ) -> "NullSpace":
        """Draw and project the samples; keeps no data.

        Args:
            train_loader: yields (inputs, targets), un-augmented.
            checkpoint: a file to write on the way, and to continue from if it is there.
            progress: show a bar with the residual.

        Returns:
            itself.

        Raises:
            InvalidInput: an empty loader, targets that do not fit, weights in half precision, or a
                checkpoint of another run.

        Warns:
            UserWarning: the projection stopped above its tolerance, or kind="null" became a ridge filter
                because rows outnumber parameters.
        """
        check_eval(self.model)
        blocks = shuffled_blocks(train_loader, REPORTED, self.seed)
        plain = self._operator(self.model, blocks, self.rows)
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(self.n_samples, plain.n_params, generator=generator, dtype=plain.dtype).to(plain.device)
        self._kind, ridge = self._chosen_ridge(plain, noise)
        solver, size = plan(plain, self.solver, self.max_memory)
        operator = plain.resized(size, ridge)
        vectors = torch.zeros(self.n_samples, operator.width, dtype=plain.dtype, device=plain.device)
        vectors[:, : plain.n_params] = noise
        if self._kind == "laplace":
            beside = torch.randn(self.n_samples, plain.n_rows, generator=generator, dtype=plain.dtype)
            vectors[:, plain.n_params :] = beside.to(plain.device)
        tolerance = self.tolerance or (1e-3 if solver == "direct" else 1e-2)
        limits = {"max_epochs": self.max_epochs, "max_memory": self.max_memory, "seed": self.seed}
        found = project(operator, vectors, solver, tolerance, checkpoint=checkpoint, progress=progress, **limits)
        self.projection_, self._ridge = found, ridge
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self.mean_ = {name: parameters[name].detach().clone() for name in self.names}
        self.displacements_ = {name: value.clone() for name, value in operator.unflatten(found.vectors).items()}
        self.n_data_, self._n_rows, self._n_params = operator.n_data, operator.n_rows, operator.n_params
        self._n_fixed, self._rank_error = self._rank(found, noise)
        self._train_sd = _root_mean_square(self._moved(self.model, blocks[:1])[1])
        self._val_sd: float | None = None
        return self

    def posterior(self, prior_precision: float | None = None) -> SampledGaussian:
        """The stored draws around the weights at `fit`, at the tuned or the given prior precision.

        Args:
            prior_precision: alpha; by default the present one. For kind="laplace" only that.

        Raises:
            NotFitted: before `fit`.
            NotImplementedError: another alpha for kind="laplace".
        """
        found = self._fitted()
        alpha = self.prior_precision if prior_precision is None else float(prior_precision)
        require_positive(prior_precision=alpha)
        if self._kind == "laplace" and alpha != self._ridge:
            raise NotImplementedError(_INSIDE)
        settings = {
            "solver": found.solver,
            "residual": found.residual,
            "epochs": found.epochs,
            "rows": self.rows if isinstance(self.rows, str) else "a function",
            "n_projections": self.n_projections,
            "n_rows": self._n_rows,
            "ridge": self._ridge,
            "n_samples": self.n_samples,
            "seed": self.seed,
        }
        info = PosteriorInfo(self.likelihood, self.n_data_, alpha, 1.0, self.sigma_noise, METHODS[self._kind], settings)
        return SampledGaussian(self.mean_, {n: d / alpha**0.5 for n, d in self.displacements_.items()}, info)

    @torch.inference_mode(mode=False)
    def optimize_prior_precision(self, val_loader: Iterable[Any], grid: Sequence[float] | None = None) -> PriorTuning:
        """Choose alpha by the held-out negative log-likelihood of the linearised predictive.

        The displacements are linear in alpha^-1/2, so J d is computed once for the held-out data and every
        alpha costs a rescaling. Each draw is used with both signs.

        Args:
            val_loader: held-out (inputs, targets).
            grid: values of alpha to try; by default 1e-4 to 1e6 in eighths of a decade.

        Returns:
            the search, with its verdict; `prior_precision` is set to the best.

        Raises:
            NotFitted: before `fit`.
            NotImplementedError: kind="laplace", whose alpha is inside the solve.
            InvalidInput: an empty or non-positive grid, or no held-out data.

        Warns:
            UserWarning: the best lies at an end of the grid, or does not beat the trained network or a
                temperature.
        """
        self._fitted()
        if self._kind == "laplace":
            raise NotImplementedError(_INSIDE)
        values = tuple(sorted(float(value) for value in (DEFAULT_GRID if grid is None else grid)))
        if not values or not all(0 < value < math.inf for value in values):
            msg = f"grid must hold positive, finite prior precisions; got {values}"
            raise InvalidInput(msg)
        model = snapshot(self.model, self.posterior())
        blocks = [(inputs, targets) for inputs, targets in labelled_batches(val_loader) if len(targets)]
        outputs, moved = self._moved(model, blocks)
        pairs = zip(outputs, blocks, strict=True)
        targets = [check_targets(f, y.to(f.device), self.likelihood, self.sigma_noise) for f, (_, y) in pairs]
        info = self.posterior().info
        tuning = search_precision(outputs, moved, targets, info, values)
        self.prior_precision, self._val_sd = tuning.best, _root_mean_square(moved)
        if tuning.at_edge or "does not beat" in tuning.verdict:
            warnings.warn(tuning.verdict, UserWarning, stacklevel=3)
        return tuning

    @property
    def report_(self) -> NullSpaceReport:
        """What was fitted and how well, at the present prior precision.

        Raises:
            NotFitted: before `fit`.
        """
        found = self._fitted()
        scale = self.prior_precision**-0.5
        solved = (found.solver, found.residual, found.converged, found.epochs)
        size = (self._n_rows, self._n_params, self._ridge, self._n_fixed, self._rank_error)
        spread = (self._train_sd * scale, None if self._val_sd is None else self._val_sd * scale)
        return NullSpaceReport(METHODS[self._kind], *solved, *size, self.prior_precision, *spread)

    @property
    def mackay_precision_(self) -> float:
        """gamma / |theta*|^2 with gamma the rank: the alpha of highest evidence, an upper bound to start from.

        It is usually much too large: validation asks for a hundredth of it on small networks. The reciprocal
        that the paper prints is far too small.

        Raises:
            NotFitted: before `fit`.

        Source: MacKay 1992.
        """
        self._fitted()
        square = sum(float((m.double() / self.prior_scale.get(n, 1.0)).square().sum()) for n, m in self.mean_.items())
        return self._n_fixed / square

    def _operator(
        self, model: nn.Module, blocks: Sequence[Block], rows: RowKind | Rows, scaled: bool = True
    ) -> RowOperator:
        return RowOperator(
            model,
            self.names,
            blocks,
            rows,
            self.likelihood,
            self.sigma_noise,
            n_projections=self.n_projections if rows == "random" else None,
            scale=self.prior_scale if scaled else None,
            seed=self.seed,
            max_memory=self.max_memory,
        )

    def _chosen_ridge(self, operator: RowOperator, noise: Tensor) -> tuple[Kind, float]:
        """The kind that is possible, and its ridge."""
        if self.kind == "laplace":
            return "laplace", self.prior_precision
        too_many = self.kind == "null" and operator.n_rows >= operator.n_params
        if self.kind == "null" and not too_many:
            return "null", 0.0
        ridge = self.ridge
        if ridge is None:
            square = sum(float(operator.times(b, noise).square().sum()) for b in range(len(operator.blocks)))
            ridge = RIDGE * square / (len(noise) * operator.n_rows) or RIDGE
        if too_many:
            msg = (
                f"{operator.n_rows} rows leave {operator.n_params} parameters no null space worth the name; this is "
                f"a ridge filter with ridge {ridge:.3g}, named 'ridge_null'. Ask for it with kind='ridge_null', or "
                f"take fewer rows: rows='loss' or 'random', fewer data"
            )
            warnings.warn(msg, UserWarning, stacklevel=4)
        return "ridge_null", ridge

    def _rank(self, found: Projection, noise: Tensor) -> tuple[float, float | None]:
        if found.rank is not None:
            return found.rank, None
        left = (noise.double() * found.vectors[:, : noise.shape[1]].double()).sum(1)
        error = float(left.std()) / len(left) ** 0.5 if len(left) > 1 else math.nan
        return noise.shape[1] - float(left.mean()), error

    def _moved(self, model: nn.Module, blocks: Sequence[Block]) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs (n, ...) and J d (S, n, ...) at alpha = 1 of every block."""
        operator = self._operator(model, blocks, output_rows, scaled=False)  # whose targets are not looked at
        vectors = operator.flatten(self.displacements_)
        outputs = [operator.outputs(block) for block in range(len(blocks))]
        moved = [operator.times(b, vectors).reshape(self.n_samples, *f.shape) for b, f in enumerate(outputs)]
        return outputs, moved

    def _fitted(self) -> Projection:
        if self.projection_ is None:
            msg = "NullSpace has no samples yet; call fit(train_loader) first"
            raise NotFitted(msg)
        return self.projection_


_INSIDE = (
    "with kind='laplace' the prior precision is inside the solve; fit NullSpace(..., kind='laplace', "
    "prior_precision=...) once for each value, or tune it with Laplace(...).optimize_prior_precision"
)


def _root_mean_square(parts: list[Tensor]) -> float:
    return float(torch.cat([part.flatten() for part in parts]).double().square().mean().sqrt())
