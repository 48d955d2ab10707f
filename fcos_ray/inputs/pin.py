"""Pin: a draft -> files whose row groups are the shards. Knows row groups, not what a manifest may hold.

pyarrow writes, because DuckDB's COPY cuts row groups in multiples of 2,048 whatever is asked (DuckDB 2.0).
"""

from __future__ import annotations

from typing import Final

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from fcos_ray import storage
from fcos_ray.errors import ManifestError
from fcos_ray.inputs.columns import DELETED, PARTITION, REFUSED
from fcos_ray.inputs.pinned_files import PinnedFile
from fcos_ray.inputs.plan import KNOWN_COLUMNS, Draft
from fcos_ray.inputs.scans import literal, quote

GROUPS_PER_FILE: Final = 64  # a footer costs 1.3 KB per row group of ten columns, and every shard's reader reads it
_FILE_BYTES: Final = 48 * 2**20  # below s3fs' multipart threshold
_SORTED_AT_ONCE: Final = 8_000_000  # rows; 10 million are sorted in 3 GB


def pin(draft: Draft, folder: str, *, temporary_folder: str | None = None) -> tuple[PinnedFile, ...]:
    """Write the pinned manifest under `folder`: one row group per shard, ordered by partition, then padded shape.

    `temporary_folder`: as in `storage.create`.
    """
    writer = _PinnedWriter(folder, draft, temporary_folder)
    names = [n for n in KNOWN_COLUMNS if n.startswith("content_") and _has_column(draft.connection, n)]
    known = "".join(f", CAST(m.{quote(n)} AS {KNOWN_COLUMNS[n]}) AS {quote(n)}" for n in names)
    carried = "".join(f", m.{quote(n)}" for n in draft.columns)
    joined = "LEFT JOIN manifest m ON m.rowid = p.number" if known or carried else ""
    for part in _parts(draft.connection):
        reader = draft.connection.sql(
            f"SELECT p.image_id, p.uri, p.{REFUSED}, p.{PARTITION}, p.deleted AS {DELETED}{known}{carried} "
            f"FROM planned p {joined} WHERE {part} ORDER BY p.{PARTITION}, p.shape, p.number"
        ).to_arrow_reader(65_536)
        for batch in reader:
            writer.add(batch)
    return writer.finish()


def _parts(connection: duckdb.DuckDBPyConnection) -> list[str]:
    """Conditions on `planned p` that cut the ordered rows into parts, one after the other, each small enough to be sorted.

    Sorting all of 100 million rows at once runs out of DuckDB's memory, although it sorts on disk (DuckDB 2.0, 3 GB).
    """
    found = connection.execute(
        f"WITH alike AS (SELECT {PARTITION} AS path, shape, count(*) AS n, min(number) AS first, max(number) AS last "
        "FROM planned GROUP BY ALL), "
        f"placed AS (SELECT *, (sum(n) OVER (ORDER BY path, shape) - 1) // {_SORTED_AT_ONCE} AS part FROM alike) "
        "SELECT min((path, shape)), max((path, shape)), sum(n), min(first), max(last) FROM placed "
        f"GROUP BY part, n > {_SORTED_AT_ONCE} ORDER BY 1"
    ).fetchall()
    parts = []
    for (path, shape), (last_path, last_shape), rows, first, last in found:
        start = f"(p.{PARTITION} > {literal(path)} OR p.{PARTITION} = {literal(path)} AND p.shape >= {shape})"
        end = f"(p.{PARTITION} < {literal(last_path)} OR p.{PARTITION} = {literal(last_path)} AND p.shape <= {last_shape})"
        alike = (path, shape) == (last_path, last_shape)
        pieces = -(-int(rows) // _SORTED_AT_ONCE) if alike else 1  # in the manifest's order then
        step = (last - first) // pieces + 1
        parts += [
            f"{start} AND {end} AND p.number BETWEEN {number} AND {number + step - 1}"
            for number in range(first, last + 1, step)
        ]
    return parts


def _has_column(connection: duckdb.DuckDBPyConnection, name: str) -> bool:
    return any(row[0] == name for row in connection.execute("DESCRIBE manifest").fetchall())


class _PinnedWriter:
    """Cuts an ordered stream of rows into row groups of the planned sizes, and row groups into files."""

    def __init__(self, folder: str, draft: Draft, temporary_folder: str | None) -> None:
        self._folder, self._temporary_folder = folder, temporary_folder
        self._types = draft.columns
        self._sizes = _shard_sizes(draft)
        self._waiting: list[pa.Table] = []
        self._sink: pa.BufferOutputStream | None = None
        self._parquet: pq.ParquetWriter | None = None
        self._rows: list[int] = []
        self._next_shard = 0
        self._files: list[PinnedFile] = []

    def add(self, batch: pa.RecordBatch) -> None:
        self._waiting.append(self._retyped(pa.Table.from_batches([batch])))
        while self._next_shard < len(self._sizes):
            size = self._sizes[self._next_shard]
            if sum(t.num_rows for t in self._waiting) < size:
                return
            table = pa.concat_tables(self._waiting)
            self._write_shard(table.slice(0, size))
            self._waiting = [table.slice(size)]

    def _retyped(self, table: pa.Table) -> pa.Table:
        return pa.table({f.name: self._column(table[f.name], f) for f in table.schema})

    def _column(self, values: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
        try:
            return values.cast(self._types.get(field.name, field.type))
        except pa.ArrowInvalid as error:  # the last milliseconds of int64 are DuckDB's ±infinity (2.0)
            raise ManifestError(
                f"column {field.name!r} holds a value that does not come back equal: {error}"
            ) from error

    def _write_shard(self, rows: pa.Table) -> None:
        if self._parquet is None:
            self._sink = pa.BufferOutputStream()
            self._parquet = pq.ParquetWriter(self._sink, rows.schema, compression="zstd", write_statistics=False)
        self._parquet.write_table(rows, row_group_size=max(rows.num_rows, 1))
        self._rows.append(rows.num_rows)
        self._next_shard += 1
        assert self._sink is not None
        if len(self._rows) == GROUPS_PER_FILE or self._sink.tell() > _FILE_BYTES:
            self._close_file()

    def _close_file(self) -> None:
        assert self._parquet is not None
        assert self._sink is not None
        self._parquet.close()
        name = f"{len(self._files):05d}.parquet"
        data = self._sink.getvalue().to_pybytes()
        storage.create(storage.join(self._folder, name), data, temporary_folder=self._temporary_folder)
        self._files.append(PinnedFile(name, self._next_shard - len(self._rows), tuple(self._rows)))
        self._parquet, self._sink, self._rows = None, None, []

    def finish(self) -> tuple[PinnedFile, ...]:
        if self._parquet is not None:
            self._close_file()
        assert self._next_shard == len(self._sizes), "rows of the stream and of the count differ"
        return tuple(self._files)


def _shard_sizes(draft: Draft) -> list[int]:
    sizes: list[int] = []
    for _, rows in draft.partitions:
        whole, rest = divmod(rows, draft.shard_rows)
        sizes += [draft.shard_rows] * whole + ([rest] if rest else [])
    return sizes
