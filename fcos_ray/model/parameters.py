"""Parameters: what a model holds and takes, written down, so that checking weights needs neither torch nor a model.

A job's driver checks weights before anything else; importing torch and torchvision for it took 3 to 6 seconds.
torchvision.json beside this file holds what torchvision's models say (tests/model/test_parameters.py compares, and makes it).
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fcos_ray.errors import ConfigError

INPUT_SETTINGS: Final = ("min_size", "max_size", "image_mean", "image_std")  # of an image on its way into the model
IMAGE_MEAN: Final = (0.485, 0.456, 0.406)  # of ImageNet, as torchvision's models take it: values in 0–1
IMAGE_STD: Final = (0.229, 0.224, 0.225)
INPUT_SIZES: Final = {  # min_size and max_size by architecture, where neither weights nor settings say otherwise
    "fcos_resnet50_fpn": (800, 1333),
    "fcos_mobilenet_v3_small_fpn": (320, 512),
}
DEFAULT_ARCHITECTURE: Final = "fcos_resnet50_fpn"


@functools.cache
def _said() -> dict[str, Any]:
    said: dict[str, Any] = json.loads(Path(__file__).with_name("torchvision.json").read_text())
    return said


def coco_v1() -> tuple[str, tuple[str, ...]]:
    """Where torchvision's trained weights are published, and the names of their labels."""
    return _said()["coco_v1"]["url"], tuple(_said()["coco_v1"]["categories"])


def input_settings(architecture: str, trained: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """INPUT_SETTINGS as asked (None: not), else as trained, else the architecture's own.

    Raises ConfigError when max_size is below min_size.
    """
    own = (*INPUT_SIZES[architecture], IMAGE_MEAN, IMAGE_STD)
    given = {name: value for name, value in asked.items() if value is not None}
    found = {**dict(zip(INPUT_SETTINGS, own, strict=True)), **trained, **given}
    if found["max_size"] < found["min_size"]:
        raise ConfigError(f"max_size must be at least min_size ({found['min_size']}), got {found['max_size']}")
    return found | {name: tuple(found[name]) for name in ("image_mean", "image_std")}  # lists, out of JSON


def parameter_shapes(architecture: str, num_classes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a state dict must hold; num_batches_tracked, which no prediction uses, is left out."""
    shapes: dict[str, list[int | None]] = _said()["parameters"][architecture]
    return {key: tuple(num_classes if n is None else n for n in shape) for key, shape in shapes.items()}


def random_state(architecture: str, num_classes: int, seed: int) -> dict[str, NDArray[np.float32]]:
    """A state dict of an untrained model that finds boxes, the same in every process."""
    shapes = parameter_shapes(architecture, num_classes)
    return {key: _random_parameter(key, shape, seed) for key, shape in shapes.items()}


def _random_parameter(key: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """One parameter, a function of its name, shape and seed alone; no global generator is touched.

    Scales keep activations near one through 50 layers. The head's last layers are set so that at a score threshold of
    0.2 photographs and drawings get dozens to hundreds of boxes, some strides wide (tests/model/test_weights.py).
    """
    rng = np.random.default_rng([seed, zlib.crc32(key.encode())])
    normal = rng.standard_normal(shape, dtype=np.float32)
    if key.endswith("running_var"):
        positive: NDArray[np.float32] = np.exp(0.2 * normal)
        return positive
    if len(shape) == 4:
        scale = np.float32(np.sqrt((1 if ".fpn." in key else 2) / np.prod(shape[1:])))
        if any(part in key for part in ("cls_logits", "bbox_reg.", "bbox_ctrness")):
            normal -= normal.mean(axis=(1, 2, 3), keepdims=True)  # else every place agrees on one class and one size
            scale *= np.float32(2)
        return normal * scale
    if key.endswith("weight"):  # of a norm; the residual branch's last one is small, else 16 blocks add up
        return ((0.3 if ".bn3." in key else 1) + 0.1 * normal).astype(np.float32)
    bias = {"cls_logits.bias": -6.2, "bbox_reg.bias": 3.0}
    return next((np.full(shape, value, np.float32) for end, value in bias.items() if key.endswith(end)), 0.1 * normal)


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """A model's parameters. Plain numpy, so that Ray's object store shares one copy among all actors of a node."""

    name: str  # what the user called it
    architecture: str  # a key of INPUT_SIZES
    sha256: str  # hex; of the file's bytes, for random weights of the tensors
    categories: tuple[str, ...]  # index = label, background first; as many as the model has classes
    state: dict[str, NDArray[np.float32]] = field(repr=False)  # without BatchNorm's num_batches_tracked
    trained_input: Mapping[str, Any] = field(default_factory=dict)  # what the file says of input_settings
    training: Mapping[str, Any] | None = None  # how it was trained, where the file says so

    @property
    def num_classes(self) -> int:
        """Classes of the model, background included."""
        return len(self.categories)

    def input_settings(self, **asked: Any) -> dict[str, Any]:
        """INPUT_SETTINGS as asked (None: not), as trained, or as the architecture has them. Raises ConfigError."""
        return input_settings(self.architecture, self.trained_input, asked)
