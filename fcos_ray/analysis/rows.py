"""Rows: a query over an output, and the formats it comes in. Knows DuckDB, pandas and Ray, not what the rows mean.

Nothing is read before a `to_…` is called; each call reads anew.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import duckdb
import pyarrow as pa

from fcos_ray import storage
from fcos_ray.errors import OutputError
from fcos_ray.inputs.scans import store_failure

if TYPE_CHECKING:
    import pandas
    import ray.data

BATCH_ROWS: Final = 32_768  # some 20 to 60 MB of rows with boxes; a multiple of DuckDB's 2,048


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows that can be had in several formats, in no particular order."""

    schema: pa.Schema
    source: str  # the output they come from
    query: Callable[[duckdb.DuckDBPyConnection], duckdb.DuckDBPyRelation] = field(repr=False)

    def to_duckdb(self, connection: duckdb.DuckDBPyConnection | None = None) -> duckdb.DuckDBPyRelation:
        """A relation to query further, on `connection` and under its settings.

        Without one it gets a connection of its own, that spills to the system's temporary folder what exceeds DuckDB's
        memory limit (80 % of the machine's).
        """
        return self.query(_connect() if connection is None else connection)

    def to_batches(self, *, max_rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
        """A stream of record batches with `schema`, for more rows than memory holds. Raises OutputError, StorageError."""
        try:
            for batch in self.to_duckdb().to_arrow_reader(max_rows):
                yield batch.cast(self.schema)
        except (duckdb.Error, OSError) as error:  # Arrow's reader hands on as OSError what DuckDB raises in mid-stream
            unreadable = OutputError(f"{self.source} cannot be read: {storage.without_userinfo(str(error))}")
            raise store_failure(error) or unreadable from error

    def to_arrow(self) -> pa.Table:
        """All rows in memory, every type as the job wrote it. Raises OutputError, StorageError."""
        return pa.Table.from_batches(self.to_batches(), self.schema)

    def to_pandas(self) -> pandas.DataFrame:
        """All rows in memory. Integers and booleans are pandas' nullable types, since NaN would make floats of them."""
        import pandas

        nullable = {
            pa.int8(): pandas.Int8Dtype(), pa.int16(): pandas.Int16Dtype(), pa.int32(): pandas.Int32Dtype(),
            pa.int64(): pandas.Int64Dtype(), pa.uint8(): pandas.UInt8Dtype(), pa.uint16(): pandas.UInt16Dtype(),
            pa.uint32(): pandas.UInt32Dtype(), pa.uint64(): pandas.UInt64Dtype(), pa.bool_(): pandas.BooleanDtype(),
        }  # fmt: skip
        return self.to_arrow().to_pandas(types_mapper=nullable.get)

    def to_ray(self) -> ray.data.Dataset:
        """A Ray dataset on the session there is, or on one that Ray starts.

        The rows stream through this process, one batch at a time, into Ray's object store, which spills to disk when it
        is full: no folder is needed that every node sees, and nothing is written beside the output. For more than
        the head node's disk holds, read `detections/` with `ray.data.read_parquet` instead.
        """
        import ray

        blocks: list[Any] = [ray.put(pa.Table.from_batches([batch])) for batch in self.to_batches()]
        return ray.data.from_arrow_refs(blocks) if blocks else ray.data.from_arrow(self.schema.empty_table())


def _connect() -> duckdb.DuckDBPyConnection:
    settings: dict[str, Any] = {
        # DuckDB makes the folder when it spills and removes it at the end; its default is the working directory.
        "temp_directory": str(Path(tempfile.gettempdir()) / f"fcos_ray-analysis-{uuid.uuid4().hex[:12]}"),
        "preserve_insertion_order": False,  # keeping it holds whole results back in memory
    }
    connection = duckdb.connect(config=settings)
    connection.execute("SET TimeZone = 'UTC'; SET enable_progress_bar = false")
    return connection
