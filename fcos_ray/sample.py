"""Sample: a drawn corpus with ground truth. Knows Pillow and COCO's annotation format, not jobs, networks or models.

Shapes of five categories on textured backgrounds, in the mixture a real corpus brings: portrait, panorama and tiny
images, grey, CMYK and palette files, EXIF orientations, and a few files broken on purpose. Same seed, same bytes (with
the same Pillow, numpy and pyarrow): image k depends on (seed, k) only. No fonts, no clock.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import ImageDraw
from PIL.Image import Resampling, Transpose

from fcos_ray.errors import OutputError

Pixels = NDArray[np.uint8]  # (H, W, 3) RGB, as seen

CATEGORIES: Final = ("circle", "rectangle", "triangle", "star", "cross")  # COCO ids 1 to 5
MIN_OBJECT_SIDE: Final = 14  # pixels; a shape smaller than this is not told from its neighbours after JPEG

# How a file must be stored, so that a viewer who follows the orientation sees it upright: the viewer's turn undone.
_STORED_AS: Final = {
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_90, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_270,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class SampleSummary:
    """What was written."""

    manifest: str
    annotations: str
    num_images: int  # rows of the manifest
    num_broken: int  # of them
    num_objects: int
    image_bytes: int


@dataclass(frozen=True, slots=True)
class Object:
    """One drawn shape. `box` holds every pixel of it and touches it on all four sides."""

    category: int  # index into CATEGORIES
    box: tuple[int, int, int, int]  # x, y, width, height, pixels of the image as seen
    area: int  # pixels drawn


@dataclass(frozen=True, slots=True)
class Drawing:
    """One image and what is in it."""

    pixels: Pixels
    objects: list[Object]


def write_sample(folder: Path, *, num_images: int, seed: int, num_broken: int | None = None) -> SampleSummary:
    """Write images/, manifest.parquet and annotations.json (COCO) into a new or empty folder.

    `num_images` counts manifest rows; `num_broken` of them (default: one in twenty) are broken in the ways of BROKEN,
    in turn. Manifest columns: image_id (the COCO id as a string), uri (relative to the manifest), width and height as
    seen (null when broken), split, captured_at (a date), expected_error (an error code, null when the file is good).
    Raises OutputError when the folder holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"the sample wants a new or empty folder, {folder} is not")
    num_broken = num_images // 20 if num_broken is None else num_broken
    if not 0 <= num_broken <= num_images:
        raise OutputError(f"num_broken must lie in [0, num_images = {num_images}], got {num_broken}")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    places = sorted(np.random.default_rng([seed, 0]).choice(num_images, num_broken, replace=False).tolist())
    ways = {place + 1: BROKEN[turn % len(BROKEN)] for turn, place in enumerate(places)}
    rows: list[dict[str, Any]] = []
    coco: dict[str, list[dict[str, Any]]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name, "supercategory": "shape"} for i, name in enumerate(CATEGORIES, 1)],
    }
    image_bytes = 0
    for number in range(1, num_images + 1):
        rng = np.random.default_rng([seed, number])
        captured_at = date(2026, 1, 1) + timedelta(days=int(rng.integers(28)))
        row: dict[str, Any] = {
            "image_id": str(number),
            "split": "val" if rng.random() < 0.2 else "train",
            "captured_at": captured_at,
        }
        data: bytes | None
        if number in ways:
            way = ways[number]
            data, name = way.make(rng), f"images/{number:06d}-{way.name}{way.suffix}"
            row |= {"uri": name, "width": None, "height": None, "expected_error": way.expected_error}
        else:
            drawing = draw_shapes(rng, *draw_size(rng))
            data, suffix = encode(rng, drawing.pixels)
            name = f"images/{number:06d}{suffix}"
            height, width = drawing.pixels.shape[:2]
            row |= {"uri": name, "width": width, "height": height, "expected_error": None}
            coco["images"].append({"id": number, "file_name": name, "width": width, "height": height})
            coco["annotations"] += _annotations(drawing, number, first_id=len(coco["annotations"]) + 1)
        rows.append(row)
        if data is not None:
            (folder / name).write_bytes(data)
            image_bytes += len(data)
    pq.write_table(pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA), folder / "manifest.parquet")
    (folder / "annotations.json").write_text(json.dumps(coco))
    return SampleSummary(
        manifest=str(folder / "manifest.parquet"),
        annotations=str(folder / "annotations.json"),
        num_images=num_images,
        num_broken=num_broken,
        num_objects=len(coco["annotations"]),
        image_bytes=image_bytes,
    )


