"""One peer's turn: `python -m tests.benchmarks.peer NAME FOLDER RESULT`, a process of its own that leaves nothing behind.

Labels FOLDER/images/*.jpg the way NAME would be written, and writes a Turn as JSON. Every peer holds the values of
`random:1` and has torchvision's default thresholds. It knows nothing of the other peers (tests/benchmarks/peers.py).
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torchvision.models.detection import FCOS
from torchvision.models.detection.transform import resize_boxes
from torchvision.transforms.functional import to_tensor

from fcos_ray.model.postprocess import HeadOutputs, postprocess
from fcos_ray.model.weights import load_weights
from fcos_ray.types import Detections
from tests.benchmarks.turns import (
    WEIGHTS,
    End,
    Turn,
    as_json,
    columns,
    from_rows,
    photographs,
    read_tensor,
    steady_seconds,
    turn_of,
)
from tests.parity import from_torchvision
from tests.torchvision_model import torchvision_model

BATCH: Final = 4
_LIMITS: Final = {"score_threshold": 0.2, "nms_threshold": 0.6, "max_detections": 100, "topk_candidates": 1000}


def plain(folder: Path) -> Turn:
    """torchvision's documented loop."""
    model, found, ends = torchvision_model(load_weights(WEIGHTS)), {}, []
    with torch.inference_mode():
        for path in photographs(folder):
            found[path.name] = from_torchvision(model([read_tensor(path)])[0])
            ends.append(End())
    return Turn(found, steady_seconds(ends))


class _Files(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, Tensor]:
        return self.paths[index].name, read_tensor(self.paths[index])


def dataloader(folder: Path) -> Turn:
    """Worker processes decode, the model gets batches."""
    model, found, ends = torchvision_model(load_weights(WEIGHTS)), {}, []
    loader = torch.utils.data.DataLoader(
        _Files(photographs(folder)), batch_size=BATCH, num_workers=os.cpu_count() or 1, collate_fn=list
    )
    with torch.inference_mode():
        for batch in loader:
            for (name, _), result in zip(batch, model([image for _, image in batch]), strict=True):
                found[name] = from_torchvision(result)
            ends.append(End(images=len(batch)))
    return Turn(found, steady_seconds(ends))


def ray_data(folder: Path) -> Turn:
    """Ray's example of object detection: read_images, map, map_batches with an actor, write_parquet.

    Its actor would get one thread, which Ray sets for one CPU; here it has them all.
    """
    import pyarrow.parquet as pq
    import ray.data

    from fcos_ray.session import ray_session

    def preprocess(row: dict[str, Any]) -> dict[str, Any]:
        return {"name": Path(row["path"]).name, "image": to_tensor(row["image"]).numpy()}

    class Model:
        def __init__(self) -> None:
            torch.set_num_threads(os.cpu_count() or 1)
            self.model = torchvision_model(load_weights(WEIGHTS))

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            with torch.inference_mode():
                results = self.model([torch.tensor(image) for image in batch["image"]])
            return columns(batch["name"], [from_torchvision(result) for result in results])

    with ray_session():
        images = ray.data.read_images(str(folder / "images"), include_paths=True, mode="RGB")
        pool = ray.data.ActorPoolStrategy(size=1)
        labels = images.map(preprocess).map_batches(Model, batch_size=BATCH, compute=pool)
        labels.write_parquet(str(folder / "labels"))
    return turn_of(pq.read_table(folder / "labels").to_pylist())


def spark(folder: Path) -> Turn:
    """predict_batch_udf: a process and a one-thread model per core."""
    from pyspark.ml.functions import predict_batch_udf
    from pyspark.sql import SparkSession
    from pyspark.sql.functions import col
    from pyspark.sql.types import StructType

    def make_predict() -> Callable[[Any], list[dict[str, Any]]]:
        torch.set_num_threads(1)
        model = torchvision_model(load_weights(WEIGHTS))

        def predict(paths: Any) -> list[dict[str, Any]]:
            with torch.inference_mode():
                results = model([read_tensor(path) for path in paths])
            named = columns([Path(path).name for path in paths], [from_torchvision(result) for result in results])
            return [dict(zip(named, values, strict=True)) for values in zip(*named.values(), strict=True)]

        return predict

    cores = os.cpu_count() or 1
    settings = {
        "spark.ui.enabled": "false",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
    }
    os.environ["PYSPARK_PYTHON"] = sys.executable  # else its workers are whatever python3 is on the path
    session = SparkSession.builder.master(f"local[{cores}]").config(map=settings).getOrCreate()
    kind = StructType.fromDDL(
        "name string, boxes array<float>, labels array<bigint>, scores array<float>, "
        "at double, images bigint, worker bigint"
    )
    udf = predict_batch_udf(make_predict, return_type=kind, batch_size=BATCH)
    paths = session.createDataFrame([(str(path),) for path in photographs(folder)], "path string").repartition(cores)
    paths.select(udf(col("path")).alias("found")).select("found.*").write.parquet(str(folder / "labels"))
    rows = [row.asDict() for row in session.read.parquet(str(folder / "labels")).collect()]
    session.stop()
    return turn_of(rows)


