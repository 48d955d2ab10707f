"""Nights on a corpus that grows: what is labelled each night, and what stands there in the end."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest

import fcos_ray as fr
from fcos_ray.analysis.audit import audit_output
from fcos_ray.errors import OutputError
from fcos_ray.outputs import runs
from fcos_ray.outputs.index import index_uri
from fcos_ray.outputs.pulse import Pulse, drivers_folder
from fcos_ray.upkeep.marks import abandon, restore, retract
from tests.analysis.test_queries import queries
from tests.nights import Crash, run_night, write_night

COLUMNS = ["image_id", "uri", "status", "error_code", "boxes", "labels", "scores", "content_etag"]


def newest(output: Path | str) -> dict[str, Any]:
    rows = fr.open_dataset(str(output)).latest(columns=COLUMNS).to_arrow().to_pylist()
    return {row["image_id"]: row for row in rows}


def seen_by_plain_sql(output: Path) -> dict[str, Any]:
    """image_id -> boxes, by the README's own view."""
    view = queries()["the newest row of every image that was not retracted and is not marked deleted"]
    connection = duckdb.connect()
    connection.execute(view.replace("out/labels", str(output)))
    return dict(connection.execute("SELECT image_id, boxes FROM newest").fetchall())


def test_a_month_of_nights_ends_as_if_all_had_been_labelled_once(tmp_path: Path) -> None:
    """30 nights: growth, changes, failures that heal, two crashes, one overlap, one retraction."""
    draw = random.Random(7)
    output, manifest = tmp_path / "out", tmp_path / "m.parquet"
    etags = {f"img{n:04d}": "1" for n in range(60)}
    failing: set[str] = set()
    table = []
    for night in range(1, 31):
        etags |= {f"img{len(etags) + n:04d}": "1" for n in range(draw.randint(0, 12))}
        for image_id in draw.sample(sorted(etags), draw.randint(0, 5)):
            etags[image_id] = str(int(etags[image_id]) + 1)
        failing = set(draw.sample(sorted(etags), 3)) if night < 29 else set()
        write_night(manifest, etags)
        settings = {
            "select": ["new", "changed", "failed"],
            "outcome": lambda i, bad=frozenset(failing): "fetch_failed" if i in bad else "ok",
        }
        if night in (9, 17):
            with pytest.raises(Crash):
                run_night(manifest, output, crash_after=1, **settings)
            if night == 17:  # the corpus grows before the next start: the open run is finished first
                etags |= {"late": "1"}
                write_night(manifest, etags)
        if night == 12:  # two starts at once: the second waits for nothing, it is told to leave
            with pytest.raises(Crash):
                run_night(manifest, output, crash_after=0, **settings)
            open_run = next(run for run in runs.list_runs(str(output)) if run.state == "open")
            with Pulse(drivers_folder(str(output), open_run.run_id)):
                left = run_night(manifest, output, if_running="exit", **settings)
            assert (left.state, left.run_id) == ("running", open_run.run_id)
        summary = run_night(manifest, output, **settings)
        if night == 21:
            retract(str(output), summary.run_id, reason="a test")
            assert seen_by_plain_sql(output) == {i: row["boxes"] for i, row in newest(output).items()}
        table.append(
            (night, summary.state, *(summary.selection.get(k, 0) for k in ("manifest", "selected", "up_to_date")))
        )
    for row in table:
        print("night %2d  %-13s  %3d in the manifest, %2d selected, %3d up to date" % row)  # noqa: UP031
    assert sum(selected for _, _, _, selected, _ in table[1:]) < 0.5 * sum(size for _, _, size, *_ in table[1:])
    once = tmp_path / "once"
    run_night(manifest, once, select=["all"])
    assert newest(output) == newest(once)
    assert len(newest(once)) == len(etags)


def test_a_night_without_news_is_nothing_to_do(tmp_path: Path) -> None:
    manifest = write_night(tmp_path / "m.parquet", {"a": "1", "b": "1"})
    first = run_night(manifest, tmp_path / "out", outcome=lambda i: "not_found" if i == "b" else "ok")
    assert first.selection["selected"] == first.rows == 2
    again = run_night(manifest, tmp_path / "out")
    assert (again.state, again.run_id, again.ok) == ("nothing_to_do", first.run_id, 1), "the records say so"
    write_night(manifest, {"b": "1", "a": "1"})  # another file, the same images
    other = run_night(manifest, tmp_path / "out")
    assert (other.state, other.run_id, other.rows) == ("nothing_to_do", first.run_id, 0)
    assert (other.selection["up_to_date"], other.selection["failed_for_good"]) == (1, 1)
    assert len(runs.list_runs(str(tmp_path / "out"))) == 1


