"""What of a manifest is taken, given what was labelled before: class by class, and in words."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcos_ray import storage
from fcos_ray.errors import ManifestError, OutputError
from fcos_ray.inputs.fetch import FetchPolicy
from fcos_ray.inputs.manifests import find_sources
from fcos_ray.inputs.partitions import HIVE_NULL
from fcos_ray.inputs.pin import pin
from fcos_ray.inputs.pinned_files import read_shard
from fcos_ray.inputs.plan import Draft, PlanSettings, draft_plan
from fcos_ray.inputs.selection import History, SelectSettings
from fcos_ray.outputs.index import INDEX_SCHEMA
from fcos_ray.outputs.schema import RESERVED_COLUMNS

THEN = datetime(2026, 1, 1, tzinfo=UTC)


def index(path: Path, rows: Mapping[str, Mapping[str, Any]]) -> storage.StoredFile:
    """The index of a run: image_id -> what differs from an image that was labelled."""
    plain = {"uri": "s3://corpus/x.jpg", "status": "ok", "partition": ""}
    table = pa.Table.from_pylist([{"image_id": i, **plain, **row} for i, row in sorted(rows.items())], INDEX_SCHEMA)
    pq.write_table(table, path)
    found = storage.stat_file(str(path))
    assert found is not None
    return found


def history(folder: Path, *runs: Mapping[str, Mapping[str, Any]]) -> History:
    ids = [f"{number:06d}-aaaaaaaa" for number in range(1, len(runs) + 1)]
    return History(tuple(ids), tuple(index(folder / f"{i}.parquet", rows) for i, rows in zip(ids, runs, strict=True)))


@contextmanager
def draft(
    folder: Path, manifest: Mapping[str, Any], known: History | None = None, partition_by: str = "", **select: Any
) -> Iterator[Draft]:
    columns = {"uri": [f"s3://corpus/{i}.jpg" for i in manifest["image_id"]], **manifest}
    pq.write_table(pa.table(columns), folder / "m.parquet")
    settings = PlanSettings(
        fetch=FetchPolicy(allow_roots=(str(folder),)),
        select=SelectSettings(**select),
        partition_by=tuple(filter(None, [partition_by])),
        reserved_columns=RESERVED_COLUMNS,
    )
    with draft_plan(find_sources([str(folder / "m.parquet")]), settings, known) as drafted:
        yield drafted


def taken(drafted: Draft) -> list[str]:
    rows = drafted.connection.execute("SELECT image_id FROM planned WHERE NOT deleted ORDER BY number").fetchall()
    return [row[0] for row in rows]


FAILED = {"status": "error", "error_code": "fetch_failed", "error_transient": True}
CORRUPT = {"status": "error", "error_code": "corrupt", "error_transient": False}
KNOWN = {
    "good": {"content_etag": "1"},
    "grown": {"content_etag": "1"},
    "failed": FAILED,
    "corrupt": CORRUPT,
    "gone": {"content_etag": "1"},
}
MANIFEST = {
    "image_id": ["good", "grown", "failed", "corrupt", "fresh"],
    "content_etag": ["1", "2", None, None, "1"],
}
CHOICES = {
    ("new", "changed"): ["grown", "fresh"],
    ("new",): ["fresh"],
    ("changed",): ["grown"],
    ("failed",): ["failed"],
    ("failed:all",): ["failed", "corrupt"],
    ("new", "changed", "failed"): ["grown", "failed", "fresh"],
    ("all",): ["good", "grown", "failed", "corrupt", "fresh"],
}


@pytest.mark.parametrize("select", CHOICES)
def test_each_choice_takes_its_rows(tmp_path: Path, select: tuple[str, ...]) -> None:
    with draft(tmp_path, MANIFEST, history(tmp_path, KNOWN), select=select) as drafted:
        assert taken(drafted) == CHOICES[select]
        found = drafted.selection
        assert (found.manifest, found.new, found.changed, found.failed, found.failed_for_good, found.up_to_date) == (
            5, 1, 1, 1, 1, 1,
        )  # fmt: skip
        assert found.selected == drafted.num_rows == len(CHOICES[select])


def test_the_log_says_it_in_a_line(tmp_path: Path) -> None:
    with draft(tmp_path, MANIFEST, history(tmp_path, KNOWN)) as drafted:
        assert drafted.selection.describe() == (
            "5 in the manifest: 1 new, 1 changed, 1 failed before, 1 failed for good, 1 up to date; 2 selected"
        )


def test_without_history_all_is_new(tmp_path: Path) -> None:
    with draft(tmp_path, MANIFEST) as drafted:
        assert drafted.selection.new == drafted.num_rows == 5
    with draft(tmp_path, MANIFEST, select=("failed",)) as drafted:
        assert (drafted.selection.new, drafted.num_rows) == (5, 0)


def test_the_newest_run_that_has_an_image_counts(tmp_path: Path) -> None:
    runs: list[dict[str, Any]] = [
        {"a": FAILED, "b": {"content_etag": "1"}, "c": {"content_etag": "1"}},
        {"a": {"content_etag": "2"}, "b": FAILED},
        {"c": {"status": "deleted"}},
    ]
    manifest = {"image_id": ["a", "b", "c"], "content_etag": ["2", "1", "1"]}
    with draft(tmp_path, manifest, history(tmp_path, *runs), select=("new",)) as drafted:
        found = drafted.selection
        assert (found.up_to_date, found.failed, found.new) == (1, 1, 1), "a deleted image that is back is new"
        assert taken(drafted) == ["c"]


DAY = timedelta(days=1)
# what was labelled, what the manifest says now -> has it changed?
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "another hash": ({"content_sha256": "a"}, {"content_sha256": "b"}, True),
    "the same hash, touched since": (
        {"content_sha256": "a", "content_last_modified": THEN},
        {"content_sha256": "a", "content_last_modified": THEN + DAY},
        False,
    ),
    "another etag": ({"content_etag": "1"}, {"content_etag": "2"}, True),
    "the same etag, copied since": (
        {"content_etag": "1", "content_last_modified": THEN},
        {"content_etag": "1", "content_last_modified": THEN + DAY},
        False,
    ),
    "another time": ({"content_last_modified": THEN}, {"content_last_modified": THEN + DAY}, True),
    "another size": ({"content_bytes": 1}, {"content_bytes": 2}, True),
    "the same size and time": (
        {"content_bytes": 1, "content_last_modified": THEN},
        {"content_bytes": 1, "content_last_modified": THEN},
        False,
    ),
    "the manifest says nothing": ({"content_etag": "1"}, {"content_etag": None}, False),
    "nobody knew then": ({"content_etag": None}, {"content_etag": "2"}, False),
    "an etag in the manifest's own spelling": (
        {"content_etag": "1", "said_content_etag": '"1"'}, {"content_etag": '"1"'}, False,
    ),
    "another etag in the manifest's own spelling": (
        {"content_etag": "1", "said_content_etag": '"1"'}, {"content_etag": '"2"'}, True,
    ),
    "the manifest has caught up with the store": (
        {"content_etag": "2", "said_content_etag": "1"}, {"content_etag": "2"}, False,
    ),
    "a size as text": ({"content_bytes": 1}, {"content_bytes": "2"}, True),
    "a time as text": ({"content_last_modified": THEN}, {"content_last_modified": "2026-01-01T00:00:00Z"}, False),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_what_is_a_change(tmp_path: Path, case: str) -> None:
    was, now, changed = CHANGES[case]
    types = {name: INDEX_SCHEMA.field(name).type for name in now}
    columns = {
        name: pa.array([value], pa.string() if isinstance(value, str) else types[name]) for name, value in now.items()
    }
    with draft(tmp_path, {"image_id": ["a"], **columns}, history(tmp_path, {"a": was})) as drafted:
        assert drafted.selection.changed == int(changed)
        assert drafted.selection.up_to_date == int(not changed)


# ---- asking the store


def test_the_store_is_asked_for_what_the_manifest_does_not_tell(tmp_path: Path) -> None:
    labelled = {}
    for name in ("same", "grown", "touched", "gone"):
        (tmp_path / f"{name}.jpg").write_bytes(b"x")
        found = storage.stat_file(str(tmp_path / f"{name}.jpg"))
        assert found is not None
        labelled[name] = {"content_bytes": found.num_bytes, "content_last_modified": found.last_modified}
    (tmp_path / "grown.jpg").write_bytes(b"xyz")
    labelled["touched"]["content_last_modified"] = THEN
    (tmp_path / "gone.jpg").unlink()
    names = [*labelled, "fresh"]
    manifest = {"image_id": names, "uri": [f"{name}.jpg" for name in names]}
    known = history(tmp_path, labelled)
    with draft(tmp_path, manifest, known) as drafted:
        assert taken(drafted) == ["fresh"]
    with draft(tmp_path, manifest, known, check_changed=True) as drafted:
        assert taken(drafted) == ["grown", "touched", "fresh"], "gone is not changed"
        assert (drafted.selection.asked, drafted.selection.changed) == (4, 2)
        assert "4 asked of their store" in drafted.selection.describe()


def test_a_store_that_refuses_to_say_tells_no_change_and_keeps_nobody_from_planning(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"xy")
    names = ["long", "a"]
    manifest = {"image_id": names, "uri": [f"{'x' * 300}.jpg", "a.jpg"]}  # ENAMETOOLONG
    known = history(tmp_path, {name: {"content_bytes": 1} for name in names})
    with draft(tmp_path, manifest, known, check_changed=True) as drafted:
        assert taken(drafted) == ["a"]
        assert (drafted.selection.asked, drafted.selection.unanswered) == (2, 1)
        assert "2 asked of their store; 1 of them their store would not tell of" in drafted.selection.describe()


def test_what_was_never_fetched_is_no_change_every_night(tmp_path: Path) -> None:
    """Its content columns are the manifest's, in its own spelling; a damaged image's are the store's."""
    rows = {
        "failed": FAILED,
        "missing": {"status": "error", "error_code": "not_found", "error_transient": False},
        "corrupt": CORRUPT,
    }
    for name in rows:
        (tmp_path / f"{name}.jpg").write_bytes(b"x")
    manifest = {"image_id": list(rows), "uri": [f"{name}.jpg" for name in rows]}
    known = history(tmp_path, {name: row | {"content_bytes": 7} for name, row in rows.items()})
    with draft(tmp_path, manifest, known, check_changed=True) as drafted:
        assert taken(drafted) == ["corrupt"]
        assert drafted.selection.asked == 1


