"""Audit of an output: every run against its pinned plan, every file against the labelling. Never mends anything."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fcos_ray import storage
from fcos_ray.errors import OutputError
from fcos_ray.inputs.pinned_files import read_partitions, read_shard
from fcos_ray.outputs import runs
from fcos_ray.outputs.audit import Findings, Kind, RunAudit, audit_run
from fcos_ray.outputs.commit import is_damage
from fcos_ray.outputs.retractions import read_retracted, retracted_uri
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
    abandoned_shards: int  # of abandoned runs, never to come
    forgotten_rows: int  # taken out again by jobs/runs.py forget
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
        _check_retracted(output, states, findings)
    states = [state for state in states if state.state != "purged"]  # what a purge leaves behind is no finding
    if labelling is None:
        states = []  # nothing to hold them against
    totals = [_audit_run(output, state, labelling or {}, findings, deep=deep) for state in states]
    return AuditSummary(
        output,
        deep,
        runs=len(states),
        open_runs=sum(state.state == "open" for state in states),
        shards=sum(total.shards for total in totals),
        open_shards=sum(total.open_shards for total in totals),
        abandoned_shards=sum(total.abandoned_shards for total in totals),
        forgotten_rows=sum(total.forgotten_rows for total in totals),
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
    abandoned_shards: int = 0
    rows: int = 0
    forgotten_rows: int = 0


def _check_retracted(output: str, states: Iterable[runs.RunState], findings: Findings) -> None:
    """Whether the table for readers that know no marks says what the marks say."""
    marked = sorted(state.run_id for state in states if state.state in ("retracted", "purged"))
    try:
        table = read_retracted(output)
    except (pa.ArrowException, KeyError, OSError) as error:
        if not _is_finding(error):
            raise
        findings.add("unreadable", f"{retracted_uri(output)}: {error}; jobs/runs.py retract or restore writes it anew")
        return
    if table != marked and (marked or table is not None):
        words = (
            f"{retracted_uri(output)} names {table}, retracted are {marked}: plain SQL counts other rows than it should"
        )
        findings.add("stale", f"{words}; jobs/runs.py retract or restore on any of them writes it anew")


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
        places = [] if pinned is None else pc.indices_nonzero(pc.is_valid(pinned["image_id"])).to_pylist()
        if pinned is None or places != table["row"].to_pylist():  # a row that was forgotten is blank in the plan
            found.add("unreadable", f"the pinned rows of {uri} below {plan.folder}")
            return
        pinned = pinned.take(pa.array(places, pa.int64()))
        for wrong in wrong_rows(table, pinned, target=plan.target, shard=shard):
            found.add("wrong_rows", f"{uri}: {wrong.words}", count=wrong.num_rows)

    audited = audit_run(
        plan.target, plan.shard_rows, findings, partitions=partitions, check_rows=check_rows if deep else None
    )
    # A retracted run may have been abandoned before.
    finished = storage.exists(storage.join(runs.run_folder(output, state.run_id), "_SUCCESS.json"))
    if finished:
        if audited.num_missing:
            words = f"{audited.missing_words(state.run_id)}, though it has _SUCCESS.json"
            findings.add("missing", words, count=audited.num_missing)
        elif findings.num_by_kind.total() == before:  # else the sums cannot agree, which would say it again
            _check_success(output, state.run_id, audited, findings)
    return _Total(
        audited.num_shards,
        audited.num_missing if state.state == "open" else 0,
        audited.num_missing if state.state != "open" and not finished else 0,
        audited.counts.rows,
        audited.num_forgotten,
    )


def _read_partitions(plan: PinnedRun, findings: Findings) -> Sequence[str] | None:
    if not plan.target.partition_by:
        return None
    try:
        return read_partitions(plan.folder, plan.files)
    except (pa.ArrowException, OSError) as error:
        if not _is_finding(error):
            raise
        findings.add("unreadable", f"the pinned manifest below {plan.folder}: {error}")
        return None


def _read_pinned(plan: PinnedRun, shard: int) -> pa.Table | None:
    """The pinned rows of a shard; None when they cannot be read."""
    try:
        return read_shard(plan.folder, plan.files, shard)
    except (pa.ArrowException, OSError) as error:
        if not _is_finding(error):
            raise
        return None


def _is_finding(error: Exception) -> bool:
    return is_damage(error) or isinstance(error, FileNotFoundError)


def _check_success(output: str, run_id: str, audited: RunAudit, findings: Findings) -> None:
    try:
        success = runs.read_success(output, run_id)
    except OutputError as error:
        findings.add("unreadable", str(error))
        return
    if success is None:
        return
    for name in ("rows", "ok", "error", "deleted", "detections", "errors_by_code"):
        said, held = success.get(name, 0 if name == "deleted" else None), getattr(audited.counts, name)
        if name == "rows":
            held += audited.num_forgotten
        elif audited.num_forgotten:  # nobody keeps what the forgotten rows held
            continue
        if said != held:
            findings.add("wrong_counts", f"run {run_id}: _SUCCESS.json has {name} {said!r}, its shards {held!r}")
