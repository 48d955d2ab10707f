"""Purge: what nothing needs any more. Lists first, deletes only what it listed.

A retracted run is marked as purged before its first file goes: half of it can never be restored. Its record and its marks
stay, so its number stays taken and what was decided stays known.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

from fcos_ray import storage
from fcos_ray.errors import OutputError
from fcos_ray.outputs import runs
from fcos_ray.outputs.commit import data_folder
from fcos_ray.outputs.index import index_uri

Kind = Literal["temporary", "superseded", "retracted"]
MIN_AGE_HOURS: Final = 24.0  # younger files may be a living job's
_TEMPORARY: Final = re.compile(r"\.probe-[0-9a-f]+|\.[0-9a-f]{32}\.tmp|[0-9a-f]{32}\.tmp")


@dataclass(frozen=True, slots=True)
class PurgePlan:
    """What may go."""

    output: str
    files: dict[Kind, tuple[storage.StoredFile, ...]]
    run_ids: tuple[str, ...]  # retracted runs that end here

    def counts(self) -> dict[str, Any]:
        """Files and bytes of each kind."""
        return {
            kind: {"files": len(files), "bytes": sum(file.num_bytes for file in files)}
            for kind, files in self.files.items()
        } | {"runs": list(self.run_ids)}

    def describe(self, *, applied: bool) -> str:
        """One line for people."""
        parts = [
            f"{len(files):,} {kind} files ({sum(file.num_bytes for file in files) / 1e6:,.1f} MB)"
            for kind, files in self.files.items()
        ]
        ended = f"; {len(self.run_ids)} retracted runs end here: {', '.join(self.run_ids[:5])}" if self.run_ids else ""
        return f"{'deleted' if applied else 'would delete (--apply does it)'}: {', '.join(parts)}{ended}"


def plan_purge(output: str, *, min_age_hours: float = MIN_AGE_HOURS) -> PurgePlan:
    """Temporary files of dead commits and probes, plans that were never pinned, and all that retracted runs committed.

    The first two only when older than `min_age_hours`: a planner or a commit may be at work. Raises OutputError when
    there is no output.
    """
    before = datetime.now(UTC) - timedelta(hours=min_age_hours)
    pinned = {run.run_id: run for run in runs.list_runs(output)}
    if not pinned and runs.read_labelling(output) is None:
        raise OutputError(f"{storage.without_secrets(output)} holds no runs; wanted the --output of a job")
    found: dict[Kind, list[storage.StoredFile]] = {"temporary": [], "superseded": [], "retracted": []}
    run_ids = []
    for run_id in runs.list_run_folders(output):
        run = pinned.get(run_id)
        if run is not None and run.state in ("retracted", "purged"):
            gone = list(_of_retracted(output, run_id))
            found["retracted"] += gone
            run_ids += [run_id] if gone else []
        attempt = runs.read_run(output, run_id).get("attempt") if run is not None else None
        folder = storage.join(runs.run_folder(output, run_id), "")
        for file in storage.list_files(folder):
            kind = _kind(file.uri[len(folder) :], attempt)
            if kind and file.last_modified is not None and file.last_modified < before:
                found[kind].append(file)
    for file in _beside(output):
        if file.last_modified is not None and file.last_modified < before:
            found["temporary"].append(file)
    seen = {file.uri for file in found["retracted"]}
    kept = {kind: tuple(f for f in files if kind == "retracted" or f.uri not in seen) for kind, files in found.items()}
    return PurgePlan(output, kept, tuple(run_ids))


def purge(plan: PurgePlan) -> None:
    """Delete what was planned. Killed anywhere, the next one goes on."""
    for run_id in plan.run_ids:
        if runs.require_run(plan.output, run_id).state not in ("retracted", "purged"):
            raise OutputError(f"run {run_id} was restored meanwhile; look again at what may go")
        runs.create_mark(plan.output, run_id, "_PURGED", {"purged_at": datetime.now(UTC).isoformat()})
    with ThreadPoolExecutor(16) as pool:
        for files in plan.files.values():
            list(pool.map(lambda file: storage.delete(file.uri), files))


def _of_retracted(output: str, run_id: str) -> Iterator[storage.StoredFile]:
    yield from storage.list_files(data_folder(output, run_id))
    for name in storage.list_folders(runs.run_folder(output, run_id)):
        if name.startswith("manifest-"):
            yield from storage.list_files(storage.join(runs.run_folder(output, run_id), name))
    index = storage.stat_file(index_uri(output, run_id))
    if index is not None:
        yield index


def _kind(path: str, attempt: object) -> Kind | None:
    """What a file below a run's folder is, when it may go; `attempt` is the pinned plan's, None where nothing was pinned."""
    folder, _, name = path.rpartition("/")
    if folder.startswith("manifest-"):
        return "superseded" if folder.split("/")[0] != attempt else None
    if folder in ("tmp", "drivers") or _TEMPORARY.fullmatch(name):
        return "temporary"
    return "superseded" if attempt is None else None


def _beside(output: str) -> Iterator[storage.StoredFile]:
    """Probes of jobs that died at their start, and half-written small files, which lie at known places only."""
    for folder in (output, storage.join(output, "runs"), storage.join(output, "runs", "numbers")):
        for name in storage.list_names(folder):
            file = storage.stat_file(storage.join(folder, name)) if _TEMPORARY.fullmatch(name) else None
            if file is not None:
                yield file
