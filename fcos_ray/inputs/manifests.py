"""Manifest files -> one DuckDB table. Knows where files lie and which columns they hold, not what a plan makes of them."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import duckdb
import pyarrow as pa

from fcos_ray import storage
from fcos_ray.errors import ManifestError
from fcos_ray.inputs.columns import check_names, merge, same_kind
from fcos_ray.inputs.formats import format_of, scan
from fcos_ray.inputs.scans import FILE, Scan, quote, unreadable


@dataclass(frozen=True, slots=True)
class Source:
    """One manifest file."""

    uri: str
    num_bytes: int
    version: str
    format: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """The table `manifest`."""

    types: dict[str, pa.DataType]  # its columns, in the manifests' order
    names: tuple[str, ...]  # every column of the files, also those left out


def find_sources(patterns: Sequence[str]) -> list[Source]:
    """The manifest files that paths, uris and globs name, each once, in order. Raises ManifestError."""
    sources: dict[str, Source] = {}
    for pattern in patterns:
        shown = storage.without_secrets(pattern)
        try:
            files = storage.expand(pattern)
        except storage.InvalidUri as error:
            raise ManifestError(f"manifest {shown!r} is not a uri that can be read: {error}") from error
        except PermissionError as error:
            raise ManifestError(f"manifest {shown} may not be read: {storage.describe(error)}") from error
        except OSError as error:  # a bucket that is not there, a name the disk cannot hold
            raise ManifestError(f"manifest {shown} cannot be read: {storage.describe(error)}") from error
        if not files:
            raise ManifestError(
                f"manifest {shown}: no such file; wanted a file, an s3:// uri, or a pattern such as folder/*.parquet"
            )
        for file in files:
            sources[file.uri] = Source(file.uri, file.num_bytes, file.version, format_of(file.uri))
    return list(sources.values())


def load(
    connection: duckdb.DuckDBPyConnection,
    sources: Sequence[Source],
    *,
    rename: Mapping[str, str],
    limit: int | None,
    keep: Collection[str] | None = None,
) -> Loaded:
    """Create the table `manifest`: the files' columns, renamed, and FILE; rowid is the row's place over all files.

    `keep` names the columns to load, as they are called after renaming; None loads all. Raises ManifestError naming
    file and column.
    """
    _register_filesystems(connection, sources)

    def wanted(name: str) -> bool:
        return keep is None or rename.get(name, name) in keep

    names: dict[str, str] = {}  # as in the files -> as renamed
    selects: list[str] = []
    scans: list[Scan] = []
    merged: dict[str, tuple[pa.DataType, str]] = {}
    for format_name, group in groupby(sources, key=lambda s: s.format):
        for found in scan(connection, format_name, [source.uri for source in group], wanted):
            scans.append(found)
            renamed = {name: rename.get(name, name) for name in found.names}
            _check_renamed(found.uris[0], renamed)
            names |= renamed
            merge(merged, {renamed[name]: type_ for name, type_ in found.columns.items()}, found.uris[0])
            chosen = [f"{quote(name)} AS {quote(renamed[name])}" for name in found.columns]
            selects.append(f"SELECT {', '.join([*chosen, FILE])} FROM {found.sql}")
    if missing := [old for old in rename if old not in names]:
        raise ManifestError(f"{unknown_column(missing[0], names)}; it was to become {rename[missing[0]]!r}")
    tail = f" LIMIT {limit}" if limit else ""
    try:
        connection.execute(f"CREATE TABLE manifest AS ({' UNION ALL BY NAME '.join(selects)}){tail}").fetchall()
    except duckdb.Error as error:
        raise unreadable(error, [source.uri for source in sources], column=_culprit(connection, scans)) from error
    types = {name: type_ for name, (type_, _) in merged.items()}
    read = connection.sql("SELECT * FROM manifest LIMIT 0").to_arrow_table().schema
    for name, type_ in types.items():
        if not same_kind(type_, read.field(name).type):
            raise ManifestError(
                f"{merged[name][1]}: column {name!r} is {type_} to pyarrow and {read.field(name).type} to DuckDB; "
                "convert it, for example to string, or leave it out with --columns"
            )
    return Loaded(types, tuple(dict.fromkeys(names.values())))


def _culprit(connection: duckdb.DuckDBPyConnection, scans: Sequence[Scan]) -> str | None:
    """The first column that cannot be read where others can: DuckDB names none (2.0)."""

    def fails(found: Scan, name: str) -> bool:
        try:
            # bit_xor: all values must be made, none kept
            connection.execute(f"SELECT bit_xor(hash({quote(name)})) FROM {found.sql}").fetchall()
        except duckdb.Error:
            return True
        return False

    for found in scans:
        failing = [name for name in found.columns if fails(found, name)]
        if failing and len(failing) < len(found.columns):
            return failing[0]
    return None


def _check_renamed(uri: str, renamed: Mapping[str, str]) -> None:
    """Raise ManifestError where renaming gives two columns names that cannot stand side by side."""
    try:
        check_names(uri, renamed.values())
    except ManifestError as error:
        asked = {old: new for old, new in renamed.items() if old != new}
        kept = [new for new in asked.values() if new in renamed]
        hint = f"; --rename {kept[0]}=<another name> keeps the file's own" if kept else ""
        listed = ", ".join(f"{old}={new}" for old, new in asked.items())
        raise ManifestError(f"--rename {listed}: {error}{hint}") from error


def unknown_column(name: str, columns: Iterable[str]) -> str:
    """Words for a column that is not there."""
    nearest = difflib.get_close_matches(name, list(columns), n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"no column {name!r} in the manifest; it has {', '.join(sorted(columns)) or 'no columns'}{hint}"


def _register_filesystems(connection: duckdb.DuckDBPyConnection, sources: Sequence[Source]) -> None:
    """Let DuckDB read the sources where they lie; only them, and as they were found."""
    by_scheme: dict[str, list[storage.StoredFile]] = {}
    for source in sources:
        found = storage.StoredFile(source.uri, source.num_bytes, source.version)
        by_scheme.setdefault(storage.parse_uri(source.uri).scheme, []).append(found)
    for scheme, files in by_scheme.items():
        if scheme != "file":
            connection.register_filesystem(storage.ListedFiles(files, scheme=scheme))
