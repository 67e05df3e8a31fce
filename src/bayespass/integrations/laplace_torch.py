"""Laplace approximations fitted with laplace-torch (0.2 and 0.3), by parameter name.

    la = laplace.Laplace(model, "classification", hessian_structure="kron")
    la.fit(train_loader)
    la.optimize_prior_precision()
    posterior = from_laplace_torch(la, model)                              # same mean, same covariance
    prediction = SinglePass(model.eval(), posterior)(inputs)

laplace-torch flattens the parameters in the order of the model and divides the curvature alone by its
temperature: precision H / T + a0. Here a temperature tempers likelihood and prior alike, (H + a) / T, so that
`info` has the same T and prior precision a = T a0; the covariance is the same. A prior precision per layer or
per parameter is in the covariance exactly, and `info` has its average. The prior mean moves neither mean nor
covariance there, only the marginal likelihood, and is not kept.

Nothing of laplace-torch is imported; its objects are read by their public attributes.

Source: Daxberger et al. 2021 (arXiv 2106.14806); https://github.com/aleximmer/Laplace (MIT).
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from bayespass.errors import InvalidInput, NotFitted
from bayespass.posterior.base import PosteriorInfo
from bayespass.posterior.full import FullGaussian
from bayespass.posterior.kronecker import KroneckerGaussian
from bayespass.posterior.mean_field import DiagonalGaussian

NEEDED = ("model", "likelihood", "n_data", "mean", "temperature", "prior_precision", "sigma_noise")
LIKELIHOODS = ("classification", "regression")
KRON = ("eigenvectors", "eigenvalues", "deltas")


def from_laplace_torch(
    laplace: Any, model: nn.Module | None = None
) -> DiagonalGaussian | KroneckerGaussian | FullGaussian:
    """The posterior of a fitted laplace-torch object, with equal mean and covariance.

    `hessian_structure` "diag", "kron" and "full" become `DiagonalGaussian`, `KroneckerGaussian` and
    `FullGaussian`; `subset_of_weights` "all", "last_layer" and "subnetwork" decide the names. Entries outside a
    subnetwork have variance zero; a full one takes a root of (entries of its parameters, size of the subnetwork).

    Args:
        laplace: fitted, of any of these structures.
        model: the network that will predict; by default the one inside `laplace`. A copy of that network is
            found by parameter names.

    Raises:
        InvalidInput: no laplace-torch object; a structure ("lowrank", "gp") or likelihood without a counterpart;
            a last layer whose weight is used elsewhere too; a precision that is not positive.
        NotFitted: it has not seen data yet.
        PosteriorMismatch: the model is another one.
    """
    _check_fitted(laplace)
    network, members = _network_and_parameters(laplace)
    names = _names(members, network, model)
    mean = laplace.mean.detach()
    sizes = [parameter.numel() for parameter in members]
    if mean.shape != (sum(sizes),):
        msg = f"laplace.mean has shape {tuple(mean.shape)} for {sum(sizes)} parameters; fit it again on this model"
        raise InvalidInput(msg)
    parts = mean.split(sizes)
    means = {n: part.view(p.shape).clone() for n, part, p in zip(names, parts, members, strict=True)}
    precision = laplace.posterior_precision
    indices = laplace.backend.subnetwork_indices if hasattr(laplace, "n_params_subnet") else None
    if isinstance(precision, Tensor) and precision.dim() in (1, 2):
        structure = "diag" if precision.dim() == 1 else "full"
        info = _info(laplace, structure, network, indices, sizes)
        convert = _diagonal if structure == "diag" else _full
        posterior = convert(means, precision.detach(), indices, info)
    elif all(hasattr(precision, name) for name in KRON):
        posterior = _kronecker(means, precision, _info(laplace, "kron", network, indices, sizes))
    else:
        msg = (
            f"the posterior precision of {type(laplace).__name__} is neither a diagonal, Kronecker factors nor a "
            f"matrix, and has no counterpart here; fit it with hessian_structure='diag', 'kron' or 'full'"
        )
        raise InvalidInput(msg)
    posterior.check_model(network if model is None else model)
    return posterior


def _check_fitted(laplace: Any) -> None:
    """Raise unless this is a fitted object with a posterior over weights.

    Raises:
        InvalidInput: it is of another kind.
        NotFitted: it is not fitted.
    """
    missing = [
        name for name in NEEDED if inspect.getattr_static(laplace, name, None) is None and name not in vars(laplace)
    ]
    if missing:
        msg = (
            f"{type(laplace).__name__} is no Laplace object of laplace-torch 0.2 or 0.3; it lacks {', '.join(missing)}"
        )
        raise InvalidInput(msg)
    if inspect.getattr_static(laplace, "posterior_precision", None) is None:
        msg = (
            f"{type(laplace).__name__} has no posterior over weights; fit Laplace with "
            f"hessian_structure='diag', 'kron' or 'full'"
        )
        raise InvalidInput(msg)
    if not laplace.n_data or getattr(laplace, "H", None) is None or not isinstance(laplace.mean, Tensor):
        msg = f"{type(laplace).__name__} has seen no data; call its fit(train_loader) first"
        raise NotFitted(msg)
    likelihood = str(getattr(laplace.likelihood, "value", laplace.likelihood))
    if likelihood not in LIKELIHOODS:
        msg = f"likelihood {likelihood!r} has no counterpart here; only {' and '.join(LIKELIHOODS)} have"
        raise InvalidInput(msg)


def _network_and_parameters(laplace: Any) -> tuple[nn.Module, list[nn.Parameter]]:
    """The network that the user passed in, or its copy, and the parameters in the order of the flat vector.

    Raises:
        InvalidInput: the weight of the last layer is used elsewhere too.
    """
    if not hasattr(laplace, "_last_layer_name"):
        network = laplace.model
        trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
        return network, list(getattr(laplace, "params", trainable))
    network, members = laplace.model.model, list(laplace.model.last_layer.parameters())
    names: dict[int, list[str]] = {id(parameter): [] for parameter in members}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.get(id(parameter), []).append(name)
    if tied := [own for own in names.values() if len(own) > 1]:
        msg = (
            f"the last layer shares a parameter: {' and '.join(tied[0])} are one, and laplace-torch varies only its "
            f"use in the last layer. Untie them, or fit bayespass.Laplace"
        )
        raise InvalidInput(msg)
    return network, members


def _names(members: list[nn.Parameter], network: nn.Module, model: nn.Module | None) -> list[str]:
    """Names in the model where it holds these very parameters, in the network of laplace-torch otherwise."""
    theirs = {id(parameter): name for name, parameter in network.named_parameters()}
    ours = {} if model is None else {id(parameter): name for name, parameter in model.named_parameters()}
    return [ours.get(id(parameter), theirs[id(parameter)]) for parameter in members]


def _info(laplace: Any, structure: str, network: nn.Module, indices: Tensor | None, sizes: list[int]) -> PosteriorInfo:
    likelihood = str(getattr(laplace.likelihood, "value", laplace.likelihood))
    prior = torch.as_tensor(laplace.prior_precision, dtype=torch.float64)
    prior = prior.flatten().cpu()
    weights = torch.tensor(sizes, dtype=prior.dtype) if len(prior) == len(sizes) else torch.ones_like(prior)
    average = float((prior * weights).sum() / weights.sum())
    temperature = float(laplace.temperature)
    subset = "subnetwork" if indices is not None else "all" if laplace.model is network else "last_layer"
    settings = {"hessian_structure": structure, "subset_of_weights": subset, "prior_precisions": prior.numel()}
    noise = float(laplace.sigma_noise) if likelihood == "regression" else None
    n_data = int(laplace.n_data)
    return PosteriorInfo(likelihood, n_data, temperature * average, temperature, noise, "laplace-torch", settings)  # type: ignore[arg-type]


def _diagonal(
    means: dict[str, Tensor], precision: Tensor, indices: Tensor | None, info: PosteriorInfo
) -> DiagonalGaussian:
    _check_positive(precision)
    variance = 1 / precision
    if indices is not None:
        means, places, size = _touched(means, indices)
        variance = torch.zeros(size, dtype=variance.dtype, device=variance.device).index_copy_(0, places, variance)
    parts = variance.split([mean.numel() for mean in means.values()])
    return DiagonalGaussian(means, {n: v.view(m.shape) for (n, m), v in zip(means.items(), parts, strict=True)}, info)


def _full(means: dict[str, Tensor], precision: Tensor, indices: Tensor | None, info: PosteriorInfo) -> FullGaussian:
    """With precision L L^T the root of the covariance is L^-T.

    Raises:
        InvalidInput: the precision is not positive definite.
    """
    factor, failed = torch.linalg.cholesky_ex(precision.double())
    if failed:
        msg = "the posterior precision is not positive definite; raise the prior precision of the Laplace object"
        raise InvalidInput(msg)
    unit = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    root = torch.linalg.solve_triangular(factor.mT, unit, upper=True).to(precision.dtype)
    if indices is not None:
        means, places, size = _touched(means, indices)
        root = torch.zeros(size, root.shape[1], dtype=root.dtype, device=root.device).index_copy_(0, places, root)
    return FullGaussian(means, root, info)


def _kronecker(means: dict[str, Tensor], precision: Any, info: PosteriorInfo) -> KroneckerGaussian:
    """Eigenvalues of a weight (out, in) are l_out l_in + delta, or (l_out + delta^.5) (l_in + delta^.5) with damping.

    Raises:
        InvalidInput: the factors are not those of the parameters.
    """
    variance, left, right = {}, {}, {}
    deltas = precision.deltas.expand(len(precision.eigenvalues))
    blocks = zip(means.items(), precision.eigenvectors, precision.eigenvalues, deltas, strict=True)
    for (name, mean), vectors, values, delta in blocks:
        rows = mean.shape[0] if mean.dim() else 1
        sizes = [rows] if len(values) == 1 else [rows, mean.numel() // max(rows, 1)]
        if [len(value) for value in values] != sizes or (len(values) == 1 and mean.numel() != rows):
            msg = (
                f"{name} of shape {tuple(mean.shape)} has Kronecker factors of sizes {[len(v) for v in values]}; only "
                f"(out, in) for weights and (out,) for biases have a counterpart here"
            )
            raise InvalidInput(msg)
        shift = delta.sqrt() if getattr(precision, "damping", False) else torch.zeros_like(delta)
        if len(values) == 1:
            spectrum = values[0] + delta
        else:
            spectrum = torch.outer(values[0] + shift, values[1] + shift) + (delta - shift.square())
            right[name] = vectors[1].detach()
        _check_positive(spectrum)
        variance[name] = (1 / spectrum.detach()).reshape(mean.shape)
        left[name] = vectors[0].detach()
    return KroneckerGaussian(means, variance, left, right, info)


def _touched(means: dict[str, Tensor], indices: Tensor) -> tuple[dict[str, Tensor], Tensor, int]:
    """Parameters with an entry in the subnetwork, where its entries lie among theirs, and how many these are."""
    kept, places, start, offset = {}, torch.full_like(indices, -1), 0, 0
    for name, mean in means.items():
        inside = (indices >= start) & (indices < start + mean.numel())
        if inside.any():
            kept[name] = mean
            places[inside] = indices[inside] - start + offset
            offset += mean.numel()
        start += mean.numel()
    device = next(iter(means.values())).device
    return kept, places.to(device), offset


def _check_positive(precision: Tensor) -> None:
    if not bool((precision > 0).all()):
        msg = "the posterior precision is not positive everywhere; raise the prior precision of the Laplace object"
        raise InvalidInput(msg)
