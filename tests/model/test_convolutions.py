"""The faster convolutions compute what torch's do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torchvision.models.resnet import Bottleneck

from fcos_ray.model import checks, convolutions
from fcos_ray.model.architectures import build_model, fold_batchnorm
from fcos_ray.model.convolutions import quicken
from fcos_ray.model.detector import Detector
from fcos_ray.model.weights import load_weights
from fcos_ray.model.winograd import F2Conv2d, F4MklConv2d, F4OneDnnConv2d, WinogradConv2d

needs_bf16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU's oneDNN computes nothing in bf16"
)

by_f4 = pytest.mark.parametrize("kind", [F4MklConv2d, F4OneDnnConv2d], ids=["MKL", "oneDNN"])


def convolution(channels: int, channels_out: int, *, bias: bool = True, **settings: Any) -> nn.Conv2d:
    torch.manual_seed(channels + channels_out)
    return nn.Conv2d(channels, channels_out, **({"kernel_size": 3, "padding": 1} | settings), bias=bias)


def exact(conv: nn.Conv2d, x: Tensor) -> Tensor:
    bias = None if conv.bias is None else conv.bias.double()
    return conv2d(x.double(), conv.weight.double(), bias, padding=1)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (4, 4), (5, 9), (25, 34), (13, 17)])
@pytest.mark.parametrize("channels_out", [64, 91, 256])
@by_f4
@torch.inference_mode()
def test_winograd_rounds_little_more_than_a_direct_convolution(
    kind: type[WinogradConv2d], shape: tuple[int, int], channels_out: int
) -> None:
    with torch.inference_mode(False):
        conv = convolution(256, channels_out)
        quick = kind(conv)
    x = torch.randn(2, 256, *shape).to(memory_format=torch.channels_last)
    got, wanted = quick(x), exact(conv, x)
    assert got.shape == wanted.shape
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert float((got - wanted).abs().max()) < 2e-5  # values of about one; direct: up to 7e-6


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (5, 9), (25, 34), (30, 200)])
@torch.inference_mode()
def test_winograd_in_bf16_rounds_twice_as_much_as_a_direct_convolution(shape: tuple[int, int]) -> None:
    with torch.inference_mode(False):
        conv = convolution(256, 256)
        quick = F2Conv2d(conv).bfloat16()
    x = torch.randn(2, 256, *shape).bfloat16()
    wanted = exact(conv, x)
    got, direct = quick(x), conv.bfloat16()(x)
    assert got.dtype == torch.bfloat16
    spread = {name: float((y - wanted).square().mean().sqrt()) for name, y in {"ours": got, "direct": direct}.items()}
    assert spread["ours"] < 2.6 * spread["direct"]


@by_f4
def test_winograd_takes_any_memory_format_and_no_bias(kind: type[WinogradConv2d]) -> None:
    conv = convolution(128, 128, bias=False)
    x = torch.randn(1, 128, 7, 10)
    torch.testing.assert_close(kind(conv)(x).double(), exact(conv, x), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(F4MklConv2d, torch.float32), (F4OneDnnConv2d, torch.float32), (F2Conv2d, torch.bfloat16)],
    ids=["MKL", "oneDNN", "bf16"],
)
def test_an_image_does_not_depend_on_its_neighbours(kind: type[WinogradConv2d], dtype: torch.dtype) -> None:
    quick = kind(convolution(256, 256)).to(dtype)
    images = torch.randn(3, 256, 9, 11).to(dtype=dtype, memory_format=torch.channels_last)
    for index, image in enumerate(quick(images)):
        assert torch.equal(image, quick(images[index : index + 1])[0])


@pytest.mark.parametrize("columns", [1, 3, 136, 137, 600])
@pytest.mark.parametrize("kind", [F2Conv2d, F4MklConv2d, F4OneDnnConv2d], ids=["F2", "MKL", "oneDNN"])
def test_strips_of_any_width_join_without_a_seam(kind: type[WinogradConv2d], columns: int) -> None:
    """One strip, several, the last of them shorter; tiles that reach over the image's edge."""
    quick = kind(conv := convolution(256, 64))
    for rows in (1, 11):
        x = torch.randn(1, 256, rows * kind.algorithm.output - 1, columns * kind.algorithm.output - 1)
        torch.testing.assert_close(quick(x).double(), exact(conv, x), atol=2e-5, rtol=0)


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
@by_f4
def test_winograd_refuses_what_it_does_not_compute(kind: type[WinogradConv2d], conv: nn.Conv2d) -> None:
    assert not kind.suits(conv)
    with pytest.raises(ValueError, match="wanted a 3×3 convolution of stride 1"):
        kind(conv)


