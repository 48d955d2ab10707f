"""Head outputs -> detections, as FCOS.postprocess_detections gives them. Knows tensors, not images or weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Final, cast

import numpy as np
import torch
import torchvision.ops  # noqa: F401 - registers torch.ops.torchvision
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float32]
Places = NDArray[np.int64]

# Numbers side by side whose best is looked for at once: torch takes 0.10 ms hot for 1.6 million, 0.24 when their count is
# no multiple of 16, as four anchors of 91 classes have it
_GROUP: Final = 256
# Boxes whose classes torchvision's batched_nms tells apart by shifting them, on a CPU
_SHIFTED: Final = 1000
# Boxes of all classes in one call of NMS at most: 800 take 0.5 ms, 91 calls 2.3; 1,600 that all stay 3.4 and 2.5
_IN_ONE_CALL: Final = 1200
# What torchvision.ops.nms calls after it told torch's usage log, which takes 0.03 of the 0.85 ms of few detections
_nms: Final = torch.ops.torchvision.nms


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
    """One image's detections, in the host's memory, scores descending."""

    boxes: Floats  # (n, 4) xyxy, pixels of the resized image
    labels: Places  # (n,)
    scores: Floats  # (n,)


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
    first, and only they are fetched from the device and scored: by numpy, whose small calls take half of torch's. One image
    after the other, as NMS goes anyway; on a CPU a micro-batch is one by default.
    """
    found = []
    heads = (outputs.cls_logits, outputs.bbox_regression, outputs.bbox_ctrness)
    by_image = zip(*(part.unbind() for part in heads), image_shapes, strict=True)
    for logits, regression, ctrness, (height, width) in by_image:
        num_classes = logits.shape[1]
        place, score = _best(logits, ctrness, outputs.num_anchors_per_level, score_threshold, topk_candidates)
        anchor, label = place // num_classes, place % num_classes
        boxes = _decoded(_at(regression, anchor), _at(outputs.anchors, anchor))
        np.maximum(boxes, 0, out=boxes)
        np.minimum(boxes, np.array([width, height, width, height], np.float32), out=boxes)
        kept = first_of_nms(boxes, score, label, nms_threshold, max_detections)
        found.append(Found(boxes[kept], label[kept], score[kept]))
    return found


def _best(
    cls_logits: Tensor,
    ctrness: Tensor,
    num_anchors_per_level: Sequence[int],
    score_threshold: float,
    topk_candidates: int,
) -> tuple[Places, Floats]:
    """The best of each level that score above the threshold: places in the flat (A, K) logits, and scores.

    cls_logits: (A, K), ctrness: (A, 1).
    """
    place, logit = _candidates(cls_logits.flatten(), logit_below(score_threshold))
    if 7 * len(place) > cls_logits.numel():  # to score all where they are takes less then: 3 ns each, not 20
        return _best_of_all(cls_logits, ctrness, num_anchors_per_level, score_threshold, topk_candidates)
    anchor = place // cls_logits.shape[1]
    score = _scores(logit, _at(ctrness.flatten(), anchor))
    passed = _above(score, score_threshold)
    place, anchor, score = place[passed], anchor[passed], score[passed]
    if len(place) <= topk_candidates and len(set(score.tolist())) == len(place):
        return place, score  # NMS orders all the same, by score
    best = _best_of_levels(anchor, score, num_anchors_per_level, topk_candidates)
    return place[best], score[best]


@functools.cache
def logit_below(score_threshold: float) -> float:
    """What a class's logit must exceed for its score to pass.

    √(σ(cls)·σ(ctr)) > t needs σ(cls) > t². 1e-5 is more than float32 loses on the way. Where t² comes near float32's
    denormals nothing is left out.
    """
    probability = score_threshold**2 * (1 - 1e-5)
    return math.log(probability / (1 - probability)) if probability > 1e-30 else -math.inf


