"""Dataset: open what a job wrote. Knows runs, newest rows and boxes; `committed.py` knows where they lie.

dataset = open_dataset("s3://labels/corpus")
dataset.latest().to_arrow()
dataset.boxes().to_duckdb().filter("label_name = 'person' AND score > 0.8")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import duckdb
import pyarrow as pa

from fcos_ray import storage
from fcos_ray.analysis.committed import CommittedRun, column_names, pick, read_runs, unite
from fcos_ray.analysis.rows import Rows
from fcos_ray.analysis.sql import Scans
from fcos_ray.errors import OutputError, StorageError
from fcos_ray.inputs.scans import quote
from fcos_ray.outputs.runs import read_labelling, run_folder
from fcos_ray.outputs.schema import DATA_SCHEMA, UTC

# The columns of a box before the manifest's own, and how each comes out of a row whose lists are unnested.
_BOX: Final = {
    "image_id": ("image_id", pa.string()),
    "uri": ("uri", pa.string()),
    "run_id": ("run_id", pa.string()),
    "width": ("width", pa.int32()),
    "height": ("height", pa.int32()),
    "x1": ("__box[1]", pa.float32()),
    "y1": ("__box[2]", pa.float32()),
    "x2": ("__box[3]", pa.float32()),
    "y2": ("__box[4]", pa.float32()),
    "label": ("__label", pa.int64()),
    "label_name": ("__label_name", pa.string()),
    "score": ("__score", pa.float32()),
}
_UNNESTED: Final = (
    "unnest(boxes) AS __box, unnest(labels) AS __label, unnest(label_names) AS __label_name, unnest(scores) AS __score"
)
_BOX_SOURCES: Final = (
    "image_id", "uri", "run_id", "width", "height", "status", "boxes", "labels", "label_names", "scores",
)  # fmt: skip

_RUNS_SCHEMA: Final = pa.schema(
    [
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("state", pa.string(), nullable=False),  # finished, open, abandoned, retracted or purged
        pa.field("rows", pa.int64()),  # of the pinned manifest
        pa.field("shards", pa.int64()),
        pa.field("committed_shards", pa.int64()),  # so far
        pa.field("ok", pa.int64()),  # this and the next three are null for a run that did not end
        pa.field("error", pa.int64()),
        pa.field("deleted", pa.int64()),  # tombstones
        pa.field("detections", pa.int64()),
        pa.field("duplicates_dropped", pa.int64()),
        pa.field("uris_refused", pa.int64()),
        pa.field("created_at", UTC),
        pa.field("finished_at", UTC),  # null while the run is open
        pa.field("partition_by", pa.list_(pa.string())),
        pa.field("sources", pa.list_(pa.string())),  # uris of the manifest files
        pa.field("request_digest", pa.string()),
    ]
)


def open_dataset(output: str) -> LabelDataset:
    """Open a job's output folder or `s3://` prefix, as it is now: what is committed later is seen by opening again.

    Raises OutputError when nothing of a job lies there or its records are damaged, StorageError when the store fails.
    """
    try:
        uri = storage.parse_uri(output).uri
        found = read_runs(uri)
        labelling = read_labelling(uri)
    except storage.InvalidUri as error:
        raise OutputError(f"{storage.without_secrets(output)!r} cannot be opened as an output: {error}") from error
    except storage.STORE_ERRORS as error:
        if storage.is_transient(error):
            raise StorageError(storage.describe(error)) from error
        raise OutputError(
            f"{storage.describe(error)}. Wanted to list and read {storage.without_secrets(output)}; "
            "check the uri and the rights"
        ) from error
    if not found:
        shown = storage.without_secrets(uri)
        raise OutputError(
            f"{shown} holds no runs; wanted the --output of a job, the folder of labelling.json and runs/"
        )
    if labelling is None:
        raise OutputError(f"{uri}/labelling.json is gone, so nobody knows what made its runs; put it back")
    local = storage.parse_uri(uri).scheme == "file"
    listed = None if local else storage.ListedFiles(file for run in found for file in run.files)
    return LabelDataset(uri, labelling, tuple(found), listed)


@dataclass(frozen=True, slots=True)
class LabelDataset:
    """What a job's runs committed to one output, as it was when opened. Methods give `Rows`: lazy, in several formats.

    Rows of open and abandoned runs count: they are final, there are only not all of them. Rows of retracted runs do not.
    Columns of all runs are united by name, null where a run has none, whether they stood in the files or in the path;
    `columns` picks some of them. A column with different types in different runs becomes the wider of two integers,
    floats, strings or binaries, and is an OutputError otherwise, unless `columns` leaves it out.
    """

    output: str
    labelling: Mapping[str, Any]  # labelling.json: model and settings shared by all runs
    _found: tuple[CommittedRun, ...] = field(repr=False)
    _listed: storage.ListedFiles | None = field(repr=False)

    @property
    def categories(self) -> tuple[str, ...]:
        """Names of the labels: label n is categories[n]."""
        return tuple(self.labelling["categories"])

    def latest(self, *, columns: Sequence[str] | None = None) -> Rows:
        """Per image_id the row of the newest run that has it: the one with the highest run_id.

        The newest row is the newest row, even when it is an error and an older one has detections; where it is a tombstone
        the image has none.
        """
        schema = _schema(self._counting, columns)
        scans = self._scans(self._counting)
        newest = scans.newest_rows([*schema.names, "status"])
        return self._rows(schema, scans, f"{newest} WHERE status <> 'deleted'")

    def errors(self, *, columns: Sequence[str] | None = None) -> Rows:
        """The rows of `latest()` that are errors."""
        schema = _schema(self._counting, columns)
        scans = self._scans(self._counting)
        return self._rows(schema, scans, f"{scans.newest_rows([*schema.names, 'status'])} WHERE status = 'error'")

    def rows(self, run_id: str | None = None, *, columns: Sequence[str] | None = None) -> Rows:
        """All rows of all runs, tombstones too, or of one. Raises OutputError for a run that is not there or retracted."""
        found = self._counting
        if run_id is not None:
            found = tuple(run for run in found if run.run_id == run_id)
            if not found and any(run.run_id == run_id for run in self._found):
                raise OutputError(
                    f"run {run_id} was retracted: its rows count nowhere; jobs/runs.py restore takes that back"
                )
            if not found:
                there = ", ".join(run.run_id for run in self._found)
                raise OutputError(f"{self.output} has no run {run_id!r}; it has {there}")
        schema = _schema(found, columns)
        scans = self._scans(found)
        return self._rows(schema, scans, scans.all_rows(schema.names))

    def boxes(self, *, columns: Sequence[str] | None = None) -> Rows:
        """One row per box of the newest ok rows: image_id, uri, run_id, width, height, x1, y1, x2, y2, label, label_name,
        score, then the manifest's own columns and the partitions.

        x1, y1, x2, y2 are pixels of the image as seen. An own column that is called like one of these (`label`, say)
        comes as `manifest_<name>`.
        """
        own = _own_names(column_names(self._counting))
        names = pick(columns, [*_BOX, *own])
        united = unite(self._counting, [own[name] for name in names if name in own])
        schema = pa.schema(
            [
                united.field(own[name]).with_name(name) if name in own else pa.field(name, _BOX[name][1])
                for name in names
            ]
        )
        scans = self._scans(self._counting)
        newest = scans.newest_rows([*_BOX_SOURCES, *united.names])
        return self._rows(
            schema,
            scans,
            f"(SELECT *, {_UNNESTED} FROM {newest} WHERE status = 'ok')",
            [quote(own[name]) if name in own else _BOX[name][0] for name in names],
        )

    def runs(self) -> Rows:
        """A row per run, oldest first, from the records alone: its state, what was asked, and what came out.

        ok, error, deleted, detections and finished_at are null for a run that did not end.
        """
        table = pa.Table.from_pylist([_record_row(self.output, run) for run in self._found], _RUNS_SCHEMA)
        return Rows(_RUNS_SCHEMA, self.output, lambda connection: connection.from_arrow(table))

    @property
    def _counting(self) -> tuple[CommittedRun, ...]:
        return tuple(run for run in self._found if run.counts)

    def _scans(self, found: Sequence[CommittedRun]) -> Scans:
        return Scans(tuple(run for run in found if run.files), self._listed)

    def _rows(self, schema: pa.Schema, scans: Scans, source: str, values: Sequence[str] | None = None) -> Rows:
        """The columns of `schema` from what stands after FROM; `values` are their expressions where not their names."""
        columns = zip(values or [quote(name) for name in schema.names], schema.names, strict=True)
        statement = f"SELECT {', '.join(f'{value} AS {quote(name)}' for value, name in columns)} FROM {source}"

        def query(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyRelation:
            if not scans.runs:
                return connection.from_arrow(schema.empty_table())
            if self._listed and not connection.filesystem_is_registered(self._listed.protocol):
                connection.register_filesystem(self._listed)
            return connection.sql(statement)

        return Rows(schema, self.output, query)


def _schema(found: Sequence[CommittedRun], columns: Sequence[str] | None) -> pa.Schema:
    return unite(found, pick(columns, column_names(found)))


def _own_names(names: Sequence[str]) -> dict[str, str]:
    """What the manifest's own columns are called beside those of a box -> their names."""
    own = [name for name in names if name not in DATA_SCHEMA.names]
    others = {name.casefold() for name in own}
    renamed = {}
    for name in own:
        shown = name
        while shown.casefold() in _BOX or (shown != name and shown.casefold() in others):
            shown = f"manifest_{shown}"
        renamed[shown] = name
    return renamed


def _record_row(output: str, run: CommittedRun) -> dict[str, Any]:
    record, success = run.record, run.success or {}
    try:
        return {
            "run_id": run.run_id,
            "state": run.state,
            "rows": record["num_rows"],
            "shards": record["num_shards"],
            "committed_shards": len(run.files),
            **{name: success[name] if run.success else None for name in ("ok", "error", "deleted", "detections")},
            **{name: record[name] for name in ("duplicates_dropped", "uris_refused", "partition_by", "request_digest")},
            "created_at": datetime.fromisoformat(record["created_at"]),
            "finished_at": datetime.fromisoformat(success["finished_at"]) if run.success else None,
            "sources": [source["uri"] for source in record["sources"]],
        }
    except (KeyError, TypeError, ValueError) as error:
        raise OutputError(f"the records in {run_folder(output, run.run_id)} are damaged: {error!r}") from error
