"""The stages on real Ray: apart from one another, on machines of any size, with pixels far from the driver."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.operators.map_operator import MapOperator

from fcos_ray import pipeline
from fcos_ray.benchmark.photographs import draw_jpeg
from fcos_ray.inputs.fetch import FetchPolicy
from fcos_ray.inputs.manifests import find_sources
from fcos_ray.inputs.pin import pin
from fcos_ray.inputs.plan import PlanSettings, draft_plan
from fcos_ray.layout import Cluster, Layout, plan_layout
from fcos_ray.load import LoadSettings
from fcos_ray.outputs.schema import RESULT_SCHEMA
from fcos_ray.pipeline import Stages, build
from fcos_ray.sample import write_sample
from tests.corpus import PixelDetector
from tests.processes import descendants
from tests.ray_cluster import RayCluster

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_sample(folder, num_images=24, seed=7, num_broken=2)
    return folder


def built(corpus: Path, folder: Path, layout: Layout, *, num_shards: int = 4, shard_rows: int = 6) -> Any:
    policy = FetchPolicy(allow_roots=(str(corpus),))
    with draft_plan(
        find_sources([str(corpus / "manifest.parquet")]), PlanSettings(shard_rows=shard_rows, fetch=policy)
    ) as draft:
        files = pin(draft, str(folder))
    load = LoadSettings(
        fetch=policy, max_pixels=10**8, decode_deadline_seconds=20, decode_memory_bytes=2**31,
        min_size=96, max_size=160, exact_resize=False,
    )  # fmt: skip
    return build(list(range(num_shards)), Stages(str(folder), files, load, PixelDetector, layout))


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


def test_reading_waits_while_enough_blocks_wait_for_load_tasks(
    tmp_path: Path, ray_session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2,000 blocks of two rows, and load tasks that take five seconds each: without a bound all of them are read."""
    (tmp_path / "dot.jpg").write_bytes(draw_jpeg(8, 8, seed=1))
    ids = pa.array(range(4000)).cast(pa.string())
    pq.write_table(pa.table({"image_id": ids, "uri": pa.repeat("dot.jpg", len(ids))}), tmp_path / "manifest.parquet")
    (seen := tmp_path / "seen").mkdir()
    read, load = pipeline._read, pipeline._load

    def noted(numbers: pa.Table, **settings: Any) -> Iterator[pa.Table]:
        for table in read(numbers, **settings):
            (seen / str(table["shard"][0])).touch()
            yield table

    def slow(rows: pa.Table, **settings: Any) -> Iterator[pa.Table]:
        time.sleep(5)
        yield from load(rows, **settings)

    monkeypatch.setattr(pipeline, "_read", noted)
    monkeypatch.setattr(pipeline, "_load", slow)
    layout = plan_layout(
        Cluster(4, 0, 4), num_rows=4000, device=None, num_detectors=1, gpus_per_detector=None, load_cpus=0.5
    )
    dataset = built(tmp_path, tmp_path / "pinned", replace(layout, load_rows=2), num_shards=200, shard_rows=20)
    batches = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))
    assert next(batches).num_rows == 2
    counts = [0]
    while len(counts) < 7 or counts[-7] < counts[-1] < 60:  # until no shard was read for six seconds
        time.sleep(1)
        counts.append(len(list(seen.iterdir())))
    del batches  # ends the execution
    assert 10 <= counts[-1] <= 20, f"{counts}: 100 blocks are ten shards; and what tasks had begun"


def test_the_driver_keeps_what_it_notes_of_the_last_blocks_only(
    corpus: Path, tmp_path: Path, ray_session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Data itself keeps it of each: of twelve blocks a stage here, of millions elsewhere."""
    monkeypatch.setattr("fcos_ray.block_stats.MOST_BLOCKS", 5)
    kept = []

    class Watch(ExecutionCallback):
        def after_execution_succeeds(self, executor: Any) -> None:
            kept.extend(len(op._output_blocks_stats) for op in executor._topology if isinstance(op, MapOperator))

    layout = plan_layout(
        Cluster(4, 0, 4), num_rows=24, device=None, num_detectors=1, gpus_per_detector=None, load_cpus=0.5
    )
    dataset = built(corpus, tmp_path, replace(layout, load_rows=2))
    dataset.context.custom_execution_callback_classes.append(Watch)
    assert sum(batch.num_rows for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow")) == 24
    assert kept == [5, 5, 5]


NULL_JOBS = """
import json, resource, sys
import ray
import fcos_ray as fr
from tests.corpus import PixelDetector

for cpus, *jobs in json.loads(sys.argv[1]):
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
    for job in jobs:
        summary = fr.run(fr.JobConfig(weights="random:1", **job), make_detector=PixelDetector)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"cpus": cpus, "rows": summary.rows, "ok": summary.ok, "peak_kib": peak}), flush=True)
    ray.shutdown()
