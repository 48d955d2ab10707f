"""Opening an output: newest rows over many runs, columns united with their types, and what does not count."""

from __future__ import annotations

import datetime as dt
import json
from collections import Counter
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fcos_ray as fr
from fcos_ray import storage
from fcos_ray.errors import OutputError, StorageError
from fcos_ray.outputs.schema import DATA_SCHEMA
from tests.analysis.conftest import TwoRuns
from tests.analysis.written import LABELLING, write_run
from tests.corpus import rows_of


@pytest.fixture
def output(tmp_path: Path) -> str:
    return str(tmp_path / "out")


def by_id(rows: Any, *names: str) -> dict[str, Any]:
    """image_id -> the named column, or a tuple of them; fails when an id comes twice."""
    found = rows.to_arrow().to_pylist()
    assert len({row["image_id"] for row in found}) == len(found)
    return {row["image_id"]: row[names[0]] if len(names) == 1 else tuple(row[n] for n in names) for row in found}


# ---- newest rows


def test_the_newest_row_of_an_image_is_that_of_the_highest_run_with_it(output: str, tmp_path: Path) -> None:
    first = write_run(output, 1, {"image_id": ["a", "b", "c"]}, tmp_path)
    tenth = write_run(output, 10, {"image_id": ["b"]}, tmp_path)
    ninth = write_run(output, 9, {"image_id": ["b", "c", "d"]}, tmp_path)
    newest = fr.open_dataset(output).latest()
    assert by_id(newest, "run_id") == {"a": first, "b": tenth, "c": ninth, "d": ninth}


def test_a_newest_row_that_is_an_error_stays_the_newest(output: str, tmp_path: Path) -> None:
    write_run(output, 1, {"image_id": ["a", "b", "c"]}, tmp_path, outcomes={"a": "not_found", "c": "forbidden"})
    second = write_run(output, 2, {"image_id": ["a", "b"]}, tmp_path, outcomes={"b": "fetch_timeout"})
    dataset = fr.open_dataset(output)
    assert by_id(dataset.latest(), "status") == {"a": "ok", "b": "error", "c": "error"}
    assert by_id(dataset.errors(), "error_code") == {"b": "fetch_timeout", "c": "forbidden"}
    assert by_id(dataset.errors(columns=["image_id", "run_id"]), "run_id")["b"] == second
    assert set(dataset.boxes().to_arrow()["image_id"].to_pylist()) == {"a"}


def test_committed_rows_of_an_open_run_count(output: str, tmp_path: Path) -> None:
    first = write_run(output, 1, {"image_id": ["a", "b", "c", "d"]}, tmp_path)
    second = write_run(output, 2, {"image_id": ["a", "b", "c", "d"]}, tmp_path, finished=False, shards=1)
    dataset = fr.open_dataset(output)
    assert by_id(dataset.latest(), "run_id") == {"a": second, "b": second, "c": first, "d": first}
    assert dataset.rows().to_arrow().num_rows == 6


def test_what_is_committed_later_is_seen_by_opening_again(output: str, tmp_path: Path) -> None:
    write_run(output, 1, {"image_id": ["a"]}, tmp_path)
    dataset = fr.open_dataset(output)
    write_run(output, 2, {"image_id": ["a", "b"]}, tmp_path)
    assert dataset.latest().to_arrow().num_rows == 1
    assert fr.open_dataset(output).latest().to_arrow().num_rows == 2


def test_one_runs_rows_are_its_own(output: str, tmp_path: Path) -> None:
    first = write_run(output, 1, {"image_id": ["a", "b"], "x": [1, 2]}, tmp_path)
    second = write_run(output, 2, {"image_id": ["a"], "y": [3]}, tmp_path)
    dataset = fr.open_dataset(output)
    assert by_id(dataset.rows(first), "x") == {"a": 1, "b": 2}
    assert by_id(dataset.rows(second), "y") == {"a": 3}
    assert "x" not in dataset.rows(second).schema.names
    assert Counter(dataset.rows().to_arrow()["run_id"].to_pylist()) == {first: 2, second: 1}
    with pytest.raises(OutputError, match=rf"has no run '000003-00000003'; it has {first}, {second}"):
        dataset.rows("000003-00000003")


