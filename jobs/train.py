"""Train an FCOS on COCO-format truth: parse, train, print the summary as the last line on stdout.

Exit codes: 0 trained; 2 settings, data, weights or output wrong; 4 a store failed, the same command goes on; 130
interrupted, likewise.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # under `ray job submit` the package is the working dir's

from fcos_ray.errors import StorageError, UserError
from fcos_ray.training.config import load_train_config


def main(arguments: list[str]) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("fcos_ray").setLevel(logging.INFO)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _ask_to_stop)
    try:
        config = load_train_config(arguments)
        from fcos_ray.training.fit import train  # torch: 3 s that --help and a typo need not wait for

        summary = train(config, stop=_asked.is_set)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StorageError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 4
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last saved state", file=sys.stderr)
        return 130
    print(json.dumps(asdict(summary)), flush=True)
    return 0


_asked = threading.Event()


def _ask_to_stop(_number: int, _frame: FrameType | None) -> None:
    """The step that runs is ended and saved; a second signal does not wait for it."""
    if _asked.is_set():
        raise KeyboardInterrupt
    _asked.set()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
