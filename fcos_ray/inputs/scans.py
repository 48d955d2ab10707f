"""Scans: what a reader of manifest files gives, and the words that all readers share. Knows DuckDB's SQL, no format."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Final, cast

import duckdb
import pyarrow as pa

from fcos_ray import storage
from fcos_ray.errors import ManifestError, StorageError

FILE: Final = "__file"  # column of every scan: the uri of the file a row came from
COMPRESSIONS: Final = {".gz": "gzip", ".zst": "zstd"}
LINE_BYTES: Final = 16 * 2**20  # of one row at most, in CSV and JSON


@dataclass(frozen=True, slots=True)
class Scan:
    """Files that one statement reads."""

    uris: tuple[str, ...]
    names: tuple[str, ...]  # every column of the files
    columns: dict[str, pa.DataType]  # the wanted ones, in the files' order
    sql: str  # stands after FROM; gives the columns and FILE


def quote(name: str) -> str:
    """A column name for SQL."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A string for SQL."""
    return "'" + text.replace("'", "''") + "'"


def uri_list(uris: Sequence[str]) -> str:
    """Uris for SQL, each naming itself: in local names DuckDB takes * ? [ for patterns; ListedFiles knows no patterns."""
    names = (re.sub(r"[*?\[]", r"[\g<0>]", uri) if uri.startswith("/") else uri for uri in uris)
    return "[" + ", ".join(map(literal, names)) + "]"


def count_rows(connection: duckdb.DuckDBPyConnection, sql: str) -> int:
    """The one number that a statement gives."""
    # All rows are taken: a result that is not read to its end blocks the connection's next query (DuckDB 2.0).
    return int(connection.execute(sql).fetchall()[0][0])


def opened(uri: str) -> IO[bytes]:
    """A manifest's bytes, decompressed where its name says so."""
    file = storage.open_for_reading(uri)
    compression = COMPRESSIONS.get(posixpath.splitext(uri.lower())[1])
    return cast("IO[bytes]", pa.CompressedInputStream(file, compression)) if compression else file


def unreadable(error: Exception, uris: Sequence[str], *, column: str | None = None) -> ManifestError | StorageError:
    """Which file cannot be read and why, in one line, without DuckDB's advice on options that nobody can set here."""
    if failed := store_failure(error):  # not the manifest's fault
        return failed
    text = str(error)
    named = max((uri for uri in uris if uri in text), key=len, default=uris[0] if len(uris) == 1 else "a manifest")
    kept = re.split(r"\n\s*(?:Possible|Try |LINE \d|file = )", text, maxsplit=1)[0]
    words = re.sub(r"^[A-Z]\w+( Input| Error)+: ", "", " ".join(kept.split()))
    what = f"{named}: column {column!r}" if column is not None else named
    return ManifestError(f"{what} cannot be read: {storage.without_userinfo(words)[:500]}")


def store_failure(error: Exception) -> StorageError | None:
    """The StorageError behind an error of DuckDB, which keeps of what a filesystem raised the traceback's text (2.0)."""
    found = re.search(r"^(?:\w+\.)*StorageError: (.*)", str(error), re.MULTILINE)
    return StorageError(found[1]) if found else None
