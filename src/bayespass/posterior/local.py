"""Local reparametrisation: layers that sample their outputs instead of their weights.

The output of a linear layer with independent Gaussian weights is Gaussian given its input: mean
layer(x; m) and variance layer(x^2; sigma^2). Sampling it row by row gives the same expected gradients
with much less noise, because rows no longer share one draw of the weights. Positions of one row do
share it: sampling tokens or the places of a convolution independently would be another model, with a
variance many times too wide, so such layers are refused.

Source: Kingma, Salimans and Welling 2015 (arXiv 1506.02557).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayespass.errors import InvalidInput


class LocalReparametrization:
    """Adds Gaussian noise to the outputs of eligible layers while a block is open.

    Eligible are `nn.Linear` layers of exactly this class whose weight is random and used by no other
    module. `parameter in local` tells which parameters it takes over;
    `variance` holds theirs, set before `begin`.

    Args:
        model: whose layers.
        random: the parameters that carry variance.

    Raises:
        InvalidInput: no layer of the model is eligible.
    """

    def __init__(self, model: nn.Module, random: list[Tensor]) -> None:
        owners: dict[int, int] = {}
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
        wanted = {id(parameter) for parameter in random}
        self.layers: dict[nn.Module, str] = {}
        self._taken: set[int] = set()
        for path, module in model.named_modules():
            own = [p for p in (getattr(module, "weight", None), getattr(module, "bias", None)) if p is not None]
            if type(module) is not nn.Linear or any(owners[id(p)] > 1 for p in own) or id(own[0]) not in wanted:
                continue
            self.layers[module] = path
            self._taken |= {id(p) for p in own if id(p) in wanted}
        if not self.layers:
            msg = "local names a model without an nn.Linear layer whose weight is random and its own"
            raise InvalidInput(msg)
        self.variance: dict[Tensor, Tensor] = {}
        self._hooks: list[Any] = []
        self._calls: dict[nn.Module, int] = {}

    def __contains__(self, parameter: Tensor) -> bool:
        return id(parameter) in self._taken

    def begin(self, generator: Callable[[torch.device], torch.Generator]) -> None:
        """Let the layers sample from now on."""
        self._calls = dict.fromkeys(self.layers, 0)
        for variance in self.variance.values():
            variance.requires_grad_(True)
        for module in self.layers:
            self._hooks.append(module.register_forward_hook(self._noisy(generator)))

    def end(self) -> None:
        """Layers are ordinary again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.variance.clear()

    def log_sd_gradient(self, parameter: Tensor) -> Tensor:
        """dL/dlog sigma = 2 v dL/dv of the block's backward pass.

        Raises:
            InvalidInput: the layer was not called as a module, so its outputs were not sampled.
        """
        variance = self.variance[parameter]
        if variance.grad is None:
            msg = (
                "a layer's weight has a gradient although the layer was never called as a module (its weight is read "
                "directly); local reparametrisation cannot sample it (nor can it a layer compiled "
                "before), pass local=None"
            )
            raise InvalidInput(msg)
        return 2 * variance.detach() * variance.grad

    def _noisy(self, generator: Callable[[torch.device], torch.Generator]) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            self._calls[module] += 1
            if self._calls[module] > 1:
                msg = (
                    f"layer {self.layers[module]!r} ran twice in one block: calls would draw different weights. Use "
                    f"one forward pass per sampled(), or local=None for models that reuse a layer"
                )
                raise InvalidInput(msg)
            if args[0].dim() != 2:
                shape = tuple(args[0].shape)
                msg = (
                    f"layer {self.layers[module]!r} sees inputs of shape {shape}, whose positions share one draw of "
                    f"the weights; pass local= the part of the model whose layers see one vector per row, or None"
                )
                raise InvalidInput(msg)
            weight, bias = module.weight, module.bias  # type: ignore[union-attr]
            zero = None if bias is None else torch.zeros_like(bias)  # type: ignore[arg-type]
            bias_variance = zero if bias is None else self.variance.get(bias, zero)  # type: ignore[arg-type]
            spread = F.linear(args[0].square(), self.variance[weight], bias_variance)  # type: ignore[index]
            noise = torch.randn(
                output.shape, generator=generator(output.device), dtype=output.dtype, device=output.device
            )
            return output + noise * spread.clamp_min(torch.finfo(spread.dtype).tiny).sqrt()

        return hook
