"""Retractions: which runs count nowhere, as a mark per run and as one table for readers that know no marks.

The marks decide. runs/retracted.parquet says the same to DuckDB, Spark and pandas: it is always there, also empty.
"""

from __future__ import annotations

import io
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from fcos_ray import storage
from fcos_ray.outputs import runs

_TABLE: Final = pa.schema([pa.field("run_id", pa.string(), nullable=False)])


def retracted_uri(output: str) -> str:
    return storage.join(output, "runs", "retracted.parquet")


def create_retracted(output: str) -> None:
    """Make the table of an output, if it is not there."""
    if not storage.exists(retracted_uri(output)):
        write_retracted(output)


def write_retracted(output: str) -> None:
    """Bring the table up to date with the marks.

    Whoever sets a mark looks after writing: of two at once, the last to write has seen both marks.
    """
    written: list[str] | None = None
    while (found := _retracted(output)) != written:
        sink = io.BytesIO()
        pq.write_table(pa.table({"run_id": pa.array(found, pa.string())}, schema=_TABLE), sink)
        storage.replace(retracted_uri(output), sink.getvalue())
        written = found


def read_retracted(output: str) -> list[str] | None:
    """The runs that the table names; None when it is not there."""
    try:
        table = pq.read_table(io.BytesIO(storage.read_bytes(retracted_uri(output))))
    except FileNotFoundError:
        return None
    return sorted(table["run_id"].to_pylist())


def _retracted(output: str) -> list[str]:
    return sorted(run.run_id for run in runs.list_runs(output) if run.state in ("retracted", "purged"))
