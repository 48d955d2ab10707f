"""A first plan of many rows, and what a finished run costs: `python -m tests.benchmarks.plan_speed --rows 10000000`.

Writes a manifest, plans and pins it in a process of its own (seconds, peak memory). Then writes the labels of `--finished`
rows as a run would, and asks again from the shell, three times: nothing is to do, and that is what it takes to know it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import duckdb

from tests.benchmarks.plan_history import PLAN_AND_PIN
from tests.nights import run_night

_JOB = Path(__file__).resolve().parents[2] / "jobs" / "detect.py"


def _write_manifest(path: Path, rows: int) -> None:
    image = "printf('2026/%03d/photo-%09d.jpg', n // 1000000, n)"
    duckdb.sql(
        f"COPY (SELECT {image} AS image_id, 's3://corpus/photos/' || {image} AS uri "
        f"FROM (SELECT unnest(range({rows})) AS n)) TO '{path}' (FORMAT parquet)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="default: a temporary one, of 1 GB for 10 million rows")
    parser.add_argument("--rows", type=int, default=10_000_000, help="of the plan (default: %(default)s)")
    parser.add_argument(
        "--finished", type=int, default=1_000_000, help="rows of the finished run (default: %(default)s)"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fcos_ray-plan-", dir=options.folder) as folder:
        manifest = Path(folder, "manifest.parquet")
        _write_manifest(manifest, options.rows)
        subprocess.run([sys.executable, "-c", PLAN_AND_PIN, folder, str(manifest)], check=True)
        _write_manifest(finished := Path(folder, "finished.parquet"), options.finished)
        run_night(finished, output := Path(folder, "labels"), shard_rows=4096)
        record = json.loads(next(output.glob("runs/*/run.json")).read_text())["settings"]
        sizes = [f"--{name.replace('_', '-')}={record[name]}" for name in ("min_size", "max_size")]
        flags = ["--manifest", str(finished), "--output", str(output), "--weights", "sample", "--shard-rows", "4096"]
        for _ in range(3):
            started = time.monotonic()
            done = subprocess.run(
                [sys.executable, str(_JOB), *flags, *sizes], check=True, capture_output=True, text=True
            )
            seconds = round(time.monotonic() - started, 1)
            state = json.loads(done.stdout.splitlines()[-1])["state"]
            print(json.dumps({"finished_rows": options.finished, "state": state, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
