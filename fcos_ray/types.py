"""The small frozen things that cross rooms. Knows numpy and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Content:
    """The bytes behind a uri, and what identifies them."""

    data: bytes
    etag: str | None  # as the store spells it, without quotes; None on a local disk
    last_modified: datetime | None  # UTC
    sha256: str  # hex
    attempts: int = 1  # how many it took


@dataclass(frozen=True, slots=True)
class Image:
    """A decoded image as seen: EXIF orientation applied, RGB.

    `pixels` is (H, W, 3) uint8, C-contiguous. `height` and `width` are those of the image as seen; `pixels` is smaller
    when the image was already shrunk to the model's size.
    """

    pixels: NDArray[np.uint8]
    height: int
    width: int
    orientation: int = 1  # the EXIF value that was applied, 1 if none


@dataclass(frozen=True, slots=True)
class Detections:
    """What the model found in one image, scores descending."""

    boxes: NDArray[np.float32]  # (N, 4) xyxy, pixels of the image as seen
    labels: NDArray[np.int64]  # (N,)
    scores: NDArray[np.float32]  # (N,)