@pytest.mark.s3
def test_indexes_on_disk_and_in_a_bucket_are_one_history(tmp_path: Path, s3_bucket: str) -> None:
    """As a dry run has them that makes a missing one for itself."""
    known = history(tmp_path, {"a": {}, "b": FAILED}, {"b": {}})
    moved = f"{s3_bucket}/first.parquet"
    storage.create(moved, storage.read_bytes(known.indexes[0].uri))
    found = storage.stat_file(moved)
    assert found is not None
    for indexes in ((found, known.indexes[1]), (known.indexes[1], found)):
        with draft(tmp_path, {"image_id": ["a", "b", "c"]}, History(known.run_ids, indexes)) as drafted:
            assert taken(drafted) == ["c"]


@pytest.mark.s3
def test_a_bucket_is_asked_for_etags(tmp_path: Path, s3_bucket: str) -> None:
    labelled = {}
    for name in ("same", "other"):
        storage.create(f"{s3_bucket}/{name}.jpg", name.encode())
        found = storage.stat_file(f"{s3_bucket}/{name}.jpg")
        assert found is not None
        labelled[name] = {"content_etag": found.version}
        labelled[f"quoted-{name}"] = {"content_etag": f'W/"{found.version}"'}
    labelled["other"] = {"content_etag": "0" * 32}
    manifest = {"image_id": list(labelled), "uri": [f"{s3_bucket}/{n.split('-')[-1]}.jpg" for n in labelled]}
    with draft(tmp_path, manifest, history(tmp_path, labelled), check_changed=True) as drafted:
        assert taken(drafted) == ["other"]


