"""Evaluate: COCO mAP of what a job wrote against COCO-format truth. Knows boxes and names, neither pixels nor models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fcos_ray.analysis.coco_metric import Boxes, Scores, check_installed, score
from fcos_ray.analysis.curves import Curves
from fcos_ray.analysis.dataset import open_dataset
from fcos_ray.analysis.matching import Key, Match, find_candidates, match_rows
from fcos_ray.analysis.truth import Truth, read_truth
from fcos_ray.errors import EvaluationError

COLUMNS: Final = ("image_id", "uri", "status", "width", "height", "boxes", "label_names", "scores")


@dataclass(frozen=True, slots=True)
class ClassFigures:
    """One category of the truth."""

    name: str
    ap: float | None  # over IoU .50 to .95; None without truth
    ap50: float | None
    num_truth: int  # boxes in the evaluated images, crowds left out
    num_detections: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """COCO's twelve figures, as fractions, and what they were taken from. None: undefined, there is no such truth."""

    mean_ap: float | None  # AP@[.50:.95]: what papers call box mAP
    ap50: float | None
    ap75: float | None
    ap_small: float | None  # area below 32² pixels
    ap_medium: float | None  # from 32² to 96²
    ap_large: float | None
    ar_1: float | None  # with at most 1, 10, 100 detections per image and category
    ar_10: float | None
    ar_100: float | None
    ar_small: float | None
    ar_medium: float | None
    ar_large: float | None
    classes: tuple[ClassFigures, ...]  # in the truth's order
    matched_by: Key
    num_images: int  # evaluated
    num_error_rows: int  # of them: nothing was detected there
    num_images_without_row: int
    all_images: bool  # whether those count, as images without detections
    num_rows_without_truth: int  # left out
    num_size_mismatches: int
    size_mismatch: str | None  # the first, in words
    unknown_names: dict[str, int]  # detections by names that are no category of the truth
    unknown_categories: tuple[str, ...]  # of the truth, which the model does not have
    curves: Curves  # at IoU .50 and .75

    def as_dict(self) -> dict[str, Any]:
        """Everything but the curves, ready for JSON."""
        figures = asdict(self)
        del figures["curves"]
        return figures

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the figures should know, a line each."""
        notes: list[str] = []
        if self.num_images_without_row and self.all_images:
            notes.append(
                f"images of the truth without a row, counting as without detections: {self.num_images_without_row}"
            )
        elif self.num_images_without_row:
            total = self.num_images + self.num_images_without_row
            notes.append(f"evaluated the {self.num_images} of {total} images of the truth that have a row")
        if self.num_error_rows:
            notes.append(f"error rows, counting as images without detections: {self.num_error_rows}")
        if self.num_size_mismatches:
            notes.append(f"images of another size in the truth: {self.num_size_mismatches}; {self.size_mismatch}")
        if self.unknown_names:
            names = ", ".join(f"{name} ({count})" for name, count in self.unknown_names.items())
            notes.append(f"detections left out, by names that are no category of the truth: {names}")
        if self.unknown_categories:
            names = ", ".join(self.unknown_categories)
            notes.append(f"categories of the truth that the model does not have, missed where they occur: {names}")
        return tuple(notes)


def evaluate(
    rows: str | pa.Table | pa.RecordBatchReader,
    annotations: str,
    *,
    match: Match = "auto",
    all_images: bool = False,
    model_categories: Sequence[str] | None = None,
) -> Evaluation:
    """Compare detections with truth by COCO's rules, as pycocotools does.

    `rows`: an output (folder or prefix: its newest row per image), or its rows with COLUMNS, one per image.
    `annotations`: a COCO JSON file, local or remote; boxes in pixels of the image as seen, like ours.
    `match`: rows show images of equal id, or whose file_name ends their uri (see `match_rows`).
    `all_images`: images of the truth without a row count as without detections; else they are left out, as when a
    subset was labelled. Error rows always count as without detections. Rows without truth are left out.
    `model_categories`: what the model may answer; an output says so itself.

    Detections and categories are joined by name. The mean covers the truth's categories that occur, whether or not the
    model has them. At most 100 detections count per image and category. Holds what is evaluated in memory.
    Raises EvaluationError, also when faster-coco-eval is not installed; OutputError, StorageError.
    """
    check_installed()
    truth = read_truth(annotations)
    if isinstance(rows, str):
        dataset = open_dataset(rows)
        model_categories = dataset.categories
        batches: Iterable[pa.RecordBatch] = dataset.latest(columns=COLUMNS).to_batches()
    else:
        batches = rows.to_batches() if isinstance(rows, pa.Table) else rows
    candidates = find_candidates(batches, truth, columns=COLUMNS)
    pairs = match_rows(candidates, truth, match=match)
    paired = np.array(sorted(pairs.row_of_image), np.int64)
    table = candidates.table.take(pa.array([pairs.row_of_image[k] for k in paired.tolist()], pa.int64()))
    detections, unknown_names = _detections(table, paired, truth)
    unknown_categories = _unknown_categories(truth, unknown_names, len(detections.image), model_categories)
    images = np.arange(len(truth.images)) if all_images else paired
    scores = score(truth, detections, images=images)
    mismatches = _size_mismatches(table, paired, truth)
    return Evaluation(
        **scores.figures(),
        classes=_classes(truth, detections, scores, images),
        matched_by=pairs.key,
        num_images=len(images),
        num_error_rows=pc.sum(pc.not_equal(table["status"], "ok")).as_py(),
        num_images_without_row=len(truth.images) - len(paired),
        all_images=all_images,
        num_rows_without_truth=candidates.num_rows - len(paired),
        num_size_mismatches=len(mismatches),
        size_mismatch=mismatches[0] if mismatches else None,
        unknown_names=unknown_names,
        unknown_categories=unknown_categories,
        curves=Curves(truth.categories, scores.curves()),
    )


def _detections(table: pa.Table, images: NDArray[np.int64], truth: Truth) -> tuple[Boxes, dict[str, int]]:
    """Every box of the rows that show `images`, by category of the truth; and how many bear other names."""
    found = pc.is_valid(table["boxes"]).to_numpy()
    table, images = table.filter(pa.array(found)), images[found]
    counts = [pc.list_value_length(table[name]).to_numpy() for name in ("boxes", "label_names", "scores")]
    if not (counts[0] == counts[1]).all() or not (counts[0] == counts[2]).all():
        raise EvaluationError("boxes, label_names and scores of each row must be of equal length, they are not")
    names = pc.list_flatten(table["label_names"]).combine_chunks().dictionary_encode()
    number = {name: k for k, name in enumerate(truth.categories)}
    name_of = names.dictionary.to_pylist()
    category_of = np.array([number.get(name, -1) for name in name_of], np.int64)
    category = category_of[names.indices.to_numpy()] if name_of else np.zeros(0, np.int64)
    known = category >= 0
    corners = pc.list_flatten(pc.list_flatten(table["boxes"])).to_numpy().astype(np.float64).reshape(-1, 4)
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    scores = pc.list_flatten(table["scores"]).to_numpy().astype(np.float64)
    counted = {count["values"]: count["counts"] for count in names.value_counts().to_pylist()}
    unknown = {name: count for name, count in sorted(counted.items()) if name not in number}
    image = np.repeat(images, counts[0])
    return Boxes(image[known], category[known], boxes[known], scores[known]), unknown


def _unknown_categories(
    truth: Truth, unknown_names: dict[str, int], num_known: int, model_categories: Sequence[str] | None
) -> tuple[str, ...]:
    """Categories of the truth that the model lacks. Raises EvaluationError when it has none of them."""
    model = set(model_categories or ()) if model_categories is not None else None
    unknown = tuple(name for name in truth.categories if model is not None and name not in model)
    if (unknown_names and not num_known) or len(unknown) == len(truth.categories):
        names = sorted(model - {"__background__", "N/A"} if model is not None else unknown_names)
        raise EvaluationError(
            f"the model and {truth.name} have no category name in common: the model says {_some(names)}, the "
            f"annotations {_some(truth.categories)}. Names are compared letter by letter: rename those in the annotations"
        )
    return unknown


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _size_mismatches(table: pa.Table, images: NDArray[np.int64], truth: Truth) -> list[str]:
    """Pairs whose sides differ, in words: their boxes are in different frames."""
    mismatches = []
    sides = zip(table["image_id"].to_pylist(), table["width"].to_pylist(), table["height"].to_pylist(), strict=True)
    for (image_id, *labelled), k in zip(sides, images.tolist(), strict=True):
        expected = [truth.images[k].width, truth.images[k].height]
        if None in labelled or None in expected or labelled == expected:
            continue
        turned = " (turned: the truth does not follow the EXIF orientation)" if labelled == expected[::-1] else ""
        mismatches.append(
            f"image_id {image_id} was labelled as {labelled[0]}×{labelled[1]}, the truth says {expected[0]}×{expected[1]}"
            f"{turned}, so boxes do not fit"
        )
    return mismatches


def _classes(truth: Truth, detections: Boxes, scores: Scores, images: NDArray[np.int64]) -> tuple[ClassFigures, ...]:
    num_categories = len(truth.categories)
    counted = np.isin(truth.image, images) & ~truth.crowd
    num_truth = np.bincount(truth.category[counted], minlength=num_categories)
    num_detections = np.bincount(detections.category, minlength=num_categories)
    return tuple(
        ClassFigures(
            name, scores.ap(category=k), scores.ap(category=k, iou=0.5), int(num_truth[k]), int(num_detections[k])
        )
        for k, name in enumerate(truth.categories)
    )
