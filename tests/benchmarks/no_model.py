"""What all but the model can do, and what the driver's memory does: jobs without a model over 64×64 JPEGs on a local disk.

`python -m tests.benchmarks.no_model --rows 50000 500000`: a line of JSON for each. The rows are of 1,000 files, over and over.
`images_per_second` is from the first committed shard to the job's end, audit and index included. `driver_mb` is the driver's
own memory at most until the last shard is committed, without the pages of Ray's object store that it has read results in
(`store_mb`: they are the store's, and no more than it has). `driver_peak_mb` is all that was resident at most to the end,
index included. The driver that labels is not the one that planned, whose memory grows with the rows
(tests/benchmarks/plan_speed.py says how).
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

import fcos_ray as fr
from fcos_ray.benchmark.null import NullDetector
from fcos_ray.benchmark.photographs import write_photographs

FILES = 1_000


def job(folder: Path, num_rows: int, shard_rows: int) -> fr.JobConfig:
    """The job over a manifest of so many rows, which is written where it is missing."""
    manifest = folder / f"{num_rows}.parquet"
    if not manifest.exists():
        names = [f"images/{number % FILES:07d}.jpg" for number in range(num_rows)]
        pq.write_table(pa.table({"image_id": pa.array(range(num_rows)).cast(pa.string()), "uri": names}), manifest)
    return fr.JobConfig(
        manifest=[str(manifest)],
        output=str(folder / f"labels-{num_rows}"),
        weights="sample",
        max_micro_batch=16,
        shard_rows=shard_rows,
    )


def watch(output: Path, sizes: list[tuple[int, int]]) -> None:
    """Add this process's resident MB, its own and shared with the object store, until every shard is committed."""
    num_shards = None
    while num_shards is None or len(list(output.glob("detections/*/*.parquet"))) < num_shards:
        if num_shards is None and (record := next(output.glob("runs/*/run.json"), None)):
            num_shards = json.loads(record.read_text())["num_shards"]
        lines = Path("/proc/self/status").read_text().splitlines()
        kb = {line.split()[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
        sizes.append(((kb["RssAnon:"] + kb["RssFile:"]) // 1000, kb["RssShmem:"] // 1000))
        time.sleep(0.5)


def label(config: fr.JobConfig, num_rows: int) -> dict[str, float]:
    """The job in this process."""
    null = functools.partial(NullDetector, min_size=800, max_size=1333, max_micro_batch=16)
    sizes: list[tuple[int, int]] = []
    threading.Thread(target=watch, args=(Path(config.output), sizes), daemon=True).start()
    summary = fr.run(config, make_detector=null)
    if summary.ok != num_rows:
        raise RuntimeError(f"{num_rows} rows wanted, {summary.ok} labelled: {summary.errors_by_code}")
    assert summary.startup_seconds is not None
    steady = num_rows * (1 - 1 / summary.shards) / (summary.wall_seconds - summary.startup_seconds)
    return {
        "rows": num_rows,
        "shards": summary.shards,
        "images_per_second": round(steady),
        "images_per_second_with_start": round(num_rows / summary.wall_seconds),
        "driver_mb": max(own for own, _ in sizes),
        "store_mb": max(shared for _, shared in sizes),
        "driver_peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000),
    }


def measure(folder: Path, num_rows: int, shard_rows: int) -> str:
    """A driver that plans, and is killed as soon as the plan is pinned; then one that labels, and what it says."""
    command = [sys.executable, "-m", "tests.benchmarks.no_model", "--folder", str(folder), "--rows", str(num_rows)]
    command += ["--shard-rows", str(shard_rows)]
    output = Path(job(folder, num_rows, shard_rows).output)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as planner:
        while planner.poll() is None and not list(output.glob("runs/*/run.json")):
            time.sleep(0.05)
        planner.kill()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[50_000, 500_000])
    # What 500,000 rows are cut into by themselves: the driver holds a few shards, so theirs must be alike.
    parser.add_argument("--shard-rows", type=int, default=1_000, help="rows of a shard (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of the job that this process is for
    options = parser.parse_args()
    if options.folder:
        print(json.dumps(label(job(options.folder, options.rows[0], options.shard_rows), options.rows[0])))
        return
    with tempfile.TemporaryDirectory(prefix="fcos_ray-no-model-") as folder:
        write_photographs(folder, [(64, 64)], num_images=FILES)
        for num_rows in options.rows:
            print(measure(Path(folder), num_rows, options.shard_rows), flush=True)


if __name__ == "__main__":
    main()
