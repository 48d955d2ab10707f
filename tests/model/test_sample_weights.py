"""The weights in the package: small, explained, and they detect."""

from __future__ import annotations

import tomllib
from pathlib import Path

import fcos_ray
from fcos_ray.model.detector import Detector
from fcos_ray.model.weights import load_weights
from fcos_ray.sample import CATEGORIES, write_sample
from fcos_ray.training.config import TrainConfig
from fcos_ray.training.measure import measure, read_validation

SAMPLE = Path(fcos_ray.__file__).parent / "model" / "sample"


def test_they_are_small_and_say_what_they_are() -> None:
    assert (SAMPLE / "weights.safetensors").stat().st_size < 8 * 10**6
    weights = load_weights("sample")
    assert weights.name == "sample"
    assert weights.architecture == "fcos_mobilenet_v3_small_fpn"
    assert weights.categories == ("__background__", *CATEGORIES)
    detector = Detector(weights, device="cpu")
    assert detector.categories == weights.categories


def test_they_were_made_by_the_recipe_beside_them() -> None:
    asked = TrainConfig(annotations="a", output="o", **tomllib.loads((SAMPLE / "recipe.toml").read_text())).recipe()
    training = load_weights("sample").training
    assert training is not None
    assert {name: training["recipe"][name] for name, value in asked.items() if value is not None} == {
        name: value for name, value in asked.items() if value is not None
    }
    assert training["counts"]["images"] == 6000


def test_their_map_on_200_unseen_drawings_is_at_least_three_quarters(tmp_path: Path) -> None:
    truth = write_sample(tmp_path / "val", num_images=200, num_broken=0, seed=2000).annotations
    weights = load_weights("sample")
    validation = read_validation(truth, images=None, categories=weights.categories)
    found = measure(weights, validation, TrainConfig(annotations="-", output="-", score_threshold=0.05))
    assert (found["mean_ap"] or 0) >= 0.75
