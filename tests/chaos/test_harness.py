"""A short chaos: one round of five hits. `make chaos` has as many rounds as you like."""

from __future__ import annotations

import random
import re

import pytest

from tests.chaos import harness
from tests.chaos.hits import HITS

# One run takes them all: a second round for three of them was 75 s more, most of it starts and ends of processes. The second
# driver comes first, so that the seed alone says where it runs.
HIT = (
    "start a second driver",
    "kill a decode child",
    "kill the driver",
    "kill a commit in its write",
    "kill a load worker",
)


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_a_round_of_chaos_ends_as_if_nothing_had_happened() -> None:
    events = harness.run_rounds(1, seed=8, num_images=80, plan=[HIT])
    assert [event.verdict for event in events if event.verdict] == ["same"]
    struck = " ".join(event.what for event in events)
    assert re.search(r"start a second driver: pid \d+, on the same cluster", struck), "choose another seed"
    assert "kill the driver: pid" in struck


def test_every_hit_has_its_turn_before_any_comes_again() -> None:
    plan = harness.plan_rounds(20, random.Random(1))
    hits = [kind for kinds in plan for kind in kinds]
    assert {len(kinds) for kinds in plan} == {2, 3}
    for start in range(0, len(hits) - len(HITS), len(HITS)):
        assert sorted(hits[start : start + len(HITS)]) == sorted(HITS)
    assert plan == harness.plan_rounds(20, random.Random(1)), "a seed is a plan"
    assert plan != harness.plan_rounds(20, random.Random(2))
