"""Contact sheet: labelled images with their boxes drawn, and error rows as grey tiles, in one picture to look at.

Knows Pillow and what a job wrote, not the model. Images are read from where their rows say, as seen.
"""

from __future__ import annotations

import colorsys
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import duckdb
import PIL.Image
from PIL import ImageDraw, ImageFont

from fcos_ray import storage
from fcos_ray.analysis.dataset import open_dataset
from fcos_ray.errors import DecodeError, OutputError
from fcos_ray.inputs.decode import decode
from fcos_ray.inputs.scans import store_failure

_COLUMNS: Final = (
    "image_id", "uri", "status", "error_code", "width", "height", "boxes", "labels", "label_names", "scores",
)  # fmt: skip
_TILE: Final = (300, 225)  # width, height, pixels
_GAP: Final = 8
_CAPTION: Final = 20  # pixels below a tile
_PAPER, _INK, _GREY, _RED = (250, 250, 248), (40, 40, 40), (214, 214, 210), (176, 32, 32)
_GOLDEN: Final = 0.618034  # of a turn: hues of neighbouring labels lie far apart
_ERROR_SHARE: Final = 6  # one tile in six at most shows an error


@dataclass(frozen=True, slots=True)
class ContactSheet:
    """What was drawn."""

    picture: str
    images: int
    boxes: int
    errors: int


def draw_contact_sheet(
    output: str, picture: str, *, num_images: int = 24, num_columns: int = 6, min_score: float = 0.0, seed: int = 0
) -> ContactSheet:
    """Draw some of the newest rows of a job's output into a PNG file (path or uri), replacing none that is there.

    Rows are chosen at random by `seed`; at most one tile in six is an error row, unless there are too few others. Raises
    OutputError when the output holds no rows or `picture` exists with other content, StorageError.
    """
    if not picture.endswith(".png"):
        raise OutputError(f"a contact sheet is written to a name that ends in .png, got {picture!r}")
    rows = _choose(output, num_images=num_images, seed=seed)
    tiles = [_tile(row, min_score=min_score) for row in rows]
    num_columns = min(num_columns, len(tiles))
    width, height = _TILE[0] + _GAP, _TILE[1] + _CAPTION + _GAP
    sheet = PIL.Image.new("RGB", (num_columns * width + _GAP, -(-len(tiles) // num_columns) * height + _GAP), _PAPER)
    for place, tile in enumerate(tiles):
        down, right = divmod(place, num_columns)
        sheet.paste(tile, (_GAP + right * width, _GAP + down * height))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    try:
        created = storage.create(picture, buffer.getvalue())
    except (storage.InvalidUri, *storage.STORE_ERRORS) as error:
        raise OutputError(f"{picture} cannot be written: {storage.describe(error)}") from error
    if not created:
        raise OutputError(f"{picture} exists already; wanted the name of a new picture")
    ok = [row for row in rows if row["status"] == "ok"]
    return ContactSheet(
        picture=picture,
        images=len(ok),
        boxes=sum(score >= min_score for row in ok for score in row["scores"]),
        errors=len(rows) - len(ok),
    )


def _choose(output: str, *, num_images: int, seed: int) -> list[dict[str, Any]]:
    """Rows to show, those that are ok first. DuckDB chooses: an output may hold more ids than memory does."""
    newest = open_dataset(output).latest(columns=_COLUMNS).to_duckdb()
    shuffled = newest.order(f"md5(image_id || ' {int(seed)}'), image_id")
    try:
        ok, failed = (
            shuffled.filter(f"status = '{status}'").limit(num_images).to_arrow_table().to_pylist()
            for status in ("ok", "error")
        )
    except duckdb.Error as error:
        raise store_failure(error) or OutputError(f"{output} cannot be read: {error}") from error
    if not ok and not failed:
        raise OutputError(f"{output} holds no rows to draw")
    num_failed = min(len(failed), max(num_images // _ERROR_SHARE, num_images - len(ok)))
    return [*ok[: num_images - num_failed], *failed[:num_failed]]


def _tile(row: Mapping[str, Any], *, min_score: float) -> PIL.Image.Image:
    tile = PIL.Image.new("RGB", (_TILE[0], _TILE[1] + _CAPTION), _PAPER)
    pen = ImageDraw.Draw(tile)
    name = row["uri"].rpartition("/")[2]
    if row["status"] == "ok":
        try:
            image = decode(storage.read_bytes(row["uri"]))
        except (DecodeError, storage.InvalidUri, OSError):
            _blank(pen, "no longer readable")
        else:
            if (image.width, image.height) == (row["width"], row["height"]):
                tile.paste(_with_boxes(PIL.Image.fromarray(image.pixels), row, min_score), (0, 0))
            else:
                _blank(pen, "no longer what was labelled")
    else:
        _blank(pen, row["error_code"])
    pen.text((0, _TILE[1] + 3), _cut(f"{row['image_id']}  {name}", pen, _TILE[0]), _INK, _font(12))
    return tile


def _blank(pen: ImageDraw.ImageDraw, words: str) -> None:
    pen.rectangle((0, 0, _TILE[0] - 1, _TILE[1] - 1), fill=_GREY)
    pen.text((_TILE[0] / 2, _TILE[1] / 2), words, _RED, _font(18), anchor="mm")


def _with_boxes(picture: PIL.Image.Image, row: Mapping[str, Any], min_score: float) -> PIL.Image.Image:
    """The picture fitted into a tile on grey, boxes drawn at the tile's own resolution."""
    scale = min(_TILE[0] / picture.width, _TILE[1] / picture.height)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    left, top = (_TILE[0] - size[0]) // 2, (_TILE[1] - size[1]) // 2
    tile = PIL.Image.new("RGB", _TILE, _GREY)
    tile.paste(
        picture.resize(size, PIL.Image.Resampling.LANCZOS if scale < 1 else PIL.Image.Resampling.BICUBIC), (left, top)
    )
    pen = ImageDraw.Draw(tile)
    found = zip(row["boxes"], row["labels"], row["label_names"], row["scores"], strict=True)
    for box, label, name, score in reversed([found_ for found_ in found if found_[3] >= min_score]):
        colour = _colour(label)
        x1, y1, x2, y2 = (offset + value * scale for value, offset in zip(box, (left, top, left, top), strict=True))
        pen.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=2)
        _tag(pen, (x1, y1), f"{name} {score:.2f}", colour)
    return tile


def _tag(pen: ImageDraw.ImageDraw, corner: tuple[float, float], words: str, colour: tuple[int, int, int]) -> None:
    """A label above its box, moved into the tile where it would leave it."""
    font = _font(11)
    width, height = pen.textlength(words, font) + 5, 14
    x, y = min(max(corner[0], 0), _TILE[0] - width), max(corner[1] - height, 0)
    pen.rectangle((x, y, x + width, y + height), fill=colour)
    pen.text((x + 3, y), words, (255, 255, 255), font)


def _colour(label: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(label * _GOLDEN % 1, 0.85, 0.72)
    return round(red * 255), round(green * 255), round(blue * 255)


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _cut(words: str, pen: ImageDraw.ImageDraw, width: int) -> str:
    while words and pen.textlength(words, _font(12)) > width:
        words = words[:-2].rstrip("…") + "…"
    return words
