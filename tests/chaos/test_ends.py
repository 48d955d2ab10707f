"""A job that is told to end, or whose workers stop moving: what is whole is committed, what hangs is named, no rows go."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from fcos_ray.sample import write_sample
from tests.corpus import files_of, manifest_ids, rows_of
from tests.disks import mounted, remount
from tests.processes import descendants, flags, kill_tree, run_job, start_job, titled, wait_until

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


@pytest.mark.parametrize(("stage", "title", "commits"), [("load", "_load", 0), ("detect", "_Detect", 1)])
def test_a_worker_that_stops_moving_is_named_with_its_images_and_replaced(
    corpus: Path, tmp_path: Path, stage: str, title: str, commits: int
) -> None:
    driver = start_job("detect", *arguments(corpus, tmp_path, stall_seconds=12))
    stopped: list[int] = []

    def stop_one() -> bool:
        if num_committed(tmp_path) >= commits:
            stopped.extend(titled(driver.pid, title)[:1])
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
        return bool(stopped) or driver.poll() is not None

    wait_until(stop_one, f"a {stage} worker to stop")
    assert stopped, driver.communicate()
    try:
        _, err = driver.communicate(timeout=400)
    finally:
        kill_tree(driver.pid)
    assert driver.returncode == 0, err
    assert f"--stall-seconds 12: nothing moved; at work are {stage} on 127.0.0.1 (pid {stopped[0]}) for" in err
    assert str(corpus / "images") in err.partition(f"(pid {stopped[0]})")[2]
    assert sorted(rows_of(tmp_path)) == sorted(manifest_ids(corpus / "manifest.parquet"))


def test_sigterm_commits_what_is_whole_and_the_same_command_goes_on(corpus: Path, tmp_path: Path) -> None:
    driver = start_job("detect", *arguments(corpus, tmp_path))
    wait_until(lambda: num_committed(tmp_path) >= 2 or driver.poll() is not None, "commits")
    driver.send_signal(signal.SIGTERM)
    _, err = driver.communicate(timeout=60)
    assert driver.returncode == 130, err
    assert err.splitlines()[-1] == "interrupted: what is committed stays; the same command goes on"
    assert "Traceback" not in err
    kept = files_of(tmp_path)
    assert not list(tmp_path.glob("runs/*/_SUCCESS.json"))
    assert not list(tmp_path.glob("runs/*/tmp/*")), "a commit was under way when the process ended"
    done = run_job("detect", *arguments(corpus, tmp_path))
    assert done.returncode == 0, done.stderr
    assert kept.items() <= files_of(tmp_path).items()
    assert sorted(rows_of(tmp_path)) == sorted(manifest_ids(corpus / "manifest.parquet"))


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


def test_a_disk_that_fills_stops_the_run_at_once_and_it_goes_on_when_there_is_room(
    corpus: Path, tmp_path: Path
) -> None:
    with mounted(tmp_path / "disk", "size=300k") as disk:
        done = run_job("detect", *arguments(corpus, disk / "labels"))
        assert done.returncode == 4, done.stderr
        last = done.stderr.splitlines()[-1]
        assert f"creating {disk}/labels/detections/run=" in last
        assert "the disk is full: free space there" in last
        kept = files_of(disk / "labels")
        assert kept
        remount(disk, "size=64m")
        done = run_job("detect", *arguments(corpus, disk / "labels"))
        assert done.returncode == 0, done.stderr
        assert kept.items() <= files_of(disk / "labels").items()
        assert sorted(rows_of(disk / "labels")) == sorted(manifest_ids(corpus / "manifest.parquet"))
