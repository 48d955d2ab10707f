"""Formats: manifest files of one format -> scans of them. Knows Parquet, CSV, TSV and text; JSON is in json_lines.py.

CSV and text columns stay strings, Parquet columns keep their Arrow types. DuckDB guesses nothing: its CSV sniffer skips
lines that do not fit and takes a later one for the header (DuckDB 2.0).
"""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Final, Literal

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from fcos_ray import storage
from fcos_ray.errors import ManifestError
from fcos_ray.inputs.columns import check_names, is_exact, merge, plain, why_not
from fcos_ray.inputs.json_lines import scan_json
from fcos_ray.inputs.scans import COMPRESSIONS, FILE, LINE_BYTES, Scan, literal, opened, unreadable, uri_list

_FORMATS: Final = {
    ".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl",
    ".json": "json", ".txt": "text", ".lst": "text",
}  # fmt: skip


def format_of(uri: str) -> str:
    """The format that a file's name says. Raises ManifestError."""
    stem, extension = posixpath.splitext(uri.lower())
    if extension in COMPRESSIONS:
        extension = posixpath.splitext(stem)[1]
    found = _FORMATS.get(extension)
    if found is None or (found == "parquet" and stem.endswith(extension)):
        known = ", ".join(_FORMATS)
        raise ManifestError(
            f"manifest {uri}: format unknown; wanted a name that ends in {known} (all but Parquet also with .gz or .zst)"
        )
    return found


def scan(
    connection: duckdb.DuckDBPyConnection, format_name: str, uris: Sequence[str], wanted: Callable[[str], bool]
) -> list[Scan]:
    """Look at files of one format, without reading their rows where the format allows it.

    Only columns that are `wanted` must have a type that comes out exact. Raises ManifestError naming file and column.
    """
    match format_name:
        case "parquet":
            scans = [_scan_parquet(uris, wanted)]
        case "jsonl" | "json":
            layout: Literal["lines", "array"] = "lines" if format_name == "jsonl" else "array"
            scans = [scan_json(connection, uris, wanted, layout=layout)]
        case "text":
            scans = [_scan_text(uris)]
        case _:
            scans = list(_scan_delimited(uris, wanted, delimiter="," if format_name == "csv" else "\t"))
    for found in scans:
        if FILE in found.names:
            raise ManifestError(f"{found.uris[0]}: a column may not be named {FILE!r}; name it otherwise in the file")
    return scans


def _scan_parquet(uris: Sequence[str], wanted: Callable[[str], bool]) -> Scan:
    def schema_of(uri: str) -> pa.Schema:
        try:
            with storage.open_for_reading(uri) as file:
                return pq.read_schema(file)
        except (pa.ArrowException, OSError) as error:
            raise unreadable(error, [uri]) from error

    names: dict[str, None] = {}
    merged: dict[str, tuple[pa.DataType, str]] = {}
    with ThreadPoolExecutor(16) as pool:
        for uri, schema in zip(uris, pool.map(schema_of, uris), strict=True):
            check_names(uri, schema.names)
            names |= dict.fromkeys(schema.names)
            check_names(uri, names)
            fields = [field for field in schema if wanted(field.name)]
            for field in fields:
                if not is_exact(field.type):
                    raise ManifestError(f"{uri}: column {field.name!r} has type {field.type}, {why_not(field.type)}")
            merge(merged, {field.name: plain(field.type) for field in fields}, uri)
    sql = f"read_parquet({uri_list(uris)}, filename={literal(FILE)}, union_by_name=true, hive_partitioning=false)"
    return Scan(tuple(uris), tuple(names), {name: type_ for name, (type_, _) in merged.items()}, sql)


def _scan_delimited(uris: Sequence[str], wanted: Callable[[str], bool], *, delimiter: str) -> Iterator[Scan]:
    """One scan per stretch of files with the same header line. Everything is a string: 007 must not become 7."""
    with ThreadPoolExecutor(16) as pool:
        headers = list(pool.map(lambda uri: _header(uri, delimiter), uris))
    for header, pairs in groupby(zip(headers, uris, strict=True), key=lambda pair: pair[0]):
        same = [uri for _, uri in pairs]
        columns = ", ".join(f"{literal(name)}: 'VARCHAR'" for name in header)
        sql = (
            f"read_csv({uri_list(same)}, columns={{{columns}}}, auto_detect=false, header=true, "
            f"delim={literal(delimiter)}, quote='\"', escape='\"', comment='', allow_quoted_nulls=false, "
            f"filename={literal(FILE)}, hive_partitioning=false, max_line_size={LINE_BYTES})"
        )
        yield Scan(tuple(same), header, {name: pa.string() for name in header if wanted(name)}, sql)


def _header(uri: str, delimiter: str) -> tuple[str, ...]:
    try:
        with opened(uri) as file:
            text = io.TextIOWrapper(file, "utf-8-sig", newline="")
            names = [name.strip() for name in next(csv.reader(text, delimiter=delimiter, strict=True), [])]
    except UnicodeDecodeError as error:
        raise ManifestError(f"{uri} cannot be read: wanted UTF-8, got byte {error.object[error.start]:#04x}") from error
    except (pa.ArrowException, OSError, csv.Error) as error:
        raise unreadable(error, [uri]) from error
    if not any(names):
        raise ManifestError(f"{uri}: the first line is empty; wanted the names of the columns")
    check_names(uri, names)
    return tuple(names)


def _scan_text(uris: Sequence[str]) -> Scan:
    sql = (
        f"read_csv({uri_list(uris)}, columns={{'uri': 'VARCHAR'}}, delim='\x01', quote='', escape='', comment='', "
        f"header=false, auto_detect=false, filename={literal(FILE)}, hive_partitioning=false)"
    )
    return Scan(tuple(uris), ("uri",), {"uri": pa.string()}, sql)
