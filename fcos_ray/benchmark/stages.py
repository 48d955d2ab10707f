"""Stages: each stage of a job alone. Seconds per image of one process; detectors all at once, as the layout has them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from fcos_ray import storage
from fcos_ray.errors import DetectError
from fcos_ray.inputs.fetch import fetch_many
from fcos_ray.inputs.guard import GuardedDecoder
from fcos_ray.layout import Layout
from fcos_ray.model.batches import micro_batches, shrink
from fcos_ray.model.detector import Detector
from fcos_ray.outputs.commit import ShardTarget, build_shard
from fcos_ray.outputs.gather import Gather
from fcos_ray.outputs.schema import RESULT_SCHEMA
from fcos_ray.pipeline import LoadSettings, MakeDetector, _load
from fcos_ray.sizes import padded_shape, shrinks
from fcos_ray.types import Content, Detections, Image

_ROUNDS: Final = 3  # the median of so many; the first call of all is not counted
_BOXES: Final = 20  # per image, in the rows that are gathered and committed


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """Seconds per image, one process each; None where there is nothing of the kind."""

    fetch: float  # the store's latency is hidden by as many at once as the job fetches
    decode: float  # in the guarded child
    shrink: float
    load: float  # the three, and the table that is handed on
    transport: float  # into Ray's object store and out again
    forward: float | None
    postprocess: float | None
    gather: float
    commit: float


def median_seconds(call: Callable[[], object], *, per: int) -> float:
    """Seconds of a call, divided by how many images it handles."""
    call()
    taken = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return sorted(taken)[_ROUNDS // 2] / per


def measure_stages(uris: Sequence[str], load: LoadSettings, detector: Detector | None, *, output: str) -> StageSeconds:
    """Every stage on the same images, in this process; Ray is running."""
    num = len(uris)
    contents = [c for _, c in fetch_many(uris, load.fetch) if isinstance(c, Content)]
    with GuardedDecoder(max_pixels=load.max_pixels) as decoder:
        decode = median_seconds(lambda: [decoder.decode(c.data, use=_first_row) for c in contents], per=num)
        images = [decoder.decode(content.data) for content in contents]
    rows = pa.table(
        {
            "shard": pa.repeat(pa.scalar(0, pa.int32()), num),
            "row": pa.array(range(num), pa.int32()),
            "uri": list(uris),
            "refused": pa.nulls(num, pa.string()),
            "deleted": pa.repeat(False, num),
        }
    )
    tables = list(_load(rows, settings=load))
    forward, postprocess = (None, None) if detector is None else _measure_detector(detector, _shrunk(images, load)[:4])
    gather, commit = _measure_outputs(num, output)
    return StageSeconds(
        fetch=median_seconds(lambda: list(fetch_many(uris, load.fetch)), per=num),
        decode=decode,
        shrink=median_seconds(lambda: _shrunk(images, load), per=num),
        load=median_seconds(lambda: list(_load(rows, settings=load)), per=num),
        transport=median_seconds(lambda: [ray.get(ray.put(table)) for table in tables], per=num),
        forward=forward,
        postprocess=postprocess,
        gather=gather,
        commit=commit,
    )


def _first_row(image: Image) -> NDArray[np.uint8]:
    return image.pixels[:1].copy()


def _shrunk(images: Sequence[Image], load: LoadSettings) -> list[Image]:
    size = {"min_size": load.min_size, "max_size": load.max_size}
    return [
        Image(shrink(image.pixels, **size), height=image.height, width=image.width)
        if shrinks(image.height, image.width, **size)
        else image
        for image in images
    ]


def _measure_detector(detector: Detector, images: Sequence[Image]) -> tuple[float, float]:
    """Seconds per image of all but the last step, and of the last: post-processing."""
    whole = median_seconds(lambda: detector.detect(images), per=len(images))
    finish = median_seconds(detector.finishing(images[0]), per=1)
    return whole - finish, finish


def _measure_outputs(num_rows: int, output: str) -> tuple[float, float]:
    found = {"boxes": [[0.0, 0.0, 1.0, 1.0]] * _BOXES, "labels": [1] * _BOXES, "scores": [0.5] * _BOXES}
    about = {"shard": 0, "width": 640, "height": 480, "content_sha256": "a" * 64, "attempts": 1}
    results = pa.Table.from_pylist([{**about, **found, "row": row} for row in range(num_rows)], RESULT_SCHEMA)
    blocks = [results.slice(start, 16) for start in range(0, num_rows, 16)]
    pinned = pa.table(
        {
            "image_id": [f"{row}" for row in range(num_rows)], "uri": [f"s3://bucket/{row}.jpg" for row in range(num_rows)],
            "__partition": [""] * num_rows, "__deleted": pa.repeat(False, num_rows),
        }
    )  # fmt: skip
    target = ShardTarget(output, "000000-00000000", (), {"categories": ["background", "thing"], "settings": {}})
    numbers = iter(range(1000))

    def commit() -> None:
        uri = storage.join(output, "commits", f"{next(numbers)}.parquet")
        assert storage.create(uri, build_shard(target, 0, pinned=pinned, results=results))

    def gather() -> None:
        one = Gather({0: num_rows})
        assert [whole for block in blocks for whole in one.add(block)]

    return median_seconds(gather, per=num_rows), median_seconds(commit, per=num_rows)


# ---- detectors alone


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


def detectors_alone(images: Sequence[Image], make_detector: MakeDetector, layout: Layout, *, seconds: float) -> float:
    """Images per second of all the layout's detectors at once: no job on it can be faster."""
    options = {"num_cpus": layout.detector_cpus, "num_gpus": layout.detector_gpus}
    actors: list[Any] = [
        ray.remote(_Alone).options(**options).remote(make_detector) for _ in range(layout.num_detectors)
    ]
    shared = ray.put(list(images))
    ray.get([actor.detect.remote(shared, seconds=0.001) for actor in actors])  # the first forward is slower
    found = ray.get([actor.detect.remote(shared, seconds=seconds) for actor in actors])
    for actor in actors:
        ray.kill(actor)
    return float(sum(num / taken for num, taken in found))


