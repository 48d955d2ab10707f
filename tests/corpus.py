"""What several tests need around a job: a corpus, cheap detectors, and the output as rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fcos_ray import JobConfig, storage
from fcos_ray.types import Detections, Image

# FCOS for real, on few pixels; one detector and two loaders: each is a process that imports torch for seconds.
SMALL_MODEL = {"weights": "sample", "min_size": 96, "max_size": 160, "num_detectors": 1, "load_cpus": 0.5}


class PixelDetector:
    """One box per image that depends on every pixel: a detector whose cost is nothing and whose mistakes show."""

    def detect(self, images: Sequence[Image]) -> list[Detections]:
        return [_from_pixels(image) for image in images]


def _from_pixels(image: Image) -> Detections:
    digest = np.frombuffer(hashlib.sha256(image.pixels.tobytes()).digest()[:4], np.uint8)
    box = np.array([[0, 0, image.width, image.height]], np.float32)
    return Detections(box, np.array([1 + digest[0] % 80]), np.array([digest[1] / 256], np.float32))


def config(manifest: Path | str, output: Path | str, **settings: Any) -> JobConfig:
    """A job on few pixels, with COCO's categories and the manifest's own folder as root."""
    defaults = SMALL_MODEL | {"weights": "random:1"}
    return JobConfig(manifest=[str(manifest)], output=str(output), **(defaults | settings))


def rows_of(output: Path | str) -> dict[str, dict[str, Any]]:
    """image_id -> row, over all runs; fails when an id comes twice within a run."""
    rows: dict[str, dict[str, Any]] = {}
    for file in storage.list_files(storage.join(str(output), "detections")):
        with storage.open_for_reading(file.uri) as handle:
            for row in pq.ParquetFile(handle).read().to_pylist():
                assert (row["run_id"], row["image_id"]) not in rows, f"{row['image_id']} came out twice"
                rows[(row["run_id"], row["image_id"])] = row
    return {image_id: row for (_, image_id), row in sorted(rows.items())}


def files_of(output: Path | str) -> dict[str, bytes]:
    """uri -> bytes of every shard file."""
    return {f.uri: storage.read_bytes(f.uri) for f in storage.list_files(storage.join(str(output), "detections"))}


RESULT_COLUMNS = (
    "uri", "status", "error_code", "width", "height", "orientation", "content_bytes", "content_sha256", "boxes",
    "labels", "label_names", "scores",
)  # fmt: skip


def results_of(output: Path | str) -> dict[str, dict[str, Any]]:
    """image_id -> the columns that must not depend on how the work was cut or what died."""
    return {image_id: {name: row[name] for name in RESULT_COLUMNS} for image_id, row in rows_of(output).items()}


def detections_of(row: dict[str, Any]) -> Detections:
    """A row's detections as the detector gave them."""
    return Detections(
        np.array(row["boxes"], np.float32).reshape(-1, 4),
        np.array(row["labels"], np.int64),
        np.array(row["scores"], np.float32),
    )


def manifest_ids(manifest: Path | str) -> list[str]:
    return [str(i) for i in pq.read_table(str(manifest), columns=["image_id"])["image_id"].to_pylist()]


def write_manifest(path: Path, columns: dict[str, Sequence[Any]]) -> Path:
    pq.write_table(pa.table({name: pa.array(values) for name, values in columns.items()}), path)
    return path
