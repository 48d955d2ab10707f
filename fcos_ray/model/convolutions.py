"""Convolutions on a CPU in fp32: the same function in less time. Knows torch's modules, not what they are part of."""

from __future__ import annotations

import math
import threading
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

# F(4×4, 3×3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv:1509.09308): an output tile is
# A^T [(G w G^T) · (B^T x B)] A, summed over channels inside of the brackets. The points are 0, 1, -1, 1/2, -2 and infinity
# instead of the paper's 0, ±1, ±2: results are then off by 1e-5 at most instead of 3e-5, where oneDNN's direct convolution
# is by 7e-6 (256 channels of standard normal values).
_OUTPUT: Final = 4  # side of a tile of the output
_TILE: Final = 6  # side of a tile of the input: two pixels of each are the next one's too
_A_T: Final = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 1 / 2, -2, 0), (0, 1, 1, 1 / 4, 4, 0), (0, 1, -1, 1 / 8, -8, 1))
_G: Final = (
    (1, 0, 0),
    (1 / 3, 1 / 3, 1 / 3),
    (-1 / 3, 1 / 3, -1 / 3),
    (-16 / 15, -8 / 15, -4 / 15),
    (1 / 15, -2 / 15, 4 / 15),
    (0, 0, 1),
)
_B_T: Final = (
    (1, -3 / 2, -2, 3 / 2, 1, 0),
    (0, -1, 1 / 2, 5 / 2, 1, 0),
    (0, 1, -5 / 2, 1 / 2, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 1 / 2, -1, -1 / 2, 1, 0),
    (0, 1, -3 / 2, -2, 3 / 2, 1),
)
_LEAST_CHANNELS: Final = 128  # below, the transforms cost what the product saves


def quicken(model: nn.Module) -> nn.Module:
    """Replace convolutions by faster ones, in place, for fp32 on a CPU; the replaced take no gradient.

    One thread, 800×1088 through fcos_resnet50_fpn: 4.1 -> 2.8 s. 3×3 weights take four times the memory, 200 MB more.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return model
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Conv2d and child.padding_mode == "zeros":
                setattr(parent, name, WinogradConv2d(child) if WinogradConv2d.suits(child) else _OneDnnConv2d(child))
    return model


class _OneDnnConv2d(nn.Module):
    """What conv2d calls too, except for 1×1 kernels in a process of one thread: its own loop for them takes 1.3 times."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        c: Any = self.conv
        return torch.mkldnn_convolution(x, c.weight, c.bias, c.padding, c.stride, c.dilation, c.groups)


class WinogradConv2d(nn.Module):
    """A 3×3 convolution of stride 1 as 36 matrix products per 4×4 pixels: a quarter of the multiplications.

    Images of a batch are computed one by one, so none depends on its neighbours.
    """

    weight: Tensor  # (36, channels in, channels out), transformed
    bias: Tensor  # (channels out,)
    into: Tensor  # (36, 36): B^T x B of a flattened tile
    out_of: Tensor  # (16, 36): A^T y A of one

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        if not self.suits(conv):
            raise ValueError(f"wanted a 3×3 convolution of stride 1 and padding 1 with many channels, got {conv}")
        a_t, g, b_t = (torch.tensor(rows, dtype=torch.float64) for rows in (_A_T, _G, _B_T))
        kernel = conv.weight.detach().double()
        weight = torch.einsum("ai,bj,oijc->abco", g, g, kernel.permute(0, 2, 3, 1))
        # in float64 up to here: each value is rounded to float32 once
        self.register_buffer("weight", weight.reshape(_TILE**2, conv.in_channels, conv.out_channels).float())
        bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
        self.register_buffer("bias", bias)
        self.register_buffer("into", torch.kron(b_t, b_t).float())
        self.register_buffer("out_of", torch.kron(a_t, a_t).float())

    @staticmethod
    def suits(conv: nn.Conv2d) -> bool:
        """Can it replace this convolution, and is it faster?"""
        shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
        same = shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
        return same and conv.in_channels >= _LEAST_CHANNELS and conv.out_channels >= _LEAST_CHANNELS // 2

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, channels out, H, W), channels_last."""
        n, _, height, width = x.shape
        rows, columns = -(-height // _OUTPUT), -(-width // _OUTPUT)  # of tiles
        out = x.new_empty((n, rows * _OUTPUT, columns * _OUTPUT, len(self.bias)))
        for image, result in zip(x.permute(0, 2, 3, 1), out, strict=True):
            self._image(image, result.view(rows, _OUTPUT, columns, _OUTPUT, -1))
        return out[:, :height, :width].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)

    def _image(self, image: Tensor, result: Tensor) -> None:
        """(H, W, channels in) -> `result`, (rows, 4, columns, 4, channels out)."""
        height, width, channels = image.shape
        rows, _, columns, _, channels_out = result.shape
        count, points = rows * columns, _TILE**2
        # Two pieces of memory, in turn: each step reads the one and writes the other
        padded = _scratch("a", rows * _OUTPUT + 2, columns * _OUTPUT + 2, channels).zero_()
        padded[1 : height + 1, 1 : width + 1] = image
        tiles = _scratch("b", count, points, channels)
        cut = padded.unfold(0, _TILE, _OUTPUT).unfold(1, _TILE, _OUTPUT)  # (rows, columns, channels, 6, 6), no copy
        tiles.view(rows, columns, _TILE, _TILE, channels).copy_(cut.permute(0, 1, 3, 4, 2))
        tiles = torch.bmm(self.into.expand(count, -1, -1), tiles, out=_scratch("a", count, points, channels))
        products = torch.bmm(tiles.transpose(0, 1), self.weight, out=_scratch("b", points, count, channels_out))
        found = _scratch("a", count, _OUTPUT**2, channels_out)
        torch.bmm(self.out_of.expand(count, -1, -1), products.transpose(0, 1), out=found)
        found = found.view(rows, columns, _OUTPUT, _OUTPUT, channels_out).transpose(1, 2)
        torch.add(found, self.bias, out=result)


_kept = threading.local()  # a thread's two pieces of memory


def _scratch(which: Literal["a", "b"], *shape: int) -> Tensor:
    """Memory with anything in it. Kept: mapped anew for each convolution, it costs a sixth of the time in page faults."""
    size = math.prod(shape)
    kept: Tensor | None = getattr(_kept, which, None)
    if kept is None or len(kept) < size:
        with torch.inference_mode(False):  # made inside, it could not be written to outside
            kept = torch.empty(size)
        setattr(_kept, which, kept)
    return kept[:size].view(shape)