def openvino(folder: Path, *, precision: str) -> Turn:
    """What a CPU can do: backbone and head compiled by OpenVINO, images in flight on every core, our post-processing."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # importing openvino would send statistics
    import openvino as ov

    model = torchvision_model(load_weights(WEIGHTS))
    network, anchors, levels = traceable(model, read_tensor(photographs(folder)[0]))
    compiled = ov.Core().compile_model(
        ov.convert_model(network, example_input=network.example, input=list(network.example.shape)),
        "CPU",
        {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "THROUGHPUT"},
    )
    used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if used != precision:
        raise RuntimeError(f"OpenVINO was to compute in {precision}, but on this machine does in {used}")
    found: dict[str, Detections] = {}
    ends: list[End] = []

    def finish(request: Any, given: tuple[int, str, tuple[int, int], tuple[int, int]]) -> None:
        number, name, resized, seen = given
        outputs = [torch.from_numpy(request.get_output_tensor(i).data) for i in range(3)]
        found[name] = detections_of(HeadOutputs(*outputs, anchors, levels), resized, seen)
        ends.append(End(worker=number))

    queue = ov.AsyncInferQueue(compiled)
    queue.set_callback(finish)
    torch.set_num_threads(1)  # the cores are OpenVINO's
    for path in photographs(folder):
        image = read_tensor(path)
        batch, _ = model.transform([image])
        # Requests run side by side, so each has a clock: one for all gave 0.38 s for an image of ten, where sixty took 0.40
        given = (queue.get_idle_request_id(), path.name, batch.image_sizes[0], tuple(image.shape[-2:]))
        queue.start_async({0: batch.tensors.numpy()}, given)
    queue.wait_all()
    return Turn(found, steady_seconds(ends))


def detections_of(outputs: HeadOutputs, resized: tuple[int, int], seen: tuple[int, int]) -> Detections:
    [best] = postprocess(outputs, [resized], **_LIMITS)
    boxes = resize_boxes(torch.from_numpy(best.boxes), resized, seen).numpy()
    return Detections(boxes, best.labels, best.scores)


def traceable(model: FCOS, image: Tensor) -> tuple[Any, Tensor, list[int]]:
    """Backbone and head as one module of one tensor; anchors and their number per level for the image's padded size."""

    class Network(torch.nn.Module):
        def __init__(self, example: Tensor) -> None:
            super().__init__()
            self.backbone, self.head, self.example = model.backbone, model.head, example

        def forward(self, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            heads = self.head(list(self.backbone(batch).values()))
            return heads["cls_logits"], heads["bbox_regression"], heads["bbox_ctrness"]

    batch, _ = model.transform([image])
    with torch.no_grad():
        features = list(model.backbone(batch.tensors).values())
        anchors: Tensor = model.anchor_generator(batch, features)[0]
    levels = [level.shape[2] * level.shape[3] for level in features]
    return Network(batch.tensors.clone()).eval(), anchors, levels


def fcos_ray(folder: Path, *, precision: str) -> Turn:
    """The whole job: manifest in, audited labels out. Its steady state is the one its own summary gives."""
    import fcos_ray as fr

    manifest = [str(folder / "manifest.parquet")]
    config = fr.JobConfig(
        manifest=manifest, output=str(folder / "labels"), weights=WEIGHTS, precision=precision, device="cpu"
    )
    summary = fr.run(config)
    if summary.error:
        raise RuntimeError(f"{summary.error} error rows: {summary.errors_by_code}")
    rows = fr.open_dataset(config.output).rows(columns=["image_id", "boxes", "labels", "scores"]).to_arrow().to_pylist()
    found = from_rows([row | {"name": row["image_id"]} for row in rows])
    rate = summary.images_per_second
    return Turn(found, 1 / rate if rate else None)


PEERS: Final[dict[str, Callable[[Path], Turn]]] = {
    "plain": plain,
    "dataloader": dataloader,
    "ray-data": ray_data,
    "spark": spark,
    "openvino-fp32": functools.partial(openvino, precision="f32"),
    "openvino-bf16": functools.partial(openvino, precision="bf16"),
    "fcos_ray-fp32": functools.partial(fcos_ray, precision="fp32"),
    "fcos_ray-bf16": functools.partial(fcos_ray, precision="bf16"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("result", type=Path)
    options = parser.parse_args()
    options.result.write_text(as_json(PEERS[options.name](options.folder)))


if __name__ == "__main__":
    main()
