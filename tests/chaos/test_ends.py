"""A job that is told to end, or whose workers stop moving: what is whole is committed, what hangs is named, no rows go.

Starts are dear: one run goes on after SIGTERM with a load worker that is stopped, another after a full disk with a detector
that is stopped; their results must be equal to the bit.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fcos_ray.sample import write_sample
from tests.corpus import files_of, manifest_ids, results_of
from tests.disks import mounted, remount
from tests.processes import (
    cpu_seconds,
    descendants,
    flags,
    is_running,
    kill_tree,
    run_job,
    start_job,
    titled,
    wait_until,
)

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]
SHARD_ROWS = 4
NUM_IMAGES = 96


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_sample(folder, num_images=NUM_IMAGES, seed=5, num_broken=8)
    return folder


def arguments(corpus: Path, output: Path, **settings: object) -> list[str]:
    job = {"manifest": corpus / "manifest.parquet", "output": output, "weights": "sample", "shard_rows": SHARD_ROWS}
    return list(flags(**job | {"round_wait_seconds": 0.5, "num_detectors": 1, "load_cpus": 0.5} | settings))


def num_committed(output: Path) -> int:
    return len(list(output.glob("detections/**/*.parquet")))


@dataclass(frozen=True, slots=True)
class Ended:
    """How a job ended."""

    output: Path
    code: int
    err: str
    beside: list[Path]  # success and temporary files
    kept: dict[str, bytes] = field(repr=False)  # uri -> bytes of every shard file


@pytest.fixture(scope="module")
def told_to_end(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """SIGTERM after two commits."""
    output = tmp_path_factory.mktemp("labels")
    driver = start_job("detect", *arguments(corpus, output))
    wait_until(lambda: num_committed(output) >= 2 or driver.poll() is not None, "commits")
    driver.send_signal(signal.SIGTERM)
    _, err = driver.communicate(timeout=60)
    beside = [*output.glob("runs/*/_SUCCESS.json"), *output.glob("runs/*/tmp/*")]
    return Ended(output, driver.returncode, err, beside, files_of(output))


@pytest.fixture(scope="module")
def gone_on(corpus: Path, told_to_end: Ended) -> Path:
    """The output of the same command, given again."""
    go_on_although_a_worker_stops(corpus, told_to_end.output, stage="load", commits=0)
    return told_to_end.output


def loading(driver: int) -> list[int]:
    """Load workers with a decode child: they are past their imports, when they are not yet known to be at work."""
    return [pid for pid in titled(driver, "MapBatches(_load)") if titled(pid, "fcos_ray.inputs.guard")]


def detecting(driver: int) -> list[int]:
    """Detectors that compute, to this moment: one that is stopped while it waits for a block has no images to be named."""
    before = {pid: cpu_seconds(pid) for pid in titled(driver, "MapBatches(_Detect)")}
    time.sleep(0.15)
    return [pid for pid, seconds in before.items() if cpu_seconds(pid) - seconds > 0.12 and is_running(pid)]


AT_WORK = {"load": loading, "detect": detecting}


def go_on_although_a_worker_stops(corpus: Path, output: Path, *, stage: str, commits: int) -> None:
    """One worker is stopped after so many more commits: it is named with its images and replaced, and the run is whole."""
    driver = start_job("detect", *arguments(corpus, output, stall_seconds=12))
    stopped: list[int] = []
    commits += num_committed(output)

    def stop_one() -> bool:
        if num_committed(output) >= commits:
            stopped.extend(AT_WORK[stage](driver.pid)[:1])
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
        return bool(stopped) or driver.poll() is not None

    try:
        wait_until(stop_one, f"a {stage} worker to stop")
        _, err = driver.communicate(timeout=400)
    finally:
        kill_tree(driver.pid)
    print(err)
    assert driver.returncode == 0, err
    assert "going on with its pinned plan" in err
    assert "--stall-seconds 12: nothing moved; at work are" in err, err
    assert f"{stage} on 127.0.0.1 (pid {stopped[0]}) for" in err, err
    assert str(corpus / "images") in err.partition(f"(pid {stopped[0]})")[2]
    assert sorted(results_of(output)) == sorted(manifest_ids(corpus / "manifest.parquet"))


def test_sigterm_commits_what_is_whole(told_to_end: Ended) -> None:
    assert told_to_end.code == 130, told_to_end.err
    assert told_to_end.err.splitlines()[-1] == "interrupted: what is committed stays; the same command goes on"
    assert "Traceback" not in told_to_end.err
    assert told_to_end.kept
    assert not told_to_end.beside, "no run is finished, and no commit was under way when the process ended"


def test_the_same_command_goes_on_and_a_load_worker_that_stops_moving_is_replaced(
    told_to_end: Ended, gone_on: Path
) -> None:
    assert told_to_end.kept.items() <= files_of(gone_on).items()


def test_a_job_that_cannot_unwind_ends_within_its_grace(corpus: Path, tmp_path: Path) -> None:
    driver = start_job("detect", *arguments(corpus, tmp_path, grace_seconds=4))
    wait_until(lambda: num_committed(tmp_path) >= 1 or driver.poll() is not None, "a commit")
    ours = descendants(driver.pid)
    for pid in ours:  # raylet and all: nobody answers any more
        os.kill(pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        driver.send_signal(signal.SIGTERM)
        _, err = driver.communicate(timeout=60)
    finally:
        for pid in ours:
            os.kill(pid, signal.SIGKILL)
    assert driver.returncode == 130, err
    assert "--grace-seconds are over" in err
    assert time.monotonic() - started < 4 + 10, "ten for a machine on its knees"


def test_a_full_disk_stops_the_run_at_once_and_it_goes_on_when_there_is_room_although_a_detector_stops_moving(
    corpus: Path, tmp_path: Path, gone_on: Path
) -> None:
    # For a plan and some five shards: nineteen are left, so that the detector is stopped while it has work.
    with mounted(tmp_path / "disk", "size=110k") as disk:
        done = run_job("detect", *arguments(corpus, disk / "labels"))
        assert done.returncode == 4, done.stderr
        last = done.stderr.splitlines()[-1]
        assert f"creating {disk}/labels/detections/run=" in last
        assert "the disk is full: free space there" in last
        kept = files_of(disk / "labels")
        assert kept
        remount(disk, "size=64m")
        # After more than a block of 12, and so when the blocks behind it are loaded
        go_on_although_a_worker_stops(corpus, disk / "labels", stage="detect", commits=4)
        assert kept.items() <= files_of(disk / "labels").items()
        assert results_of(disk / "labels") == results_of(gone_on), "one machine, as many threads, one micro-batch size"
