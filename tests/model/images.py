"""Images drawn from a seed, in every shape that has ever been trouble."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from fcos_ray.inputs.decode import decode

Pixels = NDArray[np.uint8]


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def shapes(height: int, width: int, seed: int = 0) -> Pixels:
    """Coloured rectangles and ellipses on a gradient, with a little grain, as a photograph has."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    image = np.stack([y / height, x / width, (y + x) / (height + width)], axis=2) * 120 + 80
    for number in range(14):
        cy, cx = rng.uniform(0, height), rng.uniform(0, width)
        ry, rx = rng.uniform(2, 4 + height / 5), rng.uniform(2, 4 + width / 5)
        inside = (abs(y - cy) < ry) & (abs(x - cx) < rx)
        if number % 2:
            inside &= ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1
        image[inside] = rng.uniform(0, 255, 3)
    return np.clip(image + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8)


def cmyk(height: int, width: int, seed: int = 0) -> Pixels:
    """A CMYK JPEG as the job sees it: decoded to RGB."""
    file = io.BytesIO()
    PIL.Image.fromarray(shapes(height, width, seed)).convert("CMYK").save(file, "JPEG", quality=90)
    return decode(file.getvalue()).pixels


def gray(height: int, width: int, seed: int = 0) -> Pixels:
    return np.repeat(shapes(height, width, seed).mean(axis=2, keepdims=True).astype(np.uint8), 3, axis=2)


def flat(height: int, width: int, value: int = 128) -> Pixels:
    return np.full((height, width, 3), value, dtype=np.uint8)


def corpus() -> list[Pixels]:
    """35 images; several share a padded shape without sharing a size."""
    sizes = [
        (480, 640), (640, 480), (500, 500), (333, 500), (500, 333), (427, 640), (424, 640), (640, 427), (120, 90),
        (90, 120), (32, 32), (160, 160), (160, 266), (266, 160), (161, 267), (100, 800), (800, 100), (64, 512),
        (33, 2000), (1, 1), (1, 2), (3, 5), (7, 7), (1400, 200), (1500, 1100), (300, 299),
    ]  # fmt: skip
    return [
        *(shapes(h, w, seed) for seed, (h, w) in enumerate(sizes)),
        noise(200, 300),
        noise(300, 200, 1),
        noise(160, 160, 2),
        gray(240, 320),
        gray(500, 333, 1),
        flat(200, 300),
        flat(160, 160, 0),
        flat(160, 160, 255),
        shapes(480, 640, 99),
        cmyk(360, 270),
    ]
