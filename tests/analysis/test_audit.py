"""The audit finds every way in which an output can differ from its plans, and nothing in one that a job wrote."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fcos_ray import storage
from fcos_ray.analysis.audit import audit_output
from fcos_ray.errors import OutputError
from jobs import audit as job
from tests.analysis.written import write_run

IDS = [f"img{i}" for i in range(6)]


def write(output: Path, folder: Path, **options: Any) -> None:
    """Two finished runs of three shards, one partitioned, and an open one with a shard to come."""
    camera = {"image_id": IDS, "site": ["a", "a", "b", "b", "b", "b"], "score": [0.5, None, float("nan"), 1, 2, 3]}
    outcomes = {"img1": [1, 2, 3], "img2": [], "img3": "not_found"}
    write_run(str(output), 1, camera, folder, outcomes=outcomes, partition_by=["site"])
    write_run(str(output), 2, camera, folder, outcomes=outcomes)
    write_run(str(output), 3, {"image_id": IDS}, folder, finished=False, shards=2)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    write(folder / "out", folder)
    return folder / "out"


@pytest.fixture
def output(original: Path, tmp_path: Path) -> Path:
    """A copy to damage. Paths in records are relative to the output, so a copy is as good."""
    shutil.copytree(original, tmp_path / "out")
    return tmp_path / "out"


def test_what_was_written_is_as_planned(output: Path) -> None:
    for deep in (False, True):
        summary = audit_output(str(output), deep=deep)
        assert summary.findings == {}
        assert (summary.runs, summary.open_runs, summary.shards, summary.open_shards) == (3, 1, 8, 1)
        assert summary.rows == 6 + 6 + 4


def shard_file(output: Path, run: int = 2, shard: int = 0) -> Path:
    [path] = output.glob(f"detections/run={run:06d}-*/**/{shard:08d}.parquet")
    return path


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    table = pq.read_table(path, partitioning=None)
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), path)


def with_column(name: str, values: list[Any]) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        at = table.column_names.index(name)
        return table.set_column(at, table.schema.field(name), pa.array(values, table.schema.field(name).type))

    return change


def with_about(**about: Any) -> Callable[[Path], None]:
    def damage(output: Path) -> None:
        path = shard_file(output)
        table = pq.read_table(path, partitioning=None)
        said = json.loads(table.schema.metadata[b"fcos_ray"])
        settings = about.get("settings", {})
        said |= about | {"settings": said["settings"] | settings if isinstance(settings, dict) else settings}
        pq.write_table(table.replace_schema_metadata({"fcos_ray": json.dumps(said)}), path)

    return damage


def edit_json(pattern: str, **values: Any) -> Callable[[Path], None]:
    def damage(output: Path) -> None:
        [path] = output.glob(pattern)
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def stray(name: str) -> Callable[[Path], None]:
    def damage(output: Path) -> None:
        path = output / "detections" / name.replace("RUN", shard_file(output).parent.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(shard_file(output), path)

    return damage


def misplace(output: Path) -> None:
    path = shard_file(output, run=1)
    other = path.parent.parent / "site=c"
    other.mkdir()
    path.rename(other / path.name)


def truncate(output: Path) -> None:
    path = shard_file(output)
    path.write_bytes(path.read_bytes()[:-50])


def rows(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    return lambda output: rewrite(shard_file(output), change)


def settings_of_labelling(**settings: Any) -> Callable[[Path], None]:
    """The output's settings, and those that all its files were made with."""

    def damage(output: Path) -> None:
        path = output / "labelling.json"
        labelling = json.loads(path.read_text())
        labelling["settings"] |= settings
        path.write_text(json.dumps(labelling))
        for file in output.glob("detections/**/*.parquet"):
            table = pq.read_table(file, partitioning=None)
            said = json.loads(table.schema.metadata[b"fcos_ray"]) | {"settings": labelling["settings"]}
            pq.write_table(table.replace_schema_metadata({"fcos_ray": json.dumps(said)}), file)

    return damage


def error_rows(**values: Any) -> Callable[[Path], None]:
    """Other values in the error row of shard 1 (its second), whose first row is ok."""

    def change(table: pa.Table) -> pa.Table:
        for name, value in values.items():
            table = with_column(name, [table[name][0].as_py(), value])(table)
        return table

    return lambda output: rewrite(shard_file(output, shard=1), change)


def counts(**values: Any) -> dict[str, Any]:
    return {"rows": 2, "ok": 2, "error": 0, "detections": 4} | values


