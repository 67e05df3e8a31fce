"""What `bayespass fit` does for each method when it is not told otherwise, and what it refuses."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from bayespass.errors import InvalidInput

if TYPE_CHECKING:
    from torch import nn

    from bayespass.posterior.selection import Names


class Method(StrEnum):
    """How the posterior is learned."""

    IVON = "ivon"
    SCORE_VI = "score-vi"
    SCORE_VI_SGD = "score-vi-sgd"
    ELBO = "elbo"
    FIRST_LAYER = "first-layer"
    SCORE_VI_MIXTURE = "score-vi-mixture"
    LAPLACE = "laplace"
    NULL_SPACE = "null-space"
    SWAG = "swag"
    SGLD = "sgld"
    ENSEMBLE = "ensemble"
    MC_DROPOUT = "mc-dropout"


class Calibrate(StrEnum):
    """How the single pass is calibrated."""

    SCALES = "scales"
    DISTILL = "distill"


class Start(StrEnum):
    """What is known of the weights that training starts from."""

    RANDOM = "random"  # module:factory without --weights, or a folder without weights
    NEW_HEAD = "new head"  # a folder that lacks some weights
    TRAINED = "trained"


WARM_START = {  # epochs and learning rate of AdamW
    Start.RANDOM: (20, 2e-3),
    Start.NEW_HEAD: (3, 5e-5),
    Start.TRAINED: (0, 5e-5),
}
RATES = {  # learning rate of the mean
    Method.IVON: 0.1,
    Method.SCORE_VI: 0.05,
    Method.SCORE_VI_SGD: 1e-3,
    Method.ELBO: 1e-3,
    Method.FIRST_LAYER: 1e-3,
    Method.SCORE_VI_MIXTURE: 1e-3,
    Method.SWAG: 0.01,
    Method.SGLD: 0.02,  # over N
}
MEMBERS = {
    Method.NULL_SPACE: 32,  # draws
    Method.SWAG: 20,  # rank
    Method.SGLD: 20,  # states
    Method.ENSEMBLE: 5,  # networks
    Method.SCORE_VI_MIXTURE: 2,  # components
}
UNTRAINED = (Method.LAPLACE, Method.NULL_SPACE, Method.ENSEMBLE, Method.MC_DROPOUT)  # but for AdamW
EPOCHS = 20
UPDATES = 2000  # at least, from random weights: an epoch of few rows is little training
WEIGHT_DECAY = 2e-4
HESS_INIT = 0.5
STRUCTURES, NULL_SPACE_ROWS = ("diag", "kron", "full"), ("outputs", "loss")
HORIZON = 10  # epochs that IVON averages curvature over


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result, besides data and weights. None: see `resolve`.

    Args:
        method: how the posterior is learned.
        likelihood: "classification" or "regression".
        sigma_noise: sd of the noise, or "predicted".
        names: "all", "first", "last" or a regular expression.
        epochs: of the method.
        map_epochs: of AdamW before it.
        lr: of the method.
        map_lr: of AdamW.
        batch_size: rows per batch.
        prior_precision: a0; None: tuned on the validation rows (laplace, null-space), or 1 / mean square of
            the weights (first-layer).
        weight_decay: of AdamW; a0 / N where a0 is given.
        temperature: T.
        hess_init: h0 of IVON.
        samples: draws per step.
        antithetic: in mirrored pairs.
        seed: of weights, order, split and draws.
        members: networks of an ensemble, states of sgld, rank of swag, draws of null-space, components of
            score-vi-mixture.
        hessian_structure: "diag", "kron" or "full", for laplace.
        rows: "outputs" or "loss", what null-space keeps fixed.
    """

    method: Method
    likelihood: str = "classification"
    sigma_noise: float | str | None = None
    names: str | None = None
    epochs: int | None = None
    map_epochs: int | None = None
    lr: float | None = None
    map_lr: float | None = None
    batch_size: int = 64
    prior_precision: float | None = None
    weight_decay: float | None = None
    temperature: float | None = None
    hess_init: float | None = None
    samples: int | None = None
    antithetic: bool = False
    seed: int = 0
    members: int | None = None
    hessian_structure: str | None = None
    rows: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "method": self.method.value}


