"""The whole way on drawn images, offline: draw, label, evaluate, ask, look. `make demo` runs it.

Leaves the images in out/demo-images/ and the job's output, with a contact sheet, in out/demo/.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

JOBS = Path(__file__).resolve().parent
QUERY = """
SELECT label_name, count(*) AS boxes, count(DISTINCT image_id) AS images, round(avg(score), 3) AS mean_score
FROM (SELECT image_id, unnest(label_names) AS label_name, unnest(scores) AS score
      FROM read_parquet('{output}/detections/**/*.parquet'))
GROUP BY ALL ORDER BY boxes DESC"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=Path("out"), help="where both folders go (default: %(default)s)")
    parser.add_argument("--images", type=int, default=120, help="how many to draw (default: %(default)s)")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    images, output = (shlex.quote(str(options.folder / name)) for name in ("demo-images", "demo"))
    for name, mark in {"demo-images": "images", "demo": "labelling.json"}.items():  # of the demo before
        folder = options.folder / name
        if folder.exists() and any(folder.iterdir()) and not (folder / mark).exists():
            print(f"error: {folder} is there and no demo's; choose another --folder", file=sys.stderr)
            return 2
        shutil.rmtree(folder, ignore_errors=True)
    sheet = f"{output}/contact-sheet.png"
    steps = {
        "draw images": f"sample.py --output {images} --images {options.images} --seed 7",
        "label them": f"detect.py --manifest {images}/manifest.parquet --output {output} --weights sample "
        "--partition-by split",
        "hold them against the truth": f"evaluate.py --output {output} --annotations {images}/annotations.json",
        "look at them": f"contact_sheet.py --output {output} --picture {sheet} --min-score 0.3",
    }
    for number, (what, command) in enumerate(steps.items(), start=1):
        print(f"\n== {number}. {what}\n$ python jobs/{command}", file=sys.stderr, flush=True)
        script, *flags = shlex.split(command)
        code = subprocess.run([sys.executable, str(JOBS / script), *flags], check=False).returncode
        if code:
            return code
    import duckdb

    query = QUERY.format(output=options.folder / "demo").strip()
    print(f"\n== {len(steps) + 1}. ask them, with DuckDB\n{query};", file=sys.stderr, flush=True)
    print(duckdb.sql(query), flush=True)
    print(
        f"{output}/ holds what the job wrote and contact-sheet.png; {time.monotonic() - started:.0f} s", file=sys.stderr
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
