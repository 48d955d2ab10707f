"""Runs: the records of an output, and the one decision what to do next. Knows JSON files, not rows or Ray.

labelling.json            model and settings shared by all runs of an output; created by the first
runs/<run_id>/run.json    created last when a run is pinned; whoever comes second uses the winner's
runs/<run_id>/_SUCCESS.json   created after the audit
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from fcos_ray import storage
from fcos_ray.errors import OutputError

_RUN_ID: Final = re.compile(r"(\d{6})-[0-9a-f]{8}")


@dataclass(frozen=True, slots=True)
class Request:
    """Sources and selection asked for, and the labelling they are to get."""

    digest: str
    labelling: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RunState:
    """What `resolve` needs to know of an existing run."""

    run_id: str
    request_digest: str
    finished: bool  # _SUCCESS.json is there


@dataclass(frozen=True, slots=True)
class Resume:
    run_id: str


@dataclass(frozen=True, slots=True)
class New:
    run_id: str


@dataclass(frozen=True, slots=True)
class Nothing:
    """A finished run already answers this request."""

    run_id: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """Settings that differ from the output's labelling: name, what the output has, what was asked."""

    differences: tuple[tuple[str, Any, Any], ...]


Decision = Resume | New | Nothing | Refuse


def resolve(runs: Sequence[RunState], labelling: Mapping[str, Any] | None, request: Request) -> Decision:
    """What a job does next on an output with these runs and this labelling (None: no run came so far).

    Another labelling is refused. An open run is finished before anything new is planned, the oldest first. A request
    that a finished run answers is nothing to do. Everything else is a new run, numbered after the last.
    """
    if labelling is not None and (differing := differences(labelling, request.labelling)):
        return Refuse(differing)
    ordered = sorted(runs, key=lambda run: run.run_id)
    for run in ordered:
        if not run.finished:
            return Resume(run.run_id)
    for run in reversed(ordered):
        if run.request_digest == request.digest:
            return Nothing(run.run_id)
    last = int(ordered[-1].run_id.split("-")[0]) if ordered else 0
    return New(f"{last + 1:06d}-{request.digest[:8]}")


def differences(ours: Mapping[str, Any], asked: Mapping[str, Any]) -> tuple[tuple[str, Any, Any], ...]:
    """Where two labellings differ: name, ours, what was asked."""
    flat_ours, flat_asked = _flat(ours), _flat(asked)
    names = sorted(flat_ours.keys() | flat_asked.keys())
    return tuple((n, flat_ours.get(n), flat_asked.get(n)) for n in names if flat_ours.get(n) != flat_asked.get(n))


def _flat(labelling: Mapping[str, Any]) -> dict[str, Any]:
    settings = labelling.get("settings", {})
    # The weights' name is how they were asked for; their hash says what they are.
    return {**{k: v for k, v in labelling.items() if k not in ("settings", "weights")}, **settings}


def request_digest(sources: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """A hash that changes when the manifest files or the selection do."""
    text = json.dumps({"sources": list(sources), "settings": settings}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def run_folder(output: str, run_id: str) -> str:
    return storage.join(output, "runs", run_id)


def list_runs(output: str) -> list[RunState]:
    """The pinned runs of an output. A folder without run.json was never pinned and does not count."""
    with ThreadPoolExecutor(16) as pool:
        states = pool.map(lambda run_id: read_state(output, run_id), list_run_folders(output))
        return [found for found in states if found is not None]


def list_run_folders(output: str) -> list[str]:
    """Names of the folders that a run may have been pinned in."""
    return [name for name in storage.list_folders(storage.join(output, "runs")) if _RUN_ID.fullmatch(name)]


def read_state(output: str, run_id: str) -> RunState | None:
    """A run's state; None when it was never pinned. Raises OutputError when its record is damaged."""
    record = read_json(storage.join(run_folder(output, run_id), "run.json"))
    if record is None:
        return None
    digest = record.get("request_digest")
    if not isinstance(digest, str):
        raise OutputError(f"{run_folder(output, run_id)}/run.json is damaged: it has no request_digest")
    finished = storage.exists(storage.join(run_folder(output, run_id), "_SUCCESS.json"))
    return RunState(run_id, digest, finished)


def read_labelling(output: str) -> dict[str, Any] | None:
    """The labelling of an output; None when no run has come so far."""
    return read_json(storage.join(output, "labelling.json"))


def create_labelling(output: str, labelling: Mapping[str, Any]) -> dict[str, Any]:
    """Create labelling.json unless it is there; gives the one that counts."""
    return _create_json(storage.join(output, "labelling.json"), labelling)


def create_run(output: str, run_id: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """Pin a run: create run.json unless another driver was first; gives the record that counts."""
    return _create_json(storage.join(run_folder(output, run_id), "run.json"), record)


def read_run(output: str, run_id: str) -> dict[str, Any]:
    record = read_json(storage.join(run_folder(output, run_id), "run.json"))
    assert record is not None, f"run {run_id} was listed"
    return record


def create_success(output: str, run_id: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Mark a run as audited; gives the summary that counts."""
    return _create_json(storage.join(run_folder(output, run_id), "_SUCCESS.json"), summary)


def read_success(output: str, run_id: str) -> dict[str, Any] | None:
    return read_json(storage.join(run_folder(output, run_id), "_SUCCESS.json"))


def read_json(uri: str) -> dict[str, Any] | None:
    """A JSON object, or None when there is no such file. Raises OutputError when it is something else."""
    try:
        value = json.loads(storage.read_bytes(uri))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise OutputError(f"{uri} is damaged: {error}; wanted the JSON object that a run wrote there") from error
    if not isinstance(value, dict):
        raise OutputError(f"{uri} is damaged: wanted a JSON object, got {type(value).__name__}")
    return value


def _create_json(uri: str, value: Mapping[str, Any]) -> dict[str, Any]:
    data = json.dumps(value, indent=1, sort_keys=True).encode()
    if storage.create(uri, data):
        return dict(json.loads(data))
    existing = read_json(uri)
    assert existing is not None, f"{uri} was there a moment ago"
    return existing
