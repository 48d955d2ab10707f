"""Shrink: an image at the model's size. Knows pixels; neither files nor models.

OpenCV's, so that load workers do without torch: 2.5 s of CPU and some hundred MB each.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from fcos_ray.sizes import Shape, resized_shape, shrinks


def shrink(pixels: NDArray[np.uint8], *, min_size: int, max_size: int) -> NDArray[np.uint8]:
    """The image at the model's size if torchvision would shrink it, otherwise the very array that was given.

    `pixels` and the result: (H, W, 3) uint8, C-contiguous. torchvision's bilinear (no antialias), rounded to uint8, the
    same on every CPU: each value is within 1.3 of 255 of the unrounded one, 0.26 in the mean (torch 2.14's own kernel for
    uint8: 0.31); tests/model/test_shrink.py says what that does to detections. Raises DetectError `image_too_thin`.
    """
    height, width = pixels.shape[:2]
    if not shrinks(height, width, min_size=min_size, max_size=max_size):
        return pixels
    return shrink_to(pixels, resized_shape(height, width, min_size=min_size, max_size=max_size))


def shrink_to(pixels: NDArray[np.uint8], shape: Shape) -> NDArray[np.uint8]:
    """The image at a smaller (height, width): see `shrink`."""
    small = np.empty((*shape, 3), np.uint8)
    shrink_into(pixels, small)
    return small


def shrink_into(pixels: NDArray[np.uint8], small: NDArray[np.uint8]) -> None:
    """Write the image into a smaller (H, W, 3) uint8 array. 4000×3000 to 1066×800 takes 5 ms of one core (OpenCV 5.0).

    Raises ValueError where OpenCV would make an array of its own.
    """
    if not small.flags.c_contiguous or small.dtype != np.uint8:
        raise ValueError(f"wanted a C-contiguous uint8 array, got {small.dtype} with strides {small.strides}")
    # INTER_LINEAR in half the time, but an eighth of a grey level too dark in the mean
    cv2.resize(pixels, small.shape[1::-1], dst=small, interpolation=cv2.INTER_LINEAR_EXACT)


def use_one_thread() -> None:
    """Ray counts CPUs, and OpenCV would take all of a machine's."""
    cv2.setNumThreads(1)
