"""The single pass: mean and variance of the output in one forward pass.

The user's model runs on Gaussian parameters through `torch.func.functional_call`; every operation
it calls is answered by a rule. The result is a `Prediction`.
"""

import inspect
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

import bayespass.rules  # noqa: F401  registers every rule
from bayespass.approximation import FAITHFUL, Approximation, named_approximation
from bayespass.batches import call_arguments, device_of, model_output
from bayespass.calibrate.output_variance import OutputVariance
from bayespass.errors import InvalidInput, MissingRule, UnsupportedOp
from bayespass.gaussian import Found, GaussianTensor, read, unwrap, wrap
from bayespass.link import Correlation, Link, softmax_link
from bayespass.moments import Moments, as_moments
from bayespass.posterior.base import Posterior
from bayespass.predict.snapshot import check_eval, snapshot
from bayespass.prediction import ClassificationPrediction, Prediction, regression_prediction
from bayespass.rules.registry import has_module_rule, module_rule_for

OUTPUT_SITE = ""
SiteHook = Callable[[str, Any], Any]


class SinglePass(nn.Module):
    """Mean and uncertainty of any model's output in one forward pass.

    Args:
        model: any `nn.Module` in eval mode; it is copied, never modified.
        posterior: over any subset of its parameters; others are deterministic.
        approximation: `"faithful"`, `"cvp"`, `"shared"`, `"streamlined"` or an `Approximation`.
        scales: variance factor per site (`VarianceScales`), see `fit_scales` and `distill`; their
            `dampings`, if they have any, correct the means, and their `output` the output's variance.
        link: how Gaussian logits become probabilities, see `softmax_link`.

    `forward` takes what the model takes and returns a `Prediction`. Weight moments are parameters
    and buffers of this module, so it moves, compiles and has a `state_dict` like any other. With
    `sigma_noise="predicted"` the noise variance is E[exp(s)] of a Gaussian log variance s, see
    `regression_prediction`.

    Raises:
        PosteriorMismatch: posterior and model do not fit.
        InvalidInput: the model is in training mode, a scale names no site or is not positive.

    Source: arXiv 2606.16214 (CVP), arXiv 2411.18425 (streamlining).
    """

    def __init__(
        self,
        model: nn.Module,
        posterior: Posterior,
        approximation: Approximation | str = FAITHFUL,
        scales: Mapping[str, float] | None = None,
        link: Link = "auto",
    ) -> None:
        super().__init__()
        self.approximation = named_approximation(approximation)
        self.info = posterior.info
        self.link: Link = link
        self.model = snapshot(model, posterior)
        self.names = posterior.names
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, variance in posterior.variance.items():
            like = parameters[name]
            dtype = torch.float32 if like.dtype == torch.float16 else like.dtype  # small variances need its range
            self.register_buffer(_buffer_name(name), variance.detach().to(like.device, dtype, copy=True))
        self.sites = sites(self.model, self.names)
        self.scales = _checked_scales(scales, self.sites, self.approximation)
        self.dampings = _checked_dampings(scales, self.sites)
        self.output_variance: OutputVariance | None = getattr(scales, "output", None)
        self._site_hook: SiteHook | None = None
        for path in self.sites:
            self.model.get_submodule(path).register_forward_hook(self._at_site(path))
        for module in self.model.modules():
            _take_whole(module, self.approximation)
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False  # a shortcut for padding that no rule can follow
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Prediction:
        """The prediction for one batch, called as the model is called."""
        mean, variance, correlation = self.correlated_moments(*args, **kwargs)
        corrected = f", {len(self.dampings)} damped" if self.dampings else ""
        notes = (*self.approximation.drops, f"{len(self.scales)} of {len(self.sites)} sites scaled{corrected}")
        if self.info.likelihood == "regression":
            return regression_prediction(mean, variance, self.info.sigma_noise, self.approximation.name, notes)
        probs = softmax_link(mean, variance, self.link, correlation)
        return ClassificationPrediction(probs, mean, variance, self.approximation.name, notes)

    def moments(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Mean and variance of the model's output, each of the output's shape.

        Raises:
            UnsupportedOp: an operation of the model has no rule; the message says where.
        """
        return self.correlated_moments(*args, **kwargs)[:2]

    def correlated_moments(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Correlation | None]:
        """Mean and variance of the model's output, and how its last axis is correlated, if that is known.

        Raises:
            UnsupportedOp: an operation of the model has no rule; the message says where.
        """
        check_eval(self.model)
        _refuse_half_autocast(device_of(self.model))
        try:
            output = functional_call(self.model, self.gaussian_parameters(), args, kwargs)
        except UnsupportedOp as error:
            raise type(error)(_located(error, self.model)) from error
        moments = as_moments(unwrap(model_output(output), [], sources=True))
        variance = torch.zeros_like(moments.mean) if moments.var is None else moments.var
        correlation = _correlation(moments) if self.approximation.logits == "correlated" else None
        if self.output_variance is not None:
            variance = self.output_variance(moments.mean, variance)
        return moments.mean, variance, correlation

    def gaussian_parameters(self) -> dict[str, Tensor]:
        """The random parameters by name as Gaussian tensors, for `torch.func.functional_call` on `self.model`."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        return {
            name: GaussianTensor(Moments(parameters[name], getattr(self, _buffer_name(name))), self.approximation)
            for name in self.names
        }

    def _at_site(self, path: str) -> Callable[[nn.Module, Any, Any], Any]:
        def scaled(module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG001
            factor, damping = self.scales.get(path, 1.0), self.dampings.get(path)
            if path in self.scales or damping is not None:
                output = scale_output(output, factor, self.approximation, damping)
            return output if self._site_hook is None else self._site_hook(path, output)

        return scaled


def _correlation(x: Moments) -> Correlation | None:
    """Of the entries of the last axis, where a linear map has made them and nothing has changed them since."""
    source = x.source
    if source is None or x.var is None or source.gain is not None:
        return None
    return Correlation(source.var.expand(*x.mean.shape[:-1], -1), source.weight, x.var.expand_as(x.mean))


def _refuse_half_autocast(device: torch.device) -> None:
    """Raise under float16 autocast.

    Raises:
        InvalidInput: it would cast variances to float16, where small ones vanish.
    """
    kind = device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
        msg = "autocast to float16 would lose small variances; use torch.autocast(..., dtype=torch.bfloat16) or none"
        raise InvalidInput(msg)


def propagate(
    model: nn.Module,
    posterior: Posterior,
    batch: Any,
    approximation: Approximation | str = FAITHFUL,
    scales: Mapping[str, float] | None = None,
) -> Prediction:
    """One single pass without keeping the predictor.

    Args:
        model: any `nn.Module` in eval mode.
        posterior: over any subset of its parameters.
        batch: inputs as a tensor, a tuple of arguments or a dict of keyword arguments.
        approximation: see `SinglePass`.
        scales: see `SinglePass`.
    """
    args, kwargs = call_arguments(batch)
    return SinglePass(model, posterior, approximation, scales)(*args, **kwargs)


def sites(model: nn.Module, random_names: tuple[str, ...]) -> tuple[str, ...]:
    """Paths of the modules that own random parameters directly, and the output's, `""`.

    A block with a module rule is one site: what is inside it does not run.
    """
    names = set(random_names)
    random = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in names}
    owners: list[str] = []
    whole: list[str] = []
    for path, module in model.named_modules():
        if path == OUTPUT_SITE or path.startswith(tuple(f"{block}." for block in whole)):
            continue
        taken = module_rule_for(module) is not None  # its inner modules never run
        whole += [path] if taken else []
        if any(id(p) in random for p in module.parameters(recurse=taken)):
            owners.append(path)
    return (*owners, OUTPUT_SITE)


