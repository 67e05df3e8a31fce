"""The registry: which function knows how one operation changes a mean and a variance.

A rule is an ordinary function under the operation's own public signature. It receives
`Moments` where the caller passed a Gaussian tensor and plain values everywhere else, and returns
`Moments` (or a tuple of them). A rule that asks for the keyword `approximation` is handed the
`Approximation` of the running propagation.

    @rule(torch.cumsum, torch.Tensor.cumsum, knows_shared=True)
    def cumsum(input, dim):
        "y_i = x_1 + ... + x_i: exact for independent entries."
        return average(lambda t: t.cumsum(dim), lambda t: t.cumsum(dim), input)
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bayespass.errors import InvalidInput, MissingRule, UnsupportedOp
from bayespass.moments import Moments, cast

Operation = Callable[..., Any]
BlockRule = Callable[..., Any]
Recogniser = Callable[[nn.Module], BlockRule | None]
RuleFunction = TypeVar("RuleFunction", bound=Callable[..., Any])


@dataclass(frozen=True)
class Accuracy:
    """How far a rule may be from the truth, for independent Gaussian entries.

    Args:
        mean: largest error of the mean, in units of the largest output sd of the case.
        variance: largest error of the variance, in units of the largest output variance.

    Zero and zero means exact. Bounds hold for input means within [-4, 4] and input sd up to 2, or
    for the narrower range that the rule's docstring names;
    `bayespass.testing.check_rule` measures them by Monte Carlo.
    """

    mean: float = 0.0
    variance: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether the rule gives the true moments of independent Gaussian entries."""
        return self.mean == 0 and self.variance == 0


EXACT = Accuracy()


@dataclass(frozen=True)
class Rule:
    """One registered rule: what is called, for which operations, and how accurate it is."""

    call: Callable[..., Any]
    operations: tuple[Operation, ...]
    accuracy: Accuracy | Mapping[str, Accuracy] = EXACT
    depends_on: str | None = None
    knows_shared: bool = False
    aliases: bool = False
    wants_approximation: bool = False
    names: frozenset[str] = frozenset()

    def accuracy_under(self, approximation: Any) -> Accuracy:
        """The declared accuracy for this approximation."""
        if isinstance(self.accuracy, Accuracy):
            return self.accuracy
        return self.accuracy[getattr(approximation, self.depends_on or "")]


_RULES: dict[Operation, Rule] = {}
_IN_PLACE: dict[Operation, Operation] = {}
_MODULE_RULES: dict[type[nn.Module], Callable[..., Any]] = {}
_RECOGNISERS: list[Recogniser] = []


def rule(
    *operations: Operation,
    accuracy: Accuracy | Mapping[str, Accuracy] = EXACT,
    depends_on: str | None = None,
    knows_shared: bool = False,
    aliases: bool = False,
) -> Callable[[RuleFunction], RuleFunction]:
    """Register the decorated function as the rule of these operations.

    Args:
        operations: function objects, every alias written out (`torch.add`, `torch.Tensor.add`).
        accuracy: declared accuracy; a mapping from the values of one approximation field to
            accuracies where approximations differ.
        depends_on: that field's name.
        knows_shared: whether the rule carries `Moments.shared`; a rule that does not is never
            handed moments that have it.
        aliases: whether the operation may return a view of its input's memory.

    Returns:
        The decorator, which returns the function unchanged.

    Raises:
        InvalidInput: an accuracy per approximation without `depends_on`, or the reverse.
    """
    if isinstance(accuracy, Mapping) != (depends_on is not None):
        msg = "rule(accuracy=...) per approximation goes with depends_on=, the field it depends on"
        raise InvalidInput(msg)

    def register(function: RuleFunction) -> RuleFunction:
        names = frozenset(inspect.signature(function).parameters)
        wants = "approximation" in names
        entry = Rule(function, operations, accuracy, depends_on, knows_shared, aliases, wants, names)
        _RULES.update(dict.fromkeys(operations, entry))
        return function

    return register


