"""Detector: images -> detections, equal to torchvision's `model([image])`. Knows devices; all device code is here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.models.detection.image_list import ImageList

from fcos_ray.errors import ConfigError, DetectError
from fcos_ray.model.architectures import build_model, fold_batchnorm
from fcos_ray.model.batches import micro_batches
from fcos_ray.model.checks import check_image, check_settings, pick_device, pick_precision
from fcos_ray.model.convolutions import quicken
from fcos_ray.model.parameters import Weights
from fcos_ray.model.postprocess import Found, HeadOutputs, postprocess
from fcos_ray.model.weights import load_weights
from fcos_ray.sizes import MAX_MICRO_BATCH, Shape, padded_shape, resized_shape
from fcos_ray.types import Detections, Image

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Input:
    """One image on its way to the device."""

    pixels: NDArray[np.uint8] | Tensor  # (h, w, 3) uint8, or (3, h, w) float in 0–1
    seen: Shape  # of the image as seen
    resized: Shape  # what the model gets
    padded: Shape

    @property
    def is_resized(self) -> bool:
        return isinstance(self.pixels, np.ndarray) and self.pixels.shape[:2] == self.resized


@dataclass(frozen=True, slots=True)
class _Launched:
    """A micro-batch that the device was told to run, by the images' places. A CPU is done with it when it was told."""

    batch: list[int]
    outputs: HeadOutputs
    done: torch.cuda.Event | None  # on the device


