"""List a folder or bucket of images into a Parquet manifest: `python jobs/manifest.py --input DIR --output m.parquet`.

Exit codes: 0 written; 2 the input, the output or a flag is wrong; 4 the store failed, nothing was written; 130 interrupted,
likewise. The summary is the last line on stdout.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # under `ray job submit` the package is the working dir's

from fcos_ray.errors import StorageError, UserError
from fcos_ray.inputs.listing import ListingSettings, write_listing

GLOB = "a glob, repeatable: without / for a file's name, else for its path below the input; ignores case"


def main(arguments: list[str]) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("fcos_ray").setLevel(logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None, allow_abbrev=False)
    parser.add_argument("--input", required=True, help="a local folder or an s3:// prefix")
    parser.add_argument("--output", required=True, help="the manifest: a path or s3:// uri that ends in .parquet")
    parser.add_argument("--include", action="append", metavar="GLOB", help=f"{GLOB} (default: what detect decodes)")
    parser.add_argument("--exclude", action="append", metavar="GLOB", default=[], help="leave these out; as --include")
    parser.add_argument("--probe-size", action="store_true", help="read width and height from the first bytes of each")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that is there")
    options = parser.parse_args(arguments)
    default = ListingSettings()
    settings = ListingSettings(
        include=tuple(options.include or default.include),
        exclude=tuple(options.exclude),
        probe_size=options.probe_size,
        overwrite=options.overwrite,
    )
    try:
        summary = write_listing(options.input, options.output, settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StorageError as error:
        print(f"stopped: {error}; nothing was written", file=sys.stderr)
        return 4
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    print(json.dumps(asdict(summary)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
