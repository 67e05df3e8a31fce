"""The predictors that are compared: one line each in `PREDICTORS`.

A builder takes a `Setting` and returns a function from batches to a `Prediction`, or None where the predictor does
not apply. What it fits, it fits on the held-out rows: calibrations on the inputs of the first 200, with the library's
default of 100 draws, whatever has labels (temperatures, prior precisions) on all. Monte Carlo with few draws and the
ceiling of two moments come from the draws that are kept, see `fidelity_measure`.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

import fidelity_suq
from bayespass import (
    Cascade,
    ClassificationPrediction,
    CorrelatedPass,
    DistilledScales,
    Laplace,
    Linearised,
    MeanNetwork,
    MonteCarlo,
    Posterior,
    Prediction,
    SinglePass,
    TemperatureScaling,
    distill,
    fit_scales,
    last_layer,
    predict_dataset,
)
from bayespass.predict.snapshot import snapshot
from fidelity_cases import Batches, Case, Task, first_rows, inputs_of, targets_of

CALIBRATION_ROWS, FEW_ROWS, CALIBRATION_DRAWS, CALIBRATION_SEED = 200, 50, 100, 2_000_000
CASCADE_DRAWS, CASCADE_BUDGET, CASCADE_SEED = 64, 0.1, 3_000_000
FORECAST_DRAWS = 16  # for every prior precision
LAST_LAYER_GRID = tuple(10 ** (0.5 * k) for k in range(-4, 11))

Predict = Callable[[Batches], Prediction]


@dataclass(frozen=True, eq=False)
class Setting:
    """What a predictor is made from.

    Args:
        name: of the task.
        task: its settings.
        case: its rows and its trained network.
        posterior: at the cell's scale.
        seed: of the cell.
    """

    name: str
    task: Task
    case: Case
    posterior: Posterior
    seed: int

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self.case.model

    @property
    def unlabelled(self) -> list:
        """Inputs for calibrations."""
        return inputs_of(first_rows(self.case.held_out, CALIBRATION_ROWS))


def running(predictor: nn.Module) -> Predict:
    """Predictions of a module for all rows."""
    return lambda batches: predict_dataset(predictor, batches)


def mean_network(setting: Setting) -> Predict:
    """The network at the posterior's mean."""
    return running(MeanNetwork(setting.model, setting.posterior))


def tempered(setting: Setting) -> Predict | None:
    """The same with one temperature, fitted to held-out labels."""
    if setting.task.likelihood != "classification":
        return None
    network = mean_network(setting)
    held_out = network(setting.case.held_out)
    assert isinstance(held_out, ClassificationPrediction)
    temperature = TemperatureScaling().fit(held_out, targets_of(setting.case.held_out))

    def predict(batches: Batches) -> Prediction:
        found = network(batches)
        assert isinstance(found, ClassificationPrediction)
        return temperature(found)

    return predict


def last_layer_laplace(setting: Setting) -> Predict:
    """Laplace over the last layer of the mean network, linearised; prior precision by held-out log loss.

    Exact, but for forecasts, whose Jacobian over all steps is too large: sampled curvature and draws there.
    """
    model, info = snapshot(setting.model, setting.posterior), setting.posterior.info
    forecasts = info.sigma_noise == "predicted"

    def drawn(network: nn.Module, posterior: Posterior, count: int = FORECAST_DRAWS) -> Linearised:
        return Linearised(network, posterior, count, setting.seed, covariance="samples")

    for parameter in model.parameters():
        parameter.requires_grad_(True)
    names = last_layer(model, setting.case.train[0][0])
    train = first_rows(setting.case.train, setting.task.curvature_rows)
    targets = targets_of(train)
    temperature = targets[0].numel() * len(targets) / setting.case.n_data
    laplace = Laplace(
        model,
        info.likelihood,
        hessian_structure="kron",
        curvature="mc" if forecasts else "ggn",
        sigma_noise=info.sigma_noise,
        temperature=temperature,
        names=names,
    ).fit(train)
    grid = [temperature * value for value in LAST_LAYER_GRID]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a verdict on the prior: the figures give it
        laplace.optimize_prior_precision("gridsearch", setting.case.held_out, grid, drawn if forecasts else Linearised)
    posterior = laplace.posterior()
    return running(drawn(model, posterior, 64) if forecasts else Linearised(model, posterior))


