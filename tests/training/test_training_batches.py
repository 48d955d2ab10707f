"""Batches: every image once an epoch, in an order that the seed decides, and the same again after a restart."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from fcos_ray.training.dataset import Batch, Batches
from fcos_ray.training.truth import Example


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    """Ten images of different widths; a white box on black where the truth says."""
    folder = tmp_path_factory.mktemp("images")
    found = []
    for number in range(10):
        width, height = 40 + 8 * number, 40
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[10:30, 5:25] = 255
        PIL.Image.fromarray(pixels).save(folder / f"{number}.png")
        boxes = np.array([[5, 10, 25, 30]], np.float32)
        found.append(Example(str(folder / f"{number}.png"), width, height, boxes, np.array([1 + number])))
    return found


def batches(examples: list[Example], *, flip: float = 0.0, seed: int = 1) -> Batches:
    return Batches(examples, batch_size=3, horizontal_flip=flip, seed=seed)


def labels(batch: Batch) -> list[int]:
    return [int(target["labels"][0]) for target in batch.targets]


def test_an_epoch_holds_every_image_once(examples: list[Example]) -> None:
    data = batches(examples)
    assert data.steps_per_epoch == 4
    for epoch in range(2):
        steps = range(epoch * 4, epoch * 4 + 4)
        assert sorted(label for step in steps for label in labels(data.batch(step))) == list(range(1, 11))


def test_a_batch_is_a_function_of_seed_and_step(examples: list[Example]) -> None:
    data, again, other = batches(examples, flip=0.5), batches(examples, flip=0.5), batches(examples, seed=2)
    for step in (7, 0, 3):
        one, two = data.batch(step), again.batch(step)
        assert labels(one) == labels(two)
        assert all(torch.equal(a, b) for a, b in zip(one.images, two.images, strict=True))
    orders = [[labels(d.batch(step)) for step in range(4)] for d in (data, other)]
    assert orders[0] != orders[1]
    assert orders[0] != [labels(data.batch(step)) for step in range(4, 8)]


def test_images_of_like_shape_come_together(examples: list[Example]) -> None:
    data = batches(examples)
    spread = [max(found) - min(found) for found in (labels(data.batch(step)) for step in range(4))]
    assert max(spread) <= 2


def test_a_mirrored_image_has_its_boxes_mirrored(examples: list[Example]) -> None:
    for batch in (batches(examples, flip=1.0).batch(step) for step in range(4)):
        for image, target in zip(batch.images, batch.targets, strict=True):
            [[x1, y1, x2, y2]] = target["boxes"].int().tolist()
            assert image.dtype == torch.uint8
            assert image[:, y1:y2, x1:x2].min() == 255
            assert image.sum() == 255 * 3 * 20 * 20
            assert x2 == image.shape[2] - 5


def test_about_half_are_mirrored_when_half_are_asked_for(examples: list[Example]) -> None:
    data = batches(examples, flip=0.5)
    left = [target["boxes"][0, 0] == 5 for step in range(40) for target in data.batch(step).targets]
    assert 30 <= sum(map(bool, left)) <= 70


def test_images_that_cannot_be_used_are_left_out_and_named(examples: list[Example], tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(Path(examples[0].uri).read_bytes()[:60])
    first = examples[0]
    bad = [
        Example(str(tmp_path / "broken.png"), 40, 40, first.boxes, first.labels),
        Example(str(tmp_path / "missing.png"), 40, 40, first.boxes, first.labels),
        Example(examples[1].uri, 40, 48, first.boxes, first.labels),  # turned: an orientation that was not applied
    ]
    batch = Batches([*bad, examples[2]], batch_size=4, horizontal_flip=0, seed=0).batch(0)
    assert labels(batch) == [3]
    words = "; ".join(sorted(batch.skipped))
    assert len(batch.skipped) == 3
    assert "broken.png: " in words
    assert "missing.png: " in words
    assert "the truth says 40×48, the image as seen is 48×40" in words


def test_reading_ahead_keeps_the_order_and_stops_when_nobody_listens(examples: list[Example]) -> None:
    data = batches(examples)
    ahead = list(data.ahead(range(2, 9), num_threads=3))
    assert [labels(batch) for batch in ahead] == [labels(data.batch(step)) for step in range(2, 9)]
    before = threading.active_count()
    listening = data.ahead(range(10_000), num_threads=2)
    next(listening)
    listening.close()
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join(timeout=20)
    assert threading.active_count() <= before
