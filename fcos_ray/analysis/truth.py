"""Truth: COCO annotations (JSON) -> arrays that hold together. Knows the file format, not what a job wrote."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fcos_ray import storage
from fcos_ray.errors import EvaluationError


@dataclass(frozen=True, slots=True)
class TruthImage:
    """One of `images`. What an exporter left out is None."""

    id: str
    file_name: str | None  # with "/" between folders
    width: int | None
    height: int | None


@dataclass(frozen=True, slots=True)
class Truth:
    """What is in the images, by the people who labelled them. N annotations."""

    name: str  # where it was read
    images: tuple[TruthImage, ...]  # sorted by id as COCO's evaluator sorts: ties of scores are broken in this order
    categories: tuple[str, ...]  # each once
    image: NDArray[np.int64]  # (N,) index into images
    category: NDArray[np.int64]  # (N,) index into categories
    boxes: NDArray[np.float64]  # (N, 4) x, y, width, height in pixels
    area: NDArray[np.float64]  # (N,) the annotation's own; the box's where it has none
    crowd: NDArray[np.bool_]  # (N,) detections there are neither right nor wrong


def read_truth(uri: str) -> Truth:
    """Read a COCO annotations file, local or remote.

    `ignore` counts for nothing, as in COCO's evaluator, which overwrites it with `iscrowd`.
    Raises EvaluationError when it cannot be read or does not hold together, StorageError.
    """
    coco = read_coco(uri)
    images, category_names = coco.images(), coco.categories()
    image_number = {image.id: k for k, image in enumerate(images)}
    category_number = {category_id: k for k, category_id in enumerate(category_names)}
    annotations = [
        _annotation(coco, entry, where, image_number, category_number) for where, entry in coco.entries("annotations")
    ]
    image, category, boxes, area, crowd = zip(*annotations, strict=True) if annotations else ((),) * 5
    return Truth(
        name=coco.name,
        images=images,
        categories=tuple(category_names.values()),
        image=np.array(image, np.int64),
        category=np.array(category, np.int64),
        boxes=np.array(boxes, np.float64).reshape(-1, 4),
        area=np.array(area, np.float64),
        crowd=np.array(crowd, np.bool_),
    )


def read_coco(uri: str) -> CocoFile:
    """Read a COCO annotations file, local or remote. Raises EvaluationError when it is none, StorageError."""
    name = storage.without_secrets(uri)
    try:
        data = storage.read_bytes(uri)
    except FileNotFoundError as error:
        raise EvaluationError(f"annotations {name}: there is no such file") from error
    except (storage.InvalidUri, *storage.STORE_ERRORS) as error:
        raise EvaluationError(f"annotations {name} cannot be read: {storage.describe(error)}") from error
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"annotations {name} must be COCO JSON, and this is not JSON: {error}") from error
    coco = CocoFile(name, hashlib.sha256(data).hexdigest(), content)
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in _TABLES):
        found = sorted(content) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise coco.wrong(f"must be COCO's object with the lists {', '.join(_TABLES)}, found {found}")
    return coco


@dataclass(frozen=True, slots=True)
class CocoFile:
    """What a file holds, and the checks, with the file's name for their messages. Every method raises EvaluationError."""

    name: str  # where it was read
    sha256: str  # hex, of the file
    content: Mapping[str, list[Any]]

    def images(self) -> tuple[TruthImage, ...]:
        """Sorted by id: numbers, then words."""
        images: dict[str, tuple[tuple[bool, int, str], TruthImage]] = {}
        for where, entry in self.entries("images"):
            image_id, name = self.id(entry, "id", where), entry.get("file_name")
            if image_id in images:
                raise self.wrong(f"{where}: a second image has the id {image_id}")
            if name is not None and (not isinstance(name, str) or not name):
                raise self.wrong(f"{where}: file_name must be a string, got {reprlib.repr(name)}")
            name = name.replace("\\", "/").removeprefix("./") if name else None
            sides = [self._side(entry, side, where) for side in ("width", "height")]
            number = entry["id"] if isinstance(entry["id"], int) else 0
            order = (isinstance(entry["id"], str), number, image_id)
            images[image_id] = (order, TruthImage(image_id, name, *sides))
        return tuple(image for _, image in sorted(images.values(), key=lambda pair: pair[0]))

    def categories(self) -> dict[str, str]:
        """id -> name, in the file's order."""
        categories: dict[str, str] = {}
        names: set[str] = set()
        for where, entry in self.entries("categories"):
            category_id, name = self.id(entry, "id", where), entry.get("name")
            if not isinstance(name, str) or not name:
                raise self.wrong(f"{where}: name must be a string, got {reprlib.repr(name)}")
            if category_id in categories or name in names:
                raise self.wrong(f"{where}: a second category has the id {category_id} or the name {name!r}")
            categories[category_id] = name
            names.add(name)
        if not categories:
            raise self.wrong("must have categories, the list is empty")
        return categories

    def id(self, entry: Mapping[str, Any], key: str, where: str) -> str:
        """Ids are integers; some exporters quote them, on one side only."""
        value = entry.get(key)
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise self.wrong(f"{where}: {key} must be an integer or a string, got {reprlib.repr(value)}")
        return str(value)

    def _side(self, entry: dict[str, Any], key: str, where: str) -> int | None:
        value = entry.get(key)
        if value is not None and (not _is_finite(value) or value != int(value) or value < 0):
            raise self.wrong(f"{where}: {key} must be a number of pixels, got {reprlib.repr(value)}")
        return None if not value else int(value)  # 0: some exporters' word for unknown

    def entries(self, table: str) -> list[tuple[str, dict[str, Any]]]:
        """Each entry with the words that name its place."""
        for k, entry in enumerate(self.content[table]):
            if not isinstance(entry, dict):
                raise self.wrong(f"{table}[{k}] must be an object, got {reprlib.repr(entry)}")
        return [(f"{table}[{k}]", entry) for k, entry in enumerate(self.content[table])]

    def wrong(self, what: str) -> EvaluationError:
        return EvaluationError(f"annotations {self.name}: {what}")


def _annotation(
    coco: CocoFile, entry: dict[str, Any], where: str, images: dict[str, int], categories: dict[str, int]
) -> tuple[int, int, list[float], float, bool]:
    """Image and category (indices), box, area, crowd."""
    image_id, category_id = coco.id(entry, "image_id", where), coco.id(entry, "category_id", where)
    if image_id not in images:
        raise coco.wrong(f"{where}: image_id {image_id} is not in images")
    if category_id not in categories:
        raise coco.wrong(f"{where}: category_id {category_id} is not in categories")
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)) or min(box[2:]) < 0:
        raise coco.wrong(f"{where}: bbox must be four finite numbers [x, y, width, height], got {reprlib.repr(box)}")
    area, crowd = entry.get("area"), entry.get("iscrowd", 0)
    if area is not None and not _is_finite(area):
        raise coco.wrong(f"{where}: area must be a finite number, got {reprlib.repr(area)}")
    if crowd not in (0, 1, None):
        raise coco.wrong(f"{where}: iscrowd must be 0 or 1, got {reprlib.repr(crowd)}")
    return images[image_id], categories[category_id], box, box[2] * box[3] if area is None else area, bool(crowd)


_TABLES: Final = ("images", "annotations", "categories")
_TOO_LARGE: Final = 1e15  # pixels: beyond it float64 no longer tells neighbours apart, and JSON's integers never end


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _TOO_LARGE  # NaN is not
