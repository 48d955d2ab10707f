"""Selection: a validated manifest and the history of an output -> which rows a run is to label, and why.

The history is one index per run, oldest first; an image's newest row counts. DuckDB joins out of core: memory holds what
both sides share, never the history. Knows no runs beyond their names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

import duckdb
import pyarrow as pa

from fcos_ray import storage
from fcos_ray.errors import ERROR_CODES, ManifestError, OutputError
from fcos_ray.inputs.columns import PARTITION, REFUSED, SAID
from fcos_ray.inputs.explain import explain
from fcos_ray.inputs.partitions import HIVE_NULL, PartitionKey, fits_path_sql
from fcos_ray.inputs.scans import count_rows, literal, store_failure, uri_list

Select = Literal["new", "changed", "failed", "failed:all", "all"]
# What a row of the manifest is to the history -> the choices that take it.
TAKEN_BY: Final[dict[str, tuple[Select, ...]]] = {
    "new": ("new", "all"),
    "changed": ("changed", "all"),
    "failed": ("failed", "failed:all", "all"),
    "failed_for_good": ("failed:all", "all"),
    "up_to_date": ("all",),
}
# Columns that tell a change, the surest first: where both sides know one, the others are not asked.
_CONTENT: Final = {
    "content_sha256": "VARCHAR", "content_etag": "VARCHAR", "content_bytes": "BIGINT",
    "content_last_modified": "TIMESTAMPTZ",
}  # fmt: skip
_ASK_ROWS: Final = 4096  # images asked for at a time: answers must not pile up
_ASK_AT_ONCE: Final = 32


@dataclass(frozen=True, slots=True)
class History:
    """The indexes of the runs that count, oldest first."""

    run_ids: tuple[str, ...] = ()
    indexes: tuple[storage.StoredFile, ...] = ()


@dataclass(frozen=True, slots=True)
class SelectSettings:
    """Which rows to take."""

    select: tuple[Select, ...] = ("new", "changed")
    check_changed: bool = False  # ask the store for images that the manifest does not tell apart
    tombstones: bool = False  # also a row for each image of the history that the manifest has no more
    max_tombstone_fraction: float = 0.1
    explain: str | None = None  # an image_id


@dataclass(frozen=True, slots=True)
class Selection:
    """How many rows of a manifest are what to the history, and how many of them were taken."""

    manifest: int
    new: int = 0
    changed: int = 0
    failed: int = 0  # transiently: another try may succeed
    failed_for_good: int = 0
    up_to_date: int = 0
    deleted: int = 0  # of the history, not in the manifest any more; counted only with tombstones
    selected: int = 0
    asked: int = 0  # images whose store was asked whether they changed
    unasked: int = 0  # images of a scheme that can be fetched only, not asked
    unanswered: int = 0  # images whose store refuses to say; they count as not changed
    history_bytes: int = 0  # size of the indexes
    explanation: str | None = field(default=None, compare=False)

    def counts(self) -> dict[str, int]:
        """All of it but the words, as JSON."""
        return {name: value for name, value in asdict(self).items() if isinstance(value, int)}

    def describe(self) -> str:
        """One line for the log."""
        parts = [(self.new, "new"), (self.changed, "changed"), (self.failed, "failed before")]
        parts += [(self.failed_for_good, "failed for good")] if self.failed_for_good else []
        counted = ", ".join(f"{count:,} {words}" for count, words in [*parts, (self.up_to_date, "up to date")])
        gone = f"; {self.deleted:,} no longer in it" if self.deleted else ""
        asked = f"; {self.asked:,} asked of their store" if self.asked else ""
        unasked = f"; {self.unasked:,} on the web, where only the manifest tells changes" if self.unasked else ""
        silent = f"; {self.unanswered:,} of them their store would not tell of" if self.unanswered else ""
        return f"{self.manifest:,} in the manifest: {counted}{gone}{asked}{silent}{unasked}; {self.selected:,} selected"


def select_rows(
    connection: duckdb.DuckDBPyConnection,
    types: Mapping[str, pa.DataType],
    history: History,
    settings: SelectSettings,
    keys: Sequence[PartitionKey] = (),
) -> Selection:
    """Leave in the table `planned` what is to be labelled, and add tombstones: a column `deleted` tells them apart.

    Raises ManifestError when more of the history than settings allow would be marked deleted.
    """
    scan = _scan(connection, history)
    compared = [name for name in _CONTENT if name in types]
    _look_up(connection, _CONTENT if settings.check_changed or settings.explain else compared, scan)
    _classify(connection, compared if scan else ())
    asked = _ask(connection, settings) if settings.check_changed and scan else _Asked()
    counts = dict.fromkeys(TAKEN_BY, 0)
    for name, count in connection.execute("SELECT class, count(*) FROM classes GROUP BY ALL").fetchall():
        counts[name] = int(count)
    deleted = 0
    if settings.tombstones and scan:
        known = sum(counts.values()) - counts["new"]
        deleted = _find_deleted(connection, scan, keys, types, known=known, settings=settings)
    taken = [name for name, choices in TAKEN_BY.items() if set(choices) & set(settings.select)]
    explanation = None
    if settings.explain is not None:
        explanation = explain(connection, settings.explain, history.run_ids, compared, taken)
    if sum(counts[name] for name in taken) < sum(counts.values()):
        connection.execute(
            "CREATE TABLE selected AS SELECT p.* FROM planned p SEMI JOIN "
            f"(SELECT number FROM classes WHERE class IN ({', '.join(map(literal, taken))})) USING (number); "
            "DROP TABLE planned; ALTER TABLE selected RENAME TO planned"
        )
    connection.execute("ALTER TABLE planned ADD COLUMN deleted BOOLEAN DEFAULT false")
    if deleted:
        connection.execute("INSERT INTO planned BY NAME FROM gone")
    return Selection(
        manifest=sum(counts.values()),
        **counts,
        deleted=deleted,
        selected=count_rows(connection, "SELECT count(*) FROM planned"),
        asked=asked.num_asked,
        unasked=asked.num_unasked,
        unanswered=asked.num_unanswered,
        history_bytes=sum(file.num_bytes for file in history.indexes),
        explanation=explanation,
    )


def _scan(connection: duckdb.DuckDBPyConnection, history: History) -> str | None:
    """What stands after FROM for the rows of all indexes, with `run`, an index's place; None without history."""
    if not history.indexes:
        return None
    # A command that changes nothing has made some on the local disk, beside others that lie in a store.
    if all(storage.parse_uri(file.uri).scheme == "file" for file in history.indexes):
        names = uri_list([file.uri for file in history.indexes])
    else:
        listed = storage.ListedFiles(history.indexes)
        connection.register_filesystem(listed)
        names = f"[{', '.join(literal(listed.uri(file)) for file in history.indexes)}]"
    return f"(SELECT *, file_index AS run FROM read_parquet({names}, hive_partitioning = false))"


