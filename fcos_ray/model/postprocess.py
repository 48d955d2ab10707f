"""Head outputs -> detections, as FCOS.postprocess_detections gives them. Knows tensors and arrays, not images or weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fcos_ray.model.nms import SHIFTED, Floats, Ints, first_of_nms

# Numbers side by side whose best is looked for at once: torch takes 0.10 ms hot for 1.6 million, 0.24 when their count is
# no multiple of 16, as four anchors of 91 classes have it
_GROUP: Final = 256
_FAR: Final = np.float32(1e30)  # sides of an anchor


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
    labels: Ints  # (n,)
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
    first, and only they are scored: by numpy in the host's memory, whose small calls take half of torch's. One image after
    the other, as NMS goes anyway; on a CPU a micro-batch is one by default. Outputs of a GPU are scored by the host's
    arithmetic, which may differ from the GPU's in the last bit.
    """
    found = []
    heads = (outputs.cls_logits, outputs.bbox_regression, outputs.bbox_ctrness)
    by_image = zip(*(part.unbind() for part in heads), image_shapes, strict=True)
    for logits, regression, ctrness, (height, width) in by_image:
        num_classes, shifted = logits.shape[1], SHIFTED[logits.device.type]
        place, score = _best(logits, ctrness, outputs.num_anchors_per_level, score_threshold, topk_candidates)
        anchor, label = place // num_classes, place % num_classes
        boxes = _decoded(_fetched_at(regression, anchor), _fetched_at(outputs.anchors, anchor))
        np.maximum(boxes, 0, out=boxes)
        np.minimum(boxes, np.array([width, height, width, height], np.float32), out=boxes)
        kept = first_of_nms(boxes, score, label, nms_threshold, max_detections, shifted=shifted)
        found.append(Found(boxes[kept], label[kept], score[kept]))
    return found


def _best(
    cls_logits: Tensor,
    ctrness: Tensor,
    num_anchors_per_level: Sequence[int],
    score_threshold: float,
    topk_candidates: int,
) -> tuple[Ints, Floats]:
    """The best of each level that score above the threshold: places in the flat (A, K) logits, and scores.

    cls_logits: (A, K), ctrness: (A, 1).
    """
    candidates = _candidates(cls_logits.flatten(), logit_below(score_threshold))
    if candidates is None:
        return _best_of_all(cls_logits, ctrness, num_anchors_per_level, score_threshold, topk_candidates)
    place, logit = candidates
    anchor = place // cls_logits.shape[1]
    score = _scores(logit, _fetched_at(ctrness.flatten(), anchor))
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


def _candidates(logits: Tensor, least: float) -> tuple[Ints, Floats] | None:
    """Places above `least`, ascending, which is torchvision's order within each level, and the logits there.

    None where more than a third of them are above: to score all where they are takes less then (a core of Zen 3).
    Groups first, then every number of the groups whose best is above, or of all where those are many. To read 1.6 million
    numbers out of memory takes 0.2 ms of one core, to compare them all and list what passes another 0.3.
    """
    if least == -math.inf:
        return None
    whole = len(logits) // _GROUP * _GROUP
    groups = logits[:whole].view(-1, _GROUP)
    open_groups = (~(_fetched(groups.amax(1)) <= least)).nonzero()[0]  # a NaN says nothing of its group
    if 8 * len(open_groups) > len(groups):
        every = _fetched(logits)
        place = _above(every, least)
        return (place, every[place]) if 3 * len(place) <= len(every) else None
    numbers, end = _fetched_at(groups, open_groups).ravel(), _fetched(logits[whole:])
    inside, rest = _above(numbers, least), _above(end, least)
    place, logit = open_groups[inside // _GROUP] * _GROUP + inside % _GROUP, numbers[inside]
    return (np.append(place, whole + rest), np.append(logit, end[rest])) if len(rest) else (place, logit)


def _scores(logit: Floats, ctrness: Floats) -> Floats:
    """√(σ(logit)·σ(ctrness)), σ by torch as torchvision's."""
    # What is beyond a multiple of 32 torch's sigmoid computes by another loop, some off by a bit: in torchvision's scores
    # that is the end of each level, here it would be all where fewer than 32 pass
    n = len(logit)
    both = np.zeros(2 * n + -2 * n % 32, np.float32)
    both[:n], both[n : 2 * n] = logit, ctrness
    torch.from_numpy(both).sigmoid_()
    score = both[:n] * both[n : 2 * n]
    np.sqrt(score, out=score)
    return score


def _best_of_all(
    cls_logits: Tensor,
    ctrness: Tensor,
    num_anchors_per_level: Sequence[int],
    score_threshold: float,
    topk_candidates: int,
) -> tuple[Ints, Floats]:
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


def _best_of_levels(anchor: Ints, score: Floats, num_anchors_per_level: Sequence[int], topk_candidates: int) -> Ints:
    """Places of the best of each level, level by level, best first. Anchors ascend.

    topk also where nothing is cut: it decides the order of equal scores, and so which of them NMS keeps.
    """
    ends = np.searchsorted(anchor, list(accumulate(num_anchors_per_level))).tolist()
    levels = ((s, torch.from_numpy(score[s:e])) for s, e in pairwise([0, *ends]))
    return np.concatenate(
        [s + of_level.topk(min(topk_candidates, len(of_level))).indices.numpy() for s, of_level in levels]
    )


def _above(values: Floats, least: float) -> Ints:
    """Places of the values above `least`, ascending: 0.2 ns each, torch's nonzero takes 1.5."""
    return (values > float(least)).nonzero()[0]  # numpy's floats would not be rounded


def _fetched_at(values: Tensor, places: Ints) -> NDArray[Any]:
    """What is at these places of the first dimension, in the host's memory."""
    if values.is_cpu:
        here: NDArray[Any] = values.numpy()[places]
        return here
    return _fetched(values[torch.from_numpy(places).to(values.device)])


def _fetched(values: Tensor) -> NDArray[Any]:
    fetched: NDArray[Any] = values.cpu().numpy()
    return fetched


def _decoded(distances: Floats, anchors: Floats) -> Floats:
    """(n, 4) xyxy, as torchvision's BoxLinearCoder gives them.

    `distances`: (n, 4), from the anchor's middle to the box's sides, in sides of the anchor.
    """
    low, high = anchors[:, :2], anchors[:, 2:]
    # Beyond any image, and finite when multiplied: else numpy would warn, and errstate takes 0.012 of few detections' 0.59 ms
    bounded = np.maximum(np.minimum(distances, _FAR), -_FAR)
    reach = bounded.reshape(-1, 2, 2) * (high - low)[:, None]
    middle, boxes = np.float32(0.5) * (low + high), np.empty_like(anchors)
    np.subtract(middle, reach[:, 0], out=boxes[:, :2])
    np.add(middle, reach[:, 1], out=boxes[:, 2:])
    return boxes
