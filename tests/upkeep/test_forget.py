"""Images taken out of an output: afterwards no byte of them is there, and everything else is as it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fcos_ray as fr
from fcos_ray import job, storage
from fcos_ray.analysis.audit import audit_output
from fcos_ray.errors import OutputError
from fcos_ray.outputs import index, runs
from fcos_ray.outputs.pulse import Pulse
from fcos_ray.upkeep.forget import _files, _Keys, _rewrite, forget, read_ids
from fcos_ray.upkeep.marks import retract
from tests.nights import Crash, run_night, write_night

GONE = ["secret-1", "secret-4"]


def everything(output: str) -> Iterable[tuple[str, bytes]]:
    """Every object, as it lies there and with what Parquet keeps compressed laid open."""
    for file in storage.list_files(output):
        data = storage.read_bytes(file.uri)
        yield file.uri, file.uri.encode() + data
        if file.uri.endswith(".parquet"):
            parquet = pq.ParquetFile(pa.BufferReader(data))
            groups = [parquet.metadata.row_group(i) for i in range(parquet.metadata.num_row_groups)]
            footers = [group.column(c).to_dict() for group in groups for c in range(group.num_columns)]
            laid_open = f"{parquet.read().to_pylist()} {parquet.schema_arrow.metadata} {footers}"
            yield file.uri, laid_open.encode()


def traces(output: str, texts: Iterable[str]) -> list[str]:
    return [uri for uri, data in everything(output) if any(text.encode() in data for text in texts)]


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Two nights, the first retracted; secret-4's uri is also another id's."""
    where = f"{request.getfixturevalue('s3_bucket')}/out" if request.param == "s3" else str(tmp_path / "out")
    write_nights(tmp_path, where)
    return where


def write_nights(folder: Path, output: str) -> None:
    ids = {f"image-{n}": "1" for n in range(6)} | {f"secret-{n}": "1" for n in range(6)}
    manifest = write_night(folder / "m.parquet", ids, site=["a", "b"] * 6, note=[f"about {i}" for i in ids])
    first = run_night(manifest, output, partition_by=["site"])
    changed = dict.fromkeys(ids, "2") | {"twin": "1"}
    write_night(manifest, changed, site=["a", "b"] * 6 + ["a"], note=[f"about {i}" for i in changed])
    table = pq.read_table(manifest).to_pylist()
    table[-1]["uri"] = "s3://corpus/secret-4.jpg"
    pq.write_table(pa.Table.from_pylist(table), manifest)
    run_night(manifest, output, partition_by=["site"])
    retract(output, first.run_id)
    storage.create(storage.join(runs.run_folder(output, first.run_id), "tmp", "half.tmp"), b"half of secret-1")


def rows(output: str) -> list[dict[str, Any]]:
    return sorted(
        fr.open_dataset(output).rows().to_arrow().to_pylist(), key=lambda row: (row["run_id"], row["image_id"])
    )


def test_no_byte_is_left_and_everything_else_stays(output: str) -> None:
    wanted = [row for row in rows(output) if row["image_id"] not in {*GONE, "twin"}]
    assert traces(output, GONE)
    counted = forget(output, [*GONE, "nobody"], apply=False)
    assert (counted.ids, counted.ids_found, counted.rows, counted.rows_of_other_ids) == (3, 2, 5, 1)
    assert traces(output, GONE), "only counted"
    done = forget(output, [*GONE, "nobody"], apply=True, reason="a letter")
    assert (done.rows, done.files) == (counted.rows, counted.files)
    assert traces(output, [*GONE, "nobody"]) == []
    assert rows(output) == wanted, "rows keep their places"
    found = audit_output(output, deep=True)
    assert not found.findings, found
    assert found.forgotten_rows == 5
    names = storage.list_names(storage.join(output, "forgotten"))
    assert len(names) == 2
    again = forget(output, GONE, apply=True)
    assert (again.ids_found, again.rows, again.files) == (0, 0, 0)


