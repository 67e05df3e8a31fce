"""Figures, drawn from numbers computed in `evaluate/`. matplotlib is imported where it draws."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bayespass.errors import InvalidInput
from bayespass.evaluate.calibration_error import DEFAULT_BINS, reliability_curve
from bayespass.evaluate.selective import risk_coverage_curve
from bayespass.prediction import ClassificationPrediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#8a8f98", "#c0504d", "#1f6fb2", "#2e8b57", "#8e5ea2", "#d08a2e")
Predictions = Mapping[str, ClassificationPrediction]


def new_figure(width: float, height: float, columns: int = 1) -> "tuple[Figure, list[Axes]]":
    """A figure and its axes, without the global state of pyplot.

    Args:
        width: inches.
        height: inches.
        columns: axes side by side.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def draw_reliability(axis: "Axes", predictions: Predictions, labels: np.ndarray, n_bins: int = DEFAULT_BINS) -> None:
    """Accuracy against confidence, one line per predictor; the diagonal is perfect calibration.

    Args:
        axis: to draw on.
        predictions: by the name to show.
        labels: (N,) classes.
        n_bins: equal-width bins; those with fewer than five rows are left out.
    """
    axis.plot([0, 1], [0, 1], color="#cccccc", linewidth=1)
    for colour, (name, prediction) in zip(COLOURS, predictions.items(), strict=False):
        confidence, right = _confidence_and_right(prediction, labels)
        curve = reliability_curve(confidence, right, n_bins)
        filled = curve.count >= 5
        label = f"{name} (ECE {100 * curve.expected_calibration_error:.1f} %)"
        axis.plot(curve.confidence[filled], curve.accuracy[filled], marker="o", markersize=4, color=colour, label=label)
    axis.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02), title="Reliability")
    axis.legend(frameon=False, fontsize=8, loc="upper left")


def draw_risk_coverage(axis: "Axes", predictions: Predictions, labels: np.ndarray) -> None:
    """Error rate among the answered against the share answered, one line per predictor.

    Args:
        axis: to draw on.
        predictions: by the name to show.
        labels: (N,) classes.
    """
    for colour, (name, prediction) in zip(COLOURS, predictions.items(), strict=False):
        confidence, right = _confidence_and_right(prediction, labels)
        curve = risk_coverage_curve(confidence, ~right)
        label = f"{name} (AURC {100 * curve.aurc:.2f} %)"
        axis.plot(100 * curve.coverage, 100 * curve.risk, color=colour, linewidth=1.6, label=label)
    axis.set(xlabel="inputs answered (%)", ylabel="errors among them (%)", xlim=(0, 100), title="Risk and coverage")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, fontsize=8, loc="upper left")


def draw_images(
    axes: "Sequence[Axes]", images: np.ndarray, captions: Sequence[str], colours: Sequence[str] | None = None
) -> None:
    """Grey images with a caption each.

    Args:
        axes: one per image.
        images: (n, height, width).
        captions: one per image.
        colours: of the captions.

    Raises:
        InvalidInput: numbers of axes, images and captions differ.
    """
    if not len(axes) == len(images) == len(captions):
        msg = (
            f"one axis and one caption per image; got {len(axes)} axes, {len(images)} images, {len(captions)} captions"
        )
        raise InvalidInput(msg)
    for index, axis in enumerate(axes):
        axis.imshow(images[index], cmap="gray_r", interpolation="nearest")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_xlabel(captions[index], fontsize=8, color=colours[index] if colours else "#222222")
        axis.spines[:].set_visible(False)


def as_svg(figure: "Figure") -> str:
    """The figure as an inline SVG element, the same text for the same numbers."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "bayespass", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def save_png(figure: "Figure", path: Any, dpi: int = 150) -> None:
    """Write the figure as PNG.

    Args:
        figure: to write.
        path: where to.
        dpi: dots per inch.
    """
    figure.savefig(path, format="png", dpi=dpi)


def _confidence_and_right(prediction: ClassificationPrediction, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return prediction.confidence.cpu().double().numpy(), prediction.labels.cpu().numpy() == labels
