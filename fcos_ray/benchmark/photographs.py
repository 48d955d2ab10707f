"""Photographs: drawn JPEGs that cost what photographs cost to fetch and decode. Knows Pillow and a store, no jobs."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
from PIL.Image import Resampling

from fcos_ray import storage
from fcos_ray.errors import ConfigError

_DISTINCT: Final = 32  # drawings; further files are copies of them
_MAX_SIDE: Final = 16_384
_MAX_RATIO: Final = 100  # of the sides: FCOS can do nothing with a thread
MANIFEST: Final = "manifest.parquet"
# What cameras, phones, screens and hands that crop make: (width, height), more of them wide than high.
_SIDES: Final = (500, 640, 1024, 1600, 2048)
_WIDE: Final = (0.5625, 0.62, 0.6667, 0.7, 0.75, 0.8, 1.0)
_HIGH: Final = (0.5625, 0.6667, 0.75, 0.8)
_MIXED: Final = tuple((side, round(side * ratio)) for side in _SIDES for ratio in _WIDE) + tuple(
    (round(side * ratio), side) for side in _SIDES for ratio in _HIGH
)


@dataclass(frozen=True, slots=True)
class Photographs:
    """Drawn images in a folder, and their manifest."""

    manifest: str
    uris: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]  # (width, height)
    bytes_per_image: float


def parse_size(text: str) -> tuple[tuple[int, int], ...]:
    """`640x480`, or `mixed`: the sizes to draw, which take turns. Raises ConfigError."""
    if text == "mixed":
        return _MIXED
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    sides = sorted(int(side) for side in found.groups()) if found is not None else [0, 0]
    if found is None or not 1 <= sides[0] <= sides[1] <= min(_MAX_SIDE, _MAX_RATIO * sides[0]):
        raise ConfigError(
            f"--image-size wanted <width>x<height> up to {_MAX_SIDE}, one at most {_MAX_RATIO} times the other, such as "
            f"640x480, or mixed, got {text!r}"
        )
    return ((int(found[1]), int(found[2])),)


def draw_jpeg(width: int, height: int, *, seed: int) -> bytes:
    """Soft shapes with grain, at quality 90: 110 kB at 640×480, 4 MB at 4000×3000. Same seed, same bytes."""
    rng = np.random.default_rng([seed, width, height])
    coarse = rng.integers(0, 256, (max(2, height // 32), max(2, width // 32), 3), dtype=np.uint8)
    soft = np.asarray(PIL.Image.fromarray(coarse).resize((width, height), Resampling.BICUBIC), dtype=np.int16)
    grain = rng.integers(-12, 13, (height, width, 1), dtype=np.int16)
    buffer = io.BytesIO()
    PIL.Image.fromarray((soft + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_photographs(
    folder: str, sizes: Sequence[tuple[int, int]], *, num_images: int, with_sizes: bool = True
) -> Photographs:
    """Draw images and write them with a manifest, which has width and height unless told otherwise.

    `folder` is new or empty: a local folder or an s3:// prefix. Raises ConfigError, StorageError.
    """
    if next(iter(storage.list_files(folder)), None) is not None:
        raise ConfigError(f"--folder {folder} is not empty; wanted a new one, which the benchmark fills")
    drawn = [(size, draw_jpeg(*size, seed=k)) for k in range(max(1, _DISTINCT // len(sizes))) for size in sizes]
    order = np.random.default_rng(0).permutation(num_images)  # else equal sizes would come in turns
    names = [f"{number:07d}.jpg" for number in range(num_images)]
    uris = [storage.join(folder, "images", name) for name in names]
    chosen = [drawn[k % len(drawn)] for k in order.tolist()]
    for uri, (_, data) in zip(uris, chosen, strict=True):
        storage.replace(uri, data)
    columns = {"image_id": names, "uri": uris}
    if with_sizes:
        columns |= {"width": [size[0] for size, _ in chosen], "height": [size[1] for size, _ in chosen]}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    manifest = storage.join(folder, MANIFEST)
    storage.replace(manifest, sink.getvalue().to_pybytes())
    num_bytes = sum(len(data) for _, data in chosen)
    return Photographs(manifest, tuple(uris), tuple(size for size, _ in chosen), num_bytes / num_images)
