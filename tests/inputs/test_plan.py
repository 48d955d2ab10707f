"""A plan refuses what is wrong in one clear sentence, and cuts the rest into shards that hold every row once."""

from __future__ import annotations

import gzip
import random
import re
from collections import Counter
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fcos_ray import storage
from fcos_ray.errors import ManifestError
from fcos_ray.inputs.fetch import FetchPolicy
from fcos_ray.inputs.manifests import find_sources
from fcos_ray.inputs.pin import GROUPS_PER_FILE, _parts, pin
from fcos_ray.inputs.pinned_files import read_shard
from fcos_ray.inputs.plan import PARTITION, REFUSED, PlanSettings, draft_plan
from fcos_ray.inputs.resolve import resolve_uri, resolver
from fcos_ray.inputs.scans import count_rows
from fcos_ray.outputs.schema import RESERVED_COLUMNS
from tests.inputs.planning import jsonl, parquet, plan, put, text

EAST = timezone(timedelta(hours=3))

# ---- one clear error each


def refusal(*manifests: Path, **settings: Any) -> str:
    with pytest.raises(ManifestError) as error:
        plan(*manifests, pinned=manifests[0].parent / "pinned", **settings)
    message = str(error.value)
    assert "\n" not in message
    assert not (manifests[0].parent / "pinned").exists(), "nothing is written before everything is checked"
    return message