# ---- what does not count


def test_files_of_runs_that_were_never_pinned_do_not_count(output: str, tmp_path: Path) -> None:
    run_id = write_run(output, 1, {"image_id": ["a"]}, tmp_path)
    [file] = storage.list_files(f"{output}/detections")
    data = storage.read_bytes(file.uri)
    for place in ("run=000002-00000002/00000000.parquet", "00000000.parquet", "other/run=1/00000000.parquet"):
        storage.create(f"{output}/detections/{place}", data)
    assert by_id(fr.open_dataset(output).rows(), "run_id") == {"a": run_id}


@pytest.mark.parametrize("place", ["00000007.parquet", "p/00000007.parquet", "q=1/00000007.parquet", "p=x/notes.txt"])
def test_a_file_in_a_runs_folder_that_no_run_writes_is_named(output: str, tmp_path: Path, place: str) -> None:
    run_id = write_run(output, 1, {"image_id": ["a"], "p": ["x"]}, tmp_path, partition_by=["p"])
    foreign = f"{output}/detections/run={run_id}/{place}"
    storage.create(foreign, b"")
    with pytest.raises(OutputError, match=rf"{foreign}.* was not written by this run; move it away"):
        fr.open_dataset(output)


@pytest.mark.parametrize(
    ("place", "what"),
    [("nothing", "holds no runs"), ("empty", "holds no runs"), ("", "holds no runs"), ("out/runs", "holds no runs")],
)
def test_a_folder_without_runs_is_no_output(tmp_path: Path, place: str, what: str) -> None:
    (tmp_path / "empty").mkdir()
    write_run(str(tmp_path / "out"), 1, {"image_id": ["a"]}, tmp_path)
    with pytest.raises(OutputError, match=what):
        fr.open_dataset(str(tmp_path / place))


@pytest.mark.parametrize("uri", ["s3://", "simplecache::file:///etc", "nosuch://x/y", "\0"])
def test_what_is_no_uri_is_refused(uri: str) -> None:
    with pytest.raises(OutputError, match="cannot be opened as an output"):
        fr.open_dataset(uri)


def test_an_output_whose_labelling_is_gone_is_refused(output: str, tmp_path: Path) -> None:
    write_run(output, 1, {"image_id": ["a"]}, tmp_path)
    storage.delete(f"{output}/labelling.json")
    with pytest.raises(OutputError, match=r"labelling\.json is gone"):
        fr.open_dataset(output)


@pytest.mark.parametrize("damage", [b"", b"not parquet at all", b"PAR1PAR1"])
def test_a_damaged_file_is_named(output: str, tmp_path: Path, damage: bytes) -> None:
    write_run(output, 1, {"image_id": ["a", "b", "c"]}, tmp_path)
    first, last = [Path(file.uri) for file in storage.list_files(f"{output}/detections")]
    whole = last.read_bytes()
    last.write_bytes(damage)
    with pytest.raises(OutputError, match=last.name):  # found when it is read
        fr.open_dataset(output).latest().to_arrow()
    last.write_bytes(whole)
    first.write_bytes(damage)
    with pytest.raises(OutputError, match=first.name):  # the first one's columns stand for all
        fr.open_dataset(output)


def test_a_file_whose_damage_shows_in_mid_stream_is_named(output: str, tmp_path: Path) -> None:
    write_run(output, 1, {"image_id": [f"{n}" for n in range(80_000)]}, tmp_path, shard_rows=8_000)
    last = Path(list(storage.list_files(f"{output}/detections"))[-1].uri)
    last.write_bytes(last.read_bytes()[:-20])
    with pytest.raises(OutputError, match=last.name):
        list(fr.open_dataset(output).latest().to_batches(max_rows=2048))


