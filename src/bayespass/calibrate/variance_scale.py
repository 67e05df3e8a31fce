"""Per-site variance scales: the light calibration of the single pass.

One factor per site brings the propagated variance to that of a small Monte-Carlo reference on
unlabelled inputs. Sites are fitted in execution order, each with the factors before it in force,
by matching the mean logarithm of the variance:

    a_site = exp( mean over entries [ log v_MC - log v_propagated ] )

No labels and no gradients. Fitting scales by label likelihood drives them to zero whenever the
mean network is already calibrated; for labels there is one temperature, afterwards.

Source: single_pass notes 3.7.
"""

import math
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from bayespass.approximation import FAITHFUL, Approximation
from bayespass.batches import call_arguments, device_of, input_batches
from bayespass.calibrate.output_variance import OutputVariance
from bayespass.errors import InvalidInput
from bayespass.gaussian import GaussianTensor, read
from bayespass.posterior import store
from bayespass.posterior.base import Posterior
from bayespass.predict.propagation import SinglePass, scale_output, sites
from bayespass.predict.sampling import in_single_precision
from bayespass.predict.snapshot import place, snapshot
from bayespass.progress import track


class VarianceScales(Mapping[str, float]):
    """Variance factor by site, a read-only mapping, with what it was fitted for.

    Args:
        factors: path of the site to factor > 0.
        approximation: name of the approximation they belong to.
        standard_errors: of log factors over batches, by path; NaN for one batch.
        dampings: path of the site to d of the mean's correction m exp(-d r), where r is the variance
            relative to the second moment; none by default, see `distill`.
        output: the correction of the output's variance; none by default.
    """

    def __init__(
        self,
        factors: Mapping[str, float],
        approximation: str,
        standard_errors: Mapping[str, float] | None = None,
        dampings: Mapping[str, float] | None = None,
        output: OutputVariance | None = None,
    ) -> None:
        self._factors = dict(factors)
        self.approximation = approximation
        self.standard_errors = dict(standard_errors or {})
        self.dampings = dict(dampings or {})
        self.output = output

    def __getitem__(self, path: str) -> float:
        return self._factors[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)

    def __repr__(self) -> str:
        return f"VarianceScales({self.approximation}; {self.described()})"

    def described(self) -> str:
        """Every site's factor, then the dampings if there are any, in one line."""
        shown = _listed(self) or "no site scaled"
        return f"{shown}; dampings {_listed(self.dampings)}" if self.dampings else shown