def scale_output(
    output: Any, factor: "float | Tensor", approximation: Approximation, damping: "float | Tensor | None" = None
) -> Any:
    """The module's output with the variance of every Gaussian tensor in it multiplied, and its mean damped.

    The mean becomes m exp(-d r), where r in [0, 1] is the variance relative to the second moment,
    both averaged over the last axis: a correction that vanishes with the variance.

    Args:
        output: of the module, Gaussian tensors anywhere inside.
        factor: of the variance, > 0.
        approximation: of the propagation.
        damping: d, any number; None leaves the mean as it is.
    """

    def scaled(leaf: Any) -> Any:
        if not isinstance(leaf, GaussianTensor):
            return leaf
        x = read(leaf)
        var, shared = (None if f is None else f * factor for f in (x.var, x.shared))
        scores = None if x.scores is None else x.scores.each(lambda t: t * factor)
        mean = x.mean if damping is None or var is None else x.mean * _damped(x.mean, var, damping)
        source = None if x.source is None else x.source._replace(var=x.source.var * factor)
        return wrap(Moments(mean, var, shared, scores, source), approximation)

    return pytree.tree_map(scaled, output)


def _damped(mean: Tensor, var: Tensor, damping: "float | Tensor") -> Tensor:
    """exp(-d r), computed in float32 where the mean is half precision: its squares overflow."""
    dtype = torch.float32 if mean.dtype in (torch.float16, torch.bfloat16) else mean.dtype
    axis = -1 if mean.dim() else ()
    variance = var.to(dtype).expand_as(mean).mean(axis, keepdim=True)
    second = variance + mean.to(dtype).square().mean(axis, keepdim=True)
    return (-damping * variance / second.clamp(min=torch.finfo(dtype).tiny)).exp().to(mean.dtype)


