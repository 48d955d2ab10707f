from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from fcos_ray.errors import DetectError
from fcos_ray.model.batches import micro_batches
from fcos_ray.sizes import padded_shape, resized_shape

SIZES = [(800, 1333), (160, 266), (256, 256), (800, 800), (1, 1), (333, 1000)]


def transform(min_size: int, max_size: int) -> GeneralizedRCNNTransform:
    return GeneralizedRCNNTransform(min_size, max_size, [0.0] * 3, [1.0] * 3).eval()


def odd_shapes(count: int) -> list[tuple[int, int]]:
    rng = np.random.default_rng(0)
    spread = np.exp(rng.uniform(0, np.log(20000), (count, 2))).astype(int)
    sides = [1, 2, 3, 31, 32, 33, 159, 160, 161, 266, 267, 427, 640, 799, 800, 801, 1332, 1333, 1334, 4000, 65500]
    return [(h, w) for h in sides for w in sides] + [(int(h), int(w)) for h, w in spread]


@pytest.mark.parametrize(("min_size", "max_size"), SIZES)
def test_sizes_are_those_of_torchvisions_own_transform(
    monkeypatch: pytest.MonkeyPatch, min_size: int, max_size: int
) -> None:
    """torchvision runs as it is, down to the kernel call, which is replaced by one that costs no pixels."""

    def kernel(image: torch.Tensor, size: list[int], *_: object) -> torch.Tensor:
        return image.new_zeros(1, 1, 1, 1).expand(1, 3, *size)

    monkeypatch.setattr(torch._C._nn, "upsample_bilinear2d", kernel)
    torchvisions = transform(min_size, max_size)
    too_thin = 0
    for height, width in odd_shapes(2000):
        wanted = tuple(torchvisions.resize(torch.zeros(()).expand(3, height, width))[0].shape[-2:])
        if 0 in wanted:
            too_thin += 1
            with pytest.raises(DetectError, match="image_too_thin"):
                resized_shape(height, width, min_size=min_size, max_size=max_size)
        else:
            assert resized_shape(height, width, min_size=min_size, max_size=max_size) == wanted, (height, width)
    assert too_thin > 10


def test_torchvision_without_any_replacement_gives_the_same_sizes_and_padding() -> None:
    torchvisions = transform(160, 266)
    for height, width in [(1, 1), (33, 2000), (160, 266), (161, 267), (427, 640), (640, 427), (2, 400), (500, 500)]:
        batch, _ = torchvisions([torch.zeros(3, height, width)])
        assert resized_shape(height, width, min_size=160, max_size=266) == tuple(batch.image_sizes[0])
        assert padded_shape(height, width, min_size=160, max_size=266) == tuple(batch.tensors.shape[-2:])


def test_an_image_torchvision_raises_on_is_too_thin() -> None:
    with pytest.raises(RuntimeError, match="greater than 0"):
        transform(800, 1333)([torch.zeros(3, 1, 1334)])
    with pytest.raises(DetectError) as caught:
        padded_shape(1, 1334, min_size=800, max_size=1333)
    assert str(caught.value) == "image_too_thin: 1×1334 (height × width) would be resized to 0×1333 pixels"


def test_micro_batches_never_mix_shapes_and_hold_every_index_once() -> None:
    rng = np.random.default_rng(0)
    shapes = [(int(h) * 32, int(w) * 32) for h, w in rng.integers(1, 4, (100, 2))]
    plan = micro_batches(shapes, max_images=8)
    assert sorted(i for batch in plan for i in batch) == list(range(100))
    assert all(len({shapes[i] for i in batch}) == 1 and len(batch) <= 8 for batch in plan)
    assert len(plan) == sum(-(-shapes.count(shape) // 8) for shape in set(shapes))
    assert plan == micro_batches(list(shapes), max_images=8)
    assert micro_batches([], max_images=8) == []


def test_a_lowered_limit_holds_for_its_shape_only() -> None:
    shapes = [(32, 32)] * 4 + [(64, 32)] * 4
    assert micro_batches(shapes, max_images=4, lowered={(32, 32): 2}) == [[0, 1], [2, 3], [4, 5, 6, 7]]
