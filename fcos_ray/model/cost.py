"""Cost: what a detector takes, and how near it comes to what its device can do. Knows torch, neither files nor Ray."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from fcos_ray.model.architectures import ARCHITECTURES
from fcos_ray.model.detector import Detector
from fcos_ray.model.parameters import Weights
from fcos_ray.sizes import Shape, padded_shape
from fcos_ray.types import Image

_MATMUL_SIDE: Final = 2048
_SECONDS: Final = 1.0  # of each measurement, and once at least


@dataclass(frozen=True, slots=True)
class ModelFigures:
    """One detector's model on one image's padded shape."""

    padded_height: int
    padded_width: int
    multiply_adds: int  # of backbone and head, one image, as torchvision's layers say
    share_of_matmul: float  # multiply-adds a second ÷ those of a square product on the same device, in the same type
    peak_memory_bytes: int  # on cuda what torch held there at most; on a CPU what the process did
    images_per_second: dict[int, float]  # by micro-batch, of copies of one image; as far as they fitted


def model_figures(detector: Detector, image: Image) -> ModelFigures:
    """Measure one detector; its micro-batches go up in powers of two to its largest, which is what they are put back to."""
    sizes = detector.input_size
    padded = padded_shape(image.height, image.width, **sizes)
    largest, rates = detector.max_micro_batch, {}
    size = 1
    while size <= largest:
        detector.max_micro_batch = size
        rates[size] = size / _seconds(lambda: detector.detect([image] * size))  # noqa: B023 - called at once
        size *= 2
    detector.max_micro_batch = largest
    count = multiply_adds(detector.weights, padded)
    return ModelFigures(
        padded_height=padded[0],
        padded_width=padded[1],
        multiply_adds=count,
        share_of_matmul=count * max(rates.values()) / _matmul_rate(detector),
        peak_memory_bytes=_peak_memory(detector.device),
        images_per_second=rates,
    )


def multiply_adds(weights: Weights, padded: Shape) -> int:
    """Of backbone and head, for one image of this (height, width); biases, activations and resizing do not count."""
    with torch.device("meta"):  # counts without computing
        model: Any = ARCHITECTURES[weights.architecture].build(weights.num_classes).eval()
        counter = FlopCounterMode(display=False)
        with counter, torch.inference_mode():
            model.head(list(model.backbone(torch.empty(1, 3, *padded)).values()))
    return int(counter.get_total_flops()) // 2


def _matmul_rate(detector: Detector) -> float:
    """Multiply-adds a second of a square matrix product."""
    values = torch.randn(_MATMUL_SIDE, _MATMUL_SIDE, device=detector.device).to(detector.dtype)

    def multiply() -> None:
        product = values @ values
        product[0, 0].item()  # waits for the device

    return _MATMUL_SIDE**3 / _seconds(multiply)


def _seconds(call: Callable[[], object]) -> float:
    """The best of as many calls as _SECONDS hold: nothing makes a computer faster than it is. The first does not count."""
    call()
    taken: list[float] = []
    while sum(taken) < _SECONDS:
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return float(np.min(taken))


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
