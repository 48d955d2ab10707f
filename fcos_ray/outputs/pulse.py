"""Pulse: a file that a driver rewrites while it is at work on a run. Says who is at work; decides nothing about data.

A driver that was killed leaves its file behind, which grows old. A wrong guess costs time, never rows: drivers on one run
are harmless.
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
class DriverAtWork:
    """A driver whose last beat is not old."""

    name: str  # host, process id and a random part
    seconds_ago: float


def drivers_at_work(output: str, run_id: str) -> list[DriverAtWork]:
    """The drivers on a run whose last beat is younger than LIVE_SECONDS, by the store's times and this machine's clock."""
    now = datetime.now(UTC)
    found = []
    for file in storage.list_files(storage.join(run_folder(output, run_id), "drivers")):
        if file.last_modified is None:  # a store that does not say: the file alone has to do
            continue
        seconds = (now - file.last_modified).total_seconds()
        if seconds < LIVE_SECONDS and file.uri.endswith(".json"):
            found.append(DriverAtWork(file.uri.rsplit("/", 1)[1].removesuffix(".json"), max(seconds, 0.0)))
    return found


class Pulse:
    """A context manager: while it is open, others see this driver at work on the run."""

    def __init__(self, output: str, run_id: str) -> None:
        host = "".join(c if c.isalnum() or c in "-." else "-" for c in socket.gethostname())[:60]
        self.name = f"{host}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._uri = storage.join(run_folder(output, run_id), "drivers", f"{self.name}.json")
        self._started = datetime.now(UTC).isoformat()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="pulse")

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._ending.set()
        self._thread.join(_LAST_BEAT_SECONDS)

    def _beat(self) -> None:
        beats = 0
        while True:
            beats += 1
            data = json.dumps({"started_at": self._started, "beats": beats, "every_seconds": BEAT_SECONDS}).encode()
            # A store that is away keeps nobody from working: the next beat may come through.
            with suppress(*storage.STORE_ERRORS, StorageError):
                storage.replace(self._uri, data)
            if self._ending.wait(BEAT_SECONDS):
                break
        with suppress(*storage.STORE_ERRORS, StorageError):
            storage.delete(self._uri)