def _look_up(connection: duckdb.DuckDBPyConnection, content: Collection[str], scan: str | None) -> None:
    """Table `known`: per planned image that the history has, its newest row there; only what is compared is read."""
    types = {
        "image_id": "VARCHAR", "run": "BIGINT", "status": "VARCHAR", "error_code": "VARCHAR", "error_transient": "BOOLEAN",
    } | {prefix + name: _CONTENT[name] for name in content for prefix in ("", SAID)}  # fmt: skip
    if scan is None:
        columns = ", ".join(f"NULL::{type_} AS {name}" for name, type_ in types.items())
        connection.execute(f"CREATE TABLE known AS SELECT {columns} WHERE false")
        return
    # Indexes are sorted by id, so their statistics leave out what lies outside the manifest's range; the join's own filter
    # does not reach them (DuckDB 2.0: for ids that no index has 2 to 6 GB of 5.8 were read, 8 MB so).
    span = connection.execute("SELECT min(image_id), max(image_id) FROM planned").fetchall()[0]
    # One pass over the history, then the newest of the few that matched: flat rows, that DuckDB can keep on disk.
    with _unreadable_named():
        connection.execute(
            f"CREATE TABLE known AS SELECT {', '.join(types)} FROM (FROM {scan} WHERE image_id BETWEEN $1 AND $2) "
            "SEMI JOIN planned USING (image_id)",
            span,
        )
    if count_rows(connection, "SELECT count(*) - count(DISTINCT image_id) FROM known"):
        connection.execute(
            "CREATE TABLE newest AS FROM known SEMI JOIN (SELECT image_id, max(run) AS run FROM known GROUP BY image_id) "
            "USING (image_id, run); DROP TABLE known; ALTER TABLE newest RENAME TO known"
        )