def _candidates(logits: Tensor, least: float) -> tuple[Places, Floats]:
    """Places above `least`, ascending, which is torchvision's order within each level, and what is there.

    Groups first, then every number of the groups whose best is above, or of all where those are many. To read 1.6 million
    numbers out of memory takes 0.2 ms of one core, to compare them all and list what passes another 0.3.
    """
    whole = len(logits) // _GROUP * _GROUP
    groups = logits[:whole].view(-1, _GROUP)
    open_groups = (~(_fetched(groups.amax(1)) <= least)).nonzero()[0]  # a NaN says nothing of its group
    if 8 * len(open_groups) > len(groups):
        every = _fetched(logits)
        place = _above(every, least)
        return place, every[place]
    numbers, end = _at(groups, open_groups).ravel(), _fetched(logits[whole:])
    inside, rest = _above(numbers, least), _above(end, least)
    place, logit = open_groups[inside // _GROUP] * _GROUP + inside % _GROUP, numbers[inside]
    return (np.append(place, whole + rest), np.append(logit, end[rest])) if len(rest) else (place, logit)


def _scores(logit: Floats, ctrness: Floats) -> Floats:
    """√(σ(logit)·σ(ctrness)), by torch as torchvision's."""
    # What is beyond a multiple of 32 torch's sigmoid computes by another loop, some off by a bit: in torchvision's scores
    # that is the end of each level, here it would be all where fewer than 32 pass
    n = len(logit)
    both = np.zeros(2 * n + -2 * n % 32, np.float32)
    both[:n], both[n : 2 * n] = logit, ctrness
    sure = torch.from_numpy(both).sigmoid_()
    score: Floats = torch.sqrt(sure[:n] * sure[n : 2 * n]).numpy()
    return score


def _best_of_all(
    cls_logits: Tensor,
    ctrness: Tensor,
    num_anchors_per_level: Sequence[int],
    score_threshold: float,
    topk_candidates: int,
) -> tuple[Places, Floats]:
    """`_best` as torchvision finds them: every score, on the device."""
    places, scores, start = [], [], 0
    levels = zip(*(torch.split(part, list(num_anchors_per_level)) for part in (cls_logits, ctrness)), strict=True)
    for cls, ctr in levels:
        score = torch.sqrt(torch.sigmoid(cls) * torch.sigmoid(ctr)).flatten()
        if score.is_cpu:
            passed = torch.from_numpy(_above(score.numpy(), score_threshold))
        else:
            passed = (score > score_threshold).nonzero()[:, 0]
        best = score[passed].topk(min(topk_candidates, len(passed)))
        places.append(start + passed[best.indices])
        scores.append(best.values)
        start += len(score)
    return _fetched(torch.cat(places)), _fetched(torch.cat(scores))


def _best_of_levels(
    anchor: Places, score: Floats, num_anchors_per_level: Sequence[int], topk_candidates: int
) -> Places:
    """Places of the best of each level, level by level, best first. Anchors ascend.

    topk also where nothing is cut: it decides the order of equal scores, and so which of them NMS keeps.
    """
    ends = np.searchsorted(anchor, list(accumulate(num_anchors_per_level))).tolist()
    levels = ((s, torch.from_numpy(score[s:e])) for s, e in pairwise([0, *ends]))
    return np.concatenate(
        [s + of_level.topk(min(topk_candidates, len(of_level))).indices.numpy() for s, of_level in levels]
    )


def _above(values: Floats, least: float) -> Places:
    """Places of the values above `least`, ascending: 0.2 ns each, torch's nonzero takes 1.5."""
    return (values > float(least)).nonzero()[0]  # numpy's floats would not be rounded


def _at(values: Tensor, places: Places) -> NDArray[Any]:
    """Rows of a tensor of the device."""
    if values.is_cpu:
        return values.numpy()[places]
    return _fetched(values[torch.from_numpy(places).to(values.device)])


def _fetched(values: Tensor) -> NDArray[Any]:
    fetched: NDArray[Any] = values.cpu().numpy()
    return fetched


def _decoded(distances: Floats, anchors: Floats) -> Floats:
    """(n, 4) xyxy, as torchvision's BoxLinearCoder gives them.

    `distances`: (n, 4), from the anchor's middle to the box's sides, in sides of the anchor.
    """
    sides = anchors[:, 2:] - anchors[:, :2]
    middle = np.float32(0.5) * (anchors[:, :2] + anchors[:, 2:])
    boxes = np.empty_like(anchors)
    np.subtract(middle, distances[:, :2] * sides, out=boxes[:, :2])
    np.add(middle, distances[:, 2:] * sides, out=boxes[:, 2:])
    return boxes


def first_of_nms(boxes: Floats, scores: Floats, labels: Places, nms_threshold: float, max_detections: int) -> Places:
    """Places of the first `max_detections` that torchvision's batched_nms keeps on a CPU, scores descending.

    boxes: (n, 4) xyxy from 0, scores, labels: (n,). On cuda it shifts up to 25,000 boxes, whose overlaps it rounds then.
    """
    if not len(boxes):
        return np.empty(0, np.int64)
    if len(boxes) <= _SHIFTED:
        # torchvision tells classes apart by shifting boxes then, which rounds them: so what counts are all boxes
        shifted = boxes + (labels.astype(boxes.dtype) * (boxes.max() + np.float32(1)))[:, None]
        kept = _nms(torch.from_numpy(shifted), torch.from_numpy(scores), nms_threshold)[:max_detections]
    else:
        tensors = [torch.from_numpy(values) for values in (boxes, scores, labels)]
        kept = _first_of_many(tensors[0], tensors[1], tensors[2], nms_threshold, max_detections)
    return cast("Places", kept.numpy())


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
