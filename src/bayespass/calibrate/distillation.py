"""Calibration as distillation: the single pass learns from Monte Carlo on unlabelled inputs.

The student is the single pass with two numbers per site, fitted by Adam through the propagation:

    v' = a v                     a factor of the variance, as `fit_scales` fits it site by site
    m' = m exp(-d r)             a damping of the mean, r = mean(v') / (mean(m^2) + mean(v')) over the last axis

The damping vanishes with the variance, so that a narrower posterior is corrected less. It gains most
where the propagated mean is poor; where it gains nothing on held-out inputs it is left out.
The loss, in nats, is the mean over rows of

    KL(MC || student) of the predictions + mean over outputs of KL(N_MC || N_student),

predictions being class probabilities or Gaussians of the observations, noise included (for these the second term
counts a tenth: noise hides most of it), plus ten times the mean KL of the Gaussians inside the network, at what its
blocks and other parts give out (`inside.py`; the ten was chosen on networks of digits), plus 0.1 / N times the
squared distance of log factors and dampings from their start: few inputs move them little. Last, the output's
variance is corrected row by row (`output_variance.py`). Inputs that are set apart stop the training and choose
between no calibration, `fit_scales`, distilled factors, factors with dampings, and each with or without the last step.

Source: single_pass notes 3.7 and 10.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bayespass.approximation import FAITHFUL, Approximation
from bayespass.batches import batch_size, device_of, input_batches
from bayespass.calibrate.output_variance import OutputVariance, fit_output_variance
from bayespass.calibrate.student import Student
from bayespass.calibrate.teacher import (
    Answer,
    Taught,
    Teacher,
    answers,
    groups_of,
    joined,
    joined_moments,
    split_rows,
)
from bayespass.calibrate.variance_scale import VarianceScales, fit_scales
from bayespass.errors import InvalidInput, require_count
from bayespass.evaluate.agreement import Agreement, agreement
from bayespass.posterior.base import Posterior
from bayespass.predict.propagation import SinglePass
from bayespass.prediction import ClassificationPrediction, Prediction, RegressionPrediction
from bayespass.progress import track

HELD_OUT = 0.2
MIN_INPUTS = 10
N_GROUPS = 8
LEARNING_RATE = 0.05
CHECK_EVERY = 8
PATIENCE = 8  # checks without progress
SHRINKAGE = 0.1
NONE, SEQUENTIAL, FACTORS, DAMPED = "none", "fit_scales", "distilled factors", "distilled factors and dampings"
OUTPUT = " + output variance"


@dataclass(frozen=True)
class DistillationReport:
    """What a distillation did, on inputs that were set apart.

    Args:
        before: faithfulness to Monte Carlo without calibration.
        sequential: with `fit_scales` on the other inputs.
        after: with what was chosen.
        objectives: held-out loss, in nats, of every candidate, parts inside the network included.
        chosen: the candidate of the smallest loss.
        n_inputs: all inputs.
        n_held_out: of which set apart.
        n_samples: draws of the teacher.
        steps: gradient steps that were taken.
        seconds: in all.

    For regression the KL is that of the observations' Gaussians.
    """

    before: Agreement
    sequential: Agreement
    after: Agreement
    objectives: Mapping[str, float]
    chosen: str
    n_inputs: int
    n_held_out: int
    n_samples: int
    steps: int
    seconds: float

    def __str__(self) -> str:
        lines = [
            f"{self.chosen}, by {self.n_held_out} of {self.n_inputs} inputs; {self.n_samples} draws, "
            f"{self.steps} steps, {self.seconds:.0f} s"
        ]
        for title, row in (("before", self.before), ("fit_scales", self.sequential), ("after", self.after)):
            lines.append(
                f"{title:>10}: KL to Monte Carlo {row.kl:.4f} ± {row.kl_standard_error:.4f}, mean error "
                f"{row.mean_error:.3f} sd, variance ratio {row.variance_ratio:.2f}, Spearman {row.spearman:.2f}"
            )
        return "\n".join(lines)


class DistilledScales(VarianceScales):
    """Variance factors and dampings by site, with the report of how they were fitted.

    Args:
        factors: path of the site to factor > 0.
        approximation: name of the approximation they belong to.
        dampings: path of the site to the damping of its mean.
        report: before and after.
        output: the correction of the output's variance.
    """

    def __init__(
        self,
        factors: Mapping[str, float],
        approximation: str,
        dampings: Mapping[str, float],
        report: DistillationReport,
        output: OutputVariance | None = None,
    ) -> None:
        super().__init__(factors, approximation, dampings=dampings, output=output)
        self.report = report

    def __repr__(self) -> str:
        return f"DistilledScales({self.approximation}; {self.described()}; {self.report.chosen})"


def distill(
    model: nn.Module,
    posterior: Posterior,
    loader: Iterable[Any] | Tensor,
    approximation: Approximation | str = FAITHFUL,
    n_samples: int = 100,
    seed: int = 0,
    max_steps: int = 150,
    batch_rows: int = 32,
    progress: bool = False,
) -> DistilledScales:
    """Fit variance factors and mean dampings of all sites to the Monte-Carlo predictive, without labels.

    One row in five is set apart to stop the training and to choose what to keep, which may be nothing.
    A few hundred inputs that the network has not memorised are enough. Targets are not read.

    Args:
        model: in eval mode.
        posterior: over any subset of its parameters.
        loader: batches of inputs, or one batch, as in `fit_scales`; rows along the leading axis of
            every tensor.
        approximation: the approximation to calibrate.
        n_samples: draws of the teacher per group of rows, at least 10.
        seed: of the split, the draws and the order of the steps.
        max_steps: gradient steps at most, a third of them for factors alone.
        batch_rows: rows per gradient step at most, which bounds the memory.
        progress: show a progress bar.

    Returns:
        factors and dampings for `SinglePass(..., scales=...)` and `posterior.save(..., scales=...)`, with
        a `report`.

    Raises:
        InvalidInput: fewer than 10 samples or 10 inputs, or a value outside its range.
    """
    require_count(n_samples=n_samples, max_steps=max_steps, batch_rows=batch_rows)
    if n_samples < 10:
        msg = f"n_samples must be at least 10 to measure variances; got {n_samples}"
        raise InvalidInput(msg)
    start = time.perf_counter()
    with torch.inference_mode(mode=False), torch.enable_grad():
        batches = [_ordinary(inputs) for inputs in input_batches(loader, device_of(model))]
        n_inputs = sum(map(batch_size, batches))
        if n_inputs < MIN_INPUTS:
            msg = f"distillation needs at least {MIN_INPUTS} inputs, some of them set apart; got {n_inputs}. Pass more"
            raise InvalidInput(msg)
        generator = torch.Generator().manual_seed(seed)
        kept, apart = split_rows(batches, HELD_OUT, generator)
        rows = min(batch_rows, math.ceil(sum(map(batch_size, kept)) / N_GROUPS))
        teacher = Teacher(model, posterior, n_samples, inside=True)
        groups = [(part, group) for part in (kept, apart) for group in groups_of(part, rows)]
        drawn = torch.randint(2**31, (len(groups),), generator=generator).tolist()
        taught = [
            (part, teacher.taught(group, draws))
            for (part, group), draws in zip(track(groups, "Monte Carlo", show=progress), drawn, strict=True)
        ]
        student = Student(SinglePass(model, posterior, approximation), groups[0][1])
        sequential = fit_scales(model, posterior, [(part,) for part in kept], approximation, n_samples, drawn[0])
        training = [answer for part, answer in taught if part is kept]
        held_out = [answer for part, answer in taught if part is apart]
        return _Distillation(student, training, held_out, generator).run(
            sequential, max_steps, n_inputs, n_samples, start, progress
        )


class _Distillation:
    """The training of one student."""

    def __init__(
        self, student: Student, training: list[Taught], held_out: list[Taught], generator: torch.Generator
    ) -> None:
        self.student, self.training, self.held_out, self.generator = student, training, held_out, generator
        self.objectives: dict[str, float] = {}
        self.states: dict[str, tuple[Tensor, Tensor, OutputVariance | None]] = {}
        self.steps = 0

    def run(
        self, sequential: VarianceScales, max_steps: int, n_inputs: int, n_samples: int, start: float, progress: bool
    ) -> DistilledScales:
        """Every candidate in turn, and the best."""
        student = self.student
        self._note(NONE)
        student.load(sequential)
        self._note(SEQUENTIAL)
        self._restore(self._best())
        first = max(1, max_steps // 3)
        self._train(FACTORS, [student.logs], first, progress)
        self._restore(self._best())
        self._train(DAMPED, [student.logs, student.dampings], max(1, max_steps - first), progress)
        sites = self._best()
        self._restore(sites)
        output = self._output_variance()
        chosen = self._best()
        faithful = {name: self._agreement(name) for name in (NONE, SEQUENTIAL, chosen)}
        factors, dampings = student.fitted(scaled=sites != NONE, damped=sites == DAMPED)
        report = DistillationReport(
            faithful[NONE],
            faithful[SEQUENTIAL],
            faithful[chosen],
            dict(self.objectives),
            chosen,
            n_inputs,
            sum(batch_size(group.inputs) for group in self.held_out),
            n_samples,
            self.steps,
            time.perf_counter() - start,
        )
        kept = output if chosen == sites + OUTPUT else None
        return DistilledScales(factors, student.single_pass.approximation.name, dampings, report, kept)

    def _train(self, name: str, parameters: list[Tensor], max_steps: int, progress: bool) -> None:
        """Adam until held-out rows stop improving; the best state is noted under this name."""
        optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max_steps)
        self._note(name)
        starts = [parameter.detach().clone() for parameter in parameters]
        pull = SHRINKAGE / sum(batch_size(group.inputs) for group in self.training)
        order, since = torch.empty(0), 0
        for step in track(range(max_steps), name, show=progress):
            if not len(order):
                order = torch.randperm(len(self.training), generator=self.generator)
            group, order = self.training[int(order[0])], order[1:]
            optimizer.zero_grad()
            loss = self.student.loss(group)
            for parameter, origin in zip(parameters, starts, strict=True):
                loss = loss + pull * (parameter - origin).square().sum()
            loss.backward()
            if all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in parameters):
                optimizer.step()
            schedule.step()
            self.steps += 1
            if (step + 1) % CHECK_EVERY == 0 or step + 1 == max_steps:
                since = 0 if self._note(name) else since + 1
                if since >= PATIENCE:
                    break

    def _output_variance(self) -> OutputVariance | None:
        """The last step on the present state, noted under its own name; None where no output has variance."""
        with torch.no_grad():
            found = [self.student.moments(group.inputs) for group in self.training]
        mean, variance, correlation = joined_moments(found)
        truth = joined(self.training)
        if not (truth.variance > 0).any():
            return None
        info = self.student.single_pass.info
        self.student.output = fit_output_variance(mean, variance, truth, answers(info, correlation))
        self._note(self._best() + OUTPUT)
        return self.student.output

    def _note(self, name: str) -> bool:
        """Keep the present state as this candidate's if none of its own was better."""
        with torch.no_grad():
            losses = [self.student.loss(group) * batch_size(group.inputs) for group in self.held_out]
        value = float(sum(losses)) / sum(batch_size(group.inputs) for group in self.held_out)
        if not value < self.objectives.get(name, math.inf):
            return False
        self.objectives[name] = value
        logs, dampings = self.student.logs.detach().clone(), self.student.dampings.detach().clone()
        self.states[name] = (logs, dampings, self.student.output)
        return True

    def _best(self) -> str:
        """The simplest of the candidates with the smallest held-out loss."""
        return min(self.objectives, key=self.objectives.__getitem__)

    def _restore(self, name: str) -> None:
        with torch.no_grad():
            self.student.logs.copy_(self.states[name][0])
            self.student.dampings.copy_(self.states[name][1])
        self.student.output = self.states[name][2]

    def _agreement(self, name: str) -> Agreement:
        """Faithfulness of a candidate on the held-out rows; the student is left in its state."""
        self._restore(name)
        with torch.no_grad():
            found = [self.student(group.inputs) for group in self.held_out]
        return agreement(_prediction(found), _prediction(self.held_out))


def _prediction(groups: Sequence[Answer | Taught]) -> Prediction:
    mean, variance = (torch.cat([getattr(group, field) for group in groups]) for field in ("mean", "variance"))
    probs, totals = ([getattr(group, field) for group in groups] for field in ("probs", "total"))
    if probs[0] is not None:
        return ClassificationPrediction(torch.cat(probs), mean, variance)
    width = totals[0].shape[-1]
    mean, variance = mean[:, :width], variance[:, :width]
    return RegressionPrediction(mean, variance, (torch.cat(totals) - variance).clamp(min=0))


def _ordinary(inputs: Any) -> Any:
    """Inputs without inference tensors, which cannot take part in a gradient."""
    return pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) and t.is_inference() else t, inputs)
