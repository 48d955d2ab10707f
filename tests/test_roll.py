"""Who is named, and ended, when an execution does not move any more. On real Ray."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from fcos_ray.roll import Roll
from tests.processes import wait_until

pytestmark = pytest.mark.ray
ROWS = [(3, 0), (3, 1)]


@pytest.fixture
def roll(ray_session: Any) -> Iterator[Roll]:
    roll = Roll()
    yield roll
    roll.close()


def started(roll: Roll) -> tuple[Any, int]:
    """A detector, and its process."""

    class Detecting:
        def __init__(self) -> None:
            roll.add_detector()
            self._work: Any = None

        def pid(self) -> int:
            return os.getpid()

        def begin(self) -> None:
            self._work = roll.working("detect", ROWS)
            self._work.__enter__()

        def finish(self) -> None:
            self._work.__exit__(None, None, None)

    detector = ray.remote(num_cpus=0)(Detecting).remote()
    return detector, ray.get(detector.pid.remote())


def test_a_detector_is_named_with_its_rows_while_it_has_them(roll: Roll) -> None:
    detector, pid = started(roll)
    assert roll.at_work() == [], "it waits, and answers"
    ray.get(detector.begin.remote())
    wait_until(lambda: bool(roll.at_work()), "its message")
    (work,) = roll.at_work()
    assert (work.stage, work.pid, work.rows) == ("detect", pid, tuple(ROWS))
    ray.get(detector.finish.remote())
    wait_until(lambda: not roll.at_work(), "its message")


def test_one_that_is_stopped_while_it_waits_is_named_and_ended(roll: Roll) -> None:
    detectors = [started(roll), started(roll)]  # which end with their handles
    stopped, alive = (pid for _, pid in detectors)
    os.kill(stopped, signal.SIGSTOP)
    silent = roll.at_work()
    assert [(one.stage, one.pid, one.rows) for one in silent] == [("detect", stopped, ())]
    roll.end_workers(silent)
    wait_until(lambda: not Path(f"/proc/{stopped}").exists(), "its end")
    assert Path(f"/proc/{alive}").exists()


def test_one_that_is_stopped_at_work_is_named_once_with_its_rows(roll: Roll) -> None:
    detector, pid = started(roll)
    ray.get(detector.begin.remote())
    wait_until(lambda: bool(roll.at_work()), "its message")
    os.kill(pid, signal.SIGSTOP)
    assert [(one.pid, one.rows) for one in roll.at_work()] == [(pid, tuple(ROWS))]
    roll.end_workers(roll.at_work())
