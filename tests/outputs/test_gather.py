"""Whatever order rows come in, and however often, a shard is whole once and holds each row once, the first of it."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pyarrow as pa
import pytest

from fcos_ray.errors import ERROR_CODES
from fcos_ray.outputs.gather import Gather, WholeShard
from fcos_ray.outputs.schema import RESULT_SCHEMA


def rows(*keys: tuple[int, int], **columns: Any) -> pa.Table:
    """Result rows of (shard, row); the etag tells copies of one row apart."""
    table = [{"shard": shard, "row": row, **columns} for shard, row in keys]
    return pa.Table.from_pylist(table, RESULT_SCHEMA)


def keys(shard: WholeShard) -> list[int]:
    assert set(shard.rows["shard"].to_pylist()) == {shard.shard}
    return sorted(shard.rows["row"].to_pylist())


def test_a_shard_is_whole_with_its_last_row_and_not_before() -> None:
    gather = Gather({0: 3})
    assert gather.add(rows((0, 2))) == []
    assert gather.add(rows((0, 0))) == []
    assert gather.num_open == 1
    [whole] = gather.add(rows((0, 1)))
    assert (whole.shard, keys(whole), gather.num_open) == (0, [0, 1, 2], 0)
    assert whole.rows.schema == RESULT_SCHEMA


def test_one_block_may_hold_rows_of_several_shards() -> None:
    gather = Gather({5: 2, 7: 1, 9: 2})
    finished = gather.add(rows((5, 1), (7, 0), (9, 0), (5, 0)))
    assert sorted((s.shard, *keys(s)) for s in finished) == [(5, 0, 1), (7, 0)]
    assert gather.num_open == 1
    assert [(s.shard, *keys(s)) for s in gather.add(rows((9, 1)))] == [(9, 0, 1)]


def test_an_empty_block_changes_nothing() -> None:
    gather = Gather({0: 1})
    assert gather.add(rows()) == []
    assert gather.num_open == 0


def test_of_a_row_that_comes_twice_the_first_counts() -> None:
    gather = Gather({0: 2})
    gather.add(rows((0, 0), content_etag="first"))
    gather.add(rows((0, 0), content_etag="second"))
    [whole] = gather.add(rows((0, 1), content_etag="other"))
    assert {r["row"]: r["content_etag"] for r in whole.rows.to_pylist()} == {0: "first", 1: "other"}


def test_of_a_row_that_stands_twice_in_one_block_the_first_counts() -> None:
    block = pa.concat_tables([rows((0, 1), content_etag=tag) for tag in ("first", "second")])
    [whole] = Gather({0: 2}).add(pa.concat_tables([block, rows((0, 0), (0, 0), content_etag="zero")]))
    assert sorted((r["row"], r["content_etag"]) for r in whole.rows.to_pylist()) == [(0, "zero"), (1, "first")]


def test_rows_of_a_shard_that_was_whole_are_ignored() -> None:
    gather = Gather({0: 1, 1: 2})
    assert len(gather.add(rows((0, 0)))) == 1
    assert gather.add(rows((0, 0))) == []
    assert gather.add(rows((0, 0), (1, 0))) == []
    assert gather.num_open == 1


def test_the_transient_fraction_counts_errors_that_a_later_try_may_mend() -> None:
    transient = [code for code, (_, is_transient, _) in ERROR_CODES.items() if is_transient]
    permanent = [code for code, (_, is_transient, _) in ERROR_CODES.items() if not is_transient]
    codes = [None, None, *transient, *permanent]
    table = pa.concat_tables([rows((0, i), error_code=code) for i, code in enumerate(codes)])
    [whole] = Gather({0: len(codes)}).add(table)
    assert whole.transient_fraction == pytest.approx(len(transient) / len(codes))
    assert whole.errors_by_code == Counter(transient + permanent)
    [fine] = Gather({0: 1}).add(rows((0, 0)))
    assert (fine.transient_fraction, fine.errors_by_code) == (0.0, Counter())


@pytest.mark.parametrize("seed", range(20))
def test_any_schedule_with_repeats_gives_every_shard_once_and_whole(seed: int) -> None:
    rng = random.Random(seed)
    sizes = {shard: rng.randint(1, 9) for shard in rng.sample(range(100), rng.randint(1, 8))}
    every = [(shard, row) for shard, size in sizes.items() for row in range(size)]
    schedule = every + rng.choices(every, k=rng.randint(0, 3 * len(every)))
    rng.shuffle(schedule)
    gather = Gather(sizes)
    firsts: dict[tuple[int, int], str] = {}
    finished: list[WholeShard] = []
    while schedule:
        block, schedule = schedule[: (cut := rng.randint(1, 7))], schedule[cut:]
        tagged = [(key, f"{len(schedule)}-{i}") for i, key in enumerate(block)]
        for key, tag in tagged:
            firsts.setdefault(key, tag)
        finished += gather.add(pa.concat_tables([rows(key, content_etag=tag) for key, tag in tagged]))
    assert sorted(s.shard for s in finished) == sorted(sizes)
    got = {(r["shard"], r["row"]): r["content_etag"] for s in finished for r in s.rows.to_pylist()}
    assert got == firsts
    assert sum(s.rows.num_rows for s in finished) == len(every)
    assert gather.num_open == 0


@pytest.mark.parametrize(
    ("codes", "limit", "may"),
    [
        (["fetch_failed"], 0.1, True),
        (["fetch_failed", "fetch_timeout"], 0.1, False),
        (["not_found", "corrupt"], 0.0, True),
        (["store_unavailable"], 0.1, False),
        (["store_unavailable"], 0.99, False),
        (["store_unavailable"] * 10, 1.0, True),
    ],
)
def test_few_transient_errors_may_be_committed_but_none_of_an_outage(codes: list[str], limit: float, may: bool) -> None:
    table = [{"shard": 0, "row": n, "error_code": code} for n, code in enumerate([*codes, *[None] * (10 - len(codes))])]
    [whole] = Gather({0: 10}).add(pa.Table.from_pylist(table, RESULT_SCHEMA))
    assert whole.may_commit(max_transient_fraction=limit) is may
