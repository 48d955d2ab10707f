from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from fcos_ray.model.parameters import Weights
from fcos_ray.model.weights import load_weights
from fcos_ray.types import Detections
from tests.parity import from_torchvision
from tests.torchvision_model import torchvision_model

# Two threads that wait for each other on a busy machine are much slower than one: tests here took 5 times as long.
torch.set_num_threads(1)

Reference = Callable[[Any], Detections]  # uint8 (H, W, 3) or float (3, H, W) -> what torchvision finds in it alone


@pytest.fixture(scope="session")
def weights() -> Weights:
    return load_weights("random:1")


@pytest.fixture(scope="session")
def make_reference(weights: Weights) -> Callable[..., Reference]:
    """torchvision's own model, fed one image at a time."""

    def make(norm_layer: Callable[..., nn.Module] = FrozenBatchNorm2d, **settings: Any) -> Reference:
        model = torchvision_model(weights, norm_layer, **settings)

        def detect(image: Any) -> Detections:
            if isinstance(image, np.ndarray):
                image = torch.from_numpy(image).permute(2, 0, 1) / 255
            with torch.inference_mode():
                return from_torchvision(model([image])[0])

        return detect

    return make
