"""The runs of an output: `python jobs/runs.py list --output s3://labels/corpus`.

list                 every run: state, rows, errors, images/s, age
status [RUN]         how far a run is, seen from outside (default: the open one)
retract RUN          its rows count nowhere any more, until `restore RUN`
abandon RUN          close an open run: what it committed counts, the rest is for the next one
forget --ids FILE    take images out of everything that was written; with --apply
purge                delete temporary files, plans that were never pinned, and retracted runs for good; with --apply

Exit codes: 0; 2 something asked for is wrong; 4 the store failed. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # under `ray job submit` the package is the working dir's

from fcos_ray.errors import StorageError, UserError

if TYPE_CHECKING:
    from fcos_ray.upkeep.status import RunLine


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    from fcos_ray.storage import STORE_ERRORS, InvalidUri, describe, is_transient, parse_uri, remedy

    try:
        found = _do(options, parse_uri(options.output).uri)
    except (UserError, InvalidUri) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StorageError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 4
    except STORE_ERRORS as error:
        print(f"error: {describe(error)}: {remedy(error)}", file=sys.stderr)
        return 4 if is_transient(error) else 2
    print(json.dumps(found))
    return 0


def _parser() -> argparse.ArgumentParser:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in ("list", "status", "retract", "restore", "abandon", "forget", "purge"):
        one = verbs.add_parser(verb, description=__doc__, formatter_class=shape)
        one.add_argument("--output", required=True, help="what a job wrote: a folder or s3://bucket/prefix")
        if verb in ("status", "retract", "restore", "abandon"):
            one.add_argument("run", metavar="RUN", nargs="?" if verb == "status" else None, help="a run_id")
        if verb in ("retract", "abandon", "forget"):
            one.add_argument("--reason", help="kept in the record")
        if verb == "abandon":
            one.add_argument("--force", action="store_true", help="even while a driver seems to be at work on it")
        if verb == "forget":
            one.add_argument("--ids", type=Path, required=True, help="one image_id a line, or .parquet with image_id")
        if verb == "purge":
            one.add_argument("--min-age-hours", type=float, default=24.0, help="of temporary files (default: 24)")
        if verb in ("forget", "purge"):
            one.add_argument("--apply", action="store_true", help="do it; without this it is only counted")
    return parser


def _do(options: argparse.Namespace, output: str) -> Any:
    from fcos_ray.upkeep import forget, marks, purge, status

    match options.verb:
        case "list":
            lines = status.list_runs(output)
            _show(lines)
            return [asdict(line) for line in lines]
        case "status":
            found = status.run_status(output, options.run)
            _say(found.describe())
            return asdict(found)
        case "retract":
            done = marks.retract(output, options.run, reason=options.reason)
            _say(f"run {options.run} is retracted; restore takes that back" if done else "it was retracted before")
            return {"run_id": options.run, "retracted": True}
        case "restore":
            done = marks.restore(output, options.run)
            _say(f"run {options.run} counts again" if done else f"run {options.run} was not retracted")
            return {"run_id": options.run, "retracted": False}
        case "abandon":
            shards = marks.abandon(output, options.run, reason=options.reason, force=options.force)
            _say(f"run {options.run} is abandoned; its {shards:,} committed shards count")
            return {"run_id": options.run, "committed_shards": shards}
        case "forget":
            gone = forget.forget(output, forget.read_ids(options.ids), apply=options.apply, reason=options.reason)
            _say(gone.describe())
            return asdict(gone)
        case _:
            plan = purge.plan_purge(output, min_age_hours=options.min_age_hours)
            if options.apply:
                purge.purge(plan)
            _say(plan.describe(applied=options.apply))
            return plan.counts() | {"applied": options.apply}


def _say(words: str) -> None:
    print(words, file=sys.stderr)


def _show(lines: list[RunLine]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    numbers = (Column(name, justify="right") for name in ("rows", "errors", "deleted", "images/s", "age"))
    table = Table("run", "state", *numbers)
    for line in lines:
        rate = "" if line.images_per_second is None else f"{line.images_per_second:,.1f}"
        counts = ["" if count is None else f"{count:,}" for count in (line.error, line.deleted)]
        table.add_row(line.run_id, line.state, f"{line.rows:,}", *counts, rate, f"{line.age_seconds / 3600:,.1f} h")
    Console(stderr=True, markup=False, highlight=False).print(table, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
