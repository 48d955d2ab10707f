"""tests/benchmarks/peers.py: how it counts, and a turn of the plain loop and of the job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from fcos_ray.benchmark.photographs import parse_size, write_photographs
from fcos_ray.model.postprocess import HeadOutputs
from fcos_ray.model.weights import load_weights
from tests.benchmarks import peer
from tests.benchmarks.peer import detections_of, traceable
from tests.benchmarks.peers import found_again
from tests.benchmarks.turns import End, steady_seconds
from tests.model.images import shapes
from tests.parity import assert_same_detections, from_torchvision
from tests.torchvision_model import torchvision_model

FOUND = {"a.jpg": {"boxes": [[0, 0, 10, 10], [5, 5, 5, 5]], "labels": [1, 2], "scores": [0.9, 0.5]}, "b.jpg": {}}
FOUND["b.jpg"] = {"boxes": [], "labels": [], "scores": []}


def test_the_steady_state_is_the_sum_of_each_workers_own() -> None:
    one = [End(at=10.0 + 2 * k, images=4, worker=1) for k in range(5)]  # 2 images/s
    other = [End(at=11.0 + k, images=1, worker=2) for k in range(5)]  # 1 image/s
    assert steady_seconds([*other, *reversed(one)]) == pytest.approx(1 / 3)
    assert steady_seconds([one[0], other[0]]) is None
    assert steady_seconds([]) is None


def test_what_is_found_again_has_the_same_label_within_two_pixels() -> None:
    assert found_again(FOUND, FOUND) == 1
    near = deepcopy(FOUND)
    near["a.jpg"]["boxes"][0] = [1, 0, 11.5, 10]
    assert found_again(near, FOUND) == 1
    far, renamed = deepcopy(FOUND), deepcopy(FOUND)
    far["a.jpg"]["boxes"][0] = [3, 0, 10, 10]
    renamed["a.jpg"]["labels"][1] = 3
    assert found_again(far, FOUND) == found_again(renamed, FOUND) == 0.5
    more = deepcopy(FOUND)
    more["b.jpg"] = {"boxes": [[0, 0, 1, 1]], "labels": [1], "scores": [0.3]}
    assert found_again(more, FOUND) == 0.8


def test_what_openvino_would_give_becomes_the_models_detections() -> None:
    """Backbone and head by torch instead: OpenVINO is not there."""
    model = torchvision_model(load_weights("random:1"), min_size=160, max_size=266)
    image = torch.from_numpy(shapes(150, 200)).permute(2, 0, 1) / 255
    network, anchors, levels = traceable(model, image)
    with torch.inference_mode():
        [wanted] = model([image])
        batch, _ = model.transform([image])
        found = detections_of(HeadOutputs(*network(batch.tensors), anchors, levels), batch.image_sizes[0], (150, 200))
    assert len(found.scores) > 10
    assert_same_detections(found, from_torchvision(wanted), score_threshold=0.2, max_detections=100)


@pytest.mark.filterwarnings("ignore")  # what OpenVINO calls is deprecated
@pytest.mark.skipif(os.cpu_count() == 1, reason="OpenVINO runs one request at a time on one core")
def test_each_of_openvinos_requests_has_a_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One clock for all counts what the others had under way when it started."""
    pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install '.[peers]'")
    write_photographs(str(tmp_path), parse_size("200x150"), num_images=6, with_sizes=False)
    clocks: list[Sequence[End]] = []
    monkeypatch.setattr(peer, "steady_seconds", lambda ends: clocks.append(ends) or steady_seconds(ends))
    threads = torch.get_num_threads()
    try:
        turn = peer.openvino(tmp_path, precision="f32")
    finally:
        torch.set_num_threads(threads)
    [ends] = clocks
    assert len(ends) == len(turn.detections) == 6
    assert len({end.worker for end in ends}) > 1


@pytest.mark.ray
def test_the_loop_and_the_job_find_the_same(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.peers", "--peers", "fcos_ray-fp32,plain"]
    sizes = ["--images", "3", "--others", "2", "--rounds", "1", "--json", str(tmp_path / "peers.json")]
    done = subprocess.run([*command, *sizes], text=True, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "peers.json").read_text())
    plain, ours = told["rows"]
    assert (plain["peer"], ours["peer"]) == ("plain", "fcos_ray-fp32")
    assert ours["turns"][0]["found_again"] >= 0.99
    assert (plain["turns"][0]["images"], ours["turns"][0]["images"]) == (2, 3)
    assert plain["turns"][0]["steady_seconds"] > 0
    assert ours["times_total"] is None  # of other numbers of images
    assert "| fcos_ray, fp32 | 3 |" in done.stdout
    assert " cores; torch " in done.stdout


def test_an_unknown_peer_is_refused() -> None:
    command = [sys.executable, "-m", "tests.benchmarks.peers", "--peers", "plain,yolo"]
    done = subprocess.run(command, text=True, capture_output=True, timeout=100)
    assert done.returncode == 2
    assert "got yolo" in done.stderr
