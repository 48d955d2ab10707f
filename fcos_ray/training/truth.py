"""Truth: COCO-format annotations -> examples to learn from. Knows the file's boxes, not the images and not the model.

What cannot be learnt from is left out by rule and counted (`TruthCounts`), never met in the middle of the night:
objects with a box that is degenerate, a crowd's, of an unknown category or of an image that is not listed; images
that the model's resizing would make vanish. A file that does not hold together is refused.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fcos_ray import storage
from fcos_ray.analysis.truth import CocoFile, TruthImage, read_coco
from fcos_ray.errors import DetectError, EvaluationError
from fcos_ray.sizes import resized_shape


@dataclass(frozen=True, slots=True)
class Example:
    """One image of the truth."""

    uri: str
    width: int  # pixels of the image as seen, as the truth says
    height: int
    boxes: NDArray[np.float32]  # (N, 4) xyxy, within the image
    labels: NDArray[np.int64]  # (N,), from 1


@dataclass(frozen=True, slots=True)
class TruthCounts:
    """What the truth held, and what was left out of it."""

    images: int
    objects: int  # to learn from
    empty_images: int  # without an object; kept or dropped as asked
    crowds: int = 0  # objects left out: a box around many
    degenerate: int = 0  # objects left out: no box of the wanted size lies in the image
    unknown_category: int = 0  # objects left out
    unknown_image: int = 0  # objects left out: of an image that is not listed
    too_thin: int = 0  # images left out with their objects: a side would be resized to zero pixels


@dataclass(frozen=True, slots=True)
class Truth:
    """What there is to learn."""

    categories: tuple[str, ...]  # without the background; label = place + 1
    examples: tuple[Example, ...]
    counts: TruthCounts
    sha256: str  # hex, of the annotations file

    def relabelled(self, categories: Sequence[str]) -> Truth:
        """The same truth with the labels of other categories, which hold all of its own by name."""
        label = np.array([0, *(categories.index(name) + 1 for name in self.categories)])
        examples = tuple(replace(example, labels=label[example.labels]) for example in self.examples)
        return replace(self, categories=tuple(categories), examples=examples)


def read_truth(
    annotations: str,
    *,
    images: str | None = None,
    min_box_side: float = 1.0,
    empty_images: str = "keep",
    smallest_input: Mapping[str, int] | None = None,
) -> Truth:
    """Read a COCO-format file (path or uri); `images` is what its file names are relative to (default: its folder).

    Labels follow the categories in the order of their ids. Ids that are quoted on one side only still fit.
    `smallest_input`: min_size and max_size that an image must survive; None keeps the thinnest.
    Raises EvaluationError when the file cannot be read or does not hold together, StorageError.
    """
    coco = read_coco(annotations)
    named = coco.categories()
    names = tuple(named[i] for i in sorted(named, key=_numeric))
    labels = {i: names.index(name) + 1 for i, name in named.items()}
    listed = {image.id: (image, *_sides(coco, image)) for image in coco.images()}
    left_out: Counter[str] = Counter()
    thin = {i for i, (_, width, height) in listed.items() if _is_too_thin(width, height, smallest_input)}
    kept: dict[str, list[tuple[list[float], int]]] = {i: [] for i in listed if i not in thin}
    for where, entry in coco.entries("annotations"):
        image_id, category_id = coco.id(entry, "image_id", where), coco.id(entry, "category_id", where)
        if image_id in thin:
            continue
        if image_id not in listed or category_id not in labels:
            left_out["unknown_image" if image_id not in listed else "unknown_category"] += 1
        elif entry.get("iscrowd"):
            left_out["crowds"] += 1
        elif (box := _box(entry.get("bbox"), *listed[image_id][1:], min_box_side)) is None:
            left_out["degenerate"] += 1
        else:
            kept[image_id].append((box, labels[category_id]))
    folder = images if images is not None else storage.parent(annotations)
    examples = tuple(
        _example(image_uri(coco.name, listed[i][0], folder), *listed[i][1:], things)
        for i, things in kept.items()
        if things or empty_images == "keep"
    )
    counts = TruthCounts(
        images=len(examples),
        objects=sum(len(things) for things in kept.values()),
        empty_images=sum(not things for things in kept.values()),
        too_thin=len(thin),
        **left_out,
    )
    if not counts.objects:
        raise coco.wrong(f"holds no box to learn from: {counts}")
    return Truth(names, examples, counts, coco.sha256)


def image_uri(annotations: str, image: TruthImage, folder: str) -> str:
    """Where the image lies. Raises EvaluationError when the truth does not name it."""
    if image.file_name is None:
        raise EvaluationError(f"annotations {annotations}: image {image.id}: file_name must be a string, got none")
    return storage.join(folder, image.file_name)


def _example(uri: str, width: int, height: int, things: list[tuple[list[float], int]]) -> Example:
    boxes = np.array([box for box, _ in things], np.float32).reshape(-1, 4)
    return Example(uri, width, height, boxes, np.array([label for _, label in things], np.int64))


def _sides(coco: CocoFile, image: TruthImage) -> tuple[int, int]:
    if image.width is None or image.height is None:
        got = f"{image.width or 'none'}×{image.height or 'none'}"
        raise coco.wrong(f"image {image.id}: width and height must be numbers of pixels from 1, got {got}")
    return image.width, image.height


def _is_too_thin(width: int, height: int, smallest_input: Mapping[str, int] | None) -> bool:
    if smallest_input is None:
        return False
    try:
        resized_shape(height, width, **smallest_input)
    except DetectError:
        return True
    return False


def _numeric(identity: str) -> tuple[bool, int, str]:
    """Ids in their order as numbers; those that are none after them."""
    number = int(identity) if identity.isdecimal() else 0
    return not identity.isdecimal(), number, identity


def _box(bbox: object, width: int, height: int, min_side: float) -> list[float] | None:
    """xyxy within the image; None when too little of it is left, or it was none."""
    try:
        x, y, box_width, box_height = (float(value) for value in bbox)  # type: ignore[attr-defined]
    except (TypeError, ValueError, OverflowError):
        return None
    if not all(math.isfinite(value) for value in (x, y, box_width, box_height)):
        return None
    box = [max(x, 0.0), max(y, 0.0), min(x + box_width, float(width)), min(y + box_height, float(height))]
    return box if min(box[2] - box[0], box[3] - box[1]) >= max(min_side, 1e-3) else None
