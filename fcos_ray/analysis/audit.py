"""Audit of an output: every run against its pinned plan, every file against the labelling. Never mends anything."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from fcos_ray import storage
from fcos_ray.errors import OutputError
from fcos_ray.inputs.pin import read_partitions, read_shard
from fcos_ray.outputs import runs
from fcos_ray.outputs.audit import Findings, Kind, audit_run
from fcos_ray.outputs.commit import ShardCounts
from fcos_ray.outputs.rows import wrong_rows
from fcos_ray.pinned import PinnedRun, pinned_run


@dataclass(frozen=True, slots=True)
class AuditSummary:
    """What was looked at, and what was found: `findings` is empty when all is as the plans say."""

    output: str
    deep: bool
    runs: int
    open_runs: int
    shards: int
    open_shards: int  # of open runs, not committed yet
    rows: int
    findings: dict[Kind, int] = field(default_factory=dict)
    examples: dict[Kind, list[str]] = field(default_factory=dict)


def audit_output(output: str, *, run_id: str | None = None, deep: bool = False) -> AuditSummary:
    """Hold an output, or one run of it, against its plans. `deep` reads every row and every pinned row.

    A damaged record is a finding, and what only it could tell is not looked at. Raises OutputError when there is nothing to
    audit, StorageError when a store fails.
    """
    output = storage.parse_uri(output).uri
    findings = Findings()
    states, damaged = _read_states(output, run_id, findings)
    labelling = _read_labelling(output, findings)
    if not (states or damaged) or (labelling is None and not findings):
        known = ", ".join(runs.list_run_folders(output)[-5:]) or "none"
        missing = "no labelling.json" if states else f"no run {run_id}" if run_id else "no run"
        raise OutputError(
            f"{storage.without_secrets(output)}: {missing} there (its runs: {known}); wanted what jobs/detect.py wrote"
        )
    if run_id is None:
        _find_strangers(output, {*damaged, *(state.run_id for state in states)}, findings)
    if labelling is None:
        states = []  # nothing to hold them against
    totals = [_audit_run(output, state, labelling or {}, findings, deep=deep) for state in states]
    return AuditSummary(
        output,
        deep,
        runs=len(states),
        open_runs=sum(not state.finished for state in states),
        shards=sum(total.shards for total in totals),
        open_shards=sum(total.open_shards for total in totals),
        rows=sum(total.rows for total in totals),
        findings=dict(findings.num_by_kind),
        examples=findings.examples,
    )


def _read_states(output: str, run_id: str | None, findings: Findings) -> tuple[list[runs.RunState], list[str]]:
    """The pinned runs, and those whose record is damaged."""
    folders = [name for name in runs.list_run_folders(output) if run_id in (None, name)]

    def read(name: str) -> runs.RunState | OutputError | None:
        try:
            return runs.read_state(output, name)
        except OutputError as error:
            return error

    with ThreadPoolExecutor(16) as pool:
        found = list(zip(folders, pool.map(read, folders), strict=True))
    damaged = {name: state for name, state in found if isinstance(state, OutputError)}
    for error in damaged.values():
        findings.add("unreadable", str(error))
    return [state for _, state in found if isinstance(state, runs.RunState)], list(damaged)


def _read_labelling(output: str, findings: Findings) -> dict[str, Any] | None:
    """What all runs share; None when it is not there, or damaged."""
    try:
        labelling = runs.read_labelling(output)
    except OutputError as error:
        findings.add("unreadable", str(error))
        return None
    if labelling is None:
        return None
    settings, categories = labelling.get("settings"), labelling.get("categories")
    if isinstance(settings, dict) and isinstance(categories, list):
        numbers = [settings.get(name) for name in ("score_threshold", "max_detections")]
        if all(isinstance(n, int | float) for n in numbers) and all(isinstance(c, str) for c in categories):
            return labelling
    words = "is damaged: it lacks categories, score_threshold or max_detections"
    findings.add("unreadable", f"{output}/labelling.json {words}; no run can be held against it")
    return None


@dataclass(frozen=True, slots=True)
class _Total:
    shards: int = 0
    open_shards: int = 0
    rows: int = 0


def _find_strangers(output: str, run_ids: Iterable[str], findings: Findings) -> None:
    """What lies under detections/ and belongs to no pinned run."""
    folder = storage.join(output, "detections")
    for name in storage.list_folders(folder):
        if name.removeprefix("run=") not in run_ids or not name.startswith("run="):
            findings.add("foreign", f"{storage.join(folder, name)}: no run of that name was pinned; move it away")
    for file in storage.expand(storage.join(glob.escape(folder), "*")):
        findings.add("foreign", f"{file.uri}: no run writes there; move it away")


def _plan(output: str, run_id: str, record: Mapping[str, Any], labelling: Mapping[str, Any]) -> PinnedRun:
    """Raises ValueError, KeyError or TypeError for a record that names no whole plan."""
    if record["run_id"] != run_id:
        raise ValueError(f"it is the record of run {record['run_id']}")
    plan = pinned_run(output, record, labelling)
    sizes, files = plan.shard_rows, plan.files
    if any(type(rows) is not int or rows < 1 for rows in sizes):
        raise ValueError("a shard's number of rows is none")
    firsts = [sum(len(f.shard_rows) for f in files[:number]) for number in range(len(files))]
    if [file.first_shard for file in files] != firsts:
        raise ValueError("first_shard of its files does not count their shards")
    if (record["num_rows"], record["num_shards"]) != (sum(sizes), len(sizes)):
        raise ValueError(f"num_rows and num_shards are not those of its files, {sum(sizes):,} and {len(sizes):,}")
    return plan


def _audit_run(
    output: str, state: runs.RunState, labelling: Mapping[str, Any], findings: Findings, *, deep: bool
) -> _Total:
    record, about = runs.read_run(output, state.run_id), f"{runs.run_folder(output, state.run_id)}/run.json"
    try:
        plan = _plan(output, state.run_id, record, labelling)
    except (ValueError, KeyError, TypeError) as error:
        findings.add("unreadable", f"{about} is damaged: {error!r}")
        return _Total()
    asked = record.get("settings")
    for name, value in labelling["settings"].items():
        if isinstance(asked, dict) and name in asked and asked[name] != value:
            findings.add("changed_settings", f"{about} has {name} {asked[name]!r}, the output has {value!r}")
    before = findings.num_by_kind.total()
    partitions = _read_partitions(plan, findings)

    def check_rows(shard: int, uri: str, table: pa.Table, found: Findings) -> None:
        pinned = _read_pinned(plan, shard)
        if pinned is None or pinned.num_rows != table.num_rows:
            found.add("unreadable", f"the pinned rows of {uri} below {plan.folder}")
            return
        for wrong in wrong_rows(table, pinned, target=plan.target, shard=shard):
            found.add("wrong_rows", f"{uri}: {wrong.words}", count=wrong.num_rows)

    audited = audit_run(
        plan.target, plan.shard_rows, findings, partitions=partitions, check_rows=check_rows if deep else None
    )
    if state.finished:
        if audited.num_missing:
            words = f"{audited.missing_words(state.run_id)}, though it has _SUCCESS.json"
            findings.add("missing", words, count=audited.num_missing)
        elif findings.num_by_kind.total() == before:  # else the sums cannot agree, which would say it again
            _check_success(output, state.run_id, audited.counts, findings)
    return _Total(audited.num_shards, 0 if state.finished else audited.num_missing, audited.counts.rows)


def _read_partitions(plan: PinnedRun, findings: Findings) -> Sequence[str] | None:
    if not plan.target.partition_by:
        return None
    try:
        return read_partitions(plan.folder, plan.files)
    except (pa.ArrowException, OSError) as error:
        if _is_the_stores(error):
            raise
        findings.add("unreadable", f"the pinned manifest below {plan.folder}: {error}")
        return None


def _read_pinned(plan: PinnedRun, shard: int) -> pa.Table | None:
    """The pinned rows of a shard; None when they cannot be read."""
    try:
        return read_shard(plan.folder, plan.files, shard)
    except (pa.ArrowException, OSError) as error:
        if _is_the_stores(error):
            raise
        return None


def _is_the_stores(error: Exception) -> bool:
    # Arrow raises an OSError without a number for damage (pyarrow 26); s3fs's FileNotFoundError has none either.
    return isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError)


def _check_success(output: str, run_id: str, counts: ShardCounts, findings: Findings) -> None:
    try:
        success = runs.read_success(output, run_id) or {}
    except OutputError as error:
        findings.add("unreadable", str(error))
        return
    for name in ("rows", "ok", "error", "detections", "errors_by_code"):
        if success.get(name) != getattr(counts, name):
            words = (
                f"run {run_id}: _SUCCESS.json has {name} {success.get(name)!r}, its shards {getattr(counts, name)!r}"
            )
            findings.add("wrong_counts", words)
