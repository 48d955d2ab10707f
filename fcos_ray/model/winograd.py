"""Winograd's 3×3 convolutions on a CPU: the same function in fewer multiplications. Knows torch's modules, no models.

After Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv:1509.09308): a tile of the output is
A^T [(G w G^T) · (B^T x B)] A, summed over channels inside of the brackets.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

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
    most_channels: int  # beyond, reading the weights does
    strip_tiles: int  # transformed at a time, about: more leave the caches, fewer take more calls
    strips: int  # whose products are computed at once

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
    most_channels=256,
    strip_tiles=136,
    strips=3,
)
# By MKL 512 channels pay too: of 25×34 pixels they take 9.8 ms, a direct convolution 21 (a Xeon).
F4_BY_MKL: Final = replace(F4, most_channels=512, strips=1)
# Its transforms only add and subtract. In bf16 a convolution is off by 0.5 % of its values' spread, a direct one by 0.24 %,
# F4 by 1.7 % (root mean square, 256 channels), and takes 47 ms, 69 ms and 31 ms (100×136 pixels, one Zen 4 core).
F2: Final = Algorithm(
    a_t=((1, 1, 1, 0), (0, 1, -1, -1)),
    g=((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    b_t=((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    least_channels=256,
    most_channels=512,
    strip_tiles=340,  # an image takes 3 % less than with 136 (two detectors at once, Zen 5)
    strips=1,
)
_WIDTH: Final = 16  # output channels that one of AVX-512's registers holds in fp32


class WinogradConv2d(nn.Module, ABC):
    """A 3×3 convolution of stride 1 as (m+2)² matrix products per m×m pixels, and the ReLU behind it if told to.

    Images of a batch are computed one by one, so none depends on its neighbours.
    """

    algorithm: ClassVar[Algorithm]
    relu = False  # told to compute the ReLU behind it?
    weight: Tensor  # transformed, (points, channels in, channels out), or as `_arranged` has it
    bias: Tensor  # (channels out,), which are padded to a multiple of _WIDTH
    into: Tensor  # (points, points): B^T x B of a flattened tile, which has so many points
    out_of: Tensor  # (m², points): A^T y A of one

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        if not self.suits(conv):
            raise ValueError(f"wanted a 3×3 convolution of stride 1 and padding 1 with many channels, got {conv}")
        matrices = (self.algorithm.a_t, self.algorithm.g, self.algorithm.b_t)
        a_t, g, b_t = (torch.tensor(rows, dtype=torch.float64) for rows in matrices)
        kernel = conv.weight.detach().double()
        weight = torch.einsum("ai,bj,oijc->abco", g, g, kernel.permute(0, 2, 3, 1))
        # in float64 up to here: each value is rounded to float32 once
        weight = weight.reshape(self.algorithm.tile**2, conv.in_channels, conv.out_channels).float()
        bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
        padding = (0, -conv.out_channels % _WIDTH)
        self.channels_out = conv.out_channels
        self.register_buffer("weight", self._arranged(nn.functional.pad(weight, padding)))
        self.register_buffer("bias", nn.functional.pad(bias, padding))
        self.register_buffer("into", torch.kron(b_t, b_t).float())
        self.register_buffer("out_of", torch.kron(a_t, a_t).float())

    @classmethod
    def suits(cls, conv: nn.Conv2d) -> bool:
        """Can it replace this convolution, and has it channels for which the algorithm can pay?"""
        shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
        same = shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
        algorithm = cls.algorithm
        pays = algorithm.least_channels <= conv.in_channels <= algorithm.most_channels and conv.out_channels >= 64
        return same and pays

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, channels out, H, W), channels_last."""
        n, _, height, width = x.shape
        side = self.algorithm.output
        rows, columns = -(-height // side), -(-width // side)  # of tiles
        out = x.new_empty((n, rows * side, columns * side, len(self.bias)))
        for image, result in zip(x.permute(0, 2, 3, 1), out, strict=True):
            self._image(image, result.view(rows, side, columns, side, -1))
        cut = out[:, :height, :width, : self.channels_out]
        return cut.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)

    def _image(self, image: Tensor, result: Tensor) -> None:
        """(H, W, channels in) -> `result`, (rows, m, columns, m, channels out), some strips of rows of tiles at a time."""
        height, width, channels = image.shape
        rows, side, columns, _, channels_out = result.shape
        tile = self.algorithm.tile
        per_strip = min(rows, max(1, self.algorithm.strip_tiles // columns))
        together = min(rows, per_strip * self.algorithm.strips)
        padded = image.new_zeros((together * side + 2, columns * side + 2, channels))
        # Two pieces of memory, in turn: each step reads the one and writes the other
        size = together * columns * tile**2 * max(channels, channels_out)
        scratch = image.new_empty(size), image.new_empty(size)
        for row in range(0, rows, together):
            top, part = row * side - 1, result[row : row + together]  # top: of the image, which begins one row later
            first, last = max(top, 0), min(top + len(padded), height)
            padded[last - top :].zero_()  # the other margins still are
            padded[first - top : last - top, 1 : width + 1] = image[first:last]
            cut = padded[: len(part) * side + 2].unfold(0, tile, side).unfold(1, tile, side)  # no copy
            self._strips(cut.permute(0, 1, 3, 4, 2), part, per_strip, scratch)

    @abstractmethod
    def _strips(self, cut: Tensor, result: Tensor, per_strip: int, scratch: tuple[Tensor, Tensor]) -> None:
        """Tiles, (rows, columns, m+2, m+2, channels in), which overlap -> `result`, `per_strip` rows at a time."""

    def _arranged(self, weight: Tensor) -> Tensor:
        return weight

    def _finish(self, found: Tensor, result: Tensor) -> None:
        torch.add(found, self.bias, out=result)
        if self.relu:
            result.relu_()


class _PointByPoint(WinogradConv2d):
    """A point's values lie side by side: each transform is one matrix product, and none has to be put in order.

    With a tile's values side by side, as F4OneDnnConv2d has them: 26.0 instead of 23.5 ms (bf16 by F2, 256 channels of
    100×136, Zen 5).
    """

    def _strips(self, cut: Tensor, result: Tensor, per_strip: int, scratch: tuple[Tensor, Tensor]) -> None:
        rows, columns, tile, _, channels = cut.shape
        points, channels_out = tile**2, len(self.bias)
        side = self.algorithm.output
        cut = cut.permute(2, 3, 0, 1, 4)
        for first in range(0, rows, per_strip):
            last = min(first + per_strip, rows)
            count = (last - first) * columns
            tiles = _view(scratch[0], tile, tile, last - first, columns, channels)
            tiles.copy_(cut[:, :, first:last])
            inputs = torch.mm(self.into, tiles.view(points, -1), out=_view(scratch[1], points, count * channels))
            products = _view(scratch[0], points, count, channels_out)
            torch.bmm(inputs.view(points, count, channels), self.weight, out=products)
            found = _view(scratch[1], side**2, count * channels_out)
            torch.mm(self.out_of, products.view(points, -1), out=found)
            self._finish(found.view(side, side, -1, columns, channels_out).permute(2, 0, 3, 1, 4), result[first:last])


class F2Conv2d(_PointByPoint):
    """By F2."""

    algorithm = F2


class F4MklConv2d(_PointByPoint):
    """By F4, whose products are torch's in fp32, that is MKL's, where MKL is fast.

    256 channels of 100×136 pixels on a Xeon: 55 -> 39 ms, directly 85.
    """

    algorithm = F4_BY_MKL


class F4OneDnnConv2d(WinogradConv2d):
    """By F4, whose products are oneDNN's: MKL's on Zen 5 reach 107 GFLOP/s where oneDNN has 260.

    256 channels of 100×136 pixels in fp32 on Zen 5: 54 -> 39 ms.
    """

    algorithm = F4

    def _arranged(self, weight: Tensor) -> Tensor:
        return weight.transpose(1, 2).reshape(-1, weight.shape[1], 1, 1).contiguous()

    def _strips(self, cut: Tensor, result: Tensor, per_strip: int, scratch: tuple[Tensor, Tensor]) -> None:
        rows, columns, tile, _, channels = cut.shape
        points, channels_out = tile**2, len(self.bias)
        side = self.algorithm.output
        inputs = _view(scratch[1], rows * columns, points, channels)
        strips = [(row, min(row + per_strip, rows)) for row in range(0, rows, per_strip)]
        for first, last in strips:
            tiles = _view(scratch[0], last - first, columns, tile, tile, channels)
            tiles = tiles.copy_(cut[first:last]).view(-1, points, channels)
            torch.bmm(self.into.expand(len(tiles), -1, -1), tiles, out=inputs[first * columns : last * columns])
        products = self._products(inputs)
        for first, last in strips:
            count = (last - first) * columns
            found = _view(scratch[1], count, side**2, channels_out)
            torch.bmm(self.out_of.expand(count, -1, -1), products[first * columns : last * columns], out=found)
            self._finish(found.view(-1, columns, side, side, channels_out).transpose(1, 2), result[first:last])

    def _products(self, inputs: Tensor) -> Tensor:
        """(tiles, points, channels in) -> (tiles, points, channels out): a matrix product for each point.

        As a convolution with as many groups. oneDNN brings the weights into its order each time, which several strips
        share: 43 ms where each has its own.
        """
        count, points, _ = inputs.shape
        across: Any = inputs.view(1, 1, count, -1).permute(0, 3, 1, 2)
        found: Tensor = torch.mkldnn_convolution(across, self.weight, None, (0, 0), (1, 1), (1, 1), points)
        return found.permute(0, 2, 3, 1).reshape(count, points, -1)


def _view(memory: Tensor, *shape: int) -> Tensor:
    return memory[: math.prod(shape)].view(shape)
