"""`python jobs/evaluate.py` over what a real job wrote: figures, exit codes, and that it stays light."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

import fcos_ray as fr
from fcos_ray.analysis.evaluate import evaluate
from fcos_ray.inputs.decode import decode
from fcos_ray.sample import CATEGORIES, write_sample
from fcos_ray.types import Detections, Image
from jobs import evaluate as job
from tests.corpus import config
from tests.processes import JOBS, call_job, flags, run_job

NUM_IMAGES, NUM_BROKEN = 24, 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_sample(folder, num_images=NUM_IMAGES, seed=5, num_broken=NUM_BROKEN)
    return folder


@pytest.fixture(scope="module")
def truth(corpus: Path) -> dict[str, Any]:
    return json.loads((corpus / "annotations.json").read_text())


@pytest.fixture(scope="module")
def labelled(corpus: Path, truth: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, ray_session: Any) -> Path:
    """The corpus labelled by a detector that knows the truth, except for circles: those it sees shifted by a fifth."""
    output = tmp_path_factory.mktemp("labelled")
    answers = {}
    for image in truth["images"]:
        mine = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
        boxes = np.array([a["bbox"] for a in mine], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = np.array([a["category_id"] for a in mine], np.int64)
        boxes[labels == 1, ::2] += (boxes[labels == 1, 2] - boxes[labels == 1, 0])[:, None] / 5
        pixels = decode((corpus / image["file_name"]).read_bytes()).pixels
        answers[digest(pixels)] = Detections(boxes, labels, np.full(len(mine), 0.9, np.float32))
    settings = config(corpus / "manifest.parquet", output, categories=list(CATEGORIES), exact_resize=True)
    fr.run(settings, make_detector=knowing(answers))
    return output


def digest(pixels: Any) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def knowing(answers: dict[str, Detections]) -> Callable[[], Any]:
    """A detector that knows the images; a local class, so that it travels to Ray's workers by value."""

    class Knows:
        def detect(self, images: Sequence[Image]) -> list[Detections]:
            return [answers[hashlib.sha256(image.pixels.tobytes()).hexdigest()] for image in images]

    return Knows


def test_truth_through_the_whole_job_comes_back_as_truth(labelled: Path, corpus: Path) -> None:
    """Every format, colour mode and EXIF orientation of the corpus: a box in another frame would not fit."""
    found = evaluate(str(labelled), str(corpus / "annotations.json"))
    assert (found.num_images, found.num_rows_without_truth) == (NUM_IMAGES - NUM_BROKEN, NUM_BROKEN)
    assert (found.matched_by, found.num_size_mismatches, found.num_error_rows) == ("image_id", 0, 0)
    figures = {one.name: (one.ap50, one.ap) for one in found.classes}
    assert figures.pop("circle") == pytest.approx((1, 0.4))  # an overlap of 2/3 is right at four of ten IoUs
    assert set(figures.values()) == {(1, 1)}
    by_name = evaluate(str(labelled), str(corpus / "annotations.json"), match="file_name")
    assert by_name.as_dict() == found.as_dict() | {"matched_by": "file_name"}


def test_the_job_prints_a_table_and_the_figures_and_draws_the_curves(
    labelled: Path, corpus: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "curves.png"
    done = run_job(
        "evaluate", *flags(output=labelled, annotations=corpus / "annotations.json", min_map=0.87, curve=picture)
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(
        json.dumps(evaluate(str(labelled), str(corpus / "annotations.json")).as_dict())
    )
    for name in (*CATEGORIES, "mean"):
        assert f" {name} " in done.stderr
    with PIL.Image.open(picture) as opened:
        assert opened.format == "PNG"


def test_a_map_below_the_wanted_ends_with_3_and_says_both(labelled: Path, corpus: Path) -> None:
    arguments = flags(output=labelled, annotations=corpus / "annotations.json", min_map=0.9)
    done = run_job("evaluate", *arguments)
    assert done.returncode == 3
    figures = json.loads(done.stdout)
    assert done.stderr.splitlines()[-1] == f"error: mAP {figures['mean_ap']:.4f} is below --min-map 0.9000"


def test_an_undefined_map_is_below_any(labelled: Path, truth: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text(json.dumps(truth | {"annotations": []}))
    done = call_job(job.main, *flags(output=labelled, annotations=tmp_path / "empty.json", min_map=0))
    assert done.returncode == 3
    assert json.loads(done.stdout)["mean_ap"] is None
    assert "error: mAP – is below --min-map 0.0000" in done.stderr


def test_a_truth_of_other_categories_ends_with_2(labelled: Path, truth: dict[str, Any], tmp_path: Path) -> None:
    other = [category | {"name": category["name"].title()} for category in truth["categories"]]
    (tmp_path / "other.json").write_text(json.dumps(truth | {"categories": other}))
    done = call_job(job.main, *flags(output=labelled, annotations=tmp_path / "other.json"))
    assert done.returncode == 2
    assert "no category name in common: the model says circle, cross" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--min-map", "39.2"], "--min-map is a fraction from 0 to 1, got 39.2: 39.2 is written 0.392"),
        (["--curve", "curves.svg"], "curves are written to a .png file"),
        (["--annotations", "none.json"], "annotations none.json: there is no such file"),
        (["--output", "none"], "none"),
        (["--match", "name"], "invalid choice: 'name'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_ends_with_2(tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "truth.json").write_text(
        json.dumps({"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]})
    )
    done = call_job(job.main, *flags(output=tmp_path, annotations=tmp_path / "truth.json"), *arguments)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr.splitlines()[-1]
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def imported_by(*arguments: str) -> str:
    command = [sys.executable, "-X", "importtime", str(JOBS / "evaluate.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


def test_help_waits_for_nothing_heavy_and_the_work_for_neither_torch_nor_ray(labelled: Path, corpus: Path) -> None:
    for heavy in ("pyarrow", "duckdb", "numpy", "matplotlib"):
        assert f" {heavy}\n" not in imported_by("--help")
    work = imported_by(*flags(output=labelled, annotations=corpus / "annotations.json"))
    assert " faster_coco_eval\n" in work
    for heavy in ("torch", "ray", "matplotlib"):
        assert f" {heavy}\n" not in work
