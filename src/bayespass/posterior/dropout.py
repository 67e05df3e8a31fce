"""MC-dropout as a posterior over the weights of the linear layers behind it.

Dropping input unit j of a linear layer and scaling the others by 1 / (1 - p) is the same as drawing its
weights with column j multiplied by m_j in {0, 1 / (1 - p)}: E[W] = theta and Var[W_ij] = theta_ij^2
p / (1 - p). All entries of a column share one mask, and so do all layers that one dropout feeds. A draw
of the weights holds for a whole batch, every row and every position of it, where `nn.Dropout` in
training mode masks rows and positions independently; for one row that is the same distribution.

Source: Gal and Ghahramani 2016 (arXiv 1506.02142).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from bayespass.batches import call_arguments
from bayespass.errors import InvalidInput
from bayespass.posterior.base import Posterior, PosteriorInfo, as_generator, choose_names
from bayespass.predict.snapshot import check_eval

HOMOGENEOUS = {F.relu, torch.relu, Tensor.relu, F.leaky_relu}  # f(m x) = m f(x) for m >= 0
CALL = " call "  # a site is a dropout's path and the number of the call: called twice, it draws two masks
LINEAR = ("input", "weight")  # the first arguments of F.linear


class DropoutPosterior(Posterior):
    """q(W) = theta with column j multiplied by a Bernoulli mask m_j / (1 - p), m_j = 1 with probability 1 - p.

    The variance says how far the trained network tolerates missing inputs; it follows p and the size of
    the weights, not the amount of data.

    Args:
        mean: theta (rows, columns) by parameter name.
        rates: p in (0, 1) by name.
        sites: a label by name; names with one label share their mask. By default every name has its own.
        info: what it was fitted with.

    Raises:
        InvalidInput: names do not fit, a weight is not a finite matrix, a rate is outside (0, 1), or
            names of one site differ in rate or columns.

    >>> q = DropoutPosterior({"w": torch.tensor([[1.0, 2.0]])}, {"w": 0.2})
    >>> q.variance["w"]
    tensor([[0.2500, 1.0000]])
    """

    kind = "dropout"

    def __init__(
        self,
        mean: Mapping[str, Tensor],
        rates: Mapping[str, float],
        sites: Mapping[str, str] | None = None,
        info: PosteriorInfo | None = None,
    ) -> None:
        sites = {name: name for name in mean} if sites is None else sites
        if not mean or set(rates) != set(mean) or set(sites) != set(mean):
            msg = (
                f"mean, rates and sites need the same parameter names, at least one; "
                f"got {sorted(mean)}, {sorted(rates)} and {sorted(sites)}"
            )
            raise InvalidInput(msg)
        masks: dict[str, tuple[float, int]] = {}
        for name, value in mean.items():
            if value.dim() != 2 or not torch.isfinite(value).all():
                msg = f"{name} must be a finite matrix, the weight of a linear layer; got shape {tuple(value.shape)}"
                raise InvalidInput(msg)
            if not 0 < rates[name] < 1:
                msg = f"the dropout rate of {name} must lie between 0 and 1; got {rates[name]}"
                raise InvalidInput(msg)
            mask = (float(rates[name]), value.shape[1])
            if masks.setdefault(sites[name], mask) != mask:
                msg = (
                    f"{name} has (rate, columns) {mask}, but site {sites[name]!r} has {masks[sites[name]]}; "
                    f"parameters with one mask need the same of both"
                )
                raise InvalidInput(msg)
        self._mean = {name: value.detach() for name, value in mean.items()}
        self.rates = {name: float(rates[name]) for name in mean}
        self.sites = {name: sites[name] for name in mean}
        self.info = info or PosteriorInfo(method="dropout")

    @property
    def mean(self) -> Mapping[str, Tensor]:
        """E[theta] by name, the trained weights."""
        return self._mean

    @property
    def variance(self) -> Mapping[str, Tensor]:
        """Marginal Var[theta] = theta^2 p / (1 - p) by name."""
        odds = {name: rate / (1 - rate) for name, rate in self.rates.items()}
        return {
            name: value.to(torch.promote_types(value.dtype, torch.float32)).square() * odds[name]
            for name, value in self._mean.items()
        }

    def sample(self, n_samples: int, generator: torch.Generator | int = 0) -> Iterator[dict[str, Tensor]]:
        """Independent draws theta * m / (1 - p).

        Args:
            n_samples: how many.
            generator: a seed, or a generator on the parameters' device.

        Yields:
            every random parameter by name.
        """
        device = next(iter(self._mean.values())).device
        generator = as_generator(generator, device)
        for _ in range(n_samples):
            masks: dict[str, Tensor] = {}
            draw = {}
            for name, value in self._mean.items():
                site, rate = self.sites[name], self.rates[name]
                if site not in masks:
                    uniform = torch.rand(value.shape[1], generator=generator, device=device)
                    masks[site] = (uniform >= rate).float() / (1 - rate)
                draw[name] = value * masks[site].to(value.dtype)
            yield draw

    def subset(self, names: Iterable[str] | Callable[[str], bool]) -> "DropoutPosterior":
        """The posterior of these parameters alone; the others become deterministic at the model's weights.

        Args:
            names: the names to keep, or a predicate on names.
        """
        chosen = choose_names(self.names, names)
        mean = {name: self._mean[name] for name in chosen}
        return DropoutPosterior(mean, {n: self.rates[n] for n in chosen}, {n: self.sites[n] for n in chosen}, self.info)

    def _tempered(self, temperature: float, info: PosteriorInfo) -> "DropoutPosterior":
        """Refused.

        Raises:
            NotImplementedError: always; the spread follows the rate.
        """
        msg = (
            "the spread of a dropout posterior follows its rate p and the weights trained with it, which have no "
            "temperature; train the network with another rate"
        )
        raise NotImplementedError(msg)

    def _tensors(self) -> dict[str, Tensor]:
        return {f"mean/{name}": value for name, value in self._mean.items()}

    def _structure(self) -> dict[str, Any]:
        return {"rates": self.rates, "sites": self.sites}

    @classmethod
    def _from_tensors(cls, tensors: Mapping[str, Tensor], names: list[str], info: PosteriorInfo) -> "DropoutPosterior":
        return cls._from_file(tensors, names, info, {})

    @classmethod
    def _from_file(
        cls, tensors: Mapping[str, Tensor], names: list[str], info: PosteriorInfo, structure: Mapping[str, Any]
    ) -> "DropoutPosterior":
        return cls({name: tensors[f"mean/{name}"] for name in names}, structure["rates"], structure["sites"], info)


def dropout_posterior(
    model: nn.Module, inputs: Any, info: PosteriorInfo | None = None, ignore: Iterable[str] = ()
) -> DropoutPosterior:
    """The posterior that a trained network's `nn.Dropout` modules stand for, found in one traced forward pass.

    Args:
        model: trained with dropout, in eval mode; not modified.
        inputs: one batch as the model takes it: a tensor, a tuple or a dict.
        info: likelihood and what else to record.
        ignore: paths of dropout modules to leave off, as in eval mode.

    Raises:
        InvalidInput: a dropout feeds anything but linear layers (through moves of axes and ReLUs at most), a
            weight is used with two masks or once without, a dropout is of another kind, or there is none.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.1), nn.ReLU(), nn.Linear(4, 2)).eval()
    >>> dropout_posterior(model, torch.zeros(1, 3)).names
    ('3.weight',)
    """
    check_eval(model)
    trace = _Sites(model, set(ignore))
    args, kwargs = call_arguments(inputs)
    hooks = trace.hooks(model)
    try:
        with torch.no_grad(), trace:
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    fed = {_path(site) for site in trace.sites.values()}
    for path in trace.dropouts:
        if path not in fed:
            trace.problems.setdefault(path, f"dropout {path} feeds no linear layer, so no weight stands for its mask")
    if trace.problems:
        first = next(iter(trace.problems.values()))
        msg = f"{first}; leave such dropouts off with ignore={sorted(trace.problems)}"
        raise InvalidInput(msg)
    if not trace.sites:
        msg = "the model has no nn.Dropout with p > 0 to make a posterior of; train it with one before a linear layer"
        raise InvalidInput(msg)
    parameters = dict(model.named_parameters())
    ordered = [name for name in parameters if name in trace.sites]
    return DropoutPosterior(
        {name: parameters[name].detach().clone() for name in ordered},
        {name: trace.dropouts[_path(trace.sites[name])].p for name in ordered},
        {name: trace.sites[name] for name in ordered},
        info,
    )


class _Sites(TorchFunctionMode):
    """Watches where the outputs of dropout modules go during one forward pass."""

    def __init__(self, model: nn.Module, ignored: set[str]) -> None:
        super().__init__()
        kinds = {path: m for path, m in model.named_modules() if isinstance(m, _DropoutNd)}
        if unknown := ignored - set(kinds):
            msg = f"ignore names {', '.join(sorted(unknown))}, no dropout of the model; there are {', '.join(kinds)}"
            raise InvalidInput(msg)
        self.dropouts = {path: m for path, m in kinds.items() if m.p > 0 and path not in ignored}
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.sites: dict[str, str] = {}
        self.problems = {
            path: f"{path} is a {type(module).__name__}; only nn.Dropout masks every unit by itself"
            for path, module in self.dropouts.items()
            if type(module) is not nn.Dropout
        }
        self._plain: set[str] = set()
        self._calls: dict[str, int] = {}
        self._inside = 0
        self._marked: dict[int, tuple[str, Tensor, int]] = {}  # by storage; the tensor keeps its address taken

    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        """Give every dropout's output a memory of its own, to know it again."""

        def before(module: nn.Module, args: Any) -> None:  # noqa: ARG001
            self._inside += 1

        def after(path: str, module: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ARG001
            self._inside -= 1
            if path not in self.dropouts:
                return output
            self._calls[path] = self._calls.get(path, 0) + 1
            return self._mark(f"{path}{CALL}{self._calls[path]}", output.clone())

        found = [(path, module) for path, module in model.named_modules() if isinstance(module, _DropoutNd)]
        first = [module.register_forward_pre_hook(before) for _, module in found]
        return first + [module.register_forward_hook(partial(after, path)) for path, module in found]

    def _mark(self, site: str, value: Tensor) -> Tensor:
        self._marked[value.untyped_storage().data_ptr()] = (site, value, value._version)
        return value

    def _known(self, value: Any) -> tuple[str, Tensor, int] | None:
        return self._marked.get(value.untyped_storage().data_ptr()) if isinstance(value, Tensor) else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        if func is F.dropout and (kwargs["p"] if "p" in kwargs else (*args, 0.5)[1]) > 0:
            msg = "the model calls F.dropout outside a module, where its rate may change unseen; use nn.Dropout"
            raise InvalidInput(msg)
        result = func(*args, **kwargs)
        sites = {known[0] for leaf in pytree.tree_leaves((args, kwargs)) if (known := self._known(leaf))}
        if func is F.linear:
            value, weight = (kwargs.get(key, args[k] if k < len(args) else None) for k, key in enumerate(LINEAR))
            self._record(self.names.get(id(weight)), value, sites)
        elif sites and func in HOMOGENEOUS:
            self._mark(sites.pop(), result)
        elif sites:
            for leaf in pytree.tree_leaves(result):
                if isinstance(leaf, Tensor) and not self._known(leaf):  # neither a view of it nor its shape
                    self._refuse(sites, getattr(func, "__name__", str(func)))
        return result

    def _record(self, name: str | None, value: Tensor, sites: set[str]) -> None:
        known = self._known(value)
        if known is None or name is None:
            self._refuse(sites, "a linear operation, but not as its input, or with a weight that is no parameter")
            self._plain |= {name} if name is not None else set()
        else:
            site, marked, version = known
            if value.numel() != marked.numel() or marked._version != version:
                self._refuse({site}, "a linear layer only in part, or after a change in place")
            self.sites.setdefault(name, site)
        if name in self.sites and (name in self._plain or (known and self.sites[name] != known[0])):
            path = _path(self.sites[name])
            self.problems.setdefault(path, f"{name} is also used without the mask of dropout {path}")

    def _refuse(self, sites: set[str], where: str) -> None:
        for path in map(_path, sites):
            self.problems.setdefault(
                path, f"the output of dropout {path} goes into {where}, so no weight stands for its mask"
            )


def _path(site: str) -> str:
    return site.rpartition(CALL)[0]
