"""Runs seen from outside."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fcos_ray.errors import OutputError
from fcos_ray.outputs import runs
from fcos_ray.outputs.pulse import Pulse, drivers_folder
from fcos_ray.upkeep.marks import abandon, retract
from fcos_ray.upkeep.status import list_runs, run_status
from tests.nights import Crash, run_night, write_night


def crashed(folder: Path, *, after: int) -> str:
    output = str(folder / "out")
    manifest = write_night(folder / "m.parquet", {f"i{n:02d}": "1" for n in range(20)})
    with pytest.raises(Crash):
        run_night(manifest, output, crash_after=after)
    return output


def test_an_open_run_shows_how_far_it_is(tmp_path: Path) -> None:
    output = crashed(tmp_path, after=4)
    [state] = runs.list_runs(output)
    files = sorted((Path(output) / "detections").rglob("*.parquet"))
    for number, file in enumerate(files):  # a shard of three rows every ten seconds; the first is of another hour
        then = time.time() - (3600 if number == 0 else 40 - 10 * number)
        os.utime(file, (then, then))
    found = run_status(output)
    assert (found.run_id, found.state, found.drivers) == (state.run_id, "open", ())
    assert (found.shards, found.committed_shards, found.rows, found.committed_rows) == (7, 4, 20, 12)
    assert found.images_per_second == pytest.approx(6 / 20, rel=0.05), "of the last quarter of an hour"
    assert found.eta_seconds == pytest.approx(8 / 0.3, rel=0.05)
    assert found.last_commit_seconds_ago is not None
    assert 9 < found.last_commit_seconds_ago < 60
    assert found.describe().startswith(
        f"run {state.run_id} is open: 4 of 7 shards, 12 of 20 rows, 0.3 images/s, about "
    )
    assert found.describe().endswith("nobody is at work on it")


def test_a_driver_at_work_is_named(tmp_path: Path) -> None:
    output = crashed(tmp_path, after=0)
    [state] = runs.list_runs(output)
    with Pulse(drivers_folder(output, state.run_id)) as pulse:
        found = run_status(output, state.run_id)
        assert found.drivers == (pulse.name,)
        assert found.describe().endswith(f"at work: {pulse.name}")
        [beat] = (Path(output) / "runs" / state.run_id / "drivers").glob("*.json")
        old = time.time() - 600
        os.utime(beat, (old, old))
        assert run_status(output).drivers == (), "killed ten minutes ago"
    assert not list((Path(output) / "runs" / state.run_id / "drivers").iterdir())
    assert (found.images_per_second, found.eta_seconds, found.last_commit) == (None, None, None)


def test_the_list_says_what_each_run_was(tmp_path: Path) -> None:
    output = crashed(tmp_path, after=1)
    abandon(output, runs.list_runs(output)[0].run_id)
    manifest = write_night(tmp_path / "m.parquet", {f"i{n:02d}": "1" for n in range(22)})
    second = run_night(manifest, output, outcome=lambda i: "not_found" if i == "i21" else "ok")
    retract(output, second.run_id)
    lines = list_runs(output)
    assert [(line.state, line.rows, line.ok, line.error) for line in lines] == [
        ("abandoned", 20, None, None), ("retracted", 19, 18, 1),
    ]  # fmt: skip
    assert lines[1].selection["up_to_date"] == 3
    assert 0 <= lines[1].age_seconds < 600
    assert datetime.fromisoformat(lines[1].created_at) <= datetime.now(UTC)
    assert run_status(output).run_id == second.run_id, "the newest, where none is open"


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"holds no runs; wanted the --output of a job"):
        list_runs(str(tmp_path))
    output = crashed(tmp_path, after=0)
    with pytest.raises(OutputError, match=r"has no run '000007-aaaaaaaa'; its last runs: 000001-"):
        run_status(output, "000007-aaaaaaaa")
    [state] = runs.list_runs(output)
    (Path(output) / "runs" / state.run_id / "run.json").write_text('{"request_digest": "x"}')
    with pytest.raises(OutputError, match=r"run\.json is damaged: KeyError\('num_rows'\)"):
        list_runs(output)
