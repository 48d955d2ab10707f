"""Planning a night against a long history: `python -m tests.benchmarks.plan_history --folder /tmp/history --runs 30`.

Generates the indexes of RUNS runs with ROWS images each (kept in the folder for the next time), a manifest of new images
and one of mixed ones, and plans each in a process of its own: seconds, peak memory, bytes of the indexes and bytes read.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import duckdb

PLAN_AND_PIN = """
import json, resource, sys, time
from pathlib import Path
from fcos_ray import storage
from fcos_ray.inputs.fetch import FetchPolicy
from fcos_ray.inputs.manifests import find_sources
from fcos_ray.inputs.pin import pin
from fcos_ray.inputs.plan import PlanSettings, draft_plan
from fcos_ray.inputs.selection import History
folder, manifest = sys.argv[1:]
def read_bytes():
    return int(next(l.split()[1] for l in open('/proc/self/io') if l.startswith('rchar')))
started, before = time.monotonic(), read_bytes()
indexes = [storage.stat_file(str(p)) for p in sorted(Path(folder, 'indexes').glob('*.parquet'))]
history = History(tuple(f.uri for f in indexes), tuple(indexes))
settings = PlanSettings(fetch=FetchPolicy(allow_roots=(folder,)))
with draft_plan(find_sources([manifest]), settings, history) as draft:
    planned = time.monotonic() - started
    pin(draft, f'{folder}/pinned-{time.time_ns()}')
    print(json.dumps({
        'manifest': Path(manifest).name, 'selection': draft.selection.describe(), 'plan_seconds': round(planned, 1),
        'with_pinning_seconds': round(time.monotonic() - started, 1),
        'peak_gb': round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        'history_gb': round(draft.selection.history_bytes / 1e9, 2), 'read_gb': round((read_bytes() - before) / 1e9, 2),
    }))
"""
# An image of run r, place n: named by its night, as corpora are; hashes that no codec makes smaller.
_IMAGE = (
    "printf('2026/run%03d/photo-%09d.jpg', {run}, n) AS image_id, "
    "'s3://corpus/photos/' || printf('2026/run%03d/photo-%09d.jpg', {run}, n) AS uri"
)


def _index(connection: duckdb.DuckDBPyConnection, path: Path, run: int, rows: int) -> None:
    if path.exists():
        return
    connection.execute(
        f"COPY (SELECT {_IMAGE.format(run=run)}, 'ok' AS status, NULL::VARCHAR AS error_code, "
        "NULL::BOOLEAN AS error_transient, '' AS partition, 100000 + n % 5000 AS content_bytes, "
        f"md5(concat({run}, '-', n)) AS content_etag, "
        "TIMESTAMPTZ '2026-01-01' + INTERVAL (n) SECOND AS content_last_modified, "
        f"sha256(concat({run}, '-', n)) AS content_sha256, NULL::BIGINT AS said_content_bytes, "
        "NULL::VARCHAR AS said_content_etag, NULL::TIMESTAMPTZ AS said_content_last_modified, "
        f"NULL::VARCHAR AS said_content_sha256 FROM (SELECT unnest(range({rows})) AS n) ORDER BY image_id) "
        f"TO '{path}.part' (FORMAT parquet, COMPRESSION zstd)"
    )
    Path(f"{path}.part").rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--rows", type=int, default=3_333_334, help="of each run")
    parser.add_argument("--mixed", type=int, default=10_000_000, help="rows of the mixed manifest")
    parser.add_argument("--generate", action="store_true", help="stop when everything is generated")
    options = parser.parse_args()
    (options.folder / "indexes").mkdir(parents=True, exist_ok=True)
    connection = duckdb.connect(config={"temp_directory": str(options.folder), "memory_limit": "4GB"})
    connection.execute("SET TimeZone = 'UTC'")
    for run in range(options.runs):
        _index(connection, options.folder / "indexes" / f"{run + 1:06d}.parquet", run, options.rows)
    fresh, mixed = options.folder / "new.parquet", options.folder / "mixed.parquet"
    etag = "md5(concat(run, '-', n))"
    connection.execute(
        f"COPY (SELECT {_IMAGE.format(run=options.runs)}, md5(concat(n)) AS content_etag "
        f"FROM (SELECT unnest(range(100_000)) AS n)) TO '{fresh}' (FORMAT parquet)"
    )
    # One in a hundred has changed, one in a hundred is new; spread over all nights.
    connection.execute(
        f"COPY (SELECT {_IMAGE.format(run='run')}, CASE WHEN i % 100 = 0 THEN md5(concat(i)) ELSE {etag} END AS content_etag "
        f"FROM (SELECT i, CASE WHEN i % 100 = 1 THEN {options.runs} ELSE i % {options.runs} END AS run, "
        f"i * 7919 % {options.rows} AS n FROM (SELECT unnest(range({options.mixed})) AS i)) "
        f"QUALIFY row_number() OVER (PARTITION BY run, n) = 1) TO '{mixed}' (FORMAT parquet)"
    )
    for manifest in () if options.generate else (fresh, mixed):
        done = subprocess.run(
            [sys.executable, "-c", PLAN_AND_PIN, str(options.folder), str(manifest)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        print(done.stdout.strip(), flush=True)


if __name__ == "__main__":
    main()
