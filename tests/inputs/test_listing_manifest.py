"""A folder or bucket becomes a manifest that holds each image once, in order, and that a plan takes as it is."""

from __future__ import annotations

import io
import logging
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fcos_ray import storage
from fcos_ray.errors import ManifestError, OutputError, UserError
from fcos_ray.inputs.decode import decode
from fcos_ray.inputs.fetch import FetchPolicy
from fcos_ray.inputs.listing import ListingSettings, ListingSummary, write_listing
from fcos_ray.inputs.names import Names, hive_values
from fcos_ray.sample import write_sample
from fcos_ray.storage import scanning
from tests.inputs.planning import plan

ODD = [
    "a b.jpg",
    "100%.jpg",
    "a%20b.jpg",
    "é 日本.jpg",
    "why?.jpg",
    "[1]*.jpg",
    "k=v.jpg",
    "a+b&c#d.jpg",
    "it's.JPG",
    "a:b@c.jpg",
]


def fill(folder: Path, *names: str, data: bytes = b"12345") -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def listed(folder: Path | str, output: Path | str, **settings: Any) -> tuple[pa.Table, ListingSummary]:
    summary = write_listing(str(folder), str(output), ListingSettings(**settings))
    with storage.open_for_reading(str(output)) as file:
        return pq.read_table(file), summary


def ids(folder: Path, output: Path, **settings: Any) -> list[str]:
    return listed(folder, output, **settings)[0]["image_id"].to_pylist()


# ---- a local folder


def test_each_image_is_one_row_with_what_the_disk_knows(tmp_path: Path) -> None:
    root = fill(tmp_path / "root", "b.jpg", "deep/er/a.PNG", "a.jpg", "notes.txt", "noending")
    os.utime(root / "a.jpg", ns=(0, 1_767_398_400_123_456_789))
    table, summary = listed(root, tmp_path / "m.parquet")
    assert table.column_names == [
        "uri", "image_id", "width", "height", "content_bytes", "content_etag", "content_last_modified",
    ]  # fmt: skip
    assert table["image_id"].to_pylist() == ["a.jpg", "b.jpg", "deep/er/a.PNG"]
    assert table["uri"].to_pylist() == [f"{root}/{name}" for name in ("a.jpg", "b.jpg", "deep/er/a.PNG")]
    assert table["content_bytes"].to_pylist() == [5, 5, 5]
    assert table["content_etag"].null_count == table["width"].null_count == table["height"].null_count == 3
    assert table["content_last_modified"][0].as_py() == datetime(2026, 1, 3, 0, 0, 0, 123_456, UTC)
    assert (summary.rows, summary.bytes, summary.skipped, summary.refused, summary.unprobed) == (3, 15, 2, 0, 0)


def test_odd_names_are_rows_that_a_plan_takes_as_themselves(tmp_path: Path) -> None:
    root = fill(tmp_path / "root", *ODD, *(f"x = %/{name}" for name in ODD))
    table, summary = listed(root, tmp_path / "m.parquet")
    assert sorted(table["image_id"].to_pylist()) == sorted([*ODD, *(f"x = %/{name}" for name in ODD)])
    assert summary.refused == 0
    policy = FetchPolicy(allow_roots=(str(root),))
    planned = plan(tmp_path / "m.parquet", pinned=tmp_path / "pinned", fetch=policy)
    assert planned.uris_refused == 0
    assert sorted(planned.column("uri")) == sorted(f"{root}/{image_id}" for image_id in table["image_id"].to_pylist())


def test_a_name_that_no_manifest_can_hold_is_left_out_counted_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = fill(tmp_path / "root", "a.jpg", "a\nb.jpg")
    Path(os.fsdecode(bytes(root) + b"/\xff.jpg")).write_bytes(b"")
    with caplog.at_level(logging.WARNING, "fcos_ray"):
        table, summary = listed(root, tmp_path / "m.parquet")
    assert (table["image_id"].to_pylist(), summary.refused) == (["a.jpg"], 2)
    assert "not UTF-8" in caplog.text
    assert "control character" in caplog.text


