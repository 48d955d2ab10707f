"""Commit: a whole shard -> one file that appears at once. The file is the only record of progress. Knows no Ray."""

from __future__ import annotations

import json
import re
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fcos_ray import storage
from fcos_ray.errors import ERROR_CODES, OutputError
from fcos_ray.outputs.runs import temporary_folder
from fcos_ray.outputs.schema import DATA_SCHEMA, SCHEMA_VERSION

METADATA_KEY: Final = b"fcos_ray"
CONTENT_COLUMNS: Final = ("content_bytes", "content_etag", "content_last_modified", "content_sha256")
_TRANSIENT: Final = {code: transient for code, (_, transient, _) in ERROR_CODES.items()}
DATA_FILE: Final = re.compile(r"(\d{8})\.parquet")  # the name of shard files, and of nothing else


@dataclass(frozen=True, slots=True)
class ShardCounts:
    """What a shard file holds, as said in its own metadata; `+` over shards gives a run's totals."""

    rows: int = 0
    ok: int = 0
    error: int = 0
    deleted: int = 0  # tombstones
    detections: int = 0
    retries: int = 0  # fetch attempts beyond the first
    errors_by_code: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # per stage, summed over images

    def __add__(self, other: ShardCounts) -> ShardCounts:
        seconds = {k: self.seconds.get(k, 0.0) + other.seconds.get(k, 0.0) for k in self.seconds | other.seconds}
        return ShardCounts(
            rows=self.rows + other.rows,
            ok=self.ok + other.ok,
            error=self.error + other.error,
            deleted=self.deleted + other.deleted,
            detections=self.detections + other.detections,
            retries=self.retries + other.retries,
            errors_by_code=dict(Counter(self.errors_by_code) + Counter(other.errors_by_code)),
            seconds=seconds,
        )


@dataclass(frozen=True, slots=True)
class ShardTarget:
    """Where shards of a run go, and what their files say about themselves."""

    output: str
    run_id: str
    partition_by: tuple[str, ...]
    labelling: Mapping[str, Any]

    def data_uri(self, partition: str, shard: int) -> str:
        """The name only the plan decides: detections/run=<run_id>/[<column>=<value>/…]<shard>.parquet"""
        return storage.join(data_folder(self.output, self.run_id), *filter(None, [partition]), f"{shard:08d}.parquet")


def data_folder(output: str, run_id: str) -> str:
    """Where the shard files of a run lie."""
    return storage.join(output, "detections", f"run={run_id}")


def commit_shard(target: ShardTarget, shard: int, *, pinned: pa.Table, results: pa.Table) -> bool:
    """Write a shard's file unless it exists. False: another writer was first, and its file stays.

    `pinned` are the shard's rows of the pinned manifest in order, `results` one RESULT_SCHEMA row for each of them in any
    order. Raises StorageError when it remains unknown whether the file exists.
    """
    partition = pinned["__partition"][0].as_py()
    data = build_shard(target, shard, pinned=pinned, results=results)
    temporary = temporary_folder(target.output, target.run_id)
    return storage.create(target.data_uri(partition, shard), data, temporary_folder=temporary)


