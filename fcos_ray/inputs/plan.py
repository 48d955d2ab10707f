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
from urllib.parse import quote as percent_escape

import duckdb
import pyarrow as pa
from duckdb.func import PythonUDFType

from fcos_ray import storage
from fcos_ray.errors import ManifestError
from fcos_ray.inputs import manifests
from fcos_ray.inputs.fetch import FetchPolicy, reason_to_refuse
from fcos_ray.inputs.manifests import FILE, Source, literal, quote

# Manifest columns with a meaning of their own, and the type each is read as. They are not carried along as they are.
KNOWN_COLUMNS: Final = {
    "width": "BIGINT", "height": "BIGINT", "content_bytes": "BIGINT", "content_etag": "VARCHAR",
    "content_last_modified": "TIMESTAMPTZ", "content_sha256": "VARCHAR",
}  # fmt: skip
# Columns of a pinned manifest that are not the user's.
REFUSED, PARTITION = "__refused", "__partition"
_EXAMPLES: Final = 3


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """What a plan depends on besides the manifests."""

    partition_by: tuple[str, ...] = ()
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
    reserved_columns: frozenset[str] = frozenset()  # names the output has itself


@dataclass(frozen=True, slots=True)
class Draft:
    """A validated plan that is not pinned yet. Valid inside `draft_plan` only."""

    connection: duckdb.DuckDBPyConnection
    settings: PlanSettings
    columns: dict[str, pa.DataType]  # passthrough columns, in the manifest's order
    partitions: tuple[tuple[str, int], ...]  # Hive path ("" without partitions) and rows, in the order of the shards
    shard_rows: int
    num_duplicates_dropped: int
    num_uris_refused: int

    @property
    def num_rows(self) -> int:
        return sum(rows for _, rows in self.partitions)

    @property
    def num_shards(self) -> int:
        return sum(-(-rows // self.shard_rows) for _, rows in self.partitions)


@contextmanager
def draft_plan(sources: Sequence[Source], settings: PlanSettings) -> Iterator[Draft]:
    """Read and validate manifests; everything a user got wrong is said here, before any work.

    Raises ManifestError naming file, row (0-based within the file) and column.
    """
    with tempfile.TemporaryDirectory(prefix="fcos_ray-plan-") as folder:
        connection = duckdb.connect(str(Path(folder) / "plan.duckdb"), config={"temp_directory": folder})
        try:
            connection.execute("SET TimeZone = 'UTC'; SET enable_progress_bar = false")
            types = manifests.load(connection, sources, rename=settings.rename, limit=settings.limit)
            yield _validate(connection, types, sources, settings)
        finally:
            connection.close()


def _validate(
    connection: duckdb.DuckDBPyConnection,
    types: dict[str, pa.DataType],
    sources: Sequence[Source],
    settings: PlanSettings,
) -> Draft:
    passthrough = _check_columns(types, sources, settings)
    if not _count(connection, "SELECT count(*) FROM manifest"):
        raise ManifestError(f"{sources[0].uri}: the manifest has no rows")
    _refuse_rows(connection, "uri", "uri IS NULL OR CAST(uri AS VARCHAR) = ''", "is null or empty")
    for name in ("image_id", *settings.partition_by):
        if name in types:
            empty = f"{quote(name)} IS NULL OR CAST({quote(name)} AS VARCHAR) = ''"
            _refuse_rows(connection, name, empty, "is null or empty")
    for name, sql_type in KNOWN_COLUMNS.items():
        if name in types:
            unfit = f"{quote(name)} IS NOT NULL AND TRY_CAST({quote(name)} AS {sql_type}) IS NULL"
            _refuse_rows(connection, name, unfit, f"is not a {sql_type.lower()}")
    _add_working_columns(connection, types, sources, settings)
    num_refused = _refused_uris(connection, settings)
    num_dropped = _duplicates(connection, settings)
    partitions = tuple(
        (str(path), int(rows))
        for path, rows in connection.execute(
            f"SELECT {PARTITION}, count(*) FROM planned GROUP BY ALL ORDER BY {PARTITION}"
        ).fetchall()
    )
    num_rows = sum(rows for _, rows in partitions)
    shard_rows = settings.shard_rows or min(max(-(-num_rows // 500), 64), 32_768)
    draft = Draft(connection, settings, passthrough, partitions, shard_rows, num_dropped, num_refused)
    _check_file_count(draft)
    return draft


def _count(connection: duckdb.DuckDBPyConnection, sql: str) -> int:
    row = connection.execute(sql).fetchone()
    assert row is not None
    return int(row[0])


def _check_columns(
    types: dict[str, pa.DataType], sources: Sequence[Source], settings: PlanSettings
) -> dict[str, pa.DataType]:
    """The passthrough columns. Raises ManifestError for a column that is missing, clashes or cannot do what is asked."""
    where = sources[0].uri if len(sources) == 1 else f"{sources[0].uri} and {len(sources) - 1} more"
    for name in ("uri", *settings.partition_by, *(settings.columns or ())):
        if name not in types:
            hint = "; --rename <column>=uri says which column holds the uris" if name == "uri" else ""
            raise ManifestError(f"{where}: {manifests.unknown_column(name, types)}{hint}")
    if not pa.types.is_string(types["uri"]) and not pa.types.is_large_string(types["uri"]):
        raise ManifestError(f"{where}: column 'uri' wanted strings, got {types['uri']}")
    if "image_id" in types and not _is_key(types["image_id"]):
        raise ManifestError(f"{where}: column 'image_id' wanted strings or integers, got {types['image_id']}")
    for name in settings.partition_by:
        if name in ("uri", "image_id") or not (_is_key(types[name]) or pa.types.is_date32(types[name])):
            raise ManifestError(
                f"{where}: column {name!r} cannot partition; wanted strings, integers, booleans or dates, got {types[name]}"
            )
        if not name.replace("_", "").replace("-", "").isalnum():
            raise ManifestError(
                f"{where}: partition column {name!r} must be letters, digits, _ and - to stand in a path"
            )
    own = {"uri", "image_id", *KNOWN_COLUMNS}
    chosen = set(settings.columns) if settings.columns is not None else set(types)
    carried = {name: types[name] for name in types if name not in own and name in chosen | set(settings.partition_by)}
    for name in carried:
        if name.casefold() in settings.reserved_columns or name.startswith("__"):
            raise ManifestError(
                f"{where}: column {name!r} clashes with a column of the output; --rename {name}=manifest_{name.strip('_')}"
            )
    return carried


def _is_key(type_: pa.DataType) -> bool:
    return any(
        check(type_)
        for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_boolean)
    )


def _refuse_rows(connection: duckdb.DuckDBPyConnection, column: str, condition: str, problem: str) -> None:
    """Raise ManifestError when rows meet the condition: how many, and file and row of the first few."""
    found = connection.execute(
        f"SELECT {FILE}, rowid, {quote(column)} FROM manifest WHERE {condition} ORDER BY rowid LIMIT {_EXAMPLES}"
    ).fetchall()
    if not found:
        return
    total = _count(connection, f"SELECT count(*) FROM manifest WHERE {condition}")
    examples = "; ".join(
        f"{file} row {_row_in_file(connection, file, row)}" + (f" ({value!r:.80})" if value not in (None, "") else "")
        for file, row, value in found
    )
    raise ManifestError(f"column {column!r} {problem} in {total:,} row{'s' if total > 1 else ''}: {examples}")


def _row_in_file(connection: duckdb.DuckDBPyConnection, file: str, row: int) -> int:
    return row - _count(connection, f"SELECT min(rowid) FROM manifest WHERE {FILE} = {literal(file)}")


def _add_working_columns(
    connection: duckdb.DuckDBPyConnection,
    types: dict[str, pa.DataType],
    sources: Sequence[Source],
    settings: PlanSettings,
) -> None:
    """Table `planned`: per manifest row its resolved uri, id, reason of refusal, partition path and padded shape."""
    folders = {source.uri: storage.parent(source.uri) for source in sources}

    def resolve(uris: pa.ChunkedArray, files: pa.ChunkedArray) -> pa.Array:
        pairs = [
            resolve_uri(uri, folder=folders[file], policy=settings.fetch)
            for uri, file in zip(uris.to_pylist(), files.to_pylist(), strict=True)
        ]
        columns = [pa.array([pair[i] for pair in pairs], pa.string()) for i in (0, 1)]
        return pa.StructArray.from_arrays(columns, names=["uri", "reason"])

    kind = "STRUCT(uri VARCHAR, reason VARCHAR)"
    connection.create_function("resolve_uri", resolve, ["VARCHAR", "VARCHAR"], kind, type=PythonUDFType.ARROW)
    connection.create_function("hive_escape", _hive_escape, ["VARCHAR"], "VARCHAR", type=PythonUDFType.ARROW)
    path = " || '/' || ".join(
        f"'{name}=' || hive_escape(CAST({quote(name)} AS VARCHAR))" for name in settings.partition_by
    )
    shape = _padded_shape_sql(settings) if {"width", "height"} <= types.keys() else "0"
    identity = "CAST(image_id AS VARCHAR)" if "image_id" in types else "resolved.uri"
    connection.execute(
        f"CREATE TABLE planned AS SELECT rowid AS number, resolved.uri AS uri, resolved.reason AS {REFUSED}, "
        f"{identity} AS image_id, {path or literal('')} AS {PARTITION}, {shape} AS shape "
        f"FROM (SELECT *, rowid, resolve_uri(CAST(uri AS VARCHAR), {FILE}) AS resolved FROM manifest)"
    )


def _hive_escape(values: pa.ChunkedArray) -> pa.Array:
    return pa.array([percent_escape(value, safe="") for value in values.to_pylist()], pa.string())


def _padded_shape_sql(settings: PlanSettings) -> str:
    """A number that is equal for images torchvision pads alike; only an order, so float rounding does not matter."""
    width, height = "greatest(CAST(width AS DOUBLE), 1)", "greatest(CAST(height AS DOUBLE), 1)"
    scale = f"least({settings.min_size} / least({width}, {height}), {settings.max_size} / greatest({width}, {height}))"
    padded = [f"CAST(ceil(floor({side} * {scale}) / 32) AS BIGINT)" for side in (height, width)]
    return f"coalesce({padded[0]} * 100000 + {padded[1]}, 0)"


def resolve_uri(uri: str, *, folder: str, policy: FetchPolicy) -> tuple[str, str | None]:
    """(resolved uri, None), or (the uri without user information, why it may not be read).

    A relative uri is relative to `folder`, where its manifest lies. No I/O: links are resolved when the image is read.
    """
    if "://" in uri or uri.startswith("/"):
        absolute = uri
    else:
        try:
            base = storage.parse_uri(folder)
        except storage.InvalidUri as error:
            return uri, f"malformed: {error}"
        parts = [part for part in uri.split("/") if part not in ("", ".")]
        if ".." in parts and base.scheme != "file":
            return uri, "malformed: '..' in a relative uri"
        absolute = storage.join(folder, *parts)
    reason = reason_to_refuse(absolute, policy)
    if reason is not None:
        return storage.without_userinfo(uri), reason
    return storage.parse_uri(absolute).uri, None


def _refused_uris(connection: duckdb.DuckDBPyConnection, settings: PlanSettings) -> int:
    """How many uris may not be read. Raises ManifestError with counts per reason, unless they become error rows."""
    total = _count(connection, f"SELECT count(*) FROM planned WHERE {REFUSED} IS NOT NULL")
    if not total or settings.refused_uris == "error":
        return total
    reasons = connection.execute(
        f"SELECT {REFUSED}, count(*), min_by(number, number), list(uri ORDER BY number)[:{_EXAMPLES}] "
        f"FROM planned WHERE {REFUSED} IS NOT NULL GROUP BY ALL ORDER BY 2 DESC LIMIT 10"
    ).fetchall()
    details = "; ".join(f"{count:,} {reason} (such as {', '.join(uris)})" for reason, count, _, uris in reasons)
    hint = "--allow-root FOLDER allows a local folder; " if any("root" in reason for reason, *_ in reasons) else ""
    raise ManifestError(
        f"{total:,} uri{'s' if total > 1 else ''} may not be read: {details}. {hint}--refused-uris error makes them error rows"
    )


def _duplicates(connection: duckdb.DuckDBPyConnection, settings: PlanSettings) -> int:
    """How many rows were dropped as duplicates. Raises ManifestError naming doubled ids unless dropping was asked for."""
    doubled = "SELECT image_id, count(*) AS copies FROM planned GROUP BY image_id HAVING count(*) > 1"
    total = _count(connection, f"SELECT coalesce(sum(copies - 1), 0) FROM ({doubled})")
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
        "JOIN manifest m ON m.rowid = p.last ORDER BY d.image_id"
    ).fetchall()
    named = "; ".join(
        f"{image_id!r} {copies} times, last in {file} row {_row_in_file(connection, file, row)}"
        for image_id, copies, file, row in examples
    )
    raise ManifestError(
        f"image_id is not unique, {total:,} rows too many: {named}. --drop-duplicates keeps the first row of each"
    )


def _check_file_count(draft: Draft) -> None:
    settings = draft.settings
    for path, _ in draft.partitions:
        if too_long := next((part for part in path.split("/") if len(part) > 240), None):
            raise ManifestError(f"partition {too_long[:80]}… is longer than a path element may be (240 characters)")
    if draft.num_shards <= settings.max_files:
        return
    blame = "a larger --shard-rows"
    if settings.partition_by:
        counts = {
            name: _count(draft.connection, f"SELECT count(DISTINCT {quote(name)}) FROM manifest")
            for name in settings.partition_by
        }
        worst = max(counts, key=lambda name: counts[name])
        blame = f"a coarser partition column than {worst!r} ({counts[worst]:,} values)"
    raise ManifestError(
        f"the plan would make {draft.num_shards:,} files of {draft.num_rows:,} rows, more than max_files "
        f"({settings.max_files:,}); wanted {blame}, or a higher --max-files"
    )
