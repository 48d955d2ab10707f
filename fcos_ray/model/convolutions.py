"""Convolutions on a CPU: the same function in less time. Knows torch's modules, not what they are part of.

3×3 convolutions by Winograd's algorithm, after Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks"
(arXiv:1509.09308): a tile of the output is A^T [(G w G^T) · (B^T x B)] A, summed over channels inside of the brackets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Algorithm:
    """F(m×m, 3×3): m×m pixels of the output from (m+2)×(m+2) of the input, in as many multiplications."""

    a_t: Rows  # (m, m+2)
    g: Rows  # (m+2, 3)
    b_t: Rows  # (m+2, m+2)
    least_channels: int  # below, the transforms cost what the products save

    @property
    def output(self) -> int:
        """Side of a tile of the output."""
        return len(self.a_t)

    @property
    def tile(self) -> int:
        """Side of a tile of the input: two pixels of each are the next one's too."""
        return len(self.b_t)


# The points are 0, 1, -1, 1/2, -2 and infinity instead of the paper's 0, ±1, ±2: results are then off by 1e-5 at most instead
# of 3e-5, where oneDNN's direct convolution is by 7e-6 (256 channels of standard normal values, fp32).
F4: Final = Algorithm(
    a_t=((1, 1, 1, 1, 1, 0), (0, 1, -1, 1 / 2, -2, 0), (0, 1, 1, 1 / 4, 4, 0), (0, 1, -1, 1 / 8, -8, 1)),
    g=(
        (1, 0, 0),
        (1 / 3, 1 / 3, 1 / 3),
        (-1 / 3, 1 / 3, -1 / 3),
        (-16 / 15, -8 / 15, -4 / 15),
        (1 / 15, -2 / 15, 4 / 15),
        (0, 0, 1),
    ),
    b_t=(
        (1, -3 / 2, -2, 3 / 2, 1, 0),
        (0, -1, 1 / 2, 5 / 2, 1, 0),
        (0, 1, -5 / 2, 1 / 2, 1, 0),
        (0, -2, -1, 2, 1, 0),
        (0, 1 / 2, -1, -1 / 2, 1, 0),
        (0, 1, -3 / 2, -2, 3 / 2, 1),
    ),
    least_channels=128,
)
# Its transforms only add and subtract. In bf16 a convolution is off by 0.5 % of its values' spread, a direct one by 0.24 %,
# F4 by 1.7 % (root mean square, 256 channels), and takes 47 ms, 69 ms and 31 ms (100×136 pixels, one Zen 4 core).
F2: Final = Algorithm(
    a_t=((1, 1, 1, 0), (0, 1, -1, -1)),
    g=((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    b_t=((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    least_channels=256,
)
BY_PRECISION: Final = {torch.float32: F4, torch.bfloat16: F2}
# Tiles at a time, about: what they pass through stays in a core's cache. In bf16 all at once takes 87 ms instead of 47.
_STRIP_TILES: Final = 136


def quicken(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Replace convolutions of a float32 model by faster ones, in place, for a CPU; the replaced take no gradient.

    `dtype`: what the model is going to compute in; of those that BY_PRECISION has no algorithm for nothing is replaced.
    One thread, 800×1088 through fcos_resnet50_fpn: fp32 4.1 -> 2.8 s, bf16 1.77 -> 1.49 s. In fp32 3×3 weights take four
    times the memory, 200 MB more; in bf16 less than twice.
    """
    algorithm = BY_PRECISION.get(dtype)
    if algorithm is None or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return model
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Conv2d and child.padding_mode == "zeros":
                suits = WinogradConv2d.suits(child, algorithm)
                setattr(parent, name, WinogradConv2d(child, algorithm) if suits else _OneDnnConv2d(child))
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
    """A 3×3 convolution of stride 1 as (m+2)² matrix products per m×m pixels: F4 needs a quarter of the multiplications.

    Images of a batch are computed one by one, so none depends on its neighbours.
    """

    weight: Tensor  # (points, channels in, channels out), transformed; points: of a tile
    bias: Tensor  # (channels out,)
    into: Tensor  # (points, points): B^T x B of a flattened tile
    out_of: Tensor  # (m², points): A^T y A of one

    def __init__(self, conv: nn.Conv2d, algorithm: Algorithm = F4) -> None:
        super().__init__()
        if not self.suits(conv, algorithm):
            raise ValueError(f"wanted a 3×3 convolution of stride 1 and padding 1 with many channels, got {conv}")
        self.algorithm = algorithm
        matrices = (algorithm.a_t, algorithm.g, algorithm.b_t)
        a_t, g, b_t = (torch.tensor(rows, dtype=torch.float64) for rows in matrices)
        kernel = conv.weight.detach().double()
        weight = torch.einsum("ai,bj,oijc->abco", g, g, kernel.permute(0, 2, 3, 1))
        # in float64 up to here: each value is rounded to float32 once
        self.register_buffer("weight", weight.reshape(algorithm.tile**2, conv.in_channels, conv.out_channels).float())
        bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
        self.register_buffer("bias", bias)
        self.register_buffer("into", torch.kron(b_t, b_t).float())
        self.register_buffer("out_of", torch.kron(a_t, a_t).float())

    @staticmethod
    def suits(conv: nn.Conv2d, algorithm: Algorithm = F4) -> bool:
        """Can it replace this convolution, and is it faster?"""
        shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
        same = shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
        return same and conv.in_channels >= algorithm.least_channels and conv.out_channels >= 64

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, channels out, H, W), channels_last."""
        n, _, height, width = x.shape
        side = self.algorithm.output
        rows, columns = -(-height // side), -(-width // side)  # of tiles
        out = x.new_empty((n, rows * side, columns * side, len(self.bias)))
        for image, result in zip(x.permute(0, 2, 3, 1), out, strict=True):
            self._image(image, result.view(rows, side, columns, side, -1))
        return out[:, :height, :width].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)

    def _image(self, image: Tensor, result: Tensor) -> None:
        """(H, W, channels in) -> `result`, (rows, m, columns, m, channels out), in strips of some rows of tiles."""
        height, width, channels = image.shape
        rows, side, columns, _, channels_out = result.shape
        per_strip = min(rows, max(1, _STRIP_TILES // columns))
        padded = image.new_zeros((per_strip * side + 2, columns * side + 2, channels))
        # Two pieces of memory, in turn: each step reads the one and writes the other
        size = per_strip * columns * self.algorithm.tile**2 * max(channels, channels_out)
        scratch = image.new_empty(size), image.new_empty(size)
        for row in range(0, rows, per_strip):
            top, strip = row * side - 1, result[row : row + per_strip]  # top: of the image, which begins one row later
            first, last = max(top, 0), min(top + len(padded), height)
            padded[last - top :].zero_()  # the other margins still are
            padded[first - top : last - top, 1 : width + 1] = image[first:last]
            self._strip(padded[: len(strip) * side + 2], strip, scratch)

    def _strip(self, padded: Tensor, result: Tensor, scratch: tuple[Tensor, Tensor]) -> None:
        rows, side, columns, _, channels_out = result.shape
        channels, count, tile = padded.shape[2], rows * columns, self.algorithm.tile
        points = tile**2
        tiles = _view(scratch[0], rows, columns, tile, tile, channels)
        cut = padded.unfold(0, tile, side).unfold(1, tile, side)  # (rows, columns, channels, tile, tile), no copy
        tiles.copy_(cut.permute(0, 1, 3, 4, 2))
        into = self.into.expand(count, -1, -1)
        inputs = torch.bmm(into, tiles.view(count, points, channels), out=_view(scratch[1], count, points, channels))
        products = _view(scratch[0], points, count, channels_out)
        torch.bmm(inputs.transpose(0, 1), self.weight, out=products)
        found = _view(scratch[1], count, side**2, channels_out)
        torch.bmm(self.out_of.expand(count, -1, -1), products.transpose(0, 1), out=found)
        torch.add(found.view(rows, columns, side, side, channels_out).transpose(1, 2), self.bias, out=result)


def _view(memory: Tensor, *shape: int) -> Tensor:
    return memory[: math.prod(shape)].view(shape)
