"""One pass with the whole covariance of every layer's activations, for chains of linear layers.

Activations a carry a mean m and a covariance C over all features of a row. A linear layer whose weights W
are independent of a, with second moment S = m m^T + C, returns W m + b and

    Cov[y_c, y_d] = (W C W^T)_cd + sum_kl Cov[W_ck, W_dl] S_kl + Cov[b_c, b_d] + (weight with bias) m,

which is exact for any Gaussian or other weights. The weights of one layer may be independent, of Kronecker
form or fully correlated; those of different layers count as independent. An elementwise function is
linearised at the mean, or its mean and variances are matched and covariances go with E[f'].

Source: Li et al. 2024, streamlining (arXiv 2411.18425); single_pass notes 3.1.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn
from torch.func import vjp
from torch.nn import functional as F
from torch.nn.modules import activation as activations

import bayespass.rules  # noqa: F401  registers which functions are elementwise
from bayespass.approximation import CVP, Activation
from bayespass.batches import rows_of
from bayespass.curvature.forms import Basis, Form, Root, closed_forms, ordinary, sum_of
from bayespass.curvature.layers import DEFAULT_MEMORY
from bayespass.curvature.pushforward import parts
from bayespass.errors import InvalidInput, UnsupportedOp, require_positive
from bayespass.gaussian import unwrap, wrap
from bayespass.link import SOBOL_CLASSES, Link, correlated_softmax_link, softmax_link
from bayespass.moments import Moments, Source, finite_slope
from bayespass.posterior.base import Posterior
from bayespass.predict.layer_noise import LayerNoise
from bayespass.predict.linearised import covariance_root, in_single_precision, ordinary_inputs, position_blocks
from bayespass.predict.snapshot import check_eval, snapshot
from bayespass.prediction import ClassificationPrediction, Prediction, concatenate, regression_prediction
from bayespass.rules.registry import in_place_operations, operation_name, rules

Kind = Literal["full", "diagonal"]
SHAPES = {  # keep the order of a row's features
    *(getattr(Tensor, name) for name in ("flatten", "reshape", "view", "unflatten", "squeeze", "unsqueeze")),
    *(getattr(torch, name) for name in ("flatten", "reshape", "squeeze", "unsqueeze", "clone")),
    *(Tensor.contiguous, Tensor.clone, Tensor.detach),
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
}
ASKS = {Tensor.size, Tensor.dim, getattr}  # about the shape alone
THROUGH = (nn.Flatten, nn.Unflatten, nn.Identity, nn.modules.dropout._DropoutNd)
REMEDY = "use Linearised, which takes any network, or SinglePass"


@dataclass(frozen=True)
class Joint:
    """The Gaussian of a batch of activations.

    Args:
        mean: (n, ...).
        spread: covariance (n, D, D) of a row's D features, or their variances (n, D).
    """

    mean: Tensor
    spread: Tensor


class JointPass(nn.Module):
    """Mean and joint covariance of the outputs in one pass, with Kronecker and full covariance of the weights.

    Args:
        model: a chain of linear layers and elementwise functions in eval mode, as (nested) `nn.Sequential` or
            any module that `torch.fx` traces to one; it is copied, never modified. What comes before the
            first random layer may be anything deterministic. A half-precision model is computed in float32.
        posterior: over weights and biases of its linear layers; others are deterministic. Correlations
            inside a layer are kept for every structure with a closed form; otherwise marginals are used.
        covariance: "full" carries (n, D, D) for a layer of D features; "diagonal" carries variances alone, as
            `SinglePass` does, weights keeping their structure.
        activation: "linear", as streamlining does, or "moments": matched means and variances.
        link: how Gaussian logits become probabilities; "auto" and "sobol" keep their covariance.
        max_memory: bytes that one part of a batch may take, roughly.

    `forward` takes what the model takes and returns a `Prediction`.

    Raises:
        PosteriorMismatch: posterior and model do not fit.
        InvalidInput: a value outside its range, or a model in training mode.
        UnsupportedOp: the model is no such chain; the message names what is in the way.

    Source: Li et al. 2024 (arXiv 2411.18425).
    """

    def __init__(
        self,
        model: nn.Module,
        posterior: Posterior,
        covariance: Kind = "full",
        activation: Activation = "linear",
        link: Link = "auto",
        max_memory: int = DEFAULT_MEMORY,
    ) -> None:
        super().__init__()
        require_positive(max_memory=max_memory)
        for name, value, kind in (("covariance", covariance, Kind), ("activation", activation, Activation),
                                  ("link", link, Link)):  # fmt: skip
            if value not in get_args(kind):
                msg = f"{name} must be one of {', '.join(map(repr, get_args(kind)))}; got {value!r}"
                raise InvalidInput(msg)
        with torch.inference_mode(mode=False):
            self.model = in_single_precision(snapshot(model, posterior))
            forms = closed_forms(posterior)
            self.notes = _notes(posterior, forms, covariance, activation)
            known = forms or [Basis({n: ordinary(v)[None] for n, v in posterior.variance.items()}, {}, {})]
            parameters = dict(self.model.named_parameters(remove_duplicate=False))
            random = {id(parameters[name]): name for name in posterior.names}
            self.noise = nn.ModuleDict()
            for path, layer in self.model.named_modules():
                own = {key: random.get(id(value), "") for key, value in layer.named_parameters(recurse=False)}
                if isinstance(layer, nn.Linear) and _is_linear(layer) and any(own.values()):
                    self.noise[_key(path)] = LayerNoise(layer, {"bias": ""} | own, known)
            self.graph = _traced(self.model, set(random))
        self.info = posterior.info
        self.kind: Kind = covariance
        self.activation: Activation = activation
        self.link: Link = link
        self.max_memory = max_memory
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Prediction:
        """The prediction for one batch, called as the model is called."""
        found = []
        for mean, spread in self._parts(args, kwargs):
            variance = spread if self.kind == "diagonal" else spread.diagonal(dim1=1, dim2=2)
            variance = variance.clamp(min=0).reshape(mean.shape)
            if self.info.likelihood == "regression":
                found.append(regression_prediction(mean, variance, self.info.sigma_noise, "joint", self.notes))
                continue
            joint = self.kind == "full" and self.link in ("auto", "sobol") and mean.shape[-1] <= SOBOL_CLASSES
            if joint:
                probs = correlated_softmax_link(mean, covariance_root(position_blocks(spread, mean)))
            else:
                probs = softmax_link(mean, variance, self.link)
            found.append(ClassificationPrediction(probs, mean, variance, "joint", self.notes))
        return concatenate(found)

    def moments(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Mean (n, ...) of the outputs and the covariance (n, R, R) of each row's; variances (n, R) for "diagonal"."""
        means, spreads = zip(*self._parts(args, kwargs), strict=True)
        return torch.cat(means), torch.cat(spreads)

    def _parts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
        check_eval(self.model)
        width = max((max(noise.shape) + 1 for noise in self._noises()), default=1)
        found = []
        with torch.inference_mode(mode=False), torch.no_grad():
            inputs = ordinary_inputs(self.model, args, kwargs)
            size = next(self.model.parameters()).element_size() * 8 * (width**2 if self.kind == "full" else width)
            for place in parts(inputs, max(1, int(self.max_memory // size))):
                part = rows_of(inputs, place)
                given = part if isinstance(part, tuple) else self._ordered(part)
                value = _Runner(self).run(*given)
                if isinstance(value, Tensor):  # nothing random on the way
                    width_out = value[0].numel()
                    shape = (len(value), width_out, width_out)[: 3 if self.kind == "full" else 2]
                    value = Joint(value, value.new_zeros(shape))
                found.append((value.mean, value.spread))
        return found

    def _ordered(self, named: Mapping[str, Any]) -> list[Any]:
        """Keyword arguments in the order of the graph's inputs."""
        places = [node for node in self.graph.nodes if node.op == "placeholder"]
        return [named[p.target] if p.target in named else p.args[0] for p in places]

    def _noises(self) -> list["LayerNoise"]:
        return [noise for noise in self.noise.values() if isinstance(noise, LayerNoise)]


class _Tracer(fx.Tracer):
    """Linear layers whole, activations as the functions that they call."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if _is_linear(m):
            return True
        own = type(m).__module__ == activations.__name__ and not list(m.parameters()) and not list(m.children())
        if own or isinstance(m, THROUGH):
            return False
        return super().is_leaf_module(m, module_qualified_name)


def _traced(model: nn.Module, random: set[int]) -> fx.Graph:
    """The model as a graph in which the random part is a chain that can be followed.

    Args:
        model: to trace.
        random: ids of its random parameters.

    Raises:
        UnsupportedOp: it is not.
    """
    owner = type(model).__name__
    try:
        graph = _one_layer() if _is_linear(model) else _Tracer().trace(model)
    except Exception as error:
        msg = f"JointPass cannot follow {owner} symbolically ({error}); {REMEDY}"
        raise UnsupportedOp(msg) from error
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tainted: set[fx.Node] = set()
    used: set[int] = set()
    for node in graph.nodes:
        from_random = [given for given in node.all_input_nodes if given in tainted]
        name = str(node.target)
        if node.op == "call_module":
            module = model.get_submodule(name)
            own = {id(parameter) for parameter in module.parameters()} & random
            if (own or from_random) and (not _is_linear(module) or own & used):
                why = "has weights that are used twice" if _is_linear(module) else "is no linear layer"
                msg = f"JointPass stops at {name} ({type(module).__name__}), which {why}; {REMEDY}"
                raise UnsupportedOp(msg)
            used |= own
            tainted |= {node} if own or from_random else set()
        elif node.op == "get_attr" and id(parameters.get(name)) in random:
            msg = f"JointPass stops at {name}, which {owner} uses outside a linear layer; {REMEDY}"
            raise UnsupportedOp(msg)
        elif node.op.startswith("call_") and from_random:
            operation = _operation(node)
            if operation in ASKS:
                continue
            first = node.args[0] if node.args else node.kwargs.get("input")
            if from_random != [first] or not (operation in SHAPES or _is_curve(operation)):
                msg = f"JointPass stops at {operation_name(operation)} in {owner}, which mixes features; {REMEDY}"
                raise UnsupportedOp(msg)
            tainted.add(node)
    return graph


def _one_layer() -> fx.Graph:
    """The graph of a model that is a linear layer itself."""
    graph = fx.Graph()
    graph.output(graph.call_module("", (graph.placeholder("input"),)))
    return graph


class _Runner(fx.Interpreter):
    """Runs the graph with a `Joint` wherever something random is."""

    def __init__(self, owner: JointPass) -> None:
        super().__init__(owner.model, graph=owner.graph)
        self.owner = owner

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        noise = dict(self.owner.noise.items()).get(_key(target))
        given = args[0] if args else kwargs["input"]
        if noise is None and not isinstance(given, Joint):
            return super().call_module(target, args, kwargs)
        layer = self.owner.model.get_submodule(target)
        assert isinstance(layer, nn.Linear)
        assert noise is None or isinstance(noise, LayerNoise)
        mean, spread = (given.mean, given.spread) if isinstance(given, Joint) else (given, None)
        if mean.dim() != 2:
            msg = (
                f"JointPass carries one vector per row, and {target} (Linear) got shape {tuple(mean.shape)}; "
                f"flatten before it, or {REMEDY}"
            )
            raise UnsupportedOp(msg)
        found, full = [], self.owner.kind == "full"
        if spread is not None:
            found.append(layer.weight @ spread @ layer.weight.mT if full else spread @ layer.weight.square().mT)
        if noise is not None:
            found.append((noise.joint if full else noise.marginal)(mean, spread))
        return Joint(layer(mean), sum_of(found))

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._called(target, args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return (
            self._called(getattr(Tensor, target), args, kwargs)
            if _has_joint(args, kwargs)
            else (super().call_method(target, args, kwargs))
        )

    def _called(self, operation: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not _has_joint(args, kwargs):
            return super().call_function(operation, args, kwargs)
        kwargs = dict(kwargs)
        given, *rest = args if args else (kwargs.pop("input"),)
        if operation in ASKS:
            return operation(given.mean, *rest, **kwargs)
        if operation in SHAPES:
            mean = operation(given.mean, *rest, **kwargs)
            if len(mean) != len(given.mean):
                msg = f"JointPass keeps rows apart, and {operation_name(operation)} joins them; {REMEDY}"
                raise UnsupportedOp(msg)
            return Joint(mean, given.spread)
        kwargs.pop("inplace", None)
        plain = in_place_operations().get(operation, operation)
        return _through_curve(lambda x: plain(x, *rest, **kwargs), given, self.owner.activation)


def _through_curve(function: Callable[[Any], Any], given: Joint, activation: Activation) -> Joint:
    """f(x) for an elementwise f: Cov -> G Cov G with G = diag(f'(m)), or E[f'] and matched variances."""
    full = given.spread.dim() == 3
    mean, backward = vjp(function, given.mean)[:2]
    slope = finite_slope(backward(torch.ones_like(mean))[0])  # entry by entry, so its gradient is f'
    variance = given.spread.diagonal(dim1=1, dim2=2) if full else given.spread
    if activation == "moments":
        before = variance.clamp(min=0).reshape(given.mean.shape)
        gaussian = wrap(Moments(given.mean, before, source=Source(before, given.mean)), CVP)
        matched = unwrap(function(gaussian), [], sources=True)
        mean, after = matched.mean, matched.var
        if matched.source is not None and matched.source.gain is not None:
            slope = finite_slope(matched.source.gain)
        if not full:
            return Joint(mean, after.flatten(1))
        most = (after / before.clamp(min=torch.finfo(after.dtype).tiny)).sqrt()
        slope = torch.minimum(torch.maximum(slope, -most), most).flatten(1)
        spread = slope[:, :, None] * given.spread * slope[:, None]
        spread.diagonal(dim1=1, dim2=2).copy_(after.flatten(1))
        return Joint(mean, spread)
    slope = slope.flatten(1)
    return Joint(mean, slope[:, :, None] * given.spread * slope[:, None] if full else slope.square() * given.spread)


def _notes(posterior: Posterior, forms: list[Form] | None, covariance: Kind, activation: Activation) -> tuple[str, ...]:
    found = [f"{covariance} covariance of activations, {activation} activations"]
    if forms is None:
        found.append(f"marginal variances of a posterior of kind {posterior.kind!r}, correlations ignored")
    for form in forms or ():
        if isinstance(form, Root) and len({name.rpartition(".")[0] for name in form.columns}) > 1:
            found.append("correlations between layers ignored")
    return tuple(found)


def _operation(node: fx.Node) -> Callable[..., Any]:
    if node.op != "call_method":
        return node.target  # type: ignore[return-value]
    return getattr(Tensor, str(node.target), node.target)  # type: ignore[return-value]


def _is_curve(operation: Callable[..., Any]) -> bool:
    """Whether the operation works entry by entry."""
    entry = rules().get(in_place_operations().get(operation, operation))
    return entry is not None and entry.depends_on == "activation"


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _has_joint(args: Any, kwargs: Any) -> bool:
    return any(isinstance(value, Joint) for value in (*args, *kwargs.values()))


def _key(path: str) -> str:
    """A path as a key of a module dict, which takes no dots."""
    return f"layer/{path.replace('.', '/')}"
