"""Fit: torchvision's losses, the recipe's schedule, resuming, and that it learns."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torchvision.models.detection import fcos_resnet50_fpn
from torchvision.ops import FrozenBatchNorm2d, box_iou

import fcos_ray.training.steps as steps
from fcos_ray.errors import ConfigError, WeightsError
from fcos_ray.inputs.decode import decode
from fcos_ray.model.detector import Detector
from fcos_ray.model.weights import load_weights
from fcos_ray.sample import CATEGORIES, write_sample
from fcos_ray.training.config import TrainConfig
from fcos_ray.training.dataset import Batches
from fcos_ray.training.fit import train
from fcos_ray.training.model import start_model
from fcos_ray.training.steps import LOSSES, learning_rate
from fcos_ray.training.truth import read_truth

SMALL = "fcos_mobilenet_v3_small_fpn"


@pytest.fixture(scope="module")
def annotations(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Eight drawn images and their truth."""
    folder = tmp_path_factory.mktemp("truth") / "sample"
    return write_sample(folder, num_images=8, num_broken=0, seed=5).annotations


def config(annotations: str, output: Path | str = "unused", **settings: Any) -> TrainConfig:
    small = {"architecture": SMALL, "min_size": 96, "max_size": 160, "warmup_steps": 2, "batch_size": 4, "epochs": 2}
    return TrainConfig(annotations=annotations, output=str(output), **small | settings)


@pytest.mark.parametrize("pretrained", [False, True])
def test_losses_equal_torchvisions_model_in_training_mode(annotations: str, tmp_path: Path, pretrained: bool) -> None:
    settings = {"architecture": "fcos_resnet50_fpn", "num_classes": 6, "center_sampling_radius": 2.0, "batch_size": 2}
    truth = read_truth(annotations)
    batch = Batches(truth.examples, batch_size=2, horizontal_flip=0.5, seed=3).batch(0)
    torch.manual_seed(0)
    torchvisions: Any = fcos_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=6,
        min_size=96,
        max_size=160,
        center_sampling_radius=2.0,
    )
    path = tmp_path / "start.pth"
    torch.save(torchvisions.state_dict(), path)
    if pretrained:
        settings["weights"] = str(path)
        freeze_norms(torchvisions)
    made = start_model(config(annotations, **settings)).build(read_truth(annotations))
    made.load_state_dict({k: v for k, v in torchvisions.state_dict().items() if k in made.state_dict()})
    images = [image.float() / 255 for image in batch.images]
    with torch.no_grad():
        wanted = torchvisions.train()(images, [dict(target) for target in batch.targets])
        got = made.train()(images, [dict(target) for target in batch.targets])
    assert set(got) == set(LOSSES)
    for name in LOSSES:
        assert abs(float(got[name]) - float(wanted[name])) <= 1e-6, name
        assert float(wanted[name]) > 0


def freeze_norms(model: torch.nn.Module) -> None:
    for parent in model.modules():
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.BatchNorm2d):
                frozen = FrozenBatchNorm2d(child.num_features)
                frozen.load_state_dict(child.state_dict())
                setattr(parent, name, frozen)


@pytest.mark.parametrize("layers", [None, 0, 2, 5])
def test_frozen_layers_are_torchvisions(annotations: str, tmp_path: Path, layers: int | None) -> None:
    path = tmp_path / "hub" / "checkpoints" / "resnet50-0676ba61.pth"
    torchvisions: Any = torchvision.models.resnet50()
    path.parent.mkdir(parents=True)
    torch.save(torchvisions.state_dict(), path)
    torch.hub.set_dir(str(tmp_path / "hub"))
    kind = {"weights_backbone": "IMAGENET1K_V1", "trainable_backbone_layers": layers}
    try:
        wanted = fcos_resnet50_fpn(**kind, num_classes=6)
        start = start_model(config(annotations, architecture="fcos_resnet50_fpn", **kind))
        made = start.build(read_truth(annotations))
    finally:
        torch.hub.set_dir(str(Path(torch.hub._get_torch_home()) / "hub"))
    assert learning(made) == learning(wanted)
    assert [type(m) for m in made.modules()] == [type(m) for m in wanted.modules()]
    key = "backbone.body.layer3.0.conv2.weight"
    assert torch.equal(made.state_dict()[key], wanted.state_dict()[key])


