"""COCO mAP of what a job wrote: `python jobs/evaluate.py --output out/labels --annotations instances.json`.

The table goes to stderr, all figures as JSON to the last line of stdout. Exit codes: 0 done; 2 settings, output or
annotations wrong; 3 mAP below --min-map; 4 a store failed, the same command may succeed later.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # under `ray job submit` the package is the working dir's

from fcos_ray.errors import EvaluationError, StorageError, UserError

if TYPE_CHECKING:
    from fcos_ray.analysis.evaluate import Evaluation


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", required=True, help="what a job wrote: a folder or s3://bucket/prefix; its newest row per image")
    add("--annotations", required=True, help="COCO-format truth: a file or uri")
    add("--match", choices=["auto", "image_id", "file_name"], default="auto", help="what joins rows with images")
    add("--all-images", action="store_true", help="images of the truth without a row count as without detections")
    add("--min-map", type=float, metavar="FRACTION", help="exit with 3 when the mAP is below")
    add("--curve", type=Path, metavar="FILE.png", help="precision-recall curves as a picture")
    options = parser.parse_args(arguments)
    try:
        found = _evaluate(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StorageError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 4
    _show(found)
    print(json.dumps(found.as_dict()), flush=True)
    if options.min_map is not None and (found.mean_ap is None or found.mean_ap < options.min_map):
        print(f"error: mAP {_figure(found.mean_ap)} is below --min-map {options.min_map:.4f}", file=sys.stderr)
        return 3
    return 0


def _evaluate(options: argparse.Namespace) -> Evaluation:
    if options.min_map is not None and not 0 <= options.min_map <= 1:
        raise EvaluationError(f"--min-map is a fraction from 0 to 1, got {options.min_map:g}: 39.2 is written 0.392")
    from fcos_ray.analysis import curves, evaluate  # Arrow and DuckDB, which --help need not wait for

    if options.curve:
        curves.check_picture(options.curve)
    found = evaluate.evaluate(options.output, options.annotations, match=options.match, all_images=options.all_images)
    if options.curve:
        curves.draw_curves(found.curves, options.curve)
    return found


def _show(found: Evaluation) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    table = Table("class", *(Column(heading, justify="right") for heading in ("AP", "AP50", "truth", "detections")))
    for one in found.classes:
        table.add_row(one.name, _figure(one.ap), _figure(one.ap50), f"{one.num_truth:,}", f"{one.num_detections:,}")
    table.add_row("mean", _figure(found.mean_ap), _figure(found.ap50), style="bold")
    console = Console(stderr=True, markup=False, highlight=False)
    console.print(table, *(f"note: {note}" for note in found.notes), sep="\n", soft_wrap=True)


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    sys.exit(main())