def metadata(said: bytes) -> Callable[[Path], None]:
    def damage(output: Path) -> None:
        table = pq.read_table(shard_file(output), partitioning=None)
        pq.write_table(table.replace_schema_metadata({"fcos_ray": said}), shard_file(output))

    return damage


def spoil(pattern: str) -> Callable[[Path], None]:
    def damage(output: Path) -> None:
        for path in output.glob(pattern):
            path.write_bytes(b"{" + path.read_bytes()[:40])

    return damage


def spoil_text(output: Path) -> None:
    """A string that is no UTF-8: Parquet does not mind."""
    raw = pa.array([b"\xff", b"img1"], pa.binary())
    text = pa.StringArray.from_buffers(2, raw.buffers()[1], raw.buffers()[2])
    rewrite(shard_file(output), lambda t: t.set_column(0, t.schema.field("image_id"), text))


def swap_pinned(output: Path) -> None:
    [path] = output.glob("runs/000002-*/manifest-abc/*.parquet")
    table = pq.read_table(path)
    pq.write_table(table.take([1, 0, 2, 3, 4, 5]), path, row_group_size=2)


def edit_files(**values: Any) -> Callable[[Path], None]:
    def damage(output: Path) -> None:
        [path] = output.glob("runs/000002-*/run.json")
        record = json.loads(path.read_text())
        record["files"][0] |= values
        path.write_text(json.dumps(record))

    return damage


def unnamed(output: Path) -> None:
    rows(with_column("labels", [[9], [1, 2, 3]]))(output)
    rows(with_column("label_names", [[None], ["person", "bicycle", "car"]]))(output)


