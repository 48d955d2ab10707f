from __future__ import annotations

import hashlib
import io
import logging
import os
import pickle
import random
import struct
import subprocess
import sys
import tempfile
import urllib.error
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torchvision.models.detection import FCOS_ResNet50_FPN_Weights, fcos_resnet50_fpn

from fcos_ray.errors import ConfigError, WeightsError
from fcos_ray.model import weights as weights_module
from fcos_ray.model.architectures import build_model, fold_batchnorm
from fcos_ray.model.detector import Detector
from fcos_ray.model.parameters import IMAGE_MEAN, IMAGE_STD, Weights, coco_v1, parameter_shapes
from fcos_ray.model.weights import BACKGROUND, load_weights, save_weights
from tests.model.images import noise, shapes

COCO = FCOS_ResNet50_FPN_Weights.COCO_V1
EXECUTED = Path(tempfile.gettempdir()) / f"executed-{os.getpid()}"  # what a pickle that runs leaves behind
SAMPLE = Path(weights_module.__file__).parent / "sample" / "weights.safetensors"


def tensors(weights: Weights) -> dict[str, torch.Tensor]:
    return {key: torch.tensor(value) for key, value in weights.state.items()}


def as_pth(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def as_old_pth(content: Any) -> bytes:
    """As torch wrote before 1.6: no zip file, pickles one after the other."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def same_state(one: Weights, two: Weights) -> bool:
    return one.state.keys() == two.state.keys() and all(np.array_equal(one.state[k], two.state[k]) for k in one.state)


@pytest.fixture(scope="module")
def few() -> Weights:
    return load_weights("random:5", num_classes=4, categories=["cat", "dog", "cow"])


@pytest.fixture(scope="module")
def pth(few: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "few.pth"
    path.write_bytes(as_pth(tensors(few)))
    return path


# random


def test_random_weights_are_the_same_in_every_process_and_leave_every_global_generator_alone(few: Weights) -> None:
    code = """
from fcos_ray.model.weights import load_weights
print(load_weights("random:5", num_classes=4).sha256)
"""
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert other.stdout.strip() == few.sha256
    before = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    assert load_weights("random:6", num_classes=4).sha256 != few.sha256
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()


def test_random_weights_have_cocos_categories_unless_told_otherwise(weights: Weights, few: Weights) -> None:
    assert weights.categories == tuple(COCO.meta["categories"])
    assert few.categories == (BACKGROUND, "cat", "dog", "cow")
    assert few.num_classes == 4
    for categories in (["cat", "dog"], [BACKGROUND, "cat", "dog"]):
        assert load_weights("random:0", categories=categories).categories == (BACKGROUND, "cat", "dog")
    assert load_weights("random:0", num_classes=3).categories == (BACKGROUND, "class_1", "class_2")


@pytest.mark.parametrize("seed", [0, 7])
def test_random_weights_find_dozens_of_boxes_in_ordinary_images(seed: int) -> None:
    detector = Detector(f"random:{seed}", device="cpu", min_size=320, max_size=533, max_detections=10**4)
    for image in (shapes(480, 640), noise(400, 400)):
        [found] = detector([image])
        sides = found.boxes[:, 2:] - found.boxes[:, :2]
        assert 24 <= len(found.scores) <= 2500
        assert len(set(found.labels)) >= 5
        assert 20 < np.median(sides) < 400


@pytest.mark.parametrize("seed", ["", "x", "-1", "1.5", "1_0", "²"])
def test_a_malformed_seed_is_refused(seed: str) -> None:
    with pytest.raises(WeightsError, match=r"wanted random:<seed> with a whole number from 0, got"):
        load_weights(f"random:{seed}")


def test_random_weights_need_a_class_beside_the_background() -> None:
    with pytest.raises(WeightsError, match="num_classes of 2 or more"):
        load_weights("random:0", num_classes=1)


# files


def test_a_state_dict_is_loaded_bare_or_under_model_and_from_a_file_uri(few: Weights, pth: Path) -> None:
    bare = load_weights(str(pth))
    assert same_state(bare, few)
    assert bare.name == str(pth)
    assert bare.architecture == "fcos_resnet50_fpn"
    assert bare.sha256 == hashlib.sha256(pth.read_bytes()).hexdigest()
    assert bare.categories == (BACKGROUND, "class_1", "class_2", "class_3")
    assert same_state(load_weights(pth.as_uri()), few)
    wrapped = pth.with_name("wrapped.pt")
    wrapped.write_bytes(as_pth({"model": tensors(few), "epoch": 3}))
    assert same_state(load_weights(str(wrapped), num_classes=4), few)


@pytest.mark.parametrize("categories", [["cat", "dog", "cow"], ["nothing", "cat", "dog", "cow"]])
def test_categories_may_come_with_the_background_or_without(pth: Path, categories: list[str]) -> None:
    found = load_weights(str(pth), categories=categories).categories
    assert found == (categories[0] if len(categories) == 4 else BACKGROUND, "cat", "dog", "cow")


def test_a_file_torchvision_made_with_batch_norm_2d_gives_the_same_model_folded(tmp_path: Path) -> None:
    torchvisions = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3, min_size=96, max_size=160)
    for module in torchvisions.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    path = tmp_path / "fresh.pth"
    path.write_bytes(as_pth(torchvisions.state_dict()))
    assert any(key.endswith("num_batches_tracked") for key in torchvisions.state_dict())
    weights = load_weights(str(path))
    model = build_model(
        weights,
        min_size=96,
        max_size=160,
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
        score_threshold=0.2,
        nms_threshold=0.6,
        max_detections=100,
        topk_candidates=1000,
    )
    image = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted, got = torchvisions.eval().backbone(image), model.backbone(image)
        folded = fold_batchnorm(model)
        assert not any("BatchNorm" in type(module).__name__ for module in folded.modules())
        for level in wanted:
            torch.testing.assert_close(got[level], wanted[level], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(folded.backbone(image)[level], wanted[level], rtol=1e-4, atol=1e-4)


def test_our_safetensors_explain_themselves(few: Weights, tmp_path: Path) -> None:
    path = str(tmp_path / "few.safetensors")
    kind = {"architecture": few.architecture, "categories": few.categories}
    trained_input = {"min_size": 256, "max_size": 512}
    save_weights(path, few.state, **kind, trained_input=trained_input, training={"steps": 3})
    loaded = load_weights(path)
    assert same_state(loaded, few)
    assert loaded.categories == few.categories
    assert (loaded.trained_input, loaded.training) == (trained_input, {"steps": 3})
    assert loaded.sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert load_weights(path, categories=["a", "b", "c"]).categories == (BACKGROUND, "a", "b", "c")
    save_weights(
        path, tensors(few), **kind, trained_input=trained_input, training={"steps": 3}
    )  # the same again is no conflict
    with pytest.raises(WeightsError, match="exists and holds something else"):
        save_weights(path, few.state, **kind)


def test_weights_of_a_training_that_never_took_a_step_are_refused(few: Weights, tmp_path: Path) -> None:
    path = str(tmp_path / "untrained.safetensors")
    kind = {"architecture": few.architecture, "categories": few.categories}
    save_weights(path, few.state, **kind, training={"steps": 0})
    with pytest.raises(WeightsError, match=r"are untrained .*random:<seed>"):
        load_weights(path)


def test_the_inputs_size_is_as_asked_else_as_trained_else_the_architectures(few: Weights) -> None:
    trained = replace(few, trained_input={"min_size": 256, "max_size": 512})
    assert few.input_settings()["min_size"] == 800
    assert few.input_settings()["image_mean"] == IMAGE_MEAN
    assert trained.input_settings() == few.input_settings() | {"min_size": 256, "max_size": 512}
    assert trained.input_settings(min_size=300, max_size=None)["min_size"] == 300
    with pytest.raises(ConfigError, match=r"max_size must be at least min_size \(600\), got 512"):
        trained.input_settings(min_size=600)


def test_a_model_of_another_dtype_is_loaded_as_float32(few: Weights, tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):  # numpy has no bfloat16
        halves = {key: tensor.to(dtype) for key, tensor in tensors(few).items()}
        files = {"half.pth": as_pth(halves), "half.safetensors": safetensors.torch.save(halves)}
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
            loaded = load_weights(str(tmp_path / name)).state
            for key, wanted in halves.items():
                assert loaded[key].dtype == np.float32
                assert np.array_equal(loaded[key], wanted.float().numpy()), key


def test_weights_travel_through_pickle_without_copying_their_arrays(few: Weights) -> None:
    buffers: list[pickle.PickleBuffer] = []
    small = pickle.dumps(few, protocol=5, buffer_callback=buffers.append)
    assert len(small) < 200_000
    assert same_state(pickle.loads(small, buffers=buffers), few)
    frozen = pickle.loads(small, buffers=[bytes(buffer) for buffer in buffers])  # read-only, as in Ray's object store
    assert not next(iter(frozen.state.values())).flags.writeable
    Detector(frozen, device="cpu", min_size=32, max_size=32)([shapes(32, 32)])


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {EXECUTED}",)


def broken_files(few: Weights) -> dict[str, tuple[bytes, str]]:
    state = tensors(few)
    key = "backbone.body.conv1.weight"
    return {
        "empty.pth": (b"", "cannot be loaded as a state dict"),
        "text.pth": (b"this is not a checkpoint at all", "cannot be loaded as a state dict"),
        "cut.pth": (as_pth(state)[:100_000], "cannot be loaded as a state dict"),
        "evil.pth": (as_pth({"a": Evil()}), "cannot be loaded as a state dict: Weights only load failed"),
        "plain.pth": (
            pickle.dumps({"a": Evil()}, protocol=2),
            "cannot be loaded as a state dict: Weights only load failed",
        ),
        "old.pth": (as_old_pth({"a": Evil()}), "cannot be loaded as a state dict: Weights only load failed"),
        "plain.safetensors": (pickle.dumps({"a": Evil()}, protocol=2), "are no safetensors file of ours"),
        "zip.safetensors": (as_pth({"a": Evil()}), "are no safetensors file of ours"),
        "evil.pkl": (pickle.dumps(Evil()), "are unknown: wanted COCO_V1, sample, random:<seed>, or the path or uri"),
        "list.pth": (as_pth([1, 2]), "hold no state dict: wanted a dict of tensors .* got a list"),
        "counter.pth": (as_pth({"epoch": 3}), "got a dict with 'epoch'"),
        "backbone.pth": (
            as_pth({"conv1.weight": torch.zeros(1), "fc.weight": torch.zeros(1)}),
            "are a classifier's, a backbone that cannot detect yet: .*--weights-backbone",
        ),
        "nothing.pth": (as_pth({}), "do not fit fcos_resnet50_fpn: .* missing: backbone.body.conv1.weight, "),
        "missing.pth": (as_pth({k: v for k, v in state.items() if k != key}), f"1 missing: {key}$"),
        "extra.pth": (as_pth({**state, "a": torch.zeros(1)}), "do not fit fcos_resnet50_fpn: 1 unexpected: a$"),
        "shape.pth": (
            as_pth({**state, key: torch.zeros(2, 3)}),
            r"1 of another shape: .* \(2, 3\) instead of \(64, 3,",
        ),
        "deep.safetensors": (struct.pack("<Q", 200_000) + b"[" * 200_000, "are no safetensors file of ours"),
        "deep-inside.safetensors": (
            safetensors.torch.save(state, {"fcos_ray": '{"categories":' + "[" * 200_000}),
            "are no safetensors file of ours",
        ),
        "text.safetensors": (b"this is not a safetensors file", "are no safetensors file of ours"),
        "weights.onnx": (b"", "are unknown: wanted COCO_V1, sample, random:<seed>, or the path or uri"),
    }


def test_every_broken_file_is_refused_with_what_is_wrong_and_nothing_is_executed(few: Weights, tmp_path: Path) -> None:
    EXECUTED.unlink(missing_ok=True)
    for name, (data, message) in broken_files(few).items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(WeightsError, match=message):
            load_weights(str(path))
    assert not EXECUTED.exists()
    pickle.loads(pickle.dumps(Evil()))
    assert EXECUTED.exists(), "it would have been seen"
    EXECUTED.unlink()


def test_weights_of_the_wanted_hash_are_loaded_and_others_are_not_even_parsed(
    few: Weights, pth: Path, tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = str(tmp_path / "few.safetensors")
    save_weights(ours, few.state, architecture=few.architecture, categories=few.categories)
    hub.mkdir(parents=True)
    (hub / "fcos_resnet50_fpn_coco-99b0c9b7.pth").write_bytes(pth.read_bytes())
    hashes = {
        spec: hashlib.sha256(path.read_bytes()).hexdigest()
        for spec, path in {str(pth): pth, ours: Path(ours), "sample": SAMPLE, "COCO_V1": pth}.items()
    }
    for spec in (str(pth), ours, "sample"):
        assert load_weights(spec, sha256=hashes[spec].upper()).sha256 == hashes[spec]
    with pytest.raises(
        WeightsError, match="4 classes: wanted 3 categories"
    ):  # the hash fits: only what it holds does not
        load_weights("COCO_V1", sha256=hashes["COCO_V1"])
    for parser in ("torch.load", "safetensors.torch.load"):
        monkeypatch.setattr(parser, never)
    for spec, found in hashes.items():
        with pytest.raises(WeightsError, match=f"have the sha256 {found}, wanted {'0' * 64}: get the file again"):
            load_weights(spec, sha256="0" * 64)


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("the bytes were parsed")


def test_a_hash_for_weights_without_a_file_is_refused() -> None:
    with pytest.raises(WeightsError, match="random:1 are drawn here and have no file whose sha256 could be 000"):
        load_weights("random:1", sha256="0" * 64)


def test_damaged_files_never_raise_anything_but_a_weights_error(pth: Path, tmp_path: Path) -> None:
    data = pth.read_bytes()
    head, tail = data[:4000], data[-30000:]  # the pickle and the directory of the zip file
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.pth"
    for _ in range(60):
        damaged = bytearray(head + tail)
        for place in rng.integers(0, len(damaged), 20):
            damaged[place] = rng.integers(0, 256)
        path.write_bytes(bytes(damaged))
        with pytest.raises(WeightsError):
            load_weights(str(path))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("/no/such/folder/model.pth", "weights /no/such/folder/model.pth do not exist: wanted COCO_V1, sample, random"),
        ("s3://user:secret@bucket/model.pth", "cannot be read: InvalidUri"),
        ("https://user:secret@host/model.pth", r"weights https://host/model\.pth cannot be read: InvalidUri"),
        ("s3://key:sec/ret@bucket/model.pth", r"weights s3://bucket/model\.pth cannot be read: InvalidUri"),
        ("https://host/model.pth?X-Amz-Signature=secret", r"weights 'https://host/model\.pth\?…' are unknown"),
        ("COCO_V2", "weights 'COCO_V2' are unknown: wanted COCO_V1"),
        ("IMAGENET1K_V1", "weights 'IMAGENET1K_V1' are a classifier's, .*--weights-backbone"),
        ("", "weights '' are unknown"),
    ],
)
def test_what_cannot_be_found_is_said_to_be_so(spec: str, message: str) -> None:
    with pytest.raises(WeightsError, match=message) as caught:
        load_weights(spec)
    assert "ret" not in str(caught.value)


def test_wrong_numbers_of_classes_and_categories_are_refused(pth: Path) -> None:
    with pytest.raises(WeightsError, match="have 4 classes with the background, but num_classes is 91"):
        load_weights(str(pth), num_classes=91)
    message = r"have 4 classes: wanted 3 categories \(or 4 with the background first\), got 2"
    with pytest.raises(WeightsError, match=message):
        load_weights(str(pth), categories=["cat", "dog"])


def test_an_unknown_architecture_is_refused(few: Weights, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="are for 'yolo', known are: fcos_resnet50_fpn"):
        save_weights(str(tmp_path / "a.safetensors"), few.state, architecture="yolo", categories=few.categories)


# COCO_V1, without a network: a file of ours stands in for torchvision's


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints"


def test_coco_v1_is_read_from_torch_hubs_cache(hub: Path, weights: Weights, caplog: pytest.LogCaptureFixture) -> None:
    data = as_pth(tensors(weights))
    sha256 = hashlib.sha256(data).hexdigest()
    hub.mkdir(parents=True)
    (hub / "fcos_resnet50_fpn_coco-99b0c9b7.pth").write_bytes(data)
    for spec in ("COCO_V1", "DEFAULT"):
        loaded = load_weights(spec)
        assert (loaded.name, loaded.sha256) == ("COCO_V1", sha256)
        assert loaded.categories == tuple(COCO.meta["categories"])
        assert same_state(loaded, weights)
    # torch.hub checks downloads only and takes cached files as they are: so do we, but not silently
    assert "is not the file torchvision published (its sha256 does not begin with 99b0c9b7)" in caplog.text
    with pytest.raises(WeightsError, match="have 91 classes with the background, but num_classes is 4"):
        load_weights("COCO_V1", num_classes=4)


@pytest.mark.parametrize("honest", [True, False])
def test_coco_v1_is_downloaded_once_and_its_hash_is_checked(
    hub: Path,
    weights: Weights,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    honest: bool,
) -> None:
    data = as_pth(tensors(weights))
    prefix = hashlib.sha256(data).hexdigest()[:8] if honest else "0" * 8
    served = tmp_path / f"fcos-{prefix}.pth"
    served.write_bytes(data)
    monkeypatch.setattr("fcos_ray.model.weights.coco_v1", lambda: (served.as_uri(), coco_v1()[1]))
    if honest:
        with caplog.at_level(logging.WARNING):
            assert same_state(load_weights("COCO_V1"), weights)
        served.unlink()
        assert same_state(load_weights("COCO_V1"), weights)
        assert caplog.text == ""
    else:
        with pytest.raises(WeightsError, match="invalid hash value"):
            load_weights("COCO_V1")
        assert not (hub / served.name).exists()


def test_without_network_and_cache_the_message_says_which_file_to_put_where(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("torch.hub.urlopen", no_network)
    with pytest.raises(WeightsError) as caught:
        load_weights("COCO_V1")
    message = str(caught.value)
    assert "cannot be downloaded (URLError: <urlopen error Name or service not known>)" in message
    assert "Put https://download.pytorch.org/models/fcos_resnet50_fpn_coco-99b0c9b7.pth at " in message
    assert str(hub / "fcos_resnet50_fpn_coco-99b0c9b7.pth") in message


def test_the_architecture_is_torchvisions_own() -> None:
    torchvisions = fcos_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    wanted = {k: tuple(v.shape) for k, v in torchvisions.items() if not k.endswith("num_batches_tracked")}
    assert parameter_shapes("fcos_resnet50_fpn", 91) == wanted
