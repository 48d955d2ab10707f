"""evaluate: COCO's figures, equal to pycocotools', of rows that are joined with the right images and categories."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fcos_ray.analysis.curves import NUM_NAMED, Curves, check_picture, draw_curves
from fcos_ray.analysis.evaluate import COLUMNS, Evaluation, evaluate
from fcos_ray.errors import EvaluationError
from fcos_ray.outputs.schema import DATA_SCHEMA

FIGURES = (
    "mean_ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar_1", "ar_10", "ar_100", "ar_small", "ar_medium",
    "ar_large",
)  # fmt: skip
SCHEMA = pa.schema([DATA_SCHEMA.field(name) for name in COLUMNS])

Found = tuple[str, float, Sequence[float]]  # name, score, xyxy


def row(image_id: str, *found: Found, uri: str | None = None, size: tuple[int, int] = (640, 480)) -> dict[str, Any]:
    return {
        "image_id": image_id, "uri": uri or f"s3://corpus/{image_id}.jpg", "status": "ok", "width": size[0],
        "height": size[1], "boxes": [list(box) for *_, box in found], "label_names": [name for name, *_ in found],
        "scores": [score for _, score, _ in found],
    }  # fmt: skip


def error_row(image_id: str) -> dict[str, Any]:
    return dict.fromkeys(COLUMNS) | {"image_id": image_id, "uri": f"s3://corpus/{image_id}.jpg", "status": "error"}


def table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=SCHEMA)


def coco(
    images: int | list[dict[str, Any]], *annotations: dict[str, Any], names: Sequence[str] = ("cat", "dog")
) -> Any:
    if isinstance(images, int):
        images = [{"id": k, "file_name": f"{k}.jpg", "width": 640, "height": 480} for k in range(1, images + 1)]
    return {
        "images": images,
        "annotations": [{"id": k, "iscrowd": 0} | one for k, one in enumerate(annotations, 1)],
        "categories": [{"id": k, "name": name} for k, name in enumerate(names, 1)],
    }


def box(image_id: Any, category_id: Any, *bbox: float, **more: Any) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category_id, "bbox": list(bbox), "area": bbox[2] * bbox[3]} | more


def written(folder: Path, content: Any) -> str:
    path = folder / "truth.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


CATS = coco(2, box(1, 1, 10, 10, 100, 100), box(2, 2, 50, 60, 40, 30))
RIGHT = (row("1", ("cat", 0.9, (10, 10, 110, 110))), row("2", ("dog", 0.8, (50, 60, 90, 90))))


def random_case(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Truth and rows with what is awkward: crowds, empty images, ties, odd ids, more detections than are counted."""
    rng = np.random.default_rng(seed)
    category_ids = [90, 3, 17, 44, 1]  # neither sorted nor without gaps; the last occurs in detections only
    image_ids = rng.permutation(np.arange(1, 2000))[:25].tolist()
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "width": 640, "height": 480} for i in image_ids]
    annotations, rows = [], []
    for place, image_id in enumerate(image_ids):
        found: list[Found] = []
        for _ in range(0 if place < 3 else int(rng.integers(1, 12))):
            x, y, w, h = *rng.uniform(0, 400, 2), *np.exp(rng.uniform(np.log(6), np.log(300), 2))
            kind = int(rng.integers(4))
            crowd = int(rng.random() < 0.15)
            area = float(w * h * rng.uniform(0.4, 1))  # of a mask, say
            annotations.append(
                box(image_id, category_ids[kind], x, y, w, h, area=area, iscrowd=crowd, ignore=int(rng.random() < 0.1))
            )
            for _ in range(int(rng.integers(0, 4))):
                left, top, right, bottom = np.array([x, y, x + w, y + h]) + rng.normal(0, 0.08, 4) * [w, h, w, h]
                name = kind if rng.random() < 0.9 else int(rng.integers(5))
                score = round(float(rng.random()), 1)  # eleven values: ties within and across images
                found.append((f"kind {name}", score, (left, top, max(left, right), max(top, bottom))))
        for _ in range(0 if place % 5 else 130):  # more than 100 of one category, some of them hits
            x, y = rng.uniform(0, 500, 2)
            found.append(("kind 0", round(float(rng.random()), 2), (x, y, x + 60, y + 60)))
        found.sort(key=lambda one: -one[1])
        rows.append(error_row(str(image_id)) if place == 7 else row(str(image_id), *found))
    categories = [{"id": i, "name": f"kind {k}"} for k, i in enumerate(category_ids)]
    truth = {"images": images, "categories": categories}
    return truth | {"annotations": [{"id": k} | a for k, a in enumerate(annotations, 1)]}, rows


