"""The student of a distillation: the single pass with trainable numbers at its sites."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bayespass.batches import call_arguments, device_of
from bayespass.calibrate.inside import Inside, inner_distance
from bayespass.calibrate.output_variance import OutputVariance
from bayespass.calibrate.teacher import Answer, Taught, answers, distance, output_rows, row_correlation
from bayespass.gaussian import GaussianTensor, read
from bayespass.link import Correlation
from bayespass.predict.propagation import SinglePass, scale_output
from bayespass.predict.sampling import in_single_precision

INNER = 10.0  # weight of the parts inside the network


class Student:
    """The single pass with trainable factors and dampings at its sites."""

    def __init__(self, single_pass: SinglePass, inputs: Any) -> None:
        self.single_pass = single_pass
        device = device_of(single_pass.model)
        self.places = {path: index for index, path in enumerate(single_pass.sites)}
        self.seen: set[str] = set()
        self.logs = torch.zeros(len(self.places), device=device, requires_grad=True)
        self.dampings = torch.zeros(len(self.places), device=device, requires_grad=True)
        self.output: OutputVariance | None = None
        single_pass._site_hook = self._corrected
        self.inside = Inside(single_pass.model)
        with torch.no_grad():
            self(inputs)

    def __call__(self, inputs: Any) -> Answer:
        """What it says of every row and position."""
        mean, variance, correlation = self.moments(inputs)
        variance = variance if self.output is None else self.output(mean, variance)
        return answers(self.single_pass.info, correlation)(mean, variance)

    def loss(self, group: Taught) -> Tensor:
        """Distance to the teacher on these rows, in nats: of the outputs, and of what is inside."""
        self.inside.take()
        answer = self(group.inputs)
        return distance(answer, group).mean() + INNER * inner_distance(self.inside.take(), group.inner)

    def moments(self, inputs: Any) -> tuple[Tensor, Tensor, Correlation | None]:
        """Mean and variance (R, C) of the outputs and their correlation, without the last step."""
        args, kwargs = call_arguments(inputs)
        *found, correlation = self.single_pass.correlated_moments(*args, **kwargs)
        mean, variance = (output_rows(in_single_precision(value)) for value in found)
        variance = variance.clamp(min=torch.finfo(variance.dtype).tiny ** 0.5)  # a slope at no variance
        return mean, variance, row_correlation(correlation)

    def load(self, scales: Mapping[str, float]) -> None:
        """Take these factors, and no dampings."""
        with torch.no_grad():
            self.dampings.zero_()
            for path, index in self.places.items():
                self.logs[index] = math.log(scales.get(path, 1.0))

    def fitted(self, *, scaled: bool, damped: bool) -> tuple[dict[str, float], dict[str, float]]:
        """Factors and dampings of the sites that carry variance, by path."""
        factors, dampings = self.logs.detach().exp().tolist(), self.dampings.tolist()
        paths = [path for path in self.places if path in self.seen]
        return (
            {path: factors[self.places[path]] for path in paths} if scaled else {},
            {path: dampings[self.places[path]] for path in paths} if damped else {},
        )

    def _corrected(self, path: str, output: Any) -> Any:
        index = self.places[path]
        factor, damping = self.logs[index].exp(), self.dampings[index]
        output = scale_output(output, factor, self.single_pass.approximation, damping)
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, GaussianTensor):
                self.seen.add(path)
                x = read(leaf)
                for field in (x.mean, x.var, x.shared):
                    if field is not None and field.requires_grad:
                        field.register_hook(_finite)
        return output


def _finite(gradient: Tensor | None) -> Tensor | None:
    """A slope that is infinite, or not defined, as that of a square root at no variance, counts as none."""
    return None if gradient is None else gradient.nan_to_num(0.0, 0.0, 0.0)