MANIFEST_SCHEMA: Final = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("split", pa.string()),
        pa.field("captured_at", pa.date32()),
        pa.field("expected_error", pa.string()),
    ]
)


def _annotations(drawing: Drawing, image_id: int, *, first_id: int) -> list[dict[str, Any]]:
    return [
        {
            "id": first_id + k,
            "image_id": image_id,
            "category_id": thing.category + 1,
            "bbox": list(thing.box),
            "area": thing.area,
            "iscrowd": 0,
        }
        for k, thing in enumerate(drawing.objects)
    ]


def draw_size(rng: np.random.Generator) -> tuple[int, int]:
    """Height and width: mostly 320 to 800 on the long side; one in ten tiny (64 to 128), one in twenty 1000 to 1600."""
    size = rng.random()
    long_side = int(
        rng.integers(64, 129) if size < 0.1 else rng.integers(1000, 1601) if size > 0.95 else rng.integers(320, 801)
    )
    aspect = rng.choice([1.0, 4 / 3, 3 / 2, 16 / 9, 3.0], p=[0.15, 0.4, 0.22, 0.15, 0.08])
    short_side = max(48, round(long_side / float(aspect)))
    return (long_side, short_side) if rng.random() < 0.35 else (short_side, long_side)


def draw_photo(rng: np.random.Generator, height: int, width: int, *, contrast: float = 1.0) -> Pixels:
    """Something with a photograph's spectrum: noise whose amplitude falls with frequency, some hard edges, grain."""
    half = (-(-width // 2), -(-height // 2))  # only edges and grain are drawn at full size: four times faster
    canvas = np.full((half[1], half[0], 3), rng.uniform(70, 185, 3), dtype=np.float32)
    for octave in range(7):
        cells = 2 ** (octave + 1)
        if cells > max(height, width):
            break
        grid = rng.normal(0, 55 * contrast / 1.7**octave, (cells, cells, 3)).astype(np.float32)
        grid = 0.7 * grid.mean(axis=2, keepdims=True) + 0.5 * grid  # mostly light and dark, some colour
        for channel in range(3):
            layer = PIL.Image.fromarray(grid[:, :, channel])
            canvas[:, :, channel] += np.asarray(layer.resize(half, Resampling.BILINEAR))
    picture = PIL.Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8)).resize((width, height), Resampling.BILINEAR)
    pen = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(2, 6))):
        ends = rng.uniform(-0.1, 1.1, (2, 2)) * (width, height)
        colour = tuple(int(c) for c in rng.integers(20, 236, 3))
        pen.line([tuple(map(float, end)) for end in ends], fill=colour, width=int(rng.integers(1, 2 + width // 100)))
    grain = rng.normal(0, 5, (128, 128, 1)).astype(np.int16)
    tiles = np.tile(grain, (-(-height // 128), -(-width // 128), 1))[:height, :width]
    return np.clip(np.asarray(picture) + tiles, 0, 255).astype(np.uint8)


def draw_shapes(rng: np.random.Generator, height: int, width: int, *, max_objects: int = 6) -> Drawing:
    """One to `max_objects` shapes that hide nothing of one another on a textured background."""
    pixels = draw_photo(rng, height, width, contrast=float(rng.uniform(0.3, 0.7)))
    taken = np.zeros((height, width), dtype=bool)
    objects: list[Object] = []
    short_side = min(height, width)
    smallest, largest = max(MIN_OBJECT_SIDE + 4, short_side * 0.08), max(MIN_OBJECT_SIDE + 8, short_side * 0.5)
    wanted = int(rng.integers(1, max_objects + 1))
    for _ in range(4 * wanted):
        if len(objects) == wanted:
            break
        category = int(rng.integers(len(CATEGORIES)))
        # Uniform in the logarithm: as many small shapes as large ones.
        mask = _shape_mask(rng, category, diameter=float(np.exp(rng.uniform(np.log(smallest), np.log(largest)))))
        rows, columns = mask.shape
        if min(rows, columns) < MIN_OBJECT_SIDE or rows > height or columns > width:
            continue
        top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
        place = (slice(top, top + rows), slice(left, left + columns))
        if (taken[place] & (mask > 0)).any() or taken[place].mean() > 0.15:
            continue
        pixels[place] = _painted(rng, pixels[place], mask)
        taken[place] |= mask > 0
        objects.append(Object(category, (left, top, columns, rows), int((mask > 127).sum())))
    return Drawing(pixels, objects)


def _shape_mask(rng: np.random.Generator, category: int, *, diameter: float) -> NDArray[np.uint8]:
    """Coverage 0..255, cut to the rows and columns that are at least half covered somewhere."""
    points = _outline(rng, CATEGORIES[category])
    turn = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    side = int(np.ceil(diameter)) + 4
    corners = (points @ rotation * diameter / 2 + side / 2) * 4
    large = PIL.Image.new("L", (side * 4, side * 4))
    ImageDraw.Draw(large).polygon([tuple(map(float, corner)) for corner in corners], fill=255)
    mask = np.asarray(large.reduce(4))
    rows, columns = np.flatnonzero((mask > 127).any(axis=1)), np.flatnonzero((mask > 127).any(axis=0))
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _outline(rng: np.random.Generator, name: str) -> NDArray[np.float64]:
    """Corners within the unit circle, (N, 2)."""

    def around(angles: NDArray[np.float64], radius: Any = 1.0) -> NDArray[np.float64]:
        return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.reshape(radius, (-1, 1))

    if name == "circle":
        return around(np.linspace(0, 2 * np.pi, 64, endpoint=False)) * (1, rng.uniform(0.85, 1))
    if name == "rectangle":
        half = rng.uniform(0.4, np.pi / 4)  # angle of the diagonal: from 1 : 2.4 to a square
        return around(np.array([half, np.pi - half, np.pi + half, -half]))
    if name == "triangle":
        return around(np.array([0, 2, 4]) * np.pi / 3 + rng.uniform(-0.25, 0.25, 3))
    if name == "star":
        return around(np.arange(10) * np.pi / 5, np.where(np.arange(10) % 2, rng.uniform(0.36, 0.46), 1.0))
    arm = rng.uniform(0.2, 0.32)
    quarter = np.array([[1, -arm], [1, arm], [arm, arm]]) / np.hypot(1, arm)
    turns = [np.array([[0, 1], [-1, 0]]), np.eye(2) * -1, np.array([[0, -1], [1, 0]])]
    return np.concatenate([quarter, *(quarter @ turn for turn in turns)])


def _painted(rng: np.random.Generator, under: Pixels, mask: NDArray[np.uint8]) -> Pixels:
    """The background with the shape on it: a colour whose lightness differs enough for a grey file too."""
    luma = np.array([0.299, 0.587, 0.114])
    below = float(under.reshape(-1, 3).mean(axis=0) @ luma)
    colour = rng.uniform(0, 255, 3)
    while abs(float(colour @ luma) - below) < 45:
        colour = rng.uniform(0, 255, 3)
    rows, columns = mask.shape
    shade = np.linspace(-1, 1, columns) * rng.uniform(-18, 18) + np.linspace(-1, 1, rows)[:, None] * rng.uniform(
        -18, 18
    )
    paint = colour + (shade + rng.normal(0, 6, mask.shape))[:, :, None]
    cover = mask[:, :, None] / 255.0
    return np.clip(np.rint(under * (1 - cover) + paint * cover), 0, 255).astype(np.uint8)


def encode(rng: np.random.Generator, pixels: Pixels) -> tuple[bytes, str]:
    """A file and its suffix: three in five JPEG (some grey, CMYK, or with an orientation), the others PNG and WEBP."""
    picture = PIL.Image.fromarray(pixels)
    kind, variant = rng.random(), rng.random()
    if kind < 0.6:
        options: dict[str, Any] = {"quality": int(rng.integers(80, 94)), "progressive": bool(rng.random() < 0.2)}
        if variant < 0.5:
            options["exif"] = PIL.Image.Exif()
            orientation = options["exif"][0x0112] = int(rng.integers(1, 9))
            picture = picture.transpose(_STORED_AS[orientation]) if orientation > 1 else picture
        elif variant < 0.65:
            picture = picture.convert("L" if variant < 0.57 else "CMYK")
        return _saved(picture, "JPEG", **options), ".jpg"
    if kind < 0.85:
        if variant < 0.25:
            picture = picture.quantize(64, method=PIL.Image.Quantize.FASTOCTREE)
        elif variant < 0.5:
            picture = picture.convert("L" if variant < 0.38 else "RGBA")
        return _saved(picture, "PNG", compress_level=1), ".png"
    return _saved(picture, "WEBP", quality=85, method=0), ".webp"


def as_jpeg(pixels: Pixels, *, quality: int) -> bytes:
    """A plain JPEG file."""
    return _saved(PIL.Image.fromarray(pixels), "JPEG", quality=quality)


def _saved(picture: PIL.Image.Image, format_: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format_, **options)
    return buffer.getvalue()


@dataclass(frozen=True, slots=True)
class Broken:
    """One way to be broken, and what labelling must say about it."""

    name: str
    suffix: str
    expected_error: str
    make: Callable[[np.random.Generator], bytes | None]  # None: the file is not written at all


def _small(rng: np.random.Generator, format_: str) -> bytes:
    return _saved(PIL.Image.fromarray(draw_shapes(rng, 120, 160).pixels), format_)


def _zip(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("image.jpg", date_time=(2026, 1, 1, 0, 0, 0)), _small(rng, "JPEG"))
    return buffer.getvalue()


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _png(width: int, height: int, compressed: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", compressed) + _chunk(b"IEND", b"")


def _bad_deflate(rng: np.random.Generator) -> bytes:
    """All checksums of the container are right; the compressed stream runs into a block type that does not exist."""
    rows = rng.integers(0, 256, 64 * (1 + 64 * 3), dtype=np.uint8).reshape(64, -1)
    rows[:, 0] = 0
    return _png(64, 64, zlib.compress(rows.tobytes())[:100] + b"\xff" * 400)


BROKEN: Final = (
    Broken("truncated", ".jpg", "corrupt", lambda rng: _small(rng, "JPEG")[:2000]),
    Broken("missing", ".jpg", "not_found", lambda _: None),
    Broken("empty", ".jpg", "empty", lambda _: b""),
    Broken("html", ".jpg", "unknown_format", lambda _: b"<!DOCTYPE html><title>403 Forbidden</title>\n"),
    Broken("bomb", ".png", "too_many_pixels", lambda _: _png(60_000, 60_000, zlib.compress(bytes(1000)))),
    Broken("truncated", ".png", "corrupt", lambda rng: _small(rng, "PNG")[:5000]),
    Broken("text", ".jpg", "unknown_format", lambda _: b"not an image, but a note named like one\n"),
    Broken("zip", ".jpg", "unknown_format", _zip),
    Broken("noise", ".jpg", "corrupt", lambda rng: b"\xff\xd8\xff\xe0\x00\x10JFIF\x00" + rng.bytes(3000)),
    Broken("bad-deflate", ".png", "corrupt", _bad_deflate),
)
