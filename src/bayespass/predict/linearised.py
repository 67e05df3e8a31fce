"""The linearised network f(x; mean) + J(x) (theta - mean) as a predictor.

It is the model that a Laplace approximation of the Gauss-Newton kind is exact for, and the only one in which
draws far from the mean, as of a null space, keep their meaning. Its outputs are Gaussian where the posterior
is, with covariance J Sigma J^T.

Source: Immer, Korzepa and Bauer 2021 (arXiv 2008.08711); null_space notes 1.5.
"""

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bayespass.batches import rows_of
from bayespass.curvature.forms import closed_forms, is_symmetric, sum_of
from bayespass.curvature.layers import DEFAULT_MEMORY
from bayespass.curvature.pushforward import OutputCovariance, RowCovariance, layer_paths, outputs_of
from bayespass.errors import InvalidInput, require_count, require_positive
from bayespass.likelihood import mean_and_log_variance
from bayespass.link import SOBOL_CLASSES, Link, correlated_softmax_link, softmax_link
from bayespass.posterior.base import Posterior
from bayespass.predict.snapshot import check_eval, snapshot
from bayespass.prediction import ClassificationPrediction, Prediction, concatenate, regression_prediction

Covariance = Literal["auto", "full", "marginal", "samples"]

EXACT_OUTPUTS = 128  # beyond as many per row, draws cost less than a backward pass for every output
HALF = (torch.float16, torch.bfloat16)
METHOD = "linearised"


