"""Roll: which workers of an execution are at work, on which rows, since when. Knows Ray, no images and no files.

Load tasks and detectors sign on with the rows they take, and off after them. When nothing moves any more the roll says
who has what, and which detector answers no more; when an execution ends it knows whom to end.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_ASK_SECONDS: Final = 30.0  # the roll answers in milliseconds, unless its node is in trouble
_ANSWER_SECONDS: Final = 5.0  # a detector that waits for images answers in milliseconds
_END_SECONDS: Final = 15.0  # for a process on another node; a frozen node never answers


@dataclass(frozen=True, slots=True)
class AtWork:
    """A worker that has taken rows and not given them back yet; without rows, a detector that answers no more."""

    stage: str
    node_id: str
    address: str
    pid: int
    rows: tuple[tuple[int, int], ...]  # (shard, row)
    seconds: float = 0.0

    @classmethod
    def here(cls, stage: str, rows: Sequence[tuple[int, int]] = ()) -> AtWork:
        """This process."""
        node_id = ray.get_runtime_context().get_node_id()
        return cls(stage, node_id, ray.util.get_node_ip_address(), os.getpid(), tuple(rows))

    @property
    def process(self) -> tuple[str, int]:
        """Which process of the cluster."""
        return self.node_id, self.pid


class Roll:
    """One execution's roll; pickled into its workers. Held by an actor on the driver's node, which outlives other nodes."""

    def __init__(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
        self._actor: Any = ray.remote(_Roll).options(**options).remote()

    def add_detector(self) -> None:
        """Called in a detector's actor before it can hold anything."""
        ray.get(self._actor.add_detector.remote(ray.get_runtime_context().current_actor, AtWork.here("detect")))

    @contextmanager
    def working(self, stage: str, rows: Sequence[tuple[int, int]]) -> Iterator[None]:
        """Around a worker's work on these rows. Two messages that nobody waits for."""
        work = AtWork.here(stage, rows)
        self._actor.sign_on.remote(work)
        try:
            yield
        finally:
            self._actor.sign_off.remote(work.process)

    def at_work(self) -> list[AtWork]:
        """Who is at work, the longest first, then detectors that answer no more; empty when the roll cannot be asked."""
        with suppress(RayError):
            found: list[AtWork] = ray.get(self._actor.at_work.remote(), timeout=_ASK_SECONDS)
            busy = {work.process for work in found}
            return found + [one for one in self._silent() if one.process not in busy]
        return []

    def _silent(self) -> list[AtWork]:
        """Detectors that answer no more: at work, or stopped while they waited for images. The dead are not among them."""
        detectors = ray.get(self._actor.detectors.remote(), timeout=_ASK_SECONDS)
        asked = {detector.__ray_ready__.remote(): where for detector, where in detectors}
        if not asked:
            return []
        _, open_ones = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_SECONDS)
        return [asked[reference] for reference in open_ones]

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
            for detector, _ in ray.get(self._actor.detectors.remote(), timeout=_ASK_SECONDS):
                ray.kill(detector)
        ray.kill(self._actor)


class _Roll:
    """The actor."""

    def __init__(self) -> None:
        self._detectors: list[tuple[ActorHandle[Any], AtWork]] = []
        self._at_work: dict[tuple[str, int], tuple[AtWork, float]] = {}

    def add_detector(self, detector: ActorHandle[Any], where: AtWork) -> None:
        self._detectors.append((detector, where))

    def detectors(self) -> list[tuple[ActorHandle[Any], AtWork]]:
        return self._detectors

    def sign_on(self, work: AtWork) -> None:
        # A worker that died never signs off; its rows come again in another one's hands.
        taken_over = [
            k for k, (other, _) in self._at_work.items() if (other.stage, other.rows) == (work.stage, work.rows)
        ]
        for key in taken_over:
            del self._at_work[key]
        self._at_work[work.process] = (work, time.monotonic())

    def sign_off(self, process: tuple[str, int]) -> None:
        self._at_work.pop(process, None)

    def at_work(self) -> list[AtWork]:
        now = time.monotonic()
        return [
            replace(work, seconds=now - since)
            for work, since in sorted(self._at_work.values(), key=lambda entry: entry[1])
        ]


@ray.remote(num_cpus=0, max_retries=0)
def _end_process(pid: int) -> None:
    with suppress(OSError):
        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::"):  # and not whoever has got its number since
            os.kill(pid, signal.SIGKILL)