# ---- images that are gone


def test_images_that_left_the_manifest_become_tombstones_in_their_partition(tmp_path: Path) -> None:
    known = history(
        tmp_path,
        {
            **{f"id{i:02d}": {"partition": "site=a"} for i in range(30)},
            "gone-a": {"partition": "site=a", "uri": "s3://corpus/a.jpg"},
            "gone-b": {"partition": "day=1", "uri": "s3://corpus/b.jpg"},
            "gone-before": {"partition": "site=a"},
        },
        {"gone-before": {"status": "deleted", "partition": "site=a"}},
    )
    manifest = {"image_id": [f"id{i:02d}" for i in range(30)] + ["fresh"], "site": ["a"] * 31, "note": ["n"] * 31}
    with draft(tmp_path, manifest, known, partition_by="site", tombstones=True) as drafted:
        assert taken(drafted) == ["fresh"]
        assert drafted.selection.deleted == 2
        assert "; 2 no longer in it; 3 selected" in drafted.selection.describe()
        files = pin(drafted, str(tmp_path / "pinned"))
    rows = [row for shard in range(2) for row in read_shard(str(tmp_path / "pinned"), files, shard).to_pylist()]
    found = {row["image_id"]: (row["__partition"], row["__deleted"], row["uri"], row["note"]) for row in rows}
    assert found == {
        "gone-a": ("site=a", True, "s3://corpus/a.jpg", None),
        "gone-b": ("site=__HIVE_DEFAULT_PARTITION__", True, "s3://corpus/b.jpg", None),
        "fresh": ("site=a", False, "s3://corpus/fresh.jpg", "n"),
    }


