"""Write a drawn corpus with ground truth: `python jobs/sample.py --output DIR --images 100`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from fcos_ray.errors import UserError
from fcos_ray.sample import write_sample


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, help="a new or empty folder")
    parser.add_argument("--images", type=int, default=100, help="rows of the manifest (default: %(default)s)")
    parser.add_argument("--broken", type=int, help="how many of them are broken files (default: one in twenty)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        summary = write_sample(options.output, num_images=options.images, seed=options.seed, num_broken=options.broken)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(summary)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
