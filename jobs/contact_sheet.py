"""Draw labelled images with their boxes: `python jobs/contact_sheet.py --output out/labels --picture sheet.png`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # under `ray job submit` the package is the working dir's

from fcos_ray.errors import StorageError, UserError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", required=True, help="folder or s3:// prefix that a job wrote")
    parser.add_argument("--picture", required=True, help="PNG file to make; path or uri")
    parser.add_argument("--images", type=int, default=24, help="how many to show (default: %(default)s)")
    parser.add_argument("--columns", type=int, default=6, help="of the sheet (default: %(default)s)")
    parser.add_argument("--min-score", type=float, default=0.0, help="draw boxes from this score on")
    parser.add_argument("--seed", type=int, default=0, help="which rows are chosen (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.images < 1 or options.columns < 1:
        parser.error("--images and --columns must be 1 or more")
    from fcos_ray.analysis.contact_sheet import draw_contact_sheet

    try:
        sheet = draw_contact_sheet(
            options.output,
            options.picture,
            num_images=options.images,
            num_columns=options.columns,
            min_score=options.min_score,
            seed=options.seed,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StorageError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 4
    print(json.dumps(asdict(sheet)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
