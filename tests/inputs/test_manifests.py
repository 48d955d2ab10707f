"""Every value of a manifest comes out equal, in value and type, or its column is refused by name."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from fcos_ray import storage
from fcos_ray.errors import ManifestError, StorageError
from fcos_ray.inputs.manifests import find_sources
from tests.inputs.planning import json_array, jsonl, parquet, plan, put, text
from tests.s3_faults import Request, Trouble, spread

Write = Callable[..., Path]
URIS = ["a.jpg", "b.jpg", "c.jpg"]
HOW_TO_WRITE = {
    ".csv": "uri,x\na.jpg,1\nb.jpg,2\n",
    ".tsv": "uri\tx\na.jpg\t1\nb.jpg\t2\n",
    ".jsonl": '{"uri": "a.jpg", "x": "1"}\n{"uri": "b.jpg", "x": "2"}\n',
    ".ndjson": '{"uri": "a.jpg", "x": "1"}\n{"uri": "b.jpg", "x": "2"}\n',
    ".json": ' [\n{"uri": "a.jpg", "x": "1"},\n {"uri": "b.jpg",\n "x": "2"}] ',
    ".txt": "a.jpg\nb.jpg\n",
    ".lst": "a.jpg\r\nb.jpg",
}


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


# ---- formats and files


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("suffix", HOW_TO_WRITE)
def test_every_format_is_read_plain_and_compressed(tmp_path: Path, suffix: str, compression: str) -> None:
    data = HOW_TO_WRITE[suffix].encode()
    data = {"": data, ".gz": gzip.compress(data), ".zst": zstd(data)}[compression]
    planned = plan(text(tmp_path / f"M{suffix.upper()}{compression}", data), pinned=tmp_path / "pinned")
    assert planned.column("uri") == [f"{tmp_path}/a.jpg", f"{tmp_path}/b.jpg"]
    if suffix not in (".txt", ".lst"):
        assert planned.columns == {"x": pa.string()}
        assert planned.column("x") == ["1", "2"]


def test_rows_of_several_files_and_formats_keep_their_order(tmp_path: Path) -> None:
    first = parquet(tmp_path / "m/1.parquet", {"uri": ["p1", "p0"]})
    second = text(tmp_path / "m/2.csv", "uri,x\nc1,7\nc0,8\n")
    third = text(tmp_path / "m/3.csv", "x,uri\n9,d0\n")
    fourth = jsonl(tmp_path / "m/4.jsonl", {"uri": "j"})
    planned = plan(fourth, second, first, third, pinned=tmp_path / "pinned")
    assert [Path(uri).name for uri in planned.column("uri")] == ["j", "c1", "c0", "p1", "p0", "d0"]
    assert planned.column("x") == [None, "7", "8", None, None, "9"]


def test_globs_and_files_named_twice_are_read_once(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.txt", "c/x/3.txt", "c/no.md"):
        text(tmp_path / name, f"{name}\n")
    found = find_sources([f"{tmp_path}/b/*.txt", f"{tmp_path}/**/*.txt", f"{tmp_path}/b/2.txt"])
    assert [Path(s.uri).name for s in found] == ["1.txt", "2.txt", "3.txt"]


def test_a_name_that_looks_like_a_pattern_is_that_file_only(tmp_path: Path) -> None:
    odd = ["p[1].csv", "q*.csv", "r?.csv", "it's.csv", "s%20t.csv", "é x.csv", "t\\1.csv"]
    for name in [*odd, "p1.csv", "qa.csv", "rb.csv", "s t.csv"]:
        text(tmp_path / name, f"uri\n{name}\n")
    for number, name in enumerate(odd):
        planned = plan(tmp_path / name, pinned=tmp_path / f"pinned{number}")
        assert planned.column("uri") == [f"{tmp_path}/{name}"]


def test_manifests_in_s3_are_read_in_every_format(s3_bucket: str, tmp_path: Path) -> None:
    put(f"{s3_bucket}/m/1 [x].parquet", pa.table({"uri": ["k1.jpg", "deep/k2.jpg"], "n": [1, 2]}))
    storage.create(f"{s3_bucket}/m/2.csv", b"uri,t\nk3.jpg,007\n")
    storage.create(f"{s3_bucket}/m/3.jsonl.gz", gzip.compress(b'{"uri": "s3://other/k4.jpg"}\n'))
    storage.create(f"{s3_bucket}/m/4.txt", b"k5.jpg\n")
    planned = plan(f"{s3_bucket}/m/*", pinned=f"{s3_bucket}/pinned")
    folder = f"{s3_bucket}/m"
    wanted = [f"{folder}/k1.jpg", f"{folder}/deep/k2.jpg", f"{folder}/k3.jpg", "s3://other/k4.jpg", f"{folder}/k5.jpg"]
    assert planned.column("uri") == wanted
    assert planned.column("n") == [1, 2, None, None, None]
    assert planned.column("t") == [None, None, "007", None, None]


def test_manifests_are_read_through_a_store_that_fails_three_times_in_ten(s3_bucket: str, s3_faults) -> None:
    for suffix, content in HOW_TO_WRITE.items():
        storage.create(f"{s3_bucket}/m/x{suffix}", content.replace("a.jpg", f"a{suffix}").encode())
    put(f"{s3_bucket}/m/x.parquet", pa.table({"uri": ["p.jpg"]}))
    wanted = plan(f"{s3_bucket}/m/*", pinned=f"{s3_bucket}/undisturbed", drop_duplicates=True).column("uri")
    injected = 0
    for seed in range(4):
        proxy = s3_faults(Trouble(spread(0.3, stalls=0), seed=seed))
        found = plan(f"{s3_bucket}/m/*", pinned=f"{s3_bucket}/{seed}", drop_duplicates=True).column("uri")
        assert found == wanted
        injected += proxy.injected.total()
    assert injected > 10


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".txt", ".parquet"])
def test_a_store_that_goes_away_while_duckdb_reads_is_not_the_manifests_fault(
    s3_bucket: str, s3_faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    uri = f"{s3_bucket}/x{suffix}"
    if suffix == ".parquet":
        put(uri, pa.table({"uri": ["p.jpg"]}))
    else:
        storage.create(uri, HOW_TO_WRITE[suffix].encode())
    monkeypatch.setattr("fcos_ray.storage.retries.backoff_seconds", lambda _: 0.0)
    seen: list[str] = []

    def treat(request: Request) -> str:  # what is read before DuckDB reads: a header, or the schema
        seen.append(request.verb)
        return (
            "503" if request.verb == "GET" and seen.count("GET") > {".csv": 1, ".parquet": 1}.get(suffix, 0) else "pass"
        )

    s3_faults(treat)
    with pytest.raises(StorageError, match=rf"reading {uri}: failed 12 times, last: .*slow down"):
        plan(uri, pinned=tmp_path / "pinned")


def test_what_is_missing_in_s3_is_named(s3_bucket: str) -> None:
    for pattern in (f"{s3_bucket}/none.csv", f"{s3_bucket}/none/*.csv", "s3://no-such-bucket-here/*.csv"):
        with pytest.raises(ManifestError, match=pattern.split("*")[0]):
            find_sources([pattern])


def test_a_damaged_manifest_in_s3_is_named(s3_bucket: str, tmp_path: Path) -> None:
    storage.create(f"{s3_bucket}/m.csv", b"uri,x\na,1\nb,2,3\n")
    with pytest.raises(ManifestError, match=rf"{s3_bucket}/m\.csv cannot be read: .*Line: 3"):
        plan(f"{s3_bucket}/m.csv", pinned=tmp_path / "pinned")


# ---- Parquet types


def limits(type_: pa.DataType) -> list[int | None]:
    info = np.iinfo(type_.to_pandas_dtype())
    return [int(info.min), int(info.max), None]


INTEGERS = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]
STAMPS = [
    pa.timestamp(unit, tz)
    for unit in ("s", "ms", "us", "ns")
    for tz in (None, "UTC", "Europe/Berlin", "+02:00")
    if unit != "ns" or tz is None
]
NOT_NULL = pa.field("item", pa.int32(), nullable=False)
EXACT: dict[str, pa.Array] = {
    "bool": pa.array([True, False, None]),
    **{str(type_): pa.array(limits(type_), type_) for type_ in INTEGERS},
    **{str(type_): pa.array([1, None, -12_345_678_901], type_) for type_ in STAMPS},
    "float": pa.array([float("nan"), float("inf"), -0.0], pa.float32()),
    "double": pa.array([float("nan"), -float("inf"), 0.1]),
    "double null": pa.array([5e-324, 1.7976931348623157e308, None]),
    "string": pa.array(["", None, "ä\0\n😀"]),
    "large_string": pa.array(["", None, "ä\0\n😀"], pa.large_string()),
    "binary": pa.array([b"", None, b"\0\xff"]),
    "large_binary": pa.array([b"", None, b"\0\xff"], pa.large_binary()),
    "fixed binary": pa.array([b"ab", None, b"\0\xff"], pa.binary(2)),
    "decimal": pa.array([Decimal("1.10"), None, Decimal("-9.99")], pa.decimal128(5, 2)),
    "wide decimal": pa.array([Decimal("1.10"), None, Decimal("-" + "9" * 35 + ".999")], pa.decimal128(38, 3)),
    "date": pa.array([date(1, 1, 1), None, date(9999, 12, 31)]),
    "date limits": pa.array([2**31 - 1, -(2**31), 0], pa.int32()).view(pa.date32()),
    "timestamp limits": pa.array([2**63 - 1, -(2**63), 0]).view(pa.timestamp("us")),
    "time s": pa.array([1, None, 86_399], pa.time32("s")),
    "time ms": pa.array([1, None, 86_399_999], pa.time32("ms")),
    "time us": pa.array([1, None, 86_399_999_999], pa.time64("us")),
    "dictionary": pa.array(["a", None, "b"]).dictionary_encode(),
    "dictionary of ints": pa.array([2**40, None, 3]).dictionary_encode(),
    "list": pa.array([[1, None], None, []], pa.list_(pa.int32())),
    "large list": pa.array([[1, None], None, []], pa.large_list(pa.int32())),
    "fixed list": pa.array([[1, None], None, [5, 6]], pa.list_(pa.int32(), 2)),
    "list without nulls": pa.array([[1], None, []], pa.list_(NOT_NULL)),
    "list of dictionary": pa.array([["a"], ["b", None], None], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
    "struct": pa.array([{"a": 1, "b": "x"}, None, {"a": None, "b": ""}], pa.struct({"a": pa.int8(), "b": pa.string()})),
    "struct of stamps": pa.array([{"t": 1}, None, {"t": 2}], pa.struct({"t": pa.timestamp("s", "Europe/Berlin")})),
    "deep": pa.array([[{"a": [[1.5], []]}], None, []], pa.list_(pa.struct({"a": pa.list_(pa.list_(pa.float32()))}))),
}


def bits(array: pa.Array) -> Any:
    """Values to compare: NaN equals NaN, -0.0 is not 0.0, and dates beyond Python's are numbers."""
    if pa.types.is_date32(array.type) or (pa.types.is_timestamp(array.type)):
        array = array.cast(pa.int32() if pa.types.is_date32(array.type) else pa.int64())
    return repr(array.to_pylist())