def test_links_to_files_are_files_and_linked_folders_are_not_entered(tmp_path: Path) -> None:
    root, elsewhere = fill(tmp_path / "root", "a.jpg"), fill(tmp_path / "elsewhere", "b.jpg")
    (root / "link.jpg").symlink_to(root / "a.jpg")
    (root / "gone.jpg").symlink_to(root / "none.jpg")
    (root / "loop").symlink_to(root)
    (root / "folder").symlink_to(elsewhere)
    os.mkfifo(root / "pipe.jpg")
    assert ids(root, tmp_path / "m.parquet") == ["a.jpg", "link.jpg"]
    (tmp_path / "linked").symlink_to(root)
    table, _ = listed(tmp_path / "linked", tmp_path / "m2.parquet")
    assert table["uri"][0].as_py() == f"{tmp_path}/linked/a.jpg"


def test_folders_named_key_value_become_columns_of_strings(tmp_path: Path) -> None:
    names = [
        "day=2026-01-03/site=north%20gate/a.jpg", "day=007/b.jpg", "day=__HIVE_DEFAULT_PARTITION__/c.jpg",
        "x/day=1/day=2/d.jpg", "plain/k=v.jpg", "uri=x/e.jpg", "=x/f.jpg", "a b=x/g.jpg",
    ]  # fmt: skip
    table, _ = listed(fill(tmp_path / "root", *names), tmp_path / "m.parquet")
    assert table.column_names[:5] == ["uri", "image_id", "day", "site", "width"]
    assert table.schema.field("day").type == pa.string()
    found = dict(zip(table["image_id"].to_pylist(), table["day"].to_pylist(), strict=True))
    assert [found[name] for name in names] == ["2026-01-03", "007", None, "2", None, None, None, None]
    assert [value for value in table["site"].to_pylist() if value] == ["north gate"]
    assert hive_values("day=1/x") == {"day": "1"}


def test_folders_that_differ_in_case_or_make_too_many_columns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"columns 'Day' and 'day' differ in case only"):
        listed(fill(tmp_path / "root", "Day=1/a.jpg", "day=2/b.jpg"), tmp_path / "m.parquet")
    for number, own in enumerate(["Width=3/a.jpg", "URI=3/a.jpg"]):
        table, _ = listed(fill(tmp_path / str(number), own), tmp_path / f"{number}.parquet")
        assert not {"Width", "URI"} & set(table.column_names)
    many = fill(tmp_path / "many", *(f"k{i}=1/a.jpg" for i in range(65)))
    with pytest.raises(ManifestError, match=r"more than 64 partition columns \(k0, k1, k10, …\); list them apart"):
        listed(many, tmp_path / "m.parquet")
    assert not (tmp_path / "m.parquet").exists()


GLOBS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "what decode reads": ({}, ["a.jpg", "thumbs/b.jpg", "x/B.JPEG", "x/thumbs/c.png", "x/y/d.tif"]),
    "one ending at any depth": ({"include": ("*.jpg",)}, ["a.jpg", "thumbs/b.jpg"]),
    "ignoring case": ({"include": ("*.jpeg", "*.TXT")}, ["x/B.JPEG", "x/n.txt"]),
    "one level": ({"include": ("x/*",)}, ["x/B.JPEG", "x/n.txt", "x/other"]),
    "any level": ({"include": ("x/**",)}, ["x/B.JPEG", "x/n.txt", "x/other", "x/thumbs/c.png", "x/y/d.tif"]),
    "without a folder": ({"exclude": ("thumbs/",)}, ["a.jpg", "x/B.JPEG", "x/thumbs/c.png", "x/y/d.tif"]),
    "without a folder anywhere": ({"exclude": ("**/thumbs/**",)}, ["a.jpg", "x/B.JPEG", "x/y/d.tif"]),
    "a set of characters": ({"include": ("[ab].*",), "exclude": ("[!a]*.jpg",)}, ["a.jpg", "x/B.JPEG"]),
    "one character": ({"include": ("x/?/d.???",)}, ["x/y/d.tif"]),
    "everything": ({"include": ("*",), "exclude": ("*.*",)}, ["x/other"]),
}  # fmt: skip


