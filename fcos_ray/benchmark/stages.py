"""Stages: each stage of a job alone, in seconds per image of one process; detectors all at once, as the layout has them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from fcos_ray.errors import FetchError, StorageError
from fcos_ray.inputs.columns import DELETED, PARTITION
from fcos_ray.inputs.fetch import fetch_many
from fcos_ray.layout import Layout
from fcos_ray.load import LoadSettings, decoder, load_tables, shrunk
from fcos_ray.model.cost import ModelFigures, model_figures
from fcos_ray.model.detector import Detector
from fcos_ray.outputs.commit import ShardTarget, commit_shard
from fcos_ray.outputs.gather import Gather
from fcos_ray.outputs.schema import RESULT_SCHEMA
from fcos_ray.pipeline import MakeDetector
from fcos_ray.types import Content, Image

_SHARD_ROWS: Final = 512  # of the shard that is gathered and committed
_ROUNDS: Final = 3  # the median of so many; the first call of all is not counted
_BOXES: Final = 20  # per image, in the rows that are gathered and committed


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """Seconds per image, one process each; None where there is nothing of the kind."""

    fetch: float  # the store's latency is hidden by as many at once as the job fetches
    decode: float  # in the guarded child
    shrink: float
    load: float  # the three, and the table that is handed on
    transport: float  # into Ray's object store, and to a detector
    forward: float | None
    postprocess: float | None
    gather: float
    commit: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured on one set of images."""

    stages: StageSeconds
    detectors_alone: float  # as detectors_alone() has it
    model: ModelFigures | None  # of one detector; None without a model