def learning(model: torch.nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def test_from_nothing_every_layer_learns_and_norms_are_batch_norms(annotations: str) -> None:
    for architecture in (SMALL, "fcos_resnet50_fpn"):
        made = start_model(config(annotations, architecture=architecture, trainable_backbone_layers=1)).build(
            read_truth(annotations)
        )
        assert all(learning(made).values())
        assert not any(isinstance(module, FrozenBatchNorm2d) for module in made.modules())


def test_stages_of_the_small_backbone_are_frozen_from_the_first(annotations: str, tmp_path: Path) -> None:
    weights = small_weights(annotations, tmp_path)
    frozen = []
    for layers in range(7):
        made = start_model(config(annotations, weights=weights, trainable_backbone_layers=layers)).build(
            read_truth(annotations)
        )
        parts = {name.split(".")[2] for name, learns in learning(made).items() if "body" in name and not learns}
        frozen.append(len(parts))
        assert parts == {str(part) for part in range(len(parts))}
        assert all(learns for name, learns in learning(made).items() if "body" not in name)
    assert frozen == [13, 12, 9, 4, 2, 1, 0]


def small_weights(annotations: str, folder: Path) -> str:
    if not (folder / "few" / "weights.safetensors").exists():
        train(config(annotations, folder / "few", epochs=1))
    return str(folder / "few" / "weights.safetensors")


def test_the_learning_rate_rises_in_a_line_and_falls_in_a_cosine(annotations: str) -> None:
    settings = config(annotations, warmup_steps=10, learning_rate=0.2)
    rates = [learning_rate(step, settings, 110) for step in range(111)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) * 0.02)
    np.testing.assert_allclose([rates[10], rates[35], rates[60], rates[110]], [0.2, 0.1707107, 0.1, 0], atol=1e-7)


def test_weights_say_how_they_came_about_and_detect_takes_them(annotations: str, tmp_path: Path) -> None:
    summary = train(config(annotations, tmp_path / "out"))
    weights = load_weights(summary.weights)
    assert weights.categories == ("__background__", *CATEGORIES)
    assert weights.architecture == SMALL
    assert (weights.trained_input["min_size"], weights.trained_input["max_size"]) == (96, 160)
    assert weights.training is not None
    assert weights.training["recipe"]["learning_rate"] == 0.005
    assert len(weights.training["data_sha256"]) == 64
    assert weights.training["steps"] == summary.steps == 4
    assert set(summary.losses) == set(LOSSES)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["recipe.json", "weights.safetensors"]
    [found] = Detector(weights, device="cpu", score_threshold=0.0)([np.zeros((80, 60, 3), np.uint8)])
    assert found.boxes.max() <= 80


def test_the_map_on_validation_truth_goes_into_the_weights(annotations: str, tmp_path: Path) -> None:
    summary = train(config(annotations, tmp_path / "out", val_annotations=annotations, score_threshold=0.0, epochs=1))
    assert set(summary.metrics) == {"mean_ap", "ap50", "ap75", "ar_100"}
    assert 0 <= (summary.metrics["mean_ap"] or 0) < 0.5
    training = load_weights(summary.weights).training
    assert training is not None
    assert training["metrics"] == summary.metrics