class Linearised(nn.Module):
    """Mean, variance and probabilities of the network linearised at the posterior mean.

    Args:
        model: any `nn.Module` in eval mode; it is copied, never modified. Rows of a batch must not interact.
            A half-precision model is computed in float32.
        posterior: over any subset of its parameters.
        n_samples: draws S, where the output covariance is not exact. Stored draws (`SampledGaussian`,
            `Empirical`) are all used.
        seed: of the draws. Every batch sees the same.
        covariance: of the outputs of a row,
            "full"      exact, J Sigma J^T;
            "marginal"  its diagonal alone, outputs taken as independent;
            "samples"   draws f + J d of the posterior;
            "auto"      exact for structures with a closed form and up to 128 outputs a row, or any number
                        where a last layer alone is random; draws otherwise.
        link: how Gaussian logits become probabilities: "auto" and "sobol" keep their correlation, the other
            links of `softmax_link` go by the marginals. Draws are averaged whatever the link.
        max_memory: bytes that one part of a batch may take, roughly.

    `forward` takes what the model takes and returns a `Prediction`: the mean is the network's own output.
    By draws, probabilities average softmax(f + J d) and softmax(f - J d) where the posterior is symmetric
    (every Gaussian): mirror images are exact draws too, and with them the odd terms of the error vanish. The
    variance is the mean of (J d)^2 about the known mean, with a relative standard error of sqrt(2 / S). With
    `sigma_noise="predicted"` the noise variance is E[exp(s)] of the linearised log variance s.

    Raises:
        PosteriorMismatch: posterior and model do not fit.
        InvalidInput: a value outside its range, a model in training mode, or an exact covariance of a
            posterior that only has draws.
    """

    def __init__(
        self,
        model: nn.Module,
        posterior: Posterior,
        n_samples: int = 64,
        seed: int = 0,
        covariance: Covariance = "auto",
        link: Link = "auto",
        max_memory: int = DEFAULT_MEMORY,
    ) -> None:
        super().__init__()
        require_count(n_samples=n_samples)
        require_positive(max_memory=max_memory)
        if covariance not in get_args(Covariance):
            msg = f"covariance must be one of {', '.join(map(repr, get_args(Covariance)))}; got {covariance!r}"
            raise InvalidInput(msg)
        if link not in get_args(Link):
            msg = f"link must be one of {', '.join(map(repr, get_args(Link)))}; got {link!r}"
            raise InvalidInput(msg)
        with torch.inference_mode(mode=False):
            exact = closed_forms(posterior) is not None
            self.model = in_single_precision(snapshot(model, posterior))
        if covariance in ("full", "marginal") and not exact:
            msg = (
                f"a posterior of kind {posterior.kind!r} has no closed covariance, only draws; "
                f"use covariance='samples' or 'auto'"
            )
            raise InvalidInput(msg)
        self.posterior = posterior
        self.info = posterior.info
        self.n_samples, self.seed, self.max_memory = n_samples, seed, max_memory
        self.structure: Covariance = covariance if exact or covariance != "auto" else "samples"
        self.link: Link = link
        self._computing: dict[bool, tuple[tuple[int, ...], OutputCovariance]] = {}
        self._widths: dict[str, tuple[int, bool]] = {}
        self._beyond = False
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Prediction:
        """The prediction for one batch, called as the model is called.

        Raises:
            InvalidInput: `covariance="full"` or `"marginal"`, and one row exceeds `max_memory`.
        """
        check_eval(self.model)
        with torch.inference_mode(mode=False):
            inputs = ordinary_inputs(self.model, args, kwargs)
            if not self._by_draws(inputs):
                try:
                    return self._predicted(inputs, by_draws=False)
                except InvalidInput:  # one row exceeds the memory
                    if self.structure != "auto":
                        raise
                    self._beyond = True
            return self._predicted(inputs, by_draws=True)

    def covariance(self, *args: Any, **kwargs: Any) -> Tensor:
        """J Sigma J^T (n, R, R) of the R outputs of every row, flattened in order; by draws where it is not exact.

        Raises:
            InvalidInput: one row exceeds `max_memory`.
        """
        check_eval(self.model)
        with torch.inference_mode(mode=False):
            inputs = ordinary_inputs(self.model, args, kwargs)
            pushed = self._pushed(self.structure == "samples")
            found = [(part.outputs, part.covariance()) for part in pushed.chunks(inputs, square=True)]
            return torch.cat([value.to(outputs.dtype) for outputs, value in found])

    def outputs(self, *args: Any, **kwargs: Any) -> Iterator[Tensor]:
        """The linearised output f + J d of every draw, mirror images after their originals.

        Yields:
            the output tensor, of the shape the model returns.
        """
        check_eval(self.model)
        with torch.inference_mode(mode=False):
            inputs = ordinary_inputs(self.model, args, kwargs)
            parts = list(self._pushed(by_draws=True).chunks(inputs))
            mean = torch.cat([part.outputs for part in parts])
            moved = torch.cat([part.moved for part in parts if part.moved is not None], 1).reshape(-1, *mean.shape)
        for gap in moved:
            yield mean + gap
            if is_symmetric(self.posterior):
                yield mean - gap

    def _by_draws(self, inputs: Any) -> bool:
        """Whether a batch goes by draws."""
        if self.structure != "auto" or self._beyond:
            return self.structure == "samples" or self._beyond
        width, free = self._outputs_of_a_row(inputs)
        return width > EXACT_OUTPUTS and not free

    def _outputs_of_a_row(self, inputs: Any) -> tuple[int, bool]:
        """R, and whether a last linear layer alone is random, so that no output needs a backward pass."""
        form = str([t.shape[1:] for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)])
        if form not in self._widths:
            paths, returned = layer_paths(self.posterior.names), []
            layer = self.model.get_submodule(paths[0])
            hook = layer.register_forward_hook(lambda module, args, output: returned.append(output))  # noqa: ARG005
            try:
                outputs = outputs_of(self.model, rows_of(inputs, slice(0, 1)))
            finally:
                hook.remove()
            last = len(paths) == 1 and isinstance(layer, nn.Linear) and outputs.dim() == 2
            self._widths[form] = (
                outputs.numel(),
                last and len(returned) == 1 and returned[0] is outputs and not outputs._version,
            )
        return self._widths[form]

    def _pushed(self, by_draws: bool) -> OutputCovariance:
        """The covariance in the outputs, made anew where the model was moved."""
        place = tuple(parameter.data_ptr() for parameter in self.model.parameters())
        known = self._computing.get(by_draws)
        if known is None or known[0] != place:
            made = OutputCovariance(self.model, self.posterior, self.max_memory, by_draws, self.n_samples, self.seed)
            known = self._computing[by_draws] = place, made
        return known[1]

    def _predicted(self, inputs: Any, by_draws: bool) -> Prediction:
        correlated = self.structure != "marginal" and self.link in ("auto", "sobol") and not by_draws
        square = correlated and self.info.likelihood == "classification" and not self._outputs_of_a_row(inputs)[1]
        found = [self._part(part, correlated) for part in self._pushed(by_draws).chunks(inputs, square=square)]
        return concatenate(found)  # type: ignore[type-var]

    def _part(self, part: RowCovariance, correlated: bool) -> Prediction:
        mean = part.outputs
        if part.moved is not None:
            return self._averaged(mean, part, part.moved.reshape(-1, *mean.shape))
        notes = (f"exact covariance of the linearised outputs, {'joint' if correlated else 'marginal'}",)
        if self.info.likelihood == "regression":
            variance = part.marginals().to(mean.dtype).reshape(mean.shape)
            return regression_prediction(mean, variance, self.info.sigma_noise, METHOD, notes)
        if not correlated or mean.shape[-1] > SOBOL_CLASSES:
            variance = part.marginals().to(mean.dtype).reshape(mean.shape)
            return ClassificationPrediction(softmax_link(mean, variance, self.link), mean, variance, METHOD, notes)
        shared = part.shared_root()
        if shared is not None:
            root, scale = (value.to(mean.dtype) for value in shared)
            variance = part.marginals().to(mean.dtype)
            return ClassificationPrediction(correlated_softmax_link(mean, root, scale), mean, variance, METHOD, notes)
        blocks = position_blocks(part.covariance(), mean).to(mean.dtype)
        variance = blocks.diagonal(dim1=-2, dim2=-1).clamp(min=0)
        probs = correlated_softmax_link(mean, covariance_root(blocks))
        return ClassificationPrediction(probs, mean, variance, METHOD, notes)

    def _averaged(self, mean: Tensor, part: RowCovariance, moved: Tensor) -> Prediction:
        """By draws J d (S, n, ...)."""
        signs = (1, -1) if is_symmetric(self.posterior) else (1,)
        notes = (f"{len(moved)} draws{' and their mirror images' if len(signs) > 1 else ''}, seed {self.seed}",)
        variance = part.marginals().reshape(mean.shape)
        transform = None
        if self.info.likelihood == "classification":
            transform = partial(torch.softmax, dim=-1)
        elif self.info.sigma_noise == "predicted":
            transform = _noise
        average = None
        if transform is not None:
            average = sum_of(transform(mean + sign * gap) for gap in moved for sign in signs) / (
                len(signs) * len(moved)
            )
        if self.info.likelihood == "regression":
            return regression_prediction(mean, variance, self.info.sigma_noise, METHOD, notes, average)
        assert average is not None
        return ClassificationPrediction(average, mean, variance, METHOD, notes)


