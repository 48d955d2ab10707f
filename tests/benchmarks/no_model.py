"""What all but the model can do, and what the driver's memory does: jobs without a model over 64×64 JPEGs on a local disk.

`python -m tests.benchmarks.no_model --rows 50000 500000`: a line of JSON for each, a process of its own. The rows are of
1,000 files, over and over. `images_per_second` is from the first committed shard to the job's end, audit and index included.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

import fcos_ray as fr
from fcos_ray.benchmark.null import NullDetector
from fcos_ray.benchmark.photographs import write_photographs

FILES = 1_000


def label(folder: Path, num_rows: int) -> dict[str, float | int | None]:
    """One job in this process."""
    names = [f"images/{number % FILES:07d}.jpg" for number in range(num_rows)]
    manifest = folder / f"{num_rows}.parquet"
    pq.write_table(pa.table({"image_id": pa.array(range(num_rows)).cast(pa.string()), "uri": names}), manifest)
    config = fr.JobConfig(
        manifest=[str(manifest)], output=str(folder / f"labels-{num_rows}"), weights="sample", max_micro_batch=16
    )
    null = functools.partial(NullDetector, min_size=800, max_size=1333, max_micro_batch=16)
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
        "driver_peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[50_000, 500_000])
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of the job that this process is for
    options = parser.parse_args()
    if options.folder:
        print(json.dumps(label(options.folder, options.rows[0])))
        return
    with tempfile.TemporaryDirectory(prefix="fcos_ray-no-model-") as folder:
        write_photographs(folder, [(64, 64)], num_images=FILES)
        for num_rows in options.rows:
            command = [sys.executable, "-m", "tests.benchmarks.no_model", "--folder", folder, "--rows", str(num_rows)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            print(done.stdout.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
