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
from torchvision.models.detection._utils import BoxLinearCoder
from torchvision.ops import batched_nms, nms

_CODER = BoxLinearCoder(normalize_by_size=True)
# Rows side by side whose best logit is looked for at once: reducing 91 numbers takes 50 ns, reducing 364 as good as that.
# Of eights 0.03 ms less would be read ahead and twice the rows looked at closer
_GROUP: Final = 4
# Boxes of all classes in one call of NMS at most: 800 take 0.5 ms, 91 calls 2.3; 1,600 that all stay 3.4 and 2.5
_IN_ONE_CALL: Final = 1200


@dataclass(frozen=True, slots=True)
class HeadOutputs:
    """What backbone and head say about one micro-batch. A: anchors of all levels, one after the other."""

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
    first, for the whole micro-batch at once, and only they are scored. A row is one anchor of one image, image by image.
    """
    num_images, num_anchors, _ = outputs.cls_logits.shape
    logits, ctrness = outputs.cls_logits.flatten(0, 1), outputs.bbox_ctrness.flatten()
    row, label = _candidates(logits, ctrness, score_threshold)
    score = torch.sqrt(torch.sigmoid(logits[row, label]) * torch.sigmoid(ctrness[row]))
    num_levels = len(outputs.num_anchors_per_level)
    level_ends = torch.tensor(list(accumulate([*outputs.num_anchors_per_level] * num_images)), device=row.device)
    best, counts = _best_per_level(row, score, level_ends, score_threshold, topk_candidates)
    row, label, score = row[best], label[best], score[best]
    boxes = _CODER.decode(outputs.bbox_regression.flatten(0, 1)[row], outputs.anchors[row % num_anchors])

    found = []
    per_image = [sum(counts[i : i + num_levels]) for i in range(0, len(counts), num_levels)]
    corners = torch.tensor([(w, h, w, h) for h, w in image_shapes], dtype=boxes.dtype, device=boxes.device)
    parts = (torch.split(part, per_image) for part in (boxes, score, label))
    for b, s, k, corner in zip(*parts, corners, strict=True):  # per image: NMS must not see others
        b = b.clamp(min=0).minimum(corner)
        kept = first_of_nms(b, s, k, nms_threshold, max_detections)
        found.append(Found(b[kept], k[kept], s[kept]))
    return found


def _candidates(logits: Tensor, ctrness: Tensor, score_threshold: float) -> tuple[Tensor, Tensor]:
    """(row, label) of all that can pass, ascending: torchvision's order within each level.

    Groups of rows first, by what could pass at the best centre-ness; then every number of the groups that are left, or of
    all where they are many. To look at 1.6 million numbers one by one takes 1.2 ms of one core; at each group's best
    0.25 ms, as long as memory takes to give them.
    """
    num_rows, num_classes = logits.shape
    num_groups = num_rows // _GROUP
    best = logits[: num_groups * _GROUP].view(num_groups, _GROUP * num_classes).amax(1)
    group = _nonzero(~(best <= _least_of_all(score_threshold)))  # a NaN says nothing of its group
    if 2 * len(group) > num_groups:
        row = torch.arange(num_rows, device=logits.device)
    else:
        near = (group[:, None] * _GROUP + torch.arange(_GROUP, device=group.device)).view(-1)
        row = torch.cat([near, torch.arange(num_groups * _GROUP, num_rows, device=group.device)])
        logits, ctrness = logits.index_select(0, row), ctrness[row]
    least = logits_below(score_threshold, ctrness)
    passed = _nonzero(logits > least[:, None])
    return row[passed // num_classes], passed % num_classes


@functools.cache
def _least_of_all(score_threshold: float) -> float:
    return float(logits_below(score_threshold, torch.tensor(math.inf)))  # the logit of a centre-ness of 1


def _nonzero(mask: Tensor) -> Tensor:
    """Places in the flat mask. On a CPU numpy's where few are set: 0.15 ns a value, torch's 1.1."""
    if mask.is_cpu and mask.numel() > 10_000:
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.view(-1).nonzero()[:, 0]


def logits_below(score_threshold: float, ctrness: Tensor) -> Tensor:
    """For each centre-ness logit a classification logit that every score above the threshold exceeds.

    √(σ(cls)·σ(ctr)) > t is σ(cls) > t² / σ(ctr). 1e-5 is far more than float32 loses on the way. Where t² comes near
    float32's denormals nothing is left out.
    """
    probability = score_threshold**2 * (1 - 1e-5) / torch.sigmoid(ctrness)
    if score_threshold**2 <= 1e-30:
        return torch.full_like(ctrness, -math.inf)
    return torch.logit(probability.clamp(max=1.0))  # above 1: +inf, for nothing passes there


def _best_per_level(
    row: Tensor, score: Tensor, level_ends: Tensor, score_threshold: float, topk_candidates: int
) -> tuple[Tensor, list[int]]:
    """Places of the candidates above the threshold and among the best of their level; how many there are in each level.

    `level_ends`: the row after the last of each level, image by image. Rows ascend.
    """
    passed = _nonzero(score > score_threshold)
    row, score = row[passed], score[passed]
    ends = torch.searchsorted(row, level_ends).tolist()
    best, counts = [], []
    for start, end in pairwise([0, *ends]):
        counts.append(min(topk_candidates, end - start))
        if end - start:
            # topk also where nothing is cut: it decides the order of equal scores, and so which of them NMS keeps
            best.append(passed[start:end][score[start:end].topk(counts[-1]).indices])
    return torch.cat(best) if best else passed, counts


def first_of_nms(boxes: Tensor, scores: Tensor, labels: Tensor, nms_threshold: float, max_detections: int) -> Tensor:
    """Places of the first `max_detections` that torchvision's batched_nms keeps, scores descending.

    boxes: (n, 4) xyxy from 0, scores, labels: (n,).
    Only a kept box that scores higher suppresses a box. So the best few hundred are looked at first, then twice as many
    beside those that stayed, then, if it must be, all others beside those.
    """
    if boxes.numel() <= (4000 if boxes.is_cpu else 100_000):
        # torchvision tells classes apart by shifting boxes then, which rounds them: so what counts are all boxes
        return cast("Tensor", batched_nms(boxes, scores, labels, nms_threshold)[:max_detections])
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
