"""Pipeline: shard numbers -> result rows. Composes the stages on Ray Data; the only room that builds Ray datasets.

    shard numbers → read (CPU) → load (CPU): fetch, decode, shrink → detect (actor pool) → result rows

An image that fails becomes an error row in load.py or in the detect stage here, and nowhere else; it skips the stages after
it and travels in the same stream.
"""

from __future__ import annotations

import functools
import time
import uuid
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Protocol

import numpy as np
import pyarrow as pa
import ray.data
from ray.data._internal.logical.interfaces import LogicalPlan
from ray.data._internal.logical.operators import StreamingRepartition
from ray.data.exceptions import ExecutionTimeoutError
from ray.data.read_api import from_blocks

from fcos_ray import storage
from fcos_ray.block_stats import bound_block_stats
from fcos_ray.errors import DetectError, StageStalled, StorageError
from fcos_ray.inputs.columns import DELETED, REFUSED
from fcos_ray.inputs.pinned_files import PinnedFile, read_shard
from fcos_ray.layout import READ_CPUS, Layout
from fcos_ray.load import LoadSettings, failure, load_tables
from fcos_ray.outputs.schema import RESULT_SCHEMA
from fcos_ray.read_ahead import bound_read_ahead
from fcos_ray.roll import AtWork, Roll
from fcos_ray.types import Detections, Image

_READ_TASKS: Final = 1000  # at most; each reads its shards one after the other
_NAMED_WORKERS: Final = 3  # and images of each, in what is said of a stall


class ImageDetector(Protocol):
    """What the detect stage calls: one answer per image, an error for an image that fails alone."""

    def detect(self, images: Sequence[Image]) -> list[Detections | DetectError]: ...


class MakeDetector(Protocol):
    """Builds a detector in its actor; picklable."""

    def __call__(self) -> ImageDetector: ...


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
    # Shards smaller than what a load task takes are read together: what is cut out of them never spans two read tasks, and a
    # task of Ray Data costs what loading many thumbnails does.
    rows_of = [rows for file in stages.files for rows in file.shard_rows]
    mean_rows = sum(rows_of[shard] for shard in shards) / max(1, len(shards))
    per_task = max(-(-len(shards) // _READ_TASKS), int(layout.load_rows / max(1.0, mean_rows)), 1)
    numbers = [
        pa.table({"shard": pa.array(shards[i : i + per_task], pa.int32())}) for i in range(0, len(shards), per_task)
    ]
    read = functools.partial(_read, pinned_folder=stages.pinned_folder, files=stages.files)
    load = functools.partial(_load, settings=stages.load, roll=roll)
    readers = ray.data.TaskPoolStrategy(size=layout.num_read_tasks)
    # Not from_arrow, which asks for each table's number of rows in a task of a whole CPU: 2.4 s before anything else begins
    source = from_blocks(numbers)
    bound_read_ahead(source.context)
    bound_block_stats(source.context)
    read_rows = source.map_batches(read, batch_format="pyarrow", num_cpus=READ_CPUS, compute=readers)
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
        what = f"for {work.seconds:.0f} s: {images}{more}" if work.rows else "without images, which does not answer"
        named.append(f"{work.stage} on {work.address} (pid {work.pid}) {what}")
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


def _load(rows: pa.Table, *, settings: LoadSettings, roll: Roll | None) -> Iterator[pa.Table]:
    with _working(roll, "load", rows):
        yield from load_tables(rows, settings)


def _working(roll: Roll | None, stage: str, rows: pa.Table) -> AbstractContextManager[None]:
    if roll is None:
        return nullcontext()
    return roll.working(stage, list(zip(rows["shard"].to_pylist(), rows["row"].to_pylist(), strict=True)))


class _Detect:
    """The actor of the detect stage."""

    def __init__(self, make_detector: MakeDetector, roll: Roll | None) -> None:
        if roll is not None:
            roll.add_detector()
        self._roll, self._name = roll, uuid.uuid4().hex
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
            results[place] |= _found(answer) if isinstance(answer, Detections) else failure(answer)
        done = {"detected_at": datetime.now(UTC), "detected_by": self._name}
        for result in results:
            result |= done
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
