"""The faster convolutions compute what torch's do."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from fcos_ray.model import checks
from fcos_ray.model.architectures import build_model, fold_batchnorm
from fcos_ray.model.convolutions import WinogradConv2d, quicken
from fcos_ray.model.detector import Detector
from fcos_ray.model.weights import load_weights


def convolution(channels: int, channels_out: int, *, bias: bool = True, **settings: Any) -> nn.Conv2d:
    torch.manual_seed(channels + channels_out)
    return nn.Conv2d(channels, channels_out, **({"kernel_size": 3, "padding": 1} | settings), bias=bias)


def exact(conv: nn.Conv2d, x: Tensor) -> Tensor:
    bias = None if conv.bias is None else conv.bias.double()
    return conv2d(x.double(), conv.weight.double(), bias, padding=1)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (4, 4), (5, 9), (25, 34), (13, 17)])
@pytest.mark.parametrize("channels_out", [64, 91, 256])
@torch.inference_mode()
def test_winograd_rounds_little_more_than_a_direct_convolution(shape: tuple[int, int], channels_out: int) -> None:
    with torch.inference_mode(False):
        conv = convolution(256, channels_out)
        quick = WinogradConv2d(conv)
    x = torch.randn(2, 256, *shape).to(memory_format=torch.channels_last)
    got, wanted = quick(x), exact(conv, x)
    assert got.shape == wanted.shape
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert float((got - wanted).abs().max()) < 2e-5  # values of about one; direct: up to 7e-6


def test_winograd_takes_any_memory_format_and_no_bias() -> None:
    conv = convolution(128, 128, bias=False)
    x = torch.randn(1, 128, 7, 10)
    torch.testing.assert_close(WinogradConv2d(conv)(x).double(), exact(conv, x), atol=2e-5, rtol=0)


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    quick = WinogradConv2d(convolution(128, 128))
    images = torch.randn(3, 128, 9, 11).to(memory_format=torch.channels_last)
    for index, image in enumerate(quick(images)):
        assert torch.equal(image, quick(images[index : index + 1])[0])


def test_what_a_larger_image_left_in_memory_does_not_matter() -> None:
    quick = WinogradConv2d(convolution(128, 128))
    small = torch.randn(1, 128, 6, 5)
    first = quick(small)
    quick(torch.full((1, 128, 30, 30), torch.nan))
    assert torch.equal(quick(small), first)


def test_threads_do_not_share_memory() -> None:
    conv = convolution(128, 128)
    quick = WinogradConv2d(conv)
    images = [torch.randn(1, 128, size, size) for size in (40, 41, 60, 61)]
    wanted = [quick(image) for image in images]
    differ: list[int] = []

    def compare(index: int) -> None:
        for _ in range(20):
            if not torch.equal(quick(images[index]), wanted[index]):
                differ.append(index)

    threads = [threading.Thread(target=compare, args=(index,)) for index in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not differ


@pytest.mark.parametrize(
    "conv",
    [
        convolution(128, 128, stride=2),
        convolution(128, 128, dilation=2),
        convolution(128, 128, padding=0),
        convolution(128, 128, groups=2),
        convolution(128, 128, padding_mode="reflect"),
        convolution(128, 128, kernel_size=1),
        convolution(64, 64),  # too few channels to be faster
    ],
    ids=str,
)
def test_winograd_refuses_what_it_does_not_compute(conv: nn.Conv2d) -> None:
    assert not WinogradConv2d.suits(conv)
    with pytest.raises(ValueError, match="wanted a 3×3 convolution of stride 1"):
        WinogradConv2d(conv)


@pytest.mark.parametrize("architecture", ["fcos_resnet50_fpn", "fcos_mobilenet_v3_small_fpn"])
@torch.inference_mode()
def test_a_quickened_model_gives_the_same_outputs_on_one_thread_and_two(architecture: str) -> None:
    weights = load_weights("random:1" if architecture == "fcos_resnet50_fpn" else "sample")
    assert weights.architecture == architecture
    limits = {"score_threshold": 0.2, "nms_threshold": 0.6, "max_detections": 100, "topk_candidates": 1000}
    build: Any = lambda: fold_batchnorm(build_model(weights, **weights.input_settings(), **limits))  # noqa: E731
    plain, quick = build(), quicken(build())
    winograd = sum(isinstance(module, WinogradConv2d) for module in quick.modules())
    assert winograd == (22 if architecture == "fcos_resnet50_fpn" else 0)
    x = torch.randn(1, 3, 160, 224).to(memory_format=torch.channels_last)
    wanted = plain.head(list(plain.backbone(x).values()))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            got = quick.head(list(quick.backbone(x).values()))
            for name, values in wanted.items():
                torch.testing.assert_close(got[name], values, atol=2e-4, rtol=1e-5)
    finally:
        torch.set_num_threads(threads)


def test_only_fp32_on_a_cpu_is_quickened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_is_native", lambda *_: True)  # any CPU can hold a model in bf16
    kinds = {
        precision: {type(module) for module in Detector("random:1", device="cpu", precision=precision)._model.modules()}
        for precision in ("fp32", "bf16")
    }
    assert WinogradConv2d in kinds["fp32"]
    assert WinogradConv2d not in kinds["bf16"]
