"""Rows: a shard's rows, held against its pinned rows and against what a row means. Knows tables, no files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fcos_ray.errors import ERROR_CODES
from fcos_ray.outputs.commit import CONTENT_COLUMNS
from fcos_ray.outputs.schema import DATA_SCHEMA

_FOUND = ("boxes", "labels", "label_names", "scores")


def wrong_rows(
    table: pa.Table, pinned: pa.Table, *, partition_by: tuple[str, ...], labelling: Mapping[str, Any]
) -> Iterator[str]:
    """What is wrong with a shard's rows, in words; nothing for a shard that this version committed.

    `table` and `pinned` have as many rows, in the pinned order.
    """
    yield from _wrong_columns(table, pinned, partition_by)
    for field in DATA_SCHEMA:
        if field.name not in table.column_names or table.schema.field(field.name).type != field.type:
            return  # said above; the rest would only say it again
    yield from _wrong_status(table)
    yield from _wrong_detections(table, labelling)


def _wrong_columns(table: pa.Table, pinned: pa.Table, partition_by: tuple[str, ...]) -> Iterator[str]:
    own = [n for n in pinned.column_names if not n.startswith("__") and n not in (*partition_by, *DATA_SCHEMA.names)]
    types = {f.name: f.type for f in DATA_SCHEMA} | {name: pinned.schema.field(name).type for name in own}
    have = {field.name: field.type for field in table.schema}
    for name in sorted(types.keys() | have.keys()):
        if types.get(name) != have.get(name):
            yield f"column {name}: wanted {types.get(name, 'none')}, got {have.get(name, 'none')}"
    for name in ("image_id", "uri", *own):
        if name in have and not _equal(table[name], pinned[name]):
            yield f"column {name} is not the pinned manifest's"
    for name in CONTENT_COLUMNS:  # what the manifest knew stands where the store did not say
        if name in pinned.column_names and name in have:
            told = pc.is_null(table[name])
            if pc.any(pc.and_(told, pc.is_valid(pinned[name]))).as_py():
                yield f"column {name} has lost what the pinned manifest knew"


def _equal(one: pa.ChunkedArray, other: pa.ChunkedArray) -> bool:
    # Arrow calls two NaN different (26); their texts are not.
    return bool(one.equals(other)) or repr(one.to_pylist()) == repr(other.to_pylist())


def _wrong_status(table: pa.Table) -> Iterator[str]:
    names = ("status", "error_stage", "error_code", "error_transient", *_FOUND, "width", "height", "content_sha256")
    for number, row in enumerate(table.select(names).to_pylist()):
        code = row["error_code"]
        wanted: tuple[str, str | None, bool | None] = ("ok", None, None)
        if code is None:
            absent = [name for name in (*_FOUND, "width", "height", "content_sha256") if row[name] is None]
        else:
            stage, transient, _ = ERROR_CODES.get(code, (None, None, ""))
            wanted = ("error", stage, transient)
            absent = []
            if code not in ERROR_CODES or any(row[name] is not None for name in _FOUND):
                yield f"row {number}: error code {code!r} is unknown, or its row has detections"
                continue
        if (row["status"], row["error_stage"], row["error_transient"]) != wanted:
            yield f"row {number}: status, error_stage and error_transient do not go with error_code {code!r}"
        if absent:
            yield f"row {number}: an ok row without {', '.join(absent)}"


def _wrong_detections(table: pa.Table, labelling: Mapping[str, Any]) -> Iterator[str]:
    ok = table.filter(pc.is_null(table["error_code"]))
    numbers = np.flatnonzero(pc.is_null(table["error_code"]).to_numpy())
    settings, categories = labelling["settings"], labelling["categories"]
    columns = ok.select([*_FOUND, "width", "height"]).to_pylist()
    for number, row in zip(numbers.tolist(), columns, strict=True):
        if any(row[name] is None for name in (*_FOUND, "width", "height")):
            continue  # said by the status
        if words := _wrong_detection(row, settings, categories):
            yield f"row {number}: {words}"


def _wrong_detection(row: Mapping[str, Any], settings: Mapping[str, Any], categories: list[str]) -> str:
    scores = np.asarray(row["scores"], np.float32)
    if not len(scores) == len(row["labels"]) == len(row["label_names"]) == len(row["boxes"]):
        return "boxes, labels, label_names and scores differ in length"
    if any(len(box) != 4 for box in row["boxes"]):
        return "a box has not four numbers"
    boxes: NDArray[np.float32] = np.asarray(row["boxes"], np.float32).reshape(-1, 4)
    limits = np.array([row["width"], row["height"]] * 2, np.float32)
    if not (np.isfinite(boxes).all() and (boxes >= 0).all() and (boxes <= limits).all()):
        return f"a box lies outside the image of {row['width']} x {row['height']} pixels"
    if (boxes[:, :2] > boxes[:, 2:]).any():
        return "a box has x2 < x1 or y2 < y1"
    if not (np.isfinite(scores).all() and (np.diff(scores) <= 0).all()):
        return "scores do not descend"
    if (scores <= np.float32(settings["score_threshold"])).any():
        return f"a score is not above the threshold of {settings['score_threshold']}"
    if len(scores) > settings["max_detections"]:
        return f"{len(scores)} detections, more than {settings['max_detections']}"
    if [categories[label] if 0 <= label < len(categories) else None for label in row["labels"]] != row["label_names"]:
        return "label_names are not the categories of labels"
    return ""
