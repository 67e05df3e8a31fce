"""An honest Bayesian answer from any deep network in one forward pass.

    posterior -> predictor -> calibration -> evaluation -> report

This file is the whole public API.
"""

from bayespass.approximation import CVP as CVP
from bayespass.approximation import SHARED as SHARED
from bayespass.approximation import STREAMLINED as STREAMLINED
from bayespass.approximation import Approximation as Approximation
from bayespass.calibrate.temperature import TemperatureScaling as TemperatureScaling
from bayespass.calibrate.variance_scale import VarianceScales as VarianceScales
from bayespass.calibrate.variance_scale import fit_scales as fit_scales
from bayespass.calibrate.variance_scale import load_scales as load_scales
from bayespass.errors import BayespassError as BayespassError
from bayespass.errors import InvalidInput as InvalidInput
from bayespass.errors import InvalidPosteriorFile as InvalidPosteriorFile
from bayespass.errors import MissingExtra as MissingExtra
from bayespass.errors import MissingRule as MissingRule
from bayespass.errors import NotFitted as NotFitted
from bayespass.errors import PosteriorMismatch as PosteriorMismatch
from bayespass.errors import UnsupportedOp as UnsupportedOp
from bayespass.evaluate.agreement import Agreement as Agreement
from bayespass.evaluate.agreement import agreement as agreement
from bayespass.evaluate.calibration_error import reliability_curve as reliability_curve
from bayespass.evaluate.compare import Comparison as Comparison
from bayespass.evaluate.compare import compare as compare
from bayespass.evaluate.scores import Estimate as Estimate
from bayespass.evaluate.scores import evaluate as evaluate
from bayespass.evaluate.selective import risk_coverage_curve as risk_coverage_curve
from bayespass.inspect import Coverage as Coverage
from bayespass.inspect import inspect_model as inspect_model
from bayespass.link import softmax_link as softmax_link
from bayespass.moments import Moments as Moments
from bayespass.posterior.base import Posterior as Posterior
from bayespass.posterior.base import PosteriorInfo as PosteriorInfo
from bayespass.posterior.elbo import MeanFieldVI as MeanFieldVI
from bayespass.posterior.first_layer import fit_first_layer as fit_first_layer
from bayespass.posterior.first_layer import kl_to_prior as kl_to_prior
from bayespass.posterior.ivon import IVON as IVON
from bayespass.posterior.laplace import Laplace as Laplace
from bayespass.posterior.laplace import PriorTuning as PriorTuning
from bayespass.posterior.mean_field import DiagonalGaussian as DiagonalGaussian
from bayespass.posterior.method import TrainingMethod as TrainingMethod
from bayespass.posterior.scale import Scale as Scale
from bayespass.posterior.score_matching import ScoreVI as ScoreVI
from bayespass.posterior.score_mixture import ScoreVIMixture as ScoreVIMixture
from bayespass.posterior.score_sgd import ScoreVISGD as ScoreVISGD
from bayespass.posterior.selection import first_layer as first_layer
from bayespass.posterior.selection import frozen_except as frozen_except
from bayespass.posterior.selection import last_layer as last_layer
from bayespass.posterior.selection import select_parameters as select_parameters
from bayespass.predict.dataset import predict_dataset as predict_dataset
from bayespass.predict.propagation import SinglePass as SinglePass
from bayespass.predict.propagation import propagate as propagate
from bayespass.predict.sampling import MeanNetwork as MeanNetwork
from bayespass.predict.sampling import MonteCarlo as MonteCarlo
from bayespass.prediction import ClassificationPrediction as ClassificationPrediction
from bayespass.prediction import Prediction as Prediction
from bayespass.prediction import RegressionPrediction as RegressionPrediction
from bayespass.rules.registry import Accuracy as Accuracy
from bayespass.rules.registry import module_rule as module_rule
from bayespass.rules.registry import rule as rule
from bayespass.training import NonFiniteLoss as NonFiniteLoss
from bayespass.training import TrainingLog as TrainingLog
from bayespass.training import likelihood_loss as likelihood_loss
from bayespass.training import train as train
from bayespass.version import __version__ as __version__