BOXES = [[0.0, 1.0, 10.0, 21.0]]
THREE = [0.9, 0.8, 0.7]
OTHER = {"score_threshold": 0.5}
DAMAGES: list[tuple[str, Callable[[Path], None], str, bool, str]] = [
    ("a shard is gone", lambda o: shard_file(o).unlink(), "missing", False, "1 of 3 shards are missing, such as 0"),
    ("a row is gone", rows(lambda t: t.slice(1)), "wrong_rows", False, "wanted rows 0 to 1"),
    ("a row is doubled", rows(lambda t: pa.concat_tables([t, t])), "wrong_rows", False, "4 rows, 2"),
    ("another name", stray("RUN/part-0.parquet"), "foreign", False, "no run writes files of that name"),
    ("a shard too many", stray("RUN/00000009.parquet"), "foreign", False, "the plan has 3 shards"),
    ("a run of nobody", stray("run=000009-ffffffff/00000000.parquet"), "foreign", False, "no run of that name"),
    ("a file beside the runs", stray("notes.parquet"), "foreign", False, "no run writes there"),
    ("a shard twice", stray("RUN/site=x/00000000.parquet"), "doubled", False, "the plan puts that shard at"),
    ("the wrong partition", misplace, "foreign", False, "the plan puts that shard at"),
    ("half a file", truncate, "unreadable", False, "cannot be read"),
    ("text for Parquet", lambda o: shard_file(o).write_text("no"), "unreadable", False, "cannot be read"),
    ("of another shard", with_about(shard=1), "foreign", False, "wanted shard 0 of run"),
    ("other weights", with_about(weights_sha256="e" * 64), "changed_settings", False, "made with weights_sha256"),
    ("another threshold", with_about(settings={"score_threshold": 0.3}), "changed_settings", False, "score_threshold 0.3"),
    ("other counts", edit_json("runs/000002-*/_SUCCESS.json", rows=7), "wrong_counts", False, "_SUCCESS.json has rows 7"),
    ("of another run", edit_json("runs/000002-*/run.json", run_id="000001-0"), "unreadable", False, "of run 000001-0"),
    ("a record without files", edit_json("runs/000002-*/run.json", files=None), "unreadable", False, "run.json is damaged"),
    ("no pinned rows", lambda o: shutil.rmtree(next(o.glob("runs/000002-*/manifest-abc"))), "unreadable", True, "pinned rows"),
    ("another image", rows(with_column("image_id", ["img0", "imgX"])), "wrong_rows", True, "image_id"),
    ("a lost value", rows(with_column("score", [0.5, 0.0])), "wrong_rows", True, "column score"),
    ("a lost column", rows(lambda t: t.drop_columns("site")), "wrong_rows", True, "column site: wanted"),
    ("an ok row that is none", rows(with_column("status", ["ok", "error"])), "wrong_rows", True, "do not go with error_code"),
    ("no boxes", rows(with_column("boxes", [BOXES, None])), "wrong_rows", True, "row 1: an ok row without boxes"),
    ("lists that differ", rows(with_column("scores", [[], THREE])), "wrong_rows", True, "in length"),
    ("outside", rows(with_column("boxes", [[[0, 0, 65, 1]], BOXES * 3])), "wrong_rows", True, "row 0: a box outside"),
    ("inside out", rows(with_column("boxes", [[[9, 0, 5, 1]], BOXES * 3])), "wrong_rows", True, "x2 < x1"),
    ("not a number", rows(with_column("scores", [[np.nan], THREE])), "wrong_rows", True, "no number"),
    ("ascending", rows(with_column("scores", [[0.9], [0.7, 0.8, 0.9]])), "wrong_rows", True, "descend"),
    ("too low", rows(with_column("scores", [[0.2], THREE])), "wrong_rows", True, "threshold"),
    ("misnamed", rows(with_column("labels", [[2], [1, 2, 3]])), "wrong_rows", True, "not the categories"),
    ("no label", rows(with_column("labels", [[9], [1, 2, 3]])), "wrong_rows", True, "not the categories"),
    ("no label, no name", unnamed, "wrong_rows", True, "row 0: label_names that are not the categories"),
    ("a nameless value", rows(with_column("scores", [[None], THREE])), "wrong_rows", True, "no number"),
    ("a box of three", rows(with_column("boxes", [[[0, 0, 1]], BOXES * 3])), "wrong_rows", True, "not four numbers"),
    ("too many", settings_of_labelling(max_detections=2), "wrong_rows", True, "row 1: more than 2 detections"),
    ("of another run inside", rows(with_column("run_id", ["000001-00000001"] * 2)), "wrong_rows", True, "another run_id"),
    ("of another shard inside", rows(with_column("shard", [1, 1])), "wrong_rows", True, "another shard"),
    ("an error that is none", error_rows(error_code="odd"), "wrong_rows", True, "an error_code that is none"),
    ("of another stage", error_rows(error_stage="decode"), "wrong_rows", True, "do not go with error_code"),
    ("an error for ever", error_rows(error_transient=True), "wrong_rows", True, "do not go with error_code"),
    ("an error without words", error_rows(error_message=None), "wrong_rows", True, "do not go with error_code"),
    ("an error with boxes", error_rows(boxes=BOXES), "wrong_rows", True, "an error or deleted row with boxes"),
    ("another order", rows(lambda t: t.select(t.column_names[::-1])), "wrong_rows", True, "stand in the order"),
    ("bytes for text", spoil_text, "unreadable", True, "cannot be read"),
    ("counts that are not its rows'", with_about(counts=counts(ok=1, error=1)), "wrong_counts", True, "its rows"),
    ("counts in words", with_about(counts=counts(rows="2")), "wrong_counts", False, "has no counts"),
    ("a list for metadata", metadata(b"[]"), "unreadable", False, "wanted a JSON object"),
    ("no JSON for metadata", metadata(b"{"), "unreadable", False, "cannot be read"),
    ("one setting more", with_about(settings={"sharpen": 1}), "changed_settings", False, "made with sharpen 1"),
    ("settings as a list", with_about(settings=[]), "changed_settings", False, "score_threshold None"),
    ("another record", edit_json("runs/000002-*/run.json", settings=OTHER), "changed_settings", False, "run.json has"),
    ("a damaged run.json", spoil("runs/000002-*/run.json"), "unreadable", False, "run.json is damaged"),
    ("a record of other sums", edit_json("runs/000002-*/run.json", num_rows=7), "unreadable", False, "num_rows and"),
    ("a record of other shards", edit_files(first_shard=1), "unreadable", False, "first_shard"),
    ("a damaged _SUCCESS.json", spoil("runs/000002-*/_SUCCESS.json"), "unreadable", False, "_SUCCESS.json is damaged"),
    ("a damaged labelling.json", spoil("labelling.json"), "unreadable", False, "labelling.json is damaged"),
    ("a labelling of nothing", edit_json("labelling.json", categories=None), "unreadable", False, "no run can be held"),
    ("pinned rows that are others", swap_pinned, "wrong_rows", True, "image_id is not the pinned manifest's"),
    ("a damaged partitioned plan", spoil("runs/000001-*/manifest-abc/*.parquet"), "unreadable", False, "pinned manifest"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "kind", "deep", "words"), [d[1:] for d in DAMAGES], ids=[d[0] for d in DAMAGES])
def test_damage_is_found_and_named(
    output: Path, damage: Callable[[Path], None], kind: str, deep: bool, words: str
) -> None:
    damage(output)
    summary = audit_output(str(output), deep=deep)
    assert set(summary.findings) == {kind}, summary
    assert words in " ".join(summary.examples[kind])
    if deep:
        assert audit_output(str(output)).findings.keys() <= {kind}


