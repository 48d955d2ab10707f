"""Head outputs -> detections, as FCOS.postprocess_detections gives them. Knows tensors, not images or weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Final, cast

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import nms

# Numbers side by side whose best is looked for at once: torch takes 0.10 ms hot for 1.6 million, 0.24 when their count is
# no multiple of 16, as four anchors of 91 classes have it
_GROUP: Final = 256
# Boxes of all classes in one call of NMS at most: 800 take 0.5 ms, 91 calls 2.3; 1,600 that all stay 3.4 and 2.5
_IN_ONE_CALL: Final = 1200


@dataclass(frozen=True, slots=True)
class HeadOutputs:
    """What backbone and head say about one micro-batch, in float32. A: anchors of all levels, one after the other."""

    cls_logits: Tensor  # (N, A, K)
    bbox_regression: Tensor  # (N, A, 4)
    bbox_ctrness: Tensor  # (N, A, 1)
    anchors: Tensor  # (A, 4) xyxy, the same for every image of a micro-batch
    num_anchors_per_level: Sequence[int]


@dataclass(frozen=True, slots=True)
class Found:
    """One image's detections, on the device, scores descending."""

    boxes: Tensor  # (n, 4) xyxy, pixels of the resized image
    labels: Tensor  # (n,) int64
    scores: Tensor  # (n,)