@contextmanager
def _unreadable_named() -> Iterator[None]:
    """Say whose fault it is that the history cannot be read."""
    try:
        yield
    except duckdb.Error as error:
        words = storage.without_userinfo(" ".join(str(error).split()))[:500]
        damaged = OutputError(f"an index of an earlier run cannot be read: {words}; delete that file, it is made again")
        raise store_failure(error) or damaged from error


def _classify(connection: duckdb.DuckDBPyConnection, content: Collection[str]) -> None:
    """Table `classes`: number and class of every planned row."""
    manifest = "JOIN manifest m ON m.rowid = p.number" if content else ""
    connection.execute(
        "CREATE TABLE classes AS SELECT p.number, CASE "
        "WHEN k.image_id IS NULL OR k.status = 'deleted' THEN 'new' "
        f"WHEN {_changed_sql(content)} THEN 'changed' "
        "WHEN k.status = 'error' AND k.error_transient THEN 'failed' "
        "WHEN k.status = 'error' THEN 'failed_for_good' ELSE 'up_to_date' END AS class "
        f"FROM planned p LEFT JOIN known k USING (image_id) {manifest}"
    )


def _changed_sql(content: Collection[str]) -> str:
    """Whether manifest row m says something else than what k was labelled from, and than it said then.

    The manifest's spelling of an etag or hash need not be the store's: what it said before is as good.
    """

    def known(name: str) -> str:
        return f"(m.{name} IS NOT NULL AND k.{name} IS NOT NULL)"

    def differs(name: str) -> str:
        now = f"CAST(m.{name} AS {_CONTENT[name]})"
        return f"({now} <> k.{name} AND {now} IS DISTINCT FROM k.{SAID}{name})"

    sure = [name for name in ("content_sha256", "content_etag") if name in content]
    rest = [name for name in ("content_bytes", "content_last_modified") if name in content]
    cases = " ".join(f"WHEN {known(name)} THEN {differs(name)}" for name in sure)
    otherwise = " OR ".join(f"({known(name)} AND {differs(name)})" for name in rest) or "false"
    return f"(CASE {cases} ELSE {otherwise} END)" if cases else f"({otherwise})"


# ---- asking the store


@dataclass(frozen=True, slots=True)
class _Asked:
    num_asked: int = 0
    num_unasked: int = 0
    num_unanswered: int = 0