def test_an_output_without_committed_rows_is_empty(output: str, tmp_path: Path) -> None:
    run_id = write_run(output, 1, {"image_id": ["a"]}, tmp_path, finished=False, shards=0)
    dataset = fr.open_dataset(output)
    for rows in (dataset.latest(), dataset.rows(run_id), dataset.errors()):
        assert rows.to_arrow().equals(DATA_SCHEMA.empty_table())
        assert rows.to_duckdb().fetchall() == []
    assert dataset.boxes().to_arrow().num_rows == 0
    [run] = dataset.runs().to_arrow().to_pylist()
    assert (run["state"], run["committed_shards"]) == ("open", 0)


# ---- columns and their types


def test_columns_come_back_with_the_types_and_values_of_the_manifest(output: str, tmp_path: Path) -> None:
    own = {
        "u": pa.array([2**64 - 1, None], pa.uint64()),
        "b": pa.array([b"\x00\xff", b""], pa.large_binary()),
        "d": pa.array([dt.date(2024, 2, 29), None]),
        "t": pa.array([1, 2], pa.timestamp("ns")),
        "z": pa.array([1, 2], pa.timestamp("us", "UTC")),
        "v": pa.array([[1, 2], [3, 4]], pa.list_(pa.int8(), 2)),
        "s": pa.array([{"k": [1]}, None], pa.struct([("k", pa.list_(pa.int16()))])),
        'odd "name"': pa.array(["x", None], pa.large_string()),
    }
    write_run(output, 1, {"image_id": ["a", "b"], **own}, tmp_path)
    table = fr.open_dataset(output).latest().to_arrow().sort_by("image_id")
    assert table.schema.equals(pa.schema([*DATA_SCHEMA, *((name, array.type) for name, array in own.items())]))
    for name, array in own.items():
        assert table[name].combine_chunks().equals(array), name


PARTITIONS: dict[str, pa.Array] = {
    "text that looks like a number": pa.array(["007", "7"]),
    "text that looks like a date": pa.array(["2024-01-02", "x"]),
    "text that looks like null": pa.array(["NULL", "null"]),
    "text to escape": pa.array(["a/b=c&d%2F +ü[*]?", "'quoted' \"twice\""]),
    "large text": pa.array(["1", "2"], pa.large_string()),
    "small": pa.array([-128, 127], pa.int8()),
    "large": pa.array([2**64 - 1, 0], pa.uint64()),
    "bool": pa.array([True, False]),
    "date": pa.array([dt.date(1, 1, 1), dt.date(9999, 12, 31)]),
}


@pytest.mark.parametrize("case", PARTITIONS)
def test_a_partition_comes_back_as_it_was_in_the_manifest(output: str, tmp_path: Path, case: str) -> None:
    values = PARTITIONS[case]
    write_run(output, 1, {"image_id": ["a", "b"], "p": values, "q": ["x", "y"]}, tmp_path, partition_by=["q", "p"])
    table = fr.open_dataset(output).latest().to_arrow().sort_by("image_id")
    assert table.schema.field("p").type == values.type
    assert table["p"].combine_chunks().equals(values)
    assert table["q"].to_pylist() == ["x", "y"]


def test_a_partition_that_no_manifest_column_is_comes_back_as_text(output: str, tmp_path: Path) -> None:
    run_id = write_run(output, 1, {"image_id": ["a"], "day": ["2024-01-02"]}, tmp_path, partition_by=["day"])
    attempt = Path(output) / "runs" / run_id / "manifest-abc" / "00000.parquet"
    pq.write_table(pq.read_table(attempt).drop_columns("day"), attempt)
    assert by_id(fr.open_dataset(output).latest(), "day") == {"a": "2024-01-02"}


