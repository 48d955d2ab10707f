"""Load: rows of a plan -> tables of pixels. Fetch, decode, shrink; an image that fails becomes an error row. Knows no Ray."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fcos_ray.errors import DetectError, FetchError, ImageError
from fcos_ray.inputs.decode import probe
from fcos_ray.inputs.fetch import FetchPolicy, fetch_many
from fcos_ray.inputs.guard import GuardedDecoder
from fcos_ray.inputs.shrink import shrink_into, shrink_to, use_one_thread
from fcos_ray.outputs.schema import LOADED_SCHEMA
from fcos_ray.sizes import Shape, padded_shape, resized_shape
from fcos_ray.types import Content, Image

# Pixels per table. Ray cuts and merges blocks at 128 MiB; half of it keeps two in hand cheap.
_LOADED_BYTES: Final = 64 * 2**20
_WAITING_BYTES: Final = 256 * 2**20  # of files that wait for their order in one load task
# A task hands on what it has after so long: one of a thousand images that time out would else be taken for a stall
_HAND_ON_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """What the load stage needs."""

    fetch: FetchPolicy
    max_pixels: int
    decode_deadline_seconds: float
    decode_memory_bytes: int
    min_size: int
    max_size: int
    exact_resize: bool
    fast_decode: bool = False
    micro_batch: int = 1  # images of one shape that the detector takes at once, at most
    decoder: str = "fcos_ray.inputs.decode:decode"  # module:function


def load_tables(rows: pa.Table, settings: LoadSettings) -> Iterator[pa.Table]:
    """Rows of (shard, row, uri, refused, deleted) -> tables of LOADED_SCHEMA, at most _LOADED_BYTES of pixels each."""
    use_one_thread()
    loaded = _Loaded(settings.micro_batch)
    for row in _loaded_rows(rows.to_pylist(), settings, loaded):
        loaded.add(row)
        yield from loaded.full()
    yield from loaded.rest()


def failure(error: ImageError) -> dict[str, Any]:
    """What an error row says of its error."""
    return {"error_stage": error.stage, "error_code": error.code, "error_message": error.message[:1000]}


class _Loaded:
    """Loaded rows on their way into tables whose pixels lie in one buffer each.

    What is copied of an image's pixels between the decoder and the device: the decoder's last step writes them into memory
    shared with this process (inputs/guard.py); shrinking, or a plain copy, writes them into the table's buffer; Ray copies
    that into its object store, once per node; the detector reads them there and converts them to floats.
    """

    def __init__(self, micro_batch: int = 1) -> None:
        self._tables: list[pa.Table] = []
        self._micro_batch = micro_batch
        self._alike = 0  # images of the last one's padded shape, in this table and in a row
        self._last: Shape | None = None
        self._begin(_LOADED_BYTES)

    def _begin(self, num_bytes: int) -> None:
        self._buffer = np.empty(num_bytes, np.uint8)  # pages that nothing is written to take no memory
        self._ends = [0]
        self._rows: list[dict[str, Any]] = []
        self._valid: list[bool] = []
        self._used = 0
        self._began = time.monotonic()

    def hold(self, shape: Shape, padded: Shape | None = None) -> NDArray[np.uint8]:
        """Where the (height, width, 3) pixels of the next row go; another table begins where they do not fit.

        Also where the micro-batch of `padded` images that begins here would be torn by the table's end.
        """
        self._alike = self._alike + 1 if padded == self._last else 0
        self._last = padded
        wanted = num_bytes = shape[0] * shape[1] * 3
        if self._alike % self._micro_batch == 0:
            wanted = max(wanted, min(self._micro_batch * num_bytes, len(self._buffer)))
        if self._used + wanted > len(self._buffer):
            self._cut()
            self._begin(max(num_bytes, _LOADED_BYTES))
            self._alike = 0
        held = self._buffer[self._used : self._used + num_bytes].reshape(*shape, 3)
        self._used += num_bytes
        return held

    def add(self, row: dict[str, Any]) -> None:
        """The next row; with pixels if any were held since the one before."""
        self._rows.append(row)
        self._valid.append(self._used > self._ends[-1])
        self._ends.append(self._used)

    def full(self) -> Iterator[pa.Table]:
        """The tables that are full, and what has waited for long."""
        if self._rows and time.monotonic() - self._began > _HAND_ON_SECONDS:
            self._cut()
            self._begin(_LOADED_BYTES)
            self._alike = 0
        tables, self._tables = self._tables, []
        yield from tables

    def rest(self) -> Iterator[pa.Table]:
        """All that is left."""
        self._cut()
        yield from self.full()

    def _cut(self) -> None:
        if not self._rows:
            return
        buffers = [
            pa.array(self._valid, pa.bool_()).buffers()[1],
            pa.array(self._ends, pa.int64()).buffers()[1],
            pa.py_buffer(self._buffer[: self._used]),
        ]
        pixels = pa.Array.from_buffers(pa.large_binary(), len(self._rows), buffers)
        place = LOADED_SCHEMA.get_field_index("pixels")
        table = pa.Table.from_pylist(self._rows, LOADED_SCHEMA.remove(place))
        self._tables.append(table.add_column(place, LOADED_SCHEMA.field(place), pixels))


def _loaded_rows(rows: Sequence[dict[str, Any]], settings: LoadSettings, loaded: _Loaded) -> Iterator[dict[str, Any]]:
    """Rows of LOADED_SCHEMA without pixels, which `loaded` holds."""
    wanted = []
    for row in rows:
        if row["deleted"]:  # nothing to look at: what comes out says that the image is gone
            yield _key(row)
        elif row["refused"] is None:
            wanted.append(row)
        else:
            yield _key(row) | failure(FetchError("uri_refused", row["refused"]))
    fetched_ones = fetch_many([row["uri"] for row in wanted], settings.fetch)
    if settings.micro_batch > 1:
        fetched_ones = _by_shape(fetched_ones, settings)
    started = time.perf_counter()
    for index, content in fetched_ones:
        # Fetches overlap, so what counts is how long this task waited for the next one.
        fetched = _key(wanted[index]) | {"fetch_seconds": time.perf_counter() - started}
        if isinstance(content, Content):
            yield fetched | _described(content) | _decoded(content.data, settings, loaded)
        else:
            yield fetched | failure(content)
        started = time.perf_counter()


def _by_shape(
    fetched: Iterator[tuple[int, Content | FetchError]], settings: LoadSettings
) -> Iterator[tuple[int, Content | FetchError]]:
    """The same in the order of their padded shapes, as their headers say, so that micro-batches fill.

    Files wait for one another, at most _WAITING_BYTES of them (pixels would be thirty times as large), and not for longer
    than _HAND_ON_SECONDS.
    """
    waiting: list[tuple[Shape, int, Content | FetchError]] = []
    num_bytes, began = 0, time.monotonic()
    for index, content in fetched:
        num_bytes += len(content.data) if isinstance(content, Content) else 0
        waiting.append((_padded(content, settings), index, content))
        if num_bytes > _WAITING_BYTES or time.monotonic() - began > _HAND_ON_SECONDS:
            yield from _ordered(waiting)
            waiting, num_bytes, began = [], 0, time.monotonic()
    yield from _ordered(waiting)


def _ordered(waiting: list[tuple[Shape, int, Content | FetchError]]) -> Iterator[tuple[int, Content | FetchError]]:
    for _, index, content in sorted(waiting, key=lambda entry: entry[:2]):
        yield index, content


def _padded(content: Content | FetchError, settings: LoadSettings) -> Shape:
    """(0, 0) for what has none, or only tells when it is decoded."""
    size = probe(content.data) if isinstance(content, Content) else None
    if size is None:
        return 0, 0
    with suppress(DetectError):
        return padded_shape(size.height, size.width, min_size=settings.min_size, max_size=settings.max_size)
    return 0, 0


def _decoded(data: bytes, settings: LoadSettings, loaded: _Loaded) -> dict[str, Any]:
    started = time.perf_counter()

    def use(image: Image) -> NDArray[np.uint8]:
        padded = padded_shape(image.height, image.width, min_size=settings.min_size, max_size=settings.max_size)
        held = loaded.hold(_loaded_shape(image, settings), padded)
        if held.shape == image.pixels.shape:
            np.copyto(held, image.pixels)
        else:
            shrink_into(image.pixels, held)
        return held

    try:
        image = _kept_decoder(settings).decode(data, use=use)
    except ImageError as error:
        return failure(error) | {"decode_seconds": time.perf_counter() - started}
    return {
        "width": image.width,
        "height": image.height,
        "orientation": image.orientation,
        "pixel_height": image.pixels.shape[0],
        "pixel_width": image.pixels.shape[1],
        "decode_seconds": time.perf_counter() - started,
    }


def _loaded_shape(image: Image, settings: LoadSettings) -> Shape:
    """(height, width) of the pixels that are handed on: the model's where torchvision would shrink them."""
    height, width = image.pixels.shape[:2]
    if settings.exact_resize:
        return height, width
    shape = resized_shape(image.height, image.width, min_size=settings.min_size, max_size=settings.max_size)
    return (height, width) if shape[0] >= height else shape


def shrunk(image: Image, settings: LoadSettings) -> NDArray[np.uint8]:
    """The pixels that are handed on, in memory of their own where they are smaller."""
    shape = _loaded_shape(image, settings)
    return image.pixels if shape == image.pixels.shape[:2] else shrink_to(image.pixels, shape)


def decoder(settings: LoadSettings) -> GuardedDecoder:
    """A decoder as the settings say."""
    return GuardedDecoder(
        max_pixels=settings.max_pixels,
        deadline_seconds=settings.decode_deadline_seconds,
        memory_bytes=settings.decode_memory_bytes,
        model_size=(settings.min_size, settings.max_size) if settings.fast_decode else None,
        decoder=settings.decoder,
    )


# One child per load worker process, kept between its tasks; it ends with the worker.
_kept_decoder = functools.lru_cache(maxsize=1)(decoder)


def _key(row: dict[str, Any]) -> dict[str, Any]:
    return {"shard": row["shard"], "row": row["row"]}


def _described(content: Content) -> dict[str, Any]:
    return {
        "content_bytes": len(content.data),
        "content_etag": content.etag,
        "content_last_modified": content.last_modified,
        "content_sha256": content.sha256,
        "attempts": content.attempts,
    }
