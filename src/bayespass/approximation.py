"""Which approximation a propagation uses, as one frozen value that the rules read.

Where approximations differ, the rule of the operation reads a field of this value; no rule is
written twice. The value travels with the tensors of one propagation and nothing is global.
"""

from dataclasses import dataclass, fields
from typing import Literal, get_args

from bayespass.errors import InvalidInput

Activation = Literal["moments", "linear"]
Norm = Literal["expected", "delta", "at_mean"]
Scores = Literal["at_mean", "random"]
Shared = Literal["ignore", "carry"]
Logits = Literal["independent", "correlated"]


@dataclass(frozen=True)
class Approximation:
    """How mean and variance pass through the operations that have no exact rule.

    Args:
        name: the word that results and tables use.
        activation: `"moments"` matches the mean and variance of the activation of a Gaussian;
            `"linear"` linearises at the mean, `f(m)` and `f'(m)^2 v`.
        norm: statistics of layer norm. `"expected"` puts the expected sample variance in the
            denominator; `"delta"` adds the first-order effect of every entry on the statistics;
            `"at_mean"` takes the statistics of the mean as constants.
        scores: attention scores. `"at_mean"` ignores the variance of queries and keys, so the
            attention weights are those of the mean and only values carry variance; `"random"`
            follows it, by the variance of a score around the average of its query.
        shared: noise that one weight makes at all positions (tokens, pixels, time steps).
            `"carry"` follows the part of the variance that positions have in common, which
            pooling and attention do not average away; `"ignore"` treats positions as independent.
        logits: the noise of the logits of one row. `"correlated"` gives them what the features that a last
            linear layer mixes have in common (`Correlation`); `"independent"` leaves it out. Where logits are not
            the output of a linear layer, they are independent by both.

    Raises:
        InvalidInput: a field has a value outside its list.
    """

    name: str
    activation: Activation = "moments"
    norm: Norm = "expected"
    scores: Scores = "at_mean"
    shared: Shared = "ignore"
    logits: Logits = "independent"

    def __post_init__(self) -> None:
        choices = {"activation": Activation, "norm": Norm, "scores": Scores, "shared": Shared, "logits": Logits}
        for field in fields(self):
            if field.name in choices and getattr(self, field.name) not in get_args(choices[field.name]):
                allowed = ", ".join(repr(value) for value in get_args(choices[field.name]))
                msg = f"Approximation.{field.name} must be one of {allowed}; got {getattr(self, field.name)!r}"
                raise InvalidInput(msg)

    @property
    def drops(self) -> tuple[str, ...]:
        """What this approximation leaves out by design, in words for notes and reports."""
        return () if self.scores == "random" else ("variance of attention scores (queries and keys at their mean)",)


STREAMLINED = Approximation("streamlined", activation="linear", norm="at_mean", scores="at_mean")
"""Local linearisation and local Gaussians (Li et al. 2024, arXiv 2411.18425), frozen as a baseline."""

CVP = Approximation("cvp", activation="moments", norm="expected", scores="at_mean")
"""Calibrated variance propagation (Wieczorek et al. 2026, arXiv 2606.16214) as we read it: matched
moments, norm statistics at their expectation, value variance through squared attention weights.
Frozen as the baseline of every later table."""

SHARED = Approximation("shared", activation="moments", norm="delta", scores="at_mean", shared="carry")
"""Matched moments, delta-form norms, and the variance that positions have in common carried along:
what convolutional networks and long sequences need, for about one more product per layer."""

FAITHFUL = Approximation(
    "faithful", activation="moments", norm="delta", scores="random", shared="carry", logits="correlated"
)
"""What comes closest to Monte Carlo, and the default: as `shared`, with random queries and keys, whose
noise moves the attention weights and so the mean, and with logits that are uncertain together.
`benchmarks/fidelity.py` measures it."""

NAMED = {approximation.name: approximation for approximation in (STREAMLINED, CVP, SHARED, FAITHFUL)}


def named_approximation(approximation: "Approximation | str") -> Approximation:
    """The approximation of that name, or the value itself.

    Raises:
        InvalidInput: no approximation has this name.
    """
    if isinstance(approximation, Approximation):
        return approximation
    if approximation not in NAMED:
        msg = f"approximation must be an Approximation or one of {', '.join(map(repr, NAMED))}; got {approximation!r}"
        raise InvalidInput(msg)
    return NAMED[approximation]
