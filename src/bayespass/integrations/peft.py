"""LoRA and other adapters of PEFT: their posterior needs no wrapper, only adapters that run.

    model = peft.get_peft_model(base, peft.LoraConfig(...))
    method = IVON(model.named_parameters(), lr=0.1, n_data=len(data))      # adapters alone have state
    ...
    posterior = method.posterior()                                         # adapters alone are random
    posterior.save("adapters.safetensors", model)                          # adapters alone are stored
    check_adapters(model, posterior)
    prediction = SinglePass(model.eval(), posterior)(**batch)

The base is frozen by PEFT, so it is deterministic, and its hash is in the file: a posterior loads onto
the base that it was trained on and no other. Merging adapters into the base ends this, since a merged
weight is one number per entry; keep them apart for as long as variance is wanted.
"""

from torch import nn

from bayespass.errors import InvalidInput, MissingExtra
from bayespass.posterior.base import Posterior


def check_adapters(model: nn.Module, posterior: Posterior) -> None:
    """Raise unless every adapter that the posterior is about takes part in the forward pass.

    PEFT skips adapters that are merged, disabled or not the active one. Their parameters are still
    there, and a prediction would have no variance from them, without a word.

    Args:
        model: a PEFT model, or one with injected adapters.
        posterior: over adapter parameters of it, and perhaps others.

    Raises:
        InvalidInput: an adapter is merged, disabled or not active, and how to undo that.
        MissingExtra: PEFT is not installed.
        PosteriorMismatch: names or shapes do not fit the model.
    """
    try:
        from peft import get_layer_status
    except ImportError as error:
        msg = "adapters need the peft package; install it with: pip install 'bayespass[peft]'"
        raise MissingExtra(msg) from error
    posterior.check_model(model)
    try:
        layers = get_layer_status(model)
    except (TypeError, ValueError) as error:
        msg = f"{type(model).__name__} has no adapter layers that can be checked ({error}); pass the PEFT model"
        raise InvalidInput(msg) from error
    for layer in layers:
        inside = [f".{name}".partition(f".{layer.name}.")[2] for name in posterior.names]
        for adapter in sorted({part for name in inside for part in name.split(".")} & set(layer.available_adapters)):
            if adapter in layer.merged_adapters:
                problem = "is merged into the base weights and no longer runs; call unmerge_adapter()"
            elif not layer.enabled:
                problem = "is disabled; leave disable_adapter(), or call enable_adapter_layers()"
            elif adapter not in layer.active_adapters:
                problem = f"is not active; call set_adapter({adapter!r})"
            else:
                continue
            msg = f"every random adapter must run, and {adapter!r} at {layer.name} {problem}"
            raise InvalidInput(msg)
