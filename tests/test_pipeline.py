"""The stages on real Ray: apart from one another, on machines of any size, with pixels far from the driver."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fcos_ray.inputs.fetch import FetchPolicy
from fcos_ray.inputs.manifests import find_sources
from fcos_ray.inputs.pin import pin
from fcos_ray.inputs.plan import PlanSettings, draft_plan
from fcos_ray.layout import Cluster, Layout, plan_layout
from fcos_ray.outputs.schema import RESULT_SCHEMA
from fcos_ray.pipeline import LoadSettings, Stages, build
from fcos_ray.sample import write_sample
from tests.corpus import PixelDetector
from tests.ray_cluster import RayCluster

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_sample(folder, num_images=24, seed=7, num_broken=2)
    return folder


def built(corpus: Path, folder: Path, layout: Layout) -> Any:
    policy = FetchPolicy(allow_roots=(str(corpus),))
    with draft_plan(
        find_sources([str(corpus / "manifest.parquet")]), PlanSettings(shard_rows=6, fetch=policy)
    ) as draft:
        files = pin(draft, str(folder))
    load = LoadSettings(
        fetch=policy, max_pixels=10**8, decode_deadline_seconds=20, decode_memory_bytes=2**31,
        min_size=96, max_size=160, exact_resize=False,
    )  # fmt: skip
    return build(list(range(4)), Stages(str(folder), files, load, PixelDetector, layout))


def test_load_and_detect_are_stages_of_their_own(corpus: Path, tmp_path: Path, ray_session: Any) -> None:
    layout = plan_layout(
        Cluster(4, 0, 4), num_rows=24, device=None, num_detectors=1, gpus_per_detector=None, load_cpus=0.5
    )
    done = built(corpus, tmp_path, layout).materialize()
    operators = re.findall(r"^Operator \d+ (.*?):", done.stats(), re.MULTILINE)
    assert [name.count("MapBatches") for name in operators if "MapBatches" in name] == [1, 1, 1], operators
    assert "StreamingRepartition" in operators[1], "cutting is a part of reading"
    table = done.to_pandas()
    assert sorted(zip(table["shard"], table["row"], strict=True)) == [(s, r) for s in range(4) for r in range(6)]
    assert set(done.schema().names) == set(RESULT_SCHEMA.names), "no pixels leave the detect stage"


NULL_JOB = """
import json, os, resource, sys
import ray
import fcos_ray as fr
from tests.corpus import PixelDetector

cpus, settings = int(sys.argv[1]), json.loads(sys.argv[2])
ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
summary = fr.run(fr.JobConfig(**settings), make_detector=PixelDetector)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"rows": summary.rows, "ok": summary.ok, "before_kib": before, "after_kib": after}))
"""


def null_job(cpus: int, **settings: Any) -> dict[str, Any]:
    """A job in a process of its own, on a Ray of so many logical CPUs, without a model."""
    command = [sys.executable, "-c", NULL_JOB, str(cpus), json.dumps({"weights": "random:1"} | settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("cpus", [1, 2, 64])
def test_no_number_of_cpus_hangs(corpus: Path, tmp_path: Path, cpus: int) -> None:
    end = null_job(cpus, manifest=[str(corpus / "manifest.parquet")], output=str(tmp_path), shard_rows=6)
    assert (end["rows"], end["ok"]) == (24, 22)


def test_the_drivers_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    import numpy as np
    import PIL.Image
    import pyarrow as pa
    import pyarrow.parquet as pq

    PIL.Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "dot.png")
    peaks = {}
    for num_rows in (2_000, 20_000):
        manifest = tmp_path / f"{num_rows}.parquet"
        ids = pa.array(range(num_rows)).cast(pa.string())
        pq.write_table(pa.table({"image_id": ids, "uri": pa.repeat("dot.png", num_rows)}), manifest)
        end = null_job(4, manifest=[str(manifest)], output=str(tmp_path / f"out-{num_rows}"), shard_rows=500)
        assert end["ok"] == num_rows
        peaks[num_rows] = end["after_kib"]
    print(f"driver's peak RSS, KiB: {peaks}")
    assert peaks[20_000] < 1.15 * peaks[2_000], peaks


def test_loading_leaves_the_gpus_alone_and_detectors_run_where_they_are(corpus: Path, tmp_path: Path) -> None:
    where = tmp_path / "where"
    where.mkdir()
    nodes = {"num_cpus": 2}, {"num_cpus": 1, "num_gpus": 1}, {"num_cpus": 1, "num_gpus": 1}
    with RayCluster(*nodes) as cluster:
        arguments = [str(corpus / "manifest.parquet"), str(tmp_path / "out"), str(where)]
        done = subprocess.run(
            [sys.executable, "-m", "tests.gpu_nodes_job", *arguments],
            env=cluster.environment, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1],
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["ok"] == 22
    homes = {path.name for path in where.iterdir()}
    assert homes
    assert homes <= set(seen["gpu_nodes"])