def postprocess(
    outputs: HeadOutputs,
    image_shapes: Sequence[tuple[int, int]],
    *,
    score_threshold: float,
    nms_threshold: float,
    max_detections: int,
    topk_candidates: int,
) -> list[Found]:
    """Per image what torchvision's FCOS finds: threshold, best `topk_candidates` of each level, decode, clip, NMS, cut.

    `image_shapes`: (height, width) of each resized image within the padded micro-batch.
    torchvision scores every (anchor, class), 2 million at 800×1333. Here the few that can pass are picked by their logit
    first, and only they are scored. One image after the other, as NMS goes anyway; on a CPU a micro-batch is one by default.
    """
    found = []
    by_image = zip(outputs.cls_logits, outputs.bbox_regression, outputs.bbox_ctrness, image_shapes, strict=True)
    for logits, regression, ctrness, (height, width) in by_image:
        place, score = _passing(logits, ctrness, outputs.num_anchors_per_level, score_threshold)
        if len(place) > topk_candidates or len(set(score.tolist())) < len(place):
            best = _best_of_levels(place // logits.shape[1], score, outputs.num_anchors_per_level, topk_candidates)
            place, score = place[best], score[best]
        anchor, label = place // logits.shape[1], place % logits.shape[1]
        boxes = _decoded(regression[anchor], outputs.anchors[anchor])
        boxes[:, 0::2].clamp_(0, width)
        boxes[:, 1::2].clamp_(0, height)
        kept = first_of_nms(boxes, score, label, nms_threshold, max_detections)
        found.append(Found(boxes[kept], label[kept], score[kept]))
    return found


def _passing(
    cls_logits: Tensor, ctrness: Tensor, num_anchors_per_level: Sequence[int], score_threshold: float
) -> tuple[Tensor, Tensor]:
    """What scores above the threshold: places in the flat (A, K) logits, ascending, and scores. `ctrness`: (A, 1)."""
    logits, num_classes = cls_logits.flatten(), cls_logits.shape[1]
    place = _candidates(logits, logit_below(score_threshold))
    if 7 * len(place) > len(logits):  # to score all where they are takes less then: 3 ns each, not 20
        levels = zip(*(torch.split(part, list(num_anchors_per_level)) for part in (cls_logits, ctrness)), strict=True)
        score = torch.cat([torch.sqrt(torch.sigmoid(cls) * torch.sigmoid(ctr)).flatten() for cls, ctr in levels])
        place = _above(score, score_threshold)
        return place, score[place]
    # What is beyond a multiple of 32 torch's sigmoid computes by another loop, some off by a bit: in torchvision's scores
    # that is the end of each level, here it would be all where fewer than 32 pass
    n = len(place)
    both = torch.cat([logits[place], ctrness.flatten()[place // num_classes], logits.new_zeros(-2 * n % 32)]).sigmoid()
    score = torch.sqrt(both[:n] * both[n : 2 * n])
    passed = _above(score, score_threshold)
    return place[passed], score[passed]


@functools.cache
def logit_below(score_threshold: float) -> float:
    """What a class's logit must exceed for its score to pass.

    √(σ(cls)·σ(ctr)) > t needs σ(cls) > t². 1e-5 is more than float32 loses on the way. Where t² comes near float32's
    denormals nothing is left out.
    """
    probability = score_threshold**2 * (1 - 1e-5)
    return math.log(probability / (1 - probability)) if probability > 1e-30 else -math.inf


def _candidates(logits: Tensor, least: float) -> Tensor:
    """Places above `least`, ascending: torchvision's order within each level.

    Groups first, then every number of the groups whose best is above, or of all where those are many. To read 1.6 million
    numbers out of memory takes 0.2 ms of one core, to compare them all and list what passes another 0.3.
    """
    whole = len(logits) // _GROUP * _GROUP
    groups = logits[:whole].view(-1, _GROUP)
    open_groups = (~(groups.amax(1) <= least)).nonzero()[:, 0]  # a NaN says nothing of its group
    if 8 * len(open_groups) > len(groups):
        return _above(logits, least)
    nth, within = (groups.index_select(0, open_groups) > least).nonzero().unbind(1)
    place, rest = open_groups[nth] * _GROUP + within, _above(logits[whole:], least)
    return torch.cat([place, whole + rest]) if len(rest) else place


def _above(values: Tensor, least: float) -> Tensor:
    """Places of the values above `least`, ascending. On a CPU numpy's where there are many: 0.2 ns each, torch's 1.5."""
    if values.is_cpu and len(values) > 5000:
        return torch.from_numpy(np.flatnonzero(values.numpy() > float(least)))  # numpy's floats would not be rounded
    return (values > least).nonzero()[:, 0]


def _decoded(distances: Tensor, anchors: Tensor) -> Tensor:
    """(n, 4) xyxy, as torchvision's BoxLinearCoder gives them, in fewer calls.

    `distances`: (n, 4), from the anchor's middle to the box's sides, in sides of the anchor.
    """
    sides = anchors[:, 2:] - anchors[:, :2]
    middle = 0.5 * (anchors[:, :2] + anchors[:, 2:])
    return torch.cat([middle - distances[:, :2] * sides, middle + distances[:, 2:] * sides], 1)


def _best_of_levels(
    anchor: Tensor, score: Tensor, num_anchors_per_level: Sequence[int], topk_candidates: int
) -> Tensor:
    """Places of the best of each level, level by level, best first. Anchors ascend.

    topk also where nothing is cut: it decides the order of equal scores, and so which of them NMS keeps.
    """
    level_ends = torch.tensor(list(accumulate(num_anchors_per_level)), device=anchor.device)
    ends = torch.searchsorted(anchor, level_ends).tolist()
    return torch.cat([s + score[s:e].topk(min(topk_candidates, e - s)).indices for s, e in pairwise([0, *ends])])


def first_of_nms(boxes: Tensor, scores: Tensor, labels: Tensor, nms_threshold: float, max_detections: int) -> Tensor:
    """Places of the first `max_detections` that torchvision's batched_nms keeps, scores descending.

    boxes: (n, 4) xyxy from 0, scores, labels: (n,).
    Only a kept box that scores higher suppresses a box. So the best few hundred are looked at first, then twice as many
    beside those that stayed, then, if it must be, all others beside those.
    """
    if not len(boxes):
        return torch.empty(0, dtype=torch.int64, device=boxes.device)
    if boxes.numel() <= (4000 if boxes.is_cpu else 100_000):
        # torchvision tells classes apart by shifting boxes then, which rounds them: so what counts are all boxes
        shifts = labels.to(boxes.dtype) * (boxes.max() + 1)
        return cast("Tensor", nms(boxes + shifts[:, None], scores, nms_threshold)[:max_detections])
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
    return torch.cat([places[nms(b, s, nms_threshold)] for places, b, s in zip(*parts, strict=True)]).sort().values


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
    low, high = (nms(shifted, scores.double(), nms_threshold + d) for d in (-1e-5, 1e-5))
    return cast("Tensor", low) if torch.equal(low, high) else None