@pytest.mark.parametrize("name", EXACT)
def test_parquet_values_come_out_equal_in_value_and_type(tmp_path: Path, name: str) -> None:
    manifest = parquet(tmp_path / "m.parquet", {"uri": URIS, "x": EXACT[name]})
    planned = plan(manifest, pinned=tmp_path / "pinned")
    got = planned.rows["x"].combine_chunks()
    wanted = pq.read_table(manifest)["x"].combine_chunks()
    if pa.types.is_dictionary(wanted.type):  # how the writer stored it, not what it holds
        wanted = wanted.dictionary_decode()
    assert got.type == wanted.type == planned.columns["x"]
    assert bits(got) == bits(wanted)


REFUSED: dict[str, pa.Array] = {
    "halffloat": pa.array([np.float16(1.5)] * 3, pa.float16()),
    "decimal256": pa.array([Decimal("1.1")] * 3, pa.decimal256(50, 2)),
    "timestamp[ns, tz=UTC]": pa.array([1, 2, 3], pa.timestamp("ns", "UTC")),
    "time64[ns]": pa.array([1, 2, 3], pa.time64("ns")),
    "duration": pa.array([1, 2, 3], pa.duration("us")),
    "null": pa.nulls(3),
    "string_view": pa.array(URIS, pa.string_view()),
    "map": pa.array([[("a", 1)], None, []], pa.map_(pa.string(), pa.int32())),
    "arrow.uuid": pa.array([b"0" * 16] * 3, pa.uuid()),
    "struct<t: timestamp[ns, tz=UTC]>": pa.array([{"t": 1}] * 3, pa.struct({"t": pa.timestamp("ns", "UTC")})),
    "list<element: halffloat>": pa.array([[np.float16(1)]] * 3, pa.list_(pa.float16())),
    "struct<a: int64, A: int64>": pa.StructArray.from_arrays([pa.array([1, 2, 3])] * 2, ["a", "A"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_type_that_would_lose_something_is_refused_by_name_unless_left_out(tmp_path: Path, name: str) -> None:
    manifest = parquet(tmp_path / "m.parquet", {"uri": URIS, "x": REFUSED[name], "y": [1, 2, 3]})
    with pytest.raises(ManifestError) as refusal:
        plan(manifest, pinned=tmp_path / "no")
    assert f"{manifest}: column 'x' has type " in str(refusal.value)
    assert name in str(refusal.value)
    assert plan(manifest, pinned=tmp_path / "pinned", columns=("y",)).column("y") == [1, 2, 3]


def test_a_type_that_two_readers_take_for_different_things_is_refused(tmp_path: Path) -> None:
    duckdb.sql(f"COPY (SELECT 'a' AS uri, INTERVAL 1 DAY AS x) TO '{tmp_path}/m.parquet'")
    with pytest.raises(ManifestError, match=r"m\.parquet: column 'x' is fixed_size_binary\[12\] to pyarrow"):
        plan(tmp_path / "m.parquet", pinned=tmp_path / "pinned")


def test_parquet_of_another_writer_comes_out_equal(tmp_path: Path) -> None:
    duckdb.sql(
        f"COPY (SELECT 'a' AS uri, 1::UTINYINT AS a, DATE '2024-02-29' AS b, 'x'::ENUM('x') AS c, [1, NULL] AS d, "
        f"TIMESTAMPTZ '2024-01-01 00:00:00+00' AS e) TO '{tmp_path}/m.parquet'"
    )
    rows = plan(tmp_path / "m.parquet", pinned=tmp_path / "pinned").rows
    wanted = pq.read_table(tmp_path / "m.parquet").drop("uri")
    for name in ("a", "b", "c", "d", "e"):
        assert rows[name].type == wanted[name].type
        assert rows[name].to_pylist() == wanted[name].to_pylist()


def test_files_whose_columns_differ_are_united_by_name(tmp_path: Path) -> None:
    one = parquet(tmp_path / "1.parquet", {"uri": ["a"], "x": [1]})
    two = parquet(tmp_path / "2.parquet", {"y": ["q"], "uri": ["b"]})
    planned = plan(one, two, pinned=tmp_path / "pinned")
    assert planned.columns == {"x": pa.int64(), "y": pa.string()}
    assert (planned.column("x"), planned.column("y")) == ([1, None], [None, "q"])


# ---- CSV


def test_csv_values_stay_the_strings_they_are(tmp_path: Path) -> None:
    manifest = text(
        tmp_path / "m.csv",
        'image_id,uri,x,y\n007,#a.jpg,,1e5\n"7","b,1.jpg","",NULL\n0x7,c.jpg,"say ""hi""\nthere", 2024-01-01 \n',
    )
    planned = plan(manifest, pinned=tmp_path / "pinned")
    assert planned.column("image_id") == ["007", "7", "0x7"]
    assert planned.column("uri") == [f"{tmp_path}/{name}" for name in ("#a.jpg", "b,1.jpg", "c.jpg")]
    assert planned.column("x") == [None, "", 'say "hi"\nthere']  # nothing is not the empty string
    assert planned.column("y") == ["1e5", "NULL", " 2024-01-01 "]


def test_no_line_of_a_csv_is_skipped_to_find_a_better_header(tmp_path: Path) -> None:
    manifest = text(tmp_path / "m.csv", "uri\nuri,x\na.jpg,1\n")
    with pytest.raises(
        ManifestError, match=r"m\.csv cannot be read: .*Line: 2.*Expected Number of Columns: 1 Found: 2"
    ):
        plan(manifest, pinned=tmp_path / "pinned")


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_data(tmp_path: Path) -> None:
    manifest = text(tmp_path / "m.csv", "\ufeffuri,x\r\na.jpg,1\r\n")
    assert plan(manifest, pinned=tmp_path / "pinned").column("x") == ["1"]


def test_text_lines_are_uris_whatever_they_hold(tmp_path: Path) -> None:
    lines = ["a.jpg", 'b,c "d".jpg', "  sp ace.jpg", "#x.jpg", "日本.jpg", "tab\there.jpg"]
    manifest = text(tmp_path / "m.txt", "\n".join(lines[:5]) + "\n")
    assert plan(manifest, pinned=tmp_path / "pinned").column("uri") == [f"{tmp_path}/{line}" for line in lines[:5]]


# ---- JSON, lines and arrays


JSON = pytest.mark.parametrize(("write", "name"), [(jsonl, "m.jsonl"), (json_array, "m.json")])


@JSON
def test_json_values_come_out_equal_and_absent_keys_are_null(tmp_path: Path, write: Write, name: str) -> None:
    rows = [
        {"uri": "a", "i": 2**63 - 1, "f": 0.1, "s": "2024-01-01", "b": True, "l": [1, None], "o": {"k": "v"}},
        {"uri": "b", "i": -(2**63), "f": 2, "s": "", "b": None, "l": [], "o": {"k": None, "m": 1}},
        {"uri": "c"},
    ]
    planned = plan(write(tmp_path / name, *rows), pinned=tmp_path / "pinned")
    assert planned.column("i") == [2**63 - 1, -(2**63), None]
    assert planned.column("f") == [0.1, 2.0, None]
    assert planned.column("s") == ["2024-01-01", "", None]
    assert planned.column("b") == [True, None, None]
    assert planned.column("l") == [[1, None], [], None]
    assert planned.column("o") == [{"k": "v", "m": None}, {"k": None, "m": 1}, None]
    assert planned.columns["i"] == pa.int64()


@JSON
def test_a_json_column_that_is_null_throughout_is_a_column_of_null_strings(
    tmp_path: Path, write: Write, name: str
) -> None:
    manifest = write(tmp_path / name, {"uri": "a", "x": None, "l": []}, {"uri": "b"})
    planned = plan(manifest, pinned=tmp_path / "pinned")
    assert (planned.columns["x"], planned.column("x"), planned.column("l")) == (pa.string(), [None, None], [[], None])


@JSON
def test_json_keys_may_hold_what_they_like(tmp_path: Path, write: Write, name: str) -> None:
    row = {
        "uri": "a",
        "x.y": 1.5,
        'p"q': 2.5,
        "it's": 3.5,
        "a/b~c": 4.5,
        "JSON": 5,
        "UBIGINT": {"DOUBLE": 6},
        "日": "本",
    }
    planned = plan(write(tmp_path / name, row), pinned=tmp_path / "pinned")
    assert {name: planned.column(name)[0] for name in row if name != "uri"} == {
        k: v for k, v in row.items() if k != "uri"
    }


@JSON
@pytest.mark.parametrize(
    "values",
    [[2**63], [2**64], [-(2**63) - 1], [2**63, -1], [2**53 + 1, 1.5], [[1, 2**64]], [{"k": 2**64}], [{"k": 2**63}]],
)
def test_json_integers_that_would_lose_digits_are_refused_by_name(
    tmp_path: Path, write: Write, name: str, values: list[Any]
) -> None:
    manifest = write(tmp_path / name, *({"uri": str(i), "a/b": v} for i, v in enumerate(values)))
    with pytest.raises(ManifestError, match=rf"{name}: column 'a/b' holds -?[0-9]+, an integer that would lose digits"):
        plan(manifest, pinned=tmp_path / "pinned")


@JSON
@pytest.mark.parametrize("values", [[1, "1"], [True, 1], [1, [1]], [{"a": 1}, "x"], [[1, "x"]], [{}]])
def test_json_values_of_several_types_are_refused_by_name(
    tmp_path: Path, write: Write, name: str, values: list[Any]
) -> None:
    manifest = write(tmp_path / name, *({"uri": str(i), "x": v} for i, v in enumerate(values)))
    with pytest.raises(ManifestError, match=rf"{name}: column 'x' holds values of several types"):
        plan(manifest, pinned=tmp_path / "pinned")
    assert len(plan(manifest, pinned=tmp_path / "pinned", columns=()).rows) == len(values)


def test_the_images_of_coco_annotations_are_a_manifest(tmp_path: Path) -> None:
    images = [
        {"license": 3, "file_name": f"{i:012}.jpg", "height": 480, "width": 640, "date_captured": when, "id": i}
        for i, when in [(391895, "2013-11-14 11:18:45"), (522418, "2013-12-31 23:59:59")]
    ]
    renames = {"file_name": "uri", "id": "image_id"}
    manifest = json_array(tmp_path / "images.json", *images)
    planned = plan(manifest, pinned=tmp_path / "pinned", rename=renames, partition_by=("month:date_captured",))
    assert planned.column("image_id") == ["391895", "522418"]
    assert planned.column("uri") == [f"{tmp_path}/000000391895.jpg", f"{tmp_path}/000000522418.jpg"]
    assert planned.partitions == (("month=2013-11", 1), ("month=2013-12", 1))
    assert planned.column("date_captured") == ["2013-11-14 11:18:45", "2013-12-31 23:59:59"]


def test_a_json_array_is_looked_at_in_pieces_for_what_is_wrong(tmp_path: Path) -> None:
    rows = [{"uri": f"é{i}.jpg", "x": "y" * 1000} for i in range(3000)]  # three pieces
    manifest = text(tmp_path / "m.json", json.dumps(rows, ensure_ascii=False)[:-1] + ', {"uri": }]')
    with pytest.raises(ManifestError, match=r"m\.json row 3000 is not JSON: Expecting value, got '}]'"):
        plan(manifest, pinned=tmp_path / "pinned")


# ---- choosing and renaming


def test_rename_gives_columns_the_names_a_plan_knows(tmp_path: Path) -> None:
    manifest = parquet(
        tmp_path / "m.parquet", {"path": ["a", "b"], "id": [7, 8], "uri": [1, 2], "labels": [True, False]}
    )
    renames = {"path": "uri", "id": "image_id", "uri": "old", "labels": "tags"}
    planned = plan(manifest, pinned=tmp_path / "pinned", rename=renames)
    assert planned.column("image_id") == ["7", "8"]
    assert planned.column("old") == [1, 2]
    assert list(planned.columns) == ["old", "tags"]


def test_columns_choose_what_is_carried(tmp_path: Path) -> None:
    manifest = parquet(tmp_path / "m.parquet", {"uri": ["a"], "image_id": ["i"], "x": [1], "y": [2], "row": [3]})
    planned = plan(manifest, pinned=tmp_path / "pinned", columns=("y",), partition_by=("x",))
    assert list(planned.columns) == ["x", "y"]
    assert planned.column("image_id") == ["i"]


def test_limit_takes_the_first_rows_over_all_files(tmp_path: Path) -> None:
    one = text(tmp_path / "1.txt", "".join(f"a{i}\n" for i in range(5000)))
    two = text(tmp_path / "2.txt", "".join(f"b{i}\n" for i in range(5000)))
    planned = plan(one, two, pinned=tmp_path / "pinned", limit=5003, shard_rows=10_000)
    names = [Path(uri).name for uri in planned.column("uri")]
    assert names == [f"a{i}" for i in range(5000)] + ["b0", "b1", "b2"]


def test_columns_named_like_the_planners_own_are_carried(tmp_path: Path) -> None:
    names = ["number", "shape", "resolved", "reason", "m", "p", "manifest", "filename", "select", 'a"b', "a b"]
    manifest = parquet(tmp_path / "m.parquet", {"uri": ["a", "b"], **{name: [1, 2] for name in names}})
    planned = plan(manifest, pinned=tmp_path / "pinned")
    assert list(planned.columns) == names
    assert all(pc.all(pc.equal(planned.rows[name], pa.chunked_array([[1, 2]]))).as_py() for name in names)
