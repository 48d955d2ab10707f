"""Post-processing against torchvision's, on made-up head outputs of an 800×1088 image, 91 classes; alternating.

`python -m tests.benchmarks.postprocess_speed --threads 1`: a line of JSON for each mixture.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from fcos_ray.model.postprocess import HeadOutputs, postprocess

GRIDS: Final = [(100, 136), (50, 68), (25, 34), (13, 17), (7, 9)]
SHAPES: Final = [(800, 1066)]
# name -> mean and spread of the class logits, objects, score threshold. In "thousands" a candidate's class and place are
# chance, so that hardly any two overlap; in a crowd candidates lie around objects, as a detector's do.
MIXTURES: Final = {
    "few": (-7.6, 1.12, 0, 0.2),
    "crowd": (-8.5, 1.0, 100, 0.05),
    "crowd without background": (-30.0, 1.0, 20, 0.05),
    "thousands": (-8.5, 1.12, 0, 0.05),
    "everything": (-8.5, 1.0, 100, 0.0),
}


def head_outputs(mean: float, spread: float, num_objects: int) -> HeadOutputs:
    """The same numbers each time."""
    g = torch.Generator().manual_seed(0)
    counts = [h * w for h, w in GRIDS]
    generator = AnchorGenerator(((8,), (16,), (32,), (64,), (128,)), ((1.0,),) * 5)
    levels = [torch.zeros(1, 1, h, w) for h, w in GRIDS]
    outputs = HeadOutputs(
        cls_logits=mean + spread * torch.randn(1, sum(counts), 91, generator=g),
        bbox_regression=4 * torch.rand(1, sum(counts), 4, generator=g),
        bbox_ctrness=torch.randn(1, sum(counts), 1, generator=g),
        anchors=generator(ImageList(torch.zeros(1, 3, 800, 1088), [(800, 1088)]), levels)[0],
        num_anchors_per_level=counts,
    )
    for _ in range(num_objects):
        _add_object(outputs, g)
    return outputs


def _add_object(outputs: HeadOutputs, g: torch.Generator) -> None:
    """A square of one of 12 classes: anchors within it, of a fitting level, say so, the surer the nearer its middle."""
    anchors = outputs.anchors
    side, label = 20 + 150 * torch.rand(1, generator=g), int(torch.randint(12, (1,), generator=g))
    middle = torch.rand(2, generator=g) * torch.tensor([1066.0, 800.0])
    from_middle = (anchors[:, :2] + anchors[:, 2:]) / 2 - middle
    distances = side / 2 + torch.cat([from_middle, -from_middle], 1)
    furthest = distances.amax(1) / (anchors[:, 2] - anchors[:, 0])
    within = ((distances.amin(1) > 0) & (furthest > 1) & (furthest < 8)).nonzero()[:, 0]
    away = from_middle[within].norm(dim=1) / side
    outputs.cls_logits[0, within, label] = 2 - 6 * away + torch.randn(len(within), generator=g)
    outputs.bbox_ctrness[0, within, 0] = 3 - 8 * away
    noise = 1 + 0.03 * torch.randn(len(within), 4, generator=g)
    outputs.bbox_regression[0, within] = distances[within] * noise / (anchors[within, 2:3] - anchors[within, :1])


def torchvisions(outputs: HeadOutputs, limits: dict[str, Any]) -> dict[str, torch.Tensor]:
    class Settings:
        box_coder = FCOS.__annotations__["box_coder"](normalize_by_size=True)
        score_thresh, nms_thresh = limits["score_threshold"], limits["nms_threshold"]
        detections_per_img, topk_candidates = limits["max_detections"], limits["topk_candidates"]

    counts = list(outputs.num_anchors_per_level)
    names = ("cls_logits", "bbox_regression", "bbox_ctrness")
    heads = {name: list(getattr(outputs, name).split(counts, dim=1)) for name in names}
    found = FCOS.postprocess_detections(Settings(), heads, [list(outputs.anchors.split(counts))], SHAPES)
    one: dict[str, torch.Tensor] = found[0]
    return one


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each call, in turns."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            taken[name].append(1000 * (time.perf_counter() - started))
    return {name: round(statistics.median(values[1:]), 3) for name, values in taken.items()}


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--bf16", action="store_true", help="outputs rounded to bf16: more scores are equal")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    for name, (mean, spread, num_objects, score_threshold) in MIXTURES.items():
        limits = {
            "score_threshold": score_threshold,
            "nms_threshold": 0.6,
            "max_detections": 100,
            "topk_candidates": 1000,
        }
        outputs = head_outputs(mean, spread, num_objects)
        if options.bf16:
            for values in (outputs.cls_logits, outputs.bbox_regression, outputs.bbox_ctrness):
                values.copy_(values.bfloat16())
        ours, theirs = postprocess(outputs, SHAPES, **limits)[0], torchvisions(outputs, limits)
        np.testing.assert_array_equal(ours.labels, theirs["labels"].numpy(), strict=True)
        np.testing.assert_array_equal(ours.boxes, theirs["boxes"].numpy(), strict=True)
        np.testing.assert_allclose(ours.scores, theirs["scores"].numpy(), rtol=0, atol=1e-6, strict=True)
        calls = {
            "ours": lambda o=outputs, k=limits: postprocess(o, SHAPES, **k),
            "torchvision": lambda o=outputs, k=limits: torchvisions(o, k),
        }
        found = medians(calls, options.rounds)
        ratio = round(found["torchvision"] / found["ours"], 2)
        about = {"mixture": name, "detections": len(ours.labels), "threads": options.threads}
        print(json.dumps(about | {"milliseconds": found, "times": ratio}))


if __name__ == "__main__":
    main()
