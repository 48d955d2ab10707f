"""COCO's metric: boxes and truth -> precision and recall, by faster-coco-eval. Knows arrays, not files or rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fcos_ray.analysis.truth import Truth
from fcos_ray.errors import EvaluationError

IOUS: Final = tuple(round(0.5 + 0.05 * k, 2) for k in range(10))
AREAS: Final = ("all", "small", "medium", "large")
MOST: Final = (1, 10, 100)  # detections per image and category
RECALLS: Final = np.linspace(0, 1, 101)


@dataclass(frozen=True, slots=True)
class Boxes:
    """Detections, D of them; those of one image stand together, best first."""

    image: NDArray[np.int64]  # (D,) index into Truth.images
    category: NDArray[np.int64]  # (D,) index into Truth.categories
    boxes: NDArray[np.float64]  # (D, 4) x, y, width, height in pixels of the image as seen
    scores: NDArray[np.float64]  # (D,)


@dataclass(frozen=True, slots=True)
class Scores:
    """What COCO accumulates for K categories; -1 where a category has no truth."""

    precision: NDArray[np.float64]  # (IOUS, RECALLS, K, AREAS, MOST)
    recall: NDArray[np.float64]  # (IOUS, K, AREAS, MOST)

    def ap(self, *, iou: float | None = None, area: str = "all", category: int | None = None) -> float | None:
        """Average precision; over all IoUs and over the categories that have truth, unless one is named."""
        return _mean(self.precision[_at(IOUS, iou), :, _at(None, category), AREAS.index(area), -1])

    def ar(self, *, most: int = 100, area: str = "all") -> float | None:
        """Average recall over all IoUs, with `most` detections per image and category."""
        return _mean(self.recall[:, :, AREAS.index(area), MOST.index(most)])

    def figures(self) -> dict[str, float | None]:
        """COCO's twelve, by the names of Evaluation's fields."""
        return {
            "mean_ap": self.ap(),
            "ap50": self.ap(iou=0.5),
            "ap75": self.ap(iou=0.75),
            **{f"ap_{area}": self.ap(area=area) for area in AREAS[1:]},
            **{f"ar_{most}": self.ar(most=most) for most in MOST},
            **{f"ar_{area}": self.ar(area=area) for area in AREAS[1:]},
        }

    def curves(self) -> NDArray[np.float64]:
        """(2, K, RECALLS) precision at IoU .50 and .75; NaN where a category has no truth."""
        precision = self.precision[[IOUS.index(0.5), IOUS.index(0.75)], :, :, 0, -1].swapaxes(1, 2)
        return np.where(precision > -1, precision, np.nan)


def check_installed() -> None:
    """Raise EvaluationError when the evaluator is missing: before anything large is read."""
    try:
        import faster_coco_eval  # noqa: F401
    except ImportError as error:
        raise EvaluationError(
            f"evaluating wants the package faster-coco-eval ({error}): pip install 'faster-coco-eval>=1.8,<2'"
        ) from error


def score(truth: Truth, detections: Boxes, *, images: NDArray[np.int64]) -> Scores:
    """Evaluate detections on `images` (sorted indices into truth.images); all detections must lie there."""
    from faster_coco_eval import COCO, COCOeval_faster

    number = np.zeros(len(truth.images), np.int64)
    number[images] = np.arange(1, len(images) + 1)  # the evaluator's ids begin at 1: a 0 means unmatched to it
    there = np.isin(truth.image, images)
    sides = []
    for columns in (
        {
            "image_id": number[truth.image[there]],
            "category_id": truth.category[there] + 1,
            "bbox": truth.boxes[there],
            "area": truth.area[there],
            "iscrowd": truth.crowd[there].astype(np.int64),
        },
        {
            "image_id": number[detections.image],
            "category_id": detections.category + 1,
            "bbox": detections.boxes,
            "area": detections.boxes[:, 2] * detections.boxes[:, 3],
            "score": detections.scores,
        },
    ):
        side = COCO()
        # Not through loadRes: it copies each dict and draws a polygon of each box, which only masks need.
        side.dataset = {
            "images": [{"id": k} for k in range(1, len(images) + 1)],
            "categories": [{"id": k + 1, "name": name} for k, name in enumerate(truth.categories)],
            "annotations": _records(columns),
        }
        side.createIndex()
        sides.append(side)
    evaluator = COCOeval_faster(*sides, iouType="bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    return Scores(np.asarray(evaluator.eval["precision"]), np.asarray(evaluator.eval["recall"]))


def _records(columns: dict[str, NDArray[Any]]) -> list[dict[str, Any]]:
    """The evaluator takes one dict per box and nothing else (1.8); `tolist` makes plain numbers at C speed."""
    names = ("id", *columns)
    values = [column.tolist() for column in columns.values()]
    return [dict(zip(names, (k, *row), strict=True)) for k, row in enumerate(zip(*values, strict=True), 1)]


def _at(choices: tuple[Any, ...] | None, choice: Any) -> Any:
    """An index that picks one, or all when none is chosen."""
    if choice is None:
        return slice(None)
    return choice if choices is None else choices.index(choice)


def _mean(values: NDArray[np.float64]) -> float | None:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None
