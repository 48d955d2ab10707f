"""Audit: the shard files of a run, held against its plan, one by one. Knows files and footers; what rows mean is in rows.py.

A finding is something that no run of ours leaves behind: whoever reads the output should know of it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from fcos_ray import storage
from fcos_ray.errors import OutputError
from fcos_ray.outputs.commit import (
    DATA_FILE,
    METADATA_KEY,
    ShardCounts,
    ShardTarget,
    count_outcomes,
    data_folder,
    is_damage,
)
from fcos_ray.outputs.runs import differences

Kind = Literal[
    "missing", "doubled", "foreign", "unreadable", "wrong_rows", "wrong_counts", "changed_settings", "stale",
]  # fmt: skip
_EXAMPLES: Final = 5  # of each kind
_EXAMPLE_CHARACTERS: Final = 500
_AT_ONCE: Final = 64  # shard files asked for at a time: their findings must not pile up


@dataclass(slots=True)
class Findings:
    """What is wrong: counts of each kind, and a few of each in words. Its size is bounded, whatever is found."""

    num_by_kind: Counter[Kind] = field(default_factory=Counter)
    examples: dict[Kind, list[str]] = field(default_factory=dict)

    def add(self, kind: Kind, words: str, *, count: int = 1) -> None:
        self.num_by_kind[kind] += count
        if len(self.examples.setdefault(kind, [])) < _EXAMPLES:
            cut = words if len(words) <= _EXAMPLE_CHARACTERS else f"{words[:_EXAMPLE_CHARACTERS]}…"
            self.examples[kind].append(cut)

    def merge(self, other: Findings) -> None:
        self.num_by_kind += other.num_by_kind
        for kind, examples in other.examples.items():
            self.examples[kind] = (self.examples.get(kind, []) + examples)[:_EXAMPLES]

    def __bool__(self) -> bool:
        return bool(self.num_by_kind)


CheckRows = Callable[[int, str, pa.Table, Findings], None]  # shard, uri, all its rows, where to tell


@dataclass(frozen=True, slots=True)
class RunAudit:
    """What a run's files hold."""

    counts: ShardCounts
    num_shards: int  # that are there
    num_missing: int
    first_missing: int | None
    num_forgotten: int  # rows that were taken out of its files again

    def missing_words(self, run_id: str) -> str:
        """How many of the run's shards are not there."""
        planned = self.num_shards + self.num_missing
        return f"run {run_id}: {self.num_missing:,} of {planned:,} shards are missing, such as {self.first_missing}"


def audit(target: ShardTarget, shard_rows: Sequence[int], *, partitions: Sequence[str] | None = None) -> ShardCounts:
    """Hold a complete run against its plan, and add up what it holds. `partitions`: see `audit_run`.

    Raises OutputError naming what is missing, doubled, foreign, changed or unreadable.
    """
    findings = Findings()
    found = audit_run(target, shard_rows, findings, partitions=partitions)
    if found.num_missing:
        findings.add("missing", found.missing_words(target.run_id), count=found.num_missing)
    if findings:
        first, *more = (text for examples in findings.examples.values() for text in examples)
        raise OutputError(first + (" (and more: jobs/audit.py names them)" if more else ""))
    return found.counts


def audit_run(
    target: ShardTarget,
    shard_rows: Sequence[int],
    findings: Findings,
    *,
    partitions: Sequence[str] | None = None,
    check_rows: CheckRows | None = None,
) -> RunAudit:
    """Look at every shard file of a run, or at every row with `check_rows`; tells `findings`. Missing shards are counted only.

    `partitions` says for each shard the folder that the plan decides; without it the places of a partitioned run are not
    looked at. Raises StorageError when a store fails: what cannot be reached is not known to be wrong.
    """
    if partitions is None and not target.partition_by:
        partitions = [""] * len(shard_rows)
    committed = _placed(target, len(shard_rows), partitions, findings)
    counts, shards, forgotten = ShardCounts(), sorted(committed), 0
    # Every row means a whole table in hand: four of 32,768 rows with 100 boxes each are about half a gigabyte.
    with ThreadPoolExecutor(4 if check_rows else 16) as pool:
        for start in range(0, len(shards), _AT_ONCE):
            some = shards[start : start + _AT_ONCE]
            for looked in pool.map(lambda s: _look(target, s, committed[s], shard_rows[s], check_rows), some):
                findings.merge(looked.findings)
                counts += looked.counts
                forgotten += looked.num_forgotten
    missing = [shard for shard in range(len(shard_rows)) if shard not in committed]
    return RunAudit(counts, len(shards), len(missing), next(iter(missing), None), forgotten)


