"""Curves: precision against recall as a picture. Knows matplotlib, not how precision came about."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fcos_ray.errors import EvaluationError

NUM_NAMED: Final = 10  # as many colours as the eye tells apart
IOUS: Final = ("0.50", "0.75")


@dataclass(frozen=True, slots=True)
class Curves:
    """Precision of K categories at 101 recalls from 0 to 1, at two IoUs."""

    categories: tuple[str, ...]
    precision: NDArray[np.float64]  # (2, K, 101); NaN where a category has no truth


def check_picture(path: Path) -> None:
    """Raise EvaluationError when a picture cannot be made there: before anything large is read."""
    if path.suffix != ".png" or not path.parent.is_dir() or path.is_dir():
        raise EvaluationError(f"curves are written to a .png file in a folder that is there, got {path}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise EvaluationError(f"curves want the package matplotlib ({error}): pip install matplotlib") from error


def draw_curves(curves: Curves, path: Path) -> None:
    """Write a PNG of two panels, one per IoU: the mean in black, a line per category, with the average precision.

    With more than NUM_NAMED categories the best and the worst half of that number are named, the others are grey.
    Raises EvaluationError when the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: no window system, no global state
    overall = curves.precision.mean(axis=(0, 2))
    best_first = [int(k) for k in np.argsort(-overall, kind="stable") if not np.isnan(overall[k])]
    for axes, iou, precision in zip(figure.subplots(1, 2, sharey=True), IOUS, curves.precision, strict=True):
        if best_first:
            _draw_panel(axes, precision, curves.categories, best_first)
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize="small")
        axes.set(title=f"IoU {iou}", xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise EvaluationError(f"the curves cannot be written to {path}: {error}") from error


def _draw_panel(axes: Any, precision: NDArray[np.float64], categories: tuple[str, ...], best_first: list[int]) -> None:
    """Categories in one order for both panels, so that each keeps its colour."""
    recall = np.linspace(0, 1, precision.shape[1])
    named = best_first
    if len(best_first) > NUM_NAMED:
        named = best_first[: NUM_NAMED // 2] + best_first[-NUM_NAMED // 2 :]
    for k in set(best_first) - set(named):
        axes.plot(recall, precision[k], color="0.85", linewidth=0.8)
    for k in named:
        name = categories[k].replace("$", r"\$")  # matplotlib reads $…$ as a formula
        axes.plot(recall, precision[k], linewidth=1.3, label=f"{precision[k].mean():.3f} {name}")
    mean = precision[best_first].mean(axis=0)
    axes.plot(recall, mean, color="black", linewidth=2.5, label=f"{mean.mean():.3f} mean")
