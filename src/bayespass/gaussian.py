"""GaussianTensor: mean and variance travelling together through unmodified PyTorch code.

A wrapper subclass of `torch.Tensor` around one `Moments`, alive inside one propagation only. Every torch function that
meets it is looked up in the registry; the rule sees `Moments`, never the wrapper. An operation without a rule raises,
and so do attributes that would hand out the mean alone: variance is never dropped in silence.
"""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from bayespass.approximation import Approximation
from bayespass.errors import UnsupportedOp
from bayespass.moments import Factors, Moments, ScoreNoise, Source, cast
from bayespass.rules.registry import call_rule, in_place_operations, operation_name, rules

# Reads of metadata, the same for the mean and for the pair.
_METADATA = """
    size stride storage_offset dim ndimension numel nelement element_size is_floating_point is_complex is_signed
    is_contiguous is_inference is_conj is_neg _is_view _is_zerotensor get_device __len__ __hash__ is_same_size
    is_pinned dim_order shape dtype device ndim layout requires_grad is_leaf grad_fn is_cuda is_cpu is_sparse
    is_sparse_csr is_quantized is_nested is_meta is_mps is_xpu is_mkldnn names itemsize nbytes is_vulkan is_mtia is_ipu
    is_xla is_maia _version _base _backward_hooks output_nr retains_grad grad _has_symbolic_sizes_strides
"""


def _metadata() -> frozenset[Callable[..., Any]]:
    found = [getattr(Tensor, name) for name in _METADATA.split() if hasattr(Tensor, name)]
    arriving = [entry if callable(entry) else entry.__get__ for entry in found]  # attributes arrive as their getters
    return frozenset([*arriving, torch.is_floating_point, torch.is_complex, torch.numel])


METADATA = _metadata()


class Memory:
    """What views of one tensor share: how often an in-place operation changed it."""

    version = 0


Found = list[tuple["GaussianTensor", Moments]]


class GaussianTensor(Tensor):
    """One `Moments` seen as a tensor, with the approximation of the propagation it belongs to."""

    # Every field is an attribute of its own because that is what torch.compile can trace; NAMES has them all.
    gaussian_mean: Tensor
    gaussian_var: Tensor | None
    gaussian_shared: Tensor | None
    gaussian_scores_var: Tensor | None = None
    gaussian_scores_shared: Tensor | None = None
    gaussian_source_var: Tensor | None = None
    gaussian_source_weight: Tensor | None = None
    gaussian_source_gain: Tensor | None = None
    gaussian_query_mean: Tensor | None = None
    gaussian_query_var: Tensor | None = None
    gaussian_query_shared: Tensor | None = None
    gaussian_key_mean: Tensor | None = None
    gaussian_key_var: Tensor | None = None
    gaussian_key_shared: Tensor | None = None
    gaussian_further: Tensor | None = None
    approximation: Approximation
    memory: "Memory | None"
    seen: int

    @staticmethod
    def __new__(cls, moments: Moments, approximation: Approximation) -> "GaussianTensor":
        """Wrap the moments; shape, strides, dtype and device are those of the mean."""
        mean = moments.mean
        wrapper = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, mean.shape, strides=mean.stride(), dtype=mean.dtype, device=mean.device, layout=mean.layout
        )
        wrapper.approximation, wrapper.memory, wrapper.seen = approximation, None, 0
        _put(wrapper, moments)
        return wrapper

    def __init__(self, moments: Moments, approximation: Approximation) -> None:  # noqa: ARG002  see __new__
        super().__init__()

    def store(self, moments: Moments) -> None:
        """Take new moments, as an in-place operation does; views of the same memory become stale."""
        for name in NAMES:
            setattr(self, name, None)
        _put(self, moments)
        if self.memory is not None:
            self.memory.version += 1
            self.seen = self.memory.version

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"GaussianTensor(shape={tuple(self.shape)}, dtype={self.dtype}, {self.approximation.name})"

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in METADATA:
            return super().__torch_function__(func, types, args, kwargs)
        target = in_place_operations().get(func, func)
        stores = target is not func or kwargs.pop("inplace", False)
        first = args[0] if args else kwargs.get("input", kwargs.get("self"))
        if func is Tensor.__setitem__ and len(args) == 3:
            _see_own_view(first, args[2])
        gaussians: Found = []
        arguments = [unwrap(value, gaussians, sources=True) for value in args]
        keywords = {name: unwrap(value, gaussians, sources=True) for name, value in kwargs.items()}
        approximation = _the_approximation(gaussians)
        result = call_rule(target, arguments, keywords, approximation)
        if not stores:
            wrapped = wrap(result, approximation)
            if not torch.compiler.is_compiling() and rules()[target].aliases and isinstance(first, GaussianTensor):
                _share_memory(first, wrapped)
            return wrapped
        if not isinstance(first, GaussianTensor):
            msg = (
                f"{operation_name(func)} would store a Gaussian result in a plain tensor and drop its variance; "
                f"write it out of place (x = x + y) in the model"
            )
            raise UnsupportedOp(msg)
        first.store(cast(result, first.dtype))
        return first

    @classmethod
    def __torch_dispatch__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        msg = f"{func} reached a GaussianTensor below the level where rules apply; its variance would be lost"
        raise UnsupportedOp(msg)

    def __tensor_flatten__(self) -> tuple[list[str], Approximation]:
        return [name for name in NAMES if getattr(self, name) is not None], self.approximation

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Approximation, size: Any, stride: Any) -> Any:
        found = {name: inner.get(name) for name in NAMES}
        return GaussianTensor(read(SimpleNamespace(**found)), context)