def _checked_scales(
    scales: Mapping[str, float] | None, known: tuple[str, ...], approximation: Approximation
) -> dict[str, float]:
    """The scales as a plain dict.

    Raises:
        InvalidInput: a path that is no site, a factor that is not positive, or scales that were
            fitted for another approximation.
    """
    fitted_for = getattr(scales, "approximation", approximation.name)
    if fitted_for not in (None, approximation.name):
        msg = f"these scales were fitted for approximation {fitted_for!r}, not {approximation.name!r}; fit them again"
        raise InvalidInput(msg)
    for path, factor in (scales or {}).items():
        if path not in known:
            shown = ", ".join(map(repr, known[:5]))
            msg = f"scales name {path!r}, which is no site of this model; sites are {shown}, ..."
            raise InvalidInput(msg)
        if not 0 < factor < float("inf"):
            msg = f"the scale of site {path!r} must be positive and finite; got {factor}"
            raise InvalidInput(msg)
    return {path: float(factor) for path, factor in (scales or {}).items()}


def _checked_dampings(scales: Mapping[str, float] | None, known: tuple[str, ...]) -> dict[str, float]:
    """The dampings that come with scales, as a plain dict.

    Raises:
        InvalidInput: a path that is no site, or a damping that is not finite.
    """
    dampings: Mapping[str, float] = getattr(scales, "dampings", {})
    for path, damping in dampings.items():
        if path not in known:
            msg = f"scales.dampings name {path!r}, which is no site of this model; fit them on this model"
            raise InvalidInput(msg)
        if not math.isfinite(damping):
            msg = f"the damping of site {path!r} must be finite; got {damping}; fit it again"
            raise InvalidInput(msg)
    return {path: float(damping) for path, damping in dampings.items()}


def _buffer_name(parameter_name: str) -> str:
    return "variance/" + parameter_name.replace(".", "/")


def _take_whole(module: nn.Module, approximation: Approximation) -> None:
    """Let a module rule answer for the module's whole forward, if its class has one."""
    whole = module_rule_for(module)
    if whole is None:
        return
    ordinary = module.forward
    wants_approximation = "approximation" in inspect.signature(whole).parameters
    takes_one = not has_module_rule(module)  # recognised by what it makes of one tensor

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if takes_one and (len(args) != 1 or kwargs):
            return ordinary(*args, **kwargs)
        found: Found = []
        unwrap(list(self.parameters()), found)
        arguments, keywords = unwrap(args, found), unwrap(kwargs, found)
        if not found:
            return ordinary(*args, **kwargs)
        if wants_approximation:
            keywords["approximation"] = approximation
        result = whole(self, *arguments, **keywords)
        return ordinary(*args, **kwargs) if result is NotImplemented else wrap(result, approximation)

    module.forward = types.MethodType(forward, module)


def _located(error: UnsupportedOp, model: nn.Module) -> str:
    """The message with the place in the user's model and the remedy, read off the traceback."""
    paths = {id(module): path for path, module in model.named_modules()}
    path, line, trace = None, "", error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        owner = frame.f_locals.get("self")
        if (
            isinstance(owner, nn.Module)
            and id(owner) in paths
            and frame.f_code.co_name not in ("_call_impl", "_wrapped_call_impl")
        ):
            path = f"{paths[id(owner)] or 'the model'} ({type(owner).__name__})"
            line = f", {frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    where = f" in {path}{line}" if path else ""
    remedy = (
        ". Register one with @bayespass.rule(operation), take the block whole with @bayespass.module_rule(Class), "
        "or leave the parameters before it out: posterior.subset(...)"
    )
    return f"{error}{where}{remedy if isinstance(error, MissingRule) else ''}"
