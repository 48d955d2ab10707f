"""Partitions: what --partition-by asks for -> Hive keys, and the SQL of their values. Knows columns, no rows and no files.

`day` is a column as it is. `date:captured_at` is the UTC day of a column of times, under the key `date`;
`day=date:captured_at` names the key.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote as percent_escape

import pyarrow as pa

from fcos_ray.errors import ManifestError
from fcos_ray.inputs.scans import literal, quote

# How much of YYYY-MM-DD each function keeps.
FUNCTIONS: Final = {"year": 4, "month": 7, "date": 10}
HIVE_NULL: Final = "__HIVE_DEFAULT_PARTITION__"  # what every reader of Hive paths takes for null
NOT_A_TIME: Final = "is not an ISO date or time such as 2026-01-03 or 2026-01-03T04:05:06Z"
_KEY: Final = re.compile(r"(?:(?P<name>[^:=]*)=)?(?:(?P<function>[^:=]*):)?(?P<column>.*)", re.DOTALL)
# TRY_CAST alone would also take "epoch", "2026-1-3" and "2026-01-03 Europe/Berlin" (DuckDB 2.0).
_ISO: Final = r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d([.]\d{1,9})?)?(Z|[+-]\d\d(:?\d\d)?)?)?"


# What plain keys may be besides strings, whose escapes need no look: these have none.
_SQL_TYPES: Final = {
    pa.bool_(): "BOOLEAN", pa.date32(): "DATE",
    pa.int8(): "TINYINT", pa.int16(): "SMALLINT", pa.int32(): "INTEGER", pa.int64(): "BIGINT",
    pa.uint8(): "UTINYINT", pa.uint16(): "USMALLINT", pa.uint32(): "UINTEGER", pa.uint64(): "UBIGINT",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PartitionKey:
    """One Hive key: `name=<value>` in the path of every output file."""

    name: str
    column: str  # where its values come from
    function: str | None = None  # one of FUNCTIONS; None: the column's values as they are

    def value_sql(self, types: Mapping[str, pa.DataType]) -> str:
        """The key's value of a row, as a string that is not escaped yet."""
        if self.function is None:
            return f"CAST({quote(self.column)} AS VARCHAR)"
        return f"CAST({_date_sql(self.column, types[self.column])} AS VARCHAR)[:{FUNCTIONS[self.function]}]"

    def unfit_sql(self, types: Mapping[str, pa.DataType]) -> str:
        """Whether a row's time cannot be read, or its year has not four digits (infinity has none)."""
        return f"coalesce(year({_date_sql(self.column, types[self.column])}) NOT BETWEEN 1 AND 9999, true)"


def parse_keys(texts: Sequence[str]) -> tuple[PartitionKey, ...]:
    """COLUMN, FUNCTION:COLUMN or NAME=FUNCTION:COLUMN each. Raises ManifestError."""
    return tuple(_parse_key(text) for text in texts)


def _parse_key(text: str) -> PartitionKey:
    found = _KEY.fullmatch(text)
    forms = " or ".join(f"{function}:<column>" for function in FUNCTIONS)
    wanted = f"--partition-by {text}: wanted <column>, {forms}, the latter also as <name>=date:<column>"
    if found is None or not found["column"]:
        raise ManifestError(wanted)
    name, function, column = found["name"], found["function"], found["column"]
    if function is None:
        if name is not None:
            raise ManifestError(f"{wanted}; --rename {column}={name} names a column otherwise")
        return PartitionKey(column, column)
    if function not in FUNCTIONS:
        raise ManifestError(f"{wanted}; there is no {function!r}")
    return PartitionKey(function if name is None else name, column, function)


def check_keys(
    where: str, keys: Sequence[PartitionKey], types: Mapping[str, pa.DataType], *, taken: Collection[str]
) -> None:
    """Raise ManifestError for keys that clash, cannot stand in a path, or whose columns hold something else.

    `taken` are the names, case-folded, of the columns that the output files hold.
    """
    for key in keys:
        type_ = types[key.column]
        if key.function is None:
            kinds, fits = "strings, integers, booleans or dates", _is_plain
        else:
            kinds, fits = f"dates, timestamps or ISO strings for {key.function}:", _is_time
        if not fits(type_):
            raise ManifestError(f"{where}: column {key.column!r} cannot partition; wanted {kinds}, got {type_}")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", key.name):
            fix = "--rename it" if key.function is None else f"--partition-by <name>={key.function}:{key.column}"
            raise ManifestError(
                f"{where}: partition column {key.name!r} must be letters, digits, _ and - to stand in a path; {fix}"
            )
        if key.name.casefold() in taken or key.name.startswith("__"):
            fix = f"--partition-by {key.column}_{key.function}={key.function}:{key.column} names it otherwise"
            raise ManifestError(f"{where}: partition {key.name!r} clashes with a column of the output files; {fix}")
    for folded, count in Counter(key.name.casefold() for key in keys).items():
        if count > 1:
            raise ManifestError(
                f"partition column {folded!r} is given twice; --partition-by <name>=date:<column> names one otherwise"
            )


def path_sql(keys: Sequence[PartitionKey], types: Mapping[str, pa.DataType]) -> str:
    """A row's Hive path; "" without keys. Wants `hive_escape` registered as a function of strings."""
    parts = (f"{literal(key.name + '=')} || hive_escape({key.value_sql(types)})" for key in keys)
    return " || '/' || ".join(parts) or literal("")


def fits_path_sql(keys: Sequence[PartitionKey], types: Mapping[str, pa.DataType], path: str) -> str:
    """Whether a column of Hive paths, made earlier, has these keys and nothing but values of their columns' types now."""
    pattern = "/".join(f"{key.name}=([^/]*)" for key in keys)
    fits = [f"regexp_full_match({path}, {literal(pattern)})"]
    for place, key in enumerate(keys, 1):
        kind = _SQL_TYPES.get(types[key.column]) if key.function is None else None
        if kind is not None:
            value = f"regexp_extract({path}, {literal(f'^{pattern}$')}, {place})"
            fits.append(f"({value} = '{HIVE_NULL}' OR CAST(TRY_CAST({value} AS {kind}) AS VARCHAR) = {value})")
    return " AND ".join(fits)


def hive_escape(values: pa.ChunkedArray) -> pa.Array:
    """Percent-escape what readers of Hive paths decode."""
    return pa.array([percent_escape(value, safe="") for value in values.to_pylist()], pa.string())


def is_string(type_: pa.DataType) -> bool:
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_))


def _is_plain(type_: pa.DataType) -> bool:
    kinds = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_date32)
    return is_string(type_) or any(is_kind(type_) for is_kind in kinds)


def _is_time(type_: pa.DataType) -> bool:
    return is_string(type_) or bool(pa.types.is_date32(type_) or pa.types.is_timestamp(type_))


def _date_sql(column: str, type_: pa.DataType) -> str:
    """The UTC day of a column of times, in a session whose zone is UTC; times without a zone are taken for UTC."""
    name = quote(column)
    if is_string(type_):
        return f"CAST(CASE WHEN regexp_full_match({name}, '{_ISO}') THEN TRY_CAST({name} AS TIMESTAMPTZ) END AS DATE)"
    if pa.types.is_timestamp(type_) and type_.unit == "ns":  # DuckDB 2.0 rounds the day's last half microsecond up
        return f"CAST(make_timestamp((epoch_ns({name}) - (epoch_ns({name}) % 1000 + 1000) % 1000) // 1000) AS DATE)"
    return f"CAST({name} AS DATE)"