def test_a_tombstone_keeps_no_partition_that_is_not_of_the_columns_type_now(tmp_path: Path) -> None:
    """A folder site=abc beside site=5 would make the run's site a column of strings."""
    places = {
        "five": "site=5",
        "text": "site=abc",
        "large": "site=300",
        "zero": "site=007",
        "null": f"site={HIVE_NULL}",
    }
    known = history(tmp_path, {name: {"partition": path} for name, path in places.items()})
    manifest = {"image_id": ["fresh"], "site": pa.array([7], pa.int8())}
    with draft(tmp_path, manifest, known, partition_by="site", tombstones=True, max_tombstone_fraction=1.0) as drafted:
        found = drafted.connection.execute("SELECT image_id, __partition FROM planned WHERE deleted").fetchall()
    null = f"site={HIVE_NULL}"
    assert dict(found) == {"five": "site=5", "text": null, "large": null, "zero": null, "null": null}


def test_a_tombstone_is_no_duplicate_that_was_dropped(tmp_path: Path) -> None:
    manifest = {"image_id": ["a", "b", "b"], "note": ["of a", "of b", "of b's second"]}
    pq.write_table(
        pa.table({"uri": [f"s3://corpus/{i}.jpg" for i in manifest["image_id"]], **manifest}), tmp_path / "m"
    )
    settings = PlanSettings(
        drop_duplicates=True, select=SelectSettings(tombstones=True, max_tombstone_fraction=1.0),
        reserved_columns=RESERVED_COLUMNS,
    )  # fmt: skip
    (tmp_path / "m").rename(tmp_path / "m.parquet")
    known = history(tmp_path, {"gone": {"uri": "s3://corpus/gone.jpg"}})
    with draft_plan(find_sources([str(tmp_path / "m.parquet")]), settings, known) as drafted:
        files = pin(drafted, str(tmp_path / "pinned"))
    rows = read_shard(str(tmp_path / "pinned"), files, 0).to_pylist()
    notes = {row["image_id"]: row["note"] for row in rows}
    assert notes == {"a": "of a", "b": "of b", "gone": None}


def test_a_manifest_that_lost_too_much_is_refused(tmp_path: Path) -> None:
    known = history(tmp_path, {f"id{i}": {} for i in range(10)})
    manifest = {"image_id": [f"id{i}" for i in range(8)]}
    message = r"2 of the 10 images that were labelled are not in the manifest \(such as 'id8', 'id9'\), more than "
    with pytest.raises(ManifestError, match=message), draft(tmp_path, manifest, known, tombstones=True):
        pass
    with draft(tmp_path, manifest, known, tombstones=True, max_tombstone_fraction=0.2) as drafted:
        assert drafted.num_rows == 2
    with draft(tmp_path, manifest, known) as drafted:
        assert drafted.num_rows == 0, "without tombstones nobody minds"


# ---- why

