"""Sizes: what torchvision would resize and pad an image to. Pure arithmetic, so that nobody loads torch for it."""

from __future__ import annotations

from typing import Final

from fcos_ray.errors import DetectError

# Micro-batches cost time on a CPU (1.13 s per image alone, 1.65 in fours: torch 2.14). 16 on CUDA is a guess of ours.
MAX_MICRO_BATCH: Final = {"cpu": 1, "cuda": 16}

Shape = tuple[int, int]  # height, width

SIZE_DIVISIBLE: Final = 32  # GeneralizedRCNNTransform's default, which FCOS keeps


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


def shrinks(height: int, width: int, *, min_size: int, max_size: int) -> bool:
    """Whether torchvision would make the image smaller. Raises DetectError `image_too_thin`."""
    resized_shape(height, width, min_size=min_size, max_size=max_size)
    return _scale(height, width, min_size, max_size) < 1


def _scale(height: int, width: int, min_size: int, max_size: int) -> float:
    return min(min_size / min(height, width), max_size / max(height, width))


def _round_up(side: int) -> int:
    return -(-side // SIZE_DIVISIBLE) * SIZE_DIVISIBLE