def check(asked: Settings) -> None:
    """Raise unless the options go together.

    Raises:
        InvalidInput: an option that the method does not have, or two that exclude each other.
    """
    from bayespass.likelihood import check_likelihood

    check_likelihood(asked.likelihood, asked.sigma_noise)  # type: ignore[arg-type]
    if asked.prior_precision is not None and asked.weight_decay is not None:
        msg = "give --prior-precision or --weight-decay, not both: the first is N, the training rows, times the second"
        raise InvalidInput(msg)
    foreign: dict[str, Any] = {"hess_init": asked.hess_init} if asked.method != Method.IVON else {}
    foreign |= {} if asked.method in MEMBERS else {"members": asked.members}
    foreign |= {} if asked.method == Method.LAPLACE else {"hessian_structure": asked.hessian_structure}
    foreign |= {} if asked.method == Method.NULL_SPACE else {"rows": asked.rows}
    if asked.method in UNTRAINED:
        foreign |= {"epochs": asked.epochs, "lr": asked.lr}
    if asked.method in (*UNTRAINED, Method.SWAG, Method.SGLD):
        foreign |= {"samples": asked.samples, "antithetic": asked.antithetic or None}
    if asked.method in (Method.SWAG, Method.ENSEMBLE, Method.MC_DROPOUT, Method.NULL_SPACE):
        foreign |= {"temperature": asked.temperature}
    if asked.method in (Method.ENSEMBLE, Method.MC_DROPOUT):
        foreign |= {"names": asked.names}
    if asked.method in (Method.SWAG, Method.ENSEMBLE, Method.MC_DROPOUT):
        foreign |= {"prior_precision": asked.prior_precision}
    for name, allowed in (("hessian_structure", STRUCTURES), ("rows", NULL_SPACE_ROWS)):
        value = getattr(asked, name)
        if value is not None and value not in allowed:
            msg = f"--{name.replace('_', '-')} must be {' or '.join(allowed)}; got {value!r}"
            raise InvalidInput(msg)
    if asked.method == Method.FIRST_LAYER and asked.names != "first":
        foreign |= {"names": asked.names}
    for name, value in foreign.items():
        if value is not None:
            msg = f"--{name.replace('_', '-')} {value} does not apply to --method {asked.method}; leave it out"
            raise InvalidInput(msg)
    values = {name: getattr(asked, name) for name in ("lr", "map_lr", "prior_precision", "temperature", "hess_init")}
    for name, value in values.items():
        if value is not None and not 0 < value < float("inf"):
            msg = f"--{name.replace('_', '-')} must be positive; got {value}"
            raise InvalidInput(msg)
    if asked.weight_decay is not None and not 0 < asked.weight_decay < float("inf"):
        msg = f"--weight-decay must be positive, it is the prior precision over N; got {asked.weight_decay}"
        raise InvalidInput(msg)


def resolve(asked: Settings, start: Start, n_data: int, *, folder: bool) -> Settings:
    """The settings with every default filled in.

    IVON on a model folder with weights takes the settings of published fine-tuning runs, which are
    cold (T = 0.001); everything else T = 1 and weight decay 2e-4, that is a0 = 2e-4 N.

    Args:
        asked: what was given.
        start: of the weights.
        n_data: N, the number of training rows.
        folder: MODEL is a Hugging Face folder.
    """
    from bayespass.posterior.ivon import PRESETS

    map_epochs, map_lr = WARM_START[start]
    epochs, batch_size = EPOCHS, min(asked.batch_size, n_data)
    if start == Start.RANDOM:
        map_epochs = epochs = max(EPOCHS, math.ceil(UPDATES * batch_size / n_data))
    settings = replace(
        asked,
        map_epochs=map_epochs if asked.map_epochs is None else asked.map_epochs,
        map_lr=asked.map_lr or map_lr,
        names=asked.names or ("first" if asked.method == Method.FIRST_LAYER else "all"),
        batch_size=batch_size,
    )
    weight_decay, temperature, hess_init = WEIGHT_DECAY, 1.0, HESS_INIT
    lr = RATES.get(asked.method)
    if asked.method == Method.IVON and folder and start != Start.RANDOM:
        preset = PRESETS["fine_tuning"]
        lr, hess_init = preset["lr"], preset["hess_init"]
        weight_decay, temperature = preset["weight_decay"], 1 / preset["cold"]
    if asked.prior_precision is not None:
        weight_decay = asked.prior_precision / n_data
    weight_decay = asked.weight_decay or weight_decay
    prior_precision: float | None = asked.prior_precision or weight_decay * n_data
    tuned = asked.method in (Method.LAPLACE, Method.NULL_SPACE, Method.FIRST_LAYER)
    if tuned and asked.prior_precision is None and asked.weight_decay is None:
        prior_precision = None
    settings = replace(
        settings,
        weight_decay=weight_decay,
        prior_precision=prior_precision,
        temperature=asked.temperature or temperature,
    )
    settings = replace(settings, members=asked.members or MEMBERS.get(asked.method))
    if asked.method in UNTRAINED:
        return replace(settings, epochs=0)
    if asked.method == Method.SGLD:
        lr = lr and lr / n_data
    samples = asked.samples or (2 if asked.antithetic else 1)
    settings = replace(settings, epochs=asked.epochs or epochs, lr=asked.lr or lr, samples=samples)
    return replace(settings, hess_init=asked.hess_init or hess_init) if asked.method == Method.IVON else settings


