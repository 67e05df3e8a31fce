"""Which operations of a model the single pass can answer, how accurately, and at what price.

The model runs once with Gaussian parameters while a recorder notes every operation that meets a
Gaussian tensor. An operation without a rule is noted and its result computed from the means alone,
so that one run lists everything that is missing. Cost is predicted by counting, not by timing.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from bayespass.approximation import FAITHFUL, Approximation, named_approximation
from bayespass.batches import call_arguments, model_output
from bayespass.cost import Cost, Meter, compared
from bayespass.errors import InvalidInput, MissingRule, UnsupportedOp
from bayespass.gaussian import METADATA, GaussianTensor
from bayespass.moments import Moments
from bayespass.posterior.base import Posterior
from bayespass.posterior.mean_field import DiagonalGaussian
from bayespass.predict import propagation
from bayespass.predict.propagation import SinglePass
from bayespass.rules.registry import Accuracy, in_place_operations, module_rule_for, operation_name, rules

Status = Literal["exact", "approximate", "missing", "refused"]

DEFAULT_VARIANCE = 1e-6  # of every parameter where no posterior is given; what is traced does not depend on it
TORCH_FOLDER = str(Path(torch.__file__).parent)
IN_PLACE_METHODS = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")}


@dataclass(frozen=True)
class OperationRow:
    """One operation of one module, as often as it met a Gaussian tensor there.

    Args:
        path: the module's path, empty for the model itself; `class_name` is its class.
        operation: as a user would write it; for a module rule, the class it answers for.
        calls: how often, in one forward pass.
        status: "exact" or "approximate" as the rule declares for independent Gaussian entries,
            "missing" without a rule, "refused" by its rule.
        mean_error: bound in output sd; None where nothing is declared.
        variance_error: relative bound; None where nothing is declared.
        module_rule: whether a module rule answered for the whole block.
        drops: what the approximation leaves out here by design.
        reason: why it is missing or refused.
        location: file:line in the user's code, where it is missing or refused.
    """

    path: str
    class_name: str
    operation: str
    calls: int
    status: Status
    mean_error: float | None = None
    variance_error: float | None = None
    module_rule: bool = False
    drops: tuple[str, ...] = ()
    reason: str = ""
    location: str = ""


@dataclass(frozen=True)
class ModuleParameters:
    """Sizes of the parameters that a module owns itself; tied ones count at their first owner."""

    path: str
    class_name: str
    total: int
    random: int


@dataclass(frozen=True)
class Coverage:
    """What a single pass through one model consists of.

    Args:
        model: its class.
        approximation: by name.
        inputs: shapes that were traced.
        rows: in order of execution; `modules` are those that own parameters.
        parameters_total: entries, tied parameters once.
        parameters_random: entries that the posterior covers.
        unused: random parameters that no operation read.
        drops: what the approximation leaves out by design.
        cost: predicted; a lower bound while something is missing.
        notes: about the output.
    """

    model: str
    approximation: str
    inputs: tuple[str, ...]
    rows: tuple[OperationRow, ...]
    modules: tuple[ModuleParameters, ...]
    parameters_total: int
    parameters_random: int
    unused: tuple[str, ...]
    drops: tuple[str, ...]
    cost: Cost
    notes: tuple[str, ...] = ()

    @property
    def missing(self) -> tuple[OperationRow, ...]:
        """The rows that stop a single pass: no rule, or refused by it."""
        return tuple(row for row in self.rows if row.status in ("missing", "refused"))

    @property
    def counts(self) -> dict[str, int]:
        """Calls by status."""
        return {word: sum(row.calls for row in self.rows if row.status == word) for word in get_args(Status)}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {**asdict(self), "counts": self.counts, "complete": not self.missing}


def inspect_model(
    model: nn.Module, inputs: Any, posterior: Posterior | None = None, approximation: Approximation | str = FAITHFUL
) -> Coverage:
    """Trace the model once and say which rule answers where.

    Args:
        model: any `nn.Module` in eval mode; a copy runs, it is never modified.
        inputs: a tensor, a tuple of arguments or a dict of keyword arguments; cost depends on their size.
        posterior: over any subset of the parameters; without one, every floating-point parameter
            that requires a gradient counts as random.
        approximation: see `SinglePass`.

    Raises:
        InvalidInput: the model is in training mode, cannot be called so, or has nothing to be random.
        PosteriorMismatch: posterior and model do not fit.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    >>> coverage = inspect_model(model, torch.zeros(2, 4))
    >>> [(row.path, row.status) for row in coverage.rows], coverage.parameters_random, coverage.missing
    ([('0', 'exact'), ('1', 'exact'), ('2', 'exact')], 67, ())
    """
    chosen = named_approximation(approximation)
    posterior = _every_parameter(model) if posterior is None else posterior
    args, kwargs = call_arguments(inputs)
    single = SinglePass(model, posterior, chosen)
    plain, spent = Meter(), Meter()
    with torch.no_grad():
        try:
            with plain:
                single.model(*args, **kwargs)
        except Exception as error:  # whatever the user's model raises
            problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
            given = ", ".join(_describe_inputs(inputs)) or "no tensors"
            msg = f"{type(model).__name__} cannot be called with {given} ({problem}); pass inputs that it takes"
            raise InvalidInput(msg) from error
        recorder = _Recorder(single.model, chosen)
        with spent, recorder:
            single.moments(*args, **kwargs)
    modules = tuple(_parameters_by_module(model, set(posterior.names)))
    names = {id(p): n for n, p in single.model.named_parameters(remove_duplicate=False) if n in set(posterior.names)}
    return Coverage(
        model=type(model).__name__,
        approximation=chosen.name,
        inputs=_describe_inputs(inputs),
        rows=recorder.rows(),
        modules=modules,
        parameters_total=sum(module.total for module in modules),
        parameters_random=sum(module.random for module in modules),
        unused=tuple(name for key, name in names.items() if key not in recorder.used),
        drops=chosen.drops,
        cost=compared(spent, plain),
        notes=tuple(recorder.notes),
    )


class _Recorder(TorchFunctionMode):
    """Notes every operation on Gaussian tensors and carries on where a rule is missing."""

    def __init__(self, model: nn.Module, approximation: Approximation) -> None:
        super().__init__()
        self.approximation = approximation
        self.used: set[int] = set()
        self.notes: list[str] = []
        self._calls: Counter[OperationRow] = Counter()
        self._within: list[tuple[str, nn.Module]] = [("", model)]
        self._stand_ins: dict[int, tuple[Tensor, GaussianTensor]] = {}
        for path, module in model.named_modules():
            if module_rule_for(module) is not None:
                self._watch_whole(module)
            module.register_forward_pre_hook(partial(self._enter, path), prepend=True)
            module.register_forward_hook(self._leave, always_call=True)
        model.register_forward_hook(self._pick_output)

    def rows(self) -> tuple[OperationRow, ...]:
        """What was seen, in order of first execution."""
        return tuple(replace(row, calls=calls) for row, calls in self._calls.items())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            return func(*args, **kwargs)
        if self._stand_ins:
            args, kwargs = pytree.tree_map(lambda x: self._stand_ins.get(id(x), (x, x))[1], (args, kwargs))
        if not self._meets_gaussians((args, kwargs)):
            return func(*args, **kwargs)
        try:
            result = func(*args, **kwargs)
        except Exception as error:  # a rule that fails is reported; what fails on plain tensors too is raised below
            result = self._on_means(func, args, kwargs)
            self._note(operation_name(func), None, error)
            return result
        entry = rules().get(in_place_operations().get(func, func))
        self._note(operation_name(func), entry and entry.accuracy_under(self.approximation))
        return result

    def _note(self, operation: str, accuracy: Accuracy | None, error: Any = None, whole: bool = False) -> None:
        path, module = self._within[-1]
        status: Status = "exact" if accuracy is not None and accuracy.exact else "approximate"
        reason, location, drops = "", "", ()
        if error is not None:
            status = "missing" if isinstance(error, MissingRule) else "refused"
            kind = "" if isinstance(error, UnsupportedOp) else f"{type(error).__name__}: "
            reason, location = f"{kind}{error}", _user_line()
        elif any(word in operation.lower() for word in ("attention", "softmax")):
            drops = self.approximation.drops
        bounds = (None, None) if accuracy is None else (accuracy.mean, accuracy.variance)
        row = OperationRow(path, type(module).__name__, operation, 0, status, *bounds, whole, drops, reason, location)
        self._calls[row] += 1

    def _meets_gaussians(self, values: Any) -> bool:
        met = [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, GaussianTensor)]
        self.used.update(id(leaf.gaussian_mean) for leaf in met)
        return bool(met)

    def _on_means(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The operation on the means, its floating-point results Gaussian again with zero variance."""
        name = getattr(func, "__name__", "")
        stores = func in in_place_operations() or kwargs.get("inplace") or name in IN_PLACE_METHODS | {"__setitem__"}
        stores = stores or (name.endswith("_") and not name.endswith("__"))
        target = args[0] if stores and args else None
        if isinstance(target, GaussianTensor):  # never into the memory of a parameter
            args = (target.gaussian_mean.clone(), *args[1:])
        args, kwargs = pytree.tree_map(
            lambda x: x.gaussian_mean if isinstance(x, GaussianTensor) else x, (args, kwargs)
        )
        result = func(*args, **kwargs)
        if not isinstance(target, Tensor):
            return pytree.tree_map(self._gaussian, result)
        if isinstance(target, GaussianTensor):
            target.store(Moments(args[0], torch.zeros_like(args[0])))
            return target
        replaced = self._gaussian(target)
        self._stand_ins[id(target)] = (target, replaced)
        return replaced

    def _gaussian(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, GaussianTensor) or not value.is_floating_point():
            return value
        return GaussianTensor(Moments(value, torch.zeros_like(value)), self.approximation)

    def _enter(self, path: str, module: nn.Module, args: Any) -> None:  # noqa: ARG002
        self._within.append((path, module))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG002
        self._within.pop()

    def _watch_whole(self, module: nn.Module) -> None:
        """Note a block that a module rule answers; where the rule fails, go on with the block's parts."""
        taken, name = module.forward, f"{type(module).__module__}.{type(module).__qualname__}"

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self._meets_gaussians((args, kwargs, list(module.parameters()))):
                return taken(*args, **kwargs)
            try:
                result = taken(*args, **kwargs)
            except Exception as error:  # as for operations
                self._note(name, None, error, whole=True)
                return type(module).forward(module, *args, **kwargs)
            self._note(name, None, whole=True)
            return result

        module.forward = forward

    def _pick_output(self, module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG002
        """The output itself, or its first tensor with a note where a predictor could not read it."""
        try:
            found = model_output(output)
        except InvalidInput as error:
            self.notes.append(str(error))
            tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
            if not tensors:
                return torch.zeros(())
            found = tensors[0]
        if not isinstance(found, GaussianTensor):
            self.notes.append("the output is deterministic: no variance of a random parameter reaches it")
        return found


def _user_line() -> str:
    """file:line of the innermost frame that is neither torch's nor ours; torch's module where there is none."""
    frame, inside_torch = sys._getframe(1), ""
    while frame is not None and frame.f_code.co_filename != propagation.__file__:
        file, line = frame.f_code.co_filename, f"{frame.f_code.co_filename}:{frame.f_lineno}"
        if file.startswith(TORCH_FOLDER):
            inside_torch = inside_torch or (line if f"{Path('nn', 'modules')}" in file else "")
        elif file != __file__:
            return line
        frame = frame.f_back
    return inside_torch


def _every_parameter(model: nn.Module) -> DiagonalGaussian:
    chosen = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}
    if not chosen:
        msg = f"{type(model).__name__} has no floating-point parameter that requires a gradient; pass posterior="
        raise InvalidInput(msg)
    return DiagonalGaussian(chosen, {name: torch.full_like(p, DEFAULT_VARIANCE) for name, p in chosen.items()})


def _parameters_by_module(model: nn.Module, random_names: set[str]) -> Iterator[ModuleParameters]:
    random = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in random_names}
    counted: set[int] = set()
    for path, module in model.named_modules():
        own = {id(p): p.numel() for p in module.parameters(recurse=False) if id(p) not in counted}
        counted.update(own)
        if own:
            covered = sum(size for key, size in own.items() if key in random)
            yield ModuleParameters(path, type(module).__name__, sum(own.values()), covered)


def _describe_inputs(inputs: Any) -> tuple[str, ...]:
    args, kwargs = call_arguments(inputs)
    named = [*(("", value) for value in args), *kwargs.items()]
    tensors = [(name, value) for name, value in named if isinstance(value, Tensor)]
    return tuple(f"{name} {tuple(t.shape)} {t.dtype}".strip().replace("torch.", "") for name, t in tensors)
