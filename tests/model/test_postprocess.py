"""The same head outputs through torchvision's post-processing and ours."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import batched_nms, box_iou
from torchvision.ops.boxes import _batched_nms_coordinate_trick

from fcos_ray.model.nms import SHIFTED, first_of_nms
from fcos_ray.model.postprocess import Found, HeadOutputs, _above, _best_of_all, logit_below, postprocess

GRIDS = [(20, 26), (10, 13), (5, 7), (3, 4), (2, 2)]
SHAPES = [(160, 208), (150, 201), (133, 180)]
CLASSES = 11
LIMITS: dict[str, Any] = {"score_threshold": 0.2, "nms_threshold": 0.6, "max_detections": 100, "topk_candidates": 1000}


def head_outputs(seed: int, *, bias: float = -1.0, spread: float = 2.0, steps: float | None = None) -> HeadOutputs:
    """Random outputs; `steps` rounds the logits, so that many scores are equal."""
    g = torch.Generator().manual_seed(seed)
    counts = [h * w for h, w in GRIDS]
    logits = bias + spread * torch.randn(len(SHAPES), sum(counts), CLASSES, generator=g)
    ctrness = torch.randn(len(SHAPES), sum(counts), 1, generator=g)
    if steps is not None:
        logits, ctrness = (logits / steps).round() * steps, torch.zeros_like(ctrness)
    generator = AnchorGenerator(((8,), (16,), (32,), (64,), (128,)), ((1.0,),) * 5)
    levels = [torch.zeros(1, 1, h, w) for h, w in GRIDS]
    return HeadOutputs(
        cls_logits=logits,
        bbox_regression=4 * torch.rand(len(SHAPES), sum(counts), 4, generator=g),
        bbox_ctrness=ctrness,
        anchors=generator(ImageList(torch.zeros(1, 3, 160, 208), [(160, 208)]), levels)[0],
        num_anchors_per_level=counts,
    )


def torchvisions(outputs: HeadOutputs, **limits: Any) -> list[dict[str, torch.Tensor]]:
    class Settings:
        box_coder = FCOS.__annotations__["box_coder"](normalize_by_size=True)
        score_thresh, nms_thresh = limits["score_threshold"], limits["nms_threshold"]
        detections_per_img, topk_candidates = limits["max_detections"], limits["topk_candidates"]

    counts = list(outputs.num_anchors_per_level)
    heads = {
        name: list(getattr(outputs, name).split(counts, dim=1))
        for name in ("cls_logits", "bbox_regression", "bbox_ctrness")
    }
    anchors = [list(outputs.anchors.split(counts)) for _ in SHAPES]
    result: list[dict[str, torch.Tensor]] = FCOS.postprocess_detections(Settings(), heads, anchors, SHAPES)
    return result


def both(outputs: HeadOutputs, **changed: Any) -> tuple[list[Found], list[dict[str, torch.Tensor]]]:
    limits = LIMITS | changed
    return postprocess(outputs, SHAPES, **limits), torchvisions(outputs, **limits)


def assert_equal(found: list[Found], wanted: list[dict[str, torch.Tensor]]) -> int:
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(ours.labels, theirs["labels"].numpy(), strict=True)
        np.testing.assert_allclose(ours.scores, theirs["scores"].numpy(), rtol=0, atol=1e-6, strict=True)
        np.testing.assert_array_equal(ours.boxes, theirs["boxes"].numpy(), strict=True)
    return sum(len(ours.scores) for ours in found)


@pytest.mark.parametrize("score_threshold", [0.0, 0.05, 0.2, 0.9])
@pytest.mark.parametrize("topk_candidates", [10, 1000])
@pytest.mark.parametrize("max_detections", [1, 100, 10**6])
def test_random_head_outputs_give_torchvisions_detections(
    score_threshold: float, topk_candidates: int, max_detections: int
) -> None:
    for seed, bias in enumerate([-5.0, -1.0, 2.0]):
        numbers = {"score_threshold": score_threshold, "topk_candidates": topk_candidates}
        found = assert_equal(*both(head_outputs(seed, bias=bias), max_detections=max_detections, **numbers))
        assert found > 0 or (score_threshold == 0.9 and bias == -5.0)


@pytest.mark.parametrize("nms_threshold", [0.0, 0.3, 1.0])
def test_every_nms_threshold_gives_torchvisions_detections(nms_threshold: float) -> None:
    assert assert_equal(*both(head_outputs(3), nms_threshold=nms_threshold, max_detections=10**6)) > 100


@pytest.mark.parametrize("topk_candidates", [7, 100, 1000])
def test_equal_scores_are_cut_and_suppressed_as_torchvision_does(topk_candidates: int) -> None:
    outputs = head_outputs(4, steps=0.5)
    assert assert_equal(*both(outputs, topk_candidates=topk_candidates, max_detections=10**6)) > 10


def test_nothing_scores_above_one_and_nothing_passes_when_all_logits_are_low() -> None:
    assert assert_equal(*both(head_outputs(5, bias=40.0), score_threshold=1.0)) == 0
    assert assert_equal(*both(head_outputs(5, bias=-60.0))) == 0


@pytest.mark.parametrize("anchor", [0, 22, 23, 350, 697, 698, 700])  # 30 groups of 256 numbers, and 31 numbers more
@pytest.mark.parametrize("image", range(len(SHAPES)))
@pytest.mark.parametrize(("logit", "ctrness"), [(5.0, 3.0), (-3.0, 12.0)])  # clear, and near the threshold
def test_a_lone_candidate_is_found_wherever_it_stands(image: int, anchor: int, logit: float, ctrness: float) -> None:
    outputs = head_outputs(7, bias=-30.0)
    outputs.cls_logits[image, anchor, 4], outputs.bbox_ctrness[image, anchor] = logit, ctrness
    assert assert_equal(*both(outputs)) == 1


@pytest.mark.parametrize("threshold", [0.05, 0.2])
def test_outputs_of_a_model_in_bf16_give_torchvisions_detections(threshold: float) -> None:
    for seed in range(5):
        outputs = head_outputs(seed, bias=-3.0)
        for values in (outputs.cls_logits, outputs.bbox_regression, outputs.bbox_ctrness):
            values.copy_(values.bfloat16())
        assert assert_equal(*both(outputs, score_threshold=threshold)) > 100


def test_what_is_not_a_number_takes_nothing_from_its_neighbours() -> None:
    lone = head_outputs(9, bias=-30.0)
    lone.cls_logits[1, 0, 4], lone.bbox_ctrness[1, 0] = 5.0, 3.0
    for where in ((0,), (0, 700), (0, 700, 7), (1, 0, 7), (1, 1)):
        outputs = replace(lone, cls_logits=lone.cls_logits.clone())
        outputs.cls_logits[where] = math.nan
        assert assert_equal(*both(outputs)) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38, -3e38])
@pytest.mark.parametrize("part", ["cls_logits", "bbox_ctrness", "bbox_regression"])
@pytest.mark.parametrize("bias", [-30.0, -7.0, 0.0])
def test_nan_infinities_and_what_becomes_infinite_do_what_they_do_in_torchvision(
    bias: float, part: str, value: float
) -> None:
    outputs = head_outputs(10, bias=bias)
    outputs.cls_logits[:, 300:320] = head_outputs(11).cls_logits[:, 300:320]
    values = getattr(outputs, part)[:, 300:320]
    values[torch.rand(values.shape, generator=torch.Generator().manual_seed(12)) < 0.1] = value
    assert assert_equal(*both(outputs)) > 10


@pytest.mark.parametrize("threshold", [2e-15, 0.05, 0.2])
@pytest.mark.parametrize("num_classes", [1, 3])
@pytest.mark.parametrize("topk_candidates", [4, 1000])
def test_fewer_numbers_than_a_group_and_levels_without_anchors(
    num_classes: int, threshold: float, topk_candidates: int
) -> None:
    for seed in range(5):
        whole = head_outputs(seed)
        part = slice(620, 620 + 80)  # of 520, 130, 35, 12 and 4 anchors
        outputs = HeadOutputs(
            whole.cls_logits[:, part, :num_classes],
            whole.bbox_regression[:, part],
            whole.bbox_ctrness[:, part],
            whole.anchors[part],
            [0, 30, 35, 0, 15],
        )
        assert assert_equal(*both(outputs, score_threshold=threshold, topk_candidates=topk_candidates)) > 10


def test_equal_outputs_give_equal_scores_wherever_they_stand() -> None:
    """torch's sigmoid gives what is beyond a multiple of 32 numbers by another loop, one of 25 off by a bit."""
    places = torch.arange(64)  # so that torchvision's are multiples
    corner = 16.0 * torch.stack([places % 11, places // 11], 1)
    anchors = torch.cat([corner, corner + 16], 1)
    anchors[32] = anchors[0] + 1  # of these two one stays
    for value in torch.linspace(-1.0, 1.0, 300).view(-1, len(SHAPES), 1):
        outputs = HeadOutputs(
            cls_logits=torch.full((len(SHAPES), 64, CLASSES), -30.0),
            bbox_regression=torch.full((len(SHAPES), 64, 4), 0.5),
            bbox_ctrness=torch.full((len(SHAPES), 64, 1), 20.0),
            anchors=anchors,
            num_anchors_per_level=[64],
        )
        outputs.cls_logits[:, :33, 4] = -torch.arange(33) / 40  # the 33rd of 33, and of as many centre-nesses
        outputs.cls_logits[:, [0, 32], 4], outputs.bbox_ctrness[:, [0, 32], 0] = value, value
        assert assert_equal(*both(outputs)) == 32 * len(SHAPES)


def test_where_all_are_scored_scores_are_torchvisions_to_the_bit() -> None:
    """Level by level, for that other loop is at the end of each."""
    found, wanted = both(head_outputs(14), topk_candidates=10**6, nms_threshold=1.0, max_detections=10**6)
    assert assert_equal(found, wanted) > 10_000
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(ours.scores, theirs["scores"].numpy(), strict=True)


def test_a_threshold_of_numpys_float_counts_in_float32_as_torchs() -> None:
    outputs = head_outputs(13, bias=5.0)
    outputs.cls_logits[:], outputs.bbox_ctrness[:] = 5.0, 20.0
    score = float(torch.sigmoid(torch.tensor(5.0)).sqrt())
    assert assert_equal(*both(outputs, score_threshold=np.float64(score - 1e-9))) == 0


class Elsewhere(torch.Tensor):
    """A tensor that says it is on no CPU, so that what is done for other devices is done to it."""

    is_cpu = property(lambda _: False)


@pytest.mark.parametrize("kind", [torch.Tensor, Elsewhere])
@pytest.mark.parametrize("steps", [None, 0.5, 0.01])
@pytest.mark.parametrize(("bias", "ways"), [(-30.0, "groups"), (-7.0, "numbers"), (0.0, "scores")])
def test_few_many_and_most_that_can_pass_give_torchvisions_detections(
    bias: float, ways: str, steps: float | None, kind: type[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the best of each group, by every number, or by every score."""
    looked_through, all_scored = [], []  # how many numbers each time
    module = "fcos_ray.model.postprocess."
    monkeypatch.setattr(module + "_above", lambda v, least: looked_through.append(v.size) or _above(v, least))
    monkeypatch.setattr(module + "_best_of_all", lambda *v: all_scored.append(v[0].numel()) or _best_of_all(*v))
    outputs = head_outputs(8, bias=bias, steps=steps)
    outputs.cls_logits[:, 300:320] = head_outputs(9, steps=steps).cls_logits[:, 300:320]
    tensors = ("cls_logits", "bbox_regression", "bbox_ctrness", "anchors")
    there = replace(outputs, **{name: getattr(outputs, name).as_subclass(kind) for name in tensors})
    assert there.cls_logits[0].flatten().is_cpu == (kind is torch.Tensor)
    assert assert_equal(postprocess(there, SHAPES, **LIMITS), torchvisions(outputs, **LIMITS)) > 10
    every = outputs.cls_logits[0].numel()
    assert looked_through.count(every) == (0 if ways == "groups" else len(SHAPES))
    assert all_scored == ([every] * len(SHAPES) if ways == "scores" else [])


@pytest.mark.parametrize("ctrness", [80.0, 12.0, 3.0, 0.0, -2.0, -12.0])
def test_scores_at_the_threshold_survive_the_test_on_logits(ctrness: float) -> None:
    """At the very edge, σ(cls) = t² / σ(ctr), the logit test alone must never drop what the score keeps."""
    centre = torch.tensor(ctrness, dtype=torch.float64)
    for threshold in (1e-18, 2e-15, 1e-6, 0.05, 0.2, 0.5, 0.9, 0.999, 0.99999):
        if threshold**2 >= torch.sigmoid(centre):  # nothing can pass
            assert not torch.sqrt(torch.sigmoid(centre.float())) > threshold
            continue
        edge = float(torch.logit(threshold**2 / torch.sigmoid(centre)))
        logits = (edge + torch.linspace(-1e-3, 1e-3, 20001, dtype=torch.float64) * max(1.0, abs(edge))).float()
        passing = torch.sqrt(torch.sigmoid(logits) * torch.sigmoid(centre.float())) > threshold
        assert passing.any()
        assert not passing.all()
        assert (logits[passing] > logit_below(threshold)).all()
        if ctrness >= 12 and 1e-6 <= threshold <= 0.99:  # nor is it far below what passes at the best centre-ness
            assert logit_below(threshold) > edge - 1e-3


def test_an_image_does_not_see_its_neighbours() -> None:
    outputs = head_outputs(6)
    together, _ = both(outputs)
    for i in range(len(SHAPES)):
        one = HeadOutputs(
            outputs.cls_logits[i : i + 1],
            outputs.bbox_regression[i : i + 1],
            outputs.bbox_ctrness[i : i + 1],
            outputs.anchors,
            outputs.num_anchors_per_level,
        )
        alone = postprocess(one, SHAPES[i : i + 1], **LIMITS)[0]
        for name in ("boxes", "labels", "scores"):
            np.testing.assert_array_equal(getattr(alone, name), getattr(together[i], name), strict=True)


def boxes_of_clusters(n: int, num_classes: int, seed: int, *, steps: float | None = None) -> tuple[torch.Tensor, ...]:
    """(boxes, scores, labels): n boxes around n / 8 places; `steps` rounds the scores, so that many are equal."""
    g = torch.Generator().manual_seed(seed)
    place = torch.randint(n // 8 + 1, (n,), generator=g)
    corner = (1000 * torch.rand(n // 8 + 1, 2, generator=g))[place] + 8 * torch.rand(n, 2, generator=g)
    side = (5 + 100 * torch.rand(n // 8 + 1, 2, generator=g))[place] + 8 * torch.rand(n, 2, generator=g)
    scores = torch.rand(n, generator=g)
    labels = torch.randint(num_classes, (n // 8 + 1,), generator=g)[place]
    return torch.cat([corner, corner + side], 1), scores if steps is None else (scores / steps).round() * steps, labels


def first(
    boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, nms_threshold: float, max_detections: int
) -> torch.Tensor:
    return torch.from_numpy(first_of_nms(boxes.numpy(), scores.numpy(), labels.numpy(), nms_threshold, max_detections))


@pytest.mark.parametrize("steps", [None, 0.001, 0.1])
@pytest.mark.parametrize("num_classes", [1, 7, 91])
@pytest.mark.parametrize("n", [0, 1, 2, 5, 20, 32, 33, 900, 1000, 1001, 3000])
def test_the_first_of_nms_are_batched_nms_first(n: int, num_classes: int, steps: float | None) -> None:
    boxes, scores, labels = boxes_of_clusters(n, num_classes, seed=n + num_classes, steps=steps)
    for nms_threshold in (0.0, 0.6, 1.0):
        wanted = batched_nms(boxes, scores, labels, nms_threshold)
        for max_detections in (1, 100, 300, 10**6):
            found = first(boxes, scores, labels, nms_threshold, max_detections)
            assert torch.equal(found, wanted[:max_detections])


@pytest.fixture
def asked_nms(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of boxes that torchvision's nms is asked about."""
    asked: list[int] = []
    nms = torch.ops.torchvision.nms
    monkeypatch.setattr("fcos_ray.model.nms._nms", lambda *a: asked.append(len(a[0])) or nms(*a))
    return asked


def test_few_boxes_that_overlap_by_about_the_threshold_stay_or_go_as_in_float32(asked_nms: list[int]) -> None:
    """Thresholds are each pair's overlap, its neighbours in float64, and what is a little less and more."""
    calls = 0
    for seed in range(40):
        boxes, scores, labels = boxes_of_clusters(12, 1, seed, steps=0.1)
        overlaps = [overlap for overlap in box_iou(boxes, boxes).flatten().tolist() if 0 < overlap < 1]
        for overlap in overlaps[:20]:
            near = (np.nextafter(overlap, 0), overlap, np.nextafter(overlap, 1), overlap - 1e-7, overlap + 1e-7)
            for nms_threshold in (*near, overlap - 3e-5, overlap + 3e-5):
                wanted = batched_nms(boxes, scores, labels, nms_threshold)
                assert torch.equal(first(boxes, scores, labels, nms_threshold, 100), wanted)
                calls += 1
    assert 0 < len(asked_nms) < calls, "numpy where it can tell, nms where not"


@pytest.mark.parametrize(
    ("nms_threshold", "about"),
    [
        (0.6, [[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 6.0, 10.0]]),  # an overlap of 0.6
        (0.6, [[0.0, 0.0, 10.0, 10.0], [3.0, 3.0, 3.0, 9.0]]),  # no width
        (0.6, [[0.0, 0.0, 1e-25, 1e-25], [0.0, 0.0, 1e-25, 1e-25]]),  # areas of 0 in float32
        (0.0, [[0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0]]),
        (1.0, [[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 10.0]]),
        (0.5, [[0.0, 0.0, 10.0, 10.0], [0.0, math.nan, 10.0, 10.0]]),
    ],
)
def test_nms_is_asked_where_numpy_cannot_tell(
    asked_nms: list[int], nms_threshold: float, about: list[list[float]]
) -> None:
    boxes, scores, labels = torch.tensor(about), torch.tensor([0.9, 0.8]), torch.zeros(2, dtype=torch.int64)
    wanted = batched_nms(boxes, scores, labels, nms_threshold)
    assert torch.equal(first(boxes, scores, labels, nms_threshold, 100), wanted)
    assert asked_nms == [2]


@pytest.mark.parametrize(("n", "asked"), [(32, []), (33, [33])])
def test_numpy_compares_few_boxes(asked_nms: list[int], n: int, asked: list[int]) -> None:
    boxes, scores, labels = boxes_of_clusters(n, 3, seed=1)
    wanted = batched_nms(boxes, scores, labels, 0.6)
    assert 0 < len(wanted) < n
    assert torch.equal(first(boxes, scores, labels, 0.6, 100), wanted)
    assert asked_nms == asked


def test_where_torchvision_shifts_boxes_on_a_gpu_they_are_shifted() -> None:
    differ = 0
    for seed in range(8):
        boxes, scores, labels = boxes_of_clusters(4000, 91, seed)
        wanted = _batched_nms_coordinate_trick(boxes, scores, labels, 0.6)
        parts = (boxes.numpy(), scores.numpy(), labels.numpy())
        found = first_of_nms(*parts, 0.6, 10**6, shifted=SHIFTED["cuda"])
        np.testing.assert_array_equal(found, wanted.numpy())
        differ += not np.array_equal(first_of_nms(*parts, 0.6, 10**6), found)
    assert differ > 0


def test_nms_is_told_what_torchvision_shifts_on_the_outputs_device(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setitem(SHIFTED, "cpu", 7)  # type: ignore[arg-type]
    monkeypatch.setattr(
        "fcos_ray.model.postprocess.first_of_nms", lambda *a, **k: told.append(k) or first_of_nms(*a, **k)
    )
    both(head_outputs(1))
    assert told == [{"shifted": 7}] * len(SHAPES)


def test_boxes_that_overlap_by_the_very_threshold_stay_or_go_as_in_float32() -> None:
    """Each of 20 pairs overlaps, in float32, by what is then the threshold, or by the least that is more."""
    boxes, scores, _ = boxes_of_clusters(1200, 1, seed=0)
    labels = torch.arange(60).repeat(20)
    boxes[60:80] = boxes[:20] + torch.rand(20, 4, generator=torch.Generator().manual_seed(1))
    scores[:20], scores[60:80] = torch.linspace(0.98, 0.99, 20), torch.linspace(0.96, 0.97, 20)  # pairs come first
    overlaps = torch.diagonal(box_iou(boxes[:20], boxes[60:80]))
    went = []
    for nms_threshold in (*overlaps.tolist(), *torch.nextafter(overlaps, torch.zeros(20)).tolist()):
        found = first(boxes, scores, labels, nms_threshold, 100)
        assert torch.equal(found, batched_nms(boxes, scores, labels, nms_threshold)[:100])
        went.append(20 - int(((found >= 60) & (found < 80)).sum()))
    assert went[20:] == [n + 1 for n in went[:20]]  # the pair itself


@pytest.mark.parametrize("smallest", [1e-11, 1e-6, 1e-3])
def test_slivers_are_suppressed_as_in_float32(smallest: float) -> None:
    g = torch.Generator().manual_seed(2)
    corner = torch.rand(1500, 2, generator=g) * 3 * smallest
    boxes = torch.cat([corner, corner + smallest * (1 + torch.rand(1500, 2, generator=g))], 1)
    boxes[0] = torch.tensor([0.0, 0.0, 1333.0, 800.0])
    scores, labels = torch.rand(1500, generator=g), torch.randint(80, 90, (1500,), generator=g)
    scores[0] = 1.0  # far shifts from the first
    wanted = batched_nms(boxes, scores, labels, 0.6)
    assert 100 < len(wanted) < 1000
    assert torch.equal(first(boxes, scores, labels, 0.6, 100), wanted[:100])


def test_classes_too_many_to_shift_apart_are_suppressed_as_in_float32() -> None:
    boxes, scores, _ = boxes_of_clusters(1500, 1, seed=4)
    boxes = boxes / 100  # small sides, far shifts
    labels = torch.arange(1500) // 2 + 10**13
    boxes[1::2] = boxes[::2] + 0.02
    wanted = batched_nms(boxes, scores, labels, 0.6)
    assert 750 < len(wanted) < 1400
    assert torch.equal(first(boxes, scores, labels, 0.6, 100), wanted[:100])


def test_a_box_without_numbers_leaves_the_others_as_they_are() -> None:
    boxes, scores, labels = boxes_of_clusters(1500, 20, seed=3)
    boxes[scores.argmax()] = float("nan")
    wanted = batched_nms(boxes, scores, labels, 0.5)
    assert len(wanted) < 1000
    assert torch.equal(first(boxes, scores, labels, 0.5, 100), wanted[:100])
