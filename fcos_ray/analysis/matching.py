"""Matching: which row of an output shows which image of the truth. Knows ids and file names, not boxes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import pyarrow as pa
import pyarrow.compute as pc

from fcos_ray.analysis.truth import Truth
from fcos_ray.errors import EvaluationError

Key = Literal["image_id", "file_name"]
Match = Literal["auto", "image_id", "file_name"]

NUM_EXAMPLES: Final = 3


@dataclass(frozen=True, slots=True)
class Candidates:
    """Rows that may show an image of the truth, and what is known of the others."""

    table: pa.Table
    num_rows: int  # all that were seen
    examples: tuple[str, ...]  # of their ids and uris, for messages


@dataclass(frozen=True, slots=True)
class Pairs:
    """Which row shows which image; a row and an image stand in one pair at most."""

    key: Key
    row_of_image: dict[int, int]  # index into Truth.images -> row of the candidates
    trouble: str | None  # what could not be told apart by this key


def find_candidates(batches: Iterable[pa.RecordBatch], truth: Truth, *, columns: Sequence[str]) -> Candidates:
    """Keep the rows whose image_id or file name the truth knows: an output may be far larger than its truth.

    Memory holds the candidates only. Raises EvaluationError when a column is missing.
    """
    ids = pa.array([image.id for image in truth.images], pa.string())
    names = pa.array(sorted({_last(i.file_name) for i in truth.images if i.file_name}), pa.string())
    kept: list[pa.RecordBatch] = []
    num_rows, examples = 0, list[str]()
    for batch in batches:
        if missing := [name for name in columns if name not in batch.schema.names]:
            raise EvaluationError(f"rows of an output have the columns {', '.join(columns)}; {missing} are missing")
        batch = batch.select(list(columns))
        for name in ("image_id", "uri"):
            batch = batch.set_column(columns.index(name), name, batch.column(name).cast(pa.string()))
        image_id, uri = batch.column("image_id"), batch.column("uri")
        last = pc.replace_substring_regex(_without_query(uri), r"(?s)^.*/", "")
        wanted = pc.or_(pc.is_in(image_id, ids), pc.is_in(last, names))  # a null is in no set
        kept.append(batch.filter(wanted))
        num_rows += batch.num_rows
        for k in range(min(batch.num_rows, NUM_EXAMPLES - len(examples))):
            examples.append(f"image_id {image_id[k].as_py()!r} at {uri[k].as_py()}")
    if not kept:
        raise EvaluationError("the output has no rows: nothing to evaluate")
    return Candidates(pa.Table.from_batches(kept), num_rows, tuple(examples))


def match_rows(candidates: Candidates, truth: Truth, *, match: Match) -> Pairs:
    """Pair rows with images, by `match` or, on auto, by the key that pairs more of them (image_id when they tie).

    A file name fits a uri that ends with it, folders included; when none does, its last part alone.
    Raises EvaluationError when nothing fits, when what fits is ambiguous, or when on auto the two keys pair an image
    with different rows: one of them fits by chance, and figures would be wrong without looking wrong.
    """
    by_id = _by_image_id(candidates.table["image_id"].to_pylist(), truth)
    if match == "image_id" or by_id.trouble:  # one row per image_id is promised whatever the key
        return _usable(by_id, candidates, truth)
    by_name = _by_file_name(_without_query(candidates.table["uri"]).to_pylist(), truth)
    if match == "file_name":
        return _usable(by_name, candidates, truth)
    for k in by_id.row_of_image.keys() & by_name.row_of_image.keys():
        rows = [pairs.row_of_image[k] for pairs in (by_id, by_name)]
        if rows[0] != rows[1]:
            one, other = (candidates.table["uri"][row].as_py() for row in rows)
            raise EvaluationError(
                f"image {truth.images[k].id} ({truth.images[k].file_name}) of {truth.name} is {one} by image_id and "
                f"{other} by file name: choose with --match image_id or --match file_name"
            )
    ids_win = by_id.row_of_image and len(by_id.row_of_image) >= len(by_name.row_of_image)
    return _usable(by_id if ids_win else by_name, candidates, truth)


def _usable(pairs: Pairs, candidates: Candidates, truth: Truth) -> Pairs:
    if pairs.trouble:
        raise EvaluationError(pairs.trouble)
    if not pairs.row_of_image:
        images = [f"id {image.id} at {image.file_name}" for image in truth.images[:NUM_EXAMPLES]]
        raise EvaluationError(
            f"no row of the output shows an image of {truth.name}. The output has {'; '.join(candidates.examples)}. The "
            f"annotations have {'; '.join(images) or 'no images'}. An image_id must equal an id, or a uri end with a "
            "file_name"
        )
    return pairs


def _by_image_id(image_ids: list[str], truth: Truth) -> Pairs:
    number = {image.id: k for k, image in enumerate(truth.images)}
    return _pairs("image_id", [[number[i]] if i in number else [] for i in image_ids], image_ids, truth)


def _by_file_name(uris: list[str], truth: Truth) -> Pairs:
    same_last: dict[str, list[int]] = {}
    for k, image in enumerate(truth.images):
        if image.file_name:
            same_last.setdefault(_last(image.file_name), []).append(k)
    loose = [same_last.get(_last(uri), []) for uri in uris]
    strict = [
        [k for k in images if f"/{uri}".endswith(f"/{truth.images[k].file_name}")]
        for uri, images in zip(uris, loose, strict=True)
    ]
    return _pairs("file_name", strict if any(strict) else loose, uris, truth)


def _pairs(key: Key, images_of_row: list[list[int]], names: list[str], truth: Truth) -> Pairs:
    """Keep what is paired one to one; say what is not."""
    row_of_image: dict[int, int] = {}
    doubled: set[int] = set()
    trouble: str | None = None
    for row, images in enumerate(images_of_row):
        if len(images) > 1:
            several = ", ".join(f"{truth.images[k].id} ({truth.images[k].file_name})" for k in images[:NUM_EXAMPLES])
            trouble = (
                trouble or f"matching by {key}, {names[row]} could be each of the images {several} of {truth.name}"
            )
            doubled.update(images)
        for k in images:
            if k in row_of_image:
                trouble = trouble or (
                    f"matching by {key}, image {truth.images[k].id} ({truth.images[k].file_name}) of {truth.name} could be "
                    f"each of the rows {names[row_of_image[k]]} and {names[row]}: hand over one row per image"
                )
                doubled.add(k)
            row_of_image[k] = row
    return Pairs(key, {k: row for k, row in row_of_image.items() if k not in doubled}, trouble)


def _without_query(uris: pa.StringArray | pa.ChunkedArray) -> pa.StringArray | pa.ChunkedArray:
    """An http uri's query is no part of the file's name; elsewhere ? and # are letters."""
    return pc.replace_substring_regex(uris, r"^(https?:[^?#]*)[?#].*", r"\1")


def _last(file_name: str) -> str:
    return file_name.rpartition("/")[2]
