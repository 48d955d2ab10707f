"""Pipeline: shard numbers -> result rows. Composes the stages on Ray Data; the only room that builds Ray datasets.

    shard numbers → read (CPU) → load (CPU): fetch, decode, shrink → detect (actor pool) → result rows

A failing image becomes an error row here, and only here; it skips the stages after it and travels in the same stream.
"""

from __future__ import annotations

import functools
import importlib
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import pyarrow as pa
import ray.data
from numpy.typing import NDArray
from ray.data._internal.logical.interfaces import LogicalPlan
from ray.data._internal.logical.operators import StreamingRepartition
from ray.data.exceptions import ExecutionTimeoutError

from fcos_ray import storage
from fcos_ray.errors import DetectError, FetchError, ImageError, StageStalled, StorageError
from fcos_ray.inputs.columns import DELETED, REFUSED
from fcos_ray.inputs.decode import probe
from fcos_ray.inputs.fetch import FetchPolicy, fetch_many
from fcos_ray.inputs.guard import GuardedDecoder
from fcos_ray.inputs.pin import PinnedFile, read_shard
from fcos_ray.layout import READ_CPUS, Layout
from fcos_ray.outputs.schema import LOADED_SCHEMA, RESULT_SCHEMA
from fcos_ray.roll import AtWork, Roll
from fcos_ray.sizes import Shape, padded_shape, resized_shape
from fcos_ray.types import Content, Detections, Image

# Pixels per table that load hands on. Ray cuts and merges blocks at 128 MiB; half of it keeps two in hand cheap.
_LOADED_BYTES: Final = 64 * 2**20
_WAITING_BYTES: Final = 256 * 2**20  # of files that wait for their order in one load task
_READ_TASKS: Final = 1000  # at most; each reads its shards one after the other
_NAMED_WORKERS: Final = 3  # and images of each, in what is said of a stall


class ImageDetector(Protocol):
    """What the detect stage calls: one answer per image, an error for an image that fails alone."""

    def detect(self, images: Sequence[Image]) -> list[Detections | DetectError]: ...


class MakeDetector(Protocol):
    """Builds a detector in its actor; picklable."""

    def __call__(self) -> ImageDetector: ...


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


@dataclass(frozen=True, slots=True)
class Stages:
    """What the stages are made of."""

    pinned_folder: str
    files: tuple[PinnedFile, ...]
    load: LoadSettings
    make_detector: MakeDetector
    layout: Layout


def result_rows(shards: Sequence[int], stages: Stages) -> Generator[pa.Table, None, None]:
    """Tables of RESULT_SCHEMA rows, in any order, as they are done; a row may come twice when Ray regenerates a block.

    Raises StageStalled when nothing moves for as long as Ray Data was told to wait, with who has which images; else
    what Ray raises when an execution ends early.
    """
    roll = Roll()
    try:
        yield from build(shards, stages, roll=roll).iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=2
        )
    except ExecutionTimeoutError as error:
        hung = roll.at_work()
        roll.end_workers(hung)
        raise StageStalled(_describe_stall(hung, stages)) from error
    finally:
        roll.close()


def build(shards: Sequence[int], stages: Stages, *, roll: Roll | None = None) -> ray.data.Dataset:
    """The dataset of result rows: read, load and detect as stages of their own. `roll`: where workers sign on."""
    layout = stages.layout
    per_task = -(-len(shards) // _READ_TASKS)
    numbers = [
        pa.table({"shard": pa.array(shards[i : i + per_task], pa.int32())}) for i in range(0, len(shards), per_task)
    ]
    read = functools.partial(_read, pinned_folder=stages.pinned_folder, files=stages.files)
    load = functools.partial(_load, settings=stages.load, roll=roll)
    readers = ray.data.TaskPoolStrategy(size=layout.num_read_tasks)
    read_rows = ray.data.from_arrow(numbers).map_batches(
        read, batch_format="pyarrow", num_cpus=READ_CPUS, compute=readers
    )
    loaded = _cut(read_rows, layout.load_rows, readers).map_batches(
        load,
        batch_format="pyarrow",
        num_cpus=layout.load_cpus,
        compute=ray.data.TaskPoolStrategy(size=layout.num_load_tasks),
    )
    # One block a call, bounded in bytes. With GPUs the public map_batches insists on a number of rows (Ray 2.60), and would
    # then wait until as many had gathered, however large their images are.
    return loaded.map_batches_internal(
        _Detect,
        batch_size=None,
        batch_format="pyarrow",
        fn_constructor_kwargs={"make_detector": stages.make_detector, "roll": roll},
        num_cpus=layout.detector_cpus,
        num_gpus=layout.detector_gpus,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=layout.num_detectors),
    )


