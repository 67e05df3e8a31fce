"""The whole generalised Gauss-Newton matrix of a few parameters, a last layer for instance."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap
from torch.utils import _pytree as pytree

from bayespass.batches import call_arguments, device_of, labelled_batches, model_output
from bayespass.curvature.output import output_root
from bayespass.curvature.rows import Parameters, chunks, row_outputs
from bayespass.errors import InvalidInput
from bayespass.likelihood import Likelihood, SigmaNoise, check_targets, negative_log_likelihood
from bayespass.progress import track

LARGEST = (
    5000  # entries of the matrix grow with the square of the parameters, the time for its eigenvectors with the cube
)


def dense_ggn(
    model: nn.Module,
    loader: Iterable[Any],
    names: tuple[str, ...],
    likelihood: Likelihood,
    sigma_noise: SigmaNoise | None = None,
    chunk_size: int = 32,
    progress: bool = False,
) -> tuple[Tensor, float, int]:
    """sum_n J_n^T H_n J_n, with J_n the Jacobian of the outputs and H_n the curvature in them.

    Args:
        model: in eval mode; rows of a batch must not interact.
        loader: yields (inputs, targets).
        names: parameters, at most `LARGEST` entries in all.
        likelihood: "classification" or "regression".
        sigma_noise: sd of the observation noise, or "predicted", for regression.
        chunk_size: rows whose Jacobians are held at once.
        progress: show a progress bar.

    Returns:
        (P, P) in the order of `names` (float32 or better, without prior), the summed negative
        log-likelihood in nats, and the number of rows N.

    Raises:
        InvalidInput: too many parameters, an empty loader, or targets that do not fit.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    random = {name: parameters[name].detach() for name in names}
    size = sum(value.numel() for value in random.values())
    if size > LARGEST:
        msg = (
            f"a full matrix is for at most {LARGEST} parameters, {', '.join(names[:2])}, ... have {size}; choose fewer "
            f"with names= (the last layer), or use hessian_structure='kron' or 'diag'"
        )
        raise InvalidInput(msg)
    _, row_output = row_outputs(model, names)

    def outputs(theta: Parameters, row: Any) -> Tensor:
        return row_output(theta, row).reshape(-1)

    total: Tensor | None = None
    loss, n_data = 0.0, 0
    jacobian = _Jacobian(outputs, random)
    with torch.no_grad():
        for inputs, targets in track(labelled_batches(loader, device_of(model)), "curvature", show=progress):
            args, kwargs = call_arguments(inputs)
            batch_outputs = model_output(model(*args, **kwargs))
            targets = check_targets(batch_outputs, targets, likelihood, sigma_noise)
            loss += float(negative_log_likelihood(batch_outputs, targets, likelihood, sigma_noise))
            n_data += len(targets)
            root = output_root(batch_outputs, likelihood, sigma_noise)
            for start, (rows, row_targets) in enumerate(chunks(inputs, targets, chunk_size)):
                part = root[start * chunk_size : start * chunk_size + len(row_targets)]
                found = jacobian(rows, len(row_targets)).view(*part.shape[:2], part.shape[-1], size)
                matrix = (part @ found).flatten(0, 2)
                matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
                total = matrix.mT @ matrix if total is None else total.addmm_(matrix.mT, matrix)
    assert total is not None  # an empty loader raised
    return total, loss, n_data


class _Jacobian:
    """(rows, outputs, parameters) of a chunk, all rows at once where the model allows it."""

    def __init__(self, outputs: Any, parameters: Parameters) -> None:
        self.single = jacrev(outputs)
        self.parameters = parameters
        self.together = True

    def __call__(self, rows: Any, count: int) -> Tensor:
        if self.together:
            try:
                return self._flat(vmap(self.single, in_dims=(None, 0))(self.parameters, rows))
            except RuntimeError as error:
                if "vmap" not in str(error):
                    raise
                self.together = False  # the model branches on its data
        each = []
        for k in range(count):
            row = pytree.tree_map(lambda t, k=k: t[k] if isinstance(t, Tensor) else t, rows)
            each.append(self._flat({name: j[None] for name, j in self.single(self.parameters, row).items()}))
        return torch.cat(each)

    def _flat(self, found: Parameters) -> Tensor:
        return torch.cat([found[name].flatten(2) for name in self.parameters], -1)
