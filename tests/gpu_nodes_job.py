"""A job whose detectors write down where they are; a driver for test_pipeline.py. Arguments: manifest, output, folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import ray

import fcos_ray as fr
from fcos_ray.types import Detections, Image
from tests.corpus import PixelDetector

MANIFEST, OUTPUT, FOLDER = sys.argv[1:]


class Whereabouts(PixelDetector):
    def __init__(self, folder: str = FOLDER) -> None:
        gpus = ray.get_gpu_ids()
        assert gpus, "a detector without its GPU"
        (Path(folder) / ray.get_runtime_context().get_node_id()).write_text(json.dumps(gpus))

    def detect(self, images: Sequence[Image]) -> list[Detections]:
        assert ray.get_gpu_ids()
        return super().detect(images)


ray.init(log_to_driver=False)
gpu_nodes = [node["NodeID"] for node in ray.nodes() if node["Resources"].get("GPU")]
summary = fr.run(
    fr.JobConfig(
        manifest=[MANIFEST], output=OUTPUT, weights="random:1", device="cpu", gpus_per_detector=1, shard_rows=6
    ),
    make_detector=Whereabouts,
)
print(json.dumps({"ok": summary.ok, "gpu_nodes": gpu_nodes}))