class Detector:
    """FCOS on one device.

    Images share a forward pass only where torchvision would pad them to the same shape alone: no result depends on its
    neighbours.

    `weights`: what `load_weights` takes, or what it returned; `num_classes` and `categories` are handed on to it.
    `device`: "cpu", "cuda" or "cuda:<n>"; default: cuda where there is one.
    `precision`: "fp32", or "bf16" or "fp16" for backbone and head on a device that does it natively; anchors, scores and
    boxes are computed in fp32 always. The parity promise is for fp32.
    `min_size`, `max_size`, `image_mean`, `image_std`, `score_threshold`, `nms_threshold`, `max_detections` and
    `topk_candidates` mean what they mean in torchvision's FCOS. The first four are by default what the weights were
    trained with, where their file says so; the others, and all for torchvision's own weights, have torchvision's defaults.
    `max_micro_batch`: images in one forward pass at most; default 1 on a CPU, 16 on cuda. It changes speed, not results.
    `num_threads`: torch's threads in this process; default: leave them.

    Raises ConfigError for settings out of range and WeightsError for weights that cannot be used.
    """

    def __init__(
        self,
        weights: str | Weights = "COCO_V1",
        *,
        device: str | None = None,
        precision: str = "fp32",
        num_classes: int | None = None,
        categories: Sequence[str] | None = None,
        min_size: int | None = None,
        max_size: int | None = None,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        score_threshold: float = 0.2,
        nms_threshold: float = 0.6,
        max_detections: int = 100,
        topk_candidates: int = 1000,
        max_micro_batch: int | None = None,
        num_threads: int | None = None,
    ) -> None:
        self.device = pick_device(device)
        self.dtype = pick_precision(precision, self.device)
        self._limits: dict[str, Any] = {"max_detections": max_detections, "topk_candidates": topk_candidates}
        self._thresholds: dict[str, Any] = {"score_threshold": score_threshold, "nms_threshold": nms_threshold}
        channels: dict[str, Any] = {"image_mean": image_mean, "image_std": image_std}
        sizes: dict[str, Any] = {"min_size": min_size, "max_size": max_size}
        others: dict[str, Any] = {"max_micro_batch": max_micro_batch, "num_threads": num_threads}
        check_settings(counts={**sizes, **self._limits, **others}, shares=self._thresholds, channels=channels)
        if isinstance(weights, str):
            weights = load_weights(weights, num_classes=num_classes, categories=categories)
        elif num_classes is not None or categories is not None:
            raise ConfigError("num_classes and categories belong to load_weights when weights are given loaded")
        self.weights = weights
        inputs = weights.input_settings(**sizes, **channels)
        self.input_size: dict[str, int] = {name: inputs[name] for name in sizes}
        self.max_micro_batch = max_micro_batch or MAX_MICRO_BATCH[self.device.type]
        self._lowered: dict[Shape, int] = {}  # micro-batches that did not fit into memory, by padded shape
        # Post-processing waits for the device many times; on a stream of its own it waits for its micro-batch alone.
        self._beside: Any = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        if self.device.type == "cuda":
            # fp32 means fp32: cuDNN convolutions use TF32 by default, 10 bits of mantissa
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        model: Any = fold_batchnorm(build_model(weights, **inputs, **self._limits, **self._thresholds))
        self._mean = torch.tensor(model.transform.image_mean, device=self.device)[:, None, None]
        self._std = torch.tensor(model.transform.image_std, device=self.device)[:, None, None]
        if self.device.type == "cpu":
            quicken(model, self.dtype)
        # Weights in bf16 too, where autocast would convert them each time: 0.48 against 0.52 s per 640×480 image on 2 cores
        self._model = model.to(self.device, self.dtype, memory_format=torch.channels_last)

    @property
    def categories(self) -> tuple[str, ...]:
        """Names by label; 0 is the background."""
        return self.weights.categories

    def __call__(self, images: Sequence[NDArray[np.uint8] | Image | Tensor]) -> list[Detections]:
        """Detect in images of any sizes: RGB uint8 (H, W, 3) arrays, `Image`s, or torchvision's float (3, H, W) in 0–1.

        Raises ValueError for anything else, and DetectError for the first image that fails.
        """
        if isinstance(images, (np.ndarray, Tensor, Image)):
            raise ValueError(f"images must be a list of images, got a single {type(images).__name__}")
        results = []
        for result in self._detect([check_image(image, index) for index, image in enumerate(images)]):
            if isinstance(result, DetectError):
                raise result
            results.append(result)
        return results

    def detect(self, images: Sequence[Image]) -> list[Detections | DetectError]:
        """Detect in images of any sizes; an image that fails gives its error instead. The order is kept.

        An image may come already shrunk (`inputs.shrink`): it is not resized again. Boxes are in pixels of the image as
        seen, whichever size came. Raises ValueError for what is no image, or was shrunk to another detector's size.
        """
        return self._detect([check_image(image, index) for index, image in enumerate(images)])

    def finishing(self, image: Image) -> Callable[[], object]:
        """For measuring: what follows backbone and head on one image, as often as it is called."""
        given = self._input(image, 0)
        with torch.inference_mode():
            outputs = self._forward(self._prepare([given]))
        return torch.inference_mode()(lambda: self._finish(outputs, [given]))

    def _detect(self, images: Sequence[Image | Tensor]) -> list[Detections | DetectError]:
        results: dict[int, Detections | DetectError] = {}
        inputs: dict[int, _Input] = {}
        for index, image in enumerate(images):
            try:
                inputs[index] = self._input(image, index)
            except DetectError as error:
                results[index] = error
        indices = list(inputs)
        shapes = [inputs[index].padded for index in indices]
        plan = micro_batches(shapes, max_images=self.max_micro_batch, lowered=self._lowered)
        self._run([[indices[i] for i in batch] for batch in plan], inputs, results)
        return [results[index] for index in range(len(images))]

    def _input(self, image: Image | Tensor, index: int) -> _Input:
        seen = (image.shape[1], image.shape[2]) if isinstance(image, Tensor) else (image.height, image.width)
        resized, padded = resized_shape(*seen, **self.input_size), padded_shape(*seen, **self.input_size)
        pixels = image if isinstance(image, Tensor) else image.pixels
        if isinstance(pixels, np.ndarray) and pixels.shape[:2] not in (seen, resized):
            raise ValueError(
                f"images[{index}] is {seen[0]}×{seen[1]} (height × width) and was shrunk to "
                f"{pixels.shape[0]}×{pixels.shape[1]}; this detector wants it shrunk to {resized[0]}×{resized[1]} "
                f"(min_size={self.input_size['min_size']}, max_size={self.input_size['max_size']}), or not at all"
            )
        return _Input(pixels, seen, resized, padded)

    @torch.inference_mode()
    def _run(
        self, plan: list[list[int]], inputs: dict[int, _Input], results: dict[int, Detections | DetectError]
    ) -> None:
        """Run micro-batches. On cuda each is launched before the results of the one before are read."""
        running: _Launched | None = None
        launched: _Launched | None
        for batch in [*plan, None]:
            try:
                launched = None if batch is None else self._launch(batch, inputs)
                if running is not None:
                    self._collect(running, inputs, results)
                running = launched
                continue
            except torch.OutOfMemoryError:
                waiting = [running.batch if running else None, batch]
            # outside of the except block, so that nothing of what failed is held any more
            running = launched = None
            for part in waiting:
                if part and part[0] not in results:
                    self._run_alone(part, inputs, results)

    def _launch(self, batch: list[int], inputs: Mapping[int, _Input]) -> _Launched:
        outputs = self._forward(self._prepare([inputs[i] for i in batch]))
        done = None if self._beside is None else torch.cuda.current_stream(self.device).record_event()
        return _Launched(batch, outputs, done)

    def _collect(
        self, launched: _Launched, inputs: Mapping[int, _Input], results: dict[int, Detections | DetectError]
    ) -> None:
        """Read a launched micro-batch's results, which keeps this thread waiting until the device has them."""
        with torch.cuda.stream(self._beside) if launched.done else nullcontext():
            if launched.done:
                self._beside.wait_event(launched.done)
            found = self._finish(launched.outputs, [inputs[i] for i in launched.batch])
        results.update(zip(launched.batch, found, strict=True))

    def _run_alone(
        self, batch: list[int], inputs: dict[int, _Input], results: dict[int, Detections | DetectError]
    ) -> None:
        """One micro-batch with nothing beside it on the device; in halves when it does not fit."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            self._collect(self._launch(batch, inputs), inputs, results)
        except torch.OutOfMemoryError as error:
            reason = str(error).split("\n")[0]
        else:
            return
        shape, half = inputs[batch[0]].padded, len(batch) // 2
        if half == 0:
            message = f"{shape[0]}×{shape[1]} (padded height × width) does not fit alone on {self.device}: {reason}"
            results[batch[0]] = DetectError("out_of_memory", message)
            return
        self._lowered[shape] = min(self._lowered.get(shape, half), half)
        log.warning("out of memory with %d images of %d×%d: going on with %d at a time", len(batch), *shape, half)
        self._run_alone(batch[:half], inputs, results)
        self._run_alone(batch[half:], inputs, results)

    def _prepare(self, inputs: Sequence[_Input]) -> Tensor:
        """(N, 3, H, W) channels_last on the device: normalised, then resized, then padded, in torchvision's order."""
        height, width = inputs[0].padded
        batch = torch.zeros((len(inputs), height, width, 3), device=self.device).permute(0, 3, 1, 2)
        for row, image in zip(batch, inputs, strict=True):
            pixels = self._to_device(image.pixels)
            pixels = pixels.sub(self._mean).div_(self._std)
            if not image.is_resized:  # after normalising, as torchvision does
                pixels = interpolate(pixels[None], size=image.resized, mode="bilinear", align_corners=False)[0]
            row[:, : image.resized[0], : image.resized[1]].copy_(pixels)
        return batch

    def _to_device(self, pixels: NDArray[np.uint8] | Tensor) -> Tensor:
        """(3, H, W) float32 in 0–1."""
        if isinstance(pixels, Tensor):
            return pixels.to(self.device, torch.float32)
        # Copied into memory of torch's own: arrays out of Ray's object store are read-only, which torch cannot express.
        # Pinned, the copy to the device does not wait. Contiguous, what follows takes half a millisecond less.
        own = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        np.copyto(own.numpy(), pixels)
        return own.to(self.device, non_blocking=True).permute(2, 0, 1).contiguous().to(torch.float32).div_(255)

    def _forward(self, batch: Tensor) -> HeadOutputs:
        features = list(self._model.backbone(batch.to(self.dtype)).values())
        heads = {name: outputs.float() for name, outputs in self._model.head(features).items()}
        # Anchors take shape and type from the features, and bf16 counts pixels in eights above 1024: fp32 stand-ins.
        shapes = [batch.new_empty(()).expand(level.shape) for level in features]
        return HeadOutputs(
            **heads,
            anchors=self._model.anchor_generator(ImageList(batch, [batch.shape[-2:]]), shapes)[0],
            num_anchors_per_level=[level.shape[2] * level.shape[3] for level in features],
        )

    def _finish(self, outputs: HeadOutputs, inputs: Sequence[_Input]) -> list[Detections]:
        found = postprocess(outputs, [image.resized for image in inputs], **self._limits, **self._thresholds)
        return [_as_seen(f, image) for f, image in zip(found, inputs, strict=True)]


def _as_seen(found: Found, image: _Input) -> Detections:
    """Boxes in pixels of the image as seen."""
    height, width = image.seen
    scale_y, scale_x = np.array(image.seen, np.float32) / np.array(image.resized, np.float32)  # as resize_boxes has it
    boxes = found.boxes * np.array([scale_x, scale_y, scale_x, scale_y])
    np.minimum(boxes, np.array([width, height, width, height], np.float32), out=boxes)  # float32 rounds past it
    return Detections(boxes=boxes, labels=found.labels, scores=found.scores)