def test_a_training_that_was_killed_goes_on_and_comes_to_the_same_weights(
    annotations: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"save_every_steps": 2, "epochs": 3, "scale_jitter": (0.8, 1.2), "optimizer": "adamw"}
    undisturbed = load_weights(train(config(annotations, tmp_path / "whole", **settings)).weights)
    step, taken = steps.Fitting._step, []

    def die_after_three(self: Any, batch: Any) -> Any:
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(1)
        return step(self, batch)

    monkeypatch.setattr(steps.Fitting, "_step", die_after_three)
    with pytest.raises(KeyboardInterrupt):
        train(config(annotations, tmp_path / "killed", **settings))
    assert [path.name for path in (tmp_path / "killed").glob("*.pt")] == ["state-000000002.pt"]
    monkeypatch.undo()
    with caplog.at_level(logging.INFO):
        summary = train(config(annotations, tmp_path / "killed", **settings))
    assert "going on after step 2 of 6" in caplog.text
    again = load_weights(summary.weights)
    assert all(np.array_equal(again.state[key], value) for key, value in undisturbed.state.items())
    assert again.training == undisturbed.training


def test_a_finished_training_is_not_repeated_and_another_is_refused(annotations: str, tmp_path: Path) -> None:
    first = train(config(annotations, tmp_path / "out", epochs=1))
    written = (tmp_path / "out" / "weights.safetensors").stat().st_mtime_ns
    assert train(config(annotations, tmp_path / "out", epochs=1, num_threads=1)).losses == first.losses
    assert (tmp_path / "out" / "weights.safetensors").stat().st_mtime_ns == written
    with pytest.raises(
        ConfigError, match=r"another training \(epochs: it has 1, asked was 2; seed: it has 0, asked was 4"
    ):
        train(config(annotations, tmp_path / "out", epochs=2, seed=4))
    other = Path(annotations).with_name("other.json")
    truth = json.loads(Path(annotations).read_text())
    truth["annotations"].pop()
    other.write_text(json.dumps(truth))
    with pytest.raises(ConfigError, match="data_sha256: it has"):
        train(config(str(other), tmp_path / "out", epochs=1))


def test_starting_from_weights_keeps_their_labels_or_makes_a_new_classification_layer(
    annotations: str, tmp_path: Path
) -> None:
    weights = small_weights(annotations, tmp_path)
    truth = read_truth(annotations)
    kept = start_model(config(annotations, weights=weights))
    some = replace(truth, categories=("star", "circle"), examples=())
    assert kept.labelled(some).categories == CATEGORIES
    assert kept.labelled(replace(truth, categories=("star", "moon"))).categories == ("star", "moon")
    made = kept.build(kept.labelled(truth)).state_dict()
    before = load_weights(weights).state
    assert all(np.array_equal(made[key], value) for key, value in before.items())
    wider = start_model(config(annotations, weights=weights, num_classes=9))
    assert wider.labelled(some).categories == ("star", "circle")
    assert wider.label_names(truth)[-4:] == ("cross", "N/A", "N/A", "N/A")
    made = wider.build(truth).state_dict()
    new = {key for key, value in before.items() if not np.array_equal(made[key], value)}
    assert new == LABEL_LAYER


LABEL_LAYER = {f"head.classification_head.cls_logits.{part}" for part in ("weight", "bias")}


