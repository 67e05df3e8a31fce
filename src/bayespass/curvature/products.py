"""J v and J^T w of one function of the parameters, for many vectors at once."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from bayespass.batches import device_of
from bayespass.curvature.rows import Parameters

Function = Callable[[Parameters], Tensor]


class Products:
    """Products with the Jacobian of any function of some parameters at one point.

    They are forward-mode and reverse-mode passes under `vmap`. Where an operation has no forward mode or
    does not run under `vmap`, they are made by reverse mode alone, one vector after the other.

    Args:
        model: what the functions run, for its settings.
        theta: the point, by parameter name.
    """

    def __init__(self, model: nn.Module, theta: Parameters) -> None:
        self.model = model
        self.theta = theta
        self.functional = True

    def times(self, function: Function, vectors: Parameters, together: int | None = None) -> Tensor:
        """J v.

        Args:
            function: of the parameters.
            vectors: (S, *shape) by name.
            together: vectors at once; None for all.

        Returns:
            (S, ...) of the function's shape.
        """

        def one(vector: Parameters) -> Tensor:
            return jvp(function, (self.theta,), (vector,))[1]

        with exact_products(self.model):
            if self.functional:
                try:
                    with _fixed_padding(self.model):
                        return vmap(one, chunk_size=together)(vectors).detach()
                except (RuntimeError, NotImplementedError) as error:
                    self._give_up(error)
            return self._twice_reversed(function, vectors)

    def transposed(self, function: Function, weights: Tensor, together: int | None = None) -> Parameters:
        """J^T w.

        Args:
            function: of the parameters.
            weights: (S, ...) of the function's shape.
            together: vectors at once; None for all.

        Returns:
            (S, *shape) by name.
        """
        with exact_products(self.model):
            if self.functional:
                try:
                    backward = vjp(function, self.theta)[1]
                    found = vmap(lambda w: backward(w)[0], chunk_size=together)(weights)
                    return {name: value.detach() for name, value in found.items()}
                except (RuntimeError, NotImplementedError) as error:
                    self._give_up(error)
            theta, scalars = self._graph(function)
            if not scalars.requires_grad:  # it depends on none of the parameters
                return {name: value.new_zeros(len(weights), *value.shape) for name, value in theta.items()}
            options: dict[str, Any] = {"retain_graph": True, "materialize_grads": True}
            each = [torch.autograd.grad(scalars, list(theta.values()), w, **options) for w in weights]
            return {name: torch.stack([g[k] for g in each]) for k, name in enumerate(theta)}

    def _twice_reversed(self, function: Function, vectors: Parameters) -> Tensor:
        """J v as the gradient of <J^T w, v> in w."""
        theta, scalars = self._graph(function)
        blank = scalars.detach().new_zeros(len(next(iter(vectors.values()))), *scalars.shape)
        if not scalars.requires_grad:
            return blank
        with torch.enable_grad():
            weight = torch.zeros_like(scalars, requires_grad=True)
            options: dict[str, Any] = {"create_graph": True, "materialize_grads": True}
            found = torch.autograd.grad(scalars, list(theta.values()), weight, **options)
        used = {name: g for g, name in zip(found, theta, strict=True) if g.requires_grad}
        if not used:  # it depends on none of the parameters
            return blank
        products = []
        for s in range(len(blank)):
            given = [vectors[name][s] for name in used]
            products.append(torch.autograd.grad(list(used.values()), weight, given, retain_graph=True)[0])
        return torch.stack(products).detach()

    def _graph(self, function: Function) -> tuple[Parameters, Tensor]:
        theta = {name: value.clone().requires_grad_() for name, value in self.theta.items()}
        with torch.enable_grad():
            return theta, function(theta)

    def _give_up(self, error: Exception) -> None:
        """Leave torch.func for plain autograd from now on.

        Raises:
            OutOfMemoryError: that is what went wrong.
        """
        if isinstance(error, torch.OutOfMemoryError):
            raise error
        self.functional = False


@contextmanager
def _fixed_padding(model: nn.Module) -> Iterator[None]:
    """Padding rows of embeddings do not move in forward mode, as they have no gradient in reverse mode.

    Args:
        model: to differentiate.

    Yields:
        nothing.
    """

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        numbers = args[0] if args else kwargs["input"]
        return torch.where((numbers == module.padding_idx)[..., None], output.detach(), output)

    layers = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.padding_idx is not None]
    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def exact_products(model: nn.Module) -> Iterator[None]:
    """Settings under which the model can be differentiated forwards and under vmap, at full precision.

    Attention is written out, transformer layers do not take their fused path, recurrent cells are not
    fused, TF32 and autocast are off.

    Args:
        model: to differentiate.

    Yields:
        nothing.
    """
    fused, precision = torch.backends.mha.get_fastpath_enabled(), torch.get_float32_matmul_precision()
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")  # on the first use of jvp
        warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.autocast(device_of(model).type, enabled=False))
        cudnn = torch.backends.cudnn
        stack.enter_context(
            cudnn.flags(
                enabled=cudnn.enabled and not recurrent,
                benchmark=cudnn.benchmark,
                deterministic=cudnn.deterministic,
                allow_tf32=False,
            )
        )
        if recurrent:
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            torch.set_float32_matmul_precision(precision)
