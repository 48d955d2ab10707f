"""Status: the runs of an output, seen from outside. Reads records and listings, no rows."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from fcos_ray import storage
from fcos_ray.errors import OutputError
from fcos_ray.outputs import runs
from fcos_ray.outputs.commit import committed_files
from fcos_ray.outputs.pulse import drivers_at_work

# The rate is of the last quarter of an hour of commits: the whole run's would hide that it has become slow.
RATE_WINDOW: Final = timedelta(minutes=15)


@dataclass(frozen=True, slots=True)
class RunLine:
    """A run in the list. What only its end tells is None before."""

    run_id: str
    state: runs.State
    rows: int
    ok: int | None
    error: int | None
    deleted: int | None
    images_per_second: float | None
    created_at: str
    finished_at: str | None
    age_seconds: float
    selection: Mapping[str, Any]  # what the manifest's rows were to the history


@dataclass(frozen=True, slots=True)
class RunStatus:
    """How far a run is."""

    run_id: str
    state: runs.State
    drivers: tuple[str, ...]  # at work on it now
    shards: int
    committed_shards: int
    rows: int
    committed_rows: int
    images_per_second: float | None  # of the commits of the last RATE_WINDOW; None with fewer than two
    eta_seconds: float | None
    last_commit: str | None
    last_commit_seconds_ago: float | None

    def describe(self) -> str:
        """One line for people."""
        rate = f", {self.images_per_second:,.1f} images/s" if self.images_per_second else ""
        eta = f", about {self.eta_seconds:,.0f} s left" if self.eta_seconds else ""
        ago = self.last_commit_seconds_ago
        last = f", last commit {ago:,.0f} s ago" if ago is not None and self.state == "open" else ""
        who = ""
        if self.state == "open":
            who = f"; at work: {', '.join(self.drivers)}" if self.drivers else "; nobody is at work on it"
        return (
            f"run {self.run_id} is {self.state}: {self.committed_shards:,} of {self.shards:,} shards, "
            f"{self.committed_rows:,} of {self.rows:,} rows{rate}{eta}{last}{who}"
        )


def list_runs(output: str) -> list[RunLine]:
    """The pinned runs, oldest first. Raises OutputError when there is none, or a record is damaged."""
    now = datetime.now(UTC)
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda state: _line(output, state, now), _states(output)))


def run_status(output: str, run_id: str | None = None) -> RunStatus:
    """How far a run is; by default the oldest open one, which the next job finishes first, else the newest."""
    if run_id is not None:
        state = runs.require_run(output, run_id)
    else:
        states = _states(output)
        state = next((one for one in states if one.state == "open"), states[-1])
    files = committed_files(output, state.run_id) if state.state != "purged" else {}
    record = _record(output, state.run_id)
    sizes = [rows for file in record["files"] for rows in file["shard_rows"]]
    beyond = [shard for shard in files if shard >= len(sizes)]
    if beyond:
        raise OutputError(f"{files[beyond[0]].uri} is no shard of the run's plan; jobs/audit.py names what is wrong")
    times = {shard: file.last_modified for shard, file in files.items() if file.last_modified is not None}
    rate = _rate(sizes, times)
    committed = sum(sizes[shard] for shard in files)
    last = max(times.values(), default=None)
    missing = sum(sizes) - committed
    return RunStatus(
        run_id=state.run_id,
        state=state.state,
        drivers=tuple(driver.name for driver in drivers_at_work(output, state.run_id)),
        shards=len(sizes),
        committed_shards=len(files),
        rows=sum(sizes),
        committed_rows=committed,
        images_per_second=rate,
        eta_seconds=round(missing / rate, 1) if rate and missing and state.state == "open" else None,
        last_commit=last.isoformat() if last else None,
        last_commit_seconds_ago=round((datetime.now(UTC) - last).total_seconds(), 1) if last else None,
    )


def _rate(sizes: list[int], times: Mapping[int, datetime]) -> float | None:
    """Images per second between the first and the last commit of the window, the first one's own left out."""
    last = max(times.values(), default=None)
    if last is None:
        return None
    recent = sorted((when, sizes[shard]) for shard, when in times.items() if when >= last - RATE_WINDOW)
    seconds = (last - recent[0][0]).total_seconds()
    return round(sum(rows for _, rows in recent[1:]) / seconds, 3) if seconds > 0 else None


def _states(output: str) -> list[runs.RunState]:
    found = sorted(runs.list_runs(output), key=lambda run: run.run_id)
    if not found:
        raise OutputError(
            f"{storage.without_secrets(output)} holds no runs; wanted the --output of a job, the folder of labelling.json "
            "and runs/"
        )
    return found


def _record(output: str, run_id: str) -> dict[str, Any]:
    record = runs.read_run(output, run_id)
    try:
        record["num_rows"], record["created_at"], [file["shard_rows"] for file in record["files"]]
        datetime.fromisoformat(record["created_at"])
    except (KeyError, TypeError, ValueError) as error:
        raise OutputError(f"{runs.run_folder(output, run_id)}/run.json is damaged: {error!r}") from error
    return record


def _line(output: str, state: runs.RunState, now: datetime) -> RunLine:
    record, success = _record(output, state.run_id), runs.read_success(output, state.run_id) or {}
    return RunLine(
        run_id=state.run_id,
        state=state.state,
        rows=record["num_rows"],
        ok=success.get("ok"),
        error=success.get("error"),
        deleted=success.get("deleted"),
        images_per_second=success.get("images_per_second"),
        created_at=record["created_at"],
        finished_at=success.get("finished_at"),
        age_seconds=round((now - datetime.fromisoformat(record["created_at"])).total_seconds(), 1),
        selection=record.get("selection") or {},
    )
