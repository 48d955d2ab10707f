"""Shrinking: torchvision's resize, rounded, without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from fcos_ray.errors import DetectError
from fcos_ray.inputs.shrink import shrink, shrink_into, shrink_to
from tests.model.images import noise

SIZE = {"min_size": 800, "max_size": 1333}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((900, 1400), (800, 1244)),
        ((1201, 801), (1199, 800)),
        ((100, 3000), (44, 1333)),
        ((801, 801), (800, 800)),
        ((1600, 1600), (800, 800)),
        ((60, 65500), (1, 1333)),
        ((65500, 60), (1333, 1)),
    ],
)
def test_shrinking_is_torchvisions_resize_rounded(before: tuple[int, int], after: tuple[int, int]) -> None:
    pixels = noise(*before)
    small = shrink(pixels, **SIZE)
    assert (small.shape, small.dtype, small.flags.c_contiguous) == ((*after, 3), np.uint8, True)
    channels_first = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    wanted = torch.nn.functional.interpolate(channels_first, size=after, mode="bilinear", align_corners=False)
    apart = small.astype(np.float32) - wanted[0].permute(1, 2, 0).numpy()
    assert (
        np.abs(apart).max() < 1.3
    )  # fixed-point: at worst the step beside the nearest, in rare places the one after it
    assert np.abs(apart).mean() < 0.28
    halves = before == (1600, 1600)  # a quarter of the means lie in the middle of two steps, and go up
    assert abs(apart.mean()) < (0.13 if halves else 0.02)


def test_what_torchvision_would_not_shrink_is_handed_back_as_it_is() -> None:
    for height, width in [(800, 800), (1, 1), (799, 1300), (10, 1333)]:
        pixels = noise(height, width)
        assert shrink(pixels, **SIZE) is pixels
    with pytest.raises(DetectError, match="image_too_thin"):
        shrink(noise(1, 1334), **SIZE)


def test_shrinking_reads_memory_that_may_not_be_written() -> None:
    pixels = noise(900, 900)
    wanted = shrink_to(pixels, (800, 800))
    pixels.flags.writeable = False
    np.testing.assert_array_equal(shrink_to(pixels, (800, 800)), wanted)


def test_a_shrunk_image_is_written_where_it_is_to_lie() -> None:
    pixels, around = noise(900, 900), np.full(7 + 800 * 800 * 3 + 9, 77, np.uint8)
    shrink_into(pixels, around[7:-9].reshape(800, 800, 3))
    np.testing.assert_array_equal(around[7:-9].reshape(800, 800, 3), shrink_to(pixels, (800, 800)))
    assert set(around[:7]) == set(around[-9:]) == {77}
    with pytest.raises(ValueError, match="C-contiguous"):
        shrink_into(pixels, np.zeros((800, 1600, 3), np.uint8)[:, ::2])


def test_a_load_worker_does_without_torch(tmp_path: Path) -> None:
    PIL.Image.fromarray(noise(900, 1300)).save(tmp_path / "a.png")
    program = f"""
import sys
import pyarrow as pa
import fcos_ray.pipeline
from fcos_ray.inputs.fetch import FetchPolicy
from fcos_ray.load import LoadSettings, load_tables
settings = LoadSettings(FetchPolicy(allow_roots=({str(tmp_path)!r},)), 10**8, 60.0, 2**31, 800, 1333, exact_resize=False)
rows = pa.table({{"shard": [0], "row": [0], "uri": [{str(tmp_path / "a.png")!r}], "refused": pa.nulls(1, pa.string()),
                 "deleted": [False]}})
[table] = load_tables(rows, settings)
assert table["pixel_height"].to_pylist() == [800], table["error_message"]
assert not [name for name in sys.modules if name.partition(".")[0] in ("torch", "torchvision")]
"""
    subprocess.run([sys.executable, "-c", program], check=True)
