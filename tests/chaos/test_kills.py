"""Killed and doubled drivers on one machine: the result is the undisturbed one, bit by bit. harness.py hits the rest."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from fcos_ray.sample import write_sample
from tests.corpus import files_of, manifest_ids, results_of
from tests.processes import flags, kill, run_job, start_job, wait_until

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

SHARD_ROWS = 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_sample(folder, num_images=96, seed=5, num_broken=8)
    return folder


def arguments(corpus: Path, output: Path) -> list[str]:
    job = flags(manifest=corpus / "manifest.parquet", output=output, shard_rows=SHARD_ROWS, round_wait_seconds=0.5)
    return [*job, *flags(weights="sample", num_detectors=1, load_cpus=0.5)]


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed")
    done = run_job("detect", *arguments(corpus, output))
    assert done.returncode == 0, done.stderr
    return output


def num_committed(output: Path) -> int:
    return len(list(output.glob("detections/**/*.parquet")))


def assert_whole(corpus: Path, output: Path, undisturbed: Path, *, kept: dict[str, bytes]) -> None:
    results = results_of(output)
    assert sorted(results) == sorted(manifest_ids(corpus / "manifest.parquet"))
    assert results == results_of(undisturbed), "equal to the bit: one machine, as many threads, one micro-batch size"
    files = files_of(output)
    assert kept.items() <= files.items(), "a committed file changed"
    assert len(files) == 96 // SHARD_ROWS
    [success] = output.glob("runs/*/_SUCCESS.json")
    assert json.loads(success.read_text())["rows"] == 96


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


def test_two_drivers_at_once_on_one_output(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    drivers = [start_job("detect", *arguments(corpus, tmp_path)) for _ in range(2)]
    ends = [driver.communicate(timeout=400) for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], ends
    summaries = [json.loads(out.splitlines()[-1]) for out, _ in ends]
    assert summaries[0]["run_id"] == summaries[1]["run_id"]
    assert {s["rows"] for s in summaries} == {96}
    assert_whole(corpus, tmp_path, undisturbed, kept={})
