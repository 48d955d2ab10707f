"""The bad store is as bad as asked."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.s3_faults import KINDS, VERBS, Request, Trouble, spread


@pytest.mark.parametrize("verb", VERBS)
def test_each_kind_strikes_the_share_of_requests_asked_for(verb: str) -> None:
    trouble = Trouble(spread(0.3, stalls=0.02), seed=1)
    struck = Counter(trouble(Request(number, verb, "/", b"", b"")) for number in range(30_000))
    assert set(struck) == {*KINDS[verb], "pass"}
    assert struck["pass"] / 30_000 == pytest.approx(0.7, abs=0.02)
    assert struck["stall"] / 30_000 == pytest.approx(0.02, abs=0.005)
    for kind in set(KINDS[verb]) - {"stall"}:
        assert struck[kind] / 30_000 == pytest.approx(0.28 / (len(KINDS[verb]) - 1), abs=0.01), kind


def test_the_same_seed_gives_the_same_trouble() -> None:
    requests = [Request(number, "GET", "/", b"", b"") for number in range(100)]
    first, second = ([*map(Trouble(spread(0.3, stalls=0), seed=7), requests)] for _ in range(2))
    assert first == second
