"""Measure: trained weights -> COCO mAP on validation truth. Detects one image after the other, in this process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa

from fcos_ray import storage
from fcos_ray.analysis.coco_metric import check_installed
from fcos_ray.analysis.evaluate import evaluate
from fcos_ray.analysis.truth import read_truth
from fcos_ray.errors import EvaluationError, ImageError, ManifestError
from fcos_ray.inputs.decode import decode
from fcos_ray.model.detector import Detector
from fcos_ray.model.parameters import Weights
from fcos_ray.training.config import TrainConfig
from fcos_ray.training.truth import image_uri

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


@dataclass(frozen=True, slots=True)
class Validation:
    """The images to measure on: id in the truth and uri."""

    annotations: str
    images: tuple[tuple[str, str], ...]


def read_validation(annotations: str, *, images: str | None, categories: Sequence[str]) -> Validation:
    """Look at everything that could go wrong at the end, before the first step.

    `categories`: what the model will answer. Raises EvaluationError, also when faster-coco-eval is not installed.
    """
    check_installed()
    truth = read_truth(annotations)
    if not set(truth.categories) & set(categories):
        raise EvaluationError(
            f"annotations {truth.name}: none of its categories ({', '.join(truth.categories[:5])}) is one of those to "
            f"learn ({', '.join(categories[1:6])}); names are compared letter by letter"
        )
    folder = images if images is not None else storage.parent(annotations)
    return Validation(annotations, tuple((image.id, image_uri(truth.name, image, folder)) for image in truth.images))


def measure(
    weights: Weights, validation: Validation, config: TrainConfig, *, stop: Callable[[], bool] = lambda: False
) -> dict[str, float | None]:
    """Box mAP and its kin. Images that cannot be read count as without detections.

    `stop` is asked after each image; True raises KeyboardInterrupt. Raises ManifestError when no image could be read,
    EvaluationError, StorageError.
    """
    detector = Detector(
        weights,
        device=config.device,
        score_threshold=config.score_threshold,
        nms_threshold=config.nms_threshold,
        max_detections=config.max_detections,
        topk_candidates=config.topk_candidates,
    )
    rows = []
    for image_id, uri in validation.images:
        rows.append({"image_id": image_id, "uri": uri} | _detected(uri, detector))
        if stop():
            raise KeyboardInterrupt
    if all(row["status"] == "error" for row in rows):
        raise ManifestError(
            f"{validation.annotations}: none of its {len(rows)} images could be read, the first is {rows[0]['uri']}. "
            "Check --val-images; the same command goes on with measuring"
        )
    found = evaluate(
        pa.Table.from_pylist(rows, _ROWS),
        validation.annotations,
        match="image_id",
        model_categories=weights.categories,
    )
    for note in found.notes:
        log.info("%s", note)
    return {"mean_ap": found.mean_ap, "ap50": found.ap50, "ap75": found.ap75, "ar_100": found.ar_100}


def _detected(uri: str, detector: Detector) -> dict[str, object]:
    try:
        image = decode(storage.read_bytes(uri))
        [found] = detector([image.pixels])
    except (ImageError, storage.InvalidUri, *storage.STORE_ERRORS) as error:  # a StorageError ends the measuring
        log.warning("%s: %s", uri, storage.describe(error))
        return {"status": "error"}
    return {
        "status": "ok",
        "width": image.width,
        "height": image.height,
        "boxes": found.boxes.tolist(),
        "label_names": [detector.categories[label] for label in found.labels],
        "scores": found.scores.tolist(),
    }
