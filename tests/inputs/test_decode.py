"""decode: bytes -> RGB uint8 as seen."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from typing import Any

import numpy as np
import PIL.Image
import pytest
from PIL import TiffImagePlugin

from fcos_ray.errors import DecodeError
from fcos_ray.inputs.decode import decode, rgb_pixels


def saved(picture: PIL.Image.Image, format_: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format_, **options)
    return buffer.getvalue()


def marked(width: int = 48, height: int = 32) -> np.ndarray:
    """Four quarters of different colours, so that every turn shows."""
    pixels = np.zeros((height, width, 3), np.uint8)
    h, w = height // 2, width // 2
    pixels[:h, :w], pixels[:h, w:], pixels[h:, :w], pixels[h:, w:] = (
        (250, 10, 20),
        (10, 240, 30),
        (20, 30, 230),
        (200,) * 3,
    )
    return pixels


MARKED = PIL.Image.fromarray(marked())


def code_of(data: bytes, **options: Any) -> str:
    with pytest.raises(DecodeError) as caught:
        decode(data, **options)
    return caught.value.code


def one_colour(data: bytes) -> tuple[int, ...]:
    pixels = decode(data).pixels
    assert (pixels == pixels[0, 0]).all()
    return tuple(int(value) for value in pixels[0, 0])


# Formats


@pytest.mark.parametrize("format_", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_give_the_stored_pixels(format_: str) -> None:
    image = decode(saved(MARKED, format_, **({"lossless": True} if format_ == "WEBP" else {})))
    assert (image.pixels == marked()).all()
    assert (image.height, image.width, image.orientation) == (32, 48, 1)


def test_pixels_are_contiguous_uint8_and_the_callers_own() -> None:
    pixels = decode(saved(MARKED, "PNG")).pixels
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable


def test_an_image_of_several_strips_equals_pillows_conversion() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2500, 1000), dtype=np.uint8)
    data = saved(PIL.Image.fromarray(pixels), "PNG", compress_level=0)
    assert (decode(data).pixels == pixels[:, :, None]).all()


def test_a_multi_picture_jpeg_gives_its_first_picture() -> None:
    data = saved(
        MARKED, "MPO", save_all=True, append_images=[PIL.Image.new("RGB", (48, 32))], quality=95, subsampling=0
    )
    with PIL.Image.open(io.BytesIO(data)) as picture:
        assert picture.format == "MPO"
    assert abs(decode(data).pixels.astype(int) - marked()).max() < 12


@pytest.mark.parametrize("format_", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_gives_its_first_frame(format_: str) -> None:
    first, second = PIL.Image.new("RGB", (8, 8), (255, 0, 0)), PIL.Image.new("RGB", (8, 8), (0, 0, 255))
    options = {"lossless": True} if format_ == "WEBP" else {}
    assert one_colour(saved(first, format_, save_all=True, append_images=[second], **options)) == (255, 0, 0)


# The RGB policy, line by line of the table


@pytest.mark.parametrize(
    ("picture", "format_", "rgb"),
    [
        (PIL.Image.new("1", (4, 4), 1), "PNG", (255, 255, 255)),
        (PIL.Image.new("L", (4, 4), 77), "PNG", (77, 77, 77)),
        (PIL.Image.new("LA", (4, 4), (77, 0)), "PNG", (77, 77, 77)),
        (PIL.Image.new("RGBA", (4, 4), (10, 20, 30, 0)), "PNG", (10, 20, 30)),
        (PIL.Image.new("RGBX", (4, 4), (10, 20, 30, 0)), "TIFF", (10, 20, 30)),
        (PIL.Image.new("CMYK", (4, 4), (255, 0, 0, 0)), "TIFF", (0, 255, 255)),
        (PIL.Image.new("YCbCr", (4, 4), (76, 85, 255)), "TIFF", (254, 0, 0)),
        (PIL.Image.new("RGB", (4, 4), (200, 200, 200)).convert("LAB"), "TIFF", (200, 200, 201)),
        (PIL.Image.new("I;16", (4, 4), 0xABCD), "PNG", (0xAB,) * 3),
        (PIL.Image.new("I;16", (4, 4), 0xABCD), "TIFF", (0xAB,) * 3),
        (PIL.Image.new("I", (4, 4), 200), "TIFF", (200,) * 3),
        (PIL.Image.new("I", (4, 4), 0xABCD), "TIFF", (0xAB,) * 3),
        (PIL.Image.new("I", (4, 4), 0x7FFFFFFF), "TIFF", (255,) * 3),
        (PIL.Image.new("I", (4, 4), 0x12345678), "TIFF", (0x12345678 >> 23,) * 3),
        (PIL.Image.new("I", (4, 4), -5), "TIFF", (0,) * 3),
        (PIL.Image.new("F", (4, 4), 0.5), "TIFF", (128,) * 3),
        (PIL.Image.new("F", (4, 4), 200.4), "TIFF", (200,) * 3),
        (PIL.Image.new("F", (4, 4), 1e9), "TIFF", (255,) * 3),
        (PIL.Image.new("F", (4, 4), float("nan")), "TIFF", (0,) * 3),
        (PIL.Image.new("F", (4, 4), float("inf")), "TIFF", (255,) * 3),
    ],
    ids=lambda value: value.mode if isinstance(value, PIL.Image.Image) else None,
)
def test_a_mode_becomes_rgb_as_the_table_says(picture: PIL.Image.Image, format_: str, rgb: tuple[int, ...]) -> None:
    data = saved(picture, format_)
    with PIL.Image.open(io.BytesIO(data)) as stored:
        assert stored.mode[:2] in (picture.mode[:2], "RG")
    assert one_colour(data) == rgb


@pytest.mark.parametrize(
    ("mode", "colour", "rgb"),
    [
        ("HSV", (0, 255, 255), (255, 0, 0)),
        ("La", (50, 128), (99, 99, 99)),
        ("RGBa", (50, 0, 64, 128), (99, 0, 127)),
        ("PA", (3, 0), (3, 3, 3)),
        ("I;16B", 0xABCD, (0xAB,) * 3),
    ],
)
def test_modes_that_pillow_reads_but_does_not_write(mode: str, colour: Any, rgb: tuple[int, ...]) -> None:
    picture = PIL.Image.new(mode, (4, 4), colour)
    if mode == "PA":
        picture.putpalette([value for grey in range(256) for value in (grey, grey, grey)])
        picture.putdata([(3, 0)] * 16)
    assert tuple(rgb_pixels(picture)[0, 0].tolist()) == rgb


@pytest.mark.parametrize("transparency", [None, 0, b"\x00\x80"])
@pytest.mark.parametrize("format_", ["PNG", "GIF"])
def test_a_palette_gives_its_colours_and_transparency_is_ignored(
    format_: str, transparency: int | bytes | None
) -> None:
    if format_ == "GIF" and isinstance(transparency, bytes):
        pytest.skip("GIF knows one transparent index only")
    picture = PIL.Image.new("P", (4, 4), 0)
    picture.putpalette([9, 99, 199, 1, 2, 3])
    options = {} if transparency is None else {"transparency": transparency}
    assert one_colour(saved(picture, format_, **options)) == (9, 99, 199)


def test_a_cmyk_jpeg_is_not_a_negative() -> None:
    """Pillow writes Adobe's marker and inverted values; a decoder that does not turn them round sees (64, …)."""
    picture = PIL.Image.new("CMYK", (16, 16), (0, 0, 0, 63))
    data = saved(picture, "JPEG", quality=95)
    assert b"Adobe" in data
    assert one_colour(data) == pytest.approx((192, 192, 192), abs=3)


