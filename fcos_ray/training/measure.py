"""Measure: trained weights -> COCO mAP on validation truth. Detects one image after the other, in this process."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pyarrow as pa

from fcos_ray import storage
from fcos_ray.analysis.evaluate import evaluate
from fcos_ray.errors import ImageError, ManifestError
from fcos_ray.inputs.decode import decode
from fcos_ray.model.architectures import Weights
from fcos_ray.model.detector import Detector
from fcos_ray.training.config import TrainConfig
from fcos_ray.training.dataset import Example, read_truth

log = logging.getLogger(__name__)

_ROWS: pa.Schema = pa.schema(
    [
        pa.field("image_id", pa.string()),
        pa.field("uri", pa.string()),
        pa.field("status", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("boxes", pa.list_(pa.list_(pa.float32()))),
        pa.field("label_names", pa.list_(pa.string())),
        pa.field("scores", pa.list_(pa.float32())),
    ]
)


def measure(weights: Weights, config: TrainConfig) -> dict[str, float | None]:
    """Box mAP and its kin on `config.val_annotations`. Images that cannot be read count as without detections.

    Raises EvaluationError, also when faster-coco-eval is not installed; ManifestError when no image could be read.
    """
    assert config.val_annotations is not None
    truth = read_truth(config.val_annotations, images=config.val_images)
    detector = Detector(
        weights,
        device=config.device,
        score_threshold=config.score_threshold,
        nms_threshold=config.nms_threshold,
        max_detections=config.max_detections,
        topk_candidates=config.topk_candidates,
    )
    rows = list(_rows(truth.examples, detector))
    if all(row["status"] == "error" for row in rows):
        raise ManifestError(f"{config.val_annotations}: none of its {len(rows)} images could be read")
    found = evaluate(
        pa.Table.from_pylist(rows, _ROWS),
        config.val_annotations,
        match="file_name",
        model_categories=weights.categories,
    )
    for note in found.notes:
        log.info("%s", note)
    return {"mean_ap": found.mean_ap, "ap50": found.ap50, "ap75": found.ap75, "ar_100": found.ar_100}


def _rows(examples: tuple[Example, ...], detector: Detector) -> Iterator[dict[str, object]]:
    for example in examples:
        row: dict[str, object] = {"image_id": example.uri, "uri": example.uri, "status": "ok"}
        try:
            image = decode(storage.read_bytes(example.uri))
            [found] = detector([image.pixels])
        except (ImageError, FileNotFoundError, PermissionError) as error:
            log.warning("%s: %s", example.uri, storage.describe(error))
            yield row | {"status": "error"}
            continue
        yield row | {
            "width": image.width,
            "height": image.height,
            "boxes": found.boxes.tolist(),
            "label_names": [detector.categories[label] for label in found.labels],
            "scores": found.scores.tolist(),
        }