NAMES = tuple(name for name in GaussianTensor.__annotations__ if name.startswith("gaussian_"))


def _put(tensor: GaussianTensor, moments: Moments) -> None:
    """Every tensor of the moments as an attribute; those of what only some operations look at where they are there."""
    tensor.gaussian_mean, tensor.gaussian_var, tensor.gaussian_shared = moments.mean, moments.var, moments.shared
    if moments.scores is not None:
        tensor.gaussian_scores_var, tensor.gaussian_scores_shared = moments.scores
    if moments.source is not None:
        tensor.gaussian_source_var, tensor.gaussian_source_weight, tensor.gaussian_source_gain = moments.source
    if moments.factors is not None:
        q, k, tensor.gaussian_further = moments.factors
        tensor.gaussian_query_mean, tensor.gaussian_query_var, tensor.gaussian_query_shared = q.mean, q.var, q.shared
        tensor.gaussian_key_mean, tensor.gaussian_key_var, tensor.gaussian_key_shared = k.mean, k.var, k.shared


def read(holder: Any) -> Moments:
    """The moments that a Gaussian tensor, or anything else with its attributes, stands for: the reverse of `_put`."""
    scores = source = factors = None
    if holder.gaussian_scores_var is not None:
        scores = ScoreNoise(holder.gaussian_scores_var, holder.gaussian_scores_shared)
    if holder.gaussian_source_var is not None:
        source = Source(holder.gaussian_source_var, holder.gaussian_source_weight, holder.gaussian_source_gain)
    if holder.gaussian_query_mean is not None:
        q = Moments(holder.gaussian_query_mean, holder.gaussian_query_var, holder.gaussian_query_shared)
        k = Moments(holder.gaussian_key_mean, holder.gaussian_key_var, holder.gaussian_key_shared)
        factors = Factors(q, k, holder.gaussian_further)
    return Moments(holder.gaussian_mean, holder.gaussian_var, holder.gaussian_shared, scores, source, factors)


def _share_memory(source: GaussianTensor, views: Any) -> None:
    source.memory = source.memory or Memory()
    place = source.gaussian_mean.untyped_storage().data_ptr()
    for view in views if isinstance(views, tuple | list) else (views,):
        if isinstance(view, GaussianTensor) and view.gaussian_mean.untyped_storage().data_ptr() == place:
            view.memory, view.seen = source.memory, source.memory.version


def _see_own_view(target: Any, value: Any) -> None:
    """`x[i] += y` changes a view of x and then assigns it to x, which is therefore not stale."""
    own = isinstance(target, GaussianTensor) and isinstance(value, GaussianTensor) and value.memory is target.memory
    if own and target.memory is not None and value.seen == target.memory.version == target.seen + 1:
        target.seen = target.memory.version


def unwrap(value: Any, found: Found, sources: bool = False) -> Any:
    """`Moments` for Gaussian tensors, also inside lists, tuples and dicts; `found` collects them.

    The same tensor gives the same moments, so that rules recognise `x * x`.

    Raises:
        UnsupportedOp: the tensor's memory was changed in place through another view of it.
    """
    if isinstance(value, GaussianTensor):
        for tensor, moments in found:
            if tensor is value:
                return moments
        moments = read(value)
        if not sources:  # they only matter between two operations
            moments = replace(moments, source=None, factors=None)
        if value.memory is not None and value.seen != value.memory.version:
            msg = (
                "a Gaussian tensor is read after its memory was changed in place through another view of it, which "
                "does not follow; write the change out of place (x = x + y) in the model"
            )
            raise UnsupportedOp(msg)
        found.append((value, moments))
        return moments
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        parts = [unwrap(part, found, sources) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        return {name: unwrap(part, found, sources) for name, part in value.items()}
    return value


def wrap(value: Any, approximation: Approximation) -> Any:
    """The reverse of `unwrap`; moments without variance become plain tensors."""
    if isinstance(value, Moments):
        return value.mean if value.var is None else GaussianTensor(value, approximation)
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return type(value)(wrap(part, approximation) for part in value)
    return value


def moments_of(module: nn.Module) -> dict[str, "Moments | Tensor"]:
    """The module's own parameters and buffers by name, `Moments` where they are Gaussian."""
    own = {**module._parameters, **module._buffers}
    return {name: unwrap(value, []) for name, value in own.items() if value is not None}


def _the_approximation(found: Found) -> Approximation:
    approximation = found[0][0].approximation
    if any(tensor.approximation != approximation for tensor, _ in found):
        msg = "tensors of two approximations met in one operation; a propagation uses exactly one"
        raise UnsupportedOp(msg)
    return approximation