def reference(truth: dict[str, Any], rows: pa.Table) -> COCOeval:
    """pycocotools, fed the way its users do: a list of results with xywh boxes."""
    ids = {category["name"]: category["id"] for category in truth["categories"]}
    results = [
        {
            "image_id": int(one["image_id"]),
            "category_id": ids[name],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for one in rows.to_pylist()
        if one["status"] == "ok"
        for (x1, y1, x2, y2), name, score in zip(one["boxes"], one["label_names"], one["scores"], strict=True)
    ]
    ground = COCO()
    ground.dataset = copy.deepcopy(truth)
    ground.createIndex()
    evaluator = COCOeval(ground, ground.loadRes(results), "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    return evaluator


@pytest.mark.parametrize("seed", range(6))
def test_all_figures_equal_those_of_pycocotools(tmp_path: Path, seed: int) -> None:
    truth, rows = random_case(seed)
    shuffled = table(*(rows[k] for k in np.random.default_rng(seed).permutation(len(rows))))
    ours, theirs = evaluate(shuffled, written(tmp_path, truth)), reference(truth, shuffled)
    assert [getattr(ours, name) for name in FIGURES] == pytest.approx(theirs.stats.tolist(), abs=1e-6)
    assert 0.1 < theirs.stats[0] < 0.9
    by_id = {category["id"]: category["name"] for category in truth["categories"]}
    for k, category_id in enumerate(theirs.params.catIds):
        [one] = [one for one in ours.classes if one.name == by_id[category_id]]
        precision = theirs.eval["precision"][:, :, k, 0, -1]
        if category_id == 1:
            assert (one.ap, one.ap50, one.num_truth) == (None, None, 0)
            assert (precision == -1).all()
        else:
            assert (one.ap, one.ap50) == pytest.approx((precision.mean(), precision[0].mean()), abs=1e-6)
        counted = [a for a in truth["annotations"] if a["category_id"] == category_id and not a["iscrowd"]]
        assert one.num_truth == len(counted)
        assert one.num_detections == sum((r["label_names"] or []).count(one.name) for r in rows)
    assert ours.curves.precision[0, 1] == pytest.approx(theirs.eval["precision"][0, :, 1, 0, -1], abs=1e-6)
    assert ours.num_error_rows == 1


def test_a_perfect_output_scores_one_and_sizes_without_truth_are_undefined_not_minus_one(tmp_path: Path) -> None:
    found = evaluate(table(*RIGHT), written(tmp_path, CATS))
    assert (found.mean_ap, found.ap50, found.ap75, found.ar_1, found.ar_100) == (1, 1, 1, 1, 1)
    assert (found.ap_medium, found.ap_large, found.ar_medium, found.ar_large) == (1, 1, 1, 1)
    assert (found.ap_small, found.ar_small) == (None, None)
    assert json.loads(json.dumps(found.as_dict()))["ap_small"] is None
    assert found.notes == ()


@pytest.mark.parametrize(
    ("shift", "ap50", "ap75", "mean_ap"),
    [(0, 1, 1, 1), (10, 1, 1, 0.7), (20, 1, 0, 0.4), (34, 0, 0, 0)],
    ids=lambda value: str(value),
)
def test_a_shifted_box_counts_up_to_its_overlap(
    tmp_path: Path, shift: int, ap50: float, ap75: float, mean_ap: float
) -> None:
    """A side of 100 shifted by s overlaps by (100 - s) / (100 + s): 1, .82, .67, .49 of the ten thresholds."""
    truth = written(tmp_path, coco(1, box(1, 1, 10, 10, 100, 100)))
    found = evaluate(table(row("1", ("cat", 0.9, (10 + shift, 10, 110 + shift, 110)))), truth)
    assert (found.ap50, found.ap75, found.mean_ap) == pytest.approx((ap50, ap75, mean_ap))


def test_a_subset_is_evaluated_over_its_own_images_unless_all_are_asked_for(tmp_path: Path) -> None:
    truth = written(tmp_path, coco(4, *(box(k, 1, 10, 10, 100, 100) for k in range(1, 5))))
    rows = table(RIGHT[0], error_row("2"), row("77"))
    found = evaluate(rows, truth)
    assert (found.num_images, found.num_images_without_row, found.num_rows_without_truth) == (2, 2, 1)
    assert (found.classes[0].num_truth, found.num_error_rows) == (2, 1)
    assert found.ar_100 == 0.5  # the error row is an image without detections
    assert found.notes == (
        "evaluated the 2 of 4 images of the truth that have a row",
        "error rows, counting as images without detections: 1",
    )
    whole = evaluate(rows, truth, all_images=True)
    assert (whole.num_images, whole.num_images_without_row, whole.ar_100) == (4, 2, 0.25)
    assert whole.notes[0] == "images of the truth without a row, counting as without detections: 2"


def test_nothing_detected_at_all_scores_zero(tmp_path: Path) -> None:
    found = evaluate(table(row("1"), row("2")), written(tmp_path, CATS))
    assert (found.mean_ap, found.ar_100) == (0, 0)


def test_without_any_truth_box_the_figures_are_undefined(tmp_path: Path) -> None:
    found = evaluate(table(*RIGHT), written(tmp_path, coco(2)))
    assert {getattr(found, name) for name in FIGURES} == {None}


def test_rows_come_as_a_stream_too(tmp_path: Path) -> None:
    truth, rows = random_case(1)
    whole = table(*rows)
    stream = pa.RecordBatchReader.from_batches(SCHEMA, whole.to_batches(max_chunksize=4))
    path = written(tmp_path, truth)
    assert evaluate(stream, path).as_dict() == evaluate(whole, path).as_dict()


def named(*names: str) -> list[dict[str, Any]]:
    return [{"id": k, "file_name": name} for k, name in enumerate(names, 1)]


@pytest.mark.parametrize(
    ("file_names", "uris"),
    [
        (("1.jpg", "2.jpg"), ("s3://corpus/a/1.jpg", "s3://corpus/a/2.jpg")),
        (("a/1.jpg", "b/1.jpg"), ("s3://corpus/a/1.jpg", "s3://corpus/b/1.jpg")),
        (("a\\1.jpg", "./b/1.jpg"), ("/data/a/1.jpg", "/data/b/1.jpg")),
        (("/home/ann/1.jpg", "/home/ann/2.jpg"), ("s3://corpus/1.jpg", "s3://corpus/2.jpg")),
        (("1.jpg", "2.jpg"), ("https://host/1.jpg?key=/x", "https://host/2.jpg#2")),
        (("1?.jpg", "2#.jpg"), ("/data/1?.jpg", "/data/2#.jpg")),
    ],
)
@pytest.mark.parametrize("match", ["auto", "file_name"])
def test_file_names_match_the_end_of_a_uri(
    tmp_path: Path, match: Any, file_names: tuple[str, ...], uris: tuple[str, ...]
) -> None:
    truth = written(tmp_path, coco(named(*file_names), *CATS["annotations"]))
    other = row("other", ("cat", 0.9, (0, 0, 9, 9)), uri="s3://corpus/other/01.jpg")
    rows = [r | {"image_id": f"row {k}", "uri": uri} for k, (r, uri) in enumerate(zip(RIGHT, uris, strict=True))]
    found = evaluate(table(other, *reversed(rows)), truth, match=match)
    assert (found.mean_ap, found.matched_by, found.num_rows_without_truth) == (1, "file_name", 1)


def test_a_file_of_the_same_name_in_another_folder_is_another_image(tmp_path: Path) -> None:
    truth = written(tmp_path, coco(named("val/1.jpg", "val/2.jpg"), *CATS["annotations"]))
    rows = [r | {"image_id": f"x{k}", "uri": f"s3://corpus/val/{k}.jpg"} for k, r in enumerate(RIGHT, 1)]
    other = row("y", ("cat", 0.99, (300, 300, 400, 400)), uri="s3://corpus/train/1.jpg")
    found = evaluate(table(other, *rows), truth)
    assert (found.mean_ap, found.num_images, found.num_rows_without_truth) == (1, 2, 1)


def test_auto_takes_the_ids_where_names_are_ambiguous_and_equal_ids_where_types_differ(tmp_path: Path) -> None:
    images = [{"id": "1", "file_name": "a/x.jpg"}, {"id": "2", "file_name": "b/x.jpg"}]
    truth = written(tmp_path, coco(images, box(1, 1, 10, 10, 100, 100), box("2", "2", 50, 60, 40, 30)))
    rows = [r | {"uri": "s3://corpus/x.jpg"} for r in RIGHT]
    found = evaluate(table(*rows), truth)
    assert (found.mean_ap, found.matched_by) == (1, "image_id")


def test_ids_that_fit_by_chance_are_not_taken_for_the_images(tmp_path: Path) -> None:
    truth = written(tmp_path, coco(named("a.jpg", "b.jpg", "c.jpg"), *CATS["annotations"]))
    counted = [r | {"uri": f"s3://corpus/{name}.jpg"} for r, name in zip(RIGHT, "bc", strict=True)]
    with pytest.raises(EvaluationError, match=r"image 2 \(b.jpg\) of .* is s3://corpus/c.jpg by image_id and "):
        evaluate(table(*counted), truth)
    assert evaluate(table(*counted), truth, match="image_id").mean_ap == 1
    assert evaluate(table(*counted), truth, match="file_name").mean_ap == 0


@pytest.mark.parametrize(
    ("images", "rows", "match", "words"),
    [
        (
            named("a.jpg"), [row("7", uri="s3://corpus/7.jpg")], "auto",
            "no row of the output shows an image of .*The output has image_id '7' at s3://corpus/7.jpg. The annotations have "
            "id 1 at a.jpg",
        ),
        (named("1.jpg"), [row("x1", uri="/1.jpg")], "image_id", "no row of the output"),
        (named("a.jpg"), [row("1", uri="/1.jpg")], "file_name", "no row of the output"),
        ([], [row("1")], "auto", "The annotations have no images"),
        (
            named("a/1.jpg", "b/1.jpg"), [row("x", uri="/c/1.jpg")], "file_name",
            r"matching by file_name, /c/1.jpg could be each of the images 1 \(a/1.jpg\), 2 \(b/1.jpg\)",
        ),
        (
            named("1.jpg"), [row("x", uri="/a/1.jpg"), row("y", uri="/b/1.jpg")], "auto",
            r"image 1 \(1.jpg\) of .* could be each of the rows /a/1.jpg and /b/1.jpg: hand over one row per image",
        ),
        (named("q.jpg"), [row("1"), row("1")], "auto", "matching by image_id, image 1 .* each of the rows 1 and 1"),
        (named("1.jpg"), [], "auto", "the output has no rows"),
    ],
)  # fmt: skip
def test_what_cannot_be_matched_is_an_error_that_shows_both_sides(
    tmp_path: Path, images: list[dict[str, Any]], rows: list[dict[str, Any]], match: Any, words: str
) -> None:
    with pytest.raises(EvaluationError, match=words):
        evaluate(table(*rows), written(tmp_path, coco(images)), match=match)


def test_names_that_are_no_category_are_counted_and_categories_the_model_lacks_are_named(tmp_path: Path) -> None:
    truth = written(tmp_path, CATS | {"categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]})
    rows = table(row("1", ("kite", 0.95, (1, 1, 9, 9)), ("cat", 0.9, (10, 10, 110, 110)), ("kite", 0.5, (1, 1, 9, 9))))
    found = evaluate(rows, truth, model_categories=["__background__", "cat", "kite"], all_images=True)
    assert found.unknown_names == {"kite": 2}
    assert found.unknown_categories == ("dog",)
    assert found.mean_ap == 0.5  # cat 1, dog 0: the mean is over the truth's categories
    assert found.notes[1:] == (
        "detections left out, by names that are no category of the truth: kite (2)",
        "categories of the truth that the model does not have, missed where they occur: dog",
    )


@pytest.mark.parametrize("model_categories", [None, ["__background__", "Cat", "N/A", "Dog"]])
def test_no_name_in_common_is_an_error(tmp_path: Path, model_categories: list[str] | None) -> None:
    rows = table(row("1", ("Cat", 0.9, (10, 10, 110, 110)), ("Dog", 0.9, (10, 10, 110, 110))))
    with pytest.raises(EvaluationError, match="the model says Cat, Dog, the annotations cat, dog"):
        evaluate(rows, written(tmp_path, CATS), model_categories=model_categories)


def test_another_size_in_the_truth_is_noted_with_an_example(tmp_path: Path) -> None:
    turned = row("1", size=(480, 640)), row("2", size=(640, 481))
    found = evaluate(table(*turned), written(tmp_path, CATS))
    assert found.num_size_mismatches == 2
    assert found.notes == (
        "images of another size in the truth: 2; image_id 1 was labelled as 480×640, the truth says 640×480 "
        "(turned: the truth does not follow the EXIF orientation), so boxes do not fit",
    )
    unsized = coco([{"id": 1}, {"id": 2, "width": 0, "height": 0}], *CATS["annotations"])
    assert evaluate(table(*turned), written(tmp_path, unsized)).num_size_mismatches == 0


def test_rows_without_the_columns_or_with_uneven_lists_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"\['scores'\] are missing"):
        evaluate(table(*RIGHT).drop_columns(["scores"]), written(tmp_path, CATS))
    with pytest.raises(EvaluationError, match="must be of equal length"):
        evaluate(table(RIGHT[0] | {"scores": []}), written(tmp_path, CATS))


def with_annotation(**changes: Any) -> dict[str, Any]:
    return coco(2, box(1, 1, 10, 10, 100, 100), box(2, 2, 1, 1, 5, 5) | changes)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "must be COCO JSON, and this is not JSON: Expecting property name"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "must be COCO's object with the lists images, annotations, categories, found a list"),
        ({"images": []}, r"with the lists images, annotations, categories, found \['images'\]"),
        ({"images": {}, "annotations": [], "categories": []}, "with the lists"),
        (coco(2, names=()), "must have categories, the list is empty"),
        (coco(2, names=("cat", "cat")), r"categories\[1\]: a second category has the id 2 or the name 'cat'"),
        (coco([{"id": 1}, {"id": "1"}]), r"images\[1\]: a second image has the id 1"),
        (coco([{"id": 1.5}]), r"images\[0\]: id must be an integer or a string, got 1.5"),
        (coco([{"id": 1, "file_name": 7}]), r"images\[0\]: file_name must be a string, got 7"),
        (coco([{"id": 1, "width": "wide"}]), r"images\[0\]: width must be a number of pixels, got 'wide'"),
        (coco(["1.jpg"]), r"images\[0\] must be an object, got '1.jpg'"),
        (with_annotation(image_id=9), r"annotations\[1\]: image_id 9 is not in images"),
        (with_annotation(image_id=None), r"annotations\[1\]: image_id must be an integer or a string, got None"),
        (with_annotation(category_id=9), r"annotations\[1\]: category_id 9 is not in categories"),
        (with_annotation(bbox=[1, 2, 3]), r"annotations\[1\]: bbox must be four finite numbers .*, got \[1, 2, 3\]"),
        (with_annotation(bbox=[1, 2, 3, "4"]), "bbox must be four finite numbers"),
        (with_annotation(bbox=[1, 2, 3, float("nan")]), "bbox must be four finite numbers"),
        (with_annotation(bbox=[1, 2, -3, 4]), "bbox must be four finite numbers"),
        (with_annotation(bbox=None), "bbox must be four finite numbers"),
        (with_annotation(bbox=[1, 2, 3, 10**400]), "bbox must be four finite numbers"),
        (with_annotation(area="big"), r"annotations\[1\]: area must be a finite number, got 'big'"),
        (with_annotation(iscrowd="no"), r"annotations\[1\]: iscrowd must be 0 or 1, got 'no'"),
    ],
)
def test_bad_annotations_are_refused_by_name_and_place(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(EvaluationError, match=words) as caught:
        evaluate(table(*RIGHT), written(tmp_path, content))
    assert str(tmp_path / "truth.json") in str(caught.value)


def test_annotations_that_are_not_there_are_refused(tmp_path: Path) -> None:
    for uri, words in (
        (f"{tmp_path}/none.json", f"annotations {tmp_path}/none.json: there is no such file"),
        (str(tmp_path), f"annotations {tmp_path} cannot be read: reading {tmp_path}: IsADirectoryError"),
        ("s3://me:secret@host", "annotations s3://host cannot be read"),
    ):
        with pytest.raises(EvaluationError, match=re.escape(words)):
            evaluate(table(*RIGHT), uri)


def test_a_missing_evaluator_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(EvaluationError, match=r"pip install 'faster-coco-eval>=1.8,<2'"):
        evaluate(table(*RIGHT), written(tmp_path, CATS))


def test_annotations_without_area_take_the_boxs_own(tmp_path: Path) -> None:
    bare = copy.deepcopy(CATS)
    for annotation in bare["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    assert evaluate(table(*RIGHT), written(tmp_path, bare)).as_dict() == _with_path(tmp_path, CATS).as_dict()


def _with_path(folder: Path, truth: Any) -> Evaluation:
    return evaluate(table(*RIGHT), written(folder, truth))


@pytest.mark.parametrize("num_categories", [1, 4, NUM_NAMED + 15])
def test_curves_are_drawn_with_the_mean_in_black(tmp_path: Path, num_categories: int) -> None:
    precision = np.linspace(1, 0.2, 101) * np.linspace(0.3, 1, num_categories)[:, None]
    precision = np.stack([precision, precision / 2])
    if num_categories > 1:
        precision[:, 0] = np.nan  # without truth
    names = tuple(f"_kind $ {k} $\\x" for k in range(num_categories))  # neither formulas nor hidden labels
    draw_curves(Curves(names, precision), tmp_path / "curves.png")
    with PIL.Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert min(pixels.shape[:2]) > 500
    black = (pixels.max(axis=2) < 40).sum(axis=0)
    assert (black >= 3).mean() > 0.5  # the mean crosses both panels
    coloured = {tuple(colour) for colour in pixels.reshape(-1, 3) if np.ptp(colour) > 100}
    grey = (pixels == 0xD9).all(axis=2).sum()
    assert len(coloured) > 0
    assert (grey > 1000) == (num_categories > NUM_NAMED)


def test_curves_without_any_truth_are_empty_panels(tmp_path: Path) -> None:
    draw_curves(Curves(("cat",), np.full((2, 1, 101), np.nan)), tmp_path / "curves.png")
    with PIL.Image.open(tmp_path / "curves.png") as picture:
        assert np.ptp(np.asarray(picture.convert("RGB")).astype(int), axis=2).max() == 0


@pytest.mark.parametrize("name", ["curves.jpg", "curves", "none/curves.png", "folder.png"])
def test_a_picture_that_could_not_be_written_is_refused_before_the_work(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(EvaluationError, match=r"written to a \.png file in a folder that is there"):
        check_picture(tmp_path / name)
    check_picture(tmp_path / "curves.png")


def test_missing_matplotlib_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(EvaluationError, match="pip install matplotlib"):
        check_picture(tmp_path / "curves.png")
