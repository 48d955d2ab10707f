"""Whatever dies, the same command finishes, committed files stay as they are, and the result is the undisturbed one."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from fcos_ray.sample import write_sample
from tests.corpus import SMALL_MODEL, detections_of, files_of, manifest_ids, results_of
from tests.parity import assert_same_detections
from tests.processes import flags, kill, run_job, start_job, titled, wait_until
from tests.ray_cluster import RayCluster

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

SHARD_ROWS = 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_sample(folder, num_images=96, seed=5, num_broken=8)
    return folder


def arguments(corpus: Path, output: Path) -> list[str]:
    job = flags(manifest=corpus / "manifest.parquet", output=output, shard_rows=SHARD_ROWS, round_wait_seconds=0.5)
    return [*job, *flags(**SMALL_MODEL)]


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed")
    done = run_job("detect", *arguments(corpus, output))
    assert done.returncode == 0, done.stderr
    return output


def assert_same_results(results: dict[str, dict[str, Any]], wanted: dict[str, dict[str, Any]]) -> None:
    """Equal but for the last bits, which depend on how many threads a detector has."""
    found = ("boxes", "labels", "label_names", "scores")
    for image_id, row in results.items():
        other = wanted[image_id]
        assert {k: v for k, v in row.items() if k not in found} == {k: v for k, v in other.items() if k not in found}
        if row["status"] == "ok":
            detections = (detections_of(row), detections_of(other))
            assert_same_detections(*detections, score_threshold=0.2, max_detections=100)


def num_committed(output: Path) -> int:
    return len(list(output.glob("detections/**/*.parquet")))


def assert_whole(
    corpus: Path, output: Path, undisturbed: Path, *, kept: dict[str, bytes], same_threads: bool = True
) -> None:
    results, wanted = results_of(output), results_of(undisturbed)
    assert sorted(results) == sorted(manifest_ids(corpus / "manifest.parquet"))
    if same_threads:
        assert results == wanted, "equal to the bit: one machine, as many threads, one micro-batch size"
    else:
        assert_same_results(results, wanted)
    files = files_of(output)
    assert kept.items() <= files.items(), "a committed file changed"
    assert len(files) == 96 // SHARD_ROWS
    [success] = output.glob("runs/*/_SUCCESS.json")
    assert json.loads(success.read_text())["rows"] == 96
    assert not list(output.glob("runs/*/tmp/*")) or len(list(output.glob("runs/*/tmp/*"))) < 10


def test_the_driver_killed_at_three_random_moments(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    dice = random.Random(11)
    kept: dict[str, bytes] = {}
    for _ in range(3):
        before = num_committed(tmp_path)
        wanted = before + dice.randint(1, 5)
        driver = start_job("detect", *arguments(corpus, tmp_path))
        wait_until(lambda: num_committed(tmp_path) >= wanted or driver.poll() is not None, "commits")  # noqa: B023
        assert driver.poll() is None, driver.communicate()
        kill(driver.pid)
        driver.communicate()
        kept |= files_of(tmp_path)
        assert not list(tmp_path.glob("runs/*/_SUCCESS.json"))
    done = run_job("detect", *arguments(corpus, tmp_path))
    assert done.returncode == 0, done.stderr
    assert "going on with its pinned plan" in done.stderr
    assert_whole(corpus, tmp_path, undisturbed, kept=kept)


@pytest.mark.parametrize(  # loading runs ahead of the first commit, detecting goes on after it
    ("victim", "title", "commits"), [("load worker", "_load", 0), ("detector", "_Detect", 1)]
)
def test_a_process_killed_in_mid_run(
    corpus: Path, undisturbed: Path, tmp_path: Path, victim: str, title: str, commits: int
) -> None:
    driver = start_job("detect", *arguments(corpus, tmp_path))
    killed: list[int] = []

    def strike() -> bool:
        if num_committed(tmp_path) >= commits:
            killed.extend(titled(driver.pid, title)[:1])
            for pid in killed:
                kill(pid)
        return bool(killed) or driver.poll() is not None

    wait_until(strike, f"a {victim} to kill")
    assert killed, f"the run ended before a {victim} was seen"
    kept = files_of(tmp_path)
    _, err = driver.communicate(timeout=300)
    assert driver.returncode == 0, err
    assert_whole(corpus, tmp_path, undisturbed, kept=kept)


def test_a_node_killed_in_mid_run(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    # Detectors live on the nodes with the resource "GPU" (given by name only: they run on the CPU).
    with RayCluster({"num_cpus": 2}, {"num_cpus": 1, "num_gpus": 1}, {"num_cpus": 1, "num_gpus": 1}) as cluster:
        job = [*arguments(corpus, tmp_path), *flags(device="cpu", gpus_per_detector=1)]
        driver = start_job("detect", *job, environment=cluster.environment)
        wait_until(lambda: num_committed(tmp_path) >= 2 or driver.poll() is not None, "commits")
        cluster.kill(1)
        kept = files_of(tmp_path)
        _, err = driver.communicate(timeout=300)
        assert driver.returncode == 0, err
    assert_whole(corpus, tmp_path, undisturbed, kept=kept, same_threads=False)


def test_two_drivers_at_once_on_one_output(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    drivers = [start_job("detect", *arguments(corpus, tmp_path)) for _ in range(2)]
    ends = [driver.communicate(timeout=400) for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], ends
    summaries = [json.loads(out.splitlines()[-1]) for out, _ in ends]
    assert summaries[0]["run_id"] == summaries[1]["run_id"]
    assert {s["rows"] for s in summaries} == {96}
    assert_whole(corpus, tmp_path, undisturbed, kept={})


def test_an_interrupted_job_ends_with_130_and_goes_on(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    driver = start_job("detect", *arguments(corpus, tmp_path))
    wait_until(lambda: num_committed(tmp_path) >= 2 or driver.poll() is not None, "commits")
    driver.send_signal(signal.SIGTERM)
    _, err = driver.communicate(timeout=60)
    assert driver.returncode == 130, err
    assert "the same command goes on" in err
    kept = files_of(tmp_path)
    done = run_job("detect", *arguments(corpus, tmp_path))
    assert done.returncode == 0, done.stderr
    assert_whole(corpus, tmp_path, undisturbed, kept=kept)