@pytest.mark.parametrize("case", GLOBS)
def test_globs_choose_files_by_name_or_by_path(tmp_path: Path, case: str) -> None:
    settings, wanted = GLOBS[case]
    names = ["a.jpg", "x/B.JPEG", "x/n.txt", "x/y/d.tif", "x/thumbs/c.png", "thumbs/b.jpg", "x/other"]
    table, summary = listed(fill(tmp_path / "root", *names), tmp_path / "m.parquet", **settings)
    assert table["image_id"].to_pylist() == wanted
    assert summary.skipped == len(names) - len(wanted)


@pytest.mark.parametrize("name", ["a.b", "a+b", "a^b", "a-b", "a\\b", "[a", "a]", "(a|b)", "{a}", "$a"])
def test_what_is_no_wildcard_means_itself(name: str) -> None:
    assert Names((name,), (), root="/r").fits(name)
    assert not Names((name,), (), root="/r").fits("axb")


@pytest.mark.parametrize(
    ("glob", "fitting", "not_fitting"),
    [
        ("a[].jpg", "a[].jpg", "a.jpg"),
        ("[]].jpg", "].jpg", "a.jpg"),
        ("x[!y]z.jpg", "xaz.jpg", "x/z.jpg"),
        ("[^a].jpg", "^.jpg", "b.jpg"),
        ("[a-c&&d].jpg", "b.jpg", "e.jpg"),
    ],
)
def test_odd_sets_of_characters_are_taken_as_they_are_written(glob: str, fitting: str, not_fitting: str) -> None:
    names = Names((f"**/{glob}",), (), root="/r")
    assert names.fits(fitting)
    assert not names.fits(not_fitting)


# ---- the same on a local disk and on a real S3 server


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "root") if request.param == "local" else f"{request.getfixturevalue('s3_bucket')}/a prefix/r"


def create_all(uris: list[str], data: Callable[[str], bytes] = lambda uri: uri.encode()) -> None:
    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(lambda uri: storage.create(uri, data(uri)), uris))


def test_thousands_of_files_in_nested_folders_are_listed_once_each_in_order(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scanning, "_STEP_FILES", 100)
    monkeypatch.setattr(scanning, "_FLAT_PAGES", 1)
    rng = random.Random(0)
    names = {f"day={rng.randint(1, 9)}/{rng.choice(['a', 'b/c', 'b/c/é ü'])}/{i:05}.jpg" for i in range(1300)}
    names |= {f"big/{i:05}.jpg" for i in range(1200)} | set(ODD) | {f"odd ?%/{name}" for name in ODD}  # big/: two pages
    beside = [f"{folder}2/beside.jpg", f"{folder[:-1]}/above.jpg"]
    create_all([*(f"{folder}/{name}" for name in names), *beside])
    table, summary = listed(folder, tmp_path / "m.parquet")
    assert table["image_id"].to_pylist() == sorted(names)
    assert table["uri"].to_pylist() == [f"{folder}/{name}" for name in sorted(names)]
    assert table["content_bytes"].to_pylist() == [len(uri.encode()) for uri in table["uri"].to_pylist()]
    assert summary.rows == len(names)
    assert summary.refused == 0
    again, _ = listed(folder + "/", tmp_path / "m2.parquet")
    assert again.equals(table)
    planned = plan(
        str(tmp_path / "m.parquet"), pinned=tmp_path / "pinned", fetch=FetchPolicy(allow_roots=(str(tmp_path),))
    )
    assert sorted(planned.column("uri")) == table["uri"].to_pylist()
    content = planned.rows.select(["content_bytes", "content_last_modified"])
    assert all(column.null_count == 0 for column in content.columns)
    assert planned.rows["content_etag"].null_count == (0 if folder.startswith("s3") else len(names))


