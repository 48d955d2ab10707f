"""The load stage without Ray: rows in, tables of pixels out, and no copy more than it says."""

from __future__ import annotations

import dataclasses
import itertools
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcos_ray import load
from fcos_ray.inputs.decode import decode
from fcos_ray.inputs.fetch import FetchPolicy
from fcos_ray.inputs.shrink import shrink
from fcos_ray.load import LoadSettings, _Loaded, load_tables
from fcos_ray.outputs.schema import LOADED_SCHEMA
from fcos_ray.pipeline import _image


def load_settings(folder: Path, **changed: Any) -> LoadSettings:
    return LoadSettings(
        **{
            "fetch": FetchPolicy(allow_roots=(str(folder),), concurrency=1),
            "max_pixels": 10**8, "decode_deadline_seconds": 60, "decode_memory_bytes": 2**31,
            "min_size": 96, "max_size": 160, "exact_resize": False,
        }
        | changed
    )  # fmt: skip


def rows_of(*uris: Path | str | None, deleted: bool = False) -> pa.Table:
    """As read gives them; None is a uri that was refused."""
    num = len(uris)
    return pa.table(
        {
            "shard": pa.repeat(pa.scalar(3, pa.int32()), num),
            "row": pa.array(range(num), pa.int32()),
            "uri": [str(uri) for uri in uris],
            "refused": pa.array(["no" if uri is None else None for uri in uris], pa.string()),
            "deleted": pa.repeat(deleted, num),
        }
    )


def draw(path: Path, height: int, width: int) -> Path:
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(path)
    return path


