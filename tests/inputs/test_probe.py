"""A size read from a file's first bytes is the size that decoding gives, or null; junk gives null."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from fcos_ray.errors import DecodeError
from fcos_ray.inputs.decode import Size, decode, probe
from fcos_ray.sample import write_sample

NOISE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
HEAD = 2**14  # less than any of the files made of noise


def saved(format_: str, *, orientation: int = 1, **options: Any) -> bytes:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    if format_ == "TIFF":
        options["tiffinfo"] = {0x0112: orientation}
    elif format_ not in ("GIF", "BMP") and orientation != 1:
        options["exif"] = exif
    buffer = io.BytesIO()
    NOISE.save(buffer, format_, **options)
    return buffer.getvalue()


def seen(data: bytes) -> Size:
    image = decode(data)
    return Size(image.width, image.height)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "TIFF"])
def test_the_first_bytes_give_the_size_as_seen(format_: str, orientation: int) -> None:
    data = saved(format_, orientation=orientation)
    assert len(data) > HEAD
    assert probe(data[:HEAD]) == probe(data) == seen(data)
    assert probe(data).width == (300 if orientation >= 5 else 400)


@pytest.mark.parametrize("format_", ["GIF", "BMP", "WEBP"])
def test_the_first_bytes_of_formats_without_orientation_give_the_size(format_: str) -> None:
    data = saved(format_)
    assert probe(data[:HEAD]) == probe(data) == seen(data) == (400, 300)


@pytest.mark.parametrize("options", [{"lossless": True}, {"quality": 80}, {"quality": 80, "icc_profile": b"x" * 200}])
def test_each_kind_of_webp_is_read_from_its_first_bytes(options: dict[str, Any]) -> None:
    data = saved("WEBP", **options)
    assert probe(data[:HEAD]) == seen(data)
    assert probe(data[:29]) is None


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_webp_with_exif_tells_its_size_when_it_is_there_whole(orientation: int) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = saved("WEBP", exif=exif.tobytes())
    assert probe(data[:HEAD]) is None  # EXIF comes last
    assert probe(data) == seen(data)


def test_a_fat_exif_block_needs_more_bytes() -> None:
    exif = PIL.Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x" * 40_000
    data = saved("JPEG", exif=exif)
    assert probe(data[:HEAD]) is None
    assert probe(data[: 3 * HEAD]) == seen(data) == (300, 400)


def test_pixels_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [saved("PNG"), saved("PNG", orientation=6), saved("JPEG", orientation=6), saved("TIFF", orientation=6)]
    loaded: list[str] = []
    for file_class in (JpegImageFile, PngImageFile, TiffImageFile):
        monkeypatch.setattr(file_class, "load", lambda picture: loaded.append(picture.format))
    assert [probe(data) for data in files] == [(400, 300), (300, 400), (300, 400), (300, 400)]
    assert not loaded, "Pillow's PNG looks for EXIF behind the pixels"


def test_the_drawn_corpus_is_probed_as_it_is_decoded(tmp_path: Path) -> None:
    write_sample(tmp_path, num_images=60, seed=5, num_broken=12)
    probed = 0
    for path in sorted((tmp_path / "images").iterdir()):
        data = path.read_bytes()
        try:
            wanted = seen(data)
        except DecodeError:
            probe(data)  # whatever it says, it says it
            continue
        assert probe(data) == wanted, path.name
        probed += probe(data[: 2**16]) == wanted
    assert probed >= 40


def test_junk_gives_null_and_nothing_else() -> None:
    rng = random.Random(0)
    files = [saved(format_, orientation=6) for format_ in ("JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP")]
    for _ in range(3000):
        data = bytearray(rng.choice(files)[: rng.choice([0, 3, 12, 29, 64, 300, 3000])])
        for _ in range(rng.randint(0, 8)):
            if data:
                data[rng.randrange(min(len(data), 60))] = rng.randrange(256)
        found = probe(bytes(data))
        assert found is None or min(found) > 0
    assert probe(b"") is None
    assert probe(b"not an image at all") is None