# file name, content, what the message says (M stands for the file)
BAD_FILES: dict[str, tuple[str, str | bytes, str]] = {
    "truncated Parquet": ("m.parquet", b"PAR1abcdPAR1", "M cannot be read: "),
    "empty Parquet": ("m.parquet", b"", "M cannot be read: Parquet file size is 0 bytes"),
    "no Parquet": ("m.parquet", "uri\na\n", "M cannot be read: Parquet"),
    "no gzip": ("m.csv.gz", "uri\na\n", "M cannot be read: "),
    "truncated gzip": ("m.jsonl.gz", gzip.compress(b'{"uri": "a"}\n' * 9999)[:-60], "M cannot be read: "),
    "unknown suffix": (
        "m.xlsx", "uri\na\n",
        "M: format unknown; wanted a name that ends in .parquet, .pq, .csv, .tsv, .jsonl, .ndjson, .json",
    ),
    "no suffix": ("m", "uri\na\n", "M: format unknown"),
    "zipped Parquet": ("m.parquet.gz", "", "M: format unknown"),
    "too many columns": ("m.csv", "uri,x\na,1\nb,2,3\n", "M cannot be read: CSV Error on Line: 3 Original Line: b,2,3"),
    "too few columns": ("m.csv", "uri,x\na,1\nb\n", "Line: 3 Original Line: b Expected Number of Columns: 2 Found: 1"),
    "open quote": ("m.csv", 'uri,x\na,"1\nb,2\n', "M cannot be read: CSV Error on Line: 2"),
    "CSV in Latin-1": ("m.csv", b"uri\na\n\xe9\n", "M cannot be read: wanted UTF-8, got byte 0xe9"),
    "text in Latin-1": ("m.txt", b"a\n\xe9\n", "M cannot be read: CSV Error on Line: 2"),
    "doubled CSV column": ("m.csv", "uri,x,x\na,1,2\n", "M: column 'x' stands there twice"),
    "CSV columns by case": ("m.csv", "uri,x,X\na,1,2\n", "M: columns 'x' and 'X' differ in case only"),
    "CSV column without name": ("m.csv", "uri,\na,1\n", "M: column 1 (from 0) is named ''; wanted a name"),
    "empty CSV": ("m.csv", "", "M: the first line is empty; wanted the names of the columns"),
    "CSV header only": ("m.csv", "uri,x\n", "M: the manifest has no rows"),
    "empty text": ("m.txt", "", "M: the manifest has no rows"),
    "empty JSONL": ("m.jsonl", "\n", "M: the manifest has no rows"),
    "malformed JSON": ("m.jsonl", '{"uri": "a"}\n{"uri": "b",\n{"uri": "c"}\n', "M line 2 is not JSON: "),
    "two objects in a line": ("m.jsonl", '{"uri": "a"} {"uri": "b"}\n', "M line 1 is not JSON: Extra data"),
    "JSON array": ("m.jsonl", '[{"uri": "a"}]\n', "a\"}]\\n'; a file of one array is named .json"),
    "JSON scalar among objects": ("m.jsonl", '{"uri": "a"}\n\n5\n', "M line 3: wanted a JSON object, got "),
    "JSON in Latin-1": ("m.jsonl", b'{"uri": "a"}\n{"uri": "\xe9"}\n', "M line 2 is not JSON: "),
    "doubled JSON key": ("m.jsonl", '{"uri": "a", "x": 1, "x": 2}\n', "M: a key stands twice in "),
    "JSON keys by case": ("m.jsonl", '{"uri": "a", "x": 1}\n{"uri": "b", "X": 2}\n', "M: columns 'x' and 'X' differ in"),
    "nested JSON keys by case": ("m.jsonl", '{"uri": "a", "o": [{"x": 1, "X": 2}]}\n', "M: columns 'x' and 'X' differ in"),
    "JSON key without name": ("m.jsonl", '{"uri": "a", "": 1}\n', "M: column 1 (from 0) is named ''; wanted a name"),
    "JSON lines in .json": (
        "m.json", '{"uri": "a"}\n{"uri": "b"}\n',
        "M: wanted a JSON array of objects, [ {…}, {…} ], got an object; a file of one object per line is named .jsonl",
    ),
    "COCO annotations": (
        "m.json", '{"info": {}, "images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}',
        "M: this looks like a COCO annotations file; its images[] make a manifest: `jq .images m.json > manifest.json` in",
    ),
    "scalar in .json": ("m.json", " 5", "M: wanted a JSON array of objects, [ {…}, {…} ], got '5'"),
    "array of scalars": ("m.json", '[{"uri": "a"}, 5]', "M row 1: wanted a JSON object, got 5"),
    "array of arrays": ("m.json", '[[{"uri": "a"}]]', 'M row 0: wanted a JSON object, got [{"uri": "a"}]'),
    "open array": ("m.json", '[{"uri": "a"}, {"uri": "b"}', "M row 2 is not JSON: Expecting ',' or ']', got ''"),
    "open object": ("m.json", '[{"uri": "a"}, {"uri": "b"', "M row 1 is not JSON: Expecting ',' delimiter, got ''"),
    "no comma": ("m.json", '[{"uri": "a"} {"uri": "b"}]', "M row 1 is not JSON: Expecting ',' or ']', got '{"),
    "comma at the end": ("m.json", '[{"uri": "a"},]', "M row 1 is not JSON: Expecting an object after ',', got ']'"),
    "two arrays": ("m.json", '[{"uri": "a"}]\n[{"uri": "b"}]', "M row 1 is not JSON: Expecting the end of the file"),
    "malformed JSON array": ("m.json", '[{"uri": "a"}, {"uri" "b"}]', "M row 1 is not JSON: Expecting ':' delimiter"),
    "JSON array in Latin-1": ("m.json", b'[{"uri": "\xe9"}]', "M cannot be read: wanted UTF-8, got byte 0xe9"),
    "truncated JSON gzip": ("m.json.gz", gzip.compress(b'[{"uri": "a"}]' + b" " * 99999)[:-20], "M cannot be read: "),
    "null among objects": ("m.json", '[{"uri": "a"}, null]', "column 'uri' is null or empty in 1 row: M row 1"),
    "empty JSON array": ("m.json", "[]", "M: the manifest has no rows"),
    "doubled key in an array": ("m.json", '[{"uri": "a", "x": 1, "x": 2}]', "M: a key stands twice in "),
    "no uri": ("m.csv", "path,id\na,1\n", "M: no column 'uri' in the manifest; it has id, path; --uri-column <column>"),
    "almost uri": ("m.csv", "url,id\na,1\n", "did you mean 'url'?; --uri-column <column> says which"),
    "null uri": ("m.csv", "uri,x\na,1\n,2\n", "column 'uri' is null or empty in 1 row: M row 1"),
    "empty uri": ("m.jsonl", '{"uri": "a"}\n{"uri": ""}\n', "column 'uri' is null or empty in 1 row: M row 1"),
    "blank line": ("m.txt", "a\n\nb\n", "column 'uri' is null or empty in 1 row: M row 1"),
    "null image_id": ("m.csv", "uri,image_id\na,1\nb,\nc,\n", "'image_id' is null or empty in 2 rows: M row 1; M row 2"),
    "numeric uri": ("m.jsonl", '{"uri": 1}\n', "M: column 'uri' wanted strings, got int64"),
    "fractional image_id": ("m.jsonl", '{"uri": "a", "image_id": 1.5}\n', "column 'image_id' wanted strings or integers, got"),
    "doubled ids": (
        "m.csv", "uri,image_id\na,x\nb,y\nc,x\nd,x\ne,y\n",
        "column 'image_id' is not unique, 3 rows too many: 'x' 3 times, last in M row 3; 'y' 2 times, last in M row 4. "
        "--drop-duplicates keeps the first row of each",
    ),
    "doubled uris": ("m.txt", "a\n./a\n", "column 'uri' is not unique, 1 row too many: "),
    "wide in words": ("m.csv", "uri,width\na,6\nb,x\n", "column 'width' is not a whole number in 1 row: M row 1 ('x')"),
    "fractional height": ("m.csv", "uri,height\na,1.5\n", "'height' is not a whole number in 1 row: M row 0 ('1.5')"),
    "bytes in words": ("m.csv", "uri,content_bytes\na,x\n", "'content_bytes' is not a whole number in 1 row: M row 0"),
    "no time": ("m.csv", "uri,content_last_modified\na,soon\n", "'content_last_modified' is not a time in 1 row: M row 0"),
    "numeric etag": ("m.jsonl", '{"uri": "a", "content_etag": 5}\n', "M: column 'content_etag' wanted strings, got int64"),
    "clash": ("m.csv", "uri,labels\na,1\n", "M: column 'labels' clashes with a column of the output; --rename labels=mani"),
    "clash by case": ("m.csv", "uri,Boxes\na,1\n", "--rename Boxes=manifest_Boxes"),
    "clash with the path": ("m.csv", "uri,run\na,1\n", "--rename run=manifest_run"),
    "clash with the planner": ("m.csv", "uri,rowid\na,1\n", "--rename rowid=manifest_rowid"),
    "hidden names": ("m.csv", "uri,__partition\na,1\n", "--rename __partition=manifest_partition"),
    "the planner's file column": ("m.csv", "uri,__file\na,1\n", "M: a column may not be named '__file'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_manifest_is_refused_naming_file_row_and_column(tmp_path: Path, case: str) -> None:
    name, content, wanted = BAD_FILES[case]
    manifest = text(tmp_path / name, content)
    assert re.sub(r"\bM\b", str(manifest), wanted) in refusal(manifest)


# settings, what the message says, for a manifest with columns uri, p (strings), n (integers), f (fractions), width
BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown partition": ({"partition_by": ("q",)}, "no column 'q' in the manifest; it has f, n, p, p q, t, uri, width"),
    "unknown column": ({"columns": ("widht",)}, "it has f, n, p, p q, t, uri, width; did you mean 'width'?"),
    "unknown rename": ({"rename": {"wdth": "x"}}, "no column 'wdth' in the manifest; it has f, n, p, p q, t, uri, width"),
    "rename onto another": ({"rename": {"p": "n"}}, "--rename p=n: M: column 'n' stands there twice"),
    "two uris": ({"rename": {"p": "uri"}}, "wanted different names; --rename uri=<another name> keeps the file's own"),
    "unknown uri column": ({"rename": {"url": "uri"}}, "did you mean 'uri'?; it was to become 'uri'"),
    "rename by case": ({"rename": {"p": "N"}}, "differ in case only"),
    "rename to nothing": ({"rename": {"p": ""}}, "--rename p=: M: column 1 (from 0) is named ''; wanted a name"),
    "fractions": ({"partition_by": ("f",)}, "M: column 'f' cannot partition; wanted strings, integers"),
    "a column of the output": ({"partition_by": ("width",)}, "M: column 'width' cannot partition"),
    "the uri": ({"partition_by": ("uri",)}, "M: column 'uri' cannot partition"),
    "a name no path takes": ({"partition_by": ("p q",)}, "column 'p q' must be letters, digits, _ and - to stand in a path"),
    "twice": ({"partition_by": ("p", "p")}, "partition column 'p' is given twice"),
    "twice by function": ({"partition_by": ("date:p", "date:t")}, "partition column 'date' is given twice; --partition-by <n"),
    "unknown function": ({"partition_by": ("week:t",)}, "--partition-by week:t: wanted <column>, year:<column> or month:"),
    "a name without function": ({"partition_by": ("q=p",)}, "--rename p=q names a column otherwise"),
    "function without column": ({"partition_by": ("date:",)}, "--partition-by date:: wanted <column>, year:<column> or"),
    "function of no column": ({"partition_by": ("date:tt",)}, "no column 'tt' in the manifest; it has f, n, p, p q, t, uri"),
    "function of integers": ({"partition_by": ("date:n",)}, "M: column 'n' cannot partition; wanted dates, timestamps or ISO"),
    "function of other strings": (
        {"partition_by": ("month:p",)},
        "column 'p' is not an ISO date or time such as 2026-01-03 or 2026-01-03T04:05:06Z in 4 rows: M row 0 ('x'); M row",
    ),
    "clash with a column": (
        {"partition_by": ("P=date:t",)},
        "M: partition 'P' clashes with a column of the output files; --partition-by t_date=date:t names it otherwise",
    ),
    "clash with the output": ({"partition_by": ("status=date:t",)}, "M: partition 'status' clashes with a column of the out"),
    "an unspeakable name": ({"partition_by": ("a b=date:t",)}, "'a b' must be letters, digits, _ and - to stand in a path; "),
    "too many files": (
        {"partition_by": ("p", "n"), "max_files": 3},
        "4 files of 4 rows, more than max_files (3); wanted a coarser partition column than 'n' (4 values)",
    ),
    "too small shards": ({"shard_rows": 1, "max_files": 3}, "more than max_files (3); wanted a larger --shard-rows"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_settings_that_do_not_fit_the_manifest_are_refused(tmp_path: Path, case: str) -> None:
    settings, wanted = BAD_SETTINGS[case]
    columns = {
        "uri": list("abcd"),
        "p": list("xxyy"),
        "n": range(4),
        "f": [0.5] * 4,
        "width": [1] * 4,
        "t": ["2026-01-03"] * 4,
        "p q": list("abcd"),
    }
    manifest = parquet(tmp_path / "m.parquet", {name: pa.array(values) for name, values in columns.items()})
    assert re.sub(r"\bM\b", str(manifest), wanted) in refusal(manifest, **settings)


def test_the_row_that_is_named_is_the_row_in_its_own_file(tmp_path: Path) -> None:
    one = text(tmp_path / "1.csv", "uri,image_id\na,1\nb,2\n")
    two = text(tmp_path / "2.csv", "uri,image_id\nc,3\nd,\n")
    assert f"is null or empty in 1 row: {two} row 1" in refusal(one, two)
    three = text(tmp_path / "3.csv", "uri,image_id\ne,3\nf,2\ng,9\n")
    assert f"'2' 2 times, last in {three} row 1" in refusal(one, three)


@pytest.mark.parametrize("value", [None, ""])
def test_a_null_or_empty_partition_value_is_refused(tmp_path: Path, value: str | None) -> None:
    manifest = parquet(tmp_path / "m.parquet", {"uri": ["a", "b"], "p": ["x", value]})
    assert f"column 'p' is null or empty in 1 row: {manifest} row 1" in refusal(manifest, partition_by=("p",))


def test_a_partition_value_that_reads_back_as_null_is_refused(tmp_path: Path) -> None:
    manifest = parquet(tmp_path / "m.parquet", {"uri": ["a"], "p": ["__HIVE_DEFAULT_PARTITION__"]})
    assert "column 'p' holds what every reader of partitions takes for null" in refusal(manifest, partition_by=("p",))


def test_a_partition_value_that_no_disk_takes_is_refused(tmp_path: Path) -> None:
    manifest = parquet(tmp_path / "m.parquet", {"uri": ["a"], "p": ["é" * 60]})
    assert "column 'p' cannot partition: p=%C3%A9" in refusal(manifest, partition_by=("p",))


@pytest.mark.parametrize(
    "type_",
    [pa.list_(pa.field("element", pa.int8())), pa.struct({"a": pa.int8()}), pa.binary(), pa.date32(), pa.bool_()],
)
@pytest.mark.parametrize("name", ["content_etag", "content_sha256"])
def test_what_identifies_content_must_be_strings(tmp_path: Path, name: str, type_: pa.DataType) -> None:
    manifest = parquet(tmp_path / "m.parquet", {"uri": ["a"], name: pa.nulls(1, type_)})
    assert f"column {name!r} wanted strings, got {type_}" in refusal(manifest)


@pytest.mark.parametrize("value", [{"a": 1}, [1], b"1", datetime(2024, 1, 1), float("nan"), 2.5, 2**64 - 1])
@pytest.mark.parametrize("name", ["width", "content_bytes"])
def test_a_size_of_another_type_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    type_ = pa.uint64() if value == 2**64 - 1 else None
    manifest = parquet(tmp_path / "m.parquet", {"uri": ["a"], name: pa.array([value], type_)})
    assert f"column {name!r} is not a whole number in 1 row: {manifest} row 0" in refusal(manifest)


def test_one_column_of_two_types_is_refused_naming_both_files(tmp_path: Path) -> None:
    one, two = parquet(tmp_path / "1.parquet", {"uri": ["a"], "x": [1]}), text(tmp_path / "2.csv", "uri,x\nb,2\n")
    assert f"column 'x' is int64 in {one} but string in {two}; wanted one type" in refusal(one, two)


def test_columns_that_differ_in_case_between_files_are_refused(tmp_path: Path) -> None:
    one, two = (
        parquet(tmp_path / "1.parquet", {"uri": ["a"], "x": [1]}),
        parquet(tmp_path / "2.parquet", {"uri": ["b"], "X": [1]}),
    )
    assert f"{two}: columns 'x' and 'X' differ in case only" in refusal(one, two)
    three = text(tmp_path / "3.csv", "uri,X\nb,2\n")
    assert "differ in case only" in refusal(one, three)
    assert len(plan(one, three, pinned=tmp_path / "pinned", rename={"X": "y"}).rows) == 2


@pytest.mark.parametrize(
    "pattern", ["none.csv", "none/*.csv", "", "s3://user:secret@bucket/m.csv", "no\nnewline.csv", "x" * 300]
)
def test_a_manifest_that_is_not_there_is_named_without_its_password(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(ManifestError) as error:
        find_sources([f"{tmp_path}/{pattern}" if "none" in pattern or "x" in pattern else pattern])
    assert "secret" not in str(error.value)
    assert "none" not in pattern or "no such file" in str(error.value)


@pytest.mark.parametrize("name", ["m.pkl", "m.pickle", "m.pkl.gz", "m.pt", "m.npy"])
def test_nothing_that_holds_code_is_a_manifest(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit'\ntR.")
    with pytest.raises(ManifestError, match=rf"{name}.*wanted"):
        find_sources([str(tmp_path / name)])


def test_a_folder_is_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"no such file; wanted a file, an s3:// uri, or a pattern"):
        find_sources([str(tmp_path)])


# ---- uris


LOCAL = FetchPolicy(allow_roots=("/data",))
URIS: dict[str, tuple[str, str, str | None]] = {  # uri: folder of the manifest, resolved uri, reason to refuse
    "x.jpg": ("/data/m", "/data/m/x.jpg", None),
    "./a//b/./x.jpg": ("/data/m", "/data/m/a/b/x.jpg", None),
    "../x.jpg": ("/data/m", "/data/x.jpg", None),
    "../../x.jpg": ("/data/m", "../../x.jpg", "outside the allowed roots"),
    "/data/x.jpg": ("/elsewhere", "/data/x.jpg", None),
    "/data/../etc/passwd": ("/data/m", "/data/../etc/passwd", "outside the allowed roots"),
    "/database/x.jpg": ("/data/m", "/database/x.jpg", "outside the allowed roots"),
    "file:///data/a%20b%25.jpg": ("/m", "/data/a b%.jpg", None),
    "file:///data/%2e%2e/etc/x": ("/m", "file:///data/%2e%2e/etc/x", "outside the allowed roots"),
    "file://data/x.jpg": ("/m", "file://data/x.jpg", "malformed"),
    "a%20b.jpg": ("/data", "/data/a%20b.jpg", None),
    "é x#?.jpg": ("/data", "/data/é x#?.jpg", None),
    "k.jpg": ("s3://bucket/m", "s3://bucket/m/k.jpg", None),
    "a/k%20.jpg": ("s3://bucket", "s3://bucket/a/k%20.jpg", None),
    "../k.jpg": ("s3://bucket/m", "../k.jpg", "malformed: '..' in a relative uri"),
    "s3://other/k.jpg": ("/m", "s3://other/k.jpg", None),
    "s3a://other/k.jpg": ("/m", "s3://other/k.jpg", None),
    "s3://other": ("/m", "s3://other", "malformed: a bucket without a key"),
    "s3://me:secret@bucket/k.jpg": ("/m", "s3://bucket/k.jpg", "malformed: holds user information"),
    "http://me:secret@host/x.jpg": ("/m", "http://host/x.jpg", "malformed: holds user information"),
    "https://host/x.jpg": ("/m", "https://host/x.jpg", "scheme https is not allowed: --allow-http"),
    "simplecache::file:///etc/hostname": ("/data", "simplecache::file:///etc/hostname", "malformed"),
    "foo/bar://x": ("/data", "foo/bar://x", "malformed"),
    " s3://b/k": ("/data", " s3://b/k", "malformed"),
    "a\nb.jpg": ("/data", "a\nb.jpg", "malformed: holds a control character"),
    "x.jpg ": ("/data", "/data/x.jpg ", None),
}


@pytest.mark.parametrize(("uri", "folder"), [(uri, folder) for uri, (folder, _, _) in URIS.items()])
def test_uris_are_resolved_against_their_manifest_or_refused(uri: str, folder: str) -> None:
    _, wanted, reason = URIS[uri]
    resolved, why = resolve_uri(uri, folder=folder, policy=LOCAL)
    assert resolved == wanted
    assert why is None if reason is None else why is not None and why.startswith(reason)


@pytest.mark.parametrize("roots", [("/data",), ("/data/m/deep",), ("/",), ()])
@pytest.mark.parametrize("schemes", [("s3", "file"), ("file",), ("s3", "file", "http", "https")])
def test_many_uris_at_once_are_resolved_as_each_alone(roots: tuple[str, ...], schemes: tuple[str, ...]) -> None:
    policy = FetchPolicy(allow_roots=roots, allow_schemes=schemes)
    folders = {"1": "/data/m", "2": "s3://bucket/m", "3": "/", "4": "s3://bucket", "5": "https://host/m"}
    rng = random.Random(0)
    parts = [
        "a",
        "b.jpg",
        "..",
        ".",
        "",
        "deep",
        "x=1",
        "é",
        "a b",
        "s3://bucket",
        "s3://b",
        "s3:",
        "http://host.example",
        "https://a_b.10.c.example",
        "http://10.0.0.1",
        "http://host.example:8080",
        "http://host.example:0",
        "http://host.0x7f",
        f"https://{'a' * 64}.example",
        "#",
        "a\\b",
        "::",
        "/",
        "?versionId=1",
        "@",
        ":",
        "\t",
    ]
    made = ["/".join(rng.choices(parts, k=rng.randint(1, 4))) for _ in range(2000)]
    uris = [uri for uri in [*URIS, *made, "deep/x.jpg", "a/b/c.jpg"] if uri]
    for manifest, folder in folders.items():
        chunks = pa.chunked_array([uris[:7], uris[7:]])
        got = resolver(folders, policy)(chunks, pa.chunked_array([[manifest] * len(uris)]))
        wanted = [resolve_uri(uri, folder=folder, policy=policy) for uri in uris]
        assert [(row["uri"], row["reason"]) for row in got.to_pylist()] == wanted


def test_relative_uris_belong_to_the_manifest_they_stand_in(tmp_path: Path) -> None:
    one, two = text(tmp_path / "m/1.txt", "x.jpg\n"), text(tmp_path / "m/deep/2.txt", "x.jpg\n../y.jpg\n")
    planned = plan(one, two, pinned=tmp_path / "pinned")
    assert planned.column("uri") == [f"{tmp_path}/m/x.jpg", f"{tmp_path}/m/deep/x.jpg", f"{tmp_path}/m/y.jpg"]
    assert planned.column("image_id") == planned.column("uri")


def test_uris_that_may_not_be_read_stop_the_plan_naming_reasons_and_first_rows(tmp_path: Path) -> None:
    lines = ["ok.jpg", "/etc/passwd", "http://me:secret@host/x", "/etc/shadow", "https://host/y?sig=secret"]
    manifest = text(tmp_path / "m.txt", "\n".join(lines))
    message = refusal(manifest)
    assert message.startswith(
        "4 uris may not be read: 2 outside the allowed roots (such as '/etc/passwd', '/etc/shadow'"
    )
    assert f"first in {manifest} row 1" in message
    assert f"'http://host/x', first in {manifest} row 2" in message
    assert "'https://host/y?…'" in message
    assert "secret" not in message
    assert message.endswith("--allow-root FOLDER allows a local folder; --refused-uris error makes them error rows")


def test_uris_that_may_not_be_read_become_rows_with_the_reason_when_asked(tmp_path: Path) -> None:
    manifest = text(tmp_path / "m.txt", "ok.jpg\n/etc/passwd\nhttp://me:secret@host/x\n")
    planned = plan(manifest, pinned=tmp_path / "pinned", refused_uris="error")
    assert planned.uris_refused == 2
    assert planned.column("uri") == [f"{tmp_path}/ok.jpg", "/etc/passwd", "http://host/x"]
    assert planned.column(REFUSED) == [
        None, "outside the allowed roots", "malformed: holds user information or a chained uri",
    ]  # fmt: skip


# ---- duplicates


def test_dropping_duplicates_keeps_the_first_row_of_each_id_and_counts(tmp_path: Path) -> None:
    manifest = text(tmp_path / "m.csv", "uri,image_id,p\na,x,2\nb,y,1\nc,x,1\nd,x,1\ne,z,2\n")
    planned = plan(manifest, pinned=tmp_path / "pinned", drop_duplicates=True, partition_by=("p",))
    assert planned.duplicates_dropped == 2
    assert planned.partitions == (("p=1", 1), ("p=2", 2))
    assert planned.column("image_id") == ["y", "x", "z"]
    assert [Path(uri).name for uri in planned.column("uri")] == ["b", "a", "e"]


def test_ids_that_differ_in_case_or_space_are_different(tmp_path: Path) -> None:
    manifest = parquet(tmp_path / "m.parquet", {"uri": list("abcd"), "image_id": ["x", "X", "x ", "é"]})
    assert plan(manifest, pinned=tmp_path / "pinned").column("image_id") == ["x", "X", "x ", "é"]


# ---- order and shards


ODD_VALUES = [
    "a/b",
    "..",
    ".",
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
    "~",
    "x" * 200,
]


def test_partition_values_stand_in_the_path_escaped_and_come_back(tmp_path: Path) -> None:
    manifest = parquet(tmp_path / "m.parquet", {"uri": [f"{i}" for i in range(len(ODD_VALUES))], "p": ODD_VALUES})
    planned = plan(manifest, pinned=tmp_path / "pinned", partition_by=("p",))
    assert sorted(unquote(path.removeprefix("p=")) for path, _ in planned.partitions) == sorted(ODD_VALUES)
    for path, value in zip(planned.column(PARTITION), planned.column("p"), strict=True):
        assert path.count("/") == 0
        assert path.count("=") == 1
        assert "\0" not in path
        assert unquote(path.removeprefix("p=")) == value


TIMES: dict[str, tuple[pa.Array, list[str]]] = {  # a column of times: their UTC days
    "date": (pa.array([0, -1], pa.int32()).view(pa.date32()), ["1970-01-01", "1969-12-31"]),
    "naive": (pa.array([0, -1], pa.int64()).view(pa.timestamp("us")), ["1970-01-01", "1969-12-31"]),
    "seconds": (pa.array([86_399, -1], pa.timestamp("s")), ["1970-01-01", "1969-12-31"]),
    "nanoseconds": (pa.array([86_399_999_999_999, -1], pa.timestamp("ns")), ["1970-01-01", "1969-12-31"]),
    "zoned": (pa.array([datetime(2026, 1, 3, 23, tzinfo=EAST), datetime(2026, 1, 3, 0, tzinfo=EAST)],
                       pa.timestamp("ms", "+03:00")), ["2026-01-03", "2026-01-02"]),
    "strings": (pa.array(["2026-01-03", "2026-01-03T23:30-05:00"]), ["2026-01-03", "2026-01-04"]),
    "more strings": (pa.array(["2026-01-03 23:59:59.999999999Z", "2026-01-03T00:10+0200"]), ["2026-01-03", "2026-01-02"]),
    "first and last": (pa.array(["0001-01-01", "9999-12-31T23:59:59Z"]), ["0001-01-01", "9999-12-31"]),
}  # fmt: skip


@pytest.mark.parametrize("name", TIMES)
def test_times_partition_by_their_utc_year_month_or_day(tmp_path: Path, name: str) -> None:
    times, days = TIMES[name]
    manifest = parquet(tmp_path / "m.parquet", {"uri": ["a", "b"], "t": times})
    for number, (function, length) in enumerate({"date": 10, "month": 7, "year": 4}.items()):
        planned = plan(manifest, pinned=tmp_path / f"pinned{number}", partition_by=(f"{function}:t",))
        by_uri = dict(zip(planned.column("uri"), planned.column(PARTITION), strict=True))
        assert [by_uri[f"{tmp_path}/{uri}"] for uri in "ab"] == [f"{function}={day[:length]}" for day in days]
        assert sorted(planned.column("t"), key=str) == sorted(times.to_pylist(), key=str)  # the column is carried along


NO_TIMES = [
    "epoch", "infinity", "20260103", "2026-1-3", "2026-02-30", "2026-01", "2026-01-03 Europe/Berlin", " 2026-01-03",
    "03.01.2026", "2026-01-03T25:00Z", "0000-01-01", "9999-12-31T23:59-05:00", "+12026-01-03", "1767398400",
]  # fmt: skip


@pytest.mark.parametrize("value", NO_TIMES)
def test_a_string_that_is_no_iso_time_is_refused_with_its_row(tmp_path: Path, value: str) -> None:
    manifest = text(tmp_path / "m.csv", f"uri,t\na,2026-01-03\nb,{value}\n")
    wanted = (
        f"column 't' is not an ISO date or time such as 2026-01-03 or 2026-01-03T04:05:06Z in 1 row: {manifest} row 1"
    )
    assert f"{wanted} ({value!r})" in refusal(manifest, partition_by=("date:t",))


def test_a_time_that_no_calendar_has_is_refused(tmp_path: Path) -> None:
    times = pa.array([0, 2**63 - 1], pa.int64()).view(pa.timestamp("us"))
    manifest = parquet(tmp_path / "m.parquet", {"uri": ["a", "b"], "t": times})
    assert f"in 1 row: {manifest} row 1" in refusal(manifest, partition_by=("date:t",))
    manifest = parquet(tmp_path / "n.parquet", {"uri": ["a", "b"], "t": pa.array([1, None], pa.timestamp("s"))})
    assert f"column 't' is null or empty in 1 row: {manifest} row 1" in refusal(manifest, partition_by=("date:t",))


def test_derived_and_plain_partitions_stand_side_by_side_under_the_names_asked_for(tmp_path: Path) -> None:
    manifest = text(
        tmp_path / "m.csv",
        "uri,site,t,date,content_last_modified\na,x,2026-01-03,old,2026-01-05T00:00Z\nb,x,2026-02-03,old,2026-01-05T00:00Z\n",
    )
    assert "--partition-by t_date=date:t" in refusal(manifest, partition_by=("date:t",), columns=("date",))
    by = ("site", "day=date:t", "month:content_last_modified")
    planned = plan(manifest, pinned=tmp_path / "pinned", partition_by=by, columns=("date",))
    assert planned.partitions == (
        ("site=x/day=2026-01-03/month=2026-01", 1), ("site=x/day=2026-02-03/month=2026-01", 1),
    )  # fmt: skip
    assert list(planned.columns) == ["site", "date"]  # t was asked for its day only


def test_too_many_days_are_blamed_on_the_key(tmp_path: Path) -> None:
    manifest = text(tmp_path / "m.csv", "uri,t\n" + "".join(f"u{i},2026-01-{i + 1:02}\n" for i in range(9)))
    message = refusal(manifest, partition_by=("month:t", "date:t"), max_files=5)
    assert "wanted a coarser partition column than 'date' (9 values)" in message
    assert plan(manifest, pinned=tmp_path / "pinned", partition_by=("month:t",)).partitions == (("month=2026-01", 9),)


def test_rows_are_ordered_by_partition_then_padded_shape_then_place(tmp_path: Path) -> None:
    sizes = {"A": (640, 480), "B": (480, 640), "C": (1000, 200), "D": (645, 482), "E": (None, 480), "F": (2, 1)}
    names = [f"{shape}{i}" for i in range(6) for shape in sizes]
    random.Random(0).shuffle(names)
    table = {
        "uri": names,
        "p": [int(name[1]) % 2 for name in names],
        "width": pa.array([sizes[name[0]][0] for name in names], pa.int32()),
        "height": pa.array([sizes[name[0]][1] for name in names], pa.int64()),
    }
    planned = plan(
        parquet(tmp_path / "m.parquet", table), pinned=tmp_path / "pinned", partition_by=("p",), shard_rows=5
    )
    got = [Path(uri).name for uri in planned.column("uri")]
    assert [int(name[1]) % 2 for name in got] == [0] * 18 + [1] * 18
    for half in (got[:18], got[18:]):
        groups = ["AD" if name[0] in "AD" else name[0] for name in half]  # A and D are padded alike: 800 × 1088
        assert sum(a != b for a, b in pairwise(groups)) == len(set(groups)) - 1
        for shape in set(groups):
            members = [name for name in half if name[0] in shape]
            assert members == [name for name in names if name in members]


@pytest.mark.parametrize("at_once", [1, 7, 40, 200, 1000])
def test_a_plan_that_is_sorted_in_parts_is_the_one_that_is_sorted_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Most rows in one group of one path and shape, which is cut by place; the others in many small ones."""
    dice = random.Random(at_once)
    common = [dice.random() < 0.6 for _ in range(400)]
    table = {
        "uri": [f"u{i}" for i in range(400)],
        "p": ["it's" if c else dice.choice(["a", "é", "z z", "~", "A"]) for c in common],
        "width": [640 if c else dice.choice([100, 300, 640, 900]) for c in common],
        "height": pa.array([480 if c else dice.choice([None, 100, 480, 800]) for c in common], pa.int32()),
    }
    manifest = parquet(tmp_path / "m.parquet", table)
    for number, settings in enumerate(({"partition_by": ("p",)}, {})):
        asked = {"shard_rows": 9, **settings}
        wanted = plan(manifest, pinned=tmp_path / f"whole{number}", **asked)
        with monkeypatch.context() as patch:
            patch.setattr("fcos_ray.inputs.pin._SORTED_AT_ONCE", at_once)
            got = plan(manifest, pinned=tmp_path / f"parts{number}", **asked)
        assert got.rows.num_rows == 400
        assert got.shards == wanted.shards
    monkeypatch.setattr("fcos_ray.inputs.pin._SORTED_AT_ONCE", at_once)
    policy = FetchPolicy(allow_roots=(str(tmp_path),))
    with draft_plan(find_sources([str(manifest)]), PlanSettings(partition_by=("p",), fetch=policy)) as draft:
        rows = [
            count_rows(draft.connection, f"SELECT count(*) FROM planned p WHERE {p}") for p in _parts(draft.connection)
        ]
    assert sum(rows) == 400
    assert at_once < 40 or max(rows) < 2 * at_once, "places are not dealt out evenly; few rows are uneven"


def test_shards_have_the_planned_sizes_and_never_cross_partitions(tmp_path: Path) -> None:
    partitions = [i % 3 for i in range(100)] + [2] * 7
    manifest = parquet(tmp_path / "m.parquet", {"uri": [str(i) for i in range(107)], "p": partitions})
    planned = plan(manifest, pinned=tmp_path / "pinned", partition_by=("p",), shard_rows=10)
    assert [(s.num_rows, set(s["p"].to_pylist())) for s in planned.shards] == (
        [(10, {0})] * 3 + [(4, {0})] + [(10, {1})] * 3 + [(3, {1})] + [(10, {2})] * 4
    )


@pytest.mark.parametrize(("rows", "wanted"), [(1, 64), (32_000, 64), (32_001, 65), (100_000, 200)])
def test_shard_size_follows_the_job(tmp_path: Path, rows: int, wanted: int) -> None:
    manifest = parquet(tmp_path / "m.parquet", {"uri": pa.array(range(rows)).cast(pa.string())})
    sources = find_sources([str(manifest)])
    with draft_plan(sources, PlanSettings(fetch=FetchPolicy(allow_roots=(str(tmp_path),)))) as draft:
        assert draft.shard_rows == wanted
        assert draft.num_rows == rows
        assert draft.num_shards == -(-rows // wanted)


def test_pinned_files_hold_at_most_64_shards_and_each_shard_is_one_row_group(tmp_path: Path) -> None:
    manifest = parquet(tmp_path / "m.parquet", {"uri": [f"{i:03}" for i in range(400)]})
    planned = plan(manifest, pinned=tmp_path / "pinned", shard_rows=3)
    assert [(f.name, f.first_shard, len(f.shard_rows)) for f in planned.files] == [
        ("00000.parquet", 0, 64), ("00001.parquet", 64, 64), ("00002.parquet", 128, 6),
    ]  # fmt: skip
    assert GROUPS_PER_FILE == 64
    for file in planned.files:
        metadata = pq.ParquetFile(tmp_path / "pinned" / file.name).metadata
        assert tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)) == file.shard_rows
    assert [s.num_rows for s in planned.shards] == [n for f in planned.files for n in f.shard_rows] == [3] * 133 + [1]
    assert planned.column("uri") == [f"{tmp_path}/{i:03}" for i in range(400)]


def test_content_columns_are_pinned_with_the_outputs_types(tmp_path: Path) -> None:
    manifest = text(
        tmp_path / "m.csv",
        "uri,content_bytes,content_etag,content_last_modified,content_sha256\n"
        "a,12,0e5,2024-01-02 03:04:05+02:00,ab\nb,,,,\n",
    )
    rows = plan(manifest, pinned=tmp_path / "pinned").rows
    assert rows["content_bytes"].to_pylist() == [12, None]
    assert rows["content_etag"].to_pylist() == ["0e5", None]
    assert rows["content_last_modified"].cast(pa.string()).to_pylist() == ["2024-01-02 01:04:05.000000Z", None]


def test_a_plan_in_s3_reads_back_shard_by_shard(s3_bucket: str, tmp_path: Path) -> None:
    uris = [f"k{i}.jpg" for i in range(100)]
    manifest = put(f"{s3_bucket}/m/m.parquet", pa.table({"uri": uris, "p": [f"é {i % 2}/" for i in range(100)]}))
    planned = plan(manifest, pinned=f"{s3_bucket}/out", partition_by=("p",), shard_rows=20)
    assert sorted(planned.column("uri")) == sorted(f"{s3_bucket}/m/{uri}" for uri in uris)
    assert [path for path, _ in planned.partitions] == ["p=%C3%A9%200%2F", "p=%C3%A9%201%2F"]
    assert [f.uri for f in storage.list_files(f"{s3_bucket}/out")] == [f"{s3_bucket}/out/00000.parquet"]


def test_two_hundred_thousand_rows_come_out_once_each(tmp_path: Path) -> None:
    count = 200_000
    rng = random.Random(0)
    table = pa.table(
        {
            "uri": [f"images/{i % 977}/{i}.jpg" for i in range(count)],
            "image_id": pa.array(range(count)),
            "width": pa.array([rng.choice([640, 480, 1024]) for _ in range(count)], pa.int16()),
            "height": pa.array([rng.choice([640, 480, 333]) for _ in range(count)], pa.int16()),
            "day": [f"2024-01-{1 + i % 28:02}" for i in range(count)],
        }
    )
    pq.write_table(table, tmp_path / "m.parquet", row_group_size=10_000)
    pinned = tmp_path / "pinned"
    settings = PlanSettings(
        partition_by=("day",), fetch=FetchPolicy(allow_roots=(str(tmp_path),)), reserved_columns=RESERVED_COLUMNS
    )
    with draft_plan(find_sources([str(tmp_path / "m.parquet")]), settings) as draft:
        files = pin(draft, str(pinned))
        assert draft.shard_rows == 400
    whole = pa.concat_tables(pq.read_table(pinned / f.name) for f in files)
    assert Counter(whole["image_id"].to_pylist()) == Counter(map(str, range(count)))
    some = rng.sample(range(sum(len(f.shard_rows) for f in files)), 5)
    for k in some:
        shard = read_shard(str(pinned), files, k)
        for row in shard.to_pylist():
            i = int(row["image_id"])
            assert row["uri"] == f"{tmp_path}/images/{i % 977}/{i}.jpg"
            assert row[PARTITION] == f"day={row['day']}" == f"day=2024-01-{1 + i % 28:02}"


def test_planning_the_same_manifest_twice_gives_the_same_shards(tmp_path: Path) -> None:
    manifest = jsonl(tmp_path / "m.jsonl", *({"uri": str(i), "p": i % 7} for i in range(500)))
    one, two = (plan(manifest, pinned=tmp_path / f"p{i}", partition_by=("p",), shard_rows=9) for i in range(2))
    assert one.files == two.files
    assert all(a.equals(b) for a, b in zip(one.shards, two.shards, strict=True))


@pytest.mark.parametrize(
    ("type_", "value"),
    [
        (pa.timestamp("ms"), 2**63 - 1),  # DuckDB's infinity
        (pa.timestamp("ms", tz="UTC"), 1 - 2**63),
        (pa.list_(pa.timestamp("ms")), [2**63 - 1]),
        (pa.timestamp("ms"), 2**63 // 1000 + 1),  # no number of microseconds
        (pa.list_(pa.timestamp("s")), [2**62 // 1000]),
        (pa.time64("us"), 86_400_000_001),
    ],
    ids=str,
)
def test_times_that_cannot_come_back_equal_are_refused_by_column(
    tmp_path: Path, type_: pa.DataType, value: Any
) -> None:
    rows = {"uri": ["a.jpg", "b.jpg"], "fine": [1, 2], "taken at": pa.array([None, value], type_)}
    with pytest.raises(ManifestError, match="column 'taken at'") as refused:
        plan(parquet(tmp_path / "m.parquet", rows), pinned=tmp_path / "pinned")
    assert "\n" not in str(refused.value)
