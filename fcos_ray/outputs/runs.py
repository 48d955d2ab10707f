"""Runs: the records of an output, and the one decision what to do next. Knows JSON files, not rows or Ray.

labelling.json                model and settings shared by all runs of an output; created by the first
runs/numbers/<number>.json    which run has a sequence number; whoever comes second takes another
runs/<run_id>/run.json        created last when a run is pinned; whoever comes second uses the winner's
runs/<run_id>/_SUCCESS.json   created after the audit
runs/<run_id>/_ABANDONED.json closed with rows missing: what it committed counts, the rest is for later runs
runs/<run_id>/_RETRACTED.json while it is there, the run's rows count nowhere
runs/<run_id>/_PURGED.json    what the retracted run had committed is deleted
forgotten/<time>-<hex>.json   images were taken out of committed files; created before, and again as …-done.json after
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Literal

from fcos_ray import storage
from fcos_ray.errors import OutputError

_RUN_ID: Final = re.compile(r"(\d{6})-[0-9a-f]{8}")
Mark = Literal["_SUCCESS", "_ABANDONED", "_RETRACTED", "_PURGED"]
State = Literal["open", "finished", "abandoned", "retracted", "purged"]
# The first mark that is there says the state.
_STATES: Final[dict[Mark, State]] = {
    "_PURGED": "purged", "_RETRACTED": "retracted", "_SUCCESS": "finished", "_ABANDONED": "abandoned",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Request:
    """Sources and selection asked for, and the labelling they are to get.

    `repeats` says when a finished run answers it again: "always" the same request; "unless_changed" only while nothing
    else has happened on the output since; "never" when it asks for what time may mend.
    """

    digest: str
    labelling: Mapping[str, Any]
    repeats: Literal["always", "unless_changed", "never"] = "unless_changed"


@dataclass(frozen=True, slots=True)
class RunState:
    """What `resolve` needs to know of an existing run."""

    run_id: str
    request_digest: str
    state: State
    history: str | None = None  # `history_digest` of what it was planned against

    @property
    def counts(self) -> bool:
        """Whether its rows are in the history that later runs are planned against. An open run is finished first."""
        return self.state in ("finished", "abandoned")


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


@dataclass(frozen=True, slots=True)
class Existing:
    """What lies in an output: its runs, the numbers that were claimed, and what was forgotten."""

    runs: tuple[RunState, ...] = ()
    claimed: tuple[str, ...] = ()  # run_ids whose number was taken and that are not pinned: planned now, or never
    forgotten: tuple[str, ...] = ()

    @property
    def history(self) -> tuple[RunState, ...]:
        """The runs that count, oldest first."""
        return tuple(sorted((run for run in self.runs if run.counts), key=lambda run: run.run_id))


def resolve(existing: Existing, labelling: Mapping[str, Any] | None, request: Request) -> Decision:
    """What a job does next on an output with these runs and this labelling (None: no run came so far).

    Another labelling is refused. An open run is finished before anything new is planned, the oldest first. A request
    that a finished run answers is nothing to do. Everything else is a new run, numbered after the last.
    """
    if labelling is not None and (differing := differences(labelling, request.labelling)):
        return Refuse(differing)
    ordered = sorted(existing.runs, key=lambda run: run.run_id)
    for run in ordered:
        if run.state == "open":
            return Resume(run.run_id)
    for run in reversed(ordered):
        if run.state == "finished" and run.request_digest == request.digest and _answers(run, existing, request):
            return Nothing(run.run_id)
    pinned = max((_number(run.run_id) for run in ordered), default=0)
    for run_id in existing.claimed:
        # Another driver of this request: who pins first has pinned for both. Below the last run it is an old claim, and
        # its rows would count as older than that run's.
        if run_id.endswith(f"-{request.digest[:8]}") and _number(run_id) > pinned:
            return New(run_id)
    last = max([pinned, *map(_number, existing.claimed)])
    return New(f"{last + 1:06d}-{request.digest[:8]}")


def _number(run_id: str) -> int:
    return int(run_id.split("-")[0])


def _answers(run: RunState, existing: Existing, request: Request) -> bool:
    """Whether a finished run of the same request would find nothing to do if it were planned now."""
    if request.repeats != "unless_changed":
        return request.repeats == "always"
    # Retracting, restoring, forgetting or another run may have made rows new, also those it found up to date.
    *before, last = existing.history
    return run == last and run.history == history_digest(before, existing.forgotten)


def history_digest(counting: Sequence[RunState], forgotten: Sequence[str]) -> str:
    """A hash that changes with the runs that count, and with what was taken out of them."""
    text = json.dumps([sorted((run.run_id, run.state) for run in counting), sorted(forgotten)])
    return hashlib.sha256(text.encode()).hexdigest()


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


# ---- records


def run_folder(output: str, run_id: str) -> str:
    return storage.join(output, "runs", run_id)


def temporary_folder(output: str, run_id: str) -> str:
    """Where files of a run are prepared on a local disk; what a kill leaves there is nobody's, and purge takes it."""
    return storage.join(run_folder(output, run_id), "tmp")