def test_a_shard_and_a_run_may_become_empty(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    manifest = write_night(tmp_path / "m.parquet", {f"secret-{n}": "1" for n in range(4)})
    run_night(manifest, output)
    forget(output, [f"secret-{n}" for n in range(4)], apply=True)
    assert traces(output, ["secret"]) == []
    assert fr.open_dataset(output).latest().to_arrow().num_rows == 0
    assert not audit_output(output, deep=True).findings
    write_night(manifest, {"image": "1"})
    assert run_night(manifest, output).rows == 1


def test_what_was_forgotten_is_new_again_when_a_manifest_still_names_it(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    manifest = write_night(tmp_path / "m.parquet", {"a": "1", "b": "1"})
    run_night(manifest, output)
    forget(output, ["a"], apply=True)
    again = run_night(manifest, output)
    assert (again.rows, again.selection["new"], again.selection["up_to_date"]) == (1, 1, 1)


def test_an_open_run_is_finished_first(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    manifest = write_night(tmp_path / "m.parquet", {f"i{n}": "1" for n in range(9)})
    with pytest.raises(Crash):
        run_night(manifest, output, crash_after=1)
    with pytest.raises(OutputError, match=r"is open, and may write these images again: let it finish, or abandon it"):
        forget(output, ["i0"], apply=True)
    run_night(manifest, output)
    assert forget(output, ["i0"], apply=True).rows == 1


class _Killed(Exception):
    pass


def _killed_after(writes: int, real: Callable[..., Any]) -> Callable[..., Any]:
    left = [writes]

    def write(uri: str, *arguments: Any, **options: Any) -> Any:
        if "/at_work/" in uri:  # the sign of life, which has a thread of its own
            return real(uri, *arguments, **options)
        if left[0] == 0:
            raise _Killed
        left[0] -= 1
        return real(uri, *arguments, **options)

    return write


@pytest.mark.parametrize("name", ["replace", "delete"])
def test_killed_before_any_write_the_same_command_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write_nights(tmp_path, str(tmp_path / "before"))
    for writes in range(100):
        output = str(tmp_path / f"out{writes}")
        shutil.copytree(tmp_path / "before", output)
        wanted = [row for row in rows(output) if row["image_id"] not in {*GONE, "twin"}]
        with monkeypatch.context() as patch:
            patch.setattr(storage, name, _killed_after(writes, getattr(storage, name)))
            try:
                forget(output, GONE, apply=True)
            except _Killed:
                killed = True
            else:
                killed = False
        forget(output, GONE, apply=True)
        assert traces(output, GONE) == [], f"killed after {writes} writes"
        assert rows(output) == wanted
        assert not audit_output(output, deep=True).findings
        if not killed:
            assert writes > 1, "it wrote something"
            return
    pytest.fail("it never ended")


def test_what_a_kill_in_the_middle_of_a_write_leaves_disturbs_nobody_and_goes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = str(tmp_path / "out")
    write_nights(tmp_path, output)

    def killed(*_: object, **__: object) -> None:
        raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        patch.setattr(Path, "unlink", killed)  # nobody tidies up after a SIGKILL
        with pytest.raises(_Killed):
            _rewrite(output, next(iter(_files(output))), _Keys(frozenset(GONE), frozenset()))
    assert not audit_output(output, deep=True).findings
    assert fr.open_dataset(output).latest().to_arrow().num_rows
    forget(output, GONE, apply=True)
    assert traces(output, GONE) == []
    assert not [file.uri for file in storage.list_files(output) if file.uri.endswith(".tmp")]


def test_two_at_once_would_undo_each_other_so_the_second_is_refused(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    run_night(write_night(tmp_path / "m.parquet", {"a": "1", "b": "1"}), output)
    with (
        Pulse(storage.join(output, "forgotten", "at_work")) as other,
        pytest.raises(OutputError, match=rf"{other.name} forgets here too .* let it end"),
    ):
        forget(output, ["a"], apply=True)
    assert forget(output, ["a"], apply=True).rows == 1


def test_a_job_that_planned_meanwhile_pins_nothing_of_what_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forgotten between plan and pin: the plan is made again, of a manifest that names the image no more."""
    output = str(tmp_path / "out")
    manifest = write_night(tmp_path / "m.parquet", {f"i{n}": "1" for n in range(6)} | {"secret-1": "1"})
    run_night(manifest, output)
    other = write_night(tmp_path / "n.parquet", {f"i{n}": "2" for n in range(6)} | {"secret-1": "2"})
    calls = []

    def pin_slowly(*arguments: Any, **options: Any) -> Any:
        calls.append(real(*arguments, **options))
        if len(calls) == 1:
            forget(output, GONE, apply=True)
        return calls[-1]

    real = job.pin
    monkeypatch.setattr(job, "pin", pin_slowly)
    with pytest.raises(Crash):
        run_night(other, output, crash_after=0)
    assert len(calls) == 2, "planned again"
    [open_run] = [run.run_id for run in runs.list_runs(output) if run.state == "open"]
    with pytest.raises(OutputError, match=f"run {open_run} is open"):
        forget(output, GONE, apply=True)


def test_an_index_that_was_made_of_the_files_as_they_were_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forgotten while a job made the index that was missing."""
    output = str(tmp_path / "out")
    manifest = write_night(tmp_path / "m.parquet", {"secret-1": "1", "b": "1"})
    first = run_night(manifest, output)
    storage.delete(index.index_uri(output, first.run_id))
    made = []

    def write_slowly(*arguments: Any) -> Path:
        made.append(real(*arguments))
        if len(made) == 1:
            forget(output, GONE, apply=True)
        return made[-1]

    real = index._write_index
    monkeypatch.setattr(index, "_write_index", write_slowly)
    write_night(manifest, {"b": "1"})
    assert run_night(manifest, output).state == "nothing_to_do"
    assert len(made) == 2
    assert traces(output, GONE) == []


def test_an_index_is_made_while_a_shard_is_rewritten_and_its_plan_not_yet(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    manifest = write_night(tmp_path / "m.parquet", {"secret-1": "1", "b": "1", "c": "1"})
    run = run_night(manifest, output)
    [shard] = [file for file in _files(output) if file.kind == "shard"]
    _rewrite(output, shard, _Keys(frozenset(GONE), frozenset()))
    storage.delete(index.index_uri(output, run.run_id))
    write_night(manifest, {"b": "1", "c": "2"})
    assert run_night(manifest, output).selection["changed"] == 1


def test_a_damaged_file_may_hold_the_image_so_nothing_is_claimed(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    run_night(write_night(tmp_path / "m.parquet", {"a": "1"}), output)
    [file] = storage.list_files(storage.join(output, "detections"))
    Path(file.uri).write_bytes(b"damage")
    with pytest.raises(
        OutputError, match=r"cannot be read: .* it may hold what is to be forgotten: move it away first"
    ):
        forget(output, ["a"], apply=True)


def test_ids_come_from_text_or_parquet(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("a b\n\nc,d\r\n", encoding="utf-8")
    assert read_ids(tmp_path / "ids.txt") == ["a b", "c,d"]
    pq.write_table(pa.table({"image_id": [7, None]}), tmp_path / "ids.parquet")
    assert read_ids(tmp_path / "ids.parquet") == ["7"]
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "other.parquet").write_bytes(b"x")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe")
    for name, words in {
        "empty.txt": "holds no image_id", "other.parquet": "cannot be read", "none.txt": "cannot be read",
        "latin.txt": "cannot be read",
    }.items():  # fmt: skip
        with pytest.raises(OutputError, match=words):
            read_ids(tmp_path / name)
