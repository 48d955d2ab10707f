"""The detector's edges: what it takes, what it refuses, memory that does not suffice."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import box_iou

from fcos_ray.errors import ConfigError, DetectError
from fcos_ray.model.checks import PRECISIONS, pick_precision
from fcos_ray.model.detector import Detector, _as_seen, _Input
from fcos_ray.model.parameters import Weights
from fcos_ray.model.postprocess import Found, HeadOutputs
from fcos_ray.types import Detections, Image
from tests.model.images import flat, noise, shapes

SMALL = {"min_size": 160, "max_size": 266}


@pytest.fixture(scope="module")
def detector(weights: Weights) -> Detector:
    return Detector(weights, device="cpu", **SMALL)


def as_image(pixels: np.ndarray) -> Image:
    return Image(pixels, pixels.shape[0], pixels.shape[1])


def equal(a: Any, b: Any) -> bool:
    return all(np.allclose(getattr(a, n), getattr(b, n), atol=1e-3) for n in ("boxes", "labels", "scores"))


def test_arrays_images_and_float_tensors_are_taken_alike_and_the_order_is_kept(detector: Detector) -> None:
    pixels = [shapes(100, 140, 1), shapes(140, 100, 2), shapes(100, 140, 3)]
    arrays = detector(pixels)
    assert len({len(d.scores) for d in arrays} | {d.boxes.sum() for d in arrays}) > 2  # they can be told apart
    tensors = detector([torch.from_numpy(p).permute(2, 0, 1) / 255 for p in pixels])
    for one, two, three in zip(arrays, detector([as_image(p) for p in pixels]), tensors, strict=True):
        assert equal(one, two)
        assert equal(one, three)
    assert detector([]) == []
    assert detector.detect([]) == []


def test_bf16_finds_what_fp32_finds_a_little_elsewhere(weights: Weights, detector: Detector) -> None:
    if not torch.cpu.get_capabilities().get("avx512_bf16"):
        pytest.skip("this CPU does not compute bf16")
    pixels = shapes(150, 200, 3)
    [wanted] = detector([pixels])
    [got] = Detector(weights, device="cpu", precision="bf16", **SMALL)([pixels])
    strong = wanted.boxes[wanted.scores > wanted.scores.max() - 0.05]
    best = box_iou(torch.from_numpy(strong), torch.from_numpy(got.boxes)).max(dim=1).values
    assert len(strong) > 1
    assert best.min() > 0.7
    assert not np.array_equal(wanted.scores, got.scores)  # it is another arithmetic


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_precision_that_the_device_would_emulate_is_refused(
    weights: Weights, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "i386", "avx2": True})
    with pytest.raises(ConfigError, match=rf"precision {precision} is not native on .*i386.*--precision fp32"):
        Detector(weights, device="cpu", precision=precision, **SMALL)


@pytest.mark.parametrize(
    ("precision", "there"), [("bf16", "amx_bf16"), ("bf16", "bf16"), ("fp16", "avx512_fp16"), ("fp16", "fp16_arith")]
)
def test_a_precision_that_the_cpu_computes_is_taken_on_x86_and_arm(
    precision: str, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {there: True})
    assert pick_precision(precision, torch.device("cpu")) == PRECISIONS[precision]


def test_results_are_numpy_of_the_promised_types_and_boxes_lie_within_the_image(detector: Detector) -> None:
    for pixels in (shapes(901, 37), shapes(333, 517), noise(1, 1), flat(5, 3)):
        [d] = detector([pixels])
        assert (d.boxes.dtype, d.labels.dtype, d.scores.dtype) == (np.float32, np.int64, np.float32)
        assert d.boxes.shape == (len(d.scores), 4)
        x1, y1, x2, y2 = d.boxes.T
        height, width = pixels.shape[:2]
        assert ((x1 >= 0) & (x1 <= x2) & (x2 <= width)).all()
        assert ((y1 >= 0) & (y1 <= y2) & (y2 <= height)).all()
        assert (np.diff(d.scores) <= 0).all()
        assert ((d.labels >= 0) & (d.labels < len(detector.categories))).all()


def test_a_box_that_reaches_the_edge_does_not_pass_it_by_float32s_rounding() -> None:
    passed = 0
    for side in range(1, 3000):
        seen = side, side // 2 + 1
        resized = int(seen[0] * (800 / side)), int(seen[1] * (800 / side))
        edge = torch.tensor([[0.0, 0.0, resized[1], resized[0]]])
        theirs = resize_boxes(edge, resized, seen).numpy()
        limits = np.array([[seen[1], seen[0]] * 2], np.float32)
        passed += bool((theirs > limits).any())
        found = Found(edge.numpy(), np.ones(1, np.int64), np.ones(1, np.float32))
        ours = _as_seen(found, _Input(flat(1, 1), seen, resized, resized))
        np.testing.assert_array_equal(ours.boxes, np.minimum(theirs, limits), strict=True)
    assert passed > 0  # torchvision's own boxes do


def test_read_only_memory_such_as_rays_is_read_and_never_written(detector: Detector) -> None:
    pixels = shapes(160, 160)
    [wanted] = detector([pixels.copy()])
    pixels.flags.writeable = False
    assert equal(detector([pixels])[0], wanted)
    tensor = torch.full((3, 160, 160), 0.5)
    detector([tensor])
    assert (tensor == 0.5).all()


def test_one_image_too_thin_does_not_disturb_the_others(detector: Detector) -> None:
    good = shapes(100, 140)
    [wanted] = detector([good])
    first, thin, last = detector.detect([as_image(good), as_image(noise(1, 1334)), as_image(good)])
    assert isinstance(thin, DetectError)
    assert (thin.code, thin.stage, thin.transient) == ("image_too_thin", "detect", False)
    assert equal(first, wanted)
    assert equal(last, wanted)
    with pytest.raises(DetectError, match="image_too_thin"):
        detector([good, noise(1, 1334)])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            np.zeros((4, 5), np.uint8),
            r"images\[1\]: an array must be RGB uint8 \(H, W, 3\), got uint8 of shape \(4, 5\)",
        ),
        (np.zeros((3, 4, 5), np.uint8), r"images\[1\]: .* got uint8 of shape \(3, 4, 5\)"),
        (np.zeros((4, 5, 4), np.uint8), r"got uint8 of shape \(4, 5, 4\)"),
        (np.zeros((4, 5, 3), np.float32), r"got float32 of shape \(4, 5, 3\)"),
        (np.zeros((0, 5, 3), np.uint8), r"got uint8 of shape \(0, 5, 3\)"),
        (
            torch.zeros(4, 5, 3),
            r"images\[1\]: a tensor must be float \(3, H, W\) in 0–1.* got a float32 tensor of shape",
        ),
        (torch.zeros(3, 4, 5, dtype=torch.uint8), r"got a uint8 tensor of shape \(3, 4, 5\)"),
        ("photo.jpg", r"images\[1\] must be an array, an Image or a tensor, got str"),
        (Image(np.zeros((4, 5), np.uint8), 4, 5), r"images\[1\]: an array must be RGB uint8"),
        (
            Image(np.zeros((40, 50, 3), np.uint8), 4000, 5000),
            r"images\[1\] is 4000×5000 .* shrunk to 40×50; .* 160×200",
        ),
    ],
)
def test_what_is_no_image_is_refused_by_index(detector: Detector, wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        detector([shapes(20, 20), wrong])


def test_a_single_image_instead_of_a_list_is_refused(detector: Detector) -> None:
    for single in (shapes(20, 20), torch.zeros(3, 8, 8), as_image(shapes(20, 20))):
        with pytest.raises(ValueError, match="images must be a list of images, got a single"):
            detector(single)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16, got 'fp8'"),
        ({"device": "abacus"}, "device must be cpu, cuda or cuda:<n>, got 'abacus'"),
        ({"device": "meta"}, "device must be cpu, cuda or cuda:<n>, got 'meta'"),
        ({"device": "cuda:99"}, "device cuda:99 is not there"),
        ({"score_threshold": 1.5}, r"score_threshold must lie in \[0, 1\], got 1.5"),
        ({"score_threshold": float("nan")}, r"score_threshold must lie in \[0, 1\], got nan"),
        ({"nms_threshold": -0.1}, r"nms_threshold must lie in \[0, 1\], got -0.1"),
        ({"max_detections": 0}, "max_detections must be a whole number from 1, got 0"),
        ({"topk_candidates": 1.5}, "topk_candidates must be a whole number from 1, got 1.5"),
        ({"min_size": 0}, "min_size must be a whole number from 1, got 0"),
        ({"max_size": True}, "max_size must be a whole number from 1, got True"),
        ({"max_micro_batch": 0}, "max_micro_batch must be a whole number from 1, got 0"),
        ({"num_threads": 0}, "num_threads must be a whole number from 1, got 0"),
        ({"image_mean": [0.5]}, "image_mean must be three numbers"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std must be above 0"),
        ({"num_classes": 91}, "num_classes and categories belong to load_weights"),
    ],
)
def test_settings_out_of_range_are_refused_with_what_was_wanted_and_what_came(
    weights: Weights, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Detector(weights, **settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_cuda_device_is_refused(weights: Weights) -> None:
    with pytest.raises(ConfigError, match="device cuda is not there: this process sees 0 CUDA devices"):
        Detector(weights, device="cuda")


class Memory:
    """A device that holds only so many images of a forward pass, or so many pixels."""

    def __init__(
        self, detector: Detector, monkeypatch: pytest.MonkeyPatch, *, images: int, pixels: int = 10**9
    ) -> None:
        self.tried: list[int] = []
        forward = detector._forward

        def limited(batch: torch.Tensor) -> HeadOutputs:
            self.tried.append(len(batch))
            if len(batch) > images or batch[0, 0].numel() > pixels:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nand much more")
            return forward(batch)

        monkeypatch.setattr(detector, "_forward", limited)


def test_out_of_memory_halves_the_micro_batch_and_runs_the_same_images_again(
    weights: Weights, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    detector = Detector(weights, device="cpu", max_micro_batch=8, **SMALL)
    images = [shapes(160, 160, seed) for seed in range(7)] + [shapes(160, 200, 9)]
    wanted = detector(images)
    memory = Memory(detector, monkeypatch, images=2)
    with caplog.at_level(logging.WARNING, "fcos_ray"):
        got = detector(images)
    assert all(equal(g, w) for g, w in zip(got, wanted, strict=True))
    assert "out of memory with 7 images of 160×160: going on with 3 at a time" in caplog.text
    assert max(memory.tried) == 7
    memory.tried.clear()
    assert all(equal(g, w) for g, w in zip(detector(images), wanted, strict=True))
    assert max(memory.tried) <= 2  # what did not fit is not tried again


def test_an_image_that_fails_alone_becomes_an_error_and_the_rest_goes_on(
    weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = Detector(weights, device="cpu", max_micro_batch=8, **SMALL)
    images = [shapes(160, 160), shapes(160, 260), shapes(160, 160, 1)]
    wanted = detector(images)
    Memory(detector, monkeypatch, images=8, pixels=160 * 200)
    first, large, last = detector.detect([as_image(p) for p in images])
    assert equal(first, wanted[0])
    assert equal(last, wanted[2])
    assert isinstance(large, DetectError)
    assert large.code == "out_of_memory"
    assert "160×288" in large.message
    assert "and much more" not in large.message


def test_out_of_memory_while_fetching_runs_that_micro_batch_again(
    weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = Detector(weights, device="cpu", **SMALL)
    images = [shapes(160, 160, seed) for seed in range(3)]
    wanted = detector(images)
    finish, calls = detector._finish, []

    def once(outputs: HeadOutputs, inputs: Any) -> list[Detections]:
        calls.append(len(inputs))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no room")
        return finish(outputs, inputs)

    monkeypatch.setattr(detector, "_finish", once)
    assert all(equal(g, w) for g, w in zip(detector(images), wanted, strict=True))


def test_a_micro_batch_is_launched_before_the_results_of_the_one_before_are_read(
    weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = Detector(weights, device="cpu", max_micro_batch=1, **SMALL)
    forward, finish, calls = detector._forward, detector._finish, []

    def launched(batch: torch.Tensor) -> HeadOutputs:
        calls.append("launch")
        return forward(batch)

    def read(outputs: HeadOutputs, inputs: Any) -> list[Detections]:
        calls.append("read")
        return finish(outputs, inputs)

    monkeypatch.setattr(detector, "_forward", launched)
    monkeypatch.setattr(detector, "_finish", read)
    detector([shapes(160, 160, seed) for seed in range(3)])
    assert calls == ["launch", "launch", "read", "launch", "read", "read"]


def test_an_error_that_is_not_about_memory_is_not_hidden(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = Detector(weights, device="cpu", **SMALL)

    def broken(_: torch.Tensor) -> HeadOutputs:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(detector, "_forward", broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        detector.detect([as_image(shapes(20, 20))])


def test_the_room_imports_neither_ray_nor_pydantic_nor_the_other_rooms() -> None:
    code = """
import sys, torch
before = torch.get_num_threads(), torch.initial_seed()
import fcos_ray.model.detector
assert (torch.get_num_threads(), torch.initial_seed()) == before
rooms = ("fcos_ray.inputs", "fcos_ray.outputs", "fcos_ray.config", "fcos_ray.pipeline", "fcos_ray.job")
found = [name for name in sys.modules if name.split(".")[0] in ("ray", "pydantic") or name.startswith(rooms)]
assert not found, found
"""
    subprocess.run([sys.executable, "-c", code], check=True)