def in_place(operations: Mapping[Operation, Operation]) -> None:
    """Declare in-place spellings: each changes its first argument to what the other returns."""
    _IN_PLACE.update(operations)


def module_rule(*classes: type[nn.Module]) -> Callable[[RuleFunction], RuleFunction]:
    """Register the decorated function as the rule of whole blocks, subclasses included.

    The function is called as `rule(module, *args, **kwargs)`, `args` and `kwargs` being what the
    module's `forward` takes with `Moments` for Gaussian tensors; `moments_of(module)` in
    `bayespass.gaussian` gives the block's own parameters the same way. It returns what `forward`
    returns, with `Moments` for Gaussian tensors. For blocks whose parts hide structure; the
    function rules must already give an answer.
    """

    def register(function: RuleFunction) -> RuleFunction:
        _MODULE_RULES.update(dict.fromkeys(classes, function))
        return function

    return register


def recogniser(function: Recogniser) -> Recogniser:
    """Register a function that looks at what a module does: its rule for the whole module, or None.

    It must not change the module, and a rule of the module's class goes before. The rule is called
    as a `module_rule` is, with one tensor, and may return `NotImplemented` to have the module answered
    operation by operation.
    """
    _RECOGNISERS.append(function)
    return function


def rules() -> Mapping[Operation, Rule]:
    """Every operation that has a rule, read-only."""
    return MappingProxyType(_RULES)


def in_place_operations() -> Mapping[Operation, Operation]:
    """In-place operations and the operations whose result they store, read-only."""
    return MappingProxyType(_IN_PLACE)


def module_rule_for(module: nn.Module) -> Callable[..., Any] | None:
    """The module rule of the nearest class in the module's ancestry, or of a block recognised by what it does."""
    for ancestor in type(module).__mro__:
        if ancestor in _MODULE_RULES:
            return _MODULE_RULES[ancestor]
    found = (recognise(module) for recognise in _RECOGNISERS)
    return next((rule for rule in found if rule is not None), None)


def has_module_rule(module: nn.Module) -> bool:
    """Whether the module's class, or a class it comes from, was registered with `module_rule`."""
    return any(ancestor in _MODULE_RULES for ancestor in type(module).__mro__)


def call_rule(operation: Callable[..., Any], args: list[Any], kwargs: dict[str, Any], approximation: Any) -> Any:
    """The rule's result for one operation on `Moments` and plain values.

    Raises:
        MissingRule: the operation has no rule.
        UnsupportedOp: its rule does not take these arguments, or does not carry shared variance.
        TypeError: raised inside the rule.
    """
    entry = _RULES.get(operation)
    if entry is None:
        shown = ", ".join(_describe(value) for value in [*args, *kwargs.values()])
        msg = f"no Gaussian rule for {operation_name(operation)} (got {shown})"
        raise MissingRule(msg)
    if not entry.knows_shared and any(_has_shared(value) for value in [*args, *kwargs.values()]):
        msg = f"the rule of {operation_name(operation)} does not carry shared variance and would drop it"
        raise UnsupportedOp(msg)
    kwargs = {_spelling(name, entry): value for name, value in kwargs.items()}
    keywords = {**kwargs, "approximation": approximation} if entry.wants_approximation else kwargs
    half = None if entry.aliases else _half_precision([*args, *kwargs.values()])
    try:
        if half is None:
            return entry.call(*args, **keywords)
        wide_args, wide_keywords = _widened(args), _widened(keywords)
        origins = {id(w.var): x.var for w, x in zip(_leaves([*wide_args, *wide_keywords.values()]),
                   _leaves([*args, *keywords.values()]), strict=True) if isinstance(w, Moments)}  # fmt: skip
        asked = next((value for value in [*args, *kwargs.values()] if isinstance(value, torch.dtype)), half)
        return _narrowed(entry.call(*wide_args, **wide_keywords), asked, origins)
    except TypeError as error:
        if error.__traceback__ is None or error.__traceback__.tb_next is not None:
            raise  # raised inside the rule, not by binding its arguments
        msg = f"the Gaussian rule of {operation_name(operation)} does not take these arguments: {error}"
        raise UnsupportedOp(msg) from error