def named(names: str) -> "Names":
    """The choice behind --names: a word, or a predicate from a regular expression.

    Raises:
        InvalidInput: it is no regular expression.
    """
    import re

    if names in ("all", "first", "last"):
        return names  # type: ignore[return-value]
    try:
        pattern = re.compile(names)
    except re.error as error:
        msg = f"--names must be all, first, last or a regular expression for parameter names; got {names!r} ({error})"
        raise InvalidInput(msg) from error
    return lambda name: pattern.search(name) is not None


def make_method(
    settings: Settings, parameters: "Iterable[tuple[str, nn.Parameter]]", n_data: int, steps_per_epoch: int
) -> Any:
    """The training method that the settings ask for.

    IVON averages curvature over about ten epochs, more if the posterior is cold: shorter averages of
    noisy estimates bias the variance. Score-based VI averages over a tenth of the run, so that the
    precision has time to leave its start, which is far from the end.

    Args:
        settings: resolved, of a method that trains.
        parameters: names and random parameters, at the weights that it starts from.
        n_data: N.
        steps_per_epoch: batches per epoch.
    """
    parameters = list(parameters)
    temperature = float(settings.temperature or 1.0)
    a0 = settings.prior_precision
    if a0 is None:
        count = sum(p.numel() for _, p in parameters)
        a0 = count / max(sum(float(p.detach().double().square().sum()) for _, p in parameters), 1e-12)
    common = {
        "n_data": n_data,
        "prior_precision": a0,
        "temperature": temperature,
        "lr": settings.lr,
        "likelihood": settings.likelihood,
        "sigma_noise": settings.sigma_noise,
        "n_samples": settings.samples,
        "antithetic": settings.antithetic,
        "seed": settings.seed,
    }
    return _maker(settings, steps_per_epoch)(parameters, **common)


def _maker(settings: Settings, steps_per_epoch: int) -> Callable[..., Any]:
    """The class of a method with the settings that it alone has."""
    from functools import partial

    cold = min(settings.temperature or 1.0, 1.0)
    if settings.method == Method.IVON:
        from bayespass.posterior.ivon import IVON, PRESETS

        share = min(cold / (HORIZON * steps_per_epoch), 0.05)
        radius = PRESETS["fine_tuning"]["clip_radius"] if cold < 1e-2 else float("inf")
        return partial(IVON, hess_init=settings.hess_init or HESS_INIT, betas=(0.9, 1 - share), clip_radius=radius)
    if settings.method == Method.SCORE_VI:
        from bayespass.posterior.score_matching import ScoreVI

        share = 10 * cold / ((settings.epochs or EPOCHS) * steps_per_epoch)
        return partial(ScoreVI, precision_lr=min(share / 4, 0.005), batch_size=settings.batch_size)
    if settings.method == Method.SCORE_VI_MIXTURE:
        from bayespass.posterior.score_mixture import ScoreVIMixture

        return partial(ScoreVIMixture, components=settings.members or MEMBERS[Method.SCORE_VI_MIXTURE])
    if settings.method == Method.SCORE_VI_SGD:
        from bayespass.posterior.score_sgd import ScoreVISGD

        return ScoreVISGD
    from bayespass.posterior.elbo import MeanFieldVI

    if settings.method == Method.FIRST_LAYER:
        from bayespass.posterior.first_layer import DEFAULTS

        return partial(MeanFieldVI, sd_lr=DEFAULTS["sd_lr"], init_sd=DEFAULTS["init_sd"])
    return MeanFieldVI
