"""The posterior inside an IVON optimizer of the ivon-opt package, 0.1.3.

    optimizer = ivon.IVON(model.parameters(), lr=0.1, ess=len(data))
    ...                                                                    # its own training loop
    posterior = from_ivon_opt(optimizer, model)

Per parameter group, with ess the factor of the data and weight_decay the prior's share per datum, the posterior
is N(weights, 1 / (ess (hess + weight_decay))): n_data N, prior precision weight_decay N and temperature N / ess.
It is read from the parameter groups, which hold `hess` as one flat tensor over the parameters of the group.
Frozen parameters in a group are drawn like all others there, so they are random here too.

Source: Shen et al. 2024 (arXiv 2402.17641). No code of ivon-opt was read or copied; bayespass.IVON is our own.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bayespass.errors import InvalidInput, require_count
from bayespass.likelihood import Likelihood, SigmaNoise
from bayespass.posterior.base import PosteriorInfo
from bayespass.posterior.mean_field import DiagonalGaussian

NEEDED = ("params", "ess", "hess", "weight_decay")


def from_ivon_opt(
    optimizer: Any,
    model: nn.Module,
    likelihood: Likelihood = "classification",
    sigma_noise: SigmaNoise | None = None,
    n_data: int | None = None,
) -> DiagonalGaussian:
    """The diagonal Gaussian that `optimizer.sampled_params()` draws from.

    Read it outside of `sampled_params()`: inside, the model's weights are a draw and not the mean. That is refused
    where it can be seen, which is from the first step on: ivon-opt then keeps the mean of all weights in one
    memory, and draws apart from it.

    Args:
        optimizer: the live optimizer, or its `state_dict()`. A state dict has no names: its one group must be
            over `model.parameters()`, or over those that require gradients, in their order.
        model: whose weights it has trained.
        likelihood: "classification" or "regression".
        sigma_noise: sd of the observation noise, or "predicted", for regression.
        n_data: N; by default `ess` of the first group, which is temperature 1.

    Raises:
        InvalidInput: no IVON optimizer of this package, parameters that the model lacks, an optimizer inside
            `sampled_params()`, or a variance that is not positive.
    """
    groups = optimizer.get("param_groups", ()) if isinstance(optimizer, Mapping) else optimizer.param_groups
    for k, group in enumerate(groups):
        if lacking := [key for key in NEEDED if key not in group]:
            msg = f"parameter group {k} lacks {', '.join(lacking)}; pass an ivon.IVON of ivon-opt, or its state_dict()"
            raise InvalidInput(msg)
    if not groups:
        msg = "there is no parameter group; pass an ivon.IVON of ivon-opt, or its state_dict()"
        raise InvalidInput(msg)
    named = _named_groups(optimizer, groups, model)
    mean: dict[str, Tensor] = {}
    variance: dict[str, Tensor] = {}
    for group, pairs in zip(groups, named, strict=True):
        hess = group["hess"].detach()
        if hess.numel() != sum(parameter.numel() for _, parameter in pairs):
            msg = f"hess has {hess.numel()} entries for {len(pairs)} parameters that differ in size; pass their model"
            raise InvalidInput(msg)
        spread = 1 / (
            float(group["ess"]) * (hess.to(torch.promote_types(hess.dtype, torch.float32)) + group["weight_decay"])
        )
        if not bool(((spread > 0) & torch.isfinite(spread)).all()):
            msg = "hess + weight_decay is not positive everywhere; the training run has diverged"
            raise InvalidInput(msg)
        parts = spread.split([parameter.numel() for _, parameter in pairs])
        for (name, parameter), part in zip(pairs, parts, strict=True):
            mean[name] = parameter.detach().clone()
            variance[name] = part.view(parameter.shape).to(parameter.device)
    ess, decay = float(groups[0]["ess"]), float(groups[0]["weight_decay"])
    data = max(1, round(ess)) if n_data is None else n_data
    require_count(n_data=data)
    temperature = 1.0 if n_data is None else data / ess
    prior = max(ess * decay * temperature, torch.finfo(torch.float32).tiny)  # weight_decay=0 is a flat prior
    settings = {"ess": ess, "weight_decay": decay, "groups": len(groups)}
    info = PosteriorInfo(likelihood, data, prior, temperature, sigma_noise, "ivon-opt", settings)
    return DiagonalGaussian(mean, variance, info)


def _named_groups(optimizer: Any, groups: Any, model: nn.Module) -> list[list[tuple[str, nn.Parameter]]]:
    """Name and parameter for every entry of every group.

    Raises:
        InvalidInput: the model lacks one, the state dict has several groups, or the weights are a draw.
    """
    if isinstance(optimizer, Mapping):
        if len(groups) != 1:
            msg = f"a state dict of {len(groups)} groups does not say which parameters are in which; pass the optimizer"
            raise InvalidInput(msg)
        every = list(model.named_parameters())
        for pairs in (every, [(name, p) for name, p in every if p.requires_grad]):
            if len(pairs) == len(groups[0]["params"]):
                return [pairs]
        msg = (
            f"the state dict is about {len(groups[0]['params'])} parameters, the model has {len(every)}; pass its model"
        )
        raise InvalidInput(msg)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in groups for parameter in group["params"]]
    unknown = [tuple(parameter.shape) for parameter in parameters if id(parameter) not in names]
    if unknown:
        msg = f"the optimizer has a parameter of shape {unknown[0]} that the model lacks; pass the model it trains"
        raise InvalidInput(msg)
    apart = all(p.untyped_storage().nbytes() == p.numel() * p.element_size() for p in parameters)
    if getattr(optimizer, "current_step", 0) and len(parameters) > 1 and apart:
        msg = (
            "the weights do not lie where ivon-opt keeps their mean, as inside sampled_params(), where they are a "
            "draw; leave that block first. If the model was moved or cast since the last step, pass "
            "optimizer.state_dict()"
        )
        raise InvalidInput(msg)
    return [[(names[id(parameter)], parameter) for parameter in group["params"]] for group in groups]
