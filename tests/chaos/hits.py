"""What chaos does to a run: each hit finds a victim and strikes, or says that there is none yet."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from tests.processes import kill, titled

if TYPE_CHECKING:
    from tests.chaos.harness import Round


@dataclass(frozen=True, slots=True)
class Struck:
    """Who was hit, and what goes on after it."""

    who: str
    then: Callable[[], None] | None = None


def _kill_worker(title: str, round_: Round) -> Struck | None:
    pids = titled(round_.cluster.ray.pid, title)
    if not pids:
        return None
    victim = round_.dice.choice(pids)
    kill(victim)
    return Struck(f"pid {victim}")


def _stop_worker(title: str, round_: Round) -> Struck | None:
    pids = titled(round_.cluster.ray.pid, title)
    if not pids:
        return None
    victim = round_.dice.choice(pids)
    os.kill(victim, signal.SIGSTOP)
    return Struck(f"pid {victim}")


def _kill_commit(round_: Round) -> Struck | None:
    """A commit task between creating its temporary file and linking it: some milliseconds."""
    for folder in round_.output.glob("runs/*/tmp"):
        before = {path.name for path in folder.iterdir()}
        if before and (pids := titled(round_.cluster.ray.pid, "ray::commit_task")):
            kill(pids[0])
            left = [path for path in folder.iterdir() if path.name in before]
            return Struck(f"pid {pids[0]}, {len(left)} temporary files left") if left else None
    return None


def _kill_driver(round_: Round) -> Struck | None:
    kill(round_.driver.pid)
    return Struck(f"pid {round_.driver.pid}")


def _stop_driver(round_: Round) -> Struck | None:
    """Stopped, it keeps what it reserved on the cluster: the one that finishes the run has a Ray of its own."""
    stopped = round_.driver
    os.kill(stopped.pid, signal.SIGSTOP)
    return Struck(f"pid {stopped.pid}", partial(_finish_and_wake, round_, stopped))


def _finish_and_wake(round_: Round, stopped: subprocess.Popen[str]) -> None:
    other = round_.start(local=True)
    _, err = other.communicate(timeout=300)
    os.kill(stopped.pid, signal.SIGCONT)
    assert other.returncode == 0, err


def _second_driver(round_: Round) -> Struck | None:
    local = round_.dice.random() < 0.5
    round_.others.append(round_.start(local=local))
    return Struck(f"pid {round_.others[-1].pid}, on {'a Ray of its own' if local else 'the same cluster'}")


def _kill_node(round_: Round) -> Struck | None:
    return Struck(round_.cluster.kill_one(round_.dice))


HITS: dict[str, Callable[[Round], Struck | None]] = {
    "kill a load worker": partial(_kill_worker, "MapBatches(_load)"),
    "kill a decode child": partial(_kill_worker, "fcos_ray.inputs.guard"),
    "kill a detector": partial(_kill_worker, "MapBatches(_Detect)"),
    "kill a commit in its write": _kill_commit,
    "kill a node": _kill_node,
    "kill the driver": _kill_driver,
    "stop a load worker": partial(_stop_worker, "MapBatches(_load)"),
    "stop a detector": partial(_stop_worker, "MapBatches(_Detect)"),
    "stop the driver": _stop_driver,
    "start a second driver": _second_driver,
}
