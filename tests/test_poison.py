"""Images that hang, eat memory or kill: one error row each, in bounded time, and the rest of their shards labelled."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest

from fcos_ray.inputs.fetch import FetchPolicy
from fcos_ray.inputs.manifests import find_sources
from fcos_ray.inputs.pin import pin
from fcos_ray.inputs.plan import PlanSettings, draft_plan
from fcos_ray.layout import Cluster, plan_layout
from fcos_ray.load import LoadSettings
from fcos_ray.outputs.gather import Gather
from fcos_ray.pipeline import Stages, result_rows
from tests.corpus import PixelDetector, write_manifest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

DEADLINE_SECONDS = 3.0
NUM_GOOD = 24


def slow_jpeg() -> bytes:
    """A progressive JPEG of 16 Mpx in 0.6 MB that takes a minute: its last scan comes 5,000 times, 12 ms each."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.zeros((4000, 4000), np.uint8)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last_scan * 5000 + data[-2:]


def large_png() -> bytes:
    """170 Mpx in 165 kB; decoding takes half a gigabyte for RGB alone."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.zeros((10_000, 17_000), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def labelled(folder: Path, files: dict[str, bytes], **load: Any) -> dict[str, dict[str, Any]]:
    """file name -> result row, through the real stages; one shard, so each row must be there for any to come out."""
    for name, data in files.items():
        (folder / name).write_bytes(data)
    manifest = write_manifest(folder / "m.parquet", {"uri": list(files)})
    policy = FetchPolicy(allow_roots=(str(folder),))
    with draft_plan(find_sources([str(manifest)]), PlanSettings(shard_rows=100, fetch=policy)) as draft:
        pinned = pin(draft, str(folder / "pinned"))
    settings = {"max_pixels": 178_956_970, "decode_deadline_seconds": DEADLINE_SECONDS, "decode_memory_bytes": 2**29}
    stages = Stages(
        str(folder / "pinned"),
        pinned,
        LoadSettings(fetch=policy, min_size=96, max_size=160, exact_resize=False, **(settings | load)),
        PixelDetector,
        plan_layout(Cluster(4, 0, 4), num_rows=40, device=None, num_detectors=1, gpus_per_detector=None, load_cpus=0.5),
    )
    gather = Gather({0: len(files)})
    [whole] = [whole for rows in result_rows([0], stages) for whole in gather.add(rows)]
    by_row = pa.Table.to_pylist(whole.rows.sort_by("row"))
    return dict(zip(files, by_row, strict=True))


def good_images() -> dict[str, bytes]:
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)).save(buffer, "PNG")
    return {f"good-{i:02}.png": buffer.getvalue() for i in range(NUM_GOOD)}


def test_poison_is_one_error_row_each(tmp_path: Path, ray_session: Any) -> None:
    poison = {
        "loop": "decode_timeout",
        "loop in C": "decode_timeout",
        "stop": "decode_timeout",
        "eat": "decode_memory",
        "segfault": "decode_crash",
        "kill": "decode_crash",
        "exit": "decode_crash",
    }
    good, poisoned = list(good_images().items()), [(name, name.encode()) for name in poison]
    files = dict(good[:12] + poisoned + good[12:])
    started = time.monotonic()
    rows = labelled(tmp_path, files, decoder="tests.inputs.test_guard:poison_decoder")
    seconds = time.monotonic() - started
    assert {name: rows[name]["error_code"] for name in poison} == poison
    assert {rows[name]["error_code"] for name in good_images()} == {None}
    assert all(len(rows[name]["boxes"]) == 1 for name in good_images())
    # Three that hang, for as long as they may. Ray takes up to half a minute to start when the machine is busy.
    assert seconds < 3 * DEADLINE_SECONDS + 120


def test_real_images_that_take_too_long_or_too_much_are_one_error_row_each(tmp_path: Path, ray_session: Any) -> None:
    files = good_images() | {"slow.jpg": slow_jpeg(), "large.png": large_png()}
    rows = labelled(tmp_path, files)
    assert rows["slow.jpg"]["error_code"] == "decode_timeout"
    assert rows["large.png"]["error_code"] == "decode_memory"
    assert {rows[name]["error_code"] for name in good_images()} == {None}
