"""Roll: which workers of an execution are at work, on which rows, since when. Knows Ray, no images and no files.

Load tasks and detectors sign on with the rows they take, and off after them. When nothing moves any more the roll says
who has what; when an execution ends it knows whom to end.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_ASK_SECONDS: Final = 30.0  # the roll answers in milliseconds, unless its node is in trouble
_END_SECONDS: Final = 15.0  # for a process on another node; a frozen node never answers


@dataclass(frozen=True, slots=True)
class AtWork:
    """A worker that has taken rows and not given them back yet."""

    stage: str
    node_id: str
    address: str
    pid: int
    rows: tuple[tuple[int, int], ...]  # (shard, row)
    seconds: float = 0.0


class Roll:
    """One execution's roll; pickled into its workers. Held by an actor on the driver's node, which outlives other nodes."""

    def __init__(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
        self._actor: Any = ray.remote(_Roll).options(**options).remote()

    def add_detector(self) -> None:
        """Called in a detector's actor before it can hold anything."""
        ray.get(self._actor.add_detector.remote(ray.get_runtime_context().current_actor))

    @contextmanager
    def working(self, stage: str, rows: Sequence[tuple[int, int]]) -> Iterator[None]:
        """Around a worker's work on these rows. Two messages that nobody waits for."""
        context, pid = ray.get_runtime_context(), os.getpid()
        work = AtWork(stage, context.get_node_id(), ray.util.get_node_ip_address(), pid, tuple(rows))
        self._actor.sign_on.remote(work)
        try:
            yield
        finally:
            self._actor.sign_off.remote(work.node_id, pid)

    def at_work(self) -> list[AtWork]:
        """Who is at work, the longest first; empty when the roll cannot be asked."""
        with suppress(RayError):
            found: list[AtWork] = ray.get(self._actor.at_work.remote(), timeout=_ASK_SECONDS)
            return found
        return []

    def end_workers(self, hung: Sequence[AtWork]) -> None:
        """Kill workers that hang: a cancelled execution does not take their CPUs back from them (Ray 2.60)."""
        kills = []
        for work in hung:
            there = NodeAffinitySchedulingStrategy(work.node_id, soft=False)
            kills.append(_end_process.options(scheduling_strategy=there).remote(work.pid))
        if kills:
            ray.wait(kills, num_returns=len(kills), timeout=_END_SECONDS)

    def close(self) -> None:
        """End the execution's detectors, and the roll.

        Ray Data leaves its actors to the garbage collector, and whoever holds a failed execution's traceback (a log
        handler does) holds them and their CPUs and GPUs: the next execution would wait for them for ever (Ray 2.60).
        """
        with suppress(RayError):
            for detector in ray.get(self._actor.detectors.remote(), timeout=_ASK_SECONDS):
                ray.kill(detector)
        ray.kill(self._actor)


class _Roll:
    """The actor."""

    def __init__(self) -> None:
        self._detectors: list[ActorHandle[Any]] = []
        self._at_work: dict[tuple[str, int], tuple[AtWork, float]] = {}

    def add_detector(self, detector: ActorHandle[Any]) -> None:
        self._detectors.append(detector)

    def detectors(self) -> list[ActorHandle[Any]]:
        return self._detectors

    def sign_on(self, work: AtWork) -> None:
        # A worker that died never signs off; its rows come again in another one's hands.
        taken_over = [
            k for k, (other, _) in self._at_work.items() if (other.stage, other.rows) == (work.stage, work.rows)
        ]
        for key in taken_over:
            del self._at_work[key]
        self._at_work[work.node_id, work.pid] = (work, time.monotonic())

    def sign_off(self, node_id: str, pid: int) -> None:
        self._at_work.pop((node_id, pid), None)

    def at_work(self) -> list[AtWork]:
        now = time.monotonic()
        return [
            AtWork(work.stage, work.node_id, work.address, work.pid, work.rows, now - since)
            for work, since in sorted(self._at_work.values(), key=lambda entry: entry[1])
        ]


@ray.remote(num_cpus=0, max_retries=0)
def _end_process(pid: int) -> None:
    with suppress(OSError):
        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::"):  # and not whoever has got its number since
            os.kill(pid, signal.SIGKILL)
