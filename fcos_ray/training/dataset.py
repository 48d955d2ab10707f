"""Dataset: COCO-format truth and images -> batches for torchvision's FCOS. Knows files and boxes, not the model.

What cannot be learnt from is left out by rule and counted (`TruthCounts`), never met in the middle of the night:
objects with a box that is degenerate, a crowd's or of an unknown category; images that the truth lists twice or not at
all. Only what the files themselves hide is found while training: images that are missing, broken or of another size
than the truth says are skipped, counted and named in the log.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fcos_ray import storage
from fcos_ray.errors import DecodeError, ManifestError
from fcos_ray.inputs.decode import decode

_GROUP_BATCHES: Final = 32  # batches that are sorted by aspect ratio together: little padding, still a random order


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
) -> Truth:
    """Read a COCO-format file (path or uri); `images` is what its file names are relative to (default: its folder).

    Labels follow the categories in the order of their ids. Ids that are quoted on one side only still fit. Raises
    ManifestError.
    """
    data, coco = _read_json(annotations)
    named = {str(_field(c, "id", annotations)): str(_field(c, "name", annotations)) for c in coco["categories"]}
    names = tuple(named[i] for i in sorted(named, key=_numeric))
    if len(set(names)) < len(coco["categories"]):
        raise ManifestError(
            f"{annotations}: two categories have the same id or name; wanted different ones, got {names}"
        )
    labels = {i: names.index(name) + 1 for i, name in named.items()}
    listed = {str(_field(image, "id", annotations)): image for image in coco["images"]}
    if len(listed) < len(coco["images"]):
        raise ManifestError(f"{annotations}: {len(coco['images']) - len(listed)} image ids stand there twice")
    left_out: Counter[str] = Counter()
    kept: dict[str, list[tuple[list[float], int]]] = {i: [] for i in listed}
    for thing in coco["annotations"]:
        image_id = str(thing.get("image_id"))
        image, label = listed.get(image_id), labels.get(str(thing.get("category_id")))
        if image is None or label is None:
            left_out["unknown_image" if image is None else "unknown_category"] += 1
        elif thing.get("iscrowd"):
            left_out["crowds"] += 1
        elif (box := _box(thing.get("bbox"), image, min_box_side, annotations)) is None:
            left_out["degenerate"] += 1
        else:
            kept[image_id].append((box, label))
    folder = images if images is not None else storage.parent(storage.parse_uri(annotations).uri)
    examples = tuple(
        Example(
            uri=storage.join(folder, _field(image, "file_name", annotations)),
            width=int(_field(image, "width", annotations)),
            height=int(_field(image, "height", annotations)),
            boxes=np.array([box for box, _ in kept[i]], np.float32).reshape(-1, 4),
            labels=np.array([label for _, label in kept[i]], np.int64),
        )
        for i, image in listed.items()
        if kept[i] or empty_images == "keep"
    )
    counts = TruthCounts(
        images=len(examples),
        objects=sum(len(things) for things in kept.values()),
        empty_images=sum(not things for things in kept.values()),
        **left_out,
    )
    if not counts.objects:
        raise ManifestError(f"{annotations} holds no box to learn from: {counts}")
    return Truth(names, examples, counts, hashlib.sha256(data).hexdigest())


def _read_json(uri: str) -> tuple[bytes, Mapping[str, Any]]:
    try:
        data = storage.read_bytes(uri)
        coco = json.loads(data)
    except (FileNotFoundError, PermissionError, IsADirectoryError, storage.InvalidUri) as error:
        raise ManifestError(f"annotations {uri} cannot be read: {storage.describe(error)}") from error
    except ValueError as error:
        raise ManifestError(f"annotations {uri} are not JSON: {error}") from error
    wanted = ("images", "annotations", "categories")
    missing = [name for name in wanted if not isinstance(coco, dict) or not isinstance(coco.get(name), list)]
    if missing:
        raise ManifestError(f"annotations {uri}: wanted a COCO-format object with the lists {wanted}, lacks {missing}")
    return data, coco


def _numeric(identity: str) -> tuple[bool, int, str]:
    """Ids in their order as numbers; those that are none after them."""
    number = int(identity) if identity.isdecimal() else 0
    return not identity.isdecimal(), number, identity


def _field(thing: Mapping[str, Any], name: str, uri: str) -> Any:
    if name not in thing:
        raise ManifestError(f"annotations {uri}: wanted {name!r} in {json.dumps(thing)[:200]}")
    return thing[name]


def _box(bbox: object, image: Mapping[str, Any], min_side: float, uri: str) -> list[float] | None:
    """xyxy within the image; None when too little of it is left, or it was none."""
    try:
        x, y, width, height = (float(value) for value in bbox)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        return None
    if not all(math.isfinite(value) for value in (x, y, width, height)):
        return None
    right, bottom = _field(image, "width", uri), _field(image, "height", uri)
    box = [max(x, 0.0), max(y, 0.0), min(x + width, right), min(y + height, bottom)]
    return box if min(box[2] - box[0], box[3] - box[1]) >= max(min_side, 1e-3) else None


Target = dict[str, Tensor]  # boxes (N, 4) float32 xyxy, labels (N,) int64


@dataclass(frozen=True, slots=True)
class Batch:
    """Images for one step, as torchvision's model takes them, and the images that could not be used."""

    images: list[Tensor]  # uint8 (3, H, W)
    targets: list[Target]
    skipped: tuple[str, ...]  # uri and reason