def _placed(
    target: ShardTarget, num_shards: int, partitions: Sequence[str] | None, findings: Findings
) -> dict[int, str]:
    """Shard -> its file, for those whose names a plan of so many shards decides."""
    committed: dict[int, str] = {}
    misplaced: dict[int, list[str]] = {}
    for file in storage.list_files(data_folder(target.output, target.run_id)):
        match = DATA_FILE.fullmatch(file.uri.rsplit("/", 1)[1])
        shard = int(match[1]) if match else -1
        if not match:
            findings.add("foreign", f"{file.uri}: no run writes files of that name; move it away")
        elif shard >= num_shards:
            findings.add("foreign", f"{file.uri}: the plan has {num_shards:,} shards; move it away")
        elif partitions is not None and file.uri != target.data_uri(partitions[shard], shard):
            misplaced.setdefault(shard, []).append(file.uri)
        elif shard in committed:
            findings.add("doubled", f"{file.uri} and {committed[shard]} are one shard; move the wrong one away")
        else:
            committed[shard] = file.uri
    for shard, uris in misplaced.items():
        assert partitions is not None
        kind: Kind = "doubled" if shard in committed or len(uris) > 1 else "foreign"
        for uri in uris:
            place = target.data_uri(partitions[shard], shard)
            findings.add(kind, f"{uri}: the plan puts that shard at {place}; move it away")
        committed.setdefault(shard, uris[0])  # a reader finds its rows: they are held against the plan too
    return committed


@dataclass(frozen=True, slots=True)
class _Looked:
    counts: ShardCounts
    findings: Findings
    num_forgotten: int = 0


def _look(target: ShardTarget, shard: int, uri: str, num_rows: int, check_rows: CheckRows | None) -> _Looked:
    found = Findings()
    try:
        about, table = storage.retrying(f"auditing {uri}", lambda: _read(uri, whole=check_rows is not None))
    except (pa.ArrowException, ValueError, OSError) as error:
        if not is_damage(error):
            raise
        found.add("unreadable", f"{uri} cannot be read: {error}")
        return _Looked(ShardCounts(), found)
    if (about.get("run_id"), about.get("shard")) != (target.run_id, shard):
        got = f"{about.get('shard')} of {about.get('run_id')}"
        found.add("foreign", f"{uri}: wanted shard {shard} of run {target.run_id}, got {got}")
        return _Looked(ShardCounts(), found)
    for name, wanted, came in _changed(target.labelling, about):
        found.add("changed_settings", f"{uri}: made with {name} {came!r}, the output has {wanted!r}")
    rows = table["row"].to_pylist() if "row" in table.column_names else []
    forgotten = about.get("forgotten", 0)
    if type(forgotten) is not int or not 0 <= forgotten <= num_rows:
        forgotten = 0
    num_left = num_rows - forgotten
    if len(rows) != num_left or not set(rows) <= set(range(num_rows)) or rows != sorted(set(rows)):
        got = f"got {len(rows)} rows, {len(set(rows))} distinct"
        less = f", less {forgotten} forgotten ones" if forgotten else ""
        found.add("wrong_rows", f"{uri}: wanted rows 0 to {num_rows - 1} once each{less}, {got}")
    elif check_rows:
        check_rows(shard, uri, table, found)
    counts = _counts(about)
    if counts is None or counts.rows != num_left:
        has = "no counts" if counts is None else f"{counts.rows} rows"
        found.add("wrong_counts", f"{uri}: its metadata has {has}, the plan {num_left} rows")
    elif check_rows and not found and (held := count_outcomes(table)) != _outcomes(counts):
        found.add("wrong_counts", f"{uri}: its metadata has {_outcomes(counts)}, its rows {held}")
    return _Looked(counts or ShardCounts(), found, forgotten)


def _read(uri: str, *, whole: bool) -> tuple[dict[str, Any], pa.Table]:
    """What a file says about itself, and its row numbers or everything. Raises ValueError or Arrow's errors for damage."""
    with storage.open_for_reading(uri) as handle:
        parquet = pq.ParquetFile(handle)
        about = json.loads((parquet.schema_arrow.metadata or {}).get(METADATA_KEY, b"{}"))
        if not isinstance(about, dict):
            raise ValueError(f"its metadata is {type(about).__name__}, wanted a JSON object")
        table = parquet.read() if whole else parquet.read(columns=["row"])
    table.validate(full=whole)  # text that is no UTF-8, lists that end before they begin
    return about, table


def _counts(about: Mapping[str, Any]) -> ShardCounts | None:
    """What a file says that it holds; None when it does not say it in whole numbers."""
    try:
        counts = ShardCounts(**about["counts"])
        numbers = [counts.rows, counts.ok, counts.error, counts.deleted, counts.detections, counts.retries]
        whole = all(type(n) is int for n in [*numbers, *counts.errors_by_code.values()])
        return counts if whole and all(isinstance(s, int | float) for s in counts.seconds.values()) else None
    except (KeyError, TypeError, AttributeError):
        return None


def _outcomes(counts: ShardCounts) -> ShardCounts:
    """Without what only the stages knew."""
    return replace(counts, retries=0, seconds={})


def _changed(labelling: Mapping[str, Any], about: Mapping[str, Any]) -> tuple[tuple[str, Any, Any], ...]:
    """Settings a file says it was made with that are not the output's: name, the output's, the file's."""
    theirs = {name: about.get(name) for name in labelling}
    if not isinstance(theirs.get("settings"), dict):
        theirs["settings"] = {}
    return differences(labelling, theirs)
