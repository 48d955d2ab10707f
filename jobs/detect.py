"""Label a manifest of images: parse, run, print the summary as the last line on stdout.

Exit codes: 0 complete; 2 settings, manifest or output wrong; 3 complete but above --max-error-fraction; 4 stopped with
rows missing, the same command goes on; 130 interrupted, likewise.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # under `ray job submit` the package is the working dir's

from fcos_ray.config import load_config
from fcos_ray.errors import RunStopped, StorageError, UserError


def main(arguments: list[str]) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("fcos_ray").setLevel(logging.INFO)
    try:
        config = load_config(arguments)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, partial(_interrupt, config.grace_seconds))
        from fcos_ray.job import run  # torch and Ray: 3 s that --help and a typo need not wait for

        summary = run(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunStopped as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 4
    except StorageError as error:
        print(f"stopped: {error}. What is committed stays; the same command goes on", file=sys.stderr)
        return 4
    except KeyboardInterrupt:
        print("interrupted: what is committed stays; the same command goes on", file=sys.stderr)
        return 130
    print(json.dumps(asdict(summary)), flush=True)
    if config.max_error_fraction is not None and summary.error_fraction > config.max_error_fraction:
        print(
            f"error: {summary.error_fraction:.2%} of the rows are errors, more than --max-error-fraction "
            f"{config.max_error_fraction:.2%}",
            file=sys.stderr,
        )
        return 3
    return 0


def _interrupt(grace_seconds: float, _number: int, _frame: FrameType | None) -> None:
    """Unwind, which commits what is whole; where that hangs, end all the same. A second signal does not wait."""
    clock = threading.Timer(grace_seconds, _give_up)
    clock.daemon = True
    clock.start()
    raise KeyboardInterrupt


def _give_up() -> None:
    print("interrupted: --grace-seconds are over; what is committed stays; the same command goes on", file=sys.stderr)
    sys.stderr.flush()
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
