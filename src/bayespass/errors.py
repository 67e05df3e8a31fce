"""Errors: one type per reaction the user can take.

Every message follows one pattern: the invariant, what was received, where, and the remedy.
"""

from math import inf
from typing import Any


class BayespassError(Exception):
    """Base of every error that bayespass raises on purpose."""


class UnsupportedOp(BayespassError, NotImplementedError):
    """An operation met a Gaussian tensor in a way that its rule does not honour.

    React by changing what the message names in the model, or by leaving the parameters before it
    out of the posterior (`posterior.subset`).
    """


class MissingRule(UnsupportedOp):
    """No rule says how an operation changes mean and variance.

    React by writing one (`@rule(operation)`) or a module rule for the block around it.
    """


class InvalidInput(BayespassError, ValueError):
    """An argument, a batch or a label lies outside what the function is defined for."""


class PosteriorMismatch(BayespassError, ValueError):
    """Posterior and model do not belong together: names, shapes or frozen weights differ."""


class InvalidPosteriorFile(BayespassError, ValueError):
    """A file is not a posterior written by bayespass, or it was damaged."""


class NotFitted(BayespassError, RuntimeError):
    """A result was asked for before the step that produces it."""


class MissingExtra(BayespassError, ImportError):
    """A feature needs a package of an optional extra; the message says which to install."""


def require_positive(**values: Any) -> None:
    """Raise unless every value is a positive, finite number.

    Raises:
        InvalidInput: one is not, by name.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < inf:
            msg = f"{name} must be a positive number; got {value!r}"
            raise InvalidInput(msg)


def require_count(**values: Any) -> None:
    """Raise unless every value is a whole number of at least 1.

    Raises:
        InvalidInput: one is not, by name.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            msg = f"{name} must be a whole number of at least 1; got {value!r}"
            raise InvalidInput(msg)
