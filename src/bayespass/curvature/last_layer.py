"""A last layer alone: y = W phi + b is the output, so that phi and the outputs say all about its curvature."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from bayespass.batches import call_arguments, model_output
from bayespass.curvature.rows import Parameters
from bayespass.likelihood import Likelihood, SigmaNoise, mean_and_log_variance


@dataclass(frozen=True)
class Features:
    """A batch at a linear layer whose outputs are the model's, so that J is phi alone and G needs no backward pass.

    Args:
        weight: its name, None where only the bias is wanted.
        bias: its name, None where there is none, or it is not wanted.
        inputs: phi (n, k).
        outputs: f = W phi + b (n, C).
    """

    weight: str | None
    bias: str | None
    inputs: Tensor
    outputs: Tensor

    def curvature(self, likelihood: Likelihood, sigma_noise: SigmaNoise | None) -> Tensor:
        """sum_n H_n (C, C), H_n the curvature of the negative log-likelihood in the outputs of row n.

        Args:
            likelihood: "classification" or "regression".
            sigma_noise: sd of the observation noise, or "predicted", for regression.
        """
        diagonal = torch.diag(self.curvature_diagonals(likelihood, sigma_noise).sum(0))
        if likelihood == "regression":
            return diagonal
        p = torch.softmax(self.outputs, -1)
        return torch.diag(p.sum(0)) - p.mT @ p

    def curvature_diagonals(self, likelihood: Likelihood, sigma_noise: SigmaNoise | None) -> Tensor:
        """diag(H_n) (n, C).

        Args:
            likelihood: "classification" or "regression".
            sigma_noise: sd of the observation noise, or "predicted", for regression.
        """
        if likelihood == "classification":
            p = torch.softmax(self.outputs, -1)
            return p * (1 - p)
        if sigma_noise == "predicted":
            precision = torch.exp(-mean_and_log_variance(self.outputs)[1])
            return torch.stack([precision, torch.full_like(precision, 0.5)], -1)
        return torch.full_like(self.outputs, float(sigma_noise or 1.0) ** -2)


class LastLayer:
    """Whether all parameters belong to a linear layer whose result is the model's output, and its inputs.

    Args:
        model: in eval mode.
        names: parameters.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.model = model
        self.names = set(names)
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        wanted = {id(self._parameters[name]) for name in self.names}
        owners = [m for m in model.modules() if any(id(p) in wanted for p in m.parameters(recurse=False))]
        self._layer: nn.Module | None = owners[0] if len(owners) == 1 else None
        if self._layer is None or type(self._layer).forward is not nn.Linear.forward:
            self._layer = None
        self._verified = False

    def features(self, inputs: Any) -> Features | None:
        """The batch at the layer; None if the output is not plainly W phi + b.

        Args:
            inputs: a batch as the model takes it.
        """
        if self._layer is None:
            return None
        if not self._verified:
            self._verify(inputs)
        if self._layer is None:
            return None
        with torch.no_grad():
            return self._run(inputs)[0]

    def _run(self, inputs: Any, theta: Parameters | None = None) -> tuple[Features | None, Tensor]:
        calls: list[tuple[Tensor, Tensor, int]] = []

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:  # noqa: ARG001
            calls.append((args[0] if args else kwargs["input"], output, output._version))

        assert self._layer is not None
        handle = self._layer.register_forward_hook(hook, with_kwargs=True)
        try:
            args, kwargs = call_arguments(inputs)
            outputs = model_output(functional_call(self.model, theta or {}, args, kwargs))
        finally:
            handle.remove()
        if len(calls) != 1:
            return None, outputs
        given, returned, version = calls[0]
        if returned is not outputs or outputs.dim() != 2 or outputs._version != version:
            return None, outputs
        named = {key: self._name(p) for key, p in self._layer.named_parameters(recurse=False)}
        exact = torch.promote_types(outputs.dtype, torch.float32)
        found = Features(named["weight"], named.get("bias"), given.detach().to(exact), outputs.detach().to(exact))
        return found, outputs

    def _name(self, parameter: nn.Parameter) -> str | None:
        return next((name for name in self.names if self._parameters[name] is parameter), None)

    def _verify(self, inputs: Any) -> None:
        """Give up unless the gradient in the parameters is that of W phi + b: the weight may be used elsewhere too."""
        theta = {name: self._parameters[name].detach().requires_grad_() for name in sorted(self.names)}
        few = pytree.tree_map(lambda t: t[:2] if isinstance(t, Tensor) else t, inputs)
        with torch.enable_grad():
            found, outputs = self._run(few, theta)
            if found is not None:
                unit = torch.linspace(0.5, 1.5, outputs.numel(), dtype=outputs.dtype, device=outputs.device)
                unit = unit.view_as(outputs)
                grads = torch.autograd.grad(outputs, list(theta.values()), unit, materialize_grads=True)
                for name, grad in zip(theta, grads, strict=True):
                    own = unit.mT @ found.inputs.to(unit.dtype) if name == found.weight else unit.sum(0)
                    tolerance = 1e-3 if unit.dtype in (torch.float32, torch.float64) else 0.1
                    if float((own - grad).norm()) > tolerance * float(grad.norm()) + 1e-12:  # NaN passes
                        found = None
                        break
        if found is None:
            self._layer = None
        self._verified = True
