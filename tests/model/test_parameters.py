"""What is written down of torchvision's models is what they say. `python tests/model/test_parameters.py` writes it again."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.models.detection import FCOS_ResNet50_FPN_Weights

import fcos_ray.model
from fcos_ray.model.architectures import ARCHITECTURES
from fcos_ray.model.parameters import INPUT_SIZES, coco_v1, parameter_shapes
from fcos_ray.model.weights import save_weights

WRITTEN = Path(fcos_ray.model.__file__).with_name("torchvision.json")


def shapes(architecture: str, num_classes: int) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        state = ARCHITECTURES[architecture].build(num_classes).state_dict()
    return {key: tuple(value.shape) for key, value in state.items() if not key.endswith("num_batches_tracked")}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("num_classes", [2, 91])
def test_shapes_are_those_of_the_model_that_is_built(architecture: str, num_classes: int) -> None:
    assert parameter_shapes(architecture, num_classes) == shapes(architecture, num_classes)
    assert set(ARCHITECTURES) == set(INPUT_SIZES)


def test_the_published_weights_are_torchvisions() -> None:
    published = FCOS_ResNet50_FPN_Weights.COCO_V1
    assert coco_v1() == (published.url, tuple(published.meta["categories"]))


@pytest.mark.parametrize("weights", ["sample", "random:1", "file"])
def test_weights_are_checked_without_torch(weights: str, tmp_path: Path) -> None:
    """A driver starts some seconds sooner."""
    if weights == "file":
        weights = str(tmp_path / "w.safetensors")
        state = {key: np.zeros(shape, np.float16) for key, shape in parameter_shapes("fcos_resnet50_fpn", 3).items()}
        save_weights(weights, state, architecture="fcos_resnet50_fpn", categories=["a", "b"])
    code = f"""
import sys
import fcos_ray.job
from fcos_ray.model.weights import load_weights
load_weights({weights!r})
assert not {{"torch", "torchvision"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def _write() -> None:
    published = FCOS_ResNet50_FPN_Weights.COCO_V1
    parameters: dict[str, Any] = {}
    for name in ARCHITECTURES:
        two, three = shapes(name, 2), shapes(name, 3)
        parameters[name] = {
            key: [n if n == m else None for n, m in zip(shape, three[key], strict=True)] for key, shape in two.items()
        }
    said = {"coco_v1": {"url": published.url, "categories": published.meta["categories"]}, "parameters": parameters}
    text = json.dumps(said, ensure_ascii=False, indent=1)
    # a list on one line
    text = re.sub(r"\[[^\[\]]*\]", lambda found: json.dumps(json.loads(found[0]), ensure_ascii=False), text)
    WRITTEN.write_text(text + "\n")


if __name__ == "__main__":
    _write()
