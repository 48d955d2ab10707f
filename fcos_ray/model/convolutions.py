"""Convolutions on a CPU: the same function in less time. Knows the modules of torch and torchvision they are part of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import Bottleneck

from fcos_ray.model.winograd import F2Conv2d, F4MklConv2d, F4OneDnnConv2d, WinogradConv2d


def quicken(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Replace convolutions of a float32 model by faster ones, in place, for a CPU; the replaced take no gradient.

    `dtype`: what the model is going to compute in; for others than float32 and bfloat16 nothing is replaced. BatchNorm
    must have been folded into convolutions before.
    One thread, 800×1088 through fcos_resnet50_fpn: Zen 5 fp32 2.00 -> 1.34 s, bf16 0.78 -> 0.63 s; a Xeon of the fifth
    generation fp32 3.12 -> 2.35 s, bf16 0.65 -> 0.51 s. In fp32 3×3 weights take four times the memory, 121 MB more, on
    Intel's CPUs 178; in bf16 less than twice, with AMX no more.
    """
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return model
    for name, child in list(model.named_children()):
        if type(child) is Bottleneck:
            setattr(model, name, _Bottleneck(child, dtype))
        elif type(child) is nn.Conv2d and child.padding_mode == "zeros":
            setattr(model, name, _quick(child, dtype))
        else:
            quicken(child, dtype)
    if isinstance(model, (nn.Sequential, IntermediateLayerGetter)):
        _join(model)
    return model


def _join(parent: nn.Module) -> None:
    """Let ReLUs be computed in what is before them, in a parent whose children run in the order they are registered in."""
    before: nn.Module | None = None
    for name, child in list(parent.named_children()):
        if isinstance(before, (WinogradConv2d, _OneDnnConv2d)):
            if type(child) is nn.ReLU:
                before.relu = True
                setattr(parent, name, nn.Identity())
                continue
            if before.relu and type(child) is nn.MaxPool2d and _MaxPool.suits(child):
                setattr(parent, name, _MaxPool())
        if isinstance(before, nn.GroupNorm) and type(child) is nn.ReLU:
            setattr(parent, name, _InPlaceReLU())
        if type(child) is not nn.Identity:
            before = child


def _quick(conv: nn.Conv2d, dtype: torch.dtype, *, relu: bool = False) -> nn.Module:
    winograd = _winograd(dtype)
    quick = winograd(conv) if winograd is not None and winograd.suits(conv) else _OneDnnConv2d(conv)
    quick.relu = relu
    return quick


def _winograd(dtype: torch.dtype) -> type[WinogradConv2d] | None:
    """The algorithm that pays, as far as it was measured: on Zen 4 and 5, and on a Xeon of the fifth generation with AMX.

    There an image takes 0.83 s by Winograd, 0.51 directly (least 0.71 and 0.41).
    """
    if dtype == torch.float32:
        return F4MklConv2d if _has_fast_mkl() else F4OneDnnConv2d
    return None if _has_amx() else F2Conv2d


def _has_fast_mkl() -> bool:
    """torch multiplies by MKL, on a CPU of Intel's: on AMD's it does without what the CPU could."""
    available: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return available and "GenuineIntel" in Path("/proc/cpuinfo").read_text()


def _has_amx() -> bool:
    """The CPU and the kernel let this process compute bf16 by AMX; ONEDNN_MAX_CPU_ISA may still keep oneDNN from it."""
    # the kernel may refuse what the CPU has: before Linux 5.16, or in a sandbox
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False) and torch.cpu._init_amx())


class _OneDnnConv2d(nn.Module):
    """oneDNN's convolution, which conv2d calls too, and what follows it while its values are at hand.

    Not so conv2d with 1×1 kernels in a process of one thread: its own loop for them takes 1.3 times.
    """

    relu = False  # told to compute the ReLU behind it?

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        if not self.relu:
            return torch.mkldnn_convolution(x, *self._settings())
        result: Tensor = torch.ops.mkldnn._convolution_pointwise(x, *self._settings(), "relu", [], "")
        return result

    def add_to(self, others: Tensor, x: Tensor) -> Tensor:
        """`others`, in place: plus the convolution, then ReLU."""
        binary = torch.ops.mkldnn._convolution_pointwise_.binary
        result: Tensor = binary(others, x, *self._settings(), "add", 1.0, "relu", [], "")
        return result

    def _settings(self) -> tuple[Any, ...]:
        c = self.conv
        return (c.weight, c.bias, c.padding, c.stride, c.dilation, c.groups)


class _Bottleneck(nn.Module):
    """torchvision's Bottleneck: sum and ReLUs while a convolution's values are at hand, not by reading them again.

    An image in bf16 takes 0.78 s of a core instead of 0.82 (Zen 5, alternating). torch.ops.mkldnn's functions are
    not documented; torch.compile calls them (2.14).
    """

    def __init__(self, block: Bottleneck, dtype: torch.dtype) -> None:
        super().__init__()
        norms = (block.bn1, block.bn2, block.bn3)
        assert all(type(norm) is nn.Identity for norm in norms), "BatchNorm must have been folded into convolutions"
        self.conv1 = _quick(block.conv1, dtype, relu=True)
        self.conv2 = _quick(block.conv2, dtype, relu=True)
        self.conv3 = _OneDnnConv2d(block.conv3)
        self.downsample = None if block.downsample is None else quicken(block.downsample, dtype)

    def forward(self, x: Tensor) -> Tensor:
        # Nothing else reads the input of a block without downsample: the pyramid takes the last block's output of a layer
        others = x if self.downsample is None else self.downsample(x)
        return self.conv3.add_to(others, self.conv2(self.conv1(x)))


class _InPlaceReLU(nn.Module):
    """ReLU of what nothing else reads, as a maximum of integers: a float that is negative is a negative one.

    In bf16 torch's takes 2.4 ms for 256 channels of 100×136, this 0.25; an image takes 0.93 times as long, in fp32 0.98 (a
    Xeon with AMX, alternating). A NaN that x86 makes becomes 0, as in oneDNN's ReLU.
    """

    def forward(self, x: Tensor) -> Tensor:
        _bits(x).clamp_min_(0)
        return x


class _MaxPool(nn.Module):
    """MaxPool2d(3, stride=2, padding=1) behind a ReLU: torch's writes each maximum's place too, 28 MB of them.

    An image in bf16 takes 0.68 s of a core instead of 0.71 (Zen 5, alternating). Whether a maximum beside a NaN is one depends
    on its sign.
    """

    @staticmethod
    def suits(pool: nn.MaxPool2d) -> bool:
        """Can it replace this one?"""
        shape = (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode, pool.return_indices)
        return shape == (3, 2, 1, 1, False, False)

    def forward(self, x: Tensor) -> Tensor:
        # Values that are not negative are in the order of their bits, and torch's maximum of integers takes half the time
        bits = _bits(x).permute(0, 2, 3, 1)
        return _best_of_three(_best_of_three(bits, 1), 2).view(x.dtype).permute(0, 3, 1, 2)


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32)


def _best_of_three(x: Tensor, dim: int) -> Tensor:
    """Every other value along `dim`, the first to begin with, or a neighbour that is greater."""
    x = x.transpose(0, dim)
    best, odd = x[::2].clone(), x[1::2]
    torch.maximum(best[: len(odd)], odd, out=best[: len(odd)])
    torch.maximum(best[1:], odd[: len(best) - 1], out=best[1:])
    return best.transpose(0, dim)
