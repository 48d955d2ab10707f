"""Whatever a CSV, TSV or JSON manifest holds: a ManifestError, or every value comes out equal, every row once."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import event, given
from hypothesis import strategies as st

from fcos_ray.errors import ManifestError
from tests.inputs.planning import plan

TEXT = st.text(st.characters(codec="utf-8"), max_size=10) | st.sampled_from(
    ["", "\0", "'", '"', '""', '"a', 'a"b', "a\nb", "a\r\nb", "\r", ",", "\t", ";", "#x", "\\", "\\N", "\ufeff", "NULL",
     "null", "NaN", "007", "1e5", "true", "2026-01-03", " a ", "é", "🦊", "\u2028", "{}", "[1]"]
)  # fmt: skip
NAMES = st.lists(TEXT.filter(lambda name: name == name.strip()), min_size=1, max_size=3, unique=True)
NUMBERS = (
    st.integers(-(2**63), 2**63 - 1) | st.integers(-(2**70), 2**70) | st.sampled_from([0, 2**53 + 1, 2**63, 2**64])
)
FRACTIONS = st.floats(allow_nan=False, allow_infinity=False)
LEAVES: list[st.SearchStrategy[Any]] = [TEXT, st.booleans(), FRACTIONS, NUMBERS, NUMBERS, NUMBERS | FRACTIONS]


@st.composite
def json_values(draw: st.DrawFn) -> st.SearchStrategy[Any]:
    """Values of one JSON type, nested or not, sometimes of two."""
    values = draw(st.sampled_from(LEAVES))
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        maybe = st.none() | values
        keys = draw(st.lists(TEXT, min_size=1, max_size=2, unique=True))
        values = draw(st.sampled_from([st.lists(maybe, max_size=3), st.fixed_dictionaries(dict.fromkeys(keys, maybe))]))
    return values | draw(st.sampled_from(LEAVES)) if draw(st.integers(0, 3)) == 3 else values


def planned(name: str, content: str) -> list[dict[str, Any]] | None:
    """The rows of a plan of this manifest, in the manifest's order; None when it was refused in one line."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / name
        manifest.write_bytes(content.encode())
        try:
            found = plan(manifest, pinned=Path(folder) / "pinned", shard_rows=2)
        except ManifestError as error:
            refusal = str(error)
        else:
            event("planned")
            return found.rows.to_pylist()
    event("refused")
    assert str(manifest) in refusal or "column" in refusal
    assert "\n" not in refusal
    return None


def same(came: Any, wanted: Any) -> bool:
    """Equal, and True is no 1. Absent and null are one in a struct."""
    if isinstance(came, dict) and isinstance(wanted, dict):
        return all(same(came.get(key), wanted.get(key)) for key in came.keys() | wanted.keys())
    if isinstance(came, list) and isinstance(wanted, list):
        return len(came) == len(wanted) and all(map(same, came, wanted))
    return bool(came == wanted) and isinstance(came, bool) == isinstance(wanted, bool)


@given(st.sampled_from([("m.csv", ","), ("m.tsv", "\t")]), NAMES, st.data())
def test_delimited_manifests_come_out_as_the_strings_they_hold(
    kind: tuple[str, str], names: list[str], data: st.DataObject
) -> None:
    file, delimiter = kind
    line = st.lists(TEXT, min_size=len(names), max_size=len(names))
    rows = data.draw(st.lists(line, min_size=1, max_size=4))
    # With "\n" alone Python's writer leaves "\r" without quotes, which makes two lines of it.
    quoting, end = data.draw(
        st.sampled_from([(csv.QUOTE_ALL, "\n"), (csv.QUOTE_ALL, "\r\n"), (csv.QUOTE_MINIMAL, "\r\n")])
    )
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=delimiter, quoting=quoting, lineterminator=end)
    writer.writerow([*names, "image_id", "uri"])
    writer.writerows([*row, n, f"{n}.jpg"] for n, row in enumerate(rows))
    came = planned(file, buffer.getvalue())
    if came is None:
        return
    empty = "" if quoting == csv.QUOTE_ALL else None  # nothing between two delimiters is null, and "" is not
    wanted = {str(n): [value or empty for value in row] for n, row in enumerate(rows)}
    assert len(came) == len(wanted)
    assert {row["image_id"]: [row[name] for name in names] for row in came} == wanted


@given(st.sampled_from(["m.jsonl", "m.json"]), st.lists(TEXT, min_size=1, max_size=3, unique=True), st.data())
def test_json_manifests_come_out_with_equal_values_of_their_own_kind(
    file: str, names: Sequence[str], data: st.DataObject
) -> None:
    kinds = {name: data.draw(json_values()) for name in names}
    count = data.draw(st.integers(1, 4))
    rows = [
        {"image_id": n, "uri": f"{n}.jpg"} | {k: data.draw(st.none() | v) for k, v in kinds.items()}
        for n in range(count)
    ]
    escaped = data.draw(st.booleans())
    lines = [json.dumps(row, ensure_ascii=escaped) for row in rows]
    came = planned(file, "\n".join(lines) if file == "m.jsonl" else f"[{','.join(lines)}]")
    if came is None:
        return
    assert sorted(row["image_id"] for row in came) == sorted(str(n) for n in range(count))
    for row in came:
        for name in names:
            wanted = rows[int(row["image_id"])][name]
            assert same(row[name], wanted), f"{name!r}: {wanted!r} came out as {row[name]!r}"
