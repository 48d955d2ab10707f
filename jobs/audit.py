"""Hold an output against its plans: `python jobs/audit.py --output s3://labels/corpus --deep`. Changes nothing.

Exit codes: 0 all is as planned; 2 no such output; 4 the store failed; 5 something is missing, doubled, foreign, changed
or unreadable: named on stderr and in the JSON on the last line of stdout.
"""

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
    parser.add_argument("--run", metavar="ID", help="one run only (default: all, and what belongs to none)")
    parser.add_argument("--deep", action="store_true", help="read every row (default: footers and row numbers)")
    options = parser.parse_args(arguments)
    from fcos_ray.analysis.audit import audit_output
    from fcos_ray.storage import STORE_ERRORS, InvalidUri, describe, is_transient, remedy

    try:
        summary = audit_output(options.output, run_id=options.run, deep=options.deep)
    except (UserError, InvalidUri) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StorageError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 4
    except STORE_ERRORS as error:
        print(f"error: {describe(error)}: {remedy(error)}", file=sys.stderr)
        return 4 if is_transient(error) else 2
    for kind, count in summary.findings.items():
        print(f"{kind}: {count:,}, such as", file=sys.stderr)
        for words in summary.examples[kind]:
            print(f"  {words}", file=sys.stderr)
    still_open = f", {summary.open_runs} open with {summary.open_shards:,} shards to come" if summary.open_runs else ""
    verdict = "something is wrong" if summary.findings else "all is as planned"
    print(
        f"{summary.runs} runs{still_open}; {summary.shards:,} shards, {summary.rows:,} rows: {verdict}", file=sys.stderr
    )
    print(json.dumps(asdict(summary)))
    return 5 if summary.findings else 0


if __name__ == "__main__":
    sys.exit(main())