def build_shard(target: ShardTarget, shard: int, *, pinned: pa.Table, results: pa.Table) -> bytes:
    """The bytes of a shard file: DATA_SCHEMA, then the manifest's own columns, rows in the pinned order."""
    results = results.sort_by("row")
    assert results["row"].to_numpy().tolist() == list(range(pinned.num_rows)), f"shard {shard} is not whole"
    failed = pc.is_valid(results["error_code"])
    columns: dict[str, Any] = {name: results[name] for name in results.column_names if name in DATA_SCHEMA.names}
    columns["image_id"], columns["uri"] = pinned["image_id"], pinned["uri"]
    columns["status"] = pc.if_else(pinned["__deleted"], "deleted", pc.if_else(failed, "error", "ok"))
    columns["error_transient"] = pa.array(
        [_TRANSIENT.get(code) for code in results["error_code"].to_pylist()], pa.bool_()
    )
    columns["label_names"] = _label_names(results["labels"], target.labelling["categories"])
    columns["run_id"] = pa.repeat(target.run_id, pinned.num_rows)
    for name in CONTENT_COLUMNS:
        if name in pinned.column_names:  # what the manifest knew, where the store did not say
            columns[name] = pc.coalesce(columns[name], pinned[name].cast(DATA_SCHEMA.field(name).type))
    table = pa.table([columns[f.name] for f in DATA_SCHEMA], schema=DATA_SCHEMA)
    for name in pinned.column_names:
        if name not in table.column_names and not name.startswith("__") and name not in target.partition_by:
            table = table.append_column(pinned.schema.field(name), pinned[name])
    about = _describe(target, shard, results, deleted=count_outcomes(table).deleted)
    table = table.replace_schema_metadata({METADATA_KEY: json.dumps(about)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return cast("bytes", sink.getvalue().to_pybytes())


def _label_names(labels: pa.ChunkedArray, categories: Sequence[str]) -> pa.Array:
    combined = labels.combine_chunks()
    names = pa.array(categories, pa.string()).take(combined.flatten())
    offsets = np.concatenate([[0], np.cumsum(pc.fill_null(pc.list_value_length(combined), 0).to_numpy())])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), names, mask=pc.is_null(combined))


def _describe(target: ShardTarget, shard: int, results: pa.Table, *, deleted: int) -> dict[str, Any]:
    """What a file says about itself. The attempt id makes every writer's bytes its own: see storage.create."""
    counts = count_results(results)
    counts = replace(counts, ok=counts.ok - deleted, deleted=deleted)
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": target.run_id,
        "shard": shard,
        "attempt": uuid.uuid4().hex,
        "committed_at": datetime.now(UTC).isoformat(),
        **target.labelling,
        "counts": asdict(counts),
    }


def count_results(results: pa.Table) -> ShardCounts:
    """Totals over result rows."""
    attempts = results["attempts"]
    return replace(
        count_outcomes(results),
        retries=(pc.sum(attempts).as_py() or 0) - len(attempts.drop_null()),
        seconds={
            stage: round(float(pc.sum(results[f"{stage}_seconds"]).as_py() or 0.0), 4)
            for stage in ("fetch", "decode", "detect")
        },
    )


def count_outcomes(rows: pa.Table) -> ShardCounts:
    """Totals over rows of a shard file, or result rows, which know no status: without what only the stages knew."""
    codes = pc.value_counts(rows["error_code"].drop_null()).to_pylist()
    errors = {entry["values"]: entry["counts"] for entry in codes}
    deleted = 0
    if "status" in rows.column_names:
        deleted = int(pc.sum(pc.equal(rows["status"], "deleted")).as_py() or 0)
    return ShardCounts(
        rows=rows.num_rows,
        ok=rows.num_rows - sum(errors.values()) - deleted,
        error=sum(errors.values()),
        deleted=deleted,
        detections=pc.sum(pc.list_value_length(rows["labels"])).as_py() or 0,
        errors_by_code=errors,
    )


def is_damage(error: Exception) -> bool:
    """Whether what reading a Parquet file raised is the file's fault, not its store's."""
    return not isinstance(error, OSError) or error.errno is None  # Arrow's OSError for damage has none (pyarrow 26)


def list_committed(output: str, run_id: str) -> dict[int, str]:
    """Shard number -> uri of every shard file of a run. Raises OutputError for a file that no run writes there."""
    return {shard: file.uri for shard, file in committed_files(output, run_id).items()}


def committed_files(output: str, run_id: str) -> dict[int, storage.StoredFile]:
    """Shard number -> shard file. Raises OutputError for a file that no run writes there."""
    committed: dict[int, storage.StoredFile] = {}
    for file in storage.list_files(data_folder(output, run_id)):
        match = DATA_FILE.fullmatch(file.uri.rsplit("/", 1)[1])
        if match is None or int(match[1]) in committed:
            raise OutputError(f"{file.uri} was not written by this run; move it away, then run again")
        committed[int(match[1])] = file
    return committed
