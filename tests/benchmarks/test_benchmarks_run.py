"""The benchmarks run as their first lines say, here on little."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def test_planning_against_a_history_finds_what_was_generated(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.plan_history", "--folder", str(tmp_path), "--runs", "3"]
    sizes = ["--rows", "5000", "--mixed", "6000"]
    done = subprocess.run([*command, *sizes], text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    fresh, mixed = (json.loads(line) for line in done.stdout.splitlines())
    assert fresh["selection"].startswith("100,000 in the manifest: 100,000 new, 0 changed")
    assert ", 60 changed, 0 failed before, 5,8" in mixed["selection"], mixed
    assert mixed["peak_gb"] > 0


def test_post_processing_and_loading_are_held_against_what_people_write() -> None:
    commands = {"postprocess_speed": [], "load_speed": ["--image-size", "1600x1200"]}
    for name, sizes in commands.items():
        command = [sys.executable, "-m", f"tests.benchmarks.{name}", "--rounds", "1", *sizes]
        done = subprocess.run(command, text=True, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr
        for line in done.stdout.splitlines():
            assert min(json.loads(line)["milliseconds"].values()) > 0


def test_a_first_plan_and_a_finished_run_are_measured(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.plan_speed", "--folder", str(tmp_path)]
    done = subprocess.run(
        [*command, "--rows", "3000", "--finished", "2000"], text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    plan, *again = (json.loads(line) for line in done.stdout.splitlines())
    assert plan["selection"].startswith("3,000 in the manifest: 3,000 new")
    assert [(one["finished_rows"], one["state"]) for one in again] == [(2000, "nothing_to_do")] * 3
    assert not list(tmp_path.iterdir()), "it leaves nothing"


@pytest.mark.ray
def test_a_job_without_a_model_is_measured() -> None:
    command = [sys.executable, "-m", "tests.benchmarks.no_model", "--rows", "200", "--shard-rows", "50"]
    done = subprocess.run(command, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["rows"], told["shards"]) == (200, 4)
    assert told["images_per_second"] > told["images_per_second_with_start"] > 0
    assert 100 < told["driver_mb"] <= 1.05 * told["driver_peak_mb"]  # pages and kilobytes are rounded
