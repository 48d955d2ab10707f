"""Sizes and micro-batches: what torchvision would resize and pad an image to. Knows pixels, not models or devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fcos_ray.errors import DetectError

Shape = tuple[int, int]  # height, width

SIZE_DIVISIBLE = 32  # GeneralizedRCNNTransform's default, which FCOS keeps


def resized_shape(height: int, width: int, *, min_size: int, max_size: int) -> Shape:
    """The (height, width) torchvision's GeneralizedRCNNTransform resizes an image to.

    Raises DetectError `image_too_thin` where a side becomes zero; torchvision raises there too.
    """
    # Python floats, multiplied and cut by int(): torchvision 0.29 `_resize_image_and_masks` and `interpolate` with
    # recompute_scale_factor. float32 stands there for scripting and tracing only.
    scale = _scale(height, width, min_size, max_size)
    shape = int(height * scale), int(width * scale)
    if min(shape) < 1:
        raise DetectError(
            "image_too_thin",
            f"{height}×{width} (height × width) would be resized to {shape[0]}×{shape[1]} pixels",
        )
    return shape


def padded_shape(height: int, width: int, *, min_size: int, max_size: int) -> Shape:
    """The (height, width) torchvision pads an image to when it comes alone. Raises DetectError `image_too_thin`."""
    resized = resized_shape(height, width, min_size=min_size, max_size=max_size)
    return _round_up(resized[0]), _round_up(resized[1])


def shrink(pixels: NDArray[np.uint8], *, min_size: int, max_size: int) -> NDArray[np.uint8]:
    """The image at the model's size if torchvision would shrink it, otherwise the very array that was given.

    `pixels` and the result: (H, W, 3) uint8, C-contiguous. torchvision's bilinear (no antialias), rounded to uint8:
    each value is within 1.1 of 255 of the unrounded one; tests/model/test_shrink.py says what that does to detections.
    Raises DetectError `image_too_thin`.
    """
    height, width = pixels.shape[:2]
    shape = resized_shape(height, width, min_size=min_size, max_size=max_size)
    if _scale(height, width, min_size, max_size) >= 1:
        return pixels
    if not pixels.flags.writeable:
        pixels = pixels.copy()  # torch warns about memory it must not write to, and has no read-only tensors
    # (1, H, W, 3) seen as channels_last takes the vectorised uint8 path and comes out in the same layout:
    # 4000×3000 in 5 ms on 2 cores, 15 on one, against 46–70 ms contiguous (torch 2.14)
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    small = torch.nn.functional.interpolate(image, size=list(shape), mode="bilinear", align_corners=False)
    return np.ascontiguousarray(small[0].permute(1, 2, 0).numpy())


def micro_batches(
    shapes: Sequence[Shape], *, max_images: int, lowered: Mapping[Shape, int] | None = None
) -> list[list[int]]:
    """Indices of `shapes`, grouped by equal padded shape and cut to at most `max_images` each.

    `lowered` holds smaller limits for single shapes. Groups stand in order of first appearance, indices ascend: the
    same input gives the same plan.
    """
    groups: dict[Shape, list[int]] = {}
    for index, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(index)
    plan = []
    for shape, indices in groups.items():
        limit = min(max_images, (lowered or {}).get(shape, max_images))
        plan += [indices[start : start + limit] for start in range(0, len(indices), limit)]
    return plan


def _scale(height: int, width: int, min_size: int, max_size: int) -> float:
    return min(min_size / min(height, width), max_size / max(height, width))


def _round_up(side: int) -> int:
    return -(-side // SIZE_DIVISIBLE) * SIZE_DIVISIBLE
