"""Chaos: the real job on several nodes, hit at random moments, held against a run that nobody disturbed.

    python -m tests.chaos.harness --rounds 20 --seed 1

Every round is one run: hit two or three times, started again when its driver died, and judged when it is complete: the
public audit finds nothing, results equal the undisturbed ones, no data file ever changed, no process is left behind, and all
drivers told of one run with every row, which the last one found open and went on with when another had died.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fcos_ray.sample import write_sample
from tests.chaos.compare import differences
from tests.chaos.hits import HITS, Struck
from tests.corpus import manifest_ids, results_of
from tests.processes import flags, kill_tree, run_job, start_job, titled
from tests.ray_cluster import RayCluster

NUM_IMAGES = 160
SHARD_ROWS = 4
STALL_SECONDS = 30  # an honest stall is the start of a detector: 5 to 10 s on two idle cores
MAX_STARTS = 8
END_SECONDS = 420.0  # for one driver to end by itself
# Detectors live on the nodes with the resource "GPU" (given by name only: they run on the CPU), loading on the others.
NODES: tuple[dict[str, int], ...] = (
    {"num_cpus": 1}, {"num_cpus": 1}, {"num_cpus": 1, "num_gpus": 1}, {"num_cpus": 1, "num_gpus": 1},
)  # fmt: skip


@dataclass(slots=True)
class Event:
    """One line of the report."""

    round: int
    seconds: float
    what: str
    commits: int
    redone: str = ""
    verdict: str = ""


@dataclass(slots=True)
class Watch:
    """Sees every data file as soon as it is there, and again at the end."""

    folder: Path
    seen: dict[Path, tuple[int, int, str]] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def watching(self) -> Iterator[Watch]:
        thread = threading.Thread(target=self._look)
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join()

    def _look(self) -> None:
        while not self._stop.wait(0.1):
            for path in self.folder.glob("detections/**/*.parquet"):
                if path not in self.seen:
                    self.seen[path] = _fingerprint(path)

    def changed(self) -> list[str]:
        return [str(path) for path, was in self.seen.items() if not path.exists() or _fingerprint(path) != was]


def _fingerprint(path: Path) -> tuple[int, int, str]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()


class Round:
    """One run and what happens to it."""

    def __init__(self, number: int, kinds: Sequence[str], dice: random.Random, cluster: Nodes, corpus: Path) -> None:
        self.number, self.kinds, self.dice, self.cluster = number, kinds, dice, cluster
        self.num_shards = -(-len(cluster.undisturbed) // SHARD_ROWS)
        self.output = Path(tempfile.mkdtemp(prefix=f"chaos-{number}-"))
        self.events: list[Event] = []
        self.starts = 0
        self.others: list[subprocess.Popen[str]] = []  # second drivers, and stopped ones
        self._started = time.monotonic()
        self._logs: list[str] = []
        self._summaries: list[dict[str, object]] = []  # of drivers that ended well
        self._must_go_on = False
        self._arguments = [
            *flags(manifest=corpus / "manifest.parquet", output=self.output, weights="sample", shard_rows=SHARD_ROWS),
            *flags(device="cpu", gpus_per_detector=1, stall_seconds=STALL_SECONDS, round_wait_seconds=0.5),
        ]

    def start(self, *, local: bool = False) -> subprocess.Popen[str]:
        """A driver on the cluster, or on a Ray of its own."""
        self.starts += 1
        if not local:
            return start_job("detect", *self._arguments, environment=self.cluster.ray.environment)
        arguments = [*self._arguments, *flags(gpus_per_detector=0, num_detectors=1)]
        return start_job("detect", *arguments)

    def _start_again(self) -> None:
        """The same command after its driver died: a run that was left open is gone on with, unless another finished it."""
        has_plan, is_done = (list(self.output.glob(f"runs/*/{name}")) for name in ("run.json", "_SUCCESS.json"))
        self._must_go_on = bool(has_plan) and not is_done and not self.others
        self.driver = self.start()

    def num_committed(self) -> int:
        return len(list(self.output.glob("detections/**/*.parquet")))

    def run(self) -> list[Event]:
        moments = sorted(self.dice.randint(0, self.num_shards * 2 // 3) for _ in self.kinds)
        with Watch(self.output).watching() as watch:
            self.driver = self.start()
            try:
                for kind, moment in zip(self.kinds, moments, strict=True):
                    self._hit(kind, moment)
                trouble = self._finish()
            finally:
                for process in [self.driver, *self.others]:
                    kill_tree(process.pid)
        self._judge(watch, trouble)
        if self.events[-1].verdict == "same":
            shutil.rmtree(self.output)  # else it is what one wants to look at
        return self.events

    def _hit(self, kind: str, moment: int) -> None:
        """Wait for the moment, then for the victim, and strike."""
        until = time.monotonic() + END_SECONDS
        struck: Struck | None = None
        while struck is None and time.monotonic() < until and self.num_committed() < self.num_shards:
            if self.driver.poll() is not None:
                self._collect(self.driver)
                self._start_again()
            if self.num_committed() >= moment:
                struck = HITS[kind](self)
            time.sleep(0.002 if kind == "kill a commit in its write" else 0.05)
        seconds, commits = time.monotonic() - self._started, self.num_committed()
        self.events.append(
            Event(self.number, seconds, f"{kind}: {struck.who}" if struck else f"{kind}: too late", commits)
        )
        if struck is None:
            return
        if struck.then is not None:
            struck.then()
        at = time.monotonic()
        while self.num_committed() <= commits and time.monotonic() - at < 60 and self.driver.poll() is None:
            time.sleep(0.05)
        self.events[-1].redone = f"next commit after {time.monotonic() - at:.1f} s"
        print(_words(self.events[-1]), flush=True)

    def _finish(self) -> str:
        """Start the job until it says that it is complete."""
        while True:
            try:
                self._collect(self.driver)
            except subprocess.TimeoutExpired:
                return f"a driver did not end within {END_SECONDS:.0f} s"
            if self.driver.returncode == 0:
                break
            if self.driver.returncode not in (4, -9):
                return f"a driver ended with {self.driver.returncode}: {self._logs[-1][-1500:]}"
            if self.starts >= MAX_STARTS:
                return f"not complete after {self.starts} starts: {self._logs[-1][-1500:]}"
            self._start_again()
        for other in self.others:
            self._collect(other)
            if other.returncode not in (0, 4, -9):
                return f"another driver ended with {other.returncode}: {self._logs[-1][-1500:]}"
        return ""

    def _collect(self, driver: subprocess.Popen[str]) -> None:
        out, err = driver.communicate(timeout=END_SECONDS)
        self._logs.append(err)
        if driver.returncode == 0:
            self._summaries.append(json.loads(out.splitlines()[-1]))

    def _judge(self, watch: Watch, trouble: str) -> None:
        audit = run_job("audit", *flags(output=self.output), "--deep")
        checks = {
            "": trouble,
            "audit": "" if audit.returncode == 0 else f"exit {audit.returncode}: {audit.stderr[-1500:]}",
            "results": differences(results_of(self.output), self.cluster.undisturbed),
            "changed files": ", ".join(watch.changed()),
            "processes left": ", ".join(self._left_behind()),
            "summaries": self._contradictions(),
        }
        wrong = [f"{name}: {found}" for name, found in checks.items() if found]
        logs = "\n".join(self._logs)
        redone = (
            f"{self.starts} starts, {logs.count('again in')} more executions, "
            f"{logs.count('were committed first by another')} drivers discarded shards"
        )
        seconds, verdict = time.monotonic() - self._started, "; ".join(wrong) or "same"
        self.events.append(Event(self.number, seconds, "complete", self.num_committed(), redone, verdict))
        print(_words(self.events[-1]), flush=True)

    def _contradictions(self) -> str:
        """What drivers that ended well should not have said."""
        told = {(s["run_id"], s["rows"]) for s in self._summaries}
        runs = [path.parent.name for path in self.output.glob("runs/*/_SUCCESS.json")]
        if told != {(run, len(self.cluster.undisturbed)) for run in runs} or len(runs) != 1:
            return f"runs {runs}, told of {told}"
        if self._must_go_on and not any("going on with its pinned plan" in log for log in self._logs[1:]):
            return "no driver went on with the open run"
        return ""

    def _left_behind(self) -> list[str]:
        """Workers of ours that outlive their drivers by more than 20 s."""
        until = time.monotonic() + 20
        while True:
            names = ("fcos_ray.inputs.guard", "_Detect", "_load", "commit_task", "_Roll")
            left = [f"{name} {pid}" for name in names for pid in titled(self.cluster.ray.pid, name)]
            if not left or time.monotonic() > until:
                return left
            time.sleep(0.5)


class Nodes:
    """The cluster, the undisturbed results, and which node is which."""

    def __init__(self, ray: RayCluster, undisturbed: Mapping[str, Mapping[str, object]]) -> None:
        self.ray, self.undisturbed = ray, undisturbed
        self._alive = dict(enumerate(NODES))

    def kill_one(self, dice: random.Random) -> str:
        """Any but the head; another like it joins at once."""
        number = dice.choice([n for n in self._alive if n != 0])
        node = self._alive.pop(number)
        self.ray.kill(number)
        self._alive[self.ray.add(**node)] = node
        return f"node {number} ({'detectors' if 'num_gpus' in node else 'loading'})"


def _words(event: Event) -> str:
    parts = (event.what, f"{event.commits} commits", event.redone, event.verdict)
    return f"round {event.round:2} {event.seconds:6.1f} s  " + "  |  ".join(part for part in parts if part)


def plan_rounds(rounds: int, dice: random.Random) -> list[list[str]]:
    """Two or three kinds a round; every kind comes before any comes again."""
    waiting: list[str] = []
    plan = []
    for _ in range(rounds):
        kinds: list[str] = []
        for _ in range(dice.choice((2, 3))):
            if not waiting:
                waiting = dice.sample(sorted(HITS), len(HITS))
            kinds.append(waiting.pop())
        plan.append(kinds)
    return plan


def run_rounds(
    rounds: int, seed: int, num_images: int = NUM_IMAGES, *, plan: Sequence[Sequence[str]] | None = None
) -> list[Event]:
    """What happened, told as it happens; each round's last event has its verdict. `plan`: the hits, else drawn."""
    dice = random.Random(seed)
    events: list[Event] = []
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        corpus, quiet = Path(folder) / "corpus", Path(folder) / "undisturbed"
        write_sample(corpus, num_images=num_images, seed=seed, num_broken=10)
        job = flags(manifest=corpus / "manifest.parquet", output=quiet, weights="sample", shard_rows=SHARD_ROWS)
        done = run_job("detect", *job)  # on a Ray of its own, so that what the nodes share cannot be wrong in both
        assert done.returncode == 0, done.stderr
        with RayCluster(*NODES) as ray:
            nodes = Nodes(ray, results_of(quiet))
            assert sorted(nodes.undisturbed) == sorted(manifest_ids(corpus / "manifest.parquet"))
            for number, kinds in enumerate(plan or plan_rounds(rounds, dice), start=1):
                events += Round(number, kinds, dice, nodes, corpus).run()
    return events


def main(rounds: int, seed: int) -> int:
    events = run_rounds(rounds, seed)
    table = Table("round", "second", "what", "commits", "redone", "verdict")
    for e in events:
        table.add_row(str(e.round), f"{e.seconds:.1f}", e.what, str(e.commits), e.redone, e.verdict)
    Console(width=160).print(table)
    verdicts = [event.verdict for event in events if event.verdict]
    print(json.dumps({"rounds": rounds, "seed": seed, "same": verdicts.count("same"), "events": len(events) - rounds}))
    return 0 if verdicts == ["same"] * rounds else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    sys.exit(main(given.rounds, given.seed))
