"""What is said of a detector's model."""

from __future__ import annotations

import numpy as np
import pytest

from fcos_ray.model.cost import model_figures, multiply_adds
from fcos_ray.model.detector import Detector
from fcos_ray.model.weights import load_weights
from fcos_ray.types import Image


def test_multiply_adds_are_those_that_torchvision_publishes() -> None:
    """128.21 G: torchvision's FCOS_ResNet50_FPN_Weights.COCO_V1 says so, of 91 classes at 800×800."""
    weights = load_weights("random:1")
    assert weights.num_classes == 91
    assert multiply_adds(weights, (800, 800)) == pytest.approx(128.21e9, rel=1e-3)
    assert multiply_adds(weights, (800, 1088)) == pytest.approx(128.21e9 * 1088 / 800, rel=0.01)


def test_micro_batches_go_up_to_the_largest_which_stays() -> None:
    detector = Detector("sample", max_micro_batch=5, num_threads=1)
    found = model_figures(detector, Image(np.full((64, 96, 3), 128, np.uint8), height=64, width=96))
    assert list(found.images_per_second) == [1, 2, 4]
    assert min(found.images_per_second.values()) > 0
    assert detector.max_micro_batch == 5
    assert (found.padded_height, found.padded_width) == (320, 480)
    assert 0 < found.share_of_matmul < 2