def test_a_bucket_cut_into_ranges_gives_every_key_once(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"p{i % 40:02}/q{i % 7}/{i}" for i in range(2300)] + [
        "p37",
        "p37.jpg",
        "p37/q0",
        "zz",
        "日本/x",
        "😀",
        "!",
    ]
    create_all([f"{s3_bucket}/{name}" for name in names])
    storage.s3().call_s3("put_object", Bucket=s3_bucket[5:], Key="p37/", Body=b"")  # a folder, to consoles
    for flat_pages, ranges in [(10, 64), (1, 1), (1, 5), (1, 64)]:
        monkeypatch.setattr(scanning, "_FLAT_PAGES", flat_pages)
        monkeypatch.setattr(scanning, "_RANGES", ranges)
        found = [file.uri for files in storage.scan_files(s3_bucket) for file in files]
        assert sorted(found) == sorted(f"{s3_bucket}/{name}" for name in names), (flat_pages, ranges)


def test_a_manifest_may_lie_in_s3_and_is_refused_or_replaced_whole(folder: str) -> None:
    create_all([f"{folder}/a.jpg"])
    output = f"{folder}/manifests/m.parquet"
    table, _ = listed(folder, output)
    assert table.num_rows == 1
    create_all([f"{folder}/b.jpg"])
    with pytest.raises(OutputError, match=r"m\.parquet is there already; --overwrite replaces it"):
        listed(folder, output)
    assert listed(folder, output, overwrite=True)[0].num_rows == 2
    assert [file.uri for file in storage.list_files(f"{folder}/manifests")] == [output]


def test_an_output_that_appears_while_listing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, output = fill(tmp_path / "root", "a.jpg"), tmp_path / "m.parquet"
    scan = storage.scan_files

    def slow_scan(folder: str) -> Any:
        output.write_bytes(b"theirs")
        return scan(folder)

    monkeypatch.setattr(storage, "scan_files", slow_scan)
    with pytest.raises(OutputError, match="is there already"):
        listed(root, output)
    assert output.read_bytes() == b"theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.parquet", "root"]


# ---- sizes


def picture(orientation: int, exif_bytes: int = 0) -> bytes:
    exif, buffer = PIL.Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    if exif_bytes:
        exif[0x010E] = "x" * exif_bytes
    comment = b"c" * 60_000 if exif_bytes else b""
    PIL.Image.new("RGB", (40, 30)).save(buffer, "JPEG", exif=exif, comment=comment)
    return buffer.getvalue()


def test_sizes_are_read_from_the_first_bytes_and_what_has_none_is_counted(folder: str, tmp_path: Path) -> None:
    files = {
        "1.jpg": picture(1), "2.jpg": picture(6), "3.jpg": picture(6, 60_000), "4.jpg": b"", "5.jpg": b"junk" * 50_000,
        "6.jpg": picture(8) + b"x" * 2**21,
    }  # fmt: skip
    assert len(files["3.jpg"]) > 2**16, "its size stands behind the first 64 KiB"
    create_all([f"{folder}/{name}" for name in files], lambda uri: files[uri.rpartition("/")[2]])
    table, summary = listed(folder, tmp_path / "m.parquet", probe_size=True)
    sizes = list(zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True))
    assert sizes == [(40, 30), (30, 40), (30, 40), (None, None), (None, None), (30, 40)]
    assert (summary.rows, summary.unprobed) == (6, 2)


def test_the_drawn_corpus_is_listed_with_the_sizes_that_decoding_gives(tmp_path: Path) -> None:
    write_sample(tmp_path / "corpus", num_images=30, seed=4, num_broken=0)
    table, summary = listed(tmp_path / "corpus", tmp_path / "m.parquet", probe_size=True)
    for row in table.to_pylist():
        image = decode(Path(row["uri"]).read_bytes())
        assert (row["width"], row["height"]) == (image.width, image.height)
    assert (summary.rows, summary.unprobed) == (30, 0)