# ---- without a model


class NullDetector:
    """Finds nothing, in no time; counts how full its micro-batches would be."""

    def __init__(self, *, min_size: int, max_size: int, max_micro_batch: int) -> None:
        self._size = {"min_size": min_size, "max_size": max_size}
        self._max_images = max_micro_batch

    def detect(self, images: Sequence[Image]) -> list[Detections | DetectError]:
        """Detections whose label is the number of images in the micro-batch, with one box, so that it is kept."""
        shapes = [padded_shape(image.height, image.width, **self._size) for image in images]
        answers: list[Detections | DetectError] = [_fill(0)] * len(images)
        for batch in micro_batches(shapes, max_images=self._max_images):
            for index in batch:
                answers[index] = _fill(len(batch))
        return answers


def _fill(num_images: int) -> Detections:
    box = np.array([[0, 0, num_images, 1]], np.float32)
    return Detections(box, np.ones(1, np.int64), np.ones(1, np.float32))


def mean_fill(sizes: Sequence[float], *, max_micro_batch: int) -> float:
    """Mean of micro-batches' sizes as a share of the cap, from each image's: an image in a batch of n stands for 1/n."""
    return len(sizes) / sum(1 / size for size in sizes) / max_micro_batch


def in_memory(uris: Sequence[str], load: LoadSettings) -> list[Image]:
    """Images as the load stage hands them on."""
    contents = [content for _, content in fetch_many(uris, load.fetch) if isinstance(content, Content)]
    with GuardedDecoder(max_pixels=load.max_pixels) as decoder:
        return _shrunk([decoder.decode(content.data) for content in contents], load)
