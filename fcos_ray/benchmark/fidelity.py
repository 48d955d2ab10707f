"""Fidelity: what --fast-decode costs in mAP, on drawn shapes with truth and the weights that know them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import ray

from fcos_ray.analysis.coco_metric import Boxes, check_installed, score
from fcos_ray.analysis.truth import Truth, TruthImage
from fcos_ray.errors import EvaluationError
from fcos_ray.inputs.decode import decode
from fcos_ray.load import LoadSettings, shrunk
from fcos_ray.model.detector import Detector
from fcos_ray.model.weights import load_weights
from fcos_ray.sample import CATEGORIES, Drawing, as_jpeg, draw_shapes
from fcos_ray.types import Detections, Image

_WEIGHTS: Final = "sample"
_IMAGES: Final = 64
_HEIGHT, _WIDTH = 1200, 1600  # 3.75 times what the weights take, as 4000×3000 is of fcos_resnet50_fpn's 1066×800


@dataclass(frozen=True, slots=True)
class FastDecodeCost:
    """Box mAP of the same drawings; None, and why, where it could not be measured."""

    exact: float | None
    fast: float | None
    images: int
    words: str


def fast_decode_cost(load: LoadSettings) -> FastDecodeCost:
    """Detect the same drawings decoded both ways, in a Ray task."""
    try:
        check_installed()
    except EvaluationError as error:
        return FastDecodeCost(None, None, 0, f"what --fast-decode costs in mAP was not measured: {error}")
    exact, fast = ray.get(ray.remote(num_cpus=1)(mean_ap_both_ways).remote(load, _IMAGES))
    words = (
        f"--fast-decode: box mAP {fast:.3f} instead of {exact:.3f} ({_IMAGES} drawings of {_WIDTH}×{_HEIGHT}, the sample "
        "weights). Its cost on your images: label some both ways, and jobs/evaluate.py"
    )
    return FastDecodeCost(exact, fast, _IMAGES, words)


def mean_ap_both_ways(load: LoadSettings, num_images: int) -> tuple[float, float]:
    """Box mAP of as many drawings, decoded exactly and with --fast-decode."""
    weights = load_weights(_WEIGHTS)
    size = {name: weights.input_settings()[name] for name in ("min_size", "max_size")}
    settings = dataclasses.replace(load, exact_resize=False, **size)
    detector = Detector(weights, device="cpu")
    drawings: list[Drawing] = []
    exact: list[Detections] = []
    fast: list[Detections] = []
    for seed in range(num_images):
        drawing = draw_shapes(np.random.default_rng([seed, _IMAGES]), _HEIGHT, _WIDTH)
        data = as_jpeg(drawing.pixels, quality=90)
        drawings.append(drawing)
        for found, reduced in ((exact, None), (fast, (settings.min_size, settings.max_size))):
            image = decode(data, model_size=reduced)
            small = Image(shrunk(image, settings), height=image.height, width=image.width)
            (answer,) = detector.detect([small])
            if not isinstance(answer, Detections):
                raise answer
            found.append(answer)
    truth = _truth(drawings)
    return _mean_ap(truth, exact), _mean_ap(truth, fast)


def _truth(drawings: Sequence[Drawing]) -> Truth:
    things = [(k, thing) for k, drawing in enumerate(drawings) for thing in drawing.objects]
    return Truth(
        name="drawings",
        images=tuple(TruthImage(f"{k}", None, _WIDTH, _HEIGHT) for k in range(len(drawings))),
        categories=CATEGORIES,
        image=np.array([k for k, _ in things], np.int64),
        category=np.array([thing.category for _, thing in things], np.int64),
        boxes=np.array([thing.box for _, thing in things], np.float64),
        area=np.array([thing.area for _, thing in things], np.float64),
        crowd=np.zeros(len(things), np.bool_),
    )


def _mean_ap(truth: Truth, found: Sequence[Detections]) -> float:
    boxes = np.concatenate([answer.boxes for answer in found]).astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    detections = Boxes(
        image=np.repeat(np.arange(len(found)), [len(answer.scores) for answer in found]),
        category=np.concatenate([answer.labels for answer in found]) - 1,  # 0 is the background
        boxes=boxes,
        scores=np.concatenate([answer.scores for answer in found]).astype(np.float64),
    )
    mean_ap = score(truth, detections, images=np.arange(len(found))).ap()
    assert mean_ap is not None, "every category is drawn"
    return mean_ap
