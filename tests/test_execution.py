"""What a driver says of its speed."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pytest

from fcos_ray.execution import ExecutionStats
from fcos_ray.outputs.schema import RESULT_SCHEMA

START = datetime(2026, 1, 1, tzinfo=UTC)


def stats_of(
    blocks: Sequence[tuple[float, int, str]], num_detectors: int, detect_seconds: float | None = None
) -> ExecutionStats:
    """Blocks as (when they were done, images, by whom), in the order in which they come; when they come does not matter."""
    stats = ExecutionStats(num_detectors)
    for done, num_rows, name in blocks:
        row = {"shard": 0, "row": 0, "detected_at": START + timedelta(seconds=done), "detected_by": name}
        row["detect_seconds"] = detect_seconds
        stats.count_block(pa.Table.from_pylist([row] * num_rows, RESULT_SCHEMA))
    return stats


def steady(name: str, start: float, num_blocks: int) -> list[tuple[float, int, str]]:
    """One detector at 1 image/s, blocks of 10."""
    return [(start + 10.0 * k, 10, name) for k in range(1, num_blocks + 1)]


def test_the_rate_is_what_detectors_do_from_their_first_block_to_their_last() -> None:
    """They start one after another, and one has nothing left while another is at work: neither is the steady state."""
    blocks = [*steady("a", 0, 9), *steady("b", 7, 5), *steady("c", 31, 2)]
    assert stats_of(blocks, num_detectors=3).images_per_second == pytest.approx(3.0)


def test_the_order_in_which_blocks_come_does_not_matter() -> None:
    blocks = [*steady("a", 0, 9), *steady("b", 7, 5)]
    swapped = [*reversed(blocks), (0.0, 0, "a")]
    assert stats_of(swapped, num_detectors=2).images_per_second == pytest.approx(2.0)


def test_a_detector_that_died_and_its_successor_are_one() -> None:
    blocks = [*steady("a", 0, 5), *steady("b", 0, 2), *steady("c", 40, 3)]
    assert stats_of(blocks, num_detectors=2).images_per_second == pytest.approx(2.0)


@pytest.mark.parametrize("blocks", [[], steady("a", 0, 1), [*steady("a", 0, 1), *steady("b", 1, 1)]])
def test_a_block_each_tells_no_rate(blocks: list[tuple[float, int, str]]) -> None:
    assert stats_of(blocks, num_detectors=2).images_per_second is None


def test_detectors_are_busy_for_what_their_images_took_after_the_first_block() -> None:
    """Whose images are as slow as the first forward is, and would make more than all of the time."""
    blocks = [*steady("a", 0, 9), *steady("b", 7, 5)]
    assert stats_of(blocks, 2, detect_seconds=0.75).busy == pytest.approx(0.75)
    stats = stats_of(blocks[1:9], 1, detect_seconds=0.75)
    slow = {"shard": 0, "row": 0, "detected_at": START, "detected_by": "a", "detect_seconds": 100.0}
    stats.count_block(pa.Table.from_pylist([slow], RESULT_SCHEMA))
    assert stats.busy == pytest.approx(80 * 0.75 / 90)


def test_rows_that_no_detector_held_take_none_of_its_time() -> None:
    assert stats_of(steady("a", 0, 3), 1).busy == 0
    assert stats_of([(1.0, 10, "a")], 1, detect_seconds=0.1).busy is None