EXPLAINED = {
    "fresh": r"image 'fresh' is new; no run that counts has it; it is selected",
    "grown": r"image 'grown' has changed: content_etag is '2' in the manifest and was '1'; its newest row is of run "
    r"000001-aaaaaaaa \(ok\); it is selected",
    "failed": r"image 'failed' failed before, and another try may succeed; its newest row is of run 000001-aaaaaaaa "
    r"\(error fetch_failed\); it is not selected \(--select failed takes it\)",
    "corrupt": r"image 'corrupt' failed before, and another try would not help; .*\(--select failed:all takes it\)",
    "good": r"image 'good' is up to date; .*it is not selected \(--select all takes it\)",
    "gone": r"image 'gone' is not in the manifest, so nothing labels it",
    "it's": r"image \"it's\" is not in the manifest",
}


@pytest.mark.parametrize("image_id", EXPLAINED)
def test_one_image_is_explained(tmp_path: Path, image_id: str) -> None:
    with draft(tmp_path, MANIFEST, history(tmp_path, KNOWN), explain=image_id) as drafted:
        assert drafted.selection.explanation is not None
        assert re.match(EXPLAINED[image_id], drafted.selection.explanation), drafted.selection.explanation


def test_an_image_that_only_the_store_can_tell_apart_is_explained(tmp_path: Path) -> None:
    with draft(tmp_path, {"image_id": ["good"]}, history(tmp_path, KNOWN), explain="good") as drafted:
        assert "no content_ column that would tell a change" in str(drafted.selection.explanation)


# ---- a history that cannot be read


@pytest.mark.parametrize("tombstones", [False, True])
def test_a_damaged_index_is_named(tmp_path: Path, tombstones: bool) -> None:
    known = history(tmp_path, KNOWN, KNOWN)
    Path(known.indexes[1].uri).write_bytes(b"PAR1 damage PAR1")
    message = r"000002-aaaaaaaa\.parquet.*; delete that file, it is made again"
    with pytest.raises(OutputError, match=message), draft(tmp_path, MANIFEST, known, tombstones=tombstones):
        pass


# ---- any history

ROW = st.fixed_dictionaries(
    {"etag": st.sampled_from(["1", "2", None]), "status": st.sampled_from(["ok", "failed", "corrupt", "deleted"])}
)
RUN = st.dictionaries(st.sampled_from("abcdef"), ROW, max_size=6)


@given(
    runs=st.lists(RUN, max_size=4),
    now=st.dictionaries(st.sampled_from("abcdefgh"), st.sampled_from(["1", "2", None]), min_size=1),
)
def test_any_history_is_as_a_dictionary_says(
    tmp_path_factory: pytest.TempPathFactory, runs: list[dict[str, Any]], now: dict[str, str | None]
) -> None:
    folder = tmp_path_factory.mktemp("history")
    kinds = {"ok": {"status": "ok"}, "failed": FAILED, "corrupt": CORRUPT, "deleted": {"status": "deleted"}}
    newest: dict[str, Any] = {}
    for run in runs:
        newest |= run
    wanted = {}
    for image_id, etag in now.items():
        row = newest.get(image_id)
        if row is None or row["status"] == "deleted":
            wanted[image_id] = "new"
        elif None not in (etag, row["etag"]) and etag != row["etag"]:
            wanted[image_id] = "changed"
        else:
            wanted[image_id] = {"ok": "up_to_date", "failed": "failed", "corrupt": "failed_for_good"}[row["status"]]
    gone = sorted(i for i, row in newest.items() if i not in now and row["status"] != "deleted")
    known = history(
        folder, *({i: {"content_etag": r["etag"], **kinds[r["status"]]} for i, r in run.items()} for run in runs)
    )
    ids = list(now)
    random.Random(0).shuffle(ids)
    manifest = {"image_id": ids, "content_etag": pa.array([now[i] for i in ids], pa.string())}
    with draft(folder, manifest, known, tombstones=True, max_tombstone_fraction=1.0) as drafted:
        classes = drafted.connection.execute(
            "SELECT i.image_id, c.class FROM classes c JOIN (SELECT rowid AS number, image_id FROM manifest) i USING (number)"
        ).fetchall()
        assert dict(classes) == wanted
        deleted = drafted.connection.execute("SELECT image_id FROM planned WHERE deleted ORDER BY ALL").fetchall()
        assert [row[0] for row in deleted] == gone
        assert sorted(taken(drafted)) == sorted(i for i, name in wanted.items() if name in ("new", "changed"))
