"""Decode: bytes -> RGB uint8 as seen. Knows Pillow, not networks, processes or models.

What becomes of each Pillow mode. The rule is `convert("RGB")`, which is what detectors are trained on (torchvision's
CocoDetection; cv2.imread agrees), except where it clips instead of scaling:

| mode                      | comes from                | RGB                                                   |
|---------------------------|---------------------------|-------------------------------------------------------|
| RGB, RGBX                 | JPEG PNG WEBP BMP TIFF    | as stored                                             |
| 1                         | PNG BMP TIFF              | 0 or 255                                              |
| L; P                      | all but WEBP              | grey three times; the palette's colour                |
| LA, PA, RGBA, La, RGBa    | PNG WEBP TIFF             | alpha is dropped, nothing composited (La, RGBa: the   |
|                           |                           | premultiplied colour is divided by alpha again)       |
| transparency of P, L, RGB | PNG GIF                   | ignored: the colour stored for it                     |
| CMYK                      | JPEG TIFF                 | Pillow's formula; Adobe's inverted JPEGs turned round |
| YCbCr, LAB, HSV           | TIFF (HSV: none)          | Pillow's conversion (LAB: littleCMS)                  |
| I;16, I;16B               | PNG TIFF                  | value >> 8, grey; 12-bit TIFF: value >> 4             |
| I (32-bit integers)       | TIFF                      | below 0 is 0; largest value <= 255: as stored,        |
|                           |                           | <= 65535: >> 8, larger: >> 23; grey                   |
| F (floats)                | TIFF                      | NaN is 0; all in [0, 1]: times 255, else clipped to   |
|                           |                           | 0..255; rounded; grey                                 |

I and F do not say their range, so it is read from the image, by one rule that no neighbour changes. 16-bit RGB keeps
its high byte (Pillow). Animations and multi-page files give their first frame. ICC profiles are ignored.
"""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, NamedTuple

import numpy as np
import PIL.Image
from numpy.typing import NDArray

