"""Index: per run one sorted table of its images, what was labelled and what came out. What later runs are planned against.

Derived from the shard files, so it may be deleted and is made again. Sorted by image_id: a reader that wants a few ids
leaves out the row groups whose range has none of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fcos_ray import storage
from fcos_ray.errors import OutputError
from fcos_ray.outputs.commit import CONTENT_COLUMNS, committed_files, data_folder, is_damage
from fcos_ray.outputs.runs import list_forgotten, run_folder, temporary_folder
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
_SHARDS_KEY: Final = b"fcos_ray_shards"  # in the metadata: how many shard files it was made of

ReadPinned = Callable[[int], pa.Table]  # shard -> its pinned rows


def index_uri(output: str, run_id: str) -> str:
    return storage.join(run_folder(output, run_id), "index.parquet")


def ensure_index(
    output: str, run_id: str, read_pinned: ReadPinned, *, may_grow: bool = False, scratch: str | None = None
) -> storage.StoredFile:
    """The index of a run that is finished or abandoned; made from its shard files when it is not there.

    `may_grow`: of an abandoned run, where a driver that slept then may have committed more: made again if it lacks shards.
    It is kept beside the run, or in the folder `scratch` by a command that is to change nothing.
    Raises OutputError for a file that is none of the run's, StorageError when the store fails.
    """
    uri = index_uri(output, run_id)
    found = storage.stat_file(uri)
    if found is not None and may_grow and _num_shards(found) != len(committed_files(output, run_id)):
        found = None
        if scratch is None:
            storage.delete(uri)
    uri = uri if scratch is None or found is not None else storage.join(scratch, f"{run_id}.parquet")
    while found is None:
        forgotten = list_forgotten(output)
        with tempfile.TemporaryDirectory(prefix="fcos_ray-index-") as folder:
            path = _write_index(output, run_id, read_pinned, Path(folder))
            storage.publish(path, uri, temporary_folder=temporary_folder(output, run_id) if scratch is None else None)
        found = storage.stat_file(uri)
        if list_forgotten(output) != forgotten:  # files were rewritten meanwhile: it may hold what was taken out
            storage.delete(uri)
            found = None
    return found


def _num_shards(index: storage.StoredFile) -> int:
    """How many shard files an index was made of; -1 when it does not say or cannot be read."""
    try:
        with storage.open_for_reading(index.uri, found=index) as handle:
            return int(pq.ParquetFile(handle).metadata.metadata.get(_SHARDS_KEY, b"-1"))
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error):
            raise
        return -1


def _write_index(output: str, run_id: str, read_pinned: ReadPinned, folder: Path) -> Path:
    unsorted, path = folder / "unsorted.parquet", folder / "index.parquet"
    files = committed_files(output, run_id)
    base = storage.join(data_folder(output, run_id), "")
    with pq.ParquetWriter(unsorted, INDEX_SCHEMA, compression="lz4") as writer:
        for table in _tables(files, base, read_pinned):
            writer.write_table(table)
    connection = duckdb.connect(config={"temp_directory": str(folder), "memory_limit": _SORT_MEMORY})
    try:
        connection.execute("SET TimeZone = 'UTC'; SET enable_progress_bar = false")
        connection.execute(
            f"COPY (FROM read_parquet('{unsorted}') ORDER BY image_id) TO '{path}' "
            f"(FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {_GROUP_ROWS}, "
            f"KV_METADATA {{{_SHARDS_KEY.decode()}: '{len(files)}'}})"
        ).fetchall()
    finally:
        connection.close()
    return path


def _tables(files: Mapping[int, storage.StoredFile], base: str, read_pinned: ReadPinned) -> Iterator[pa.Table]:
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
            return pq.ParquetFile(handle).read(columns=["row", *names])

    try:
        rows = storage.retrying(f"reading {file.uri}", read)
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error):
            raise
        raise OutputError(f"{file.uri} cannot be read: {error}; jobs/audit.py names what is damaged") from error
    columns = {name: rows[name] for name in names} | {"partition": pa.repeat(partition, rows.num_rows)}
    pinned = read_pinned().take(rows["row"])  # rows that were forgotten are still planned, as nulls
    for name in CONTENT_COLUMNS:
        said = pinned[name].cast(rows[name].type) if name in pinned.column_names else None
        columns[SAID + name] = (
            pa.nulls(rows.num_rows, rows[name].type)
            if said is None
            else pc.if_else(pc.fill_null(pc.equal(said, rows[name]), False), None, said)
        )
    return pa.table([columns[name] for name in INDEX_SCHEMA.names], schema=INDEX_SCHEMA)