def fit_scales(
    model: nn.Module,
    posterior: Posterior,
    loader: Iterable[Any] | Tensor,
    approximation: Approximation | str = FAITHFUL,
    n_samples: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> VarianceScales:
    """Fit one variance factor per site to Monte Carlo on unlabelled inputs.

    Every batch is propagated once and sampled `n_samples` times; a few hundred inputs that the
    network has not memorised are enough. Targets, where batches have them, are not read.

    Args:
        model: in eval mode.
        posterior: over any subset of its parameters.
        loader: batches of inputs, or one batch. As everywhere, a pair is (inputs, targets): a model
            with two positional arguments needs batches of ((first, second),) or dicts.
        approximation: the approximation to calibrate.
        n_samples: Monte-Carlo draws per batch, at least 10.
        seed: of the draws.
        progress: show a progress bar.

    Returns:
        factors by site, for `SinglePass(..., scales=...)` and `posterior.save(..., scales=...)`.

    Raises:
        InvalidInput: fewer than 10 samples, or no batch.
    """
    if n_samples < 10:
        msg = f"n_samples must be at least 10 to measure variances; got {n_samples}"
        raise InvalidInput(msg)
    single_pass = SinglePass(model, posterior, approximation)
    reference = _SiteMoments(model, posterior)
    logs: dict[str, list[float]] = defaultdict(list)
    with torch.inference_mode():
        for inputs in track(input_batches(loader, device_of(model)), "calibration", show=progress):
            args, kwargs = call_arguments(inputs)
            measured = reference.log_variances(args, kwargs, n_samples, seed)
            for path, value in _match(single_pass, args, kwargs, measured).items():
                logs[path].append(value)
    factors = {path: math.exp(sum(values) / len(values)) for path, values in logs.items()}
    errors = {path: _standard_error(values) for path, values in logs.items()}
    return VarianceScales(factors, single_pass.approximation.name, errors)


def load_scales(path: str | os.PathLike[str]) -> VarianceScales | None:
    """The scales that were saved with a posterior; None when there are none.

    Args:
        path: a posterior file.

    Raises:
        FileNotFoundError: there is no such file.
        InvalidPosteriorFile: the file is damaged or foreign.
    """
    saved = store.read(path)[1].get("scales")
    if saved is None:
        return None
    output = saved.get("output")
    return VarianceScales(
        saved["factors"],
        saved["approximation"],
        dampings=saved.get("dampings"),
        output=None if output is None else OutputVariance.from_dict(output),
    )


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{path or '(output)'}: {value:.3g}" for path, value in values.items())


class _Running:
    """Running mean and sum of squared deviations of one site call's tensors."""

    def __init__(self, path: str, leaves: list[Tensor]) -> None:
        self.path = path
        self.means = [leaf.clone() for leaf in leaves]
        self.squares = [torch.zeros_like(leaf) for leaf in leaves]

    def add(self, leaves: list[Tensor], count: int) -> None:
        """Take draw number `count`, counted from 1."""
        for mean, square, leaf in zip(self.means, self.squares, leaves, strict=True):
            gap = leaf - mean
            mean += gap / count
            square += gap * (leaf - mean)


class _SiteMoments:
    """Monte-Carlo log variances of every site's output, recorded by the hooks of the sites."""

    def __init__(self, model: nn.Module, posterior: Posterior) -> None:
        self.model = snapshot(model, posterior)
        self.posterior = posterior
        self._runs: list[_Running] = []
        self._draw, self._position = 0, 0
        for path in sites(self.model, posterior.names):
            self.model.get_submodule(path).register_forward_hook(self._recorder(path))

    def _recorder(self, path: str) -> Any:
        def record(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
            # Taken at once: a later in-place operation may change them.
            leaves = [in_single_precision(leaf) for leaf in _floating_leaves(output)]
            if self._draw == 1:
                self._runs.append(_Running(path, leaves))
            else:
                self._runs[self._position].add(leaves, self._draw)
            self._position += 1

        return record

    def log_variances(self, args: Any, kwargs: Any, n_samples: int, seed: int) -> list[tuple[str, list[Tensor]]]:
        """For each site call in order: log of the unbiased variance per entry, bias of the log removed."""
        self._runs = []
        for index, draw in enumerate(self.posterior.sample(n_samples, seed), start=1):
            self._draw, self._position = index, 0
            functional_call(self.model, place(draw, self.model), args, kwargs)
        half = torch.tensor((n_samples - 1) / 2, dtype=torch.float64)
        bias = float(torch.special.digamma(half) - half.log())  # E log(chi2 / dof)
        return [(run.path, [(square / (n_samples - 1)).log() - bias for square in run.squares]) for run in self._runs]


def _match(
    single_pass: SinglePass, args: Any, kwargs: Any, measured: list[tuple[str, list[Tensor]]]
) -> dict[str, float]:
    """Log factors of one batch; each site is scaled on the spot, so later sites see it in force."""
    logs: dict[str, list[float]] = defaultdict(list)
    expected = iter(measured)

    def at_site(path: str, output: Any) -> Any:
        measured_path, targets = next(expected)
        if measured_path != path:
            msg = f"site {path!r} ran where Monte Carlo ran {measured_path!r}; the model's control flow is random"
            raise InvalidInput(msg)
        gaps = [
            (target - read(leaf).var.to(target.dtype).log())  # type: ignore[union-attr]
            for leaf, target in zip(_floating_leaves(output), targets, strict=True)
            if isinstance(leaf, GaussianTensor)
        ]
        finite = [gap[torch.isfinite(gap)] for gap in gaps]
        if not finite or sum(gap.numel() for gap in finite) == 0:
            return output
        value = float(torch.cat([gap.flatten() for gap in finite]).mean())
        logs[path].append(value)
        return scale_output(output, math.exp(value), single_pass.approximation)

    single_pass._site_hook = at_site
    try:
        single_pass.moments(*args, **kwargs)
    finally:
        single_pass._site_hook = None
    return {path: sum(values) / len(values) for path, values in logs.items()}


def _floating_leaves(output: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def _standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
