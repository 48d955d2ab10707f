"""sample: the drawn corpus is what it says it is."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fcos_ray.errors import ERROR_CODES, DecodeError, OutputError
from fcos_ray.inputs.decode import decode
from fcos_ray.sample import (
    BROKEN,
    CATEGORIES,
    MIN_OBJECT_SIDE,
    SampleSummary,
    _shape_mask,
    draw_photo,
    draw_shapes,
    encode,
    write_sample,
)

JOB = Path(__file__).parents[1] / "jobs" / "sample.py"
NUM_IMAGES, NUM_BROKEN = 120, 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample") / "corpus"
    write_sample(folder, num_images=NUM_IMAGES, seed=8, num_broken=NUM_BROKEN)
    return folder


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "manifest.parquet").to_pylist()


@pytest.fixture(scope="module")
def coco(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "annotations.json").read_text())


def run_job(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(JOB), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def digest(folder: Path) -> str:
    sums = [
        f"{p.relative_to(folder)} {hashlib.sha256(p.read_bytes()).hexdigest()}"
        for p in folder.rglob("*")
        if p.is_file()
    ]
    return "\n".join(sorted(sums))


def test_the_same_seed_writes_the_same_bytes_in_another_process_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, seed, hash_seed in (("a", "3", "1"), ("b", "3", "2"), ("c", "4", "1")):
        job = run_job(
            "--output",
            str(tmp_path / name),
            "--images",
            "24",
            "--broken",
            "10",
            "--seed",
            seed,
            PYTHONHASHSEED=hash_seed,
        )
        assert job.returncode == 0, job.stderr
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert digest(tmp_path / "a") != digest(tmp_path / "c")


def test_an_image_does_not_depend_on_how_many_are_asked_for(tmp_path: Path) -> None:
    for name, num_images in (("few", 5), ("more", 9)):
        write_sample(tmp_path / name, num_images=num_images, seed=3, num_broken=0)
    few, more = digest(tmp_path / "few" / "images").splitlines(), digest(tmp_path / "more" / "images").splitlines()
    assert few == more[:5]


def test_the_manifest_has_the_promised_columns(folder: Path) -> None:
    table = pq.read_table(folder / "manifest.parquet")
    assert [(field.name, str(field.type)) for field in table.schema] == [
        ("image_id", "string"),
        ("uri", "string"),
        ("width", "int32"),
        ("height", "int32"),
        ("split", "string"),
        ("captured_at", "date32[day]"),
        ("expected_error", "string"),
    ]
    assert table.num_rows == NUM_IMAGES
    assert len(set(table["image_id"].to_pylist())) == NUM_IMAGES
    assert set(table["split"].to_pylist()) == {"train", "val"}
    assert pa.compute.min(table["captured_at"]).as_py() >= date(2026, 1, 1)


def test_every_file_decodes_as_the_manifest_says_or_fails_as_it_says(folder: Path, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        error = None
        try:
            image = decode((folder / row["uri"]).read_bytes())
            assert (image.width, image.height) == (row["width"], row["height"])
        except DecodeError as failure:
            error = failure.code
        except FileNotFoundError:
            error = "not_found"
        assert error == row["expected_error"], row
        assert (row["width"] is None) == (error is not None)


def test_ten_ways_to_be_broken_occur_in_turn(rows: list[dict[str, Any]]) -> None:
    assert len({(way.name, way.suffix) for way in BROKEN}) == 10
    assert {way.expected_error for way in BROKEN} <= set(ERROR_CODES)
    expected = Counter(way.expected_error for way in BROKEN * 2)
    assert Counter(row["expected_error"] for row in rows if row["expected_error"]) == expected


@pytest.mark.parametrize("seed", range(20))
def test_broken_files_are_broken_for_every_seed(seed: int) -> None:
    for way in BROKEN:
        data = way.make(np.random.default_rng(seed))
        if data is None:
            continue
        with pytest.raises(DecodeError) as caught:
            decode(data)
        assert caught.value.code == way.expected_error, way.name


def test_the_corpus_is_as_mixed_as_a_real_one(folder: Path, rows: list[dict[str, Any]]) -> None:
    seen: Counter[str] = Counter()
    for row in rows:
        if row["expected_error"] is None:
            with PIL.Image.open(folder / row["uri"]) as picture:
                orientation = picture.getexif().get(0x0112, 1)
                seen.update([f"{picture.format}", f"mode {picture.mode}", f"orientation {orientation}"])
            ratio = row["width"] / row["height"]
            seen.update(["portrait" if ratio < 1 else "panorama" if ratio > 2.5 else "landscape"])
            seen.update(["tiny"] if max(row["width"], row["height"]) <= 128 else [])
            seen.update(["large"] if max(row["width"], row["height"]) >= 1000 else [])
    wanted = {"JPEG", "PNG", "WEBP", "mode L", "mode RGB", "mode RGBA", "mode P", "mode CMYK", "portrait", "panorama"}
    assert wanted | {"landscape", "tiny", "large"} | {f"orientation {k}" for k in range(1, 9)} <= set(seen), seen


def test_the_ground_truth_is_valid_coco_for_the_good_images(rows: list[dict[str, Any]], coco: dict[str, Any]) -> None:
    assert [category["name"] for category in coco["categories"]] == list(CATEGORIES)
    good = {row["image_id"]: row for row in rows if row["expected_error"] is None}
    assert {str(image["id"]) for image in coco["images"]} == set(good)
    sizes = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
    for image in coco["images"]:
        assert image["file_name"] == good[str(image["id"])]["uri"]
        assert sizes[image["id"]] == (good[str(image["id"])]["width"], good[str(image["id"])]["height"])
    assert [annotation["id"] for annotation in coco["annotations"]] == list(range(1, len(coco["annotations"]) + 1))
    assert {annotation["category_id"] for annotation in coco["annotations"]} == set(range(1, len(CATEGORIES) + 1))
    for annotation in coco["annotations"]:
        x, y, width, height = annotation["bbox"]
        assert 0 <= x <= x + width <= sizes[annotation["image_id"]][0]
        assert 0 <= y <= y + height <= sizes[annotation["image_id"]][1]
        assert min(width, height) >= MIN_OBJECT_SIDE
        assert 0 < annotation["area"] <= width * height
        assert annotation["iscrowd"] == 0
    assert {annotation["image_id"] for annotation in coco["annotations"]} >= set(list(sizes)[:1])


def test_boxes_are_tight_and_no_shape_hides_another() -> None:
    """Drawn once with and once without the last shape, an image differs inside that shape's box only, up to its sides."""
    checked = 0
    for seed in range(30):
        one, two, three = (draw_shapes(_Only(seed, n), 200, 300) for n in (1, 2, 3))
        if len(three.objects) != 3:
            continue
        second, third = ((fewer.pixels != more.pixels).any(axis=2) for fewer, more in ((one, two), (two, three)))
        assert not (second & third).any()
        for changed, drawing in ((second, two), (third, three)):
            x, y, width, height = drawing.objects[-1].box
            inside = changed[y : y + height, x : x + width]
            assert changed.sum() == inside.sum()
            for side in (inside[:2], inside[-2:], inside[:, :2], inside[:, -2:]):
                assert side.any()
            assert inside.sum() >= 0.95 * drawing.objects[-1].area
        checked += 1
    assert checked >= 20