def test_the_outputs_own_path_is_not_taken_for_partitions(tmp_path: Path) -> None:
    output = str(tmp_path / "uri=evil" / "p=[0]" / "it's")
    write_run(output, 1, {"image_id": ["a"], "p": [5]}, tmp_path, partition_by=["p"])
    write_run(output, 2, {"image_id": ["b"]}, tmp_path)
    assert by_id(fr.open_dataset(output).latest(), "uri", "p") == {
        "a": ("s3://corpus/a.jpg", 5),
        "b": ("s3://corpus/b.jpg", None),
    }


def test_a_column_that_partitions_one_run_and_stands_in_the_files_of_another_is_one(
    output: str, tmp_path: Path
) -> None:
    write_run(output, 1, {"image_id": ["a", "b"], "p": ["01", "02"], "x": [1, 2]}, tmp_path, partition_by=["p"])
    write_run(output, 2, {"image_id": ["b", "c"], "y": [1.5, 2.5], "p": ["03", None]}, tmp_path)
    write_run(output, 3, {"image_id": ["d"]}, tmp_path)
    newest = fr.open_dataset(output).latest()
    assert by_id(newest, "p", "x", "y") == {
        "a": ("01", 1, None), "b": ("03", None, 1.5), "c": (None, None, 2.5), "d": (None, None, None),
    }  # fmt: skip
    assert newest.schema.names == [*DATA_SCHEMA.names, "y", "p", "x"]


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        (pa.array([2**31 - 1], pa.int32()), pa.array([2**63 - 1], pa.int64()), pa.int64()),
        (pa.array([2**32 - 1], pa.uint32()), pa.array([-1], pa.int8()), pa.int64()),
        (pa.array([255], pa.uint8()), pa.array([2**64 - 1], pa.uint64()), pa.uint64()),
        (pa.array([0.1], pa.float32()), pa.array([0.1], pa.float64()), pa.float64()),
        (pa.array(["x"]), pa.array(["y"], pa.large_string()), pa.large_string()),
        (pa.array([b"x"], pa.large_binary()), pa.array([b"y"]), pa.large_binary()),
    ],
)
def test_a_column_of_two_types_becomes_the_one_that_holds_both(
    output: str, tmp_path: Path, one: pa.Array, other: pa.Array, both: pa.DataType
) -> None:
    write_run(output, 1, {"image_id": ["a"], "x": one}, tmp_path)
    write_run(output, 2, {"image_id": ["b"], "x": other}, tmp_path)
    newest = fr.open_dataset(output).latest()
    assert newest.to_arrow().schema.field("x").type == both
    assert by_id(newest, "x") == {"a": one[0].as_py(), "b": other[0].as_py()}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pa.array([1], pa.int64()), pa.array(["1"])),
        (pa.array([1], pa.int64()), pa.array([1.0])),
        (pa.array([1], pa.int64()), pa.array([1], pa.uint64())),
        (pa.array([1], pa.timestamp("us")), pa.array([1], pa.timestamp("ns"))),
        (pa.array([[1]], pa.list_(pa.int32())), pa.array([[1]], pa.list_(pa.int64()))),
    ],
)
def test_a_column_of_two_types_that_nothing_holds_is_an_error_until_it_is_left_out(
    output: str, tmp_path: Path, one: pa.Array, other: pa.Array
) -> None:
    first = write_run(output, 1, {"image_id": ["a"], "x": one, "y": [1]}, tmp_path)
    second = write_run(output, 2, {"image_id": ["b"], "x": other, "y": [2]}, tmp_path)
    dataset = fr.open_dataset(output)
    for method in (dataset.latest, dataset.rows, dataset.errors, dataset.boxes):
        with pytest.raises(OutputError) as caught:
            method()
        said = str(caught.value).replace("element:", "item:")  # Parquet's word
        assert f"column 'x' is {other.type} in run {second} but {one.type} in run {first}; wanted one type" in said
    assert by_id(dataset.latest(columns=["image_id", "y"]), "y") == {"a": 1, "b": 2}
    assert by_id(dataset.boxes(columns=["image_id", "y"]), "y") == {"a": 1, "b": 2}
    assert by_id(dataset.rows(first), "x") == {"a": one[0].as_py()}


