"""Kronecker factors of the curvature of linear layers (KFAC).

For y = W a + b the block of W is approximated by G kron A, with G the summed curvature in y and A the
mean of a a^T; it is exact for one linear layer with a Gaussian likelihood, and wherever a and the
curvature in y are independent. Both are plain sums over the data, so the split into batches does not
matter. A layer applied to several positions of a row (tokens) counts every position as a row of its
own ("expand"). The bias has the block G, exact without positions; its correlation with W is dropped.

Source: Martens and Grosse 2015 (arXiv 1503.05671); Eschenhagen et al. 2023 (arXiv 2311.00636).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from bayespass.batches import call_arguments, device_of, labelled_batches, model_output
from bayespass.curvature.diagonal import Curvature
from bayespass.curvature.output import output_root
from bayespass.curvature.rows import drawn_targets
from bayespass.errors import InvalidInput
from bayespass.likelihood import Likelihood, SigmaNoise, check_targets, negative_log_likelihood
from bayespass.posterior.base import as_generator
from bayespass.progress import track


@dataclass(frozen=True)
class KroneckerFactors:
    """The block G kron A of one layer, without prior.

    Args:
        inputs: A (columns, columns), the mean of a a^T over rows and positions.
        outputs: G (rows, rows), the curvature in y summed over rows and positions.
    """

    inputs: Tensor
    outputs: Tensor


def kfac(
    model: nn.Module,
    loader: Iterable[Any],
    names: tuple[str, ...],
    likelihood: Likelihood,
    sigma_noise: SigmaNoise | None = None,
    curvature: Curvature = "ggn",
    progress: bool = False,
    seed: int = 0,
) -> tuple[dict[str, KroneckerFactors], float, int]:
    """Kronecker factors of the curvature of the negative log-likelihood.

    Args:
        model: in eval mode; rows of a batch must not interact.
        loader: yields (inputs, targets).
        names: parameters, all of them weights or biases of `nn.Linear` modules.
        likelihood: "classification" or "regression".
        sigma_noise: sd of the observation noise, or "predicted", for regression.
        curvature: "ggn" (exact curvature in the outputs: one backward pass per class or output of every
            position), "mc" (one backward pass, from targets drawn from the network's own predictive) or
            "ef" (empirical Fisher, from the observed targets).
        progress: show a progress bar.
        seed: of the drawn targets, for "mc".

    Returns:
        factors by module path (float32 or better), the summed negative log-likelihood in nats, and the
        number of rows N.

    Raises:
        InvalidInput: a parameter outside linear layers, a layer whose weight is used elsewhere too, an
            unknown curvature, or targets that do not fit.
    """
    if curvature not in get_args(Curvature):
        msg = f"curvature must be one of {', '.join(map(repr, get_args(Curvature)))}; got {curvature!r}"
        raise InvalidInput(msg)
    layers = linear_layers(model, names)
    weights = {
        name: parameter.detach().requires_grad_()
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name.rpartition(".")[0] in layers
    }
    generator = as_generator(seed, device_of(model))
    sums: dict[str, list[Any]] = {}
    loss, n_data = 0.0, 0
    for inputs, targets in track(labelled_batches(loader, device_of(model)), "curvature", show=progress):
        args, kwargs = call_arguments(inputs)
        with torch.enable_grad(), _captured(layers) as calls:
            outputs = model_output(functional_call(model, weights, args, kwargs))
        targets = check_targets(outputs, targets, likelihood, sigma_noise)
        loss += float(negative_log_likelihood(outputs.detach(), targets, likelihood, sigma_noise))
        if not n_data:
            _check_uses(outputs, weights, calls)
        n_data += len(targets)
        if curvature == "mc":
            targets = drawn_targets(outputs.detach(), likelihood, sigma_noise, generator)
        vectors = (
            _root_vectors(outputs, likelihood, sigma_noise)
            if curvature == "ggn"
            else _score_vectors(outputs, targets, likelihood, sigma_noise)
        )
        _accumulate(sums, outputs, calls, vectors)
    return {path: KroneckerFactors(a / count, g) for path, (a, g, count) in sums.items()}, loss, n_data


def linear_layers(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Linear]:
    """The linear layers that the parameters belong to, by module path.

    Args:
        model: any module.
        names: parameters.

    Raises:
        InvalidInput: a parameter belongs to another kind of module, or to several.
    """
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((path, module))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    layers: dict[str, nn.Linear] = {}
    for name in names:
        owning = owners[id(parameters[name])]
        path, module = owning[0]
        remedy = "leave it out with names=, or use hessian_structure='diag'"
        if not isinstance(module, nn.Linear):
            msg = f"Kronecker factors are for nn.Linear, but {name} belongs to a {type(module).__name__}; {remedy}"
            raise InvalidInput(msg)
        if len(owning) > 1:
            msg = f"{name} is tied: {', '.join(where or 'the model' for where, _ in owning)} share it; {remedy}"
            raise InvalidInput(msg)
        layers[path] = module
    return layers


Calls = dict[str, list[tuple[Tensor, Tensor]]]


@contextmanager
def _captured(layers: dict[str, nn.Linear]) -> Iterator[Calls]:
    """Inputs and outputs of every call of the layers inside the block."""
    calls: Calls = {path: [] for path in layers}
    handles: list[RemovableHandle] = []
    for path, layer in layers.items():

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor, path: str = path) -> Tensor:  # noqa: ARG001
            given = args[0] if args else kwargs["input"]
            calls[path].append((given.detach(), output))
            return output.clone()  # so that a later change in place leaves the gradient in y alone

        handles.append(layer.register_forward_hook(hook, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _check_uses(outputs: Tensor, weights: dict[str, Tensor], calls: Calls) -> None:
    """Raise unless calls of the layers are all that their weights do: the gradients say so.

    Raises:
        InvalidInput: a weight is used outside its layer's calls, or not at all.
    """
    flat = [(path, a, y) for path, found in calls.items() for a, y in found]
    names = [f"{path}.weight" if path else "weight" for path in calls]
    direction = torch.linspace(0.5, 1.5, outputs.numel(), dtype=outputs.dtype, device=outputs.device).view_as(outputs)
    grads = torch.autograd.grad(
        outputs,
        [weights[name] for name in names] + [y for _, _, y in flat],
        direction,
        retain_graph=True,
        allow_unused=True,
    )
    through: dict[str, Tensor] = {
        path: torch.zeros_like(weights[name]) for path, name in zip(calls, names, strict=True)
    }
    for (path, a, _), g in zip(flat, grads[len(names) :], strict=True):
        if g is not None:
            through[path] += g.flatten(0, -2).mT @ a.flatten(0, -2).to(g.dtype)
    for path, name, found in zip(calls, names, grads, strict=False):
        tolerance = 1e-3 if weights[name].dtype in (torch.float32, torch.float64) else 0.1
        if found is None or float((found - through[path]).norm()) > tolerance * float(found.norm()):  # NaN passes
            msg = (
                f"the output does not depend on {name} through calls of that linear layer alone (a fused attention, "
                f"or a weight used by hand); leave it out with names=, or use hessian_structure='diag'"
            )
            raise InvalidInput(msg)


def _root_vectors(outputs: Tensor, likelihood: Likelihood, sigma_noise: SigmaNoise | None) -> Iterator[Tensor]:
    """One gradient of the output's shape per position and row of the root of the curvature there."""
    root = output_root(outputs, likelihood, sigma_noise)
    for position in range(root.shape[1]):
        for row in range(root.shape[2]):
            vector = torch.zeros_like(root[:, :, 0])
            vector[:, position] = root[:, position, row]
            yield vector.view_as(outputs)


def _score_vectors(
    outputs: Tensor, targets: Tensor, likelihood: Likelihood, sigma_noise: SigmaNoise | None
) -> Iterator[Tensor]:
    """The gradient of the negative log-likelihood of the targets in the output."""
    leaf = outputs.detach().requires_grad_()
    with torch.enable_grad():
        loss = negative_log_likelihood(leaf, targets, likelihood, sigma_noise)
    yield torch.autograd.grad(loss, leaf)[0]


def _accumulate(sums: dict[str, list[Any]], outputs: Tensor, calls: Calls, vectors: Iterator[Tensor]) -> None:
    """Add one batch: a a^T, g g^T and the number of rows and positions, by layer."""
    exact = torch.promote_types(outputs.dtype, torch.float32)
    flat = [(path, a.flatten(0, -2).to(exact), y) for path, found in calls.items() for a, y in found]
    for path, a, y in flat:
        if path not in sums:
            sums[path] = [a.new_zeros(a.shape[1], a.shape[1]), a.new_zeros(y.shape[-1], y.shape[-1]), 0]
        sums[path][0] += a.mT @ a
        sums[path][2] += len(a)
    for vector in vectors:
        grads = torch.autograd.grad(outputs, [y for _, _, y in flat], vector, retain_graph=True, allow_unused=True)
        for (path, _, _), g in zip(flat, grads, strict=True):
            if g is not None:
                g = g.flatten(0, -2).to(exact)
                sums[path][1] += g.mT @ g
