"""What shrinking on the CPU workers (uint8, rounded) costs against shipping full pixels, in figures.

Measured with untrained weights (torch 2.14, torchvision 0.29), whose features amplify rounding more than trained ones: at
one and the same place of the feature maps, for every (place, class) above a score of 0.2, SCORES and BOXES hold. What is
left after NMS differs by more, since an untrained model's boxes lie in heaps of near ties and another one of the heap may
be kept; PARTNERS says how many detections still have a partner.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from fcos_ray.inputs.shrink import shrink
from fcos_ray.model.detector import Detector
from fcos_ray.model.parameters import Weights
from fcos_ray.types import Detections, Image
from tests.model.images import Pixels, gray, noise, shapes
from tests.parity import overlaps

SCORES = 0.02  # largest difference of a score; measured over 18 images and three models: 0.011, mean 0.001
BOXES = 0.15  # largest difference of a distance to a box's side, in strides (8 to 128 pixels of the model's input;
# measured: 0.073, mean 0.009, so 0.6 pixels at most and 0.07 in the mean on the finest level)
PARTNERS = 0.8  # share of detections with another of the same label and IoU > 0.9; measured: 0.86 to 1.00
SMALL = {"min_size": 160, "max_size": 266}
LARGE = {"min_size": 400, "max_size": 667}


def as_shrunk(pixels: Pixels, size: dict[str, int]) -> Image:
    return Image(shrink(pixels, **size), pixels.shape[0], pixels.shape[1])


def scores_and_boxes(detector: Detector, image: Image) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every place and class: (A, K) scores, (A, 4) distances to the sides in strides."""
    with torch.inference_mode():
        outputs = detector._forward(detector._prepare([detector._input(image, 0)]))
    return torch.sqrt(outputs.cls_logits.sigmoid() * outputs.bbox_ctrness.sigmoid())[0], outputs.bbox_regression[0]


@pytest.mark.parametrize(
    ("size", "images"),
    [
        (SMALL, [shapes(480, 640), shapes(1500, 1100, 1), shapes(333, 500, 2), gray(900, 1400), noise(480, 640)]),
        (LARGE, [shapes(1200, 1600)]),
    ],
)
def test_each_place_scores_and_measures_nearly_the_same(
    weights: Weights, size: dict[str, int], images: Sequence[Pixels]
) -> None:
    detector = Detector(weights, device="cpu", **size)
    for pixels in images:
        exact_scores, exact_boxes = scores_and_boxes(detector, Image(pixels, *pixels.shape[:2]))
        scores, boxes = scores_and_boxes(detector, as_shrunk(pixels, size))
        found = torch.maximum(scores, exact_scores) > 0.2
        apart = (scores - exact_scores).abs()[found]
        at = found.any(dim=1)
        moved = (boxes - exact_boxes).abs()[at]
        figures = (
            f"scores {apart.max():.4f} (mean {apart.mean():.4f}), boxes {moved.max():.4f} (mean {moved.mean():.4f})"
        )
        print(f"{pixels.shape}: {int(found.sum())} candidates, {figures}")
        assert apart.max() <= SCORES
        assert moved.max() <= BOXES


def test_most_detections_of_a_shrunk_image_are_those_of_the_whole_one(weights: Weights) -> None:
    detector = Detector(weights, device="cpu", max_detections=1000, **SMALL)
    for pixels in [shapes(480, 640), shapes(1500, 1100, 1), shapes(640, 480, 2), noise(480, 640)]:
        [exact] = detector([pixels])
        [shrunk] = detector.detect([as_shrunk(pixels, SMALL)])
        assert isinstance(shrunk, Detections)
        for mine, other in ((exact, shrunk), (shrunk, exact)):
            partners = [
                bool((overlaps(box, other.boxes[other.labels == label]) > 0.9).any())
                for box, label in zip(mine.boxes, mine.labels, strict=True)
            ]
            print(f"{pixels.shape}: {np.mean(partners):.3f} of {len(partners)}")
            assert len(partners) > 50
            assert np.mean(partners) >= PARTNERS


def test_a_shrunk_image_is_not_resized_again_and_its_boxes_are_in_pixels_of_the_image_as_seen(weights: Weights) -> None:
    detector = Detector(weights, device="cpu", **SMALL)
    pixels = shapes(900, 1400)
    image = as_shrunk(pixels, SMALL)
    [shrunk] = detector.detect([image])
    # the small pixels alone, which torchvision would leave at their size, give the same boxes but for the scale
    [small] = detector([image.pixels])
    assert isinstance(shrunk, Detections)
    assert len(shrunk.scores) > 50
    np.testing.assert_array_equal(shrunk.scores, small.scores)
    height, width = image.pixels.shape[:2]
    scale = np.array([1400 / width, 900 / height] * 2, dtype=np.float32)
    np.testing.assert_allclose(shrunk.boxes, small.boxes * scale, rtol=1e-5, atol=1e-3)


def test_shrinking_an_image_torchvision_would_enlarge_changes_nothing_at_all(weights: Weights) -> None:
    detector = Detector(weights, device="cpu", **SMALL)
    pixels = shapes(100, 150)
    [whole], [shrunk] = detector([pixels]), detector.detect([as_shrunk(pixels, SMALL)])
    assert isinstance(shrunk, Detections)
    np.testing.assert_array_equal(whole.boxes, shrunk.boxes)
