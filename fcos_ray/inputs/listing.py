"""Listing: a folder or bucket -> a manifest. Knows names, sizes and times of files, and pixels only as headers say them.

Files are listed and probed in no order and spooled to disk; DuckDB then sorts them out of core, so that the same folder
gives the same manifest, and memory does not grow with it.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fcos_ray import storage
from fcos_ray.errors import FetchError, ManifestError, OutputError
from fcos_ray.inputs.columns import check_names
from fcos_ray.inputs.decode import Size, probe
from fcos_ray.inputs.fetch import FetchPolicy, fetch_many
from fcos_ray.inputs.names import IMAGE_GLOBS, Names, hive_values
from fcos_ray.inputs.scans import literal

logger = logging.getLogger("fcos_ray")

_SCHEMA: Final = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("content_bytes", pa.int64(), nullable=False),
        pa.field("content_etag", pa.string()),
        pa.field("content_last_modified", pa.timestamp("us", "UTC")),
    ]
)
_BATCH_ROWS: Final = 16_384
_GROUP_ROWS: Final = 65_536
_HEAD_BYTES: Final = (2**16, 2**20)  # the second for those whose header lies behind more, such as EXIF with a preview
_MAX_KEYS: Final = 64  # more are no partitions but names with = in them
_SORT_MEMORY: Final = "256MB"
_LOG_SECONDS: Final = 10
_NO_FILE: Final = "there is no file in it"


@dataclass(frozen=True, slots=True)
class ListingSettings:
    """Which files become rows, and what is found out about them."""

    include: tuple[str, ...] = IMAGE_GLOBS
    exclude: tuple[str, ...] = ()
    probe_size: bool = False
    overwrite: bool = False  # replace an output that is there


@dataclass(frozen=True, slots=True)
class ListingSummary:
    """What a listing found. The last line on stdout is this as JSON."""

    output: str
    rows: int
    bytes: int  # of the images
    skipped: int  # files that the globs leave out
    refused: int  # files whose names no manifest can hold
    unprobed: int  # rows whose width and height were to be read and are null
    seconds: float


def write_listing(folder: str, output: str, settings: ListingSettings | None = None) -> ListingSummary:
    """List a local folder or an S3 prefix into a Parquet manifest at `output`, which appears whole or not at all.

    Rows are ordered by image_id, the path below `folder`; folders named key=value become columns of strings. Raises
    ManifestError for what cannot be listed, OutputError for what cannot be written, StorageError for an outage.
    """
    settings, started = settings or ListingSettings(), time.monotonic()
    _check_output(output, settings)
    with tempfile.TemporaryDirectory(prefix="fcos_ray-listing-") as scratch:
        spool, manifest = Path(scratch) / "spool.parquet", Path(scratch) / "manifest.parquet"
        listing = _Listing(_root(folder), settings)
        with pq.ParquetWriter(spool, _SCHEMA, compression="lz4") as writer:
            for files in listing.matching():
                writer.write_table(listing.rows(files))
        _sort(spool, manifest, base=listing.base, keys=listing.keys())
        with _output_errors(output):
            if not storage.publish(manifest, output, overwrite=settings.overwrite):
                raise OutputError(_there_already(output))
    return listing.summary(output, time.monotonic() - started)


def _check_output(output: str, settings: ListingSettings) -> None:
    if not output.endswith(".parquet"):
        raise OutputError(f"output {storage.without_secrets(output)}: wanted a name that ends in .parquet")
    with _output_errors(output):
        if not settings.overwrite and storage.exists(output):
            raise OutputError(_there_already(output))


def _there_already(output: str) -> str:
    return f"output {output} is there already; --overwrite replaces it, or name a new file, with the day in it say"


@contextmanager
def _output_errors(output: str) -> Iterator[None]:
    try:
        yield
    except storage.InvalidUri as error:
        raise OutputError(f"output {storage.without_secrets(output)} is not a uri: {error}") from error
    except storage.STORE_ERRORS as error:
        raise OutputError(f"output {output} cannot be written: {storage.describe(error)}") from error


def _root(folder: str) -> str:
    """The one spelling of the folder. Raises ManifestError."""
    try:
        location = storage.parse_uri(folder)
    except storage.InvalidUri as error:
        raise ManifestError(f"input {storage.without_secrets(folder)!r} is not a uri: {error}") from error
    if location.scheme not in ("file", "s3"):
        shown = storage.without_secrets(folder)
        raise ManifestError(f"input {shown}: wanted a local folder or an s3:// prefix, got {location.scheme}://")
    return location.uri


class _Listing:
    """What is found while it goes on: counts, and the keys of key=value folders."""

    def __init__(self, root: str, settings: ListingSettings) -> None:
        self._root, self._settings = root, settings
        self.base = root.rstrip("/") + "/"
        self._names = Names(settings.include, settings.exclude, root=root)
        self._keys: set[str] = set()
        self._rows = self._bytes = self._skipped = self._refused = self._unprobed = 0

    def matching(self) -> Iterator[list[storage.StoredFile]]:
        """The files that become rows, in batches. Raises ManifestError, also when there are none."""
        waiting: list[storage.StoredFile] = []
        logged = time.monotonic()
        for files in self._scanned():
            fitting = [file for file in files if self._names.fits(file.uri[len(self.base) :])]
            self._skipped += len(files) - len(fitting)
            waiting += (file for file in fitting if self._is_sayable(file.uri))
            if len(waiting) >= _BATCH_ROWS:
                yield waiting
                waiting = []
            if time.monotonic() - logged > _LOG_SECONDS:
                logger.info("%s: %s images, %s other files so far", self._root, f"{self._rows:,}", f"{self._skipped:,}")
                logged = time.monotonic()
        yield waiting
        if not self._rows:
            why = f"none of its {self._skipped:,} files fits --include and --exclude" if self._skipped else _NO_FILE
            raise ManifestError(f"input {self._root}: {why}; wanted {', '.join(self._settings.include)}")

    def _scanned(self) -> Iterator[list[storage.StoredFile]]:
        try:
            yield from storage.scan_files(self._root)
        except NotADirectoryError as error:
            raise ManifestError(f"input {self._root} is a file; wanted the folder it lies in") from error
        except FileNotFoundError as error:
            raise ManifestError(f"input {self._root}: there is no such folder or bucket") from error
        except storage.STORE_ERRORS as error:
            raise ManifestError(f"input {self._root} cannot be listed: {storage.describe(error)}") from error

    def _is_sayable(self, uri: str) -> bool:
        reason = self._names.reason_to_refuse(uri)
        if reason is not None:
            self._refused += 1
            logger.warning("left out %s: %s", ascii(uri), reason)
        return reason is None

    def rows(self, files: list[storage.StoredFile]) -> pa.Table:
        """Files as rows of _SCHEMA, probed if that was asked for."""
        sizes = self._probed(files) if self._settings.probe_size else [None] * len(files)
        ids = [file.uri[len(self.base) :] for file in files]
        in_s3 = self.base.startswith("s3://")
        self._keys.update(*(_values(image_id.rpartition("/")[0]) for image_id in ids))
        if len(self._keys) > _MAX_KEYS:
            some = ", ".join(sorted(self._keys)[:3])
            raise ManifestError(
                f"input {self._root}: folders make more than {_MAX_KEYS} partition columns ({some}, …); list them apart"
            )
        self._rows += len(files)
        self._bytes += sum(file.num_bytes for file in files)
        columns: list[list[Any]] = [
            ids,
            [size and size.width for size in sizes],
            [size and size.height for size in sizes],
            [file.num_bytes for file in files],
            [file.version if in_s3 else None for file in files],
            [file.last_modified for file in files],
        ]
        return pa.table(columns, schema=_SCHEMA)

    def _probed(self, files: list[storage.StoredFile]) -> list[Size | None]:
        sizes: list[Size | None] = [None] * len(files)
        todo = [index for index, file in enumerate(files) if file.num_bytes]
        for head_bytes in _HEAD_BYTES:
            policy = FetchPolicy(
                allow_roots=self._names.allow_roots, head_bytes=head_bytes, max_attempts=4, concurrency=64,
                timeout_seconds=15, deadline_seconds=60,
            )  # fmt: skip
            cut = []
            for place, head in fetch_many([files[index].uri for index in todo], policy):
                if isinstance(head, FetchError):
                    continue
                index = todo[place]
                sizes[index] = probe(head.data)
                if sizes[index] is None and files[index].num_bytes > head_bytes:
                    cut.append(index)
            todo = cut
        self._unprobed += sizes.count(None)
        return sizes

    def keys(self) -> list[str]:
        """The names of the partition columns. Raises ManifestError where two differ in case only."""
        own = {*_SCHEMA.names, "uri", "content_sha256"}
        clashing = sorted(key for key in self._keys if key.casefold() in own)  # DuckDB ignores case
        if clashing:
            logger.warning("folders named %s=… give no column: the manifest has one of that name", clashing[0])
        keys = sorted(self._keys.difference(clashing))
        check_names(self._root, keys)
        return keys

    def summary(self, output: str, seconds: float) -> ListingSummary:
        counts = (self._rows, self._bytes, self._skipped, self._refused, self._unprobed)
        return ListingSummary(output, *counts, seconds=round(seconds, 3))


@lru_cache(10_000)
def _values(folder: str) -> dict[str, str | None]:
    return hive_values(folder)


def _sort(spool: Path, manifest: Path, *, base: str, keys: list[str]) -> None:
    """Spooled rows -> the manifest, ordered by image_id."""
    with duckdb.connect(
        config={"temp_directory": str(spool.parent), "memory_limit": _SORT_MEMORY, "threads": 4}
    ) as connection:
        connection.execute("SET TimeZone = 'UTC'; SET enable_progress_bar = false")
        rows = connection.sql(f"SELECT * FROM read_parquet({literal(str(spool))}) ORDER BY image_id")
        reader = rows.to_arrow_reader(_GROUP_ROWS)
        writer = None
        for batch in reader:
            table = _with_columns(pa.Table.from_batches([batch]).cast(_SCHEMA), base=base, keys=keys)
            writer = writer or pq.ParquetWriter(manifest, table.schema, compression="zstd")
            writer.write_table(table)
        assert writer is not None, "a listing has rows"
        writer.close()


def _with_columns(table: pa.Table, *, base: str, keys: list[str]) -> pa.Table:
    """The columns that image_id and `base` say: uri, and a string for each key=value folder."""
    ids = table["image_id"]
    columns: dict[str, Any] = {"uri": pc.binary_join_element_wise(pa.scalar(base), ids, ""), "image_id": ids}
    if keys:
        values = [_values(image_id.rpartition("/")[0]) for image_id in ids.to_pylist()]
        columns |= {key: pa.array([found.get(key) for found in values], pa.string()) for key in keys}
    columns |= {name: table[name] for name in _SCHEMA.names if name not in columns}
    return pa.table(columns)
