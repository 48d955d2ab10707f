"""Index: per run one sorted table of its images, what was labelled and what came out. What later runs are planned against.

Derived from the shard files, so it may be deleted and is made again. Sorted by image_id: a reader that wants a few ids
leaves out the row groups whose range has none of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fcos_ray import storage
from fcos_ray.errors import OutputError
from fcos_ray.outputs.commit import CONTENT_COLUMNS, committed_files, data_folder
from fcos_ray.outputs.runs import run_folder
from fcos_ray.outputs.schema import DATA_SCHEMA

SAID: Final = "said_"  # before a content column: what the manifest said of it, where that is not what was labelled
INDEX_SCHEMA: Final = pa.schema(
    [
        *(DATA_SCHEMA.field(name) for name in ("image_id", "uri", "status", "error_code", "error_transient")),
        pa.field("partition", pa.string(), nullable=False),  # the Hive path of its shard; "" where there is none
        *(DATA_SCHEMA.field(name) for name in CONTENT_COLUMNS),
        *(DATA_SCHEMA.field(name).with_name(SAID + name) for name in CONTENT_COLUMNS),
    ]
)
_AT_ONCE: Final = 64  # shard files asked for at a time: what they hold must not pile up
_SORT_MEMORY: Final = "2GB"  # then DuckDB sorts on disk
_GROUP_ROWS: Final = 122_880

ReadPinned = Callable[[int], pa.Table]  # shard -> its pinned rows


def index_uri(output: str, run_id: str) -> str:
    return storage.join(run_folder(output, run_id), "index.parquet")


def ensure_index(
    output: str, run_id: str, read_pinned: ReadPinned, *, scratch: str | None = None
) -> storage.StoredFile:
    """The index of a run that is finished or abandoned; made from its shard files when it is not there.

    It is kept beside the run, or in the folder `scratch` by a command that is to change nothing.
    Raises OutputError for a file that is none of the run's, StorageError when the store fails.
    """
    uri = index_uri(output, run_id)
    found = storage.stat_file(uri)
    if found is None:
        uri = uri if scratch is None else storage.join(scratch, f"{run_id}.parquet")
        with tempfile.TemporaryDirectory(prefix="fcos_ray-index-") as folder:
            storage.publish(_write_index(output, run_id, read_pinned, Path(folder)), uri)
        found = storage.stat_file(uri)
        assert found is not None, f"{uri} was written a moment ago"
    return found


def _write_index(output: str, run_id: str, read_pinned: ReadPinned, folder: Path) -> Path:
    unsorted, path = folder / "unsorted.parquet", folder / "index.parquet"
    with pq.ParquetWriter(unsorted, INDEX_SCHEMA, compression="lz4") as writer:
        for table in _tables(output, run_id, read_pinned):
            writer.write_table(table)
    connection = duckdb.connect(config={"temp_directory": str(folder), "memory_limit": _SORT_MEMORY})
    try:
        connection.execute("SET TimeZone = 'UTC'; SET enable_progress_bar = false")
        connection.execute(
            f"COPY (FROM read_parquet('{unsorted}') ORDER BY image_id) TO '{path}' "
            f"(FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {_GROUP_ROWS})"
        ).fetchall()
    finally:
        connection.close()
    return path


def _tables(output: str, run_id: str, read_pinned: ReadPinned) -> Iterator[pa.Table]:
    base = storage.join(data_folder(output, run_id), "")
    files = committed_files(output, run_id)
    shards = sorted(files)

    def read(shard: int) -> pa.Table:
        return _table(files[shard], files[shard].uri[len(base) :].rpartition("/")[0], lambda: read_pinned(shard))

    with ThreadPoolExecutor(16) as pool:
        for start in range(0, len(shards), _AT_ONCE):
            yield from pool.map(read, shards[start : start + _AT_ONCE])


def _table(file: storage.StoredFile, partition: str, read_pinned: Callable[[], pa.Table]) -> pa.Table:
    """INDEX_SCHEMA rows of one shard file."""
    names = [name for name in INDEX_SCHEMA.names if name in DATA_SCHEMA.names]

    def read() -> pa.Table:
        with storage.open_for_reading(file.uri, found=file) as handle:
            return pq.ParquetFile(handle).read(columns=names)

    try:
        rows = storage.retrying(f"reading {file.uri}", read)
    except (pa.ArrowException, OSError) as error:
        if not isinstance(error, pa.ArrowException) and error.errno is not None:
            raise  # the store's; Arrow raises an OSError without a number for damage (pyarrow 26)
        raise OutputError(f"{file.uri} cannot be read: {error}; jobs/audit.py names what is damaged") from error
    columns = {name: rows[name] for name in names} | {"partition": pa.repeat(partition, rows.num_rows)}
    pinned = read_pinned()
    pinned = pinned.filter(pc.is_valid(pinned["image_id"]))  # what was forgotten stands there as nulls
    for name in CONTENT_COLUMNS:
        said = pinned[name].cast(rows[name].type) if name in pinned.column_names else None
        columns[SAID + name] = (
            pa.nulls(rows.num_rows, rows[name].type)
            if said is None
            else pc.if_else(pc.fill_null(pc.equal(said, rows[name]), False), None, said)
        )
    return pa.table([columns[name] for name in INDEX_SCHEMA.names], schema=INDEX_SCHEMA)
