"""Arrow schemas of what a job writes. Knows columns and types, nothing else."""

from __future__ import annotations

from typing import Final

import pyarrow as pa

SCHEMA_VERSION: Final = 1
UTC: Final = pa.timestamp("us", tz="UTC")

# What is known about an image once it was tried; null where a stage did not get that far.
_OUTCOME: Final = [
    pa.field("error_stage", pa.string()),
    pa.field("error_code", pa.string()),
    pa.field("error_message", pa.string()),
]
_IMAGE: Final = [
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("orientation", pa.int8()),
    pa.field("content_bytes", pa.int64()),
    pa.field("content_etag", pa.string()),
    pa.field("content_last_modified", UTC),
    pa.field("content_sha256", pa.string()),
]
_BOXES: Final = pa.field("boxes", pa.list_(pa.list_(pa.float32())))
_LABELS: Final = pa.field("labels", pa.list_(pa.int64()))
_SCORES: Final = pa.field("scores", pa.list_(pa.float32()))
_KEY: Final = [pa.field("shard", pa.int32(), nullable=False), pa.field("row", pa.int32(), nullable=False)]

# One result row on its way to the driver: what a shard file needs beyond its pinned rows.
RESULT_SCHEMA: Final = pa.schema(
    [
        *_KEY,
        *_OUTCOME,
        *_IMAGE,
        _BOXES,
        _LABELS,
        _SCORES,
        pa.field("attempts", pa.int16()),  # to fetch it
        pa.field("fetch_seconds", pa.float32()),
        pa.field("decode_seconds", pa.float32()),  # with shrinking
        pa.field("detect_seconds", pa.float32()),
        pa.field("detected_at", UTC),  # when its block was done, by its node's clock
        pa.field("detected_by", pa.string()),  # which detector
    ]
)

# A loaded image between load and detect: a result row without detections, and its pixels unless it failed.
LOADED_SCHEMA: Final = pa.schema(
    [f for f in RESULT_SCHEMA if f.name not in ("boxes", "labels", "scores") and not f.name.startswith("detect")]
    + [
        pa.field("pixels", pa.large_binary()),  # pixel_height × pixel_width × 3, uint8 RGB
        pa.field("pixel_height", pa.int32()),
        pa.field("pixel_width", pa.int32()),
    ]
)

# The columns of a shard file before the manifest's own.
DATA_SCHEMA: Final = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        *_OUTCOME,
        pa.field("error_transient", pa.bool_()),
        *_IMAGE,
        _BOXES,
        _LABELS,
        pa.field("label_names", pa.list_(pa.string())),
        _SCORES,
        pa.field("run_id", pa.string(), nullable=False),
        *_KEY,
    ]
)

# Names a manifest may not use for columns of its own. `run` stands in the path, as a partition.
RESERVED_COLUMNS: Final = frozenset({*DATA_SCHEMA.names, "run"})