def _describe_stall(hung: Sequence[AtWork], stages: Stages) -> str:
    """Who has which images, the longest first."""
    if not hung:
        return "nothing moved, and no load task or detector is at work: the cluster has no room for them"
    named = []
    for work in hung[:_NAMED_WORKERS]:
        images = ", ".join(_uri(stages, *row) for row in work.rows[:_NAMED_WORKERS])
        more = f" and {len(work.rows) - _NAMED_WORKERS} more" if len(work.rows) > _NAMED_WORKERS else ""
        named.append(f"{work.stage} on {work.address} (pid {work.pid}) for {work.seconds:.0f} s: {images}{more}")
    others = f"; and {len(hung) - _NAMED_WORKERS} other workers" if len(hung) > _NAMED_WORKERS else ""
    return f"nothing moved; at work are {'; '.join(named)}{others}"


def _uri(stages: Stages, shard: int, row: int) -> str:
    with suppress(*storage.STORE_ERRORS, StorageError):
        return storage.without_secrets(str(read_shard(stages.pinned_folder, stages.files, shard)["uri"][row].as_py()))
    return f"row {row} of shard {shard}"


def _cut(dataset: ray.data.Dataset, num_rows: int, readers: ray.data.TaskPoolStrategy) -> ray.data.Dataset:
    """`dataset.repartition(target_num_rows_per_block=num_rows)`, fused into the read stage before it.

    That method has no parameter for what its tasks reserve, and its default of a whole CPU is never free beside a detector
    on a one-core machine: Ray 2.60 waits for ever. With read's own share and pool it becomes a part of read.
    """
    operator = StreamingRepartition(
        target_num_rows_per_block=num_rows,
        input_dependencies=[dataset._logical_plan.dag],
        ray_remote_args={"num_cpus": READ_CPUS},
        compute=readers,
    )
    return ray.data.Dataset._from_parent(dataset, LogicalPlan(operator, dataset.context))


def _read(numbers: pa.Table, *, pinned_folder: str, files: Sequence[PinnedFile]) -> Iterator[pa.Table]:
    for shard in numbers["shard"].to_pylist():
        pinned = read_shard(pinned_folder, files, shard)
        yield pa.table(
            {
                "shard": pa.repeat(pa.scalar(shard, pa.int32()), pinned.num_rows),
                "row": pa.array(np.arange(pinned.num_rows, dtype=np.int32)),
                "uri": pinned["uri"],
                "refused": pinned[REFUSED],
                "deleted": pinned[DELETED],
            }
        )


def _load(rows: pa.Table, *, settings: LoadSettings, roll: Roll | None = None) -> Iterator[pa.Table]:
    """Rows of (shard, row, uri, refused, deleted) -> tables of LOADED_SCHEMA, at most _LOADED_BYTES of pixels each."""
    loaded = _Loaded(settings.micro_batch)
    with _working(roll, "load", rows):
        for row in _loaded_rows(rows.to_pylist(), settings, loaded):
            loaded.add(row)
            yield from loaded.full()
        yield from loaded.rest()


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

    def hold(self, pixels: NDArray[np.uint8], padded: Shape | None = None) -> NDArray[np.uint8]:
        """Copy the pixels of the next row into its table; another table begins where they do not fit.

        Also where the micro-batch of `padded` images that begins here would be torn by the table's end.
        """
        self._alike = self._alike + 1 if padded == self._last else 0
        self._last = padded
        wanted = pixels.nbytes
        if self._alike % self._micro_batch == 0:
            wanted = max(wanted, min(self._micro_batch * pixels.nbytes, len(self._buffer)))
        if self._used + wanted > len(self._buffer):
            self._cut()
            self._begin(max(pixels.nbytes, _LOADED_BYTES))
            self._alike = 0
        held = self._buffer[self._used : self._used + pixels.nbytes].reshape(pixels.shape)
        np.copyto(held, pixels)
        self._used += pixels.nbytes
        return held

    def add(self, row: dict[str, Any]) -> None:
        """The next row; with pixels if any were held since the one before."""
        self._rows.append(row)
        self._valid.append(self._used > self._ends[-1])
        self._ends.append(self._used)

    def full(self) -> Iterator[pa.Table]:
        """The tables that are full."""
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


def _working(roll: Roll | None, stage: str, rows: pa.Table) -> AbstractContextManager[None]:
    if roll is None:
        return nullcontext()
    return roll.working(stage, list(zip(rows["shard"].to_pylist(), rows["row"].to_pylist(), strict=True)))


def _loaded_rows(rows: Sequence[dict[str, Any]], settings: LoadSettings, loaded: _Loaded) -> Iterator[dict[str, Any]]:
    """Rows of LOADED_SCHEMA without pixels, which `loaded` holds."""
    wanted = []
    for row in rows:
        if row["deleted"]:  # nothing to look at: what comes out says that the image is gone
            yield _key(row)
        elif row["refused"] is None:
            wanted.append(row)
        else:
            yield _key(row) | _failure(FetchError("uri_refused", row["refused"]))
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
            yield fetched | _failure(content)
        started = time.perf_counter()