def _ask(connection: duckdb.DuckDBPyConnection, settings: SelectSettings) -> _Asked:
    """Ask the stores of images that would not be taken whether they are still what was labelled; mends `classes`.

    Not of images that were never fetched: what is known of them is what the manifest said.
    """
    untaken = [name for name, choices in TAKEN_BY.items() if not set(choices) & set(settings.select)]
    if not untaken:
        return _Asked()
    unfetched = [code for code, (stage, _, _) in ERROR_CODES.items() if stage == "fetch"]
    reader = connection.cursor().sql(
        "SELECT p.number, p.uri, k.content_etag, k.content_bytes, k.content_last_modified "
        "FROM planned p JOIN known k USING (image_id) JOIN classes c USING (number) "
        f"WHERE c.class IN ({', '.join(map(literal, untaken))}) AND p.{REFUSED} IS NULL "
        f"AND coalesce(k.error_code, '') NOT IN ({', '.join(map(literal, unfetched))})"
    ).to_arrow_reader(_ASK_ROWS)  # fmt: skip
    changed: list[int] = []
    num_asked = num_unasked = num_unanswered = 0
    with ThreadPoolExecutor(_ASK_AT_ONCE) as pool:
        for batch in reader:
            rows = [row for row in batch.to_pylist() if storage.parse_uri(row["uri"]).scheme in ("s3", "file")]
            num_asked, num_unasked = num_asked + len(rows), num_unasked + batch.num_rows - len(rows)
            answers = list(zip(rows, pool.map(_is_new, rows), strict=True))
            changed += [row["number"] for row, new in answers if new]
            num_unanswered += sum(new is None for _, new in answers)
    connection.execute("UPDATE classes SET class = 'changed' WHERE number IN (SELECT unnest($1::BIGINT[]))", [changed])
    return _Asked(num_asked, num_unasked, num_unanswered)


def _is_new(row: Mapping[str, Any]) -> bool | None:
    """Whether what lies under a row's uri now is something else than what was labelled; gone is not something else.

    None: its store refuses to say. Raises StorageError when the store does not answer.
    """
    try:
        found = storage.stat_file(row["uri"])
    except storage.STORE_ERRORS:  # permanent ones only; the others were tried again
        return None
    if found is None:
        return False
    if row["content_etag"] is not None and storage.parse_uri(row["uri"]).scheme == "s3":
        return bool(found.version != row["content_etag"].removeprefix("W/").strip('"'))
    pairs = [(found.num_bytes, row["content_bytes"]), (found.last_modified, row["content_last_modified"])]
    return any(None not in pair and pair[0] != pair[1] for pair in pairs)


# ---- what is no longer there


def _find_deleted(
    connection: duckdb.DuckDBPyConnection,
    scan: str,
    keys: Sequence[PartitionKey],
    types: Mapping[str, pa.DataType],
    *,
    known: int,
    settings: SelectSettings,
) -> int:
    """Table `gone`: rows like those of `planned` for images of the history that the manifest has no more; how many.

    Each stays in the partition of its newest row where that has the same keys and values of their types now, else the
    keys are null.
    """
    nulls = "/".join(f"{key.name}={HIVE_NULL}" for key in keys)
    with _unreadable_named():
        connection.execute(
            "CREATE TABLE gone AS WITH others AS ("
            f"SELECT image_id, max(run) AS run FROM {scan} ANTI JOIN planned USING (image_id) GROUP BY image_id) "
            f"SELECT image_id, uri, NULL::VARCHAR AS {REFUSED}, 0 AS shape, true AS deleted, "
            # beyond every row of the manifest, duplicates that were dropped included: pin joins by it
            "(SELECT max(rowid) FROM manifest) + row_number() OVER (ORDER BY image_id) AS number, "
            f"CASE WHEN {fits_path_sql(keys, types, 'partition')} THEN partition ELSE {literal(nulls)} END AS {PARTITION} "
            f"FROM {scan} SEMI JOIN others USING (image_id, run) WHERE status <> 'deleted'"
        )
    deleted = count_rows(connection, "SELECT count(*) FROM gone")
    limit = settings.max_tombstone_fraction
    if deleted > limit * (deleted + known):
        examples = connection.execute("SELECT image_id FROM gone ORDER BY image_id LIMIT 3").fetchall()
        raise ManifestError(
            f"{deleted:,} of the {deleted + known:,} images that were labelled are not in the manifest (such as "
            f"{', '.join(repr(storage.without_secrets(row[0])) for row in examples)}), more than --max-tombstone-fraction "
            f"{limit:g}. Is the manifest whole? If so, raise the limit, or leave out --tombstones"
        )
    return deleted