def test_columns_that_differ_in_case_only_are_an_error_until_one_is_chosen(output: str, tmp_path: Path) -> None:
    write_run(output, 1, {"image_id": ["a"], "Caption": ["old"]}, tmp_path)
    write_run(output, 2, {"image_id": ["b"], "caption": ["new"]}, tmp_path)
    dataset = fr.open_dataset(output)
    with pytest.raises(OutputError, match="columns 'caption' and 'Caption' differ in case only"):
        dataset.latest()
    assert by_id(dataset.latest(columns=["image_id", "caption"]), "caption") == {"a": None, "b": "new"}


def test_chosen_columns_come_in_their_order_and_unknown_ones_are_named(output: str, tmp_path: Path) -> None:
    for number in (1, 2):
        write_run(output, number, {"image_id": ["a", f"b{number}"], "x": [1, 2]}, tmp_path)
    dataset = fr.open_dataset(output)
    assert dataset.latest(columns=["x", "uri"]).to_arrow().column_names == ["x", "uri"]
    assert dataset.latest(columns=["x", "uri"]).to_arrow().num_rows == 3
    with pytest.raises(OutputError, match=r"no column 'scroes' in the output; it has .*; did you mean 'scores'\?"):
        dataset.rows(columns=["scroes"])
    with pytest.raises(OutputError, match="no column 'boxes' in the output"):
        dataset.boxes(columns=["boxes"])


# ---- boxes


def test_boxes_are_one_row_each_with_the_images_own_columns(output: str, tmp_path: Path) -> None:
    run_id = write_run(
        output, 1, {"image_id": ["a", "b", "c"], "site": ["7", "8", "9"], "label": ["cat", "dog", "cow"]}, tmp_path,
        outcomes={"a": [1, 3], "b": [], "c": "not_found"}, partition_by=["site"],
    )  # fmt: skip
    boxes = fr.open_dataset(output).boxes()
    image = {"image_id": "a", "uri": "s3://corpus/a.jpg", "run_id": run_id, "width": 64, "height": 48}
    own = {"manifest_label": "cat", "site": "7"}
    assert sorted(boxes.to_arrow().to_pylist(), key=lambda row: row["x1"]) == [
        image
        | {"x1": 0.0, "y1": 1.0, "x2": 10.0, "y2": 21.0, "label": 1, "label_name": "person", "score": 0.875}
        | own,
        image | {"x1": 1.0, "y1": 1.0, "x2": 11.0, "y2": 21.0, "label": 3, "label_name": "car", "score": 0.75} | own,
    ]
    assert boxes.schema.field("x1").type == boxes.schema.field("score").type == pa.float32()


def test_own_columns_named_like_a_boxs_keep_out_of_each_others_way(output: str, tmp_path: Path) -> None:
    own = {"Score": [1], "x1": ["one"], "manifest_x1": ["two"]}
    write_run(output, 1, {"image_id": ["a"], **own}, tmp_path)
    [box] = fr.open_dataset(output).boxes().to_arrow().to_pylist()
    assert (box["score"], box["manifest_Score"]) == (0.875, 1)
    assert (box["x1"], box["manifest_x1"], box["manifest_manifest_x1"]) == (0.0, "two", "one")


# ---- runs and labelling