def test_each_row_comes_out_with_its_pixels_or_its_error(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    good, large = draw(tmp_path / "good.png", 40, 60), draw(tmp_path / "large.png", 300, 200)
    rows = rows_of(good, tmp_path / "broken.jpg", None, large, good, tmp_path / "missing.jpg")
    [table] = load_tables(rows, load_settings(tmp_path))
    assert table.schema == LOADED_SCHEMA
    table = table.sort_by("row")
    codes = table["error_code"].to_pylist()
    assert codes == [None, codes[1], "uri_refused", None, None, "not_found"]
    assert table["pixels"].is_valid().to_pylist() == [code is None for code in codes]
    assert (_image(table, 0).pixels == decode(good.read_bytes()).pixels).all()
    assert (_image(table, 3).pixels == shrink(decode(large.read_bytes()).pixels, min_size=96, max_size=160)).all()
    assert (table["height"][3].as_py(), table["width"][3].as_py()) == (300, 200)


@given(st.lists(st.one_of(st.none(), st.integers(1, 30)), max_size=20))
@settings(deadline=None)
def test_tables_are_cut_by_bytes_and_lose_nothing(sizes: list[int | None]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "_LOADED_BYTES", 60)
        loaded, tables = _Loaded(), []
        for row, size in enumerate(sizes):
            shape = {}
            if size is not None:
                loaded.hold((1, size))[:] = row
                shape = {"pixel_height": 1, "pixel_width": size}
            loaded.add({"shard": 0, "row": row, **shape})
            tables += loaded.full()
        tables += loaded.rest()
    for table in tables:
        table.validate(full=True)
        held = [len(pixels) for pixels in table["pixels"].to_pylist() if pixels is not None]
        assert sum(held) <= 60 or len(held) == 1, "one image may be larger than a table"
    rows = [row for table in tables for row in table.to_pylist()]
    assert [row["row"] for row in rows] == list(range(len(sizes)))
    assert [row["pixels"] for row in rows] == [
        None if size is None else bytes([row]) * size * 3 for row, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("exact_resize", [True, False])
def test_pixels_are_copied_once_on_their_way_into_a_table(tmp_path: Path, exact_resize: bool) -> None:
    """What Python, numpy and Arrow allocate while images pass is the table's buffer, and little else."""
    image = tmp_path / "image.png"
    PIL.Image.new("RGB", (1500, 2000)).save(image)  # 9 MB of pixels each, in a file of a few kB
    options = load_settings(tmp_path, exact_resize=exact_resize, min_size=1000, max_size=2000)
    list(load_tables(rows_of(image), options))  # the child is there now
    arrow = pa.default_memory_pool()
    arrow_before = arrow.max_memory()
    tracemalloc.start()
    try:
        [table] = load_tables(rows_of(image, image, image), options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    pixels = table["pixels"].nbytes
    assert pixels >= 3 * (9_000_000 if exact_resize else 3_000_000)
    assert peak < load._LOADED_BYTES + 2_000_000
    assert arrow.max_memory() - arrow_before < 1_000_000


def test_fast_decoding_hands_on_the_models_size_and_remembers_the_whole_images(tmp_path: Path) -> None:
    soft = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    PIL.Image.fromarray(soft).resize((1003, 641), PIL.Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", quality=95)
    PIL.Image.new("RGB", (2000, 3)).save(tmp_path / "thin.jpg")
    rows = rows_of(tmp_path / "a.jpg", tmp_path / "thin.jpg")
    [exact], [fast] = (
        list(load_tables(rows, load_settings(tmp_path, fast_decode=fast_decode))) for fast_decode in (False, True)
    )
    assert fast.drop_columns(["pixels", "decode_seconds", "fetch_seconds"]) == exact.drop_columns(
        ["pixels", "decode_seconds", "fetch_seconds"]
    )
    assert fast["error_code"].to_pylist() == [None, "image_too_thin"]
    ours, wanted = (_image(table, 0).pixels.astype(int) for table in (fast, exact))
    assert 0 < np.abs(ours - wanted).mean() < 2.0, "near, and not by decoding whole all the same"


def test_images_of_one_padded_shape_come_together_where_the_detector_takes_several(tmp_path: Path) -> None:
    shapes = [(90, 120), (120, 90), (60, 60)] * 5
    images = [draw(tmp_path / f"{k}.png", *shape) for k, shape in enumerate(shapes)]
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    rows = rows_of(*images[:7], tmp_path / "broken.jpg", None, *images[7:])
    options = load_settings(tmp_path, fetch=FetchPolicy(allow_roots=(str(tmp_path),)))
    [table] = load_tables(rows, dataclasses.replace(options, micro_batch=4))
    assert sorted(table["row"].to_pylist()) == list(range(17))
    padded = [(row["height"], row["width"]) for row in table.to_pylist() if row["pixels"] is not None]
    assert [shape for shape, _ in itertools.groupby(padded)] == [(60, 60), (90, 120), (120, 90)]


def test_files_that_wait_for_their_order_are_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [draw(tmp_path / f"{k}.png", 40 + 40 * (k % 2), 60) for k in range(6)]
    monkeypatch.setattr(load, "_WAITING_BYTES", sum(image.stat().st_size for image in images[:4]) - 1)
    [table] = load_tables(rows_of(*images), load_settings(tmp_path, micro_batch=4))
    assert table["row"].to_pylist() == [0, 2, 1, 3, 4, 5], "four in order, then the rest"


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_a_task_hands_on_what_it_has_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch: int
) -> None:
    images = [draw(tmp_path / f"{k}.png", 40 + 40 * (k % 2), 60) for k in range(6)]
    rows = rows_of(*images[:3], tmp_path / "missing.png", *images[3:])
    in_turn = FetchPolicy(allow_roots=(str(tmp_path),), concurrency=1)
    settings = dataclasses.replace(load_settings(tmp_path, fetch=in_turn), micro_batch=micro_batch)
    [whole] = load_tables(rows, settings)
    monkeypatch.setattr(load, "_HAND_ON_SECONDS", 0.0)
    tables = list(load_tables(rows, settings))
    assert [table.num_rows for table in tables] == [1] * 7
    assert [table["row"][0].as_py() for table in tables] == list(range(7)), "none waits for its order"
    changing = ["decode_seconds", "fetch_seconds"]
    together = pa.concat_tables(tables).sort_by("row").drop_columns(changing)
    assert together == whole.sort_by("row").drop_columns(changing)


def test_no_micro_batch_is_torn_by_a_tables_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for ten images: two micro-batches of four, and two more only of another shape."""
    monkeypatch.setattr(load, "_LOADED_BYTES", 30)
    loaded, tables = _Loaded(micro_batch=4), []
    for row in range(14):
        loaded.hold((1, 1), (32, 32) if row < 12 else (32, 64))
        loaded.add({"shard": 0, "row": row})
        tables += loaded.full()
    tables += loaded.rest()
    assert [table.num_rows for table in tables] == [8, 6]
