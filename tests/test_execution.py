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
    blocks: Sequence[tuple[float, int, str]], num_detectors: int, detect_seconds: float | None = 1.0
) -> ExecutionStats:
    """Blocks as (when they were done, images, by whom), in the order in which they come; when they come does not matter."""
    stats = ExecutionStats(num_detectors)
    for done, num_rows, name in blocks:
        stats.count_block(block_of(done, [detect_seconds] * num_rows, name))
    return stats


def block_of(done: float, detect_seconds: Sequence[float | None], name: str = "a") -> pa.Table:
    """What a detector gives at once: an image a row, or an error that it never saw (None)."""
    about = {"shard": 0, "row": 0, "detected_at": START + timedelta(seconds=done), "detected_by": name}
    return pa.Table.from_pylist([about | {"detect_seconds": seconds} for seconds in detect_seconds], RESULT_SCHEMA)


def steady(name: str, start: float, num_blocks: int) -> list[tuple[float, int, str]]:
    """One detector at 1 image/s, blocks of 10."""
    return [(start + 10.0 * k, 10, name) for k in range(1, num_blocks + 1)]


def test_the_rate_is_what_detectors_do_from_their_first_image_to_their_last() -> None:
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


def test_what_is_loaded_ahead_while_the_first_block_is_detected_makes_no_rate_of_its_own() -> None:
    """Loading takes the cores of a first block, which is slow, and the next ones pass as fast as if nothing were loaded."""
    stats = stats_of([(30.0, 10, "a")], 1, detect_seconds=3.0)
    for done in (40.0, 50.0, 60.0):
        stats.count_block(block_of(done, [1.0] * 10))
    assert stats.images_per_second == pytest.approx(40 / 60)


@pytest.mark.parametrize(
    ("blocks", "rate"),
    [([], None), (steady("a", 0, 1), 1.0), ([*steady("a", 0, 1), *steady("b", 1, 1)], 2.0)],
)
def test_a_block_each_tells_a_rate_and_none_does_not(blocks: list[tuple[float, int, str]], rate: float | None) -> None:
    assert stats_of(blocks, num_detectors=2).images_per_second == rate


def test_detectors_are_busy_for_what_their_images_took_from_the_first_one_on() -> None:
    blocks = [*steady("a", 0, 9), *steady("b", 7, 5)]
    for order in (blocks, blocks[::-1]):
        assert stats_of(order, 2, detect_seconds=0.75).busy == pytest.approx((67.5 + 37.5) / (87.5 + 47.5))


def test_a_detector_that_always_holds_images_is_busy_however_slow_its_first_ones_are() -> None:
    stats = stats_of(steady("a", 0, 9), 1)
    stats.count_block(block_of(0.0, [100.0]))
    assert stats.busy == pytest.approx(1.0)


def test_where_no_detector_held_an_image_neither_rate_nor_busy_share_is_told() -> None:
    stats = stats_of(steady("a", 0, 3), 1, detect_seconds=None)
    assert (stats.images_per_second, stats.busy) == (None, None)


def test_errors_that_no_detector_saw_are_no_images_of_its() -> None:
    stats = stats_of([(1.0, 10, "a")], 1, detect_seconds=None)
    stats.count_block(block_of(60.0, [None] * 8 + [1.0] * 2))
    stats.count_block(block_of(70.0, [1.0] * 10))
    assert stats.images_per_second == pytest.approx(12 / 12)