def test_a_twelve_bit_tiff_uses_the_whole_range() -> None:
    assert one_colour(_grey_tiff(bits=12, row=b"\xff\xff\xff" * 2)) == (255, 255, 255)
    assert one_colour(_grey_tiff(bits=12, row=b"\x80\x08\x00" * 2)) == (128, 128, 128)


def _grey_tiff(*, bits: int, row: bytes) -> bytes:
    """4 x 1 pixels, little endian."""
    entries = [
        (256, 4, 4),
        (257, 4, 1),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (277, 3, 1),
        (278, 4, 1),
    ]
    entries.append((279, 4, len(row)))
    directory = struct.pack("<H", len(entries))
    for tag, kind, value in entries:
        directory += struct.pack("<HHII", tag, kind, 1, value)
    return b"II*\0" + struct.pack("<I", 8 + len(row)) + row + directory + bytes(4)


def test_an_icc_profile_changes_nothing() -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert (decode(saved(MARKED, "PNG", icc_profile=profile)).pixels == marked()).all()


# Orientation

# What a viewer does, on the pixels of (H, W): EXIF's definition, not Pillow's names.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_image_is_as_seen_for_every_orientation(format_: str, orientation: int) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format_, {})
    image = decode(saved(MARKED, format_, exif=exif, **options))
    expected = UPRIGHT[orientation](marked())
    assert image.pixels.shape == expected.shape
    assert (image.height, image.width) == expected.shape[:2]
    assert image.orientation == orientation
    assert image.pixels.flags.c_contiguous
    assert abs(image.pixels.astype(int) - expected).max() < 12


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_invalid_orientation_is_none(value: int) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = value
    for format_ in ("JPEG", "TIFF"):
        image = decode(saved(MARKED, format_, exif=exif))
        assert (image.orientation, image.width) == (1, 48)