@pytest.mark.parametrize("category", range(len(CATEGORIES)))
def test_every_side_of_a_box_touches_a_pixel_that_is_at_least_half_covered(category: int) -> None:
    for seed in range(20):
        mask = _shape_mask(np.random.default_rng(seed), category, diameter=18 + 5 * seed)
        assert min(side.max() for side in (mask[0], mask[-1], mask[:, 0], mask[:, -1])) > 127


def test_whatever_the_file_format_the_image_is_seen_as_it_was_drawn() -> None:
    drawn = np.zeros((64, 96, 3), np.uint8)
    drawn[:32, :48], drawn[:32, 48:], drawn[32:, :48], drawn[32:, 48:] = 0, 80, 160, 240  # grey: some files are
    orientations = set()
    for seed in range(200):
        image = decode(encode(np.random.default_rng(seed), drawn)[0])
        assert image.pixels.shape == drawn.shape
        assert np.abs(image.pixels.astype(int) - drawn).mean() < 6
        orientations.add(image.orientation)
    assert orientations == set(range(1, 9))


class _Only(np.random.Generator):
    """A generator that wants exactly `number` shapes: the draws before and after are those of the seed."""

    def __new__(cls, seed: int, number: int) -> _Only:  # noqa: ARG004 - Generator takes a bit generator only
        return super().__new__(cls, np.random.PCG64(seed))

    def __init__(self, seed: int, number: int) -> None:
        super().__init__(np.random.PCG64(seed))
        self._number = number

    def integers(self, *args: Any, **kwargs: Any) -> Any:
        drawn = super().integers(*args, **kwargs)
        return self._number if args == (1, 7) else drawn


def test_drawn_photos_have_the_texture_of_photographs() -> None:
    photo = draw_photo(np.random.default_rng(0), 480, 640)
    assert photo.shape == (480, 640, 3)
    assert photo.dtype == np.uint8
    assert 25 < photo.std() < 80
    step = np.abs(np.diff(photo.astype(int), axis=1)).mean()
    assert 2 < step < 15  # neither flat nor white noise (85)


@pytest.mark.parametrize("size", [(1, 1), (5, 900), (48, 64)])
def test_photos_and_shapes_can_be_drawn_at_any_size(size: tuple[int, int]) -> None:
    assert draw_photo(np.random.default_rng(0), *size).shape == (*size, 3)
    assert draw_shapes(np.random.default_rng(0), *size).pixels.shape == (*size, 3)


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(OutputError, match="new or empty"):
        write_sample(tmp_path, num_images=1, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_one_in_twenty_is_broken_by_default_and_none_or_all_can_be(tmp_path: Path) -> None:
    assert write_sample(tmp_path / "a", num_images=20, seed=0).num_broken == 1
    assert write_sample(tmp_path / "b", num_images=3, seed=0, num_broken=0).num_broken == 0
    all_broken = write_sample(tmp_path / "c", num_images=10, seed=0, num_broken=10)
    assert (all_broken.num_broken, all_broken.num_objects) == (10, 0)
    with pytest.raises(OutputError, match="num_broken"):
        write_sample(tmp_path / "d", num_images=3, seed=0, num_broken=4)


def test_the_job_prints_its_summary_and_refuses_a_full_folder(tmp_path: Path) -> None:
    job = run_job("--output", str(tmp_path / "corpus"), "--images", "4", "--seed", "0", "--broken", "1")
    assert job.returncode == 0, job.stderr
    summary = SampleSummary(**json.loads(job.stdout))
    assert (summary.num_images, summary.num_broken) == (4, 1)
    assert Path(summary.manifest).is_file()
    assert summary.image_bytes == sum(p.stat().st_size for p in (tmp_path / "corpus" / "images").iterdir())
    again = run_job("--output", str(tmp_path / "corpus"))
    assert again.returncode == 2
    assert again.stdout == ""
    assert again.stderr.startswith("error: ")
    assert "Traceback" not in again.stderr
