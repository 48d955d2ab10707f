"""Damaged images of every format through the guarded decoder: an error or the right pixels, in time, and the child lives.

FCOS_RAY_MUTATED_IMAGES says how many: a thousand take 3 seconds.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import multiprocessing
import os
import struct
import time
import warnings
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import PIL.Image
import pytest
from PIL.Image import Transpose

from fcos_ray.errors import ERROR_CODES, DecodeError
from fcos_ray.inputs.decode import FORMATS
from fcos_ray.inputs.guard import GuardedDecoder

COUNT = int(os.environ.get("FCOS_RAY_MUTATED_IMAGES", "1000"))
DEADLINE_SECONDS = 20.0
TURNS = (None, None, *(Transpose(n) for n in (0, 3, 1, 5, 4, 6, 2)))  # EXIF orientation -> what undoes it


def saved(picture: PIL.Image.Image, format_: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format_, **options)
    return buffer.getvalue()


def seeds() -> dict[str, bytes]:
    """One small image of each way to write one."""
    rng = np.random.default_rng(5)
    smooth = np.add.outer(np.arange(36), np.arange(50))[:, :, None] * np.array([2, 1, 3])
    rgb = PIL.Image.fromarray((smooth + rng.integers(0, 30, smooth.shape)).astype(np.uint8))
    rgba, grey, palette = rgb.convert("RGBA"), rgb.convert("L"), rgb.quantize(16)
    rgba.putalpha(grey)
    deep = PIL.Image.fromarray(rng.integers(0, 2**16, (30, 40), dtype=np.uint16))
    floats = PIL.Image.fromarray(rng.random((20, 30), dtype=np.float32))
    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    frames = [rgb.rotate(90 * n) for n in (1, 2)]
    found = {
        "jpeg": saved(rgb, "JPEG"), "jpeg progressive": saved(rgb, "JPEG", progressive=True),
        "jpeg cmyk": saved(rgb.convert("CMYK"), "JPEG"), "jpeg grey": saved(grey, "JPEG"),
        "jpeg exif": saved(rgb, "JPEG", exif=turned), "jpeg restarts": saved(rgb, "JPEG", restart_marker_rows=1),
        "png": saved(rgb, "PNG"), "png 1": saved(rgb.convert("1"), "PNG"), "png 8": saved(grey, "PNG"),
        "png 16": saved(deep, "PNG"), "png palette": saved(palette, "PNG"),
        "png palette 1": saved(rgb.quantize(2), "PNG", bits=1),
        "png alpha": saved(rgba, "PNG"), "png exif": saved(rgb, "PNG", exif=turned),
        "png animated": saved(rgb, "PNG", save_all=True, append_images=frames),
        "png interlaced": interlaced(np.asarray(grey)),
        "webp": saved(rgb, "WEBP"), "webp lossless": saved(rgba, "WEBP", lossless=True),
        "webp animated": saved(rgb, "WEBP", save_all=True, append_images=frames), "webp exif": saved(rgb, "WEBP", exif=turned),
        "gif": saved(rgb, "GIF"), "gif animated": saved(rgb, "GIF", save_all=True, append_images=frames),
        "bmp": saved(rgb, "BMP"), "bmp palette": saved(palette, "BMP"), "bmp 1": saved(rgb.convert("1"), "BMP"),
        "tiff float": saved(floats, "TIFF"), "tiff 16": saved(deep, "TIFF"), "tiff exif": saved(rgb, "TIFF", exif=turned),
        "tiff fax": saved(rgb.convert("1"), "TIFF", compression="group4"),
        "tiff cmyk": saved(rgb.convert("CMYK"), "TIFF", compression="tiff_lzw"), "tiff alpha": saved(rgba, "TIFF"),
    }  # fmt: skip
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        found[f"tiff {compression}"] = saved(rgb, "TIFF", compression=compression)
    return found


def interlaced(grey: np.ndarray) -> bytes:
    """An Adam7 PNG, which Pillow reads and does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = b"".join(b"\0" + row.tobytes() for top, left, down, right in passes for row in grey[top::down, left::right])
    head = struct.pack(">IIBBBBB", grey.shape[1], grey.shape[0], 8, 0, 0, 0, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def flip_bits(rng: np.random.Generator, data: bytearray, _: bytes) -> bytes:
    for place in rng.integers(0, len(data), int(rng.integers(1, 8))):
        data[place] ^= 1 << int(rng.integers(8))
    return bytes(data)


def cut(rng: np.random.Generator, data: bytearray, _: bytes) -> bytes:
    return bytes(data[: int(rng.integers(1, len(data)))])


def splice(rng: np.random.Generator, data: bytearray, other: bytes) -> bytes:
    """The start of one and the end of another, each cut anywhere."""
    return bytes(data[: int(rng.integers(1, len(data)))]) + other[int(rng.integers(0, len(other))) :]


def wrong_lengths(rng: np.random.Generator, data: bytearray, _: bytes) -> bytes:
    """Numbers as length fields hold them, in the head, where sizes and offsets stand."""
    values = [0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, len(data), int(rng.integers(2**16))]
    for _turn in range(int(rng.integers(1, 4))):
        width = int(rng.choice([2, 4]))
        place = int(rng.integers(0, max(1, min(len(data), 200) - width)))
        value = values[int(rng.integers(len(values)))] % 2 ** (8 * width)
        data[place : place + width] = value.to_bytes(width, "big" if rng.random() < 0.5 else "little")
    return bytes(data)


def other_body(rng: np.random.Generator, data: bytearray, other: bytes) -> bytes:
    """The header of one on the body of another."""
    head = int(rng.integers(4, 64))
    return bytes(data[:head]) + other[head:]


def insert_or_delete(rng: np.random.Generator, data: bytearray, _: bytes) -> bytes:
    place, length = int(rng.integers(len(data))), int(rng.integers(1, 30))
    data[place : place + (length if rng.random() < 0.5 else 0)] = rng.bytes(length if rng.random() < 0.5 else 0)
    return bytes(data)


MUTATIONS = (flip_bits, cut, splice, wrong_lengths, other_body, insert_or_delete)


def mutated_images(count: int) -> list[bytes]:
    rng = np.random.default_rng(count)
    images = list(seeds().values())
    ways = itertools.cycle(MUTATIONS)
    return [
        next(ways)(rng, bytearray(images[int(rng.integers(len(images)))]), images[int(rng.integers(len(images)))])
        for _ in range(count)
    ]


def by_pillow_alone(data: bytes, orientation: int) -> str | None:
    """The hash of what Pillow gives, in another process and in its own plain words; None for modes it would clip."""
    warnings.simplefilter("ignore")
    picture = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
    picture.load()
    if picture.mode.startswith(("I", "F")):
        return None
    if picture.format != "TIFF" and (turn := TURNS[orientation]) is not None:  # TIFF turns itself
        picture = picture.transpose(turn)
    if picture.mode == "La":
        picture = picture.convert("LA")
    return hashlib.sha256(picture.convert("RGB").tobytes()).hexdigest()


@pytest.mark.timeout(1200)
def test_a_mutated_image_is_an_error_or_the_pixels_of_a_pillow_elsewhere() -> None:
    images = mutated_images(COUNT)
    outcomes: Counter[str] = Counter()
    labelled: list[tuple[bytes, int, str]] = []
    slowest = 0.0
    with GuardedDecoder(max_pixels=10**7, deadline_seconds=DEADLINE_SECONDS, memory_bytes=2**29) as decoder:
        for data in images:
            started = time.monotonic()
            try:
                image = decoder.decode(data)
            except DecodeError as error:
                outcomes[error.code] += 1
            else:
                outcomes["ok"] += 1
                labelled.append((data, image.orientation, hashlib.sha256(image.pixels.tobytes()).hexdigest()))
            slowest = max(slowest, time.monotonic() - started)
    print(f"{COUNT} images, slowest {slowest:.2f} s: {dict(outcomes)}")
    assert slowest < DEADLINE_SECONDS + 5
    assert set(outcomes) - {"ok"} <= ERROR_CODES.keys()
    assert not {"decode_crash", "decode_timeout"} & set(outcomes), "a child was lost"
    assert min(outcomes["ok"], outcomes["corrupt"]) > COUNT / 10
    # backwards, so that what an image leaves behind in its process would show
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as elsewhere:
        backwards = labelled[::-1]
        told = list(elsewhere.map(by_pillow_alone, *zip(*[(d, o) for d, o, _ in backwards], strict=True), chunksize=50))
    different = [
        (d, came, want) for (d, _, came), want in zip(backwards, told, strict=True) if want not in (None, came)
    ]
    assert not different, different[0]
