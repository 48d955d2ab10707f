"""Audit of an output: every run against its pinned plan, every file against the labelling. Never mends anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from fcos_ray import storage
from fcos_ray.errors import OutputError
from fcos_ray.inputs.pin import PinnedFile, read_shard
from fcos_ray.outputs import runs
from fcos_ray.outputs.audit import Findings, Kind, audit_run
from fcos_ray.outputs.commit import ShardCounts, ShardTarget
from fcos_ray.outputs.rows import wrong_rows


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

    Raises OutputError when there is nothing to audit, StorageError when a store fails.
    """
    output = storage.parse_uri(output).uri
    labelling, found = runs.read_labelling(output), runs.list_runs(output)
    chosen = [run for run in found if run_id in (None, run.run_id)]
    if not chosen or labelling is None:
        known = ", ".join(run.run_id for run in found) or "none"
        missing = f"no run {run_id}" if run_id else "no run" if not chosen else "no labelling.json"
        raise OutputError(f"{output}: {missing} there (its runs: {known}); wanted what jobs/detect.py wrote")
    findings, totals = Findings(), []
    if run_id is None:
        _find_strangers(output, {run.run_id for run in found}, findings)
    for run in chosen:
        totals.append(_audit_run(output, run, labelling, findings, deep=deep))
    return AuditSummary(
        output,
        deep,
        runs=len(chosen),
        open_runs=sum(not run.finished for run in chosen),
        shards=sum(total.shards for total in totals),
        open_shards=sum(total.open_shards for total in totals),
        rows=sum(total.rows for total in totals),
        findings=dict(findings.num_by_kind),
        examples=findings.examples,
    )


@dataclass(frozen=True, slots=True)
class _Total:
    shards: int
    open_shards: int
    rows: int


def _find_strangers(output: str, run_ids: Iterable[str], findings: Findings) -> None:
    """What lies under detections/ and belongs to no pinned run."""
    folder = storage.join(output, "detections")
    for name in storage.list_folders(folder):
        if name.removeprefix("run=") not in run_ids or not name.startswith("run="):
            findings.add("foreign", f"{storage.join(folder, name)}: no run of that name was pinned; move it away")
    for file in storage.expand(storage.join(folder, "*")):
        findings.add("foreign", f"{file.uri}: no run writes there; move it away")


def _audit_run(
    output: str, run: runs.RunState, labelling: Mapping[str, Any], findings: Findings, *, deep: bool
) -> _Total:
    record, folder = runs.read_run(output, run.run_id), runs.run_folder(output, run.run_id)
    try:
        files = tuple(PinnedFile(f["name"], f["first_shard"], tuple(f["shard_rows"])) for f in record["files"])
        target = ShardTarget(output, run.run_id, tuple(record["partition_by"]), labelling)
        pinned_folder = storage.join(folder, record["attempt"])
    except (KeyError, TypeError) as error:
        findings.add("unreadable", f"{folder}/run.json is damaged: {error!r}")
        return _Total(0, 0, 0)
    shard_rows = [rows for file in files for rows in file.shard_rows]

    def check_rows(shard: int, uri: str, table: pa.Table) -> Iterable[tuple[Kind, str]]:
        pinned = _pinned(pinned_folder, files, shard)
        if pinned is None:
            return [("unreadable", f"the pinned rows of {uri} below {pinned_folder}")]
        place = target.data_uri(pinned["__partition"][0].as_py(), shard)
        if place != uri:
            return [("foreign", f"{uri}: the plan puts that shard at {place}")]
        words = wrong_rows(table, pinned, partition_by=target.partition_by, labelling=labelling)
        return [("wrong_rows", f"{uri}: {text}") for text in words]

    before = findings.num_by_kind.total()
    audited = audit_run(target, shard_rows, findings, check_rows=check_rows if deep else None)
    if run.finished:
        if audited.num_missing:
            words = f"{audited.missing_words(run.run_id)}, though it has _SUCCESS.json"
            findings.add("missing", words, count=audited.num_missing)
        elif findings.num_by_kind.total() == before:  # else the sums cannot agree, which would say it again
            _check_success(output, run.run_id, audited.counts, findings)
    return _Total(audited.num_shards, 0 if run.finished else audited.num_missing, audited.counts.rows)


def _pinned(folder: str, files: tuple[PinnedFile, ...], shard: int) -> pa.Table | None:
    try:
        return read_shard(folder, files, shard)
    except (FileNotFoundError, pa.ArrowException):
        return None


def _check_success(output: str, run_id: str, counts: ShardCounts, findings: Findings) -> None:
    success = runs.read_success(output, run_id) or {}
    for name in ("rows", "ok", "error", "detections", "errors_by_code"):
        if success.get(name) != getattr(counts, name):
            words = (
                f"run {run_id}: _SUCCESS.json has {name} {success.get(name)!r}, its shards {getattr(counts, name)!r}"
            )
            findings.add("wrong_counts", words)
