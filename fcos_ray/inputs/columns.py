"""Columns: which names and Arrow types a manifest may have, so that every value comes out equal. Knows no files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

import pyarrow as pa

from fcos_ray.errors import ManifestError

# Columns of a pinned manifest that are not the user's: why a uri may not be read, the Hive path, whether it is a tombstone.
REFUSED: Final = "__refused"
PARTITION: Final = "__partition"
DELETED: Final = "__deleted"
# Before a content column of an index: what the manifest said of it, where that is not what was labelled.
SAID: Final = "said_"

# Arrow types that DuckDB hands back with every value equal (measured with DuckDB 2.0; DESIGN §3).
_EXACT: Final = (
    pa.types.is_boolean, pa.types.is_integer, pa.types.is_float32, pa.types.is_float64, pa.types.is_string,
    pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary,
    pa.types.is_decimal128, pa.types.is_date32,
)  # fmt: skip


def check_names(uri: str, names: Iterable[str]) -> None:
    """Raise ManifestError for columns without a name, or that DuckDB cannot tell apart: it ignores case."""
    seen: dict[str, str] = {}
    for place, name in enumerate(names):
        if not name or "\0" in name:
            raise ManifestError(f"{uri}: column {place} (from 0) is named {name!r}; wanted a name")
        other = seen.get(name.casefold())
        if other is not None:
            what = (
                f"column {name!r} stands there twice"
                if other == name
                else f"columns {other!r} and {name!r} differ in case only"
            )
            raise ManifestError(f"{uri}: {what}; wanted different names")
        seen[name.casefold()] = name


def merge(merged: dict[str, tuple[pa.DataType, str]], columns: Mapping[str, pa.DataType], uri: str) -> None:
    """Unite columns by name. Raises ManifestError where one name has two types, or two names differ in case only."""
    for name, type_ in columns.items():
        known, where = merged.setdefault(name, (type_, uri))
        if known != type_:
            raise ManifestError(f"column {name!r} is {known} in {where} but {type_} in {uri}; wanted one type")
    check_names(uri, [*merged])


def is_exact(type_: pa.DataType) -> bool:
    """Whether DuckDB hands every value of a Parquet column back equal."""
    if pa.types.is_dictionary(type_):
        return is_exact(type_.value_type)
    if pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_):
        return is_exact(type_.value_type)
    if pa.types.is_struct(type_):
        fields = [type_.field(i) for i in range(type_.num_fields)]
        # DuckDB takes fields whose names differ in case only for one.
        return len({f.name.casefold() for f in fields}) == len(fields) and all(is_exact(f.type) for f in fields)
    if pa.types.is_timestamp(type_):
        return type_.tz is None or type_.unit != "ns"  # zoned nanoseconds come back as microseconds
    if pa.types.is_time(type_):
        return str(type_.unit) != "ns"
    return any(check(type_) for check in _EXACT)


def why_not(type_: pa.DataType) -> str:
    """Words for a type that is refused, and what to do about it."""
    out = "or leave it out with --columns"
    if pa.types.is_null(type_):
        return f"so it holds nothing; give it the type it should have, {out}"
    return f"which would lose something on the way; convert it, for example to string, {out}"


def plain(type_: pa.DataType) -> pa.DataType:
    """Dictionary encoding is the writer's affair, not the values'."""
    return type_.value_type if pa.types.is_dictionary(type_) else type_


def same_kind(wanted: pa.DataType, got: pa.DataType) -> bool:
    """Whether DuckDB read a column as what Arrow says it is: other writers' types (INTERVAL, UUID) mean two things."""
    if pa.types.is_dictionary(wanted):
        return same_kind(wanted.value_type, got)
    if pa.types.is_list(got):
        lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
        return any(check(wanted) for check in lists) and same_kind(wanted.value_type, got.value_type)
    if pa.types.is_struct(got):
        return (
            pa.types.is_struct(wanted)
            and wanted.num_fields == got.num_fields
            and all(same_kind(wanted.field(i).type, got.field(i).type) for i in range(got.num_fields))
        )
    kinds: tuple[Callable[[pa.DataType], bool], ...] = (
        lambda t: pa.types.is_string(t) or pa.types.is_large_string(t),
        lambda t: pa.types.is_binary(t) or pa.types.is_large_binary(t) or pa.types.is_fixed_size_binary(t),
        lambda t: pa.types.is_timestamp(t) and t.tz is None,
        lambda t: pa.types.is_timestamp(t) and t.tz is not None,
        pa.types.is_time,
    )
    return bool(wanted == got or any(kind(wanted) and kind(got) for kind in kinds))
