"""Whatever a manifest holds: a ManifestError that names the column, or every value comes out equal, every row once."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import event, given
from hypothesis import strategies as st

from fcos_ray.errors import ManifestError
from fcos_ray.outputs.commit import ShardTarget, build_shard
from fcos_ray.outputs.schema import RESULT_SCHEMA
from tests.inputs.planning import Planned, plan

Values = st.SearchStrategy[Any]


@dataclass(frozen=True)
class Kind:
    """An Arrow type and the Python values that fill it."""

    type: pa.DataType
    values: Values


def whole(bits: int, *, signed: bool = True) -> Values:
    low = -(2 ** (bits - 1)) if signed else 0
    high = 2 ** (bits - signed) - 1
    return st.integers(low, high) | st.sampled_from([low, high, low + 1, high - 1, 0])


def seconds_of(unit: str) -> int:
    return {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]


def of_day(unit: str) -> Values:
    return st.integers(0, 86_400 * seconds_of(unit) - 1)


TEXT = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    ["", "\0", "a\0b", "'", '"', "a\nb", "\r\n", ",", "é", "é", "\ufeff", "NULL", "null", "NaN", "\u202e", "🦊" * 40]
)
UNITS = ("s", "ms", "us", "ns")
EXTREMES = whole(64)
PLAIN: list[Kind] = [
    Kind(pa.string(), TEXT),
    Kind(pa.large_string(), TEXT),
    Kind(pa.bool_(), st.booleans()),
    *(Kind(pa.type_for_alias(f"int{bits}"), whole(bits)) for bits in (8, 16, 32, 64)),
    *(Kind(pa.type_for_alias(f"uint{bits}"), whole(bits, signed=False)) for bits in (8, 16, 32, 64)),
    Kind(pa.float32(), st.floats(width=32)),
    Kind(pa.float64(), st.floats()),
    Kind(pa.binary(), st.binary(max_size=20)),
    Kind(pa.large_binary(), st.binary(max_size=20)),
    Kind(pa.binary(5), st.binary(min_size=5, max_size=5)),
    Kind(pa.date32(), whole(32)),
    *(Kind(pa.timestamp(unit), EXTREMES) for unit in UNITS),
    *(Kind(pa.timestamp(unit, tz=tz), EXTREMES) for unit in UNITS for tz in ("UTC", "Europe/Berlin")),
    *(Kind(pa.time32(unit), of_day(unit)) for unit in ("s", "ms")),
    *(Kind(pa.time64(unit), of_day(unit)) for unit in ("us", "ns")),
    *(
        Kind(pa.decimal128(digits, scale), st.integers(1 - 10**digits, 10**digits - 1).map(
            lambda n, scale=scale: Decimal((n < 0, tuple(map(int, str(abs(n)))), -scale))
        ))
        for digits, scale in ((1, 0), (9, 4), (18, 18), (38, 0), (38, 30))
    ),
]  # fmt: skip
REFUSED: list[Kind] = [
    *(Kind(pa.duration(unit), whole(64)) for unit in UNITS),
    Kind(pa.null(), st.none()),
    Kind(pa.decimal256(60, 3), st.just(Decimal("1.5"))),
    Kind(
        pa.map_(pa.string(), pa.int32()), st.lists(st.tuples(st.text("abc", max_size=2), st.integers(0, 9)), max_size=3)
    ),
]


def nested(inner: Kind) -> list[Kind]:
    """Lists and structs of a kind."""
    maybe = st.none() | inner.values
    return [
        Kind(pa.list_(inner.type), st.lists(maybe, max_size=3)),
        Kind(pa.large_list(inner.type), st.lists(maybe, max_size=3)),
        Kind(pa.list_(inner.type, 2), st.lists(maybe, min_size=2, max_size=2)),
        Kind(
            pa.struct([("a", inner.type), ('b "c"', pa.string())]), st.fixed_dictionaries({"a": maybe, 'b "c"': TEXT})
        ),
        Kind(pa.dictionary(pa.int32(), inner.type), inner.values),
    ]


@st.composite
def kinds(draw: st.DrawFn) -> Kind:
    kind = draw(st.sampled_from(PLAIN) | st.sampled_from(PLAIN + REFUSED))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        if pa.types.is_dictionary(kind.type):
            break
        options = nested(kind)
        # dictionaries of nested values are not written by pyarrow
        kind = draw(st.sampled_from(options if not pa.types.is_nested(kind.type) else options[:-1]))
    return kind


def array(kind: Kind, values: Sequence[Any]) -> pa.Array:
    if pa.types.is_dictionary(kind.type):
        return pa.array(values, kind.type.value_type).dictionary_encode()
    return pa.array(values, kind.type)


def value_of(scalar: Any) -> Any:
    """A scalar as something to compare: exact, NaN equal to NaN, times of any range as their number."""
    if not scalar.is_valid:
        return None
    kind = scalar.type
    if pa.types.is_dictionary(kind):
        return value_of(scalar.value)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return [value_of(one) for one in scalar.values]
    if pa.types.is_struct(kind):
        return [(kind.field(i).name, value_of(scalar[i])) for i in range(kind.num_fields)]
    if pa.types.is_temporal(kind):
        return scalar.value
    return repr(scalar.as_py())


def values_of(column: pa.ChunkedArray) -> list[Any]:
    return [value_of(scalar) for scalar in column]


def as_written(planned: Planned) -> pa.Table:
    """What the job would write: every shard's file, read back."""
    target = ShardTarget("/labels", "000001-0123abcd", (), {"categories": ["__background__"]})
    shards = []
    for number, pinned in enumerate(planned.shards):
        rows = [
            {"shard": number, "row": row, "boxes": [], "labels": [], "scores": [], "attempts": 1}
            for row in range(len(pinned))
        ]
        results = pa.Table.from_pylist(rows, RESULT_SCHEMA)
        shards.append(pq.read_table(pa.BufferReader(build_shard(target, number, pinned=pinned, results=results))))
    return pa.concat_tables(shards)


