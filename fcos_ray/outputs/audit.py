"""Audit: the shard files of a run, held against its plan, one by one. Knows files and footers; what rows mean is in rows.py.

A finding is something that no run of ours leaves behind: whoever reads the output should know of it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from fcos_ray import storage
from fcos_ray.errors import OutputError
from fcos_ray.outputs.commit import DATA_FILE, METADATA_KEY, ShardCounts, ShardTarget, data_folder

Kind = Literal["missing", "doubled", "foreign", "unreadable", "wrong_rows", "wrong_counts", "changed_settings"]
CheckRows = Callable[[int, str, pa.Table], Iterable[tuple[Kind, str]]]  # shard, uri, all its rows
_EXAMPLES: Final = 5  # of each kind
_AT_ONCE: Final = 64  # shard files asked for at a time: their tables must not pile up


@dataclass(slots=True)
class Findings:
    """What is wrong: counts of each kind, and a few of each in words."""

    num_by_kind: Counter[Kind] = field(default_factory=Counter)
    examples: dict[Kind, list[str]] = field(default_factory=dict)

    def add(self, kind: Kind, words: str, *, count: int = 1) -> None:
        self.num_by_kind[kind] += count
        if len(self.examples.setdefault(kind, [])) < _EXAMPLES:
            self.examples[kind].append(words)

    def __bool__(self) -> bool:
        return bool(self.num_by_kind)


@dataclass(frozen=True, slots=True)
class RunAudit:
    """What a run's files hold, and what is wrong with them."""

    counts: ShardCounts
    num_shards: int  # that are there
    num_missing: int
    first_missing: int | None
    findings: Findings

    def missing_words(self, run_id: str) -> str:
        """How many of the run's shards are not there."""
        planned = self.num_shards + self.num_missing
        return f"run {run_id}: {self.num_missing:,} of {planned:,} shards are missing, such as {self.first_missing}"


def audit(target: ShardTarget, shard_rows: Sequence[int]) -> ShardCounts:
    """Hold a complete run against its plan, and add up what it holds.

    Raises OutputError naming what is missing, doubled, foreign, changed or unreadable.
    """
    found = audit_run(target, shard_rows, Findings())
    if found.num_missing:
        found.findings.add("missing", found.missing_words(target.run_id))
    if found.findings:
        words = [text for examples in found.findings.examples.values() for text in examples]
        more = found.findings.num_by_kind.total() - 1
        raise OutputError(words[0] + (f" (and {more:,} more: jobs/audit.py names them)" if more else ""))
    return found.counts


def audit_run(
    target: ShardTarget, shard_rows: Sequence[int], findings: Findings, *, check_rows: CheckRows | None = None
) -> RunAudit:
    """Look at every shard file of a run, or at every row with `check_rows`; tells `findings`. Missing shards are counted only.

    Raises StorageError when a store fails: what cannot be reached is not known to be wrong.
    """
    committed = _placed(target, len(shard_rows), findings)
    counts, shards = ShardCounts(), sorted(committed)
    with ThreadPoolExecutor(16) as pool:
        for start in range(0, len(shards), _AT_ONCE):
            some = shards[start : start + _AT_ONCE]
            for looked in pool.map(lambda s: _look(target, s, committed[s], shard_rows[s], check_rows), some):
                for kind, words in looked.wrong:
                    findings.add(kind, words)
                counts += looked.counts
    missing = [shard for shard in range(len(shard_rows)) if shard not in committed]
    return RunAudit(counts, len(shards), len(missing), next(iter(missing), None), findings)


def _placed(target: ShardTarget, num_shards: int, findings: Findings) -> dict[int, str]:
    """Shard -> its file, for those whose names a plan of so many shards decides."""
    committed: dict[int, str] = {}
    for file in storage.list_files(data_folder(target.output, target.run_id)):
        match = DATA_FILE.fullmatch(file.uri.rsplit("/", 1)[1])
        if match is None:
            findings.add("foreign", f"{file.uri}: no run writes files of that name; move it away")
        elif int(match[1]) >= num_shards:
            findings.add("foreign", f"{file.uri}: the plan has {num_shards:,} shards; move it away")
        elif int(match[1]) in committed:
            findings.add("doubled", f"{file.uri} and {committed[int(match[1])]} are one shard; move the wrong one away")
        else:
            committed[int(match[1])] = file.uri
    return committed


@dataclass(frozen=True, slots=True)
class _Looked:
    counts: ShardCounts
    wrong: list[tuple[Kind, str]]


def _look(target: ShardTarget, shard: int, uri: str, num_rows: int, check_rows: CheckRows | None) -> _Looked:
    def read() -> tuple[dict[str, Any], pa.Table]:
        with storage.open_for_reading(uri) as handle:
            parquet = pq.ParquetFile(handle)
            about = json.loads((parquet.schema_arrow.metadata or {}).get(METADATA_KEY, b"{}"))
            return about, parquet.read() if check_rows else parquet.read(columns=["row"])

    try:
        about, table = storage.retrying(f"auditing {uri}", read)
    except (pa.ArrowException, ValueError) as error:
        return _Looked(ShardCounts(), [("unreadable", f"{uri} cannot be read: {error}")])
    except OSError as error:
        if error.errno is not None:
            raise  # the store's; Arrow raises an OSError without a number for damage (pyarrow 26)
        return _Looked(ShardCounts(), [("unreadable", f"{uri} cannot be read: {error}")])
    wrong: list[tuple[Kind, str]] = []
    if (about.get("run_id"), about.get("shard")) != (target.run_id, shard):
        got = f"{about.get('shard')} of {about.get('run_id')}"
        return _Looked(ShardCounts(), [("foreign", f"{uri}: wanted shard {shard} of run {target.run_id}, got {got}")])
    wrong += [("changed_settings", f"{uri}: {words}") for words in _changed(target.labelling, about)]
    rows = table["row"].to_pylist() if "row" in table.column_names else []
    if rows != list(range(num_rows)):
        got = f"got {len(rows)} rows, {len(set(rows))} distinct"
        wrong.append(("wrong_rows", f"{uri}: wanted rows 0 to {num_rows - 1} once each, {got}"))
    elif check_rows:
        wrong += check_rows(shard, uri, table)
    counts = _counts(about)
    if counts is None or counts.rows != num_rows:
        has = "no counts" if counts is None else f"{counts.rows} rows"
        wrong.append(("wrong_counts", f"{uri}: its metadata has {has}, the plan {num_rows} rows"))
    return _Looked(counts or ShardCounts(), wrong)


def _counts(about: Mapping[str, Any]) -> ShardCounts | None:
    try:
        return ShardCounts(**about["counts"])
    except (KeyError, TypeError):
        return None


def _changed(labelling: Mapping[str, Any], about: Mapping[str, Any]) -> list[str]:
    """Settings a file says it was made with that are not the output's. The weights' name is not one: their hash is."""
    names = [name for name in labelling if name not in ("weights", "settings")]
    pairs = [(name, labelling[name], about.get(name)) for name in names]
    theirs = about.get("settings") or {}
    pairs += [(name, value, theirs.get(name)) for name, value in labelling.get("settings", {}).items()]
    return [f"made with {name} {got!r}, the output has {wanted!r}" for name, wanted, got in pairs if got != wanted]