def test_an_orientation_that_is_no_integer_is_none() -> None:
    six_as_text = struct.pack("<HHHI", 1, 0x0112, 2, 4) + b"6\0\0\0"
    six_as_ratio = struct.pack("<HHHII", 1, 0x0112, 5, 1, 26) + bytes(4) + struct.pack("<II", 6, 1)
    for directory in (six_as_text, six_as_ratio):
        exif = b"Exif\0\0II*\0\x08\0\0\0" + directory + bytes(4)
        assert decode(saved(MARKED, "JPEG", exif=exif)).orientation == 1


@pytest.mark.filterwarnings("error")
def test_a_damaged_exif_block_costs_neither_the_image_nor_a_warning() -> None:
    good = PIL.Image.Exif()
    good[0x0112] = 6
    block = good.tobytes()
    for exif in (b"Exif\0\0garbage", block[:12], block[:-9], b"Exif\0\0II*\0\xff\xff\xff\xff"):
        assert decode(saved(MARKED, "JPEG", exif=exif)).pixels.shape[2] == 3


# What fails, and how


def test_no_bytes_are_empty() -> None:
    assert code_of(b"") == "empty"


@pytest.mark.parametrize(
    "data",
    [
        b"x",
        b"<html></html>",
        b"PK\x03\x04" + bytes(100),
        bytes(5000),
        b"%PDF-1.7",
        b"P6 2 2 255 " + bytes(12),
        b"RIFF\0\0\0\0WAVE",
    ],
)
def test_other_formats_are_unknown(data: bytes) -> None:
    assert code_of(data) == "unknown_format"


def test_a_format_pillow_reads_but_the_list_leaves_out_is_unknown() -> None:
    assert code_of(saved(MARKED, "ICO")) == "unknown_format"
    assert code_of(saved(MARKED, "TGA")) == "unknown_format"


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_file_is_corrupt_and_never_half_an_image(format_: str) -> None:
    noise = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = saved(noise, format_)
    for share in (0.02, 0.3, 0.6, 0.9):
        assert code_of(data[: max(16, int(len(data) * share))]) == "corrupt"


def test_a_signature_without_an_image_is_corrupt() -> None:
    for head in (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"RIFF\x10\0\0\0WEBPVP8 "):
        assert code_of(head + bytes(30)) == "corrupt"


def bomb_png(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [(2**31 - 1, 2**31 - 1), (60_000, 60_000), (13_378, 13_378)])
def test_a_bomb_is_refused_from_its_header(size: tuple[int, int]) -> None:
    assert code_of(bomb_png(*size)) == "too_many_pixels"


