"""The detector finds what torchvision's FCOS finds in each image alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from fcos_ray.model.detector import Detector
from fcos_ray.model.parameters import Weights
from fcos_ray.types import Detections
from tests.model.images import corpus, gray, noise, shapes
from tests.parity import Difference, assert_same_detections

SMALL = {"min_size": 160, "max_size": 266}
LIMITS = {"score_threshold": 0.2, "max_detections": 300}
TORCHVISION_LIMITS = {"score_thresh": 0.2, "detections_per_img": 300}


def compare(got: Iterable[Detections], wanted: Iterable[Detections]) -> Difference:
    found = [assert_same_detections(g, w, **LIMITS) for g, w in zip(got, wanted, strict=True)]
    worst = Difference(max(d.box_pixels for d in found), max(d.score for d in found), sum(d.excused for d in found))
    print(f"{len(found)} images, worst: {worst}")
    return worst


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return corpus()


@pytest.fixture(scope="module")
def wanted(make_reference: Callable, images: list[np.ndarray]) -> list[Detections]:
    reference = make_reference(**SMALL, **TORCHVISION_LIMITS)
    return [reference(image) for image in images]


@pytest.mark.parametrize("cap", [1, 3, 8])
def test_detections_equal_torchvisions_one_by_one_in_any_order_and_micro_batch(
    weights: Weights, images: list[np.ndarray], wanted: list[Detections], cap: int
) -> None:
    assert sum(len(w.scores) for w in wanted) > 3000  # there is something to compare
    detector = Detector(weights, device="cpu", max_micro_batch=cap, **SMALL, **LIMITS)
    order = list(range(len(images)))
    random.Random(cap).shuffle(order)
    worst = compare(detector([images[i] for i in order]), [wanted[i] for i in order])
    assert worst.excused <= 10


@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, FrozenBatchNorm2d])
def test_both_kinds_of_batch_norm_are_reproduced(
    weights: Weights, make_reference: Callable, images: list[np.ndarray], norm_layer: Callable[..., nn.Module]
) -> None:
    reference = make_reference(norm_layer, **SMALL, **TORCHVISION_LIMITS)
    some = images[::3]
    compare(Detector(weights, device="cpu", **SMALL, **LIMITS)(some), map(reference, some))


def test_detections_equal_torchvisions_at_the_default_sizes(weights: Weights, make_reference: Callable) -> None:
    some = [gray(480, 640), noise(900, 1400), shapes(120, 960)]  # enlarged, shrunk, panorama 1:8
    compare(Detector(weights, device="cpu", **LIMITS)(some), map(make_reference(**TORCHVISION_LIMITS), some))


def test_float_tensors_and_other_means_are_treated_as_torchvision_does(
    weights: Weights, make_reference: Callable
) -> None:
    channels = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.2, 0.1]}
    some = [torch.rand(3, 200, 300, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    reference = make_reference(**SMALL, **TORCHVISION_LIMITS, **channels)
    compare(Detector(weights, device="cpu", **SMALL, **LIMITS, **channels)(some), map(reference, some))


def test_the_comparison_itself_sees_each_kind_of_difference(wanted: list[Detections]) -> None:
    d = wanted[0]
    assert len(d.scores) > 50
    moved = d.boxes.copy()
    moved[5] += 0.02
    other_label, other_score, fewer = d.labels.copy(), d.scores.copy(), slice(1, None)
    other_label[5] += 1
    other_score[0] += 2e-5
    for wrong in (
        replace(d, boxes=moved),
        replace(d, labels=other_label),
        replace(d, scores=other_score),
        Detections(d.boxes[fewer], d.labels[fewer], d.scores[fewer]),
    ):
        with pytest.raises(AssertionError, match="differ"):
            assert_same_detections(wrong, d, **LIMITS)