def test_labels_that_the_weights_lack_get_a_new_layer_also_when_their_number_agrees(
    annotations: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = small_weights(annotations, tmp_path)
    truth = replace(read_truth(annotations), categories=("star", "circle", "moon", "sun", "cross"))
    start = start_model(config(annotations, weights=weights))
    caplog.clear()
    made = start.build(start.labelled(truth)).state_dict()
    before = load_weights(weights).state
    assert {key for key, value in before.items() if not np.array_equal(made[key], value)} == LABEL_LAYER
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the classification layer is made anew, since they lack moon, sun" in caplog.text


def test_under_autocast_anchors_are_those_of_fp32(annotations: str) -> None:
    settings = {"min_size": 32, "max_size": 1333}
    model: Any = start_model(config(annotations, **settings)).build(read_truth(annotations)).train()
    seen: list[torch.Tensor] = []
    model.anchor_generator.register_forward_hook(lambda _module, _inputs, anchors: seen.append(anchors[0]))
    target = {"boxes": torch.tensor([[3.0, 3, 20, 20]]), "labels": torch.tensor([1])}
    images = [torch.rand(3, 32, 1333), torch.rand(3, 32, 1333)]
    for is_bf16 in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            model(images, [target, target])
    assert seen[0].dtype == seen[1].dtype == torch.float32
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "yolo"}, "architecture must be one of fcos_resnet50_fpn, fcos_mobilenet_v3_small_fpn"),
        ({"weights_backbone": "IMAGENET9"}, "weights_backbone must be one of IMAGENET1K_V1, DEFAULT, got 'IMAGENET9'"),
        ({"trainable_backbone_layers": 7}, "trainable_backbone_layers must be 0 to 6"),
        ({"num_classes": 3}, r"num_classes must be at least 6 \(the truth's categories and background\), got 3"),
        ({"min_size": 300, "max_size": None}, None),
        ({"min_size": 300, "max_size": 200}, "max_size must be at least min_size"),
        ({"weights": "random:1", "weights_backbone": "IMAGENET1K_V1"}, "exclude each other"),
        ({"weights": "random:1"}, "are for fcos_resnet50_fpn, architecture is fcos_mobilenet_v3_small_fpn"),
        ({"scale_jitter": (1.2, 0.8)}, "scale_jitter wants the smaller factor first"),
        ({"learning_rate": 1e30}, "the loss is .*try a lower learning_rate .* and another --output"),
        ({"image_std": (0.2, 0.0, 0.2)}, "image_std must be above 0, got"),
        ({"image_mean": (0.2, float("nan"), 0.2)}, "image_mean must be three numbers"),
        ({"seed": 2**31 + 1}, "seed should be less than or equal to 2147483648"),
        ({"images": ""}, "images should have at least 1 character"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    annotations: str, tmp_path: Path, settings: dict[str, Any], message: str | None
) -> None:
    if message is None:
        assert start_model(config(annotations, **settings)).input["max_size"] == 512
        return
    with pytest.raises(ConfigError, match=message):
        train(config(annotations, tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists() or "learning_rate" in settings  # what is refused claims nothing


def test_a_backbone_that_is_not_there_says_where_to_put_it(
    annotations: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(WeightsError, match=r"Put https://.*mobilenet_v3_small-.*\.pth into .*checkpoints"):
        start_model(config(annotations, weights_backbone="IMAGENET1K_V1")).build(read_truth(annotations))


def test_a_damaged_backbone_file_is_named(annotations: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    kept = tmp_path / "hub" / "checkpoints" / "mobilenet_v3_small-047dcff4.pth"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"PK" + bytes(200))
    with pytest.raises(WeightsError, match=r"cannot be downloaded to torch.hub's cache or loaded from it"):
        start_model(config(annotations, weights_backbone="IMAGENET1K_V1")).build(read_truth(annotations))


def test_eight_images_are_learnt_by_heart(annotations: str, tmp_path: Path) -> None:
    """Each loss falls and the boxes are found. AP50 is 0.96, as after 120 epochs at a rate of 2e-3."""
    settings = {"min_size": 192, "max_size": 288, "batch_size": 8, "optimizer": "adamw", "learning_rate": 5e-3}
    first = train(config(annotations, tmp_path / "first", **settings | {"epochs": 1})).losses
    last = train(
        config(
            annotations,
            tmp_path / "last",
            **settings | {"epochs": 80, "warmup_steps": 8, "horizontal_flip": 0.0, "val_annotations": annotations},
        )
    )
    for name, factor in (("classification", 0.3), ("bbox_regression", 0.6), ("bbox_ctrness", 0.99)):
        assert last.losses[name] < factor * first[name], name
    truth = read_truth(annotations)
    detector = Detector(last.weights, device="cpu", score_threshold=0.1)
    assert (last.metrics["ap50"] or 0) > 0.8
    found = 0
    for example in truth.examples:
        pixels = decode(Path(example.uri).read_bytes()).pixels
        [d] = detector([pixels])
        for box, label in zip(example.boxes, example.labels, strict=True):
            same = torch.from_numpy(d.boxes[d.labels == label])
            found += bool(len(same) and box_iou(torch.from_numpy(box)[None], same).max() > 0.5)
    assert found >= 0.8 * truth.counts.objects
