"""Plan: manifests -> a validated draft of shards. Knows uris, ids and partitions, not images, runs or Ray.

DuckDB does the work out of core; everything a user got wrong is said here, before any work. `pin.py` writes the draft down.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import duckdb
import pyarrow as pa
from duckdb.func import PythonUDFType

from fcos_ray import storage
from fcos_ray.errors import ManifestError
from fcos_ray.inputs import manifests
from fcos_ray.inputs.columns import PARTITION, REFUSED
from fcos_ray.inputs.fetch import FetchPolicy
from fcos_ray.inputs.manifests import Loaded, Source
from fcos_ray.inputs.partitions import (
    HIVE_NULL,
    NOT_A_TIME,
    PartitionKey,
    check_keys,
    hive_escape,
    is_string,
    parse_keys,
    path_sql,
)
from fcos_ray.inputs.resolve import resolver
from fcos_ray.inputs.scans import FILE, count_rows, literal, quote
from fcos_ray.inputs.selection import History, Selection, SelectSettings, select_rows

# Manifest columns with a meaning of their own, and the type each is read as. They are not carried along as they are.
KNOWN_COLUMNS: Final = {
    "width": "BIGINT", "height": "BIGINT", "content_bytes": "BIGINT", "content_etag": "VARCHAR",
    "content_last_modified": "TIMESTAMPTZ", "content_sha256": "VARCHAR",
}  # fmt: skip
_MEANINGS: Final = {"BIGINT": "a whole number", "VARCHAR": "a string", "TIMESTAMPTZ": "a time"}
_EXAMPLES: Final = 3
_MEMORY: Final = "3GB"  # of DuckDB, which then goes on on disk; the process has about 1 GB more
_ELEMENT_BYTES: Final = 240  # of a path element; disks take 255
_PATH_BYTES: Final = 700  # of all partitions together; S3's keys take 1,024, some of it for the output's own prefix


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """What a plan depends on besides the manifests."""

    partition_by: tuple[str, ...] = ()  # as inputs/partitions.py reads them
    columns: tuple[str, ...] | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    drop_duplicates: bool = False
    refused_uris: Literal["stop", "error"] = "stop"
    shard_rows: int | None = None
    max_files: int = 100_000
    min_size: int = 800  # the model's input, for ordering rows by padded shape
    max_size: int = 1333
    fetch: FetchPolicy = field(default_factory=FetchPolicy)
    select: SelectSettings = field(default_factory=SelectSettings)
    reserved_columns: frozenset[str] = frozenset()  # names the output has itself


@dataclass(frozen=True, slots=True)
class Draft:
    """A validated plan that is not pinned yet. Valid inside `draft_plan` only."""

    connection: duckdb.DuckDBPyConnection
    settings: PlanSettings
    columns: dict[str, pa.DataType]  # passthrough columns, in the manifest's order
    keys: tuple[PartitionKey, ...]  # of the Hive paths
    partitions: tuple[tuple[str, int], ...]  # Hive path ("" without partitions) and rows, in the order of the shards
    shard_rows: int
    num_duplicates_dropped: int
    num_uris_refused: int
    selection: Selection

    @property
    def num_rows(self) -> int:
        return sum(rows for _, rows in self.partitions)

    @property
    def num_shards(self) -> int:
        return sum(-(-rows // self.shard_rows) for _, rows in self.partitions)


@contextmanager
def draft_plan(sources: Sequence[Source], settings: PlanSettings, history: History | None = None) -> Iterator[Draft]:
    """Read and validate manifests, select their rows; everything a user got wrong is said here, before any work.

    `history` are the indexes of what was labelled before; without it every row is new.
    Raises ManifestError naming file, row (0-based within the file) and column.
    """
    with tempfile.TemporaryDirectory(prefix="fcos_ray-plan-") as folder:
        connection = duckdb.connect(
            str(Path(folder) / "plan.duckdb"), config={"temp_directory": folder, "memory_limit": _MEMORY}
        )
        try:
            connection.execute("SET TimeZone = 'UTC'; SET enable_progress_bar = false")
            keys = parse_keys(settings.partition_by)
            loaded = manifests.load(
                connection, sources, rename=settings.rename, limit=settings.limit, keep=_needed(settings, keys)
            )
            yield _validate(connection, loaded, sources, settings, keys, history or History())
        finally:
            connection.close()


def _needed(settings: PlanSettings, keys: Sequence[PartitionKey]) -> set[str] | None:
    """The columns to load: the rest need not even have a type that comes out exact. None: all."""
    if settings.columns is None:
        return None
    return {"uri", "image_id", *KNOWN_COLUMNS, *(key.column for key in keys), *settings.columns}


def _validate(
    connection: duckdb.DuckDBPyConnection,
    loaded: Loaded,
    sources: Sequence[Source],
    settings: PlanSettings,
    keys: tuple[PartitionKey, ...],
    history: History,
) -> Draft:
    types = loaded.types
    if not count_rows(connection, "SELECT count(*) FROM manifest"):
        raise ManifestError(f"{_where(sources)}: the manifest has no rows")
    passthrough = _check_columns(loaded, sources, settings, keys)
    _refuse_rows(connection, "uri", "uri IS NULL OR CAST(uri AS VARCHAR) = ''", "is null or empty")
    for name in dict.fromkeys(["image_id", *(key.column for key in keys)]):
        if name in types:
            empty = f"{quote(name)} IS NULL OR CAST({quote(name)} AS VARCHAR) = ''"
            _refuse_rows(connection, name, empty, "is null or empty")
    for name, sql_type in KNOWN_COLUMNS.items():
        if name in types:
            unfit = f"TRY_CAST({quote(name)} AS {sql_type}) IS NULL"
            if sql_type == "BIGINT":  # 2.7 would be cast to 3
                unfit += f" OR TRY_CAST({quote(name)} AS DOUBLE) <> TRY_CAST({quote(name)} AS BIGINT)"
            _refuse_rows(connection, name, f"{quote(name)} IS NOT NULL AND ({unfit})", f"is not {_MEANINGS[sql_type]}")
    for key in keys:
        if key.function is not None:
            _refuse_rows(connection, key.column, key.unfit_sql(types), NOT_A_TIME)
        null = f"{key.value_sql(types)} = '{HIVE_NULL}'"
        _refuse_rows(connection, key.column, null, "holds what every reader of partitions takes for null,")
    _add_working_columns(connection, types, sources, settings, keys)
    _check_uris(connection, settings)
    num_dropped = _duplicates(connection, settings, key="image_id" if "image_id" in types else "uri")
    selection = select_rows(connection, types, history, settings.select, keys)
    num_refused = count_rows(connection, f"SELECT count(*) FROM planned WHERE {REFUSED} IS NOT NULL")
    partitions = tuple(
        (str(path), int(rows))
        for path, rows in connection.execute(
            f"SELECT {PARTITION}, count(*) FROM planned GROUP BY ALL ORDER BY {PARTITION}"
        ).fetchall()
    )
    num_rows = sum(rows for _, rows in partitions)
    shard_rows = settings.shard_rows or min(max(-(-num_rows // 500), 64), 32_768)
    draft = Draft(connection, settings, passthrough, keys, partitions, shard_rows, num_dropped, num_refused, selection)
    _check_filecount_rows(draft, types)
    return draft


def _where(sources: Sequence[Source]) -> str:
    return sources[0].uri if len(sources) == 1 else f"{sources[0].uri} and {len(sources) - 1} more"


def _check_columns(
    loaded: Loaded, sources: Sequence[Source], settings: PlanSettings, keys: Sequence[PartitionKey]
) -> dict[str, pa.DataType]:
    """The passthrough columns. Raises ManifestError for a column that is missing, clashes or cannot do what is asked."""
    where, types = _where(sources), loaded.types
    plain = {key.column for key in keys if key.function is None}
    for name in ("uri", *(key.column for key in keys), *(settings.columns or ())):
        if name not in types:
            hint = "; --uri-column <column> says which holds the uris" if name == "uri" else ""
            raise ManifestError(f"{where}: {manifests.unknown_column(name, loaded.names)}{hint}")
    for name in ("uri", "content_etag", "content_sha256"):
        if name in types and not is_string(types[name]):
            raise ManifestError(f"{where}: column {name!r} wanted strings, got {types[name]}")
    if "image_id" in types and not (is_string(types["image_id"]) or pa.types.is_integer(types["image_id"])):
        raise ManifestError(f"{where}: column 'image_id' wanted strings or integers, got {types['image_id']}")
    own = {"uri", "image_id", *KNOWN_COLUMNS}
    if fixed := [name for name in types if name in plain & own]:
        raise ManifestError(
            f"{where}: column {fixed[0]!r} cannot partition, because every output file has a column of that name"
        )
    chosen = set(settings.columns) if settings.columns is not None else set(types)
    carried = {name: types[name] for name in types if name not in own and name in chosen | plain}
    for name in carried:
        # rowid is DuckDB's own name for the place of a row, which the plan relies on.
        if name.casefold() in settings.reserved_columns | {"rowid"} or name.startswith("__"):
            raise ManifestError(
                f"{where}: column {name!r} clashes with a column of the output; --rename {name}=manifest_{name.strip('_')}"
            )
    in_files = {name.casefold() for name in carried if name not in plain} | own | settings.reserved_columns
    check_keys(where, keys, types, taken=in_files)
    return carried


def _refuse_rows(connection: duckdb.DuckDBPyConnection, column: str, condition: str, problem: str) -> None:
    """Raise ManifestError when rows meet the condition: how many, and file and row of the first few."""
    found = connection.execute(
        f"SELECT {FILE}, rowid, {quote(column)} FROM manifest WHERE {condition} ORDER BY rowid LIMIT {_EXAMPLES}"
    ).fetchall()
    if not found:
        return
    total = count_rows(connection, f"SELECT count(*) FROM manifest WHERE {condition}")
    examples = "; ".join(
        f"{file} row {_row_in_file(connection, file, row)}" + (f" ({value!r:.80})" if value not in (None, "") else "")
        for file, row, value in found
    )
    raise ManifestError(f"column {column!r} {problem} in {_number(total, 'row')}: {examples}")


def _row_in_file(connection: duckdb.DuckDBPyConnection, file: str, row: int) -> int:
    return row - count_rows(connection, f"SELECT min(rowid) FROM manifest WHERE {FILE} = {literal(file)}")


def _add_working_columns(
    connection: duckdb.DuckDBPyConnection,
    types: dict[str, pa.DataType],
    sources: Sequence[Source],
    settings: PlanSettings,
    keys: Sequence[PartitionKey],
) -> None:
    """Table `planned`: per manifest row its resolved uri, id, reason of refusal, partition path and padded shape."""
    folders = {source.uri: storage.parent(source.uri) for source in sources}

    resolve = resolver(folders, settings.fetch)
    kind = "STRUCT(uri VARCHAR, reason VARCHAR)"
    connection.create_function("resolve_uri", resolve, ["VARCHAR", "VARCHAR"], kind, type=PythonUDFType.ARROW)
    connection.create_function("hive_escape", hive_escape, ["VARCHAR"], "VARCHAR", type=PythonUDFType.ARROW)
    shape = _padded_shape_sql(settings) if {"width", "height"} <= types.keys() else "0"
    identity = "CAST(image_id AS VARCHAR)" if "image_id" in types else "__resolved.uri"
    connection.execute(
        f"CREATE TABLE planned AS SELECT rowid AS number, __resolved.uri AS uri, __resolved.reason AS {REFUSED}, "
        f"{identity} AS image_id, {path_sql(keys, types)} AS {PARTITION}, {shape} AS shape "
        f"FROM (SELECT *, rowid, resolve_uri(CAST(uri AS VARCHAR), {FILE}) AS __resolved FROM manifest)"
    )


def _padded_shape_sql(settings: PlanSettings) -> str:
    """A number that is equal for images torchvision pads alike; only an order, so float rounding does not matter."""
    width, height = "greatest(CAST(width AS DOUBLE), 1)", "greatest(CAST(height AS DOUBLE), 1)"
    scale = f"least({settings.min_size} / least({width}, {height}), {settings.max_size} / greatest({width}, {height}))"
    padded = [f"CAST(ceil(floor({side} * {scale}) / 32) AS BIGINT)" for side in (height, width)]
    return f"coalesce({padded[0]} * 100000 + {padded[1]}, 0)"


def _check_uris(connection: duckdb.DuckDBPyConnection, settings: PlanSettings) -> None:
    """Raise ManifestError with counts per reason for uris that may not be read, unless they become error rows."""
    if settings.refused_uris == "error":
        return
    total = count_rows(connection, f"SELECT count(*) FROM planned WHERE {REFUSED} IS NOT NULL")
    if not total:
        return
    reasons = connection.execute(
        f"SELECT p.{REFUSED}, p.total, p.uris, m.{FILE}, m.rowid FROM "
        f"(SELECT {REFUSED}, count(*) AS total, list(uri ORDER BY number)[:{_EXAMPLES}] AS uris, min(number) AS first "
        f"FROM planned WHERE {REFUSED} IS NOT NULL GROUP BY ALL) p JOIN manifest m ON m.rowid = p.first "
        f"ORDER BY p.total DESC, p.first LIMIT 10"
    ).fetchall()
    details = "; ".join(
        f"{count:,} {reason} (such as {_named(uris)}, first in {file} row {_row_in_file(connection, file, row)})"
        for reason, count, uris, file, row in reasons
    )
    hint = "--allow-root FOLDER allows a local folder; " if any("root" in reason for reason, *_ in reasons) else ""
    raise ManifestError(
        f"{_number(total, 'uri')} may not be read: {details}. {hint}--refused-uris error makes them error rows"
    )


def _named(uris: Sequence[str]) -> str:
    return ", ".join(repr(storage.without_secrets(uri)) for uri in uris)


def _number(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def _duplicates(connection: duckdb.DuckDBPyConnection, settings: PlanSettings, *, key: str) -> int:
    """How many rows were dropped as duplicates. Raises ManifestError naming doubled ids unless dropping was asked for."""
    doubled = "SELECT image_id, count(*) AS copies FROM planned GROUP BY image_id HAVING count(*) > 1"
    total = count_rows(connection, f"SELECT coalesce(sum(copies - 1), 0) FROM ({doubled})")
    if not total:
        return 0
    if settings.drop_duplicates:
        connection.execute(
            "DELETE FROM planned WHERE number NOT IN (SELECT min(number) FROM planned GROUP BY image_id)"
        )
        return total
    examples = connection.execute(
        f"SELECT d.image_id, d.copies, m.{FILE}, m.rowid FROM ({doubled} ORDER BY min(number) LIMIT {_EXAMPLES}) d "
        "JOIN (SELECT image_id, max(number) AS last FROM planned GROUP BY image_id) p ON p.image_id = d.image_id "
        "JOIN manifest m ON m.rowid = p.last ORDER BY m.rowid"
    ).fetchall()
    named = "; ".join(
        f"{_named([image_id])} {copies} times, last in {file} row {_row_in_file(connection, file, row)}"
        for image_id, copies, file, row in examples
    )
    raise ManifestError(
        f"column {key!r} is not unique, {_number(total, 'row')} too many: {named}. "
        "--drop-duplicates keeps the first row of each"
    )


def _check_filecount_rows(draft: Draft, types: Mapping[str, pa.DataType]) -> None:
    settings = draft.settings
    for path, _ in draft.partitions:
        if too_long := next((part for part in path.split("/") if len(part) > _ELEMENT_BYTES), None):
            name = too_long.split("=")[0]
            raise ManifestError(
                f"column {name!r} cannot partition: {too_long[:80]}… is {len(too_long)} bytes long, "
                f"wanted at most {_ELEMENT_BYTES}"
            )
        if len(path) > _PATH_BYTES:
            names = ", ".join(key.name for key in draft.keys)
            raise ManifestError(
                f"partition columns {names}: {path[:80]}… is {len(path):,} bytes long, wanted at most {_PATH_BYTES}"
            )
    if draft.num_shards <= settings.max_files:
        return
    blame = "a larger --shard-rows"
    if draft.keys:
        counts = {
            key.name: count_rows(draft.connection, f"SELECT count(DISTINCT {key.value_sql(types)}) FROM manifest")
            for key in draft.keys
        }
        worst = max(counts, key=lambda name: counts[name])
        blame = f"a coarser partition column than {worst!r} ({counts[worst]:,} values)"
    raise ManifestError(
        f"the plan would make {draft.num_shards:,} files of {draft.num_rows:,} rows, more than max_files "
        f"({settings.max_files:,}); wanted {blame}, or a higher --max-files"
    )
