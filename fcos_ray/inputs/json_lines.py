"""JSON lines and arrays -> a scan. One type per column, found over all rows; strings stay strings (no guessing of dates)."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Literal, cast

import duckdb
import pyarrow as pa

from fcos_ray import storage
from fcos_ray.errors import ManifestError, StorageError
from fcos_ray.inputs.columns import check_names
from fcos_ray.inputs.json_arrays import bad_array
from fcos_ray.inputs.scans import FILE, LINE_BYTES, Scan, literal, opened, unreadable, uri_list

_INT64: Final = range(-(2**63), 2**63)


def scan_json(
    connection: duckdb.DuckDBPyConnection,
    uris: Sequence[str],
    wanted: Callable[[str], bool],
    *,
    layout: Literal["lines", "array"],
) -> Scan:
    """Files of one object per line, or of one array of objects each. Raises ManifestError naming file and row."""
    objects = (
        f"read_json_objects({uri_list(uris)}, format='{'newline_delimited' if layout == 'lines' else 'array'}', "
        f"filename={literal(FILE)}, maximum_object_size={LINE_BYTES})"
    )
    first_bad_row = _bad_line if layout == "lines" else bad_array
    try:
        found, doubled = connection.execute(
            "SELECT json_group_structure(json)::VARCHAR, "
            f"arg_min(struct_pack(file := {FILE}, line := json), {FILE}) FILTER (len(json_keys(json)) > "
            f"len(list_distinct(json_keys(json)))) FROM {objects}"
        ).fetchall()[0]
    except duckdb.Error as error:
        raise first_bad_row(uris) or unreadable(error, uris) from error
    structure = json.loads(found or "{}")
    if not isinstance(structure, dict):
        raise first_bad_row(uris) or ManifestError(f"{uris[0]}: wanted JSON objects, got {found}")
    if doubled:
        raise ManifestError(
            f"{doubled['file']}: a key stands twice in {storage.without_userinfo(doubled['line'])[:200]}"
        )
    names = tuple(structure)
    _check_json_names(uris[0], structure)
    structure = {name: kind for name, kind in structure.items() if wanted(name)}
    for name, kind in structure.items():
        _check_json(connection, objects, name, kind, uris[0])
    if not structure:
        return Scan(tuple(uris), names, {}, objects)
    text = literal(json.dumps(_signed(structure)))
    schema = connection.sql(f"SELECT unnest(json_transform('{{}}', {text}))").to_arrow_table().schema
    sql = f"(SELECT unnest(json_transform(json, {text})), {FILE} FROM {objects})"  # strict would refuse absent keys
    return Scan(tuple(uris), names, {field.name: field.type for field in schema}, sql)


def _bad_line(uris: Sequence[str]) -> ManifestError | StorageError | None:
    """The first line that is no JSON object: DuckDB names another line, or none (DuckDB 2.0)."""
    for uri in uris:
        try:
            with io.BufferedReader(cast("io.RawIOBase", opened(uri))) as lines:
                for number, line in enumerate(lines, start=1):
                    try:
                        if line.strip() and not isinstance(json.loads(line), dict):
                            hint = "; a file of one array is named .json" if line.lstrip().startswith(b"[") else ""
                            return ManifestError(f"{uri} line {number}: wanted a JSON object, got {line[:80]!r}{hint}")
                    except ValueError as error:
                        return ManifestError(f"{uri} line {number} is not JSON: {error}")
        except (pa.ArrowException, OSError) as error:
            return unreadable(error, [uri])
    return None


def _check_json_names(uri: str, kind: Any) -> None:
    if isinstance(kind, dict):
        check_names(uri, kind)
    for inner in kind.values() if isinstance(kind, dict) else kind if isinstance(kind, list) else ():
        _check_json_names(uri, inner)


def _leaves(kind: Any) -> set[str]:
    """The types in a structure as json_group_structure gives it: "BIGINT", ["BIGINT"], {"a": "BIGINT"}."""
    if isinstance(kind, str):
        return {kind}
    return set().union(*map(_leaves, kind.values() if isinstance(kind, dict) else kind))


def _signed(kind: Any) -> Any:
    """All integers as int64 (_check_json has looked); what was null in every row becomes a string's null."""
    if isinstance(kind, str):
        return {"UBIGINT": "BIGINT", "HUGEINT": "BIGINT", "NULL": "VARCHAR"}.get(kind, kind)
    return {k: _signed(v) for k, v in kind.items()} if isinstance(kind, dict) else [_signed(v) for v in kind]


def _check_json(connection: duckdb.DuckDBPyConnection, objects: str, name: str, kind: Any, uri: str) -> None:
    """Refuse what would change: values of several types, and integers that neither int64 nor a double holds."""
    leaves = _leaves(kind)
    if "JSON" in leaves:
        raise ManifestError(f"{uri}: column {name!r} holds values of several types or empty objects; wanted one type")
    if not leaves & {"DOUBLE", "UBIGINT", "HUGEINT"}:
        return
    # DuckDB reads integers beyond 64 bits, or mixed with fractions, as double.
    digits = 16 if "DOUBLE" in leaves else 19
    pointer = "/" + name.replace("~", "~0").replace("/", "~1")
    rows = connection.execute(
        f"SELECT {FILE}, value FROM (SELECT {FILE}, json_extract(json, {literal(pointer)})::VARCHAR AS value "
        f"FROM {objects}) WHERE regexp_matches(value, '[0-9]{{{digits},}}')"
    )
    while found := rows.fetchmany(1000):
        for file, value in found:
            for number in _integers(json.loads(value)):
                if number not in _INT64 or ("DOUBLE" in leaves and int(float(number)) != number):
                    raise ManifestError(
                        f"{file}: column {name!r} holds {number}, an integer that would lose digits; write it as a string"
                    )


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _integers(inner)
