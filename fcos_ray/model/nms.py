"""Non-maximum suppression: the first of the boxes that torchvision's batched_nms keeps. Knows arrays in the host's memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, cast

import numpy as np
import torch
import torchvision.ops  # noqa: F401 - registers torch.ops.torchvision
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

# Up to so many boxes on such a device torchvision's batched_nms tells classes apart by shifting their boxes, which rounds them
SHIFTED: Final[Mapping[str, int]] = {"cpu": 1000, "cuda": 25_000}
# Boxes of all classes in one call of NMS at most: 800 take 0.5 ms, 91 calls 2.3; 1,600 that all stay 3.4 and 2.5
_IN_ONE_CALL: Final = 1200
# Boxes at most that are compared by numpy: nms is a dozen small calls into torch, cold after a forward
_FEW: Final = 32
# What torchvision.ops.nms calls after it told torch's usage log: 0.03 of the 0.85 ms that few detections take (Zen 3)
_nms: Final = torch.ops.torchvision.nms


def first_of_nms(
    boxes: Floats,
    scores: Floats,
    labels: Ints,
    nms_threshold: float,
    max_detections: int,
    *,
    shifted: int = SHIFTED["cpu"],
) -> Ints:
    """Places of the first `max_detections` that torchvision's batched_nms keeps, scores descending.

    boxes: (n, 4) xyxy from 0, scores: (n,) numbers, labels: (n,). `shifted`: boxes at most that it would shift, see SHIFTED.
    """
    if not len(boxes):
        return np.empty(0, np.int64)
    if len(boxes) <= shifted:
        far = np.maximum.reduce(boxes, axis=None) + np.float32(1)
        moved = boxes + (labels.astype(boxes.dtype) * far)[:, None]
        few = _nms_of_few(moved, scores, nms_threshold) if len(boxes) <= _FEW else None
        if few is not None:
            return few[:max_detections]
        kept = _nms(torch.from_numpy(moved), torch.from_numpy(scores), nms_threshold)
    else:
        box, score, label = (torch.from_numpy(values) for values in (boxes, scores, labels))
        kept = _first_of_many(box, score, label, nms_threshold, max_detections)
    return cast("Ints", kept.numpy())[:max_detections]


def _nms_of_few(boxes: Floats, scores: Floats, nms_threshold: float) -> Ints | None:
    """Places of what nms keeps, scores descending, from a table of all pairs; None where float32 might decide otherwise.

    In float64. torchvision's float32 begins with the same numbers and rounds sides, areas, their sum and the quotient by 6e-8
    each: its overlap is about 1e-6 away, if nothing underflows. Where one is within 1e-5 of the threshold, or a box has next
    to no area, nms decides.
    """
    order = np.argsort(-scores, kind="stable")  # as nms sorts
    box = boxes[order].astype(np.float64)
    sides = np.minimum(box[:, None, 2:], box[:, 2:]) - np.maximum(box[:, None, :2], box[:, :2])
    np.maximum(sides, 0, out=sides)
    common = sides[..., 0] * sides[..., 1]
    area = common.diagonal()
    union = area[:, None] + area - common
    beyond = common - nms_threshold * union
    if not (np.abs(beyond) > 1e-5 * union + 1e-30).all():  # nor with NaN
        return None
    kept, gone = [], np.zeros(len(boxes), bool)
    for place, suppressed in enumerate(beyond > 0):
        if not gone[place]:
            kept.append(place)
            gone |= suppressed
    return order[kept]


def _first_of_many(boxes: Tensor, scores: Tensor, labels: Tensor, nms_threshold: float, max_detections: int) -> Tensor:
    """`first_of_nms` where each class's boxes are compared where they are.

    Only a kept box that scores higher suppresses a box. So the best few hundred are looked at first, then twice as many
    beside those that stayed, then, if it must be, all others beside those.
    """
    rest = scores.sort(descending=True, stable=True).indices  # as nms sorts
    kept = rest[:0]
    size = few = 4 * max(max_detections, 100)
    while len(rest):
        some, rest = torch.cat([kept, rest[:size]]), rest[size:]
        kept = some[_nms_of_each_class(boxes[some], scores[some], labels[some], nms_threshold)]
        first = scores[kept[: max_detections + 1]]
        enough = len(first) > max_detections
        if enough and bool((first[:-1] > first[1:]).all()):
            return kept[:max_detections]
        size = len(scores) if enough or size > few else 2 * few
    # torchvision's sort is not stable: in which order equal scores come depends on all that is kept
    kept = kept.sort().values
    return kept[scores[kept].sort(descending=True).indices[:max_detections]]


def _nms_of_each_class(boxes: Tensor, scores: Tensor, labels: Tensor, nms_threshold: float) -> Tensor:
    """Places of what is kept, ascending. Scores descend."""
    if len(boxes) <= _IN_ONE_CALL:
        kept = _nms_in_float64(boxes, scores, labels, nms_threshold)
        if kept is not None:
            return kept
    # torchvision looks for each class's boxes among all; here they are sorted by class once
    by_label = labels.sort(stable=True).indices
    sizes = torch.unique_consecutive(labels[by_label], return_counts=True)[1].tolist()
    parts = (torch.split(part, sizes) for part in (by_label, boxes[by_label], scores[by_label]))
    return torch.cat([places[_nms(b, s, nms_threshold)] for places, b, s in zip(*parts, strict=True)]).sort().values


def _nms_in_float64(boxes: Tensor, scores: Tensor, labels: Tensor, nms_threshold: float) -> Tensor | None:
    """All classes in one call, 400 boxes of 91 classes in 0.4 ms instead of 2.3; None where float32 might say otherwise.

    Shifted by less than 2^24 in float64, a box with sides of 0.01 or more overlaps others as it does in float32 where it
    is, to 1e-6; d is 1e-5 here. If what is kept below the threshold t, at t - d, is what is kept above it, at t + d, it is
    kept at t too. By induction: a kept box overlaps no kept one of higher score by more than t - d, a dropped one overlaps
    such a one by more than t + d, and float32 is nearer than d.
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    shifts = labels.double() * (boxes.max().double() + 1)
    if not bool(((sides == 0) | (sides >= 1e-2)).all() & (shifts < 2**24).all()):  # nor with NaN
        return None
    shifted = boxes.double() + shifts[:, None]
    low, high = (_nms(shifted, scores.double(), nms_threshold + d) for d in (-1e-5, 1e-5))
    return cast("Tensor", low) if torch.equal(low, high) else None