def test_an_image_that_cannot_be_read_is_a_row_without_size(tmp_path: Path) -> None:
    outside = fill(tmp_path, "outside.jpg", data=picture(1)) / "outside.jpg"
    root = fill(tmp_path / "root", "a.jpg", data=picture(1))
    (root / "link.jpg").symlink_to(outside)  # a job would not read it either
    table, summary = listed(root, tmp_path / "m.parquet", probe_size=True)
    assert table["width"].to_pylist() == [40, None]
    assert summary.unprobed == 1


# ---- one clear error each


BAD: dict[str, tuple[str, str, dict[str, Any], str]] = {  # input, output, settings, what the message says (R: the folder)
    "no folder": ("R/none", "R/m.parquet", {}, "input R/none: there is no such folder or bucket"),
    "a file": ("R/a.jpg", "R/m.parquet", {}, "input R/a.jpg is a file; wanted the folder it lies in"),
    "no image": ("R/texts", "R/m.parquet", {}, "R/texts: none of its 1 files fits --include and --exclude; wanted *.jpg"),
    "an empty folder": ("R/empty", "R/m.parquet", {}, "input R/empty: there is no file in it; wanted *.jpg, *.jpeg"),
    "another scheme": ("http://host/x", "R/m.parquet", {}, "wanted a local folder or an s3:// prefix, got http://"),
    "a password": ("s3://me:secret@b/x", "R/m.parquet", {}, "input 's3://b/x' is not a uri: holds user information"),
    "another format": ("R", "R/m.csv", {}, "output R/m.csv: wanted a name that ends in .parquet"),
    "an output nobody can make": ("R", "R/a.jpg/m.parquet", {}, "output R/a.jpg/m.parquet cannot be written: "),
    "an output that is no uri": ("R", "s3://me:secret@b/m.parquet", {}, "output s3://b/m.parquet is not a uri"),
    "a bad glob": ("R", "R/m.parquet", {"include": ("[z-a].jpg",)}, "--include [z-a].jpg: wanted a glob such as *.jpg"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_listed_or_written_is_said(tmp_path: Path, case: str) -> None:
    folder, output, settings, wanted = BAD[case]
    fill(tmp_path, "a.jpg", "texts/a.txt")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    where = str(tmp_path)
    with pytest.raises(UserError) as error:
        listed(folder.replace("R", where), output.replace("R", where), **settings)
    assert wanted.replace("R", where) in str(error.value)
    assert "secret" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bucket_or_prefix_that_is_not_there_is_said(s3_bucket: str, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"input s3://no-such-bucket-here: there is no such folder or bucket"):
        listed("s3://no-such-bucket-here", tmp_path / "m.parquet")
    with pytest.raises(ManifestError, match=rf"input {s3_bucket}/none: there is no file in it"):
        listed(f"{s3_bucket}/none", tmp_path / "m.parquet")
    with pytest.raises(OutputError, match=r"output s3://no-such-bucket-here/m\.parquet cannot be written: "):
        listed(fill(tmp_path / "root", "a.jpg"), "s3://no-such-bucket-here/m.parquet")


def test_a_folder_that_fails_in_the_middle_is_no_short_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = fill(tmp_path / "root", "a/1.jpg", "b/2.jpg")
    scandir = os.scandir

    def denied(path: Any) -> Any:
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(ManifestError, match=r"root cannot be listed: listing .*/root/b: PermissionError"):
        listed(root, tmp_path / "m.parquet")
    assert not (tmp_path / "m.parquet").exists()


def test_parts_are_listed_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fill(tmp_path / "root", *(f"{i}/a.jpg" for i in range(32)))
    scandir = os.scandir

    def slow(path: Any) -> Any:
        time.sleep(0.1)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", slow)
    started = time.monotonic()
    assert len(ids(root, tmp_path / "m.parquet")) == 32
    assert time.monotonic() - started < 2, "one after the other they take 3.3 s"
