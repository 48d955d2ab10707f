"""The README's SQL runs as it stands, without this package, and its answers are those of counting by hand."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest

from tests.analysis.conftest import TwoRuns
from tests.corpus import rows_of

README = Path(__file__).resolve().parents[2] / "README.md"
_SECTION = re.compile(r"<!-- queries -->(.*)<!-- /queries -->", re.DOTALL)
_BLOCK = re.compile(r"```sql\n-- ([^\n]*)\n(.*?)```", re.DOTALL)

Row = dict[str, Any]


def queries() -> dict[str, str]:
    """Question -> SQL, in the README's order."""
    section = _SECTION.search(README.read_text())
    assert section, "the README marks its queries"
    found = dict(_BLOCK.findall(section[1]))
    assert len(found) == section[1].count("```sql"), "every block begins with its question"
    return found


def boxes_of(rows: list[Row]) -> list[Row]:
    names = {"boxes": "box", "label_names": "label_name", "scores": "score"}
    return [
        row | dict(zip(names.values(), values, strict=True))
        for row in rows
        for values in zip(*(row[name] or [] for name in names), strict=True)
    ]


def per_class(rows: list[Row]) -> set[Any]:
    boxes = boxes_of(rows)
    images = Counter(name for name, _ in {(box["label_name"], box["image_id"]) for box in boxes})
    return {(name, images[name], count) for name, count in Counter(box["label_name"] for box in boxes).items()}


def with_a_person(rows: list[Row]) -> set[Any]:
    found: dict[Any, float] = {}
    for box in boxes_of(rows):
        if box["label_name"] == "person" and box["score"] > 0.8:
            key = (box["image_id"], box["uri"])
            found[key] = max(found.get(key, 0.0), box["score"])
    return {(*key, score) for key, score in found.items()}


def failures(rows: list[Row]) -> set[Any]:
    groups: dict[Any, list[str]] = {}
    for row in rows:
        if row["status"] == "error":
            key = (row["error_stage"], row["error_code"], row["error_transient"])
            groups.setdefault(key, []).append(row["uri"])
    return {(*key, len(uris), min(uris)) for key, uris in groups.items()}


def nothing_found(rows: list[Row]) -> set[Any]:
    return {(row["image_id"], row["uri"]) for row in rows if row["boxes"] == []}


def shares(rows: list[Row]) -> set[Any]:
    return {
        (
            box["image_id"],
            box["label_name"],
            round(box["score"], 5),
            *(round(x, 3) for x in box["box"]),
            round(share, 4),
        )
        for box in boxes_of(rows)
        for x1, y1, x2, y2 in [box["box"]]
        for share in [(x2 - x1) * (y2 - y1) / (box["width"] * box["height"])]
    }


def per_day(rows: list[Row]) -> set[Any]:
    found = Counter((str(box["captured_at"]), box["label_name"]) for box in boxes_of(rows))
    return {(*key, count) for key, count in found.items()}


# Question -> the same from rows in Python, and a row of DuckDB's in that shape.
BY_HAND: dict[str, tuple[Callable[[list[Row]], set[Any]], Callable[[tuple[Any, ...]], Any]]] = {
    "how many images and boxes there are of each class": (per_class, tuple),
    "images with a person above 0.8, surest first": (with_a_person, tuple),
    "what failed, where, and whether another run may mend it": (failures, tuple),
    "images in which nothing was found": (nothing_found, tuple),
    "boxes, one a row, with the share of the image that each covers": (
        shares,
        lambda row: (*row[:2], round(row[2], 5), *(round(x, 3) for x in row[3:7]), round(row[7], 4)),
    ),
    "which classes each day shows (captured_at is a column of the manifest; one that partitions is asked in the same way)": (
        per_day,
        lambda row: (str(row[0]), *row[1:]),
    ),
}


@pytest.fixture
def newest(two_runs: TwoRuns, monkeypatch: pytest.MonkeyPatch) -> duckdb.DuckDBPyConnection:
    """A connection with the README's view, in the folder that has out/labels."""
    monkeypatch.chdir(two_runs.folder)
    connection = duckdb.connect()
    connection.execute(queries()["the newest row of every image that was not retracted and is not marked deleted"])
    return connection


def newest_rows(two_runs: TwoRuns) -> list[Row]:
    """Counted by hand: a partition column lies in the path, so it comes from the manifest."""
    import pyarrow.parquet as pq

    captured = {row["image_id"]: row["captured_at"] for row in pq.read_table(two_runs.manifest).to_pylist()}
    return [row | {"captured_at": captured[image_id]} for image_id, row in rows_of(two_runs.output).items()]


def test_the_view_has_the_newest_row_of_every_image_once(newest: duckdb.DuckDBPyConnection, two_runs: TwoRuns) -> None:
    found = newest.execute("SELECT image_id, run_id FROM newest").fetchall()
    assert sorted(found) == sorted((row["image_id"], row["run_id"]) for row in newest_rows(two_runs))
    assert len({run_id for _, run_id in found}) == 2


def test_every_query_of_the_readme_is_counted_by_hand_here() -> None:
    assert list(queries())[1:] == list(BY_HAND)


@pytest.mark.parametrize("question", BY_HAND)
def test_a_query_of_the_readme_answers_its_question(
    newest: duckdb.DuckDBPyConnection, two_runs: TwoRuns, question: str
) -> None:
    by_hand, shaped = BY_HAND[question]
    found = [shaped(row) for row in newest.execute(queries()[question]).fetchall()]
    wanted = by_hand(newest_rows(two_runs))
    assert wanted, "the corpus has an example"
    assert len(found) == len(wanted)
    assert set(found) == wanted
