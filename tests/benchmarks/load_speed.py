"""Decode and shrink on one thread: through the guarded child, exact and fast, against Pillow and torchvision's float resize.

`python -m tests.benchmarks.load_speed --image-size 4000x3000`: a line of JSON. Alternating.
"""

from __future__ import annotations

import argparse
import io
import json

import PIL.Image
import torch
from numpy.typing import NDArray
from torchvision.transforms.functional import to_tensor

from fcos_ray.benchmark.photographs import draw_jpeg, parse_size
from fcos_ray.inputs.guard import GuardedDecoder
from fcos_ray.inputs.shrink import shrink_to
from fcos_ray.sizes import resized_shape
from fcos_ray.types import Image
from tests.benchmarks.postprocess_speed import medians

SIZE = {"min_size": 800, "max_size": 1333}


def plain(data: bytes) -> torch.Tensor:
    """What the loop people write does before the model."""
    image = to_tensor(PIL.Image.open(io.BytesIO(data)).convert("RGB"))
    shape = resized_shape(image.shape[1], image.shape[2], **SIZE)
    return torch.nn.functional.interpolate(image[None], size=list(shape), mode="bilinear", align_corners=False)


def used(image: Image) -> NDArray:
    """As the load stage does."""
    shape = resized_shape(image.height, image.width, **SIZE)
    return image.pixels.copy() if shape[0] >= image.pixels.shape[0] else shrink_to(image.pixels, shape)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image-size", default="4000x3000")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    [(width, height)] = parse_size(options.image_size)
    data = draw_jpeg(width, height, seed=0)
    with (
        GuardedDecoder(max_pixels=10**9) as exact,
        GuardedDecoder(max_pixels=10**9, model_size=(SIZE["min_size"], SIZE["max_size"])) as fast,
    ):
        calls = {
            "plain": lambda: plain(data),
            "exact": lambda: exact.decode(data, use=used),
            "fast_decode": lambda: fast.decode(data, use=used),
        }
        found = medians(calls, options.rounds)
    times = {name: round(found["plain"] / found[name], 2) for name in ("exact", "fast_decode")}
    about = {"image_size": options.image_size, "file_bytes": len(data)}
    print(json.dumps(about | {"milliseconds": found, "times": times}))


if __name__ == "__main__":
    main()
