"""Posterior: a distribution over named parameters of any `nn.Module`.

It covers any subset of the parameters; names outside it are deterministic, and tied weights are
one parameter with several names. To add a kind, copy `mean_field.py` and run
`bayespass.testing.check_posterior` on it.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bayespass.errors import InvalidInput, InvalidPosteriorFile, PosteriorMismatch, require_positive
from bayespass.likelihood import Likelihood, SigmaNoise, check_likelihood
from bayespass.posterior import store
from bayespass.version import __version__


@dataclass(frozen=True)
class PosteriorInfo:
    """What a posterior was fitted with.

    Args:
        likelihood: "classification" or "regression".
        n_data: number of training points N.
        prior_precision: a0 of the prior N(0, 1/a0), or of the prior around `prior_mean`.
        temperature: T, tempers likelihood and prior alike: precision (N h + a0) / T.
        sigma_noise: sd of the observation noise, or "predicted" where the network outputs (mean, log
            variance), for regression.
        method: the method that made it.
        settings: its hyper-parameters, numbers and words only.

    Raises:
        InvalidInput: a value outside its range.
    """

    likelihood: Likelihood = "classification"
    n_data: int = 1
    prior_precision: float = 1.0
    temperature: float = 1.0
    sigma_noise: SigmaNoise | None = None
    method: str = "unknown"
    settings: Mapping[str, float | int | str | bool | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_likelihood(self.likelihood, self.sigma_noise)
        for name in ("n_data", "prior_precision", "temperature"):
            if not getattr(self, name) > 0:
                msg = f"{name} must be positive; got {getattr(self, name)!r}"
                raise InvalidInput(msg)


class Posterior(ABC):
    """Maps parameter names to distributions.

    `mean` and `variance` are mappings from name to tensor; `variance` is the marginal of each
    entry. Methods that a structure cannot offer raise `NotImplementedError` and say so.
    """

    kind: ClassVar[str]
    info: PosteriorInfo

    _KINDS: ClassVar[dict[str, type["Posterior"]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in cls.__dict__:
            Posterior._KINDS[cls.kind] = cls

    @property
    @abstractmethod
    def mean(self) -> Mapping[str, Tensor]:
        """E[theta] by parameter name."""

    @property
    @abstractmethod
    def variance(self) -> Mapping[str, Tensor]:
        """Marginal Var[theta] by parameter name, >= 0."""

    @abstractmethod
    def sample(self, n_samples: int, generator: torch.Generator | int) -> Iterator[dict[str, Tensor]]:
        """Draws of the random parameters; equal seeds give equal draws on one device."""

    @abstractmethod
    def subset(self, names: "Iterable[str] | Callable[[str], bool]") -> "Posterior":
        """The posterior of these parameters alone; the others become deterministic."""

    def temper(self, temperature: float) -> "Posterior":
        """The same posterior at temperature T relative to the present one: covariance times T, `info.temperature` too.

        T < 1 is a colder, narrower posterior; T = 1 changes nothing. Exact for Gaussians. A `Mixture` tempers its
        components and keeps their weights, a `Product` its parts.

        Args:
            temperature: T > 0.

        Raises:
            InvalidInput: T is not a positive, finite number.
            NotImplementedError: this structure has no temperature, and what to do instead.
        """
        require_positive(temperature=temperature)
        return self._tempered(temperature, replace(self.info, temperature=self.info.temperature * temperature))

    def merge(self, other: "Posterior") -> "Posterior":
        """The posterior over both sets of names, this one and the other independent.

        Two diagonal Gaussians with equal `info` become one; anything else a `Product`, which is never nested.

        Args:
            other: over other parameters of the same model, fitted to the same data.

        Raises:
            InvalidInput: a name is in both, or they differ in likelihood, sigma_noise or n_data.
        """
        from bayespass.posterior.product import merged

        return merged(self, other)

    def _tempered(self, temperature: float, info: PosteriorInfo) -> "Posterior":
        """With the covariance times a checked `temperature`, and this info.

        Raises:
            NotImplementedError: the structure does not say how.
        """
        msg = f"a posterior of kind {self.kind!r} has no temper; fit it with temperature= instead"
        raise NotImplementedError(msg)

    @abstractmethod
    def _tensors(self) -> dict[str, Tensor]:
        """Everything the structure stores, by file key."""

    @classmethod
    @abstractmethod
    def _from_tensors(cls, tensors: Mapping[str, Tensor], names: list[str], info: PosteriorInfo) -> "Posterior":
        """The reverse of `_tensors`."""

    def _structure(self) -> dict[str, Any]:
        """What a file needs to know besides the tensors, as JSON; nothing by default."""
        return {}

    @classmethod
    def _from_file(
        cls,
        tensors: Mapping[str, Tensor],
        names: list[str],
        info: PosteriorInfo,
        structure: Mapping[str, Any],  # noqa: ARG003
    ) -> "Posterior":
        """The reverse of `_tensors` and `_structure`."""
        return cls._from_tensors(tensors, names, info)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the random parameters."""
        return tuple(self.mean)

    def log_prob(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Log density of parameter values, in nats.

        Raises:
            NotImplementedError: this structure has no density.
        """
        msg = f"a posterior of kind {self.kind!r} has no log_prob"
        raise NotImplementedError(msg)

    def covariance_times(self, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cov[theta] x, by name.

        Args:
            vector: x, a tensor of the parameter's shape for every name.

        Raises:
            NotImplementedError: this structure has no covariance to multiply with.
        """
        msg = f"a posterior of kind {self.kind!r} has no covariance_times; use its variance, or its draws"
        raise NotImplementedError(msg)

    def save(self, path: str | os.PathLike[str], model: nn.Module, scales: Mapping[str, float] | None = None) -> None:
        """Write one safetensors file that `load` accepts only for the same model.

        Args:
            path: the file; it is replaced in one step.
            model: the model the posterior belongs to; its frozen weights and buffers are hashed.
            scales: fitted `VarianceScales` to keep with the posterior.

        Raises:
            PosteriorMismatch: names or shapes do not fit the model.
        """
        self.check_model(model)
        manifest = {
            "kind": self.kind,
            "names": list(self.names),
            "shapes": {name: list(tensor.shape) for name, tensor in self.mean.items()},
            "mean_hash": store.hash_tensors(self.mean),
            "frozen_hash": store.hash_tensors(store.frozen_tensors(model, set(self.names))),
            "info": asdict(self.info),
            "bayespass_version": __version__,
        }
        if structure := self._structure():
            manifest["structure"] = structure
        if scales is not None:
            manifest["scales"] = {"approximation": getattr(scales, "approximation", None), "factors": dict(scales)}
            if dampings := getattr(scales, "dampings", None):
                manifest["scales"]["dampings"] = dict(dampings)
            if output := getattr(scales, "output", None):
                manifest["scales"]["output"] = output.as_dict()
        store.write(path, self._tensors(), manifest)

    @staticmethod
    def load(path: str | os.PathLike[str], model: nn.Module) -> "Posterior":
        """The posterior in a file, checked against the model it is for.

        Raises:
            FileNotFoundError: there is no such file.
            InvalidPosteriorFile: the file is damaged, foreign, or of an unknown kind.
            PosteriorMismatch: names, shapes, frozen weights or buffers differ.
        """
        tensors, manifest = store.read(path)
        kind = Posterior._KINDS.get(manifest.get("kind", ""))
        if kind is None:
            msg = f"{path} holds a posterior of kind {manifest.get('kind')!r}, which this version does not know"
            raise InvalidPosteriorFile(msg)
        try:
            info = PosteriorInfo(**manifest["info"])
            posterior = kind._from_file(tensors, list(manifest["names"]), info, manifest.get("structure", {}))
        except (KeyError, TypeError, InvalidInput) as error:
            msg = f"{path} is damaged: its manifest or tensors are not those of a posterior ({error}). Save it again"
            raise InvalidPosteriorFile(msg) from error
        if store.hash_tensors(posterior.mean) != manifest.get("mean_hash"):
            msg = f"{path} is damaged: the mean weights do not match their hash in the manifest. Save it again"
            raise InvalidPosteriorFile(msg)
        posterior.check_model(model)
        if store.hash_tensors(store.frozen_tensors(model, set(posterior.names))) != manifest.get("frozen_hash"):
            msg = (
                f"{path} was saved for a model whose frozen weights or buffers differ from this one's "
                f"(hash mismatch); load the checkpoint that the posterior was fitted on"
            )
            raise PosteriorMismatch(msg)
        return posterior

    def check_model(self, model: nn.Module) -> None:
        """Raise unless every random parameter exists in the model with the same shape.

        Raises:
            PosteriorMismatch: a name is missing or a shape differs.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        missing = [name for name in self.names if name not in parameters]
        if missing:
            shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            msg = (
                f"the posterior has parameters that {type(model).__name__} lacks: {shown}; "
                f"use the model that the posterior was fitted on"
            )
            raise PosteriorMismatch(msg)
        owners: dict[int, str] = {}
        for name, mean in self.mean.items():
            first = owners.setdefault(id(parameters[name]), name)
            if first != name:
                msg = f"{first} and {name} are one tied parameter of {type(model).__name__}; keep one of the two names"
                raise PosteriorMismatch(msg)
            if parameters[name].shape != mean.shape:
                msg = (
                    f"parameter {name} has shape {tuple(mean.shape)} in the posterior and "
                    f"{tuple(parameters[name].shape)} in {type(model).__name__}; use the model it was fitted on"
                )
                raise PosteriorMismatch(msg)


def nested_tensors(label: str, members: Sequence[Posterior]) -> dict[str, Tensor]:
    """The tensors of posteriors inside another, by file key."""
    return {f"{label}/{k}/{key}": tensor for k, q in enumerate(members) for key, tensor in q._tensors().items()}


def nested_structure(members: Sequence[Posterior]) -> list[dict[str, Any]]:
    """What a file needs to know of posteriors inside another, besides their tensors."""
    return [
        {"kind": q.kind, "names": list(q.names), "info": asdict(q.info), "structure": q._structure()} for q in members
    ]


def from_nested(label: str, tensors: Mapping[str, Tensor], entries: Sequence[Mapping[str, Any]]) -> list[Posterior]:
    """The reverse of `nested_tensors` and `nested_structure`.

    Raises:
        InvalidPosteriorFile: one is of a kind that this version does not know.
    """
    members = []
    for k, entry in enumerate(entries):
        kind = Posterior._KINDS.get(entry["kind"])
        if kind is None:
            msg = f"{label} {k} of the posterior is of kind {entry['kind']!r}, which this version does not know"
            raise InvalidPosteriorFile(msg)
        prefix = f"{label}/{k}/"
        own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        info = PosteriorInfo(**entry["info"])
        members.append(kind._from_file(own, list(entry["names"]), info, entry.get("structure", {})))
    return members


def as_generator(seed: torch.Generator | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator from a seed, or the generator itself."""
    if isinstance(seed, torch.Generator):
        return seed
    return torch.Generator(device).manual_seed(seed)


def require_values(names: Iterable[str], values: Mapping[str, Tensor]) -> None:
    """Raise unless there is a value for every random parameter.

    Raises:
        InvalidInput: one is missing.
    """
    missing = [name for name in names if name not in values]
    if missing:
        msg = f"a value for every random parameter is needed; missing {', '.join(missing[:3])}"
        raise InvalidInput(msg)


def choose_names(available: Iterable[str], names: "Iterable[str] | Callable[[str], bool]") -> list[str]:
    """The available names that are listed, or for which the predicate holds, in their own order.

    Raises:
        InvalidInput: a listed name is not available, or nothing is left.
    """
    available = list(available)
    if callable(names):
        chosen = [name for name in available if names(name)]
    else:
        wanted = {names} if isinstance(names, str) else set(names)
        unknown = wanted - set(available)
        if unknown:
            msg = f"no parameter named {', '.join(sorted(unknown))}; there are {', '.join(available[:5])}, ..."
            raise InvalidInput(msg)
        chosen = [name for name in available if name in wanted]
    if not chosen:
        msg = "the selection leaves no random parameter; choose at least one name"
        raise InvalidInput(msg)
    return chosen