"""


def start_null_jobs(*rays: tuple[Any, ...], **variables: str) -> subprocess.Popen[str]:
    """Jobs without a model in a process of their own: for each Ray its logical CPUs, then its jobs' settings."""
    command = [sys.executable, "-c", NULL_JOBS, json.dumps(rays)]
    # Else Ray starts as many workers at once as there are CPUs, and machines with two of them take a minute for 64.
    environment = os.environ | {"RAY_prestart_worker_first_driver": "0"} | variables
    where = Path(__file__).parents[1]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, cwd=where)


def null_jobs(*rays: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Their ends."""
    process = start_null_jobs(*rays)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err[-4000:]
    return [json.loads(line) for line in out.splitlines() if line.startswith('{"cpus"')]


def test_no_number_of_cpus_hangs(corpus: Path, tmp_path: Path) -> None:
    job = {"manifest": [str(corpus / "manifest.parquet")], "shard_rows": 6}
    ends = null_jobs(*((cpus, job | {"output": str(tmp_path / str(cpus))}) for cpus in (1, 2, 64)))
    assert [(end["cpus"], end["rows"], end["ok"]) for end in ends] == [(cpus, 24, 22) for cpus in (1, 2, 64)]


def test_where_loading_is_the_limit_every_load_task_has_room(tmp_path: Path) -> None:
    """Ray Data's own notion of what an execution may take, which it forms after ten seconds (here: one), leaves one of two."""
    (tmp_path / "large.jpg").write_bytes(draw_jpeg(4000, 3000, seed=1))
    manifest = tmp_path / "manifest.parquet"
    ids = [str(number) for number in range(200)]
    pq.write_table(pa.table({"image_id": ids, "uri": ["large.jpg"] * len(ids)}), manifest)
    job = {"manifest": [str(manifest)], "output": str(tmp_path / "out")}
    process = start_null_jobs((2, job), RAY_DATA_MIN_GAP_BETWEEN_AUTOSCALING_REQUESTS="1")
    at_work: list[int] = []  # load tasks, whenever there are any
    while process.poll() is None:
        if count := sum(name.startswith("ray::MapBatches(_load)") for name in names_below(process.pid)):
            at_work.append(count)
        time.sleep(0.2)
    assert process.returncode == 0, process.communicate()[1][-4000:]
    later = at_work[len(at_work) // 2 :]
    assert len(later) > 5, at_work
    assert later.count(2) > len(later) / 2, at_work


def names_below(pid: int) -> list[str]:
    """What processes below this one call themselves."""
    names = []
    for child in descendants(pid):
        with suppress(OSError):
            names.append(Path(f"/proc/{child}/cmdline").read_text())
    return names


def test_the_drivers_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    import numpy as np
    import PIL.Image

    PIL.Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "dot.png")
    jobs = []
    for num_rows in (2_000, 20_000):
        manifest = tmp_path / f"{num_rows}.parquet"
        ids = pa.array(range(num_rows)).cast(pa.string())
        pq.write_table(pa.table({"image_id": ids, "uri": pa.repeat("dot.png", num_rows)}), manifest)
        jobs.append({"manifest": [str(manifest)], "output": str(tmp_path / f"out-{num_rows}"), "shard_rows": 500})
    few, many = null_jobs((4, *jobs))
    assert (few["ok"], many["ok"]) == (2_000, 20_000)
    print(f"driver's peak RSS, KiB: {few['peak_kib']}, then {many['peak_kib']}")
    assert many["peak_kib"] < 1.15 * few["peak_kib"], "one process: what the first job left behind counts too"


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