def test_what_was_retracted_is_new_again_until_it_is_restored(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    manifest = write_night(tmp_path / "m.parquet", {"a": "1"})
    first = run_night(manifest, output)
    write_night(manifest, {"a": "1", "b": "1"})
    second = run_night(manifest, output)
    assert second.rows == 1
    assert retract(output, first.run_id)
    assert not retract(output, first.run_id), "it was"
    assert set(newest(output)) == {"b"}
    third = run_night(manifest, output, dry_run=True)
    assert (third.state, third.rows, third.selection["new"]) == ("planned", 1, 1)
    assert restore(output, first.run_id)
    assert run_night(manifest, output).state == "nothing_to_do"
    assert set(newest(output)) == {"a", "b"}
    with pytest.raises(OutputError, match="only an open run can be abandoned"):
        abandon(output, first.run_id)


def test_all_labels_everything_again_once(tmp_path: Path) -> None:
    manifest = write_night(tmp_path / "m.parquet", {"a": "1", "b": "1"})
    run_night(manifest, tmp_path / "out")
    again = run_night(manifest, tmp_path / "out", select=["all"])
    assert (again.state, again.rows) == ("complete", 2)
    repeated = run_night(manifest, tmp_path / "out", select=["all"])
    assert (repeated.state, repeated.run_id) == ("nothing_to_do", again.run_id), "a retried submission does no harm"
    retract(str(tmp_path / "out"), again.run_id)
    assert run_night(manifest, tmp_path / "out", select=["all"]).state == "complete"


def test_an_abandoned_runs_rows_count_and_the_rest_is_new(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    manifest = write_night(tmp_path / "m.parquet", {f"i{n}": "1" for n in range(9)})
    with pytest.raises(Crash):
        run_night(manifest, output, crash_after=2)
    [open_run] = runs.list_runs(output)
    with pytest.raises(OutputError, match=r"is open: let it finish .* or abandon it first"):
        retract(output, open_run.run_id)
    with (
        Pulse(drivers_folder(output, open_run.run_id)) as pulse,
        pytest.raises(OutputError, match=f"{pulse.name} is at work on run"),
    ):
        abandon(output, open_run.run_id)
    assert abandon(output, open_run.run_id) == abandon(output, open_run.run_id) == 2
    assert len(newest(output)) == 6
    rest = run_night(manifest, output)
    assert (rest.rows, rest.selection["up_to_date"]) == (3, 6)
    assert len(newest(output)) == 9


def test_an_index_that_is_gone_is_made_again(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    manifest = write_night(tmp_path / "m.parquet", {f"i{n}": "1" for n in range(5)}, site=["x/y", "b", "b", "x/y", "b"])
    first = run_night(manifest, output, partition_by=["site"])
    path = Path(index_uri(output, first.run_id))
    before = path.read_bytes()
    path.unlink()
    explained = run_night(manifest, output, partition_by=["site"], explain="i1")
    assert explained.state == "planned"
    assert not path.exists(), "a question changes nothing"
    assert "is up to date" in str(explained.explanation)
    write_night(manifest, {f"i{n}": "1" for n in range(6)}, site=["x/y", "b", "b", "x/y", "b", "b"])
    assert run_night(manifest, output, partition_by=["site"]).rows == 1
    assert path.read_bytes() == before


def test_images_that_are_gone_leave_the_dataset_and_come_back(tmp_path: Path) -> None:
    output = tmp_path / "out"
    etags: dict[str, str | None] = {f"i{n}": "1" for n in range(6)}
    manifest = tmp_path / "m.parquet"

    def night(*names: str) -> fr.RunSummary:
        chosen = {name: etags[name] for name in names}
        write_night(manifest, chosen, site=["a" if name < "i3" else "b" for name in names])
        return run_night(
            manifest, output, partition_by=["site"], tombstones=True, max_tombstone_fraction=0.5
        )  # fmt: skip

    night(*etags)
    gone = night("i0", "i1", "i3", "i4")
    assert (gone.rows, gone.deleted, gone.ok, gone.selection["deleted"]) == (2, 2, 0, 2)
    assert set(newest(output)) == set(seen_by_plain_sql(output)) == {"i0", "i1", "i3", "i4"}
    history = fr.open_dataset(str(output)).rows(gone.run_id).to_arrow().to_pylist()
    assert {row["image_id"]: (row["status"], row["site"]) for row in history} == {
        "i2": ("deleted", "a"), "i5": ("deleted", "b"),
    }  # fmt: skip
    assert night("i0", "i1", "i3", "i4").state == "nothing_to_do"
    back = night("i0", "i1", "i2", "i3", "i4")
    assert (back.rows, back.deleted) == (1, 0)
    assert set(newest(output)) == {"i0", "i1", "i2", "i3", "i4"}


def test_a_run_of_before_selections_and_tombstones_is_gone_on_with(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    manifest = write_night(tmp_path / "m.parquet", {f"i{n}": "1" for n in range(9)})
    with pytest.raises(Crash):
        run_night(manifest, output, crash_after=1)
    [record] = (tmp_path / "out" / "runs").glob("*/run.json")
    old = json.loads(record.read_text())
    del old["selection"], old["history"]
    record.write_text(json.dumps(old))
    [plan] = record.parent.glob("manifest-*/*.parquet")
    parquet = pq.ParquetFile(plan)
    groups = [parquet.read_row_group(i).drop_columns("__deleted") for i in range(parquet.num_row_groups)]
    with pq.ParquetWriter(plan, groups[0].schema) as writer:
        for group in groups:
            writer.write_table(group)
    summary = run_night(manifest, output)
    assert (summary.state, summary.rows) == ("complete", 9)
    assert not audit_output(output, deep=True).findings
