"""Null: a detector without a model, which shows what all the rest can do. Imports no torch, so that actors start fast."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fcos_ray.errors import DetectError
from fcos_ray.model.batches import micro_batches
from fcos_ray.sizes import padded_shape
from fcos_ray.types import Detections, Image


class NullDetector:
    """Finds nothing, in no time; counts how full its micro-batches would be."""

    def __init__(self, *, min_size: int, max_size: int, max_micro_batch: int) -> None:
        self._size = {"min_size": min_size, "max_size": max_size}
        self._max_images = max_micro_batch

    def detect(self, images: Sequence[Image]) -> list[Detections | DetectError]:
        """One box each, so that it is kept; its score is the image's share of its micro-batch."""
        shapes = [padded_shape(image.height, image.width, **self._size) for image in images]
        share = np.zeros(len(images), np.float32)
        for batch in micro_batches(shapes, max_images=self._max_images):
            share[batch] = 1 / len(batch)
        box, label = np.array([[0, 0, 1, 1]], np.float32), np.ones(1, np.int64)
        return [Detections(box, label, share[index : index + 1]) for index in range(len(images))]


def mean_fill(shares: Sequence[float], *, max_micro_batch: int) -> float:
    """Mean size of the micro-batches as a share of the cap, from each image's share of its own."""
    return len(shares) / sum(shares) / max_micro_batch