def in_single_precision(model: nn.Module) -> nn.Module:
    """The model itself, its half-precision parameters and buffers made float32: derivatives need the digits."""
    half = any(value.dtype in HALF for value in (*model.parameters(), *model.buffers()))
    return model.float() if half else model


def ordinary_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call's arguments as one batch that can be differentiated: no inference tensors, nothing in half precision."""

    def ordinary(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.clone() if leaf.is_inference() else leaf.detach()
        return leaf.float() if leaf.dtype in HALF else leaf

    given: Any = args
    if kwargs:
        given = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs
    return pytree.tree_map(ordinary, given)


def position_blocks(covariance: Tensor, outputs: Tensor) -> Tensor:
    """(n, ..., C, C): of every position's outputs (n, ..., C), from the covariance (n, R, R) of all."""
    classes = outputs.shape[-1]
    positions = outputs[0].numel() // classes
    split = covariance.reshape(len(outputs), positions, classes, positions, classes)
    blocks = split.diagonal(dim1=1, dim2=3).movedim(-1, 1)  # (n, positions, C, C)
    return blocks.reshape(*outputs.shape, classes)


def covariance_root(covariance: Tensor) -> Tensor:
    """R (..., C, C) with covariance R R^T, columns by falling eigenvalue; NaN where the covariance is not finite."""
    finite = torch.isfinite(covariance).all(-1).all(-1)[..., None, None]
    values, vectors = torch.linalg.eigh(torch.where(finite, covariance, torch.zeros_like(covariance)))
    root = (vectors * values.clamp(min=0).sqrt()[..., None, :]).flip(-1)
    return torch.where(finite, root, torch.full_like(root, torch.nan))


def _noise(outputs: Tensor) -> Tensor:
    return mean_and_log_variance(outputs)[1].exp()