class Batches:
    """Batch k of a training, for any k: a function of the seed and k alone, so a training goes on where it stopped."""

    def __init__(self, examples: Sequence[Example], *, batch_size: int, horizontal_flip: float, seed: int) -> None:
        self._examples = examples
        self._batch_size = batch_size
        self._horizontal_flip = horizontal_flip
        self._seed = seed
        self._order = lru_cache(maxsize=2)(self._epoch_order)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._examples) // self._batch_size)

    def ahead(self, steps: Sequence[int], *, num_threads: int) -> Iterator[Batch]:
        """The batches of these steps in order, read and decoded ahead in threads (Pillow lets go of the GIL)."""
        with ThreadPoolExecutor(num_threads) as pool:
            pending: deque[Future[Batch]] = deque()
            try:
                for step in steps:
                    pending.append(pool.submit(self.batch, step))
                    if len(pending) > 2 * num_threads:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:  # whoever stops listening does not wait for what was read ahead
                pool.shutdown(wait=False, cancel_futures=True)

    def batch(self, step: int) -> Batch:
        """The batch of one step. Raises StorageError."""
        epoch, place = divmod(step, self.steps_per_epoch)
        loaded = [self._load(int(index), epoch) for index in self._order(epoch)[place]]
        usable = [found for found in loaded if not isinstance(found, str)]
        return Batch(
            images=[image for image, _ in usable],
            targets=[target for _, target in usable],
            skipped=tuple(found for found in loaded if isinstance(found, str)),
        )

    def _epoch_order(self, epoch: int) -> list[NDArray[np.int64]]:
        """All images once, in random batches of like aspect ratio."""
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(len(self._examples))
        ratios = np.array([example.width / example.height for example in self._examples])
        group = self._batch_size * _GROUP_BATCHES
        batches = []
        for start in range(0, len(order), group):
            part = order[start : start + group]
            part = part[np.argsort(ratios[part], kind="stable")]
            batches += [part[i : i + self._batch_size] for i in range(0, len(part), self._batch_size)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def _load(self, index: int, epoch: int) -> tuple[Tensor, Target] | str:
        example = self._examples[index]
        try:
            image = decode(storage.read_bytes(example.uri))
        except (DecodeError, FileNotFoundError, PermissionError, IsADirectoryError) as error:
            return f"{example.uri}: {storage.describe(error)}"
        if (image.width, image.height) != (example.width, example.height):
            return (
                f"{example.uri}: the truth says {example.width}×{example.height}, "
                f"the image as seen is {image.width}×{image.height}"
            )
        pixels, boxes = torch.from_numpy(image.pixels).permute(2, 0, 1), torch.from_numpy(example.boxes)
        if np.random.default_rng([self._seed, epoch, index]).random() < self._horizontal_flip:
            pixels = pixels.flip(2)
            boxes = torch.stack([image.width - boxes[:, 2], boxes[:, 1], image.width - boxes[:, 0], boxes[:, 3]], dim=1)
        return pixels.contiguous(), {"boxes": boxes, "labels": torch.from_numpy(example.labels)}