def test_what_is_found_is_told_in_few_words_however_much_it_is(output: Path) -> None:
    for number in range(20):
        stray(f"RUN/{'x' * 200}-{number}.parquet")(output)
    with_about(categories=["name"] * 5_000)(output)
    summary = audit_output(str(output))
    assert summary.findings == {"foreign": 20, "changed_settings": 1}
    assert [len(words) for words in summary.examples.values()] == [5, 1]
    assert len(summary.examples["changed_settings"][0]) == 501


def test_rows_that_are_alike_wrong_are_one_line(output: Path) -> None:
    rows(lambda t: with_column("status", ["error", "error"])(t))(output)
    summary = audit_output(str(output), deep=True)
    assert summary.findings == {"wrong_rows": 2}
    [words] = summary.examples["wrong_rows"]
    assert words.endswith("00000000.parquet: row 0, 1: status and the error columns do not go with error_code")


def test_scores_descend_within_an_image_not_from_one_to_the_next(output: Path) -> None:
    rows(with_column("scores", [[0.3], THREE]))(output)
    assert audit_output(str(output), deep=True).findings == {}


def test_five_examples_of_a_kind_are_told_whichever_shards_they_are_from(output: Path) -> None:
    for shard in range(3):
        path = shard_file(output, shard=shard)
        rewrite(path, with_column("run_id", ["x", "x"]))
        rewrite(path, with_column("shard", [8, 9]))
    summary = audit_output(str(output), deep=True)
    assert summary.findings == {"wrong_rows": 12}
    assert len(summary.examples["wrong_rows"]) == 5


def test_a_folder_named_like_a_pattern_hides_no_strangers(output: Path) -> None:
    stray("notes.parquet")(output)
    odd = output.rename(output.with_name("out[1]"))
    assert audit_output(str(odd)).findings == {"foreign": 1}


def test_damaged_records_of_one_run_do_not_keep_the_others_from_being_audited(output: Path) -> None:
    spoil("runs/000002-*/run.json")(output)
    shard_file(output, run=1).unlink()
    summary = audit_output(str(output), deep=True)
    assert summary.findings == {"unreadable": 1, "missing": 1}
    assert summary.runs == 2


def test_an_output_in_a_store_is_audited_alike(s3_bucket: str, tmp_path: Path) -> None:
    output = f"{s3_bucket}/out"
    write_run(output, 1, {"image_id": IDS, "site": ["a", "a/b"] * 3}, tmp_path, partition_by=["site"])
    assert audit_output(output, deep=True).findings == {}
    folder = f"{output}/detections/run=000001-00000001"
    first, second, *_ = [file.uri for file in storage.list_files(folder)]
    storage.create(f"{folder}/site=c/{second.rsplit('/', 1)[1]}", storage.read_bytes(second))
    storage.create(f"{output}/detections/notes.parquet", b"no")
    storage.delete(first)
    assert audit_output(output).findings == {"doubled": 1, "foreign": 1, "missing": 1}
    storage.delete(next(storage.list_files(f"{output}/runs/000001-00000001/manifest-abc")).uri)
    assert audit_output(output, deep=True).findings == {"doubled": 1, "foreign": 1, "missing": 1, "unreadable": 4}


def test_one_run_is_audited_alone(output: Path) -> None:
    shard_file(output, run=2).unlink()
    assert audit_output(str(output), run_id=next(output.glob("runs/000001-*")).name).findings == {}
    assert audit_output(str(output), run_id=next(output.glob("runs/000002-*")).name).findings == {"missing": 1}


def test_a_place_without_runs_is_an_error_not_a_clean_audit(output: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no run there"):
        audit_output(str(tmp_path / "nothing"))
    with pytest.raises(OutputError, match="no run 000009-00000000 there"):
        audit_output(str(output), run_id="000009-00000000")
    (output / "labelling.json").unlink()
    with pytest.raises(OutputError, match=r"no labelling\.json"):
        audit_output(str(output))


def test_the_command_line_ends_with_0_5_or_2(output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.main(["--output", str(output), "--deep"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["findings"] == {}
    assert "3 runs, 1 open with 1 shards to come; 8 shards, 16 rows: all is as planned" in said.err
    shard_file(output).unlink()
    assert job.main(["--output", str(output)]) == 5
    said = capsys.readouterr()
    assert json.loads(said.out)["findings"] == {"missing": 1}
    assert "missing: 1, such as\n  run 000002-" in said.err
    assert job.main(["--output", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