@pytest.mark.parametrize(
    ("architecture", "mkl", "expected"),
    [("fcos_resnet50_fpn", False, 20), ("fcos_resnet50_fpn", True, 22), ("fcos_mobilenet_v3_small_fpn", True, 0)],
)
@torch.inference_mode()
def test_a_quickened_model_gives_the_same_outputs_on_one_thread_and_two(
    architecture: str, mkl: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolutions, "_has_fast_mkl", lambda: mkl)
    weights = load_weights("random:1" if architecture == "fcos_resnet50_fpn" else "sample")
    assert weights.architecture == architecture
    limits = {"score_threshold": 0.2, "nms_threshold": 0.6, "max_detections": 100, "topk_candidates": 1000}
    build: Any = lambda: fold_batchnorm(build_model(weights, **weights.input_settings(), **limits))  # noqa: E731
    plain, quick = build(), quicken(build())
    # blocks and pooling are replaced, not their convolutions alone
    assert not [
        name for name, module in quick.backbone.body.named_modules() if type(module) in (nn.MaxPool2d, Bottleneck)
    ]
    winograd = [type(module) for module in quick.modules() if isinstance(module, WinogradConv2d)]
    assert winograd == [F4MklConv2d if mkl else F4OneDnnConv2d] * expected
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


@needs_bf16
@pytest.mark.parametrize("amx", [False, True], ids=["winograd", "direct"])
@torch.inference_mode()
def test_a_quickened_model_in_bf16_is_nearly_as_near_to_fp32_as_torchs(
    amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolutions, "_has_amx", lambda: amx)
    weights = load_weights("random:1")
    limits: Any = {"score_threshold": 0.2, "nms_threshold": 0.6, "max_detections": 100, "topk_candidates": 1000}
    models = [fold_batchnorm(build_model(weights, **weights.input_settings(), **limits)) for _ in range(3)]
    exact, plain = models[0], models[1].bfloat16()
    quick = quicken(models[2], torch.bfloat16).to(torch.bfloat16, memory_format=torch.channels_last)
    assert any(isinstance(module, WinogradConv2d) for module in quick.modules()) != amx
    x = torch.randn(1, 3, 160, 224).to(memory_format=torch.channels_last)
    outputs = [
        list(model.backbone(x.to(dtype)).values())
        for model, dtype in ((exact, torch.float32), (plain, torch.bfloat16), (quick, torch.bfloat16))
    ]
    for level, wanted in enumerate(outputs[0]):
        theirs, ours = (float((found[level].float() - wanted).square().mean().sqrt()) for found in outputs[1:])
        assert ours < 1.5 * theirs


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (2, 2), (7, 9), (8, 10), (25, 34)])
@torch.inference_mode()
def test_the_faster_pooling_behind_a_relu_finds_the_same(shape: tuple[int, int], dtype: torch.dtype) -> None:
    with torch.inference_mode(False):
        stem = nn.Sequential(convolution(3, 8), nn.Identity(), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        quick = quicken(copy.deepcopy(stem), dtype).to(dtype)
    assert nn.MaxPool2d not in {type(module) for module in quick.modules()}
    x = torch.randn(2, 3, *shape).to(dtype=dtype, memory_format=torch.channels_last)
    got = quick(x)
    assert torch.equal(got, stem.to(dtype)(x))
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)], ids=["fp32", "bf16"])
@torch.inference_mode()
def test_the_faster_relu_behind_a_group_norm_finds_the_same_and_leaves_its_input(dtype: torch.dtype) -> None:
    with torch.inference_mode(False):
        tower = nn.Sequential(
            convolution(8, 32), nn.GroupNorm(8, 32), nn.ReLU(), convolution(32, 32), nn.GroupNorm(8, 32)
        )
        tower.append(nn.ReLU())
        quick = quicken(copy.deepcopy(tower), dtype).to(dtype)
    assert nn.ReLU not in {type(module) for module in quick}
    x = torch.randn(2, 8, 7, 9).to(dtype=dtype, memory_format=torch.channels_last)
    x[:, :, 0] = 0
    before = x.clone()
    normed = quick[1](quick[0](x))
    assert bool((normed < 0).any())
    wanted = normed.relu()
    positive = quick[2](normed)
    assert torch.equal(positive, wanted)
    assert positive.data_ptr() == normed.data_ptr()
    torch.testing.assert_close(quick(x), tower.to(dtype)(x), atol=1e-4 if dtype == torch.float32 else 0.05, rtol=0)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "before", [nn.Identity(), nn.InstanceNorm2d(8), nn.Sequential(nn.GroupNorm(2, 8))], ids=lambda b: type(b).__name__
)
def test_a_relu_whose_input_others_may_read_stays(before: nn.Module) -> None:
    relu = nn.ReLU()
    assert list(quicken(nn.Sequential(before, relu)).children())[-1] is relu


