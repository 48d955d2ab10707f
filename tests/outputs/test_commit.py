"""A shard file appears once, whole, and says what it is; the audit finds every way in which an output can be wrong."""

from __future__ import annotations

import json
import threading
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from fcos_ray import storage
from fcos_ray.errors import OutputError
from fcos_ray.inputs.fetch import FetchPolicy
from fcos_ray.inputs.manifests import find_sources
from fcos_ray.inputs.pin import pin
from fcos_ray.inputs.pinned_files import read_shard
from fcos_ray.inputs.plan import PlanSettings, draft_plan
from fcos_ray.outputs.audit import audit
from fcos_ray.outputs.commit import (
    METADATA_KEY,
    ShardCounts,
    ShardTarget,
    build_shard,
    commit_shard,
    count_results,
    data_folder,
    list_committed,
)
from fcos_ray.outputs.schema import DATA_SCHEMA, RESULT_SCHEMA, SCHEMA_VERSION

RUN = "000001-0123abcd"
LABELLING = {
    "architecture": "fcos_resnet50_fpn",
    "weights": "COCO_V1",
    "weights_sha256": "f" * 64,
    "categories": ["__background__", "person", "bicycle"],
    "settings": {"score_threshold": 0.2},
}
THEN = datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place for an output, on a disk and in a store."""
    return f"{request.getfixturevalue('s3_bucket')}/out" if request.param == "s3" else str(tmp_path / "out")


def target(output: str, *partition_by: str, run_id: str = RUN) -> ShardTarget:
    return ShardTarget(output, run_id, partition_by, LABELLING)


def pinned(count: int = 3, partition: str = "", **columns: Any) -> pa.Table:
    return pa.table(
        {
            "image_id": [f"id{i}" for i in range(count)],
            "uri": [f"s3://bucket/{i}.jpg" for i in range(count)],
            "__refused": pa.nulls(count, pa.string()),
            "__partition": [partition] * count,
            "__deleted": [False] * count,
            **columns,
        }
    )


def found(row: int, labels: list[int], shard: int = 0, **more: Any) -> dict[str, Any]:
    count = len(labels)
    return {
        "shard": shard, "row": row, "width": 64, "height": 48, "orientation": 1, "content_bytes": 100 + row,
        "content_etag": f"etag{row}", "content_last_modified": THEN, "content_sha256": "a" * 64,
        "boxes": [[0.0, 0.0, 1.5, 2.5]] * count, "labels": labels, "scores": [0.5] * count, "attempts": 1 + row,
        "fetch_seconds": 0.5, "decode_seconds": 0.25, "detect_seconds": 1.0,
    } | more  # fmt: skip


def failed(row: int, code: str = "not_found", shard: int = 0, **more: Any) -> dict[str, Any]:
    return {"shard": shard, "row": row, "error_stage": "fetch", "error_code": code, "error_message": "no"} | more


def results(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), RESULT_SCHEMA)


def three(shard: int = 0) -> pa.Table:
    """Two boxes, none, and an error; out of order."""
    return results(found(1, [], shard), failed(2, "fetch_failed", shard, attempts=10), found(0, [1, 2], shard))


def built(pinned_rows: pa.Table, result_rows: pa.Table, *partition_by: str) -> pa.Table:
    return pq.read_table(
        pa.BufferReader(build_shard(target("/o", *partition_by), 0, pinned=pinned_rows, results=result_rows))
    )


# ---- what a file holds


def test_a_shard_file_has_the_documented_columns_then_the_manifests_own() -> None:
    mine = {"caption": pa.array(["", None, "é"]), "n": pa.array([1, None, 2**64 - 1], pa.uint64())}
    table = built(pinned(**mine), three())
    assert table.schema.remove_metadata().equals(
        pa.schema([*DATA_SCHEMA, ("caption", pa.string()), ("n", pa.uint64())])
    )
    assert table["caption"].to_pylist() == ["", None, "é"]
    assert table["n"].to_pylist() == [1, None, 2**64 - 1]


def test_rows_stand_in_the_pinned_order_with_their_own_results() -> None:
    table = built(pinned(), three())
    assert table["row"].to_pylist() == [0, 1, 2]
    assert table["image_id"].to_pylist() == ["id0", "id1", "id2"]
    assert table["uri"].to_pylist() == [f"s3://bucket/{i}.jpg" for i in range(3)]
    assert table["content_bytes"].to_pylist() == [100, 101, None]
    assert set(table["run_id"].to_pylist()) == {RUN}
    assert set(table["shard"].to_pylist()) == {0}


def test_an_error_row_has_its_reason_and_nothing_else_and_an_ok_row_no_reason() -> None:
    two, none, error = built(pinned(), three()).to_pylist()
    assert [r["status"] for r in (two, none, error)] == ["ok", "ok", "error"]
    assert (error["error_stage"], error["error_code"], error["error_message"]) == ("fetch", "fetch_failed", "no")
    assert error["error_transient"] is True
    for name in ("boxes", "labels", "label_names", "scores", "width", "height", "orientation"):
        assert error[name] is None
    for row in (two, none):
        assert {row[f"error_{name}"] for name in ("stage", "code", "message", "transient")} == {None}
    assert [none[name] for name in ("boxes", "labels", "label_names", "scores")] == [[], [], [], []]


def test_labels_have_the_names_of_the_models_categories() -> None:
    table = built(pinned(), results(found(0, [2, 1, 2]), failed(1), found(2, [1])))
    assert table["label_names"].to_pylist() == [["bicycle", "person", "bicycle"], None, ["person"]]


def test_a_permanent_error_is_not_transient() -> None:
    assert built(pinned(1), results(failed(0, "corrupt")))["error_transient"].to_pylist() == [False]


def test_content_is_what_the_store_said_else_what_the_manifest_knew() -> None:
    known = pinned(
        content_bytes=pa.array([1, 2, 3]), content_etag=pa.array(["m0", "m1", None]),
        content_last_modified=pa.array([THEN - timedelta(days=1)] * 3, pa.timestamp("us", "UTC")),
    )  # fmt: skip
    table = built(known, results(found(0, []), found(1, [], content_etag=None), failed(2)))
    assert table["content_bytes"].to_pylist() == [100, 101, 3]
    assert table["content_etag"].to_pylist() == ["etag0", "m1", None]
    assert table["content_last_modified"].to_pylist() == [THEN, THEN, THEN - timedelta(days=1)]
    assert table.column_names == DATA_SCHEMA.names


def test_partition_columns_stand_in_the_path_only(output: str) -> None:
    rows = pinned(1, "p=a%2Fb/q=1", p=["a/b"], q=[1], r=[2])
    assert commit_shard(target(output, "p", "q"), 7, pinned=rows, results=results(found(0, [], 7)))
    [file] = storage.list_files(output)
    assert file.uri == f"{output}/detections/run={RUN}/p=a%2Fb/q=1/00000007.parquet"
    with storage.open_for_reading(file.uri) as handle:
        assert pq.read_schema(handle).names == [*DATA_SCHEMA.names, "r"]


def test_a_file_explains_itself() -> None:
    before = datetime.now(UTC)
    data = build_shard(target("/o"), 4, pinned=pinned(), results=three(4))
    about = json.loads(pq.read_schema(pa.BufferReader(data)).metadata[METADATA_KEY])
    for name, value in LABELLING.items():
        assert about[name] == value
    assert (about["schema_version"], about["run_id"], about["shard"]) == (SCHEMA_VERSION, RUN, 4)
    assert before <= datetime.fromisoformat(about["committed_at"]) <= datetime.now(UTC)
    counts = ShardCounts(**about["counts"])
    assert (counts.rows, counts.ok, counts.error, counts.detections) == (3, 2, 1, 2)
    assert counts.errors_by_code == {"fetch_failed": 1}
    assert counts.retries == 0 + 1 + 9
    assert counts.seconds == {"fetch": 1.0, "decode": 0.5, "detect": 2.0}
    again = build_shard(target("/o"), 4, pinned=pinned(), results=three(4))
    assert json.loads(pq.read_schema(pa.BufferReader(again)).metadata[METADATA_KEY])["attempt"] != about["attempt"]


def test_counts_add_up() -> None:
    total = sum([count_results(three()), count_results(results(failed(0, "corrupt")))], ShardCounts())
    assert (total.rows, total.ok, total.error, total.detections) == (4, 2, 2, 2)
    assert total.errors_by_code == {"fetch_failed": 1, "corrupt": 1}
    assert total.retries == 10  # a uri that was refused was never tried, nor retried
    assert total.seconds == {"fetch": 1.0, "decode": 0.5, "detect": 2.0}


def test_a_shard_that_is_not_whole_is_never_built() -> None:
    for rows in (
        [found(0, []), found(1, [])],
        [found(0, []), found(1, []), found(1, [])],
        [found(i, []) for i in range(4)],
    ):
        with pytest.raises(AssertionError, match="not whole"):
            build_shard(target("/o"), 0, pinned=pinned(), results=results(*rows))


# ---- once


def test_whoever_commits_second_discards_and_the_file_stays(output: str) -> None:
    assert commit_shard(target(output), 0, pinned=pinned(), results=three())
    first = storage.read_bytes(target(output).data_uri("", 0))
    assert not commit_shard(target(output), 0, pinned=pinned(), results=three())
    assert storage.read_bytes(target(output).data_uri("", 0)) == first
    assert len(list(storage.list_files(data_folder(output, RUN)))) == 1


def test_of_racing_committers_exactly_one_wins(output: str) -> None:
    won: list[str] = []
    start = threading.Barrier(6)

    def commit(name: str) -> None:
        mine = results(*[found(row, [], content_etag=name) for row in range(3)])
        start.wait()
        if commit_shard(target(output), 0, pinned=pinned(), results=mine):
            won.append(name)

    threads = [threading.Thread(target=commit, args=(f"writer{i}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [winner] = won
    with storage.open_for_reading(target(output).data_uri("", 0)) as handle:
        assert set(pq.read_table(handle)["content_etag"].to_pylist()) == {winner}


def test_nothing_but_shard_files_lies_under_detections(tmp_path: Path) -> None:
    commit_shard(target(str(tmp_path)), 0, pinned=pinned(), results=three())
    assert [p.name for p in (tmp_path / "detections").rglob("*") if p.is_file()] == ["00000000.parquet"]
    assert [p for p in (tmp_path / "runs").rglob("*") if p.is_file()] == []


# ---- audit


@pytest.fixture
def committed(tmp_path: Path) -> ShardTarget:
    """An output of three shards of three rows."""
    wanted = target(str(tmp_path))
    for shard in range(3):
        assert commit_shard(wanted, shard, pinned=pinned(), results=three(shard))
    return wanted


def put(wanted: ShardTarget, shard: int, data: bytes, partition: str = "") -> Path:
    path = Path(wanted.data_uri(partition, shard))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def bytes_of(rows: list[int], **about: Any) -> bytes:
    """A file with these row numbers, that says what a shard file says."""
    said = LABELLING | {"run_id": RUN, "shard": 1, "counts": {}} | about
    table = pa.table({"row": pa.array(rows, pa.int32())}).replace_schema_metadata({METADATA_KEY: json.dumps(said)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def test_an_output_that_holds_the_plan_passes_and_is_counted(committed: ShardTarget) -> None:
    counts = audit(committed, [3, 3, 3])
    assert (counts.rows, counts.ok, counts.error, counts.detections) == (9, 6, 3, 6)
    assert counts.errors_by_code == {"fetch_failed": 3}
    assert list_committed(committed.output, RUN) == {k: committed.data_uri("", k) for k in range(3)}


def test_an_output_in_a_store_is_audited_alike(output: str) -> None:
    for shard in range(2):
        commit_shard(target(output, "p"), shard, pinned=pinned(1, "p=%C3%A9"), results=results(found(0, [1], shard)))
    assert audit(target(output, "p"), [1, 1]).rows == 2
    with pytest.raises(OutputError, match="1 of 3 shards are missing, such as 2"):
        audit(target(output, "p"), [1, 1, 1])


def test_a_run_that_committed_nothing_lists_nothing(output: str) -> None:
    assert list_committed(output, RUN) == {}


def test_the_audit_finds_a_missing_shard(committed: ShardTarget) -> None:
    Path(committed.data_uri("", 1)).unlink()
    with pytest.raises(OutputError, match=f"run {RUN}: 1 of 3 shards are missing, such as 1"):
        audit(committed, [3, 3, 3])


def test_the_audit_finds_a_shard_that_is_not_in_the_plan(committed: ShardTarget) -> None:
    with pytest.raises(OutputError, match=r"00000002.parquet: the plan has 2 shards"):
        audit(committed, [3, 3])


@pytest.mark.parametrize("rows", [[0, 1], [0, 1, 2, 3], [0, 1, 1], [0, 0, 1, 2], [0, 2, 1], [], [1, 2, 3]])
def test_the_audit_finds_rows_that_are_missing_doubled_or_foreign(committed: ShardTarget, rows: list[int]) -> None:
    path = put(committed, 1, bytes_of(rows))
    with pytest.raises(OutputError, match=f"{path}: wanted rows 0 to 2 once each, got {len(rows)} rows"):
        audit(committed, [3, 3, 3])


@pytest.mark.parametrize("about", [{"run_id": "000009-ffffffff"}, {"shard": 2}, {"shard": None, "run_id": None}])
def test_the_audit_finds_a_file_of_another_run_or_shard(committed: ShardTarget, about: dict[str, Any]) -> None:
    path = put(committed, 1, bytes_of([0, 1, 2], **about))
    with pytest.raises(OutputError, match=f"{path}: wanted shard 1 of run {RUN}, got "):
        audit(committed, [3, 3, 3])


@pytest.mark.parametrize("data", [b"", b"PAR1", b"not Parquet at all, but long enough", None])
def test_the_audit_finds_a_file_that_is_no_whole_parquet(committed: ShardTarget, data: bytes | None) -> None:
    path = Path(committed.data_uri("", 1))
    path.write_bytes(path.read_bytes()[:-100] if data is None else data)
    with pytest.raises(OutputError, match=f"{path} cannot be read: "):
        audit(committed, [3, 3, 3])


@pytest.mark.parametrize("counts", [{"rows": 3, "surprise": 1}, None, {}])
def test_the_audit_finds_a_file_whose_counts_are_not_its_own(committed: ShardTarget, counts: Any) -> None:
    path = put(committed, 1, bytes_of([0, 1, 2], counts=counts))
    with pytest.raises(OutputError, match=str(path)):
        audit(committed, [3, 3, 3])


def test_the_audit_finds_a_file_without_the_row_column(committed: ShardTarget) -> None:
    path = Path(committed.data_uri("", 1))
    pq.write_table(pq.read_table(path).drop("row"), path)
    with pytest.raises(OutputError, match=str(path)):
        audit(committed, [3, 3, 3])


@pytest.mark.parametrize(
    "name", ["notes.txt", "00000001.parquet.tmp", "1.parquet", "part-0.parquet", "p=x/00000001.parquet"]
)
def test_a_stranger_among_the_shards_is_refused_by_name(committed: ShardTarget, name: str) -> None:
    stranger = Path(data_folder(committed.output, RUN)) / name
    stranger.parent.mkdir(exist_ok=True)
    stranger.write_bytes(b"x")
    with pytest.raises(OutputError, match=r"was not written by this run; move it away, then run again"):
        list_committed(committed.output, RUN)


# ---- reading it back


ODD = [
    "a/b",
    "..",
    "%",
    "%2F",
    "a=b",
    "\0",
    " ",
    "é 日本",
    "NULL",
    "007",
    "true",
    "a\nb",
    "'",
    '"',
    "+",
    "2024-01-01",
    "1e5",
]


@pytest.fixture
def partitioned(tmp_path: Path) -> tuple[str, dict[str, tuple[str, date]]]:
    """A real plan over odd partition values, committed; and what each image_id's partition is."""
    days = [date(2024, 1, 1 + i % 2) for i in range(len(ODD))]
    ids = [f"id{i}" for i in range(len(ODD))]
    pq.write_table(pa.table({"uri": ids, "image_id": ids, "kind": ODD, "day": days}), tmp_path / "m.parquet")
    output = str(tmp_path / "out")
    settings = PlanSettings(partition_by=("kind", "day"), fetch=FetchPolicy(allow_roots=(str(tmp_path),)))
    with draft_plan(find_sources([str(tmp_path / "m.parquet")]), settings) as draft:
        files = pin(draft, str(tmp_path / "pinned"))
        sizes = []
        for shard in range(draft.num_shards):
            rows = read_shard(str(tmp_path / "pinned"), files, shard)
            sizes.append(rows.num_rows)
            labels = results(*[found(row, [1], shard) for row in range(rows.num_rows)])
            assert commit_shard(target(output, "kind", "day"), shard, pinned=rows, results=labels)
    assert audit(target(output, "kind", "day"), sizes).rows == len(ODD)
    return f"{output}/detections", dict(zip(ids, zip(ODD, days, strict=True), strict=True))


