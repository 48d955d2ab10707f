"""What a driver says of its speed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from fcos_ray.execution import ExecutionStats


def stats_of(
    blocks: Sequence[tuple[float, int]], monkeypatch: pytest.MonkeyPatch, num_detectors: int
) -> ExecutionStats:
    """Blocks as (when they come, images)."""
    stats, now = ExecutionStats(), 0.0
    monkeypatch.setattr("fcos_ray.execution.time.monotonic", lambda: now)
    for when, num_rows in blocks:
        now = when
        stats.count_block(num_rows, num_detectors=num_detectors)
    return stats


def test_the_rate_begins_when_each_detector_has_given_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three detectors at 1 image/s each, blocks of 10 that were begun one second after another."""
    blocks = [(10.0 * k + shift, 10) for k in range(1, 6) for shift in range(3)]
    stats = stats_of(blocks, monkeypatch, num_detectors=3)
    assert stats.images_per_second == pytest.approx(3.0)
    assert stats_of(blocks[:4], monkeypatch, num_detectors=3).images_per_second == pytest.approx(10 / 8)


@pytest.mark.parametrize("num_blocks", [0, 1, 3])
def test_no_more_than_the_first_blocks_tell_no_rate(monkeypatch: pytest.MonkeyPatch, num_blocks: int) -> None:
    stats = stats_of([(float(k), 10) for k in range(num_blocks)], monkeypatch, num_detectors=3)
    assert stats.images_per_second is None