# Imported for what they register: PIL.Image.init() would load forty more formats.
from PIL import (  # noqa: F401
    BmpImagePlugin,
    GifImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from PIL.Image import DecompressionBombError, Transpose
from PIL.ImageFile import ImageFile

from fcos_ray.errors import DecodeError, DetectError
from fcos_ray.sizes import resized_shape
from fcos_ray.types import Image

Empty = Callable[[tuple[int, int, int]], NDArray[np.uint8]]  # (height, width, 3) -> an uninitialised array

# The number Pillow itself refuses at, above 108-Mpx phones and 151-Mpx camera backs. Peak bytes a pixel (Pillow 13): JPEG
# 11, CMYK 13; PNG, GIF, TIFF 9; 32-bit TIFF 14; WEBP 18. So all but the largest of the rare ones fit the guard's 2 GiB.
MAX_PIXELS: Final = 178_956_970

FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # JPEG covers MPO, which has no opener of its own

# What Pillow 13 raises on damaged files: OSError, ValueError, SyntaxError, TypeError, NotImplementedError were seen on
# 20,921 odd files; the others stand in its sources. MemoryError is not among them: it is no property of the file.
_DAMAGED: Final = (
    OSError, SyntaxError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, EOFError, RuntimeError,
    AssertionError, BufferError, struct.error, zlib.error,
)  # fmt: skip

_TRANSPOSE: Final = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
_ORIENTATION_TAG: Final = 0x0112
_BITS_TAG: Final = 0x0102
_STRIP_PIXELS: Final = 2**20  # converting in strips needs 3 bytes a pixel beside the decoded image instead of 10


def decode(
    data: bytes, *, max_pixels: int = MAX_PIXELS, empty: Empty | None = None, model_size: tuple[int, int] | None = None
) -> Image:
    """Decode the first frame of a JPEG, PNG, WEBP, GIF, BMP or TIFF file.

    Pixels are (H, W, 3) uint8, C-contiguous, after EXIF orientation; height and width are theirs. `empty` gives the
    array they are written to where that saves a copy (default: one of their own).
    `model_size`, a (min_size, max_size) as torchvision's: JPEGs that it makes at most half as large are decoded at 1/2, 1/4
    or 1/8, as far as they stay at least that large; height and width are those of the whole image all the same.
    Raises DecodeError (empty, unknown_format, too_many_pixels, corrupt) and MemoryError. Threads may call it.
    """
    if not data:
        raise DecodeError("empty", "0 bytes")
    with _pillow_does_not_warn():
        try:
            return _read(_open(data, max_pixels), empty or _own, model_size)
        except DecompressionBombError as error:  # GIF and WEBP check their canvas against Pillow's own limit
            raise DecodeError("too_many_pixels", str(error)) from error
        except _DAMAGED as error:
            if isinstance(error, OSError) and "out of memory" in str(error):
                raise MemoryError(str(error)) from error
            raise DecodeError("corrupt", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


class Size(NamedTuple):
    """Pixels of an image as seen: after EXIF orientation."""

    width: int
    height: int


def probe(head: bytes) -> Size | None:
    """The size that the first bytes of a file announce, without decoding pixels. None: no image, or more bytes are needed.

    It agrees with `decode`, except that a PNG's orientation may stand behind its pixels. More bytes are needed for a
    JPEG behind a fat EXIF block, a TIFF whose directory stands at the end, and a WEBP with EXIF, which it keeps there.
    """
    with _pillow_does_not_warn():
        try:
            if head[:4] == b"RIFF" and int.from_bytes(head[4:8], "little") + 8 > len(head):
                return _size_of_cut_webp(head)
            picture = _open(head, MAX_PIXELS)
            size = Size(*picture.size)
            # Not PNG's own getexif, which decodes the pixels to look behind them. TIFF's size is turned already.
            turned = picture.format != "TIFF" and _orientation(picture, PIL.Image.Image.getexif) >= 5
        except (DecodeError, DecompressionBombError, *_DAMAGED):
            return None
    return Size(size.height, size.width) if turned else size


def _size_of_cut_webp(head: bytes) -> Size | None:
    """By RFC 9649: Pillow opens whole files only. With EXIF, which comes last, the orientation is not known yet."""
    if head[8:12] != b"WEBP" or len(head) < 30:
        return None
    kind = head[12:16]
    if kind == b"VP8X" and not head[20] & 0x08:
        return Size(1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little"))
    if kind == b"VP8L" and head[20] == 0x2F:
        bits = int.from_bytes(head[21:25], "little")
        return Size(1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        return Size(*(int.from_bytes(head[at : at + 2], "little") & 0x3FFF for at in (26, 28)))
    return None


def _open(data: bytes, max_pixels: int) -> ImageFile:
    """Read the header. PIL.Image.open would call a broken header an unknown format, and check its own limit."""
    prefix = data[:16]
    for name in FORMATS:
        factory, accept = PIL.Image.OPEN[name]
        if accept is not None and accept(prefix) is True:
            picture = factory(io.BytesIO(data), "")
            _check_size(picture, max_pixels)
            return picture
    raise DecodeError("unknown_format", f"starts with {prefix!r}")


def _check_size(picture: ImageFile, max_pixels: int) -> None:
    width, height = picture.size
    if width < 1 or height < 1:
        raise DecodeError("corrupt", f"width {width}, height {height}")
    if width * height > max_pixels:
        raise DecodeError("too_many_pixels", f"{width} x {height} pixels, max_pixels is {max_pixels}")


def _own(shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    return np.empty(shape, dtype=np.uint8)


def _read(picture: ImageFile, empty: Empty, model_size: tuple[int, int] | None) -> Image:
    """Pixels first, EXIF after: the other way round a damaged file may give pixels. TIFF turns itself while loading."""
    whole = picture.size
    if model_size is not None and picture.format == "JPEG":
        _reduce(picture, model_size)
    reduced = picture.size != whole
    loaded: PIL.Image.Image = picture
    if picture.format == "TIFF":
        orientation = _orientation(picture)
        picture.load()
    else:
        picture.load()
        orientation = _orientation(picture)
        if orientation != 1:
            loaded = picture.transpose(_TRANSPOSE[orientation])  # and lets go of the other
    pixels = rgb_pixels(loaded, empty)
    height, width = pixels.shape[:2]
    if reduced:
        width, height = whole if orientation < 5 else whole[::-1]
    return Image(pixels, height=height, width=width, orientation=orientation)


def _reduce(picture: ImageFile, model_size: tuple[int, int]) -> None:
    """Let libjpeg leave out the high frequencies that the model's size does not show. A thin image is left as it is."""
    width, height = picture.size
    with suppress(DetectError):
        shape = resized_shape(height, width, min_size=model_size[0], max_size=model_size[1])
        picture.draft(None, (shape[1], shape[0]))


def _orientation(
    picture: PIL.Image.Image, exif_of: Callable[[Any], PIL.Image.Exif] = lambda picture: picture.getexif()
) -> int:
    """EXIF (or XMP) orientation. Anything but 2 to 8 is 1; an unreadable EXIF block does not damage the image."""
    try:
        value = exif_of(picture).get(_ORIENTATION_TAG, 1)
    except _DAMAGED:
        return 1
    return value if isinstance(value, int) and value in _TRANSPOSE else 1


def rgb_pixels(picture: PIL.Image.Image, empty: Empty = _own) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 of a loaded picture, by the table above."""
    if picture.mode.startswith("I;16"):
        tags: Any = getattr(picture, "tag_v2", {})
        twelve_bits = tuple(tags.get(_BITS_TAG, ())) == (12,)
        return _grey((np.asarray(picture) >> (4 if twelve_bits else 8)).astype(np.uint8))
    if picture.mode == "I":
        return _grey(_from_integers(np.array(picture)))
    if picture.mode == "F":
        return _grey(_from_floats(np.array(picture)))
    width, height = picture.size
    pixels = empty((height, width, 3))
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        strip = picture if rows >= height else picture.crop((0, top, width, bottom))
        pixels[top:bottom] = np.asarray(_convert(strip))
    return pixels


def _convert(picture: PIL.Image.Image) -> PIL.Image.Image:
    if picture.mode == "La":
        picture = picture.convert("LA")  # no direct way
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _from_integers(values: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Changes `values`, as _from_floats does: copies of four bytes a pixel add up."""
    largest = int(values.max())
    shift = 0 if largest <= 0xFF else 8 if largest <= 0xFFFF else 23
    np.maximum(values, 0, out=values)
    np.right_shift(values, shift, out=values)
    return values.astype(np.uint8)


def _from_floats(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    np.nan_to_num(values, copy=False, nan=0.0, posinf=np.inf, neginf=-np.inf)
    if values.min() >= 0 and values.max() <= 1:
        np.multiply(values, 255, out=values)
    np.clip(values, 0, 255, out=values)
    np.rint(values, out=values)
    return values.astype(np.uint8)


def _grey(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(values[:, :, np.newaxis], 3, axis=2)


_quiet_lock = threading.Lock()
_quiet_calls = 0
_quiet_filters = warnings.catch_warnings()


@contextmanager
def _pillow_does_not_warn() -> Iterator[None]:
    """Ignore warnings raised in PIL (bombs, EXIF, palettes) while any thread decodes.

    warnings' filters are global and catch_warnings is not made for threads: the first in changes them, the last out
    restores them.
    """
    global _quiet_calls, _quiet_filters
    with _quiet_lock:
        _quiet_calls += 1
        if _quiet_calls == 1:
            _quiet_filters = warnings.catch_warnings()
            _quiet_filters.__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_calls -= 1
            if _quiet_calls == 0:
                _quiet_filters.__exit__(None, None, None)