def test_duckdb_reads_partitions_back_equal(partitioned: tuple[str, dict[str, tuple[str, date]]]) -> None:
    folder, wanted = partitioned
    rows = duckdb.sql(
        f"SELECT image_id, kind, day, run FROM read_parquet('{folder}/**/*.parquet', hive_partitioning=true, "
        "hive_types={'kind': VARCHAR, 'day': DATE})"
    ).fetchall()
    assert {image_id: (kind, day) for image_id, kind, day, _ in rows} == wanted
    assert {run for *_, run in rows} == {RUN}
    [[count]] = duckdb.sql(f"SELECT count(*) FROM '{folder}/**/*.parquet' WHERE kind = 'é 日本'").fetchall()
    assert count == 1


def test_pyarrow_reads_partitions_back_equal(partitioned: tuple[str, dict[str, tuple[str, date]]]) -> None:
    folder, wanted = partitioned
    fields = pa.schema([("run", pa.string()), ("kind", pa.string()), ("day", pa.date32())])
    dataset = pads.dataset(folder, partitioning=pads.partitioning(fields, flavor="hive"))
    rows = dataset.to_table(columns=["image_id", "kind", "day", "labels"]).to_pylist()
    assert {r["image_id"]: (r["kind"], r["day"]) for r in rows} == wanted
    one = dataset.to_table(filter=pads.field("kind") == "a/b")
    assert [r["image_id"] for r in one.to_pylist()] == ["id0"]


