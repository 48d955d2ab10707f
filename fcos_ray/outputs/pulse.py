"""Pulse: a file that a process rewrites while it is at work. Says who is at work; decides nothing about data.

A process that was killed leaves its file behind, which grows old. Of drivers on a run a wrong guess costs time, never
rows: several are harmless.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import uuid
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Final

from fcos_ray import storage
from fcos_ray.errors import StorageError
from fcos_ray.outputs.runs import run_folder

BEAT_SECONDS: Final = 20.0
# Clocks of machines and stores differ by seconds, and a beat may wait for a store that is slow.
LIVE_SECONDS: Final = 6 * BEAT_SECONDS
_LAST_BEAT_SECONDS: Final = 5.0  # what an ending driver waits for its file to go


@dataclass(frozen=True, slots=True)
class AtWork:
    """A process whose last beat is not old."""

    name: str  # when it began, host, process id and a random part: names are in the order of their beginnings
    seconds_ago: float


def drivers_folder(output: str, run_id: str) -> str:
    """Where the drivers of a run show themselves."""
    return storage.join(run_folder(output, run_id), "drivers")


def drivers_at_work(output: str, run_id: str) -> list[AtWork]:
    """The drivers on a run, the first to begin first: see `at_work`."""
    return at_work(drivers_folder(output, run_id))


def at_work(folder: str) -> list[AtWork]:
    """Whose last beat below a folder is younger than LIVE_SECONDS, by the store's times and this machine's clock."""
    now = datetime.now(UTC)
    found = []
    for file in storage.list_files(folder):
        if file.last_modified is None:  # a store that does not say: the file alone has to do
            continue
        seconds = (now - file.last_modified).total_seconds()
        if seconds < LIVE_SECONDS and file.uri.endswith(".json"):
            found.append(AtWork(file.uri.rsplit("/", 1)[1].removesuffix(".json"), max(seconds, 0.0)))
    return found


class Pulse:
    """A context manager: while it is open, others see this process at work (`drivers_folder` says on which run)."""

    def __init__(self, folder: str) -> None:
        host = "".join(c if c.isalnum() or c in "-." else "-" for c in socket.gethostname())[:60]
        started = datetime.now(UTC)
        self.name = f"{started:%Y%m%dT%H%M%S.%fZ}-{host}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.folder = folder
        self._uri = storage.join(folder, f"{self.name}.json")
        self._started = started.isoformat()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._go_on, daemon=True, name="pulse")

    def __enter__(self) -> Pulse:
        self._beat(1)  # who begins just after sees it
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._ending.set()
        self._thread.join(_LAST_BEAT_SECONDS)

    def _go_on(self) -> None:
        beats = 1
        while not self._ending.wait(BEAT_SECONDS):
            beats += 1
            self._beat(beats)
        with suppress(*storage.STORE_ERRORS, StorageError):
            storage.delete(self._uri)

    def _beat(self, beats: int) -> None:
        data = json.dumps({"started_at": self._started, "beats": beats, "every_seconds": BEAT_SECONDS}).encode()
        # A store that is away keeps nobody from working: the next beat may come through.
        with suppress(*storage.STORE_ERRORS, StorageError):
            storage.replace(self._uri, data)
