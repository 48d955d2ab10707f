"""Are two results the same detections? The rule of DESIGN §5, for every test that compares with torchvision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fcos_ray.types import Detections


@dataclass(frozen=True, slots=True)
class Difference:
    """What was left between two results that count as the same."""

    box_pixels: float  # largest difference of a matched coordinate
    score: float  # largest difference of a matched score
    excused: int  # detections without a partner, each at a threshold, cut or tie


def from_torchvision(output: Mapping[str, object]) -> Detections:
    """One of the dicts a torchvision detection model returns."""
    return Detections(*(np.asarray(output[key]) for key in ("boxes", "labels", "scores")))


def assert_same_detections(
    got: Detections,
    wanted: Detections,
    *,
    score_threshold: float,
    max_detections: int,
    nms_threshold: float = 0.6,
    box_pixels: float = 0.01,
    score: float = 1e-5,
) -> Difference:
    """Every detection has a partner of the same label, score and box in the other result.

    One without a partner is excused only where a hair decides: its score lies within `score` of the threshold, of the
    lowest one that was kept when the result is full, or of another box of its label that overlaps it by more than
    `nms_threshold` (which of the two suppresses the other is open). The same box, moved, is not another one.
    """
    assert np.all(np.diff(got.scores) <= 0), "scores must descend"
    assert got.boxes.shape == (len(got.scores), 4)
    partner = np.full(len(wanted.scores), -1)
    free = np.ones(len(got.scores), dtype=bool)
    for i in range(len(wanted.scores)):
        apart = np.abs(got.boxes - wanted.boxes[i]).max(axis=1, initial=0)
        near = free & (got.labels == wanted.labels[i]) & (np.abs(got.scores - wanted.scores[i]) <= score)
        near &= apart <= box_pixels
        if near.any():
            partner[i] = np.flatnonzero(near)[np.argmin(apart[near])]
            free[partner[i]] = False
    matched = partner >= 0
    lonely = [(wanted, got, i) for i in np.flatnonzero(~matched)] + [(got, wanted, i) for i in np.flatnonzero(free)]
    unexcused = [
        f"{'missing' if mine is wanted else 'extra'}: label {mine.labels[i]} score {mine.scores[i]:.7f} {mine.boxes[i]}"
        for mine, other, i in lonely
        if not _excused(mine, other, int(i), score_threshold, max_detections, nms_threshold, score)
    ]
    counts = f"({len(got.scores)} detections for {len(wanted.scores)})"
    assert not unexcused, f"{len(unexcused)} differ {counts}:\n" + "\n".join(unexcused[:10])
    pairs = partner[matched]
    return Difference(
        box_pixels=float(np.abs(got.boxes[pairs] - wanted.boxes[matched]).max(initial=0)),
        score=float(np.abs(got.scores[pairs] - wanted.scores[matched]).max(initial=0)),
        excused=len(lonely),
    )


def _excused(
    mine: Detections,
    other: Detections,
    i: int,
    score_threshold: float,
    max_detections: int,
    nms_threshold: float,
    tolerance: float,
) -> bool:
    score = mine.scores[i]
    at_threshold = abs(score - score_threshold) <= tolerance
    at_cut = any(
        len(result.scores) == max_detections and abs(score - result.scores.min()) <= tolerance
        for result in (mine, other)
    )
    tied = (other.labels == mine.labels[i]) & (np.abs(other.scores - score) <= tolerance)
    tied &= overlaps(mine.boxes[i], other.boxes) > nms_threshold - 1e-3
    tied &= np.abs(other.boxes - mine.boxes[i]).max(axis=1, initial=0) > 1
    return bool(at_threshold or at_cut or tied.any())


def overlaps(box: NDArray[np.float32], boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """IoU of one box with each of (N, 4) boxes; 0 where both are empty."""
    corner = np.maximum(box[:2], boxes[:, :2])
    inter = np.clip(np.minimum(box[2:], boxes[:, 2:]) - corner, 0, None).prod(axis=1)
    union = (box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) - inter
    return np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)