@pytest.mark.parametrize(
    "pooling",
    [
        nn.MaxPool2d(2),
        nn.MaxPool2d(3, 2),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.MaxPool2d(3, 2, 1, return_indices=True),
    ],
    ids=str,
)
def test_other_poolings_stay(pooling: nn.Module) -> None:
    assert list(quicken(nn.Sequential(convolution(3, 8), nn.ReLU(), pooling)).children())[-1] is pooling


def test_poolings_of_values_of_any_sign_stay() -> None:
    pooling = nn.MaxPool2d(3, 2, 1)
    assert list(quicken(nn.Sequential(convolution(3, 8), pooling)).children())[-1] is pooling


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("mkl", [False, True])
def test_each_precision_has_its_algorithm(mkl: bool, amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_is_native", lambda *_: True)  # any CPU can hold a model in bf16
    monkeypatch.setattr(convolutions, "_has_amx", lambda: amx)
    monkeypatch.setattr(convolutions, "_has_fast_mkl", lambda: mkl)
    used = {}
    for precision in ("fp32", "bf16"):
        modules = Detector("random:1", device="cpu", precision=precision)._model.modules()
        used[precision] = [type(module) for module in modules if isinstance(module, WinogradConv2d)]
    # fp32: of 128 and 256 channels, by MKL of 512 too; bf16: of 256 and 512, without AMX
    fp32: list[type[WinogradConv2d]] = [F4MklConv2d] * 22 if mkl else [F4OneDnnConv2d] * 20
    assert used == {"fp32": fp32, "bf16": [] if amx else [F2Conv2d] * 19}
    model = nn.Sequential(convolution(256, 256))
    assert type(quicken(model, torch.float16)[0]) is nn.Conv2d  # type: ignore[index]


@pytest.mark.parametrize(
    ("vendor", "available", "fast"),
    [("GenuineIntel", True, True), ("GenuineIntel", False, False), ("AuthenticAMD", True, False)],
)
def test_mkl_multiplies_on_intels_cpus(
    vendor: str, available: bool, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: available)
    monkeypatch.setattr(Path, "read_text", lambda _: f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: 6\n")
    assert convolutions._has_fast_mkl() is fast


@pytest.mark.parametrize(
    ("capabilities", "allowed", "has"),
    [
        ({"amx_bf16": True}, True, True),
        ({"amx_bf16": True}, False, False),  # an older kernel, or a sandbox
        ({"amx_bf16": False, "avx512_bf16": True}, True, False),
        ({"bf16": True}, True, False),  # ARM
    ],
)
def test_amx_is_used_where_cpu_and_kernel_have_it(
    capabilities: dict[str, bool], allowed: bool, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: allowed)
    assert convolutions._has_amx() is has
