"""What only a CUDA device can show. Not run by machines without one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fcos_ray.model.detector import Detector
from fcos_ray.model.parameters import Weights
from fcos_ray.types import Detections
from tests.model.images import corpus, flat, shapes
from tests.parity import assert_same_detections, from_torchvision
from tests.torchvision_model import torchvision_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
SMALL = {"min_size": 160, "max_size": 266}
LIMITS = {"score_threshold": 0.2, "max_detections": 300}


@pytest.fixture(autouse=True)
def same_algorithms() -> Iterator[None]:
    """cuDNN's choice between algorithms by the clock would make two runs differ."""
    kept = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    yield
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = kept


@pytest.fixture(scope="module")
def wanted(weights: Weights) -> list[Detections]:
    """torchvision's on the same device, one image at a time."""
    model = torchvision_model(weights, **SMALL, score_thresh=0.2, detections_per_img=300).to("cuda")
    with torch.inference_mode():
        images = [torch.from_numpy(image).permute(2, 0, 1).to("cuda") / 255 for image in corpus()]
        outputs = [{key: value.cpu() for key, value in model([image])[0].items()} for image in images]
    return [from_torchvision(output) for output in outputs]


@pytest.mark.parametrize("cap", [1, 4, 16])
def test_detections_equal_torchvisions_one_by_one(weights: Weights, wanted: list[Detections], cap: int) -> None:
    """While one micro-batch is read the next is under way: results would be another's if they waited for too little."""
    detector = Detector(weights, device="cuda", max_micro_batch=cap, **SMALL, **LIMITS)
    for _ in range(3):
        for got, expected in zip(detector(corpus()), wanted, strict=True):
            assert_same_detections(got, expected, **LIMITS, box_pixels=0.05, score=1e-4)


def test_micro_batches_that_find_nothing_pass_between_others(weights: Weights) -> None:
    detector = Detector(weights, device="cuda", max_micro_batch=1, **SMALL, score_threshold=0.999)
    assert [len(found.scores) for found in detector([flat(160, 160)] * 50)] == [0] * 50


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_keeps_strong_detections(weights: Weights, precision: str) -> None:
    images = [shapes(160, 200, seed) for seed in range(8)]
    exact = Detector(weights, device="cuda", **SMALL, **LIMITS)(images)
    quick = Detector(weights, device="cuda", precision=precision, **SMALL, **LIMITS)(images)
    scores = [np.sort(found.scores)[::-1][:10] for found in (*exact, *quick)]
    for a, b in zip(scores[:8], scores[8:], strict=True):
        assert np.abs(a - b).max() < 0.05


def test_a_full_device_halves_micro_batches_and_loses_none(weights: Weights) -> None:
    images = [shapes(800, 1066, seed) for seed in range(16)]
    detector = Detector(weights, device="cuda", max_micro_batch=16)
    wanted = detector(images)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    Detector(weights, device="cuda", max_micro_batch=4)(images[:4])
    room, device = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, 1.5 * room / device))
    try:
        got = detector(images)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert detector._lowered
    for one, other in zip(got, wanted, strict=True):
        assert_same_detections(one, other, score_threshold=0.2, max_detections=100, box_pixels=0.05, score=1e-4)
