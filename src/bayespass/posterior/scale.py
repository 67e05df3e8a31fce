"""How libraries weigh data against prior: one scale, every spelling.

The posterior that all of bayespass means by N data points, prior precision a0 and temperature T is

    log q(theta) = ( -N lbar(theta) - a0/2 |theta - m0|^2 ) / T,     precision (N h + a0) / T

with lbar the mean negative log-likelihood and h its curvature. Other code says the same in other
words, and getting one of them wrong tempers a posterior silently.
"""

from collections.abc import Callable
from dataclasses import dataclass

from bayespass.errors import InvalidInput, require_count, require_positive


@dataclass(frozen=True)
class Scale:
    """N, a0 and T, and what other libraries call them.

    Args:
        n_data: N, the number of training points.
        prior_precision: a0 of the prior N(m0, 1/a0).
        temperature: T, tempers likelihood and prior alike.

    >>> Scale(50_000, prior_precision=10.0).to("ivon-opt")
    {'ess': 50000.0, 'weight_decay': 0.0002}
    >>> Scale.from_library("ivon-opt", n_data=50_000, ess=5e6, weight_decay=2e-4)
    Scale(n_data=50000, prior_precision=10.0, temperature=0.01)

    Raises:
        InvalidInput: a value that is not positive.
    """

    n_data: int
    prior_precision: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        require_count(n_data=self.n_data)
        require_positive(prior_precision=self.prior_precision, temperature=self.temperature)

    @property
    def data_weight(self) -> float:
        """N / T, the weight of the mean loss."""
        return self.n_data / self.temperature

    @property
    def prior_weight(self) -> float:
        """a0 / T, the precision that the prior adds."""
        return self.prior_precision / self.temperature

    def precision(self, curvature: float) -> float:
        """(N h + a0) / T, the posterior precision where the mean loss has curvature h."""
        return self.data_weight * curvature + self.prior_weight

    def to(self, library: str) -> dict[str, float]:
        """The same scale in another library's arguments.

        Args:
            library: one of `LIBRARIES`.

        Raises:
            InvalidInput: an unknown library.
        """
        return _spelling(library).to(self)

    @classmethod
    def from_library(cls, library: str, n_data: int, **arguments: float) -> "Scale":
        """The scale that another library's arguments mean for N data points.

        Args:
            library: one of `LIBRARIES`.
            n_data: N.
            arguments: the library's own, by name.

        Raises:
            InvalidInput: an unknown library, or other arguments than it has.
        """
        spelling = _spelling(library)
        if set(arguments) != set(spelling.arguments):
            msg = f"{library} is set by {', '.join(spelling.arguments)}; got {', '.join(arguments) or 'nothing'}"
            raise InvalidInput(msg)
        require_count(n_data=n_data)
        require_positive(**{name: value for name, value in arguments.items() if name != "weight_decay" or value != 0})
        data_weight, prior_weight = spelling.weights(n_data, arguments)
        temperature = n_data / data_weight
        return cls(n_data, _round(prior_weight * temperature), _round(temperature))


@dataclass(frozen=True)
class _Spelling:
    """One library: its arguments, from a scale, and the weights of data and prior that they mean."""

    arguments: tuple[str, ...]
    to: Callable[[Scale], dict[str, float]]
    weights: Callable[[int, dict[str, float]], tuple[float, float]]


LIBRARIES: dict[str, _Spelling] = {
    # IVON and EVON: ess weighs the data, and the prior precision in force is ess * weight_decay.
    "ivon-opt": _Spelling(
        ("ess", "weight_decay"),
        lambda s: {"ess": s.data_weight, "weight_decay": s.prior_weight / s.data_weight},
        lambda n, a: (a["ess"], a["ess"] * a["weight_decay"]),  # noqa: ARG005
    ),
    # Bayes by backprop: mean loss + kl_weight * KL(q || N(0, prior_sd^2)).
    "bayes-by-backprop": _Spelling(
        ("kl_weight", "prior_sd"),
        lambda s: {"kl_weight": 1 / s.data_weight, "prior_sd": s.prior_weight**-0.5},
        lambda n, a: (1 / a["kl_weight"], a["prior_sd"] ** -2),  # noqa: ARG005
    ),
    # laplace-torch: (N h) / temperature + prior_precision, its temperature spares the prior.
    "laplace-torch": _Spelling(
        ("prior_precision", "temperature"),
        lambda s: {"prior_precision": s.prior_weight, "temperature": s.temperature},
        lambda n, a: (n / a["temperature"], a["prior_precision"]),
    ),
    # BayesDLL's VI and MC-dropout: N / kld weighs the data.
    "bayesdll-vi": _Spelling(
        ("kld", "prior_sig"),
        lambda s: {"kld": s.temperature, "prior_sig": s.prior_weight**-0.5},
        lambda n, a: (n / a["kld"], a["prior_sig"] ** -2),
    ),
    # BayesDLL's SGLD: N * Ninflate weighs the data.
    "bayesdll-sgld": _Spelling(
        ("Ninflate", "prior_sig"),
        lambda s: {"Ninflate": 1 / s.temperature, "prior_sig": s.prior_weight**-0.5},
        lambda n, a: (n * a["Ninflate"], a["prior_sig"] ** -2),
    ),
    # posteriors: log_posterior is the mean log-likelihood plus log prior / N, and temperature T / N.
    "posteriors": _Spelling(
        ("temperature", "prior_precision"),
        lambda s: {"temperature": 1 / s.data_weight, "prior_precision": s.prior_precision},
        lambda n, a: (1 / a["temperature"], a["prior_precision"] / (n * a["temperature"])),
    ),
}


def _spelling(library: str) -> _Spelling:
    if library not in LIBRARIES:
        msg = f"library must be one of {', '.join(map(repr, LIBRARIES))}; got {library!r}"
        raise InvalidInput(msg)
    return LIBRARIES[library]


def _round(value: float) -> float:
    """Without the last digits, which a ratio of ratios leaves wrong."""
    return float(f"{value:.12g}")
