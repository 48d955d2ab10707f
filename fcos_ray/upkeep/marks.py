"""Marks: retract, restore and abandon runs. Writes records, touches no rows.

A retracted run's rows count nowhere: not in latest(), not in what later runs are planned against. Until it is purged that
can be taken back.
"""

from __future__ import annotations

from datetime import UTC, datetime

from fcos_ray.errors import OutputError
from fcos_ray.outputs import runs
from fcos_ray.outputs.commit import list_committed
from fcos_ray.outputs.pulse import drivers_at_work
from fcos_ray.outputs.retractions import write_retracted


def retract(output: str, run_id: str, *, reason: str | None = None) -> bool:
    """Let a run's rows count nowhere. False: it was retracted before. Raises OutputError for an open run."""
    state = runs.require_run(output, run_id).state
    if state == "open":
        raise OutputError(f"run {run_id} is open: let it finish (the job's command goes on), or abandon it first")
    if state not in ("retracted", "purged"):
        runs.create_mark(output, run_id, "_RETRACTED", {"retracted_at": _now(), "reason": reason})
    write_retracted(output)  # also where a command died between the two
    return state not in ("retracted", "purged")


def restore(output: str, run_id: str) -> bool:
    """Take a retraction back. False: the run was not retracted. Raises OutputError for a purged one."""
    state = runs.require_run(output, run_id).state
    if state == "purged":
        raise OutputError(f"run {run_id} was purged: its files are deleted, and its rows cannot come back")
    if state == "retracted":
        runs.delete_mark(output, run_id, "_RETRACTED")
    write_retracted(output)
    return state == "retracted"


def abandon(output: str, run_id: str, *, reason: str | None = None, force: bool = False) -> int:
    """Close an open run with rows missing; gives how many shards it had committed. They count, the rest is for later runs.

    Raises OutputError for a run that is not open, and while a driver is at work on it unless `force`.
    """
    state = runs.require_run(output, run_id).state
    if state == "abandoned":
        return len(list_committed(output, run_id))
    if state != "open":
        raise OutputError(f"run {run_id} is {state}: only an open run can be abandoned")
    at_work = drivers_at_work(output, run_id)
    if at_work and not force:
        raise OutputError(
            f"{at_work[0].name} is at work on run {run_id} (its last sign was {at_work[0].seconds_ago:.0f} s ago): stop it "
            "first; --force abandons the run all the same"
        )
    committed = len(list_committed(output, run_id))
    about = {"abandoned_at": _now(), "reason": reason, "committed_shards": committed}
    runs.create_mark(output, run_id, "_ABANDONED", about)
    return committed


def _now() -> str:
    return datetime.now(UTC).isoformat()