def median_seconds(call: Callable[[], object], *, per: int) -> float:
    """Seconds of a call, divided by how many images it handles."""
    call()
    taken = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return sorted(taken)[_ROUNDS // 2] / per


def measure_stages(
    uris: Sequence[str], load: LoadSettings, make_detector: MakeDetector, layout: Layout, *, seconds: float, output: str
) -> Measured:
    """Every stage on the same images; and all the layout's detectors at once, for so many seconds.

    Loading is measured in a load task, the model in a detector: what the driver's machine can do does not count.
    """
    images = _images(uris, load)
    with _detectors(make_detector, layout) as actors:
        alone = _all_at_once(actors, images, seconds=seconds)
        forward, postprocess = ray.get(actors[0].parts.remote(list(images[:4])))
        model = ray.get(actors[0].model.remote(images[0]))
        tables, loading = ray.get(_measure_load.options(num_cpus=layout.load_cpus).remote(uris, load))

        def transport() -> None:
            for table in tables:
                ray.get(actors[0].take.remote(ray.put(table)))

        carried = median_seconds(transport, per=len(uris))
    gather, commit = _measure_outputs(output)
    measured = StageSeconds(
        **loading, transport=carried, forward=forward, postprocess=postprocess, gather=gather, commit=commit
    )
    return Measured(measured, alone, model)


def detectors_alone(
    uris: Sequence[str], load: LoadSettings, make_detector: MakeDetector, layout: Layout, *, seconds: float
) -> float:
    """Images per second of all the layout's detectors at once, each with the images in its own memory."""
    with _detectors(make_detector, layout) as actors:
        return _all_at_once(actors, _images(uris, load), seconds=seconds)


def _images(uris: Sequence[str], load: LoadSettings) -> list[Image]:
    return _shrunk(_decode(_fetch(uris, load), load), load)


def _fetch(uris: Sequence[str], load: LoadSettings) -> list[bytes]:
    """Raises StorageError for an image that cannot be read: it was written a moment ago."""
    found = [content for _, content in fetch_many(uris, load.fetch)]
    if failed := [content for content in found if isinstance(content, FetchError)]:
        raise StorageError(f"{len(failed)} of {len(uris)} images cannot be read, such as: {failed[0]}")
    return [content.data for content in found if isinstance(content, Content)]


def _decode(files: Sequence[bytes], load: LoadSettings) -> list[Image]:
    with decoder(load) as child:
        return [child.decode(data) for data in files]


def _shrunk(images: Sequence[Image], load: LoadSettings) -> list[Image]:
    return [Image(shrunk(image, load), height=image.height, width=image.width) for image in images]


@ray.remote
def _measure_load(uris: Sequence[str], load: LoadSettings) -> tuple[list[pa.Table], dict[str, float]]:
    """The tables that are handed on, and seconds per image of loading's parts."""
    num = len(uris)
    rows = pa.table(
        {
            "shard": pa.repeat(pa.scalar(0, pa.int32()), num),
            "row": pa.array(range(num), pa.int32()),
            "uri": list(uris),
            "refused": pa.nulls(num, pa.string()),
            "deleted": pa.repeat(False, num),
        }
    )
    files = _fetch(uris, load)
    images = _decode(files, load)
    with decoder(load) as child:
        seconds = {
            "fetch": median_seconds(lambda: _fetch(uris, load), per=num),
            "decode": median_seconds(lambda: [child.decode(data, use=_first_row) for data in files], per=num),
            "shrink": median_seconds(lambda: _shrunk(images, load), per=num),
            "load": median_seconds(lambda: list(load_tables(rows, load)), per=num),
        }
    return list(load_tables(rows, load)), seconds


def _first_row(image: Image) -> NDArray[np.uint8]:
    return image.pixels[:1].copy()


def _measure_outputs(output: str) -> tuple[float, float]:
    """Seconds per row of gathering a shard in blocks of 16 rows, and of committing it."""
    found = {"boxes": [[0.0, 0.0, 1.0, 1.0]] * _BOXES, "labels": [1] * _BOXES, "scores": [0.5] * _BOXES}
    about = {"shard": 0, "width": 640, "height": 480, "content_sha256": "a" * 64, "attempts": 1}
    results = pa.Table.from_pylist([{**about, **found, "row": row} for row in range(_SHARD_ROWS)], RESULT_SCHEMA)
    blocks = [results.slice(start, 16) for start in range(0, _SHARD_ROWS, 16)]
    names = [f"{row}" for row in range(_SHARD_ROWS)]
    pinned = pa.table(
        {
            "image_id": names,
            "uri": [f"s3://bucket/{name}.jpg" for name in names],
            PARTITION: [""] * _SHARD_ROWS,
            DELETED: pa.repeat(False, _SHARD_ROWS),
        }
    )
    target = ShardTarget(output, "000000-00000000", (), {"categories": ["background", "thing"], "settings": {}})
    shards = itertools.count()

    def gather() -> None:
        one = Gather({0: _SHARD_ROWS})
        for block in blocks:
            one.add(block)

    def commit() -> None:
        commit_shard(target, next(shards), pinned=pinned, results=results)

    return median_seconds(gather, per=_SHARD_ROWS), median_seconds(commit, per=_SHARD_ROWS)


# ---- detectors


class _Alone:
    """A detector with images in its own memory."""

    def __init__(self, make_detector: MakeDetector) -> None:
        self._detector = make_detector()

    def detect(self, images: Sequence[Image], *, seconds: float) -> tuple[int, float]:
        """How many were detected, in how many seconds: at least so many, and once through at least."""
        started, num = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            self._detector.detect(images)
            num += len(images)
        return num, time.perf_counter() - started

    def parts(self, images: Sequence[Image]) -> tuple[float | None, float | None]:
        """Seconds per image of all but the last step, and of the last: post-processing. None without a model."""
        if not isinstance(self._detector, Detector):
            return None, None
        whole = median_seconds(lambda: self._detector.detect(images), per=len(images))
        finish = median_seconds(self._detector.finishing(images[0]), per=1)
        return whole - finish, finish

    def model(self, image: Image) -> ModelFigures | None:
        """What the model costs. None without one."""
        return model_figures(self._detector, image) if isinstance(self._detector, Detector) else None

    def take(self, table: pa.Table) -> int:
        """Receive a table as the detect stage does."""
        return int(table.num_rows)


@contextmanager
def _detectors(make_detector: MakeDetector, layout: Layout) -> Iterator[list[Any]]:
    options = {"num_cpus": layout.detector_cpus, "num_gpus": layout.detector_gpus}
    actors: list[Any] = [
        ray.remote(_Alone).options(**options).remote(make_detector) for _ in range(layout.num_detectors)
    ]
    try:
        yield actors
    finally:
        for actor in actors:
            ray.kill(actor)


def _all_at_once(actors: Sequence[Any], images: Sequence[Image], *, seconds: float) -> float:
    """Images per second: no job on these detectors can be faster."""
    shared = ray.put(list(images))
    ray.get([actor.detect.remote(shared, seconds=0.001) for actor in actors])  # the first forward is slower
    found = ray.get([actor.detect.remote(shared, seconds=seconds) for actor in actors])
    return float(sum(num / taken for num, taken in found))
