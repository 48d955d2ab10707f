"""What nothing needs any more: found, told, and deleted when asked."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

import fcos_ray as fr
from fcos_ray import storage
from fcos_ray.analysis.audit import audit_output
from fcos_ray.errors import OutputError
from fcos_ray.outputs import runs
from fcos_ray.upkeep.marks import restore, retract
from fcos_ray.upkeep.purge import plan_purge, purge
from tests.nights import Crash, run_night, write_night


def files(output: str) -> set[str]:
    return {file.uri[len(output) + 1 :] for file in storage.list_files(output)}


def age(path: Path, *, hours: float) -> None:
    then = time.time() - 3600 * hours
    os.utime(path, (then, then))


def left_behind(output: Path, run_id: str) -> set[str]:
    """What dead jobs leave: paths below the output."""
    names = {
        f"runs/{run_id}/tmp/{'a' * 32}.tmp",
        f"runs/{run_id}/drivers/host-1-abc.json",
        f"runs/{run_id}/manifest-of-a-loser/00000.parquet",
        "runs/000009-bbbbbbbb/manifest-never-pinned/00000.parquet",
        f".probe-{'b' * 32}",
    }
    for name in names:
        path = output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"left")
        age(path, hours=25)
    return names


def test_only_what_is_old_and_nobodys_goes(tmp_path: Path) -> None:
    output = tmp_path / "out"
    manifest = write_night(tmp_path / "m.parquet", {f"i{n}": "1" for n in range(5)})
    first = run_night(manifest, output)
    before = files(str(output))
    for path in before:
        age(output / path, hours=100)
    old = left_behind(output, first.run_id)
    young = output / "runs" / first.run_id / "tmp" / f"{'c' * 32}.tmp"
    young.write_bytes(b"being written")
    plan = plan_purge(str(output))
    assert {file.uri[len(str(output)) + 1 :] for kind in plan.files.values() for file in kind} == old
    assert plan.describe(applied=False).startswith("would delete (--apply does it): 3 temporary files")
    assert old <= files(str(output)), "planned only"
    purge(plan)
    assert files(str(output)) == before | {str(young.relative_to(output))}
    assert run_night(manifest, output).state == "nothing_to_do"
    assert not audit_output(str(output), deep=True).findings


def test_a_retracted_run_ends_for_good_and_its_number_stays_taken(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    manifest = write_night(tmp_path / "m.parquet", {f"i{n}": "1" for n in range(5)})
    first = run_night(manifest, output)
    retract(output, first.run_id)
    plan = plan_purge(output)
    restore(output, first.run_id)
    with pytest.raises(OutputError, match="was restored meanwhile; look again"):
        purge(plan)
    retract(output, first.run_id)
    purge(plan_purge(output))
    assert {path.rpartition("/")[2] for path in files(output)} == {
        "labelling.json", "000001.json", "run.json", "_SUCCESS.json", "_RETRACTED.json", "_PURGED.json", "retracted.parquet",
    }  # fmt: skip
    with pytest.raises(OutputError, match="was purged: its files are deleted"):
        restore(output, first.run_id)
    assert not audit_output(output, deep=True).findings
    assert fr.open_dataset(output).latest().to_arrow().num_rows == 0
    assert run_night(manifest, output).run_id.startswith("000002-")
    assert plan_purge(output).run_ids == ()


def test_a_purge_that_was_killed_is_ended_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = str(tmp_path / "out")
    run_id = run_night(write_night(tmp_path / "m.parquet", {f"i{n}": "1" for n in range(9)}), output).run_id
    retract(output, run_id)

    class Killed(Exception):
        pass

    def dies(uri: str) -> None:
        raise Killed

    plan = plan_purge(output)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "delete", dies)
        with pytest.raises(Killed):
            purge(plan)
    assert runs.require_run(output, run_id).state == "purged", "half of it can never come back"
    assert not audit_output(output).findings
    assert len(plan_purge(output).files["retracted"]) == 5
    purge(plan_purge(output))
    assert not list(storage.list_files(storage.join(output, "detections")))


def test_an_open_run_loses_nothing(tmp_path: Path) -> None:
    output = tmp_path / "out"
    manifest = write_night(tmp_path / "m.parquet", {f"i{n}": "1" for n in range(9)})
    with pytest.raises(Crash):
        run_night(manifest, output, crash_after=1)
    for path in files(str(output)):
        age(output / path, hours=100)
    before = files(str(output))
    purge(plan_purge(str(output)))
    assert {path for path in before if "/drivers/" not in path} <= files(str(output))
    assert run_night(manifest, output).rows == 9


def test_where_no_job_wrote_there_is_nothing_to_purge(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(OutputError, match="holds no runs"):
        plan_purge(str(tmp_path))
