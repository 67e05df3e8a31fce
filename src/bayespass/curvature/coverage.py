"""Which curvature every parameter of a network got, and why."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from bayespass.curvature.blocks import has_block

Structure = Literal["kron expand", "kron reduce", "diagonal", "full", "frozen"]


@dataclass(frozen=True)
class ParameterCoverage:
    """One parameter.

    Args:
        name: as in `model.named_parameters()`.
        shape: of the parameter.
        structure: "kron expand" or "kron reduce" (a Kronecker product, by `kfac_approx`), "diagonal", "full"
            (one matrix for all), or "frozen" (not random).
        reason: what it belongs to, or why it has no more than that.
    """

    name: str
    shape: tuple[int, ...]
    structure: Structure
    reason: str

    @property
    def count(self) -> int:
        """Its entries."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class CurvatureCoverage:
    """The curvature of every parameter of a model; `str()` is a table with totals.

    Args:
        parameters: one entry each, in the model's order.

    >>> print(CurvatureCoverage((ParameterCoverage("weight", (2, 3), "kron expand", "Linear"),)))
    parameter  shape  count  structure    reason
    weight     2 x 3      6  kron expand  Linear
    6 parameters: 100.0 % kron expand
    """

    parameters: tuple[ParameterCoverage, ...] = field(repr=False)

    def __repr__(self) -> str:
        return str(self)

    @property
    def totals(self) -> dict[Structure, int]:
        """Entries by structure, most first."""
        found: dict[Structure, int] = {}
        for parameter in self.parameters:
            found[parameter.structure] = found.get(parameter.structure, 0) + parameter.count
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def __str__(self) -> str:
        head = ("parameter", "shape", "count", "structure", "reason")
        rows = [
            (p.name, " x ".join(map(str, p.shape)) or "scalar", f"{p.count:,}", p.structure, p.reason)
            for p in self.parameters
        ]
        widths = [max(len(row[k]) for row in (head, *rows)) for k in range(4)]
        lines = []
        for row in (head, *rows):
            cells = [row[k].rjust(widths[k]) if k == 2 else row[k].ljust(widths[k]) for k in range(4)]
            lines.append("  ".join([*cells, row[4]]).rstrip())
        whole = sum(self.totals.values())
        shares = ", ".join(f"{100 * count / max(1, whole):.1f} % {name}" for name, count in self.totals.items())
        return "\n".join([*lines, f"{whole:,} parameters: {shares}"])


def curvature_coverage(model: nn.Module, structures: Mapping[str, Structure], chosen: str = "") -> CurvatureCoverage:
    """What every parameter of a model got.

    Args:
        model: that was fitted.
        structures: of the random parameters, by name; all others are frozen.
        chosen: what is said of parameters that have the structure that was asked for; by default the layer
            that they belong to.
    """
    owners = _owners(model)
    found = []
    for name, parameter in model.named_parameters():
        structure = structures.get(name)
        if structure is None:
            reason = "requires_grad=False" if not parameter.requires_grad else "left out by names="
            if not parameter.is_floating_point():
                reason = f"not floating point ({str(parameter.dtype).removeprefix('torch.')})"
            found.append(ParameterCoverage(name, tuple(parameter.shape), "frozen", reason))
            continue
        owning = owners[id(parameter)]
        reason = chosen or (_why_diagonal(owning) if structure == "diagonal" else type(owning[0][1]).__name__)
        found.append(ParameterCoverage(name, tuple(parameter.shape), structure, reason))
    return CurvatureCoverage(tuple(found))


def _owners(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """Paths and modules that have a parameter of their own, by its identity."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((path, module))
    return owners


def _why_diagonal(owning: Iterable[tuple[str, nn.Module]]) -> str:
    owning = list(owning)
    module = owning[0][1]
    kind = type(module).__name__
    if len(owning) > 1:
        return f"tied: {', '.join(path or 'the model' for path, _ in owning)} share it"
    if getattr(module, "groups", 1) != 1:
        return f"{kind} in {module.groups} groups"
    linear = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) or (kind == "Conv1D" and has_block(module))
    if linear:
        return f"{kind} that is not used by its own calls alone"
    return kind
