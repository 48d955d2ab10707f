"""Manifest files -> one DuckDB table. Knows file formats and column types, not what the columns mean to a plan.

Values come out equal to what the files hold or are refused by name: CSV and text columns stay strings, JSON strings
stay strings (no guessing of dates), Parquet columns keep their Arrow types.
"""

from __future__ import annotations

import difflib
import json
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from fcos_ray import storage
from fcos_ray.errors import ManifestError

FILE = "__file"  # column of the table `manifest`: the uri of the file a row came from

_FORMATS: Final = {
    ".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl",
    ".txt": "text", ".lst": "text",
}  # fmt: skip
_COMPRESSIONS: Final = (".gz", ".zst")
# Arrow types that DuckDB hands back with every value equal (measured with DuckDB 2.0; DESIGN §3).
_EXACT: Final = (
    pa.types.is_boolean, pa.types.is_integer, pa.types.is_float32, pa.types.is_float64, pa.types.is_string,
    pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary,
    pa.types.is_decimal128, pa.types.is_date32,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Source:
    """One manifest file."""

    uri: str
    num_bytes: int
    version: str
    format: str


def find_sources(patterns: Sequence[str]) -> list[Source]:
    """The manifest files that paths, uris and globs name, each once, in order. Raises ManifestError."""
    sources: dict[str, Source] = {}
    for pattern in patterns:
        try:
            files = storage.expand(pattern)
        except storage.InvalidUri as error:
            raise ManifestError(f"manifest {pattern!r} is not a uri that can be read: {error}") from error
        except PermissionError as error:
            raise ManifestError(f"manifest {pattern} may not be read: {error}") from error
        if not files:
            raise ManifestError(f"manifest {pattern}: no such file (wanted a path, an s3:// uri or a glob)")
        for file in files:
            sources[file.uri] = Source(file.uri, file.num_bytes, file.version, _format_of(file.uri))
    return list(sources.values())


def _format_of(uri: str) -> str:
    stem, extension = posixpath.splitext(uri.lower())
    if extension in _COMPRESSIONS:
        extension = posixpath.splitext(stem)[1]
    if extension not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise ManifestError(
            f"manifest {uri}: format unknown; wanted a name that ends in {known} (or one with .gz, .zst)"
        )
    return _FORMATS[extension]


def quote(name: str) -> str:
    """A column name for SQL."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A string for SQL."""
    return "'" + text.replace("'", "''") + "'"


def load(
    connection: duckdb.DuckDBPyConnection, sources: Sequence[Source], *, rename: Mapping[str, str], limit: int | None
) -> dict[str, pa.DataType]:
    """Create the table `manifest`: the files' columns, renamed, and FILE; rowid is the row's place over all files.

    Returns the Arrow type of each column. Raises ManifestError naming file and column.
    """
    _register_filesystems(connection, sources)
    selects: list[str] = []
    merged: dict[str, tuple[pa.DataType, str]] = {}
    seen: set[str] = set()
    for format_name, group in groupby(sources, key=lambda s: s.format):
        files = list(group)
        columns, scan = _READERS[format_name](connection, files)
        seen |= columns.keys()
        renamed = {rename.get(name, name): name for name in columns}
        if len(renamed) < len(columns):
            raise ManifestError(f"{files[0].uri}: --rename gives two columns the same name: {sorted(rename.values())}")
        _merge(merged, {new: columns[old] for new, old in renamed.items()}, files[0].uri)
        chosen = ", ".join(f"{quote(old)} AS {quote(new)}" for new, old in renamed.items())
        selects.append(f"SELECT {chosen}, {FILE} FROM {scan}")
    if missing := [old for old in rename if old not in seen]:
        raise ManifestError(f"--rename: {unknown_column(missing[0], seen)}")
    tail = f" LIMIT {limit}" if limit else ""
    run(connection, f"CREATE TABLE manifest AS ({' UNION ALL BY NAME '.join(selects)}){tail}", sources)
    return {name: type_ for name, (type_, _) in merged.items()}


def unknown_column(name: str, columns: Iterable[str]) -> str:
    """Words for a column that is not there."""
    nearest = difflib.get_close_matches(name, list(columns), n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"no column {name!r} in the manifest; it has {', '.join(sorted(columns))}{hint}"


def run(connection: duckdb.DuckDBPyConnection, sql: str, sources: Sequence[Source]) -> None:
    """Execute a statement that reads manifest files. Raises ManifestError with DuckDB's words about file and line."""
    try:
        connection.execute(sql)
    except duckdb.Error as error:
        raise _unreadable(error, sources) from error


def _unreadable(error: Exception, sources: Sequence[Source]) -> ManifestError:
    named = [s.uri for s in sources if s.uri in str(error)] or [sources[0].uri if len(sources) == 1 else "a manifest"]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ManifestError(f"{named[0]} cannot be read: {' '.join(lines)[:500]}")


def _register_filesystems(connection: duckdb.DuckDBPyConnection, sources: Sequence[Source]) -> None:
    by_scheme = {storage.parse_uri(s.uri).scheme: s.uri for s in sources}
    for scheme, uri in by_scheme.items():
        if scheme != "file":
            connection.register_filesystem(storage.filesystem(uri)[0])


def _merge(merged: dict[str, tuple[pa.DataType, str]], columns: Mapping[str, pa.DataType], uri: str) -> None:
    """Unite columns by name. Raises ManifestError where one name has two types, or two names differ in case only."""
    folded = {name.casefold(): name for name in merged}
    for name, type_ in columns.items():
        if folded.setdefault(name.casefold(), name) != name:
            other = folded[name.casefold()]
            raise ManifestError(
                f"{uri}: columns {other!r} and {name!r} differ in case only; --rename {name}=… one of them"
            )
        known, where = merged.setdefault(name, (type_, uri))
        if known != type_:
            raise ManifestError(f"column {name!r} is {known} in {where} but {type_} in {uri}; wanted one type")


def _list(files: Sequence[Source]) -> str:
    return "[" + ", ".join(literal(f.uri) for f in files) + "]"


def _read_parquet(_: duckdb.DuckDBPyConnection, files: Sequence[Source]) -> tuple[dict[str, pa.DataType], str]:
    def schema_of(source: Source) -> pa.Schema:
        try:
            with storage.open_for_reading(source.uri) as file:
                return pq.read_schema(file)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(error, [source]) from error

    merged: dict[str, tuple[pa.DataType, str]] = {}
    with ThreadPoolExecutor(16) as pool:
        for source, schema in zip(files, pool.map(schema_of, files), strict=True):
            if doubled := {name for name in schema.names if schema.names.count(name) > 1}:
                raise ManifestError(f"{source.uri}: column {doubled.pop()!r} stands there twice")
            for field in schema:
                if not _is_exact(field.type):
                    raise ManifestError(
                        f"{source.uri}: column {field.name!r} has type {field.type}, which would lose something on the "
                        "way; convert it, for example to string"
                    )
            _merge(merged, {field.name: _plain(field.type) for field in schema}, source.uri)
    scan = f"read_parquet({_list(files)}, filename={literal(FILE)}, union_by_name=true, hive_partitioning=false)"
    return {name: type_ for name, (type_, _) in merged.items()}, scan


def _is_exact(type_: pa.DataType) -> bool:
    if pa.types.is_dictionary(type_):
        return _is_exact(type_.value_type)
    if pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_):
        return _is_exact(type_.value_type)
    if pa.types.is_struct(type_):
        return all(_is_exact(type_.field(i).type) for i in range(type_.num_fields))
    if pa.types.is_timestamp(type_):
        return type_.tz is None or type_.unit != "ns"  # zoned nanoseconds come back as microseconds
    if pa.types.is_time(type_):
        return str(type_.unit) != "ns"
    return any(check(type_) for check in _EXACT)


def _plain(type_: pa.DataType) -> pa.DataType:
    """Dictionary encoding is the writer's affair, not the values'."""
    return type_.value_type if pa.types.is_dictionary(type_) else type_


def _read_delimited(
    connection: duckdb.DuckDBPyConnection, files: Sequence[Source], delimiter: str
) -> tuple[dict[str, pa.DataType], str]:
    # Guessed types would turn the id 007 into 7: everything stays a string.
    scan = (
        f"read_csv({_list(files)}, all_varchar=true, header=true, delim={literal(delimiter)}, quote='\"', escape='\"', "
        f"comment='', filename={literal(FILE)}, union_by_name=true, hive_partitioning=false, max_line_size=16777216)"
    )
    try:
        described = connection.execute(f"DESCRIBE SELECT * FROM {scan}").fetchall()
    except duckdb.Error as error:
        raise _unreadable(error, files) from error
    return {row[0]: pa.string() for row in described if row[0] != FILE}, scan


def _read_text(_: duckdb.DuckDBPyConnection, files: Sequence[Source]) -> tuple[dict[str, pa.DataType], str]:
    scan = (
        f"read_csv({_list(files)}, columns={{'uri': 'VARCHAR'}}, delim='\x01', quote='', escape='', comment='', "
        f"header=false, auto_detect=false, filename={literal(FILE)}, hive_partitioning=false)"
    )
    return {"uri": pa.string()}, scan


def _read_jsonl(connection: duckdb.DuckDBPyConnection, files: Sequence[Source]) -> tuple[dict[str, pa.DataType], str]:
    objects = f"read_ndjson_objects({_list(files)}, filename={literal(FILE)}, maximum_object_size=16777216)"
    try:
        found = connection.execute(f"SELECT json_group_structure(json)::VARCHAR FROM {objects}").fetchone()
    except duckdb.Error as error:
        raise _unreadable(error, files) from error
    structure = json.loads(found[0]) if found and found[0] else {}
    if not isinstance(structure, dict):
        raise ManifestError(f"{files[0].uri}: wanted one JSON object per line, got {found[0] if found else 'nothing'}")
    _check_json(connection, objects, structure, files)
    # Unsigned integers are strangers to Spark and pandas; the strict transform below refuses what does not fit.
    text = json.dumps(structure).replace('"UBIGINT"', '"BIGINT"')
    values = f"json_transform_strict(json, {literal(text)})"
    scan = f"(SELECT unnest({values}), {FILE} FROM {objects})"
    if not structure:
        return {}, scan
    schema = connection.sql(f"SELECT unnest(json_transform('{{}}', {literal(text)}))").to_arrow_table().schema
    return {field.name: field.type for field in schema}, scan


def _check_json(
    connection: duckdb.DuckDBPyConnection, objects: str, structure: dict[str, Any], files: Sequence[Source]
) -> None:
    """DuckDB reads integers beyond 64 bits, or mixed with fractions, as double: refuse what that would change."""
    for name, kind in structure.items():
        if '"JSON"' in json.dumps(kind):
            raise ManifestError(f"{files[0].uri}: column {name!r} holds values of several types; wanted one type")
        if '"DOUBLE"' not in json.dumps(kind):
            continue
        path = literal('$."' + name.replace('"', '""') + '"')
        found = connection.execute(
            f"SELECT {FILE}, value FROM (SELECT {FILE}, json_extract(json, {path})::VARCHAR AS value FROM {objects}) "
            "WHERE regexp_matches(value, '(^|[^0-9a-zA-Z_.\"])-?[0-9]{16,}($|[^0-9a-zA-Z_.\"])') LIMIT 1"
        ).fetchone()
        if found:
            raise ManifestError(
                f"{found[0]}: column {name!r} holds {found[1][:60]}, an integer that would lose digits; "
                "write it as a string"
            )


_READERS: Final = {
    "parquet": _read_parquet,
    "csv": lambda connection, files: _read_delimited(connection, files, ","),
    "tsv": lambda connection, files: _read_delimited(connection, files, "\t"),
    "jsonl": _read_jsonl,
    "text": _read_text,
}
