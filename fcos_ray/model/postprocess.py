"""Head outputs -> detections, as FCOS.postprocess_detections gives them. Knows tensors, not images or weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, cast

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxLinearCoder
from torchvision.ops import batched_nms, nms

_CODER = BoxLinearCoder(normalize_by_size=True)
# Anchors side by side whose best logit is looked for at once: a row of 700 numbers is read at memory's speed
_GROUP: Final = 8
_BEST: Final = torch.tensor(math.inf)  # logit of a centre-ness of 1


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
    first, for the whole micro-batch at once, and only they are scored.
    """
    image, anchor, label = _candidates(outputs, score_threshold)
    score = torch.sqrt(
        torch.sigmoid(outputs.cls_logits[image, anchor, label]) * torch.sigmoid(outputs.bbox_ctrness[image, anchor, 0])
    )
    keep = _best_per_level(outputs, image, anchor, score, score_threshold, topk_candidates)
    image, anchor, label, score = image[keep], anchor[keep], label[keep], score[keep]
    boxes = _CODER.decode(outputs.bbox_regression[image, anchor], outputs.anchors[anchor])
    boxes = _clip(boxes, torch.tensor(image_shapes, dtype=boxes.dtype, device=boxes.device)[image])

    found = []
    counts = torch.bincount(image, minlength=len(image_shapes)).tolist()
    parts = (torch.split(part, counts) for part in (boxes, score, label))
    for b, s, k in zip(*parts, strict=True):  # per image: NMS must not see others
        best = _nms(b, s, k, nms_threshold)[:max_detections]
        found.append(Found(b[best], k[best], s[best]))
    return found


def _candidates(outputs: HeadOutputs, score_threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """(image, anchor, label) of all that can pass, ascending: torchvision's order within each level.

    Groups of anchors first, by what could pass at the best centre-ness; then an anchor's best class where many groups are
    left; then the classes. To look at 1.6 million numbers one by one takes 2.7 ms of one core, at each anchor's best 0.9 ms,
    at each group's 0.2 ms.
    """
    logits, ctrness = outputs.cls_logits, outputs.bbox_ctrness[..., 0]
    num_images, num_anchors, num_classes = logits.shape
    num_groups = num_anchors // _GROUP
    best = logits[:, : num_groups * _GROUP].view(num_images, num_groups, _GROUP * num_classes).amax(2)
    # ones: the last few anchors fill no group
    near = logits.new_ones((num_images, num_groups + 1), dtype=torch.bool)
    torch.gt(best, float(logits_below(score_threshold, _BEST)), out=near[:, :num_groups])
    image, group = near.nonzero(as_tuple=True)
    if 4 * len(image) > near.numel():
        least = logits_below(score_threshold, ctrness)
        image, anchor = (logits.amax(2) > least).nonzero(as_tuple=True)
        place, label = (logits[image, anchor] > least[image, anchor, None]).nonzero(as_tuple=True)
        return image[place], anchor[place], label
    image = image[:, None]
    anchor = group[:, None] * _GROUP + torch.arange(_GROUP, device=group.device)
    there = anchor.clamp(max=num_anchors - 1)
    least = logits_below(score_threshold, ctrness[image, there]).masked_fill_(there < anchor, math.inf)
    place, member, label = (logits[image, there] > least[..., None]).nonzero(as_tuple=True)
    return image[place, 0], anchor[place, member], label


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
    outputs: HeadOutputs, image: Tensor, anchor: Tensor, score: Tensor, score_threshold: float, topk_candidates: int
) -> Tensor:
    """Indices of the candidates above the threshold and among the best of their (image, level); images ascend."""
    passed = torch.where(score > score_threshold)[0]
    num_levels = len(outputs.num_anchors_per_level)
    last = torch.tensor(outputs.num_anchors_per_level, device=anchor.device).cumsum(0)
    level = torch.bucketize(anchor[passed], last, right=True)
    num_images = outputs.cls_logits.shape[0]
    counts = torch.bincount(image[passed] * num_levels + level, minlength=num_images * num_levels).tolist()
    best = []
    for indices in torch.split(passed, counts):
        # topk also where nothing is cut: it decides the order of equal scores, and so which of them NMS keeps
        best.append(indices[score[indices].topk(min(topk_candidates, len(indices))).indices])
    return torch.cat(best)


def _nms(boxes: Tensor, scores: Tensor, labels: Tensor, nms_threshold: float) -> Tensor:
    """torchvision's batched_nms. It looks for each class's boxes among all; here they are sorted by class once."""
    if boxes.numel() <= (4000 if boxes.device.type == "cpu" else 20_000):
        # torchvision 0.29 tells classes apart by shifting boxes then, which rounds them: so it is done here
        return cast("Tensor", batched_nms(boxes, scores, labels, nms_threshold))
    by_label = labels.sort(stable=True).indices
    counts = torch.bincount(labels)
    sizes = counts[counts > 0].tolist()
    parts = (torch.split(part, sizes) for part in (by_label, boxes[by_label], scores[by_label]))
    kept = torch.cat([places[nms(b, s, nms_threshold)] for places, b, s in zip(*parts, strict=True)]).sort().values
    return kept[scores[kept].sort(descending=True).indices]  # not stable: the order of equal scores is torchvision's


def _clip(boxes: Tensor, shapes: Tensor) -> Tensor:
    """Clip each box to its own image. boxes: (n, 4) xyxy, shapes: (n, 2) height, width."""
    return torch.minimum(boxes.clamp(min=0), shapes.flip(1).repeat(1, 2))