def _by_shape(
    fetched: Iterator[tuple[int, Content | FetchError]], settings: LoadSettings
) -> Iterator[tuple[int, Content | FetchError]]:
    """The same in the order of their padded shapes, as their headers say, so that micro-batches fill.

    Files wait for one another, at most _WAITING_BYTES of them: pixels would be thirty times as large.
    """
    waiting: list[tuple[Shape, int, Content | FetchError]] = []
    num_bytes = 0
    for index, content in fetched:
        num_bytes += len(content.data) if isinstance(content, Content) else 0
        waiting.append((_padded(content, settings), index, content))
        if num_bytes > _WAITING_BYTES:
            yield from _ordered(waiting)
            waiting, num_bytes = [], 0
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
        return loaded.hold(image.pixels if settings.exact_resize else _shrunk(image, settings), padded)

    try:
        image = _decoder(settings).decode(data, use=use)
    except ImageError as error:
        return _failure(error) | {"decode_seconds": time.perf_counter() - started}
    return {
        "width": image.width,
        "height": image.height,
        "orientation": image.orientation,
        "pixel_height": image.pixels.shape[0],
        "pixel_width": image.pixels.shape[1],
        "decode_seconds": time.perf_counter() - started,
    }


def _shrunk(image: Image, settings: LoadSettings) -> NDArray[np.uint8]:
    """The pixels at the model's size where torchvision would shrink them, else as they are."""
    shape = resized_shape(image.height, image.width, min_size=settings.min_size, max_size=settings.max_size)
    return image.pixels if shape[0] >= image.pixels.shape[0] else _shrink_to()(image.pixels, shape)


@functools.cache
def _shrink_to() -> Callable[..., NDArray[np.uint8]]:
    """model.batches.shrink_to; its torch costs 2 s, which only a worker pays that has something to shrink.

    Imported beside the main thread: a cancelled task is interrupted there, and the half of torch that an interrupted import
    leaves behind fails every later task of the worker (Ray 2.60, torch 2.14).
    """
    module = "fcos_ray.model.batches"
    thread = threading.Thread(target=importlib.import_module, args=(module,))
    thread.start()
    thread.join()
    shrink_to: Callable[..., NDArray[np.uint8]] = importlib.import_module(module).shrink_to
    return shrink_to


@functools.lru_cache(maxsize=1)
def _decoder(settings: LoadSettings) -> GuardedDecoder:
    """One child per load worker process, kept between its tasks; it ends with the worker."""
    return GuardedDecoder(
        max_pixels=settings.max_pixels,
        deadline_seconds=settings.decode_deadline_seconds,
        memory_bytes=settings.decode_memory_bytes,
        model_size=(settings.min_size, settings.max_size) if settings.fast_decode else None,
        decoder=settings.decoder,
    )


def _key(row: dict[str, Any]) -> dict[str, Any]:
    return {"shard": row["shard"], "row": row["row"]}


def _failure(error: ImageError) -> dict[str, Any]:
    return {"error_stage": error.stage, "error_code": error.code, "error_message": error.message[:1000]}


def _described(content: Content) -> dict[str, Any]:
    return {
        "content_bytes": len(content.data),
        "content_etag": content.etag,
        "content_last_modified": content.last_modified,
        "content_sha256": content.sha256,
        "attempts": content.attempts,
    }


class _Detect:
    """The actor of the detect stage."""

    def __init__(self, make_detector: MakeDetector, roll: Roll | None) -> None:
        if roll is not None:
            roll.add_detector()
        self._roll = roll
        self._detector = make_detector()

    def __call__(self, rows: pa.Table) -> pa.Table:
        """LOADED_SCHEMA -> RESULT_SCHEMA."""
        with _working(self._roll, "detect", rows):
            return self._detected(rows)

    def _detected(self, rows: pa.Table) -> pa.Table:
        has_pixels = rows["pixels"].is_valid().to_pylist()
        places = [i for i, there in enumerate(has_pixels) if there]
        images = [_image(rows, i) for i in places]
        started = time.perf_counter()
        answers = self._detector.detect(images) if images else []
        seconds = (time.perf_counter() - started) / max(1, len(images))
        results = rows.select([name for name in rows.column_names if name in RESULT_SCHEMA.names]).to_pylist()
        for place, answer in zip(places, answers, strict=True):
            results[place]["detect_seconds"] = seconds
            results[place] |= _found(answer) if isinstance(answer, Detections) else _failure(answer)
        return pa.Table.from_pylist(results, RESULT_SCHEMA)


def _image(rows: pa.Table, index: int) -> Image:
    shape = (rows["pixel_height"][index].as_py(), rows["pixel_width"][index].as_py(), 3)
    pixels = np.frombuffer(rows["pixels"][index].as_buffer(), np.uint8).reshape(shape)
    return Image(pixels, height=rows["height"][index].as_py(), width=rows["width"][index].as_py())


def _found(detections: Detections) -> dict[str, Any]:
    return {
        "boxes": detections.boxes.tolist(),
        "labels": detections.labels.tolist(),
        "scores": detections.scores.tolist(),
    }
