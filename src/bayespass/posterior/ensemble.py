"""Deep ensembles, and anchored ones whose spread is the posterior's.

    members = [train(build_model(), seed) for seed in range(5)]
    posterior = ensemble(members, PosteriorInfo("classification", n_data=len(data), method="deep ensemble"))
    prediction = MonteCarlo(members[0].eval(), posterior, n_samples=5)(inputs)

Randomised MAP sampling: a member that is pulled to its own draw of the prior, instead of to the
prior's mean, and that sees its own draw of the observation noise is a draw from the posterior where the
model is linear with Gaussian noise, and close to one elsewhere:

    anchor = anchors(model, prior_precision, seed)
    noisy = noised_targets(targets, sigma_noise, seed)       # once for the whole data set, regression only
    loss = mean_loss(model(x), noisy) + anchored_penalty(dict(model.named_parameters()), anchor, prior_precision, N)

Source: Lakshminarayanan et al. 2017 (arXiv 1612.01474); Pearce et al. 2020 (arXiv 1810.05546).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bayespass.errors import InvalidInput, require_positive
from bayespass.posterior.base import PosteriorInfo, as_generator, choose_names
from bayespass.posterior.draws import stream_seed
from bayespass.posterior.empirical import Empirical

State = Mapping[str, Tensor]


def ensemble(
    members: Sequence[nn.Module | State],
    info: PosteriorInfo | None = None,
    model: nn.Module | None = None,
    names: Iterable[str] | Callable[[str], bool] | None = None,
) -> Empirical:
    """The empirical posterior of separately trained networks of one architecture.

    Batch-norm layers keep running statistics, which differ between members and are no parameters. Each
    member's are written into its affine weights instead, against the statistics of `model`, so that
    it computes the same function there in eval mode.

    Args:
        members: models, or their state dicts.
        info: what they were trained with.
        model: the network that will predict, whose buffers and frozen weights all share; by default the
            first member, if that is a model.
        names: parameters to take, a list or a predicate; by default all that require gradients. The others
            must be equal in all members.

    Raises:
        InvalidInput: no member, no model to compare with, or a member whose names, shapes, frozen
            weights or buffers differ.

    >>> members = [nn.Linear(2, 1) for _ in range(3)]
    >>> len(ensemble(members).members)
    3
    """
    if model is None:
        if not members or not isinstance(members[0], nn.Module):
            msg = (
                "state dicts alone do not say which weights are parameters; pass model=, the network that will predict"
            )
            raise InvalidInput(msg)
        model = members[0]
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    chosen = trainable if names is None else choose_names([n for n, _ in model.named_parameters()], names)
    taken = []
    for k, member in enumerate(members):
        state = dict(member.state_dict() if isinstance(member, nn.Module) else member)
        _check_state(k, state, model.state_dict())
        _fold_statistics(k, state, model, set(chosen))
        _check_rest(k, state, model, set(chosen))
        taken.append({name: state[name].detach().clone() for name in chosen})
    return Empirical(taken, info or PosteriorInfo(method="ensemble"))


def anchors(
    model: nn.Module,
    prior_precision: float,
    seed: int,
    temperature: float = 1.0,
    prior_mean: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """One draw of the tempered prior N(theta0, T / a0) for every trainable parameter: what a member is pulled to.

    Args:
        model: whose parameters to draw for.
        prior_precision: a0.
        seed: of the draw, another one for every member.
        temperature: T.
        prior_mean: theta0 by name; zero for names that are missing.

    Raises:
        InvalidInput: a value that is not positive.
    """
    require_positive(prior_precision=prior_precision, temperature=temperature)
    sd, centres = (temperature / prior_precision) ** 0.5, prior_mean or {}
    drawn = {}
    generators: dict[torch.device, torch.Generator] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        device = parameter.device
        if device not in generators:
            generators[device] = as_generator(stream_seed(seed, 0), device)
        noise = torch.randn(parameter.shape, generator=generators[device], dtype=parameter.dtype, device=device)
        drawn[name] = noise * sd + centres[name].to(noise) if name in centres else noise * sd
    return drawn


def anchored_penalty(
    parameters: Mapping[str, Tensor], anchor: Mapping[str, Tensor], prior_precision: float, n_data: int
) -> Tensor:
    """a0 / (2 N) |theta - anchor|^2, to add to the mean loss over the data in nats; runs under `torch.func`.

    Args:
        parameters: the member's parameters by name, `dict(model.named_parameters())`.
        anchor: what `anchors` drew for this member.
        prior_precision: a0.
        n_data: N.

    Raises:
        InvalidInput: a value that is not positive, or a name without a parameter.
    """
    require_positive(prior_precision=prior_precision, n_data=n_data)
    missing = [name for name in anchor if name not in parameters]
    if missing:
        msg = f"anchor has {missing[0]}, which the parameters lack; draw anchors for this model"
        raise InvalidInput(msg)
    squares = [(parameters[name] - value).square().sum() for name, value in anchor.items()]
    return torch.stack(squares).sum() * (prior_precision / (2 * n_data))


def noised_targets(targets: Tensor, sigma_noise: float, seed: int, temperature: float = 1.0) -> Tensor:
    """Regression targets plus one draw of the tempered observation noise, N(0, T sigma^2).

    A member keeps its noise through all epochs: draw it once for the whole data set.

    Args:
        targets: all training targets, any shape.
        sigma_noise: sd of the observation noise.
        seed: of the draw, another one for every member.
        temperature: T.

    Raises:
        InvalidInput: a value that is not positive, or targets that are no real numbers.
    """
    if not isinstance(sigma_noise, int | float):
        msg = f"sigma_noise must be the sd of the noise, one number; got {sigma_noise!r}. Predicted noise has no one sd"
        raise InvalidInput(msg)
    require_positive(sigma_noise=sigma_noise, temperature=temperature)
    if not targets.is_floating_point():
        msg = f"only regression targets can be noised; got dtype {targets.dtype}. Class labels stay as they are"
        raise InvalidInput(msg)
    generator = as_generator(stream_seed(seed, 1), targets.device)
    noise = torch.randn(targets.shape, generator=generator, dtype=targets.dtype, device=targets.device)
    return targets + noise * (sigma_noise * temperature**0.5)


def _check_state(k: int, state: State, expected: State) -> None:
    """Raise unless the state has the model's names and shapes.

    Raises:
        InvalidInput: it does not, by name.
    """
    for name, value in expected.items():
        if name not in state:
            msg = f"member {k} lacks {name}; all members need the architecture of the model"
            raise InvalidInput(msg)
        if state[name].shape != value.shape:
            msg = f"{name} has shape {tuple(state[name].shape)} in member {k} and {tuple(value.shape)} in the model"
            raise InvalidInput(msg)


def _fold_statistics(k: int, state: dict[str, Tensor], model: nn.Module, chosen: set[str]) -> None:
    """Re-express batch norms: w' = w sqrt(s0 + eps) / sqrt(s + eps), b' = b + (m0 - m) w / sqrt(s + eps).

    Raises:
        InvalidInput: statistics differ and the affine weights are not random.
    """
    for path, module in model.named_modules():
        if not isinstance(module, _BatchNorm) or module.running_mean is None or module.running_var is None:
            continue
        prefix = f"{path}." if path else ""
        mean, variance = state[f"{prefix}running_mean"], state[f"{prefix}running_var"]
        state.pop(f"{prefix}num_batches_tracked", None)
        if torch.equal(mean, module.running_mean) and torch.equal(variance, module.running_var):
            continue
        if not {f"{prefix}weight", f"{prefix}bias"} <= chosen:
            msg = (
                f"running statistics of {path or 'the model'} differ in member {k}, and its weight and bias are not "
                f"both random to take that up; add them to names, or use affine=True"
            )
            raise InvalidInput(msg)
        inverse = (variance.double() + module.eps).rsqrt()
        weight, bias = state[f"{prefix}weight"], state[f"{prefix}bias"]
        shift = (module.running_mean.double() - mean) * weight * inverse
        scale = (module.running_var.double() + module.eps).sqrt() * inverse
        state[f"{prefix}weight"], state[f"{prefix}bias"] = (weight * scale).to(weight), (bias + shift).to(bias)
        state[f"{prefix}running_mean"], state[f"{prefix}running_var"] = module.running_mean, module.running_var


def _check_rest(k: int, state: State, model: nn.Module, chosen: set[str]) -> None:
    """Raise where something outside the random parameters differs.

    Raises:
        InvalidInput: it does, by name.
    """
    random = {id(p) for name, p in model.named_parameters() if name in chosen}
    tied = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in random}
    for name, value in model.state_dict().items():
        if name in tied or name not in state:
            continue
        if not torch.equal(state[name].to(value), value):
            msg = (
                f"{name} differs in member {k} but is not random; members must share frozen weights and buffers "
                f"(names= chooses what is random)"
            )
            raise InvalidInput(msg)