def test_runs_are_told_from_their_records(output: str, tmp_path: Path) -> None:
    write_run(output, 1, {"image_id": ["a", "b", "c"], "p": [1, 1, 2]}, tmp_path, partition_by=["p"])
    write_run(output, 2, {"image_id": ["a", "b", "c"]}, tmp_path, finished=False, shards=1)
    dataset = fr.open_dataset(output)
    first, second = dataset.runs().to_arrow().to_pylist()
    assert first == {
        "run_id": "000001-00000001", "state": "finished", "rows": 3, "shards": 2, "committed_shards": 2, "ok": 3,
        "error": 0, "deleted": 0, "detections": 3, "duplicates_dropped": 0, "uris_refused": 0,
        "created_at": dt.datetime(2026, 1, 1, tzinfo=dt.UTC), "finished_at": dt.datetime(2026, 1, 1, 1, tzinfo=dt.UTC),
        "partition_by": ["p"], "sources": [str(tmp_path / "manifest-1.parquet")], "request_digest": "00000001" + "0" * 56,
    }  # fmt: skip
    assert {
        "state": "open",
        "rows": 3,
        "committed_shards": 1,
        "ok": None,
        "finished_at": None,
    }.items() <= second.items()
    assert dataset.labelling == LABELLING
    assert dataset.categories == ("__background__", "person", "bicycle", "car")


@pytest.mark.parametrize("name", ["num_rows", "created_at", "sources"])
def test_a_record_that_lacks_something_is_named(output: str, tmp_path: Path, name: str) -> None:
    run_id = write_run(output, 1, {"image_id": ["a"]}, tmp_path)
    path = Path(output) / "runs" / run_id / "run.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != name}))
    with pytest.raises(OutputError, match=f"records in {output}/runs/{run_id} are damaged: .*{name}"):
        fr.open_dataset(output).runs()


# ---- formats


def test_a_users_own_connection_is_used_and_rows_join_with_its_tables(output: str, tmp_path: Path) -> None:
    write_run(output, 1, {"image_id": ["a", "b"]}, tmp_path)
    connection = duckdb.connect()
    connection.execute("CREATE TABLE truth AS SELECT 'b' AS image_id, 'dog' AS said")
    newest = fr.open_dataset(output).latest().to_duckdb(connection)
    joined = newest.set_alias("n").join(connection.table("truth").set_alias("t"), "n.image_id = t.image_id")
    assert joined.select("said, uri").fetchall() == [("dog", "s3://corpus/b.jpg")]


def test_a_filter_on_a_partition_opens_its_files_only(output: str, tmp_path: Path) -> None:
    ids = [f"{n}" for n in range(20)]
    write_run(output, 1, {"image_id": ids, "p": [int(i) for i in ids]}, tmp_path, partition_by=["p"])
    relation = fr.open_dataset(output).rows().to_duckdb().filter("p = 7")
    assert [row[0] for row in relation.select("image_id").fetchall()] == ["7"]
    for file in storage.list_files(f"{output}/detections"):
        if "/p=7/" not in file.uri and not file.uri.endswith("00000000.parquet"):  # the first one's footer is read
            Path(file.uri).write_bytes(b"")
    assert [row[0] for row in relation.select("image_id").fetchall()] == ["7"]


def test_integers_with_nulls_stay_integers_in_pandas(output: str, tmp_path: Path) -> None:
    big = pa.array([2**63 - 1, None], pa.int64())
    write_run(output, 1, {"image_id": ["a", "b"], "big": big}, tmp_path, outcomes={"b": "not_found"})
    frame = fr.open_dataset(output).latest().to_pandas().set_index("image_id")
    assert frame.loc["a", "big"] == 2**63 - 1
    assert frame["big"].dtype == pd.Int64Dtype()
    assert frame.loc["b", "width"] is pd.NA
    assert frame.loc["a", "label_names"].tolist() == ["person"]


def test_batches_come_in_the_asked_size_with_the_schema(output: str, tmp_path: Path) -> None:
    write_run(output, 1, {"image_id": [f"{n}" for n in range(5000)]}, tmp_path, shard_rows=5000)
    newest = fr.open_dataset(output).latest()
    batches = list(newest.to_batches(max_rows=2048))
    assert sum(batch.num_rows for batch in batches) == 5000
    assert max(batch.num_rows for batch in batches) <= 2048
    assert all(batch.schema.equals(newest.schema) for batch in batches)


# ---- what the job itself wrote