def test_pandas_reads_partitions_back_equal(partitioned: tuple[str, dict[str, tuple[str, date]]]) -> None:
    folder, wanted = partitioned
    frame = pd.read_parquet(folder)
    got = {
        image_id: (kind, str(day)) for image_id, kind, day in zip(frame.image_id, frame.kind, frame.day, strict=True)
    }
    assert got == {image_id: (kind, str(day)) for image_id, (kind, day) in wanted.items()}
    assert frame.labels.map(list).tolist() == [[1]] * len(wanted)


def test_a_derived_partition_stands_in_the_path_and_its_column_in_the_file(tmp_path: Path) -> None:
    days = [date(2024, 1, 31), date(2024, 2, 1)]
    pq.write_table(pa.table({"uri": ["a", "b"], "image_id": ["a", "b"], "day": days}), tmp_path / "m.parquet")
    settings = PlanSettings(partition_by=("month:day",), fetch=FetchPolicy(allow_roots=(str(tmp_path),)))
    to = target(str(tmp_path / "out"), "month")
    with draft_plan(find_sources([str(tmp_path / "m.parquet")]), settings) as draft:
        assert [key.name for key in draft.keys] == ["month"]
        files = pin(draft, str(tmp_path / "pinned"))
        for shard in range(draft.num_shards):
            rows = read_shard(str(tmp_path / "pinned"), files, shard)
            assert commit_shard(to, shard, pinned=rows, results=results(found(0, [1], shard)))
    glob = f"{tmp_path}/out/detections/**/*.parquet"
    read = duckdb.sql(f"SELECT image_id, month, day FROM read_parquet('{glob}') ORDER BY ALL").fetchall()
    assert read == [("a", "2024-01", days[0]), ("b", "2024-02", days[1])]
