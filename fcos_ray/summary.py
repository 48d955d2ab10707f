"""Summary: what a job says it did. Knows counts and times, does nothing."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Literal

import fcos_ray
from fcos_ray.execution import ExecutionStats
from fcos_ray.outputs.commit import ShardCounts


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What a job did. The last line on stdout is this as JSON."""

    state: Literal["complete", "nothing_to_do", "planned", "running"]
    output: str
    run_id: str
    rows: int
    shards: int
    ok: int = 0
    error: int = 0
    deleted: int = 0  # tombstones
    errors_by_code: dict[str, int] = field(default_factory=dict)
    detections: int = 0
    selection: dict[str, int] = field(default_factory=dict)  # how much of the manifest is what to the history
    explanation: str | None = None  # with --explain
    duplicates_dropped: int = 0
    uris_refused: int = 0
    images_per_second: float | None = None  # steady state of this process, without its start
    detectors_busy: float | None = None  # share of that time in which detectors held images
    wall_seconds: float = 0.0
    startup_seconds: float | None = None  # until the first commit
    retries: int = 0  # fetch attempts beyond the first
    seconds: dict[str, float] = field(default_factory=dict)  # per stage, summed over images, restarts included

    @property
    def error_fraction(self) -> float:
        return self.error / self.rows if self.rows else 0.0


def summarise(
    output: str, record: Mapping[str, Any], counts: ShardCounts, stats: ExecutionStats, started: float
) -> RunSummary:
    """The summary of a run that is complete and audited."""
    rate, busy = stats.images_per_second, stats.busy
    return RunSummary(
        state="complete",
        output=output,
        run_id=record["run_id"],
        rows=counts.rows,
        shards=record["num_shards"],
        ok=counts.ok,
        error=counts.error,
        deleted=counts.deleted,
        errors_by_code=counts.errors_by_code,
        detections=counts.detections,
        selection=record.get("selection", {}),  # of runs before there was one
        duplicates_dropped=record["duplicates_dropped"],
        uris_refused=record["uris_refused"],
        images_per_second=None if rate is None else round(rate, 3),
        detectors_busy=None if busy is None else round(busy, 3),
        wall_seconds=round(time.monotonic() - started, 3),
        startup_seconds=None if stats.first_commit is None else round(stats.first_commit - started, 3),
        retries=counts.retries,
        seconds={stage: round(seconds, 3) for stage, seconds in counts.seconds.items()},
    )


def versions() -> dict[str, str]:
    """What ran it."""
    names = ("torch", "torchvision", "ray", "pyarrow", "pillow", "duckdb")
    ours = {"fcos_ray": fcos_ray.__version__, "python": platform.python_version()}
    return ours | {name: version(name) for name in names}