def test_a_webp_or_gif_bomb_is_refused_too() -> None:
    webp = b"RIFF\x00\x01\x00\x00WEBPVP8X\x0a\x00\x00\x00\x00\x00\x00\x00\xfe\x3f\x00\xfe\x3f\x00" + bytes(200)
    assert code_of(webp) == "too_many_pixels"
    gif = bytearray(saved(PIL.Image.new("P", (4, 4)), "GIF"))
    gif[6:10] = b"\xff\xff\xff\xff"
    assert code_of(bytes(gif)) == "too_many_pixels"


@pytest.mark.filterwarnings("error")
def test_max_pixels_is_the_last_size_that_decodes_also_above_pillows_own_limits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = saved(MARKED, "PNG")
    assert decode(data, max_pixels=48 * 32).width == 48
    assert code_of(data, max_pixels=48 * 32 - 1) == "too_many_pixels"
    for limit in (1000, 500):  # Pillow warns above its limit and refuses above twice the limit
        monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", limit)
        assert decode(data).width == 48


def test_running_out_of_memory_is_not_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    def starve(error: Exception) -> None:
        def load(_: Any) -> None:
            raise error

        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)

    for error in (MemoryError(), OSError("out of memory when reading image file")):
        starve(error)
        with pytest.raises(MemoryError):
            decode(saved(MARKED, "PNG"))


def test_pillows_warnings_stay_inside_and_the_filters_are_restored_after_threads() -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    data = saved(MARKED, "JPEG", exif=exif.tobytes()[:20])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        threads = [threading.Thread(target=lambda: [decode(data) for _ in range(30)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert warnings.filters == before
    assert not caught


def test_the_module_loads_pillow_and_numpy_only() -> None:
    heavy = {"torch", "ray", "pyarrow", "duckdb", "fsspec"}
    code = f"import sys, fcos_ray.inputs.decode; print(sorted({heavy} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_global_limits_of_pillow_stay_as_they_were() -> None:
    before = (PIL.Image.MAX_IMAGE_PIXELS, TiffImagePlugin.READ_LIBTIFF, dict(PIL.Image.EXTENSION))
    decode(saved(MARKED, "TIFF"))
    assert before == (PIL.Image.MAX_IMAGE_PIXELS, TiffImagePlugin.READ_LIBTIFF, dict(PIL.Image.EXTENSION))


# ---- at a part of the size


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_large_jpeg_is_decoded_at_a_part_of_its_size_where_the_model_shrinks_it(
    mode: str, progressive: bool, orientation: int
) -> None:
    """1000×641 stored, for a model of 100 to 160 pixels, which makes 156×100 of it: a quarter is 250×161."""
    soft = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(soft).resize((1000, 641), PIL.Image.Resampling.BICUBIC).convert(mode)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95, progressive=progressive, exif=exif)
    whole, part = decode(buffer.getvalue()), decode(buffer.getvalue(), model_size=(100, 160))
    assert (part.height, part.width, part.orientation) == (whole.height, whole.width, orientation)
    assert part.pixels.shape == ((161, 250, 3) if orientation < 5 else (250, 161, 3))
    averaged = np.asarray(PIL.Image.fromarray(whole.pixels).resize(part.pixels.shape[1::-1], PIL.Image.Resampling.BOX))
    assert np.abs(part.pixels.astype(int) - averaged).mean() < 2.0, "the same picture, the same way up"


def test_what_the_model_does_not_halve_and_what_is_no_jpeg_is_decoded_whole() -> None:
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    for format_, model_size in (("JPEG", (160, 320)), ("JPEG", (800, 1333)), ("PNG", (10, 10)), ("WEBP", (10, 10))):
        buffer = io.BytesIO()
        picture.save(buffer, format_)
        whole = decode(buffer.getvalue())
        assert (decode(buffer.getvalue(), model_size=model_size).pixels == whole.pixels).all(), format_