USER_MODULES = {
    "torch._C": "torch", "torch._C._VariableFunctions": "torch", "torch.functional": "torch",
    "torch._C._nn": "torch.nn.functional", "torch._C._special": "torch.special", "torch._C._linalg": "torch.linalg",
    "torch._C._fft": "torch.fft",
}  # fmt: skip  # what operations say of themselves, and what users write


def operation_name(operation: Operation) -> str:
    """The name a user would write: `torch.nn.functional.gelu`, `torch.Tensor.add`."""
    name = getattr(operation, "__name__", repr(operation))
    if name == "__get__":
        return f"torch.Tensor.{getattr(operation.__self__, '__name__', '?')}"  # type: ignore[attr-defined]
    if getattr(operation, "__qualname__", name).startswith(("TensorBase.", "Tensor.")):
        return f"torch.Tensor.{name}"
    module = getattr(operation, "__module__", None) or "torch"
    name = name.removeprefix("special_").removeprefix("linalg_").removeprefix("fft_")
    return f"{USER_MODULES.get(module, module)}.{name}"


def refuse_out(out: Any) -> None:
    """Refuse `out=`, which would store a mean without its variance.

    Raises:
        UnsupportedOp: `out` was given.
    """
    if out is not None:
        msg = "out= would store the mean without its variance; drop the out argument in the model"
        raise UnsupportedOp(msg)


def _half_precision(values: list[Any]) -> torch.dtype | None:
    """float16 when that is what the operation works in: squares leave its range, so rules compute in float32."""
    tensors = [leaf.mean if isinstance(leaf, Moments) else leaf for leaf in _leaves(values)]
    kinds = {t.dtype for t in tensors if t.is_floating_point() and t.dim() > 0}
    return torch.float16 if kinds == {torch.float16} else None


def _leaves(values: Any) -> list[Any]:
    if isinstance(values, list | tuple):
        return [leaf for value in values for leaf in _leaves(value)]
    return [values] if isinstance(values, Moments | Tensor) else []


def _widened(value: Any) -> Any:
    """Every floating-point tensor inside in float32."""
    if isinstance(value, Moments):
        return cast(value, torch.float32)
    return _everywhere(_widened, value, torch.float32)


def _narrowed(value: Any, dtype: torch.dtype, origins: dict[int, Any]) -> Any:
    """Means and plain tensors in the dtype, what leaves its range at its end; variances stay in float32.

    Variances of small activations are below the range of float16 and would vanish.
    """
    if isinstance(value, Moments):
        source = value.source
        if source is not None and id(source.var) in origins:  # the very tensor, which a product looks for
            source = source._replace(var=origins[id(source.var)])
        return replace(value, mean=_narrowed(value.mean, dtype, origins), source=source)
    if isinstance(value, Tensor) and value.is_floating_point() and dtype == torch.float16:
        largest = torch.finfo(dtype).max
        value = torch.where(value.isinf(), value, value.clamp(-largest, largest))
    return _everywhere(lambda part: _narrowed(part, dtype, origins), value, dtype)


def _everywhere(function: Callable[[Any], Any], value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    if isinstance(value, dict):
        return {name: function(part) for name, part in value.items()}
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return type(value)([function(part) for part in value])
    return value


NUMPY_NAMES = {"axis": "dim", "keepdims": "keepdim", "x": "input"}


def _spelling(name: str, entry: Rule) -> str:
    """The rule's own name of an argument that was given in NumPy's spelling."""
    other = NUMPY_NAMES.get(name)
    return other if other in entry.names and name not in entry.names else name  # type: ignore[return-value]


def _has_shared(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_has_shared(part) for part in value)
    return isinstance(value, Moments) and value.shared is not None


def _describe(value: Any) -> str:
    if isinstance(value, list | tuple) and value:
        return f"{type(value).__name__} of {len(value)}: {_describe(value[0])}, ..."
    if isinstance(value, Moments):
        return f"Gaussian {tuple(value.mean.shape)} {value.mean.dtype}".replace("torch.", "")
    return f"Tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:40]