def check(
    write: Callable[[Path], Path], names: Sequence[str], wanted: dict[str, list[Any]], ids: Sequence[str]
) -> None:
    """Plan what was written: refused naming a column, or equal."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = write(Path(folder))
        try:
            planned = plan(manifest, pinned=Path(folder) / "pinned", shard_rows=2)
        except ManifestError as error:
            event("refused")
            words = str(error)
        else:
            event("planned")
            words = None
        if words is not None:
            assert "\n" not in words
            assert any(repr(name) in words for name in names), f"{words} names none of {names}"
            return
        table = as_written(planned)
    got = table["image_id"].to_pylist()
    assert sorted(got) == sorted(ids)
    place = {image_id: row for row, image_id in enumerate(got)}
    for name in names:
        came = values_of(table[name])
        assert [came[place[image_id]] for image_id in ids] == wanted[name], name


@given(st.data())
def test_every_column_of_a_parquet_manifest_comes_out_equal_or_is_refused_by_name(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 5))
    ids = data.draw(st.lists(TEXT.filter(bool), min_size=count, max_size=count, unique=True))
    names = data.draw(st.lists(TEXT, min_size=1, max_size=3, unique=True))
    columns = {}
    for name in names:
        kind = data.draw(kinds())
        fill = st.none() | kind.values
        columns[name] = array(kind, data.draw(st.lists(fill, min_size=count, max_size=count)))
    table = pa.table({"image_id": ids, "uri": [f"{n}.jpg" for n in range(count)], **columns})

    def write(folder: Path) -> Path:
        pq.write_table(table, folder / "m.parquet")
        return folder / "m.parquet"

    try:
        with tempfile.TemporaryDirectory() as folder:
            stored = pq.read_table(write(Path(folder)))
    except (pa.ArrowException, OverflowError):
        event("not Parquet's")
        return
    check(write, names, {name: values_of(stored[name]) for name in names}, ids)


@given(st.data())
def test_strings_of_text_manifests_come_out_equal_or_are_refused_by_name(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4))
    texts = data.draw(st.lists(TEXT.filter(bool), min_size=count, max_size=count))
    ids = [str(n) for n in range(count)]
    rows = [{"image_id": i, "uri": f"{i}.jpg", "caption": text} for i, text in zip(ids, texts, strict=True)]

    def write(folder: Path) -> Path:
        (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder / "m.jsonl"

    check(write, ["caption"], {"caption": [repr(text) for text in texts]}, ids)