def single_pass(approximation: str, calibrated: bool = False) -> Callable[[Setting], Predict]:
    """One pass, with scales fitted to Monte Carlo on unlabelled inputs if calibrated."""

    def build(setting: Setting) -> Predict:
        scales = None
        if calibrated:
            seed = CALIBRATION_SEED + setting.seed
            scales = fit_scales(
                setting.model, setting.posterior, setting.unlabelled, approximation, CALIBRATION_DRAWS, seed
            )
        return running(SinglePass(setting.model, setting.posterior, approximation, scales))

    return build


@lru_cache(maxsize=1)
def distilled(setting: Setting) -> DistilledScales:
    """The calibration of the default, which several predictors of a cell share."""
    seed = CALIBRATION_SEED + setting.seed
    return distill(setting.model, setting.posterior, setting.unlabelled, "faithful", CALIBRATION_DRAWS, seed)


def distilled_on_few(setting: Setting) -> Predict:
    """The default, distilled on a quarter of the inputs: how much the calibration needs."""
    seed, few = CALIBRATION_SEED + setting.seed, inputs_of(first_rows(setting.case.held_out, FEW_ROWS))
    scales = distill(setting.model, setting.posterior, few, "faithful", CALIBRATION_DRAWS, seed)
    return running(SinglePass(setting.model, setting.posterior, "faithful", scales))


def faithful(setting: Setting) -> SinglePass:
    """The default, distilled."""
    return SinglePass(setting.model, setting.posterior, "faithful", distilled(setting))


def correlated(setting: Setting) -> Predict:
    """The default with exact linearised variances of three outputs, fitted to the same draws."""
    predictor = CorrelatedPass(setting.model, setting.posterior, "faithful", distilled(setting))
    seed = CALIBRATION_SEED + setting.seed
    return running(predictor.fit(setting.unlabelled, CALIBRATION_DRAWS, seed))


def cascade(setting: Setting) -> Predict:
    """The default, and fresh draws for the tenth of the rows with the largest epistemic share."""
    draws = MonteCarlo(setting.model, setting.posterior, CASCADE_DRAWS, CASCADE_SEED + setting.seed)
    return running(Cascade(faithful(setting), draws, CASCADE_BUDGET).fit(setting.unlabelled))


def suq(fit: str) -> Callable[[Setting], Predict | None]:
    """SUQ's own package, with its scale fitted to held-out labels as shipped or with its label shapes corrected."""

    def build(setting: Setting) -> Predict | None:
        if fidelity_suq.kind_of(setting.model) is None or not all_tensors(setting.case.held_out):
            return None
        held_out = torch.cat(inputs_of(setting.case.held_out)), targets_of(setting.case.held_out)

        def predict(batches: Batches) -> Prediction:
            inputs = torch.cat(inputs_of(batches))
            found = fidelity_suq.suq_predictions(setting.model, setting.posterior, inputs, held_out, fits=(fit,))
            if found[fit].prediction is None:
                msg = f"the fit of SUQ's scale diverged to {found[fit].scale}"
                raise ArithmeticError(msg)
            return found[fit].prediction  # type: ignore[return-value]

        return predict

    return build


def all_tensors(batches: Batches) -> bool:
    """Whether the inputs are plain tensors."""
    return all(isinstance(inputs, Tensor) for inputs in inputs_of(batches))


PREDICTORS: dict[str, Callable[[Setting], Predict | None]] = {
    "map": mean_network,
    "map_temperature": tempered,
    "last_layer_laplace": last_layer_laplace,
    "streamlined": single_pass("streamlined"),
    "cvp_uncalibrated": single_pass("cvp"),
    "cvp": single_pass("cvp", calibrated=True),
    "shared": single_pass("shared", calibrated=True),
    "faithful_uncalibrated": single_pass("faithful"),
    "faithful_sequential": single_pass("faithful", calibrated=True),
    "faithful_few_inputs": distilled_on_few,
    "faithful": lambda setting: running(faithful(setting)),
    "correlated": correlated,
    "cascade": cascade,
    "suq": suq("none"),
    "suq_shipped_fit": suq("shipped"),
    "suq_corrected_fit": suq("corrected"),
}
DEFAULT = "faithful"  # the predictor whose figures lead the summary
