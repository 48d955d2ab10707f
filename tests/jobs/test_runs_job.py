"""jobs/runs.py as a command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs import runs
from tests.nights import Crash, run_night, write_night
from tests.processes import call_job

SCRIPT = Path(__file__).resolve().parents[2] / "jobs" / "runs.py"


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return call_job(runs.main, *arguments)


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], text=True, capture_output=True, timeout=120)


def answer(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def two_nights(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """An output with a finished run and one that crashed: output, run_ids."""
    folder = tmp_path_factory.mktemp("nights")
    manifest = write_night(folder / "m.parquet", {f"i{n}": "1" for n in range(6)})
    output = str(folder / "out")
    first = run_night(manifest, output).run_id
    write_night(manifest, {f"i{n}": "2" for n in range(6)})
    with pytest.raises(Crash):
        run_night(manifest, output, crash_after=1)
    [second] = [p.name for p in (folder / "out" / "runs").glob("000002-*")]
    return output, first, second


def test_the_life_of_a_run(two_nights: tuple[str, str, str], tmp_path: Path) -> None:
    output, first, second = two_nights
    listed = process("list", "--output", output)
    assert [(line["run_id"], line["state"]) for line in answer(listed)] == [(first, "finished"), (second, "open")]
    assert first in listed.stderr
    status = command("status", "--output", output)
    assert answer(status)["committed_shards"] == 1
    assert f"run {second} is open: 1 of 2 shards, 3 of 6 rows" in status.stderr
    (tmp_path / "ids.txt").write_text("i5\n")
    asked = process("forget", "--output", output, "--ids", str(tmp_path / "ids.txt"), "--apply")
    assert asked.returncode == 2
    assert f"run {second} is open" in asked.stderr
    assert answer(command("abandon", second, "--output", output, "--reason", "wrong day"))["committed_shards"] == 1
    assert answer(command("retract", first, "--output", output))["retracted"]
    assert not answer(command("restore", first, "--output", output))["retracted"]
    counted = command("forget", "--output", output, "--ids", str(tmp_path / "ids.txt"))
    assert (answer(counted)["rows"], answer(counted)["applied"]) == (1, False)
    assert "would take out (--apply does it): 1 rows" in counted.stderr
    assert answer(command("forget", "--output", output, "--ids", str(tmp_path / "ids.txt"), "--apply"))["applied"]
    command("retract", second, "--output", output)
    assert answer(command("purge", "--output", output))["retracted"]["files"] == 2
    assert answer(command("purge", "--output", output, "--apply"))["runs"] == [second]
    assert answer(command("purge", "--output", output))["retracted"]["files"] == 0
    assert [line["state"] for line in answer(command("list", "--output", output))] == ["finished", "purged"]


NONSENSE = {
    "list --output {tmp}": (2, "holds no runs"),
    "status nonsense --output {out}": (2, "has no run 'nonsense'"),
    "retract ../../etc --output {out}": (2, "has no run '../../etc'"),
    "retract --output {out}": (2, "RUN"),
    "forget --output {out} --ids {tmp}/none": (2, "--ids {tmp}/none cannot be read"),
    "purge --output {tmp}": (2, "holds no runs"),
    "list": (2, "--output"),
    "dance --output {out}": (2, "dance"),
    "list --output s3://": (2, "s3://"),
}


@pytest.mark.parametrize("arguments", NONSENSE)
def test_nonsense_ends_with_a_line_that_says_so(
    two_nights: tuple[str, str, str], tmp_path: Path, arguments: str
) -> None:
    code, words = NONSENSE[arguments]
    done = command(*arguments.format(out=two_nights[0], tmp=tmp_path).split())
    assert done.returncode == code
    assert words.format(tmp=tmp_path) in done.stderr
    assert "Traceback" not in done.stderr


def test_help_names_every_verb() -> None:
    done = process("--help")
    assert done.returncode == 0
    assert all(f"{verb} " in done.stdout for verb in ("list", "status", "retract", "abandon", "forget", "purge"))
