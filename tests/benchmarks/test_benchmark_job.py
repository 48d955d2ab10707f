"""jobs/benchmark.py: what it draws, what it says, and the whole of it on a little Ray."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest

from fcos_ray.analysis.audit import audit_output
from fcos_ray.benchmark.fidelity import mean_ap_both_ways
from fcos_ray.benchmark.null import NullDetector, mean_fill
from fcos_ray.benchmark.photographs import draw_jpeg, parse_size, write_photographs
from fcos_ray.benchmark.stages import StageSeconds
from fcos_ray.benchmark.verdict import Capacity, bottleneck
from fcos_ray.errors import ConfigError
from fcos_ray.inputs.fetch import FetchPolicy
from fcos_ray.layout import Layout
from fcos_ray.load import LoadSettings
from fcos_ray.types import Detections, Image

JOB = Path(__file__).parents[2] / "jobs" / "benchmark.py"


def test_a_photograph_is_as_large_as_photographs_are_and_the_same_each_time() -> None:
    data = draw_jpeg(640, 480, seed=1)
    assert PIL.Image.open(io.BytesIO(data)).size == (640, 480)
    assert 80_000 < len(data) < 160_000
    assert data == draw_jpeg(640, 480, seed=1) != draw_jpeg(640, 480, seed=2)


@pytest.mark.parametrize("text", ["", "640", "640x", "0x480", "99999x5", "16384x1", "640×480", "Mixed"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--image-size wanted <width>x<height>"):
        parse_size(text)


def test_the_manifest_says_each_images_size_or_nothing(tmp_path: Path) -> None:
    drawn = write_photographs(str(tmp_path / "a"), [(40, 30), (30, 40)], num_images=9)
    rows = pq.read_table(drawn.manifest).to_pylist()
    assert {(row["width"], row["height"]) for row in rows} == {(40, 30), (30, 40)}
    assert all(PIL.Image.open(row["uri"]).size == (row["width"], row["height"]) for row in rows)
    drawn = write_photographs(str(tmp_path / "b"), [(40, 30)], num_images=2, with_sizes=False)
    assert pq.read_schema(drawn.manifest).names == ["image_id", "uri"]
    with pytest.raises(ConfigError, match="is not empty"):
        write_photographs(str(tmp_path / "b"), [(40, 30)], num_images=2)


def test_fill_is_the_mean_of_the_micro_batches() -> None:
    """Micro-batches of 4, 4 and 1 images under a cap of 4."""
    detector = NullDetector(min_size=32, max_size=64, max_micro_batch=4)
    image, other = (Image(np.zeros((h, w, 3), np.uint8), height=h, width=w) for h, w in ((32, 32), (32, 64)))
    answers = detector.detect([image, other, *[image] * 7])
    shares = [float(answer.scores[0]) for answer in answers if isinstance(answer, Detections)]
    assert shares == [0.25, 1, *[0.25] * 7]
    assert mean_fill(shares, max_micro_batch=4) == pytest.approx((4 + 4 + 1) / 3 / 4)


GPUS = Layout("cuda", 2, 0.5, 1.0, None, 1.0, 6, 64)
CPUS = Layout("cpu", 2, 0.7, 0.0, 1, 0.25, 2, 64)
LOAD = LoadSettings(FetchPolicy(), 10**9, 20.0, 2**31, 800, 1333, exact_resize=False)
FAST = dataclasses.replace(LOAD, fast_decode=True)


@pytest.mark.parametrize(
    ("layout", "settings", "fetch", "decode", "detectors", "job", "words"),
    [
        (
            GPUS,
            LOAD,
            0.0,
            0.01,
            100.0,
            90.0,
            r"^detect: there is load for 6\.0 times .* ran at 90% of the detectors alone",
        ),
        (
            GPUS,
            LOAD,
            0.0,
            0.1,
            100.0,
            55.0,
            r"^decode: each detector wants 5 load CPUs and has 3\.0\. Give 2 more .*-decode",
        ),
        (GPUS, FAST, 0.0, 0.1, 100.0, 55.0, r"^decode: .*CPU nodes beside the GPU nodes will do\)\. "),
        (GPUS, LOAD, 0.09, 0.01, 100.0, 55.0, r"^fetch: .*, or a higher --fetch-concurrency"),
        (CPUS, LOAD, 0.0, 0.01, 2.0, None, r"^detect: 1\.00 images/s of each detector alone; loading takes 1\.0% of"),
        (
            CPUS,
            LOAD,
            0.0,
            0.1,
            60.0,
            None,
            r"^decode: loading takes 75% of the cores' time\. More cores, or --fast-decode",
        ),
    ],
)
def test_what_limits_a_job_is_said_with_what_to_change(
    layout: Layout,
    settings: LoadSettings,
    fetch: float,
    decode: float,
    detectors: float,
    job: float | None,
    words: str,
) -> None:
    stages = StageSeconds(fetch, decode, 0.005, fetch + decode, 0.0, 0.1, 0.0, 0.0, 0.0)
    assert re.search(words, bottleneck(Capacity(detectors, job), stages, settings, layout, "fp32"))


def test_bf16_is_advised_to_those_who_do_not_use_it() -> None:
    stages = StageSeconds(0.0, 0.01, 0.005, 0.01, 0.0, 0.1, 0.0, 0.0, 0.0)
    advice = {
        precision: bottleneck(Capacity(2.0, None), stages, LOAD, CPUS, precision).partition("time. ")[2]
        for precision in ("fp32", "fp16", "bf16")
    }
    advised = "More cores, --precision bf16 where they do it natively, or GPUs."
    assert advice == {"fp32": advised, "fp16": advised, "bf16": "More cores or GPUs."}


def test_fast_decoding_is_held_against_the_truth_of_drawings() -> None:
    exact, fast = mean_ap_both_ways(LOAD, 6)
    assert exact != fast, "decoded in two ways"
    assert 0.75 < fast < 1
    assert 0.75 < exact < 1


def run_job(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(JOB), *arguments], text=True, capture_output=True, timeout=380)


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_the_job_measures_every_stage_and_the_whole() -> None:
    done = run_job("--image-size", "160x120", "--images", "40", "--weights", "sample", "--seconds", "2")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found["stages"]) == set(StageSeconds.__dataclass_fields__)
    assert min(found["stages"].values()) > 0
    assert found["stages"]["load"] > found["stages"]["decode"]
    rates = found["images_per_second"]
    assert found["efficiency"] == pytest.approx(rates["whole job, steady"] / rates["detectors alone"])
    before, after = found["detectors alone, before and after"]
    assert rates["detectors alone"] == pytest.approx((before + after) / 2)
    assert min(before, after) > 0
    assert 0 < found["busy"] <= 1.01, "detectors hold images for so much of the time, whatever they do besides"
    assert (found["model"]["padded_height"], found["model"]["padded_width"]) == (320, 448)
    assert list(found["model"]["images_per_second"]) == ["1"], "a CPU's largest micro-batch"
    assert 5e7 < found["model"]["peak_memory_bytes"] < 5e9
    words = " ".join(done.stderr.split())
    assert found["bottleneck"] in words
    assert f"{found['model']['share_of_matmul']:.2f} of a matrix product's speed" in words


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_without_a_model_it_says_how_full_micro_batches_are(tmp_path: Path) -> None:
    sizes = ["--image-size", "64x48", "--no-sizes", "--images", "64", "--weights", "sample"]
    done = run_job(*sizes, "--null-detector", "--cap", "2", "--folder", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["fill"] == 1.0, "tasks of an even number of images of one shape"
    assert (found["stages"]["forward"], found["efficiency"], found["bottleneck"]) == (None, None, None)
    assert not audit_output(str(tmp_path / "labels"), deep=True).findings


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    done = run_job("--images", "3", "--weights", "sample", "--folder", str(tmp_path))
    assert (done.returncode, done.stderr.strip()) == (2, "error: --images wanted at least 20, got 3")