def test_what_a_job_wrote_opens_in_every_format(two_runs: TwoRuns, ray_session: Any) -> None:
    dataset = fr.open_dataset(two_runs.output)
    table = dataset.latest().to_arrow()
    wanted = rows_of(two_runs.output)  # the newest of each id
    manifest = pq.read_table(two_runs.manifest)
    captured = {row["image_id"]: row["captured_at"] for row in manifest.to_pylist()}
    assert sorted(table["image_id"].to_pylist()) == sorted(wanted) == sorted(captured)
    assert table.schema.field("captured_at").type == manifest.schema.field("captured_at").type
    for row in table.to_pylist():
        assert row == wanted[row["image_id"]] | {"captured_at": captured[row["image_id"]]}
    first, second = two_runs.summaries
    assert Counter(table["run_id"].to_pylist()) == {first.run_id: len(wanted) - second.rows, second.run_id: second.rows}
    assert dataset.errors().to_arrow().num_rows == first.error
    runs = dataset.runs().to_arrow()
    for name in ("run_id", "rows", "shards", "ok", "error", "detections"):
        assert runs[name].to_pylist() == [getattr(first, name), getattr(second, name)]
    in_ray = dataset.latest().to_ray()
    assert pa.concat_tables(ray_session.get(in_ray.to_arrow_refs())).sort_by("image_id") == table.sort_by("image_id")
    assert set(dataset.latest().to_pandas()["image_id"]) == set(wanted)
    num_boxes = sum(len(row["boxes"] or []) for row in wanted.values())
    assert dataset.boxes().to_duckdb().count("*").fetchall() == [(num_boxes,)]
    assert dataset.categories[1] == "person"


def test_no_rows_are_a_ray_dataset_too(output: str, tmp_path: Path, ray_session: Any) -> None:
    write_run(output, 1, {"image_id": ["a"]}, tmp_path)
    assert fr.open_dataset(output).errors().to_ray().count() == 0


def test_an_output_in_a_bucket_opens_like_one_on_a_disk(s3_bucket: str, tmp_path: Path) -> None:
    for output in (str(tmp_path / "out"), f"{s3_bucket}/a=1/out [1]"):
        write_run(output, 1, {"image_id": ["a", "b"], "p": ["00/1", "%"]}, tmp_path, partition_by=["p"])
        write_run(output, 2, {"image_id": ["b", "c"], "p": ["2", "3"]}, tmp_path, outcomes={"c": "not_found"})
    local, stored = fr.open_dataset(str(tmp_path / "out")), fr.open_dataset(f"{s3_bucket}/a=1/out [1]/")
    for method in ("latest", "rows", "errors", "boxes"):
        in_store = getattr(stored, method)().to_arrow()
        assert in_store.sort_by("run_id").sort_by("image_id") == getattr(local, method)().to_arrow().sort_by(
            "run_id"
        ).sort_by("image_id")
    connection = duckdb.connect()
    for _ in range(2):  # the same connection may be used again, and by another output
        for dataset in (stored, local, fr.open_dataset(stored.output)):
            assert dataset.latest().to_duckdb(connection).count("*").fetchall() == [(3,)]


def test_a_bucket_that_is_not_there_is_named(s3_bucket: str) -> None:
    with pytest.raises(OutputError, match=r"missing-bucket.*check the uri"):
        fr.open_dataset("s3://missing-bucket-0/out")


def test_a_store_that_goes_away_while_rows_are_read_is_a_storage_error(
    s3_bucket: str, s3_faults: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcos_ray.storage.retries.backoff_seconds", lambda _: 0.0)
    write_run(f"{s3_bucket}/out", 1, {"image_id": ["a", "b", "c"]}, tmp_path)
    proxy = s3_faults(lambda _: "pass")
    rows = fr.open_dataset(f"{s3_bucket}/out").latest()
    proxy.down = True
    with pytest.raises(StorageError, match=rf"^reading {s3_bucket}/out/detections/.*: failed 12 times"):
        rows.to_arrow()
    proxy.down = False
    assert sorted(rows.to_arrow()["image_id"].to_pylist()) == ["a", "b", "c"]