def list_forgotten(output: str) -> frozenset[str]:
    """Names of the records that images were taken out of committed files: another one, and files may have changed."""
    return frozenset(storage.list_names(storage.join(output, "forgotten")))


def read_existing(output: str) -> Existing:
    """What lies in an output, as far as `resolve` asks."""
    folder = storage.join(output, "runs", "numbers")
    claims = storage.list_names(folder)  # before the runs: one that is pinned meanwhile is seen as a run
    pinned = tuple(list_runs(output))
    open_claims = sorted(claims - {f"{run.run_id.split('-')[0]}.json" for run in pinned})
    claimed = [(read_json(storage.join(folder, name)) or {}).get("run_id", "") for name in open_claims]
    forgotten = sorted(list_forgotten(output))
    return Existing(pinned, tuple(run_id for run_id in claimed if _RUN_ID.fullmatch(run_id)), tuple(forgotten))


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
    names = storage.list_names(run_folder(output, run_id))
    state: State = next((state for mark, state in _STATES.items() if f"{mark}.json" in names), "open")
    history = record.get("history")
    return RunState(run_id, digest, state, history if isinstance(history, str) else None)


def require_run(output: str, run_id: str) -> RunState:
    """A run's state. Raises OutputError naming the runs there are."""
    found = read_state(output, run_id) if _RUN_ID.fullmatch(run_id) else None
    if found is None:
        known = ", ".join(list_run_folders(output)[-5:]) or "none"
        raise OutputError(f"{storage.without_secrets(output)} has no run {run_id!r}; its last runs: {known}")
    return found


def read_labelling(output: str) -> dict[str, Any] | None:
    """The labelling of an output; None when no run has come so far."""
    return read_json(storage.join(output, "labelling.json"))


def create_labelling(output: str, labelling: Mapping[str, Any]) -> dict[str, Any]:
    """Create labelling.json unless it is there; gives the one that counts."""
    return _create_json(storage.join(output, "labelling.json"), labelling)


def claim_number(output: str, run_id: str) -> bool:
    """Take a run's sequence number, so that no other request gets the same. False: it is another run's."""
    number = run_id.split("-")[0]
    claim = {"run_id": run_id}
    return _create_json(storage.join(output, "runs", "numbers", f"{number}.json"), claim) == claim


def create_run(output: str, run_id: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """Pin a run: create run.json unless another driver was first; gives the record that counts."""
    return _create_json(storage.join(run_folder(output, run_id), "run.json"), record)


def read_run(output: str, run_id: str) -> dict[str, Any]:
    record = read_json(storage.join(run_folder(output, run_id), "run.json"))
    assert record is not None, f"run {run_id} was listed"
    return record


def create_success(output: str, run_id: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Mark a run as audited; gives the summary that counts."""
    return create_mark(output, run_id, "_SUCCESS", summary)


def read_success(output: str, run_id: str) -> dict[str, Any] | None:
    return read_mark(output, run_id, "_SUCCESS")


def create_mark(output: str, run_id: str, mark: Mark, about: Mapping[str, Any]) -> dict[str, Any]:
    """Mark a run; gives what the mark says that counts."""
    return _create_json(_mark(output, run_id, mark), about)


def read_mark(output: str, run_id: str, mark: Mark) -> dict[str, Any] | None:
    """What a mark says; None when it is not there."""
    return read_json(_mark(output, run_id, mark))


def delete_mark(output: str, run_id: str, mark: Literal["_RETRACTED"]) -> None:
    storage.delete(_mark(output, run_id, mark))


def _mark(output: str, run_id: str, mark: Mark) -> str:
    return storage.join(run_folder(output, run_id), f"{mark}.json")


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
