"""A predictor over a whole loader."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from bayespass.batches import call_arguments, input_batches
from bayespass.prediction import Prediction, concatenate


def predict_dataset(predictor: nn.Module, batches: Iterable[Any]) -> Prediction:
    """The prediction for every row, in order, without gradients.

    Args:
        predictor: `SinglePass`, `MonteCarlo` or `MeanNetwork`.
        batches: a loader of inputs or of (inputs, targets); targets are not read.

    Raises:
        InvalidInput: the loader yields no batch.
    """
    predictions = []
    with torch.inference_mode():
        for inputs in input_batches(batches):
            args, kwargs = call_arguments(inputs)
            predictions.append(predictor(*args, **kwargs))
    return concatenate(predictions)
