"""Truth: COCO files become examples; what cannot be learnt from is left out by rule and counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fcos_ray.errors import EvaluationError
from fcos_ray.training.truth import read_truth

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
IMAGES = [
    {"id": 1, "file_name": "a.jpg", "width": 100, "height": 80},
    {"id": 2, "file_name": "b/c.jpg", "width": 60, "height": 60},
]


def thing(image: Any = 1, category: Any = 3, bbox: Any = (10, 20, 30, 40), **more: Any) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": bbox, **more}


@pytest.fixture
def coco(tmp_path: Path) -> Callable[..., str]:
    def write(*things: Any, **replaced: Any) -> str:
        path = tmp_path / "truth.json"
        path.write_text(json.dumps({"images": IMAGES, "annotations": things, "categories": CATEGORIES} | replaced))
        return str(path)

    return write


def test_labels_follow_the_category_ids_and_boxes_are_corners(coco: Callable[..., str], tmp_path: Path) -> None:
    truth = read_truth(coco(thing(), thing(category=7, bbox=[1, 2, 3.5, 4]), thing(image=2)))
    assert truth.categories == ("cat", "dog")
    first, second = truth.examples
    assert (first.uri, first.width, first.height) == (str(tmp_path / "a.jpg"), 100, 80)
    np.testing.assert_array_equal(first.boxes, np.array([[10, 20, 40, 60], [1, 2, 4.5, 6]], np.float32))
    assert first.labels.tolist() == [1, 2]
    assert second.uri == str(tmp_path / "b/c.jpg")
    assert (truth.counts.images, truth.counts.objects, truth.counts.empty_images) == (2, 3, 0)


def test_images_may_lie_elsewhere(coco: Callable[..., str]) -> None:
    assert read_truth(coco(thing()), images="s3://photos/2026").examples[1].uri == "s3://photos/2026/b/c.jpg"


@pytest.mark.parametrize(
    ("left_out", "count"),
    [
        (thing(iscrowd=1), "crowds"),
        (thing(category=99), "unknown_category"),
        (thing(image=99), "unknown_image"),
        (thing(bbox=[10, 10, 0, 5]), "degenerate"),
        (thing(bbox=[10, 10, -4, 5]), "degenerate"),
        (thing(bbox=[99.5, 10, 50, 5]), "degenerate"),  # half a pixel of it lies in the image
        (thing(bbox=[200, 10, 50, 5]), "degenerate"),
        (thing(bbox=[1, 2, 3]), "degenerate"),
        (thing(bbox=None), "degenerate"),
        (thing(bbox=["a", 1, 2, 3]), "degenerate"),
        (thing(bbox=[float("nan"), 1, 2, 3]), "degenerate"),
    ],
)
def test_an_object_that_cannot_be_learnt_from_is_counted(
    coco: Callable[..., str], left_out: dict[str, Any], count: str
) -> None:
    counts = read_truth(coco(thing(), left_out)).counts
    assert counts.objects == 1
    assert getattr(counts, count) == 1
    assert counts.crowds + counts.unknown_category + counts.unknown_image + counts.degenerate == 1


def test_a_box_that_leaves_the_image_is_cut(coco: Callable[..., str]) -> None:
    [example] = read_truth(coco(thing(bbox=[-5, 70, 20, 30])), empty_images="drop").examples
    assert example.boxes.tolist() == [[0, 70, 15, 80]]


def test_a_longer_side_can_be_asked_of_boxes(coco: Callable[..., str]) -> None:
    truth = coco(thing(bbox=[0, 0, 9, 9]), thing())
    assert read_truth(truth, min_box_side=10).counts.degenerate == 1
    assert read_truth(truth, min_box_side=9).counts.degenerate == 0


def test_images_without_objects_are_kept_as_background_or_dropped(coco: Callable[..., str]) -> None:
    kept, dropped = read_truth(coco(thing())), read_truth(coco(thing()), empty_images="drop")
    assert [len(e.labels) for e in kept.examples] == [1, 0]
    assert kept.examples[1].boxes.shape == (0, 4)
    assert len(dropped.examples) == 1
    assert kept.counts.empty_images == dropped.counts.empty_images == 1


def test_labels_can_follow_other_categories_that_know_all(coco: Callable[..., str]) -> None:
    truth = read_truth(coco(thing(), thing(category=7))).relabelled(["dog", "cow", "cat"])
    assert truth.categories == ("dog", "cow", "cat")
    assert truth.examples[0].labels.tolist() == [3, 1]


def test_ids_that_are_quoted_on_one_side_fit(coco: Callable[..., str]) -> None:
    truth = read_truth(coco(thing(image="1", category="7")))
    assert truth.examples[0].labels.tolist() == [2]
    assert truth.counts.objects == 1


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"images": None}, "must be COCO's object with the lists images, annotations, categories"),
        ({"images": [*IMAGES, IMAGES[0]]}, r"images\[2\]: a second image has the id 1"),
        ({"images": [{"id": 1, "width": 100, "height": 80}]}, "image 1: file_name must be a string, got none"),
        (
            {"images": [{"id": 1, "file_name": 12, "width": 100, "height": 80}]},
            r"images\[0\]: file_name must be a string",
        ),
        ({"images": [{"id": 1, "file_name": "a.jpg"}]}, "image 1: width and height must be numbers of pixels from 1"),
        ({"images": [{**IMAGES[0], "height": 0}]}, "image 1: width and height .* from 1, got 100×none"),
        ({"images": [{**IMAGES[0], "height": None}]}, "image 1: width and height .* from 1, got 100×none"),
        ({"images": [{**IMAGES[0], "width": "640"}]}, r"images\[0\]: width must be a number of pixels, got '640'"),
        (
            {"categories": [{"id": 3, "name": "cat"}, {"id": 4, "name": "cat"}]},
            r"categories\[1\]: a second category has the id 4 or the name 'cat'",
        ),
        (
            {"categories": [{"id": 3, "name": "cat"}, {"id": 3, "name": "cow"}]},
            r"categories\[1\]: a second category has the id 3",
        ),
        ({"categories": [{"id": 3}]}, r"categories\[0\]: name must be a string"),
        ({"annotations": [1]}, r"annotations\[0\] must be an object, got 1"),
        ({"annotations": []}, "holds no box to learn from"),
    ],
)
def test_a_wrong_file_says_what_was_wanted(coco: Callable[..., str], replaced: dict[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        read_truth(coco(thing(), **replaced))


def test_files_that_are_no_truth_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "cut.json").write_text('{"images": [')
    files = {
        "list.json": "found a list",
        "cut.json": "this is not JSON",
        "none.json": "there is no such file",
        "list.json/below.json": "below.json: NotADirectoryError",
        "n" * 300: "cannot be read: OSError",
        "a\nb.json": "cannot be read: InvalidUri",
    }
    for name, message in files.items():
        with pytest.raises(EvaluationError, match=message) as error:
            read_truth(str(tmp_path / name))
        assert name in str(error.value)


def test_images_that_resizing_would_make_vanish_are_counted_with_nothing_of_them_learnt(
    coco: Callable[..., str],
) -> None:
    thin = {"id": 3, "file_name": "thin.jpg", "width": 400, "height": 1}
    path = coco(thing(), thing(image=3, bbox=[0, 0, 90, 1]), images=[*IMAGES, thin])
    truth = read_truth(path, smallest_input={"min_size": 64, "max_size": 96})
    assert (truth.counts.too_thin, truth.counts.images, truth.counts.objects) == (1, 2, 1)
    assert not any(example.uri.endswith("thin.jpg") for example in truth.examples)
    wide_enough = read_truth(path, smallest_input={"min_size": 64, "max_size": 400})
    assert (wide_enough.counts.too_thin, wide_enough.counts.images) == (0, 3)
