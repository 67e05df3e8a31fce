"""Errors: one type per reaction the user can take.

Every message follows one pattern: the invariant, what was received, where, and the remedy.
"""


class BayespassError(Exception):
    """Base of every error that bayespass raises on purpose."""


class UnsupportedOp(BayespassError, NotImplementedError):
    """An operation met a Gaussian tensor and no rule says how it changes mean and variance.

    React by writing a rule (`@rule(operation)`), a module rule for the block around it, or by
    leaving the module's parameters out of the posterior (`posterior.subset`).
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
    """An optional dependency is needed here; the message names the extra to install."""
