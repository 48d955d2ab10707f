"""What will this cluster do? `python jobs/benchmark.py --image-size 640x480`, or through `ray job submit`.

Draws photograph-like JPEGs, measures each stage alone, the detectors alone and the whole job, and says what limits it.
On a cluster of several nodes --folder is a prefix that all of them can read, such as s3://bucket/benchmark.

Exit codes: 0; 2 something asked for is wrong; 4 the store failed or the run stopped. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # under `ray job submit` the package is the working dir's

from fcos_ray.errors import RunStopped, StorageError, UserError


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    from fcos_ray.benchmark.whole import Asked, measure

    settings = {
        name: getattr(options, name) for name in ("weights", "precision", "device", "num_detectors", "fast_decode")
    }
    try:
        asked = Asked(
            options.image_size,
            options.images,
            settings,
            null_detector=options.null_detector,
            cap=options.cap,
            with_sizes=not options.no_sizes,
            seconds=options.seconds,
        )
        with tempfile.TemporaryDirectory(prefix="fcos_ray-benchmark-") as folder:
            found = measure(options.folder or folder, asked)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (StorageError, RunStopped) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 4
    _show(found)
    print(json.dumps(found))
    return 0


def _parser() -> argparse.ArgumentParser:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument(
        "--image-size",
        default="640x480",
        help="WIDTHxHEIGHT, or mixed: 55 sizes, longer sides of 500 to 2048 pixels (default: %(default)s)",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=400,
        help="in the whole job; those loaded while the first detector starts are not in the steady state's time: of large "
        "images better 800 (default: %(default)s)",
    )
    parser.add_argument("--folder", help="a new folder or s3:// prefix (default: a temporary one on this machine)")
    parser.add_argument("--weights", default="random:1", help="as for jobs/detect.py (default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where the cluster has GPUs")
    parser.add_argument("--fast-decode", action="store_true", help="as for jobs/detect.py; says what it costs in mAP")
    parser.add_argument("--num-detectors", type=int, help="default: as many as the cluster holds")
    parser.add_argument(
        "--null-detector", action="store_true", help="no model: what reading, loading, gathering and committing can do"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=20,
        help="of the detectors alone, before the job and after it, as a machine drifts (default: %(default)s)",
    )
    parser.add_argument("--cap", type=int, default=16, help="images in a micro-batch at most, with --null-detector")
    parser.add_argument("--no-sizes", action="store_true", help="a manifest without width and height")
    return parser


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(stderr=True, markup=False, highlight=False)
    table = Table("stage, alone", Column("ms per image", justify="right"), Column("images/s", justify="right"))
    for name, seconds in found["stages"].items():
        if seconds is not None:
            table.add_row(name, f"{1000 * seconds:,.3f}", f"{1 / seconds:,.1f}" if seconds > 0 else "")
    console.print(table)
    rates = {name: f"{rate:,.2f} images/s" for name, rate in found["images_per_second"].items() if rate is not None}
    for name, words in rates.items():
        console.print(f"{name}: {words}", soft_wrap=True)
    if model := found["model"]:
        console.print(_about(model), soft_wrap=True)
    for name in ("efficiency", "busy", "fill"):
        if found[name] is not None:
            console.print(f"{name}: {found[name]:.2f}", soft_wrap=True)
    if found["fast_decode"]:
        console.print(found["fast_decode"]["words"], soft_wrap=True)
    if found["bottleneck"]:
        console.print(found["bottleneck"], soft_wrap=True)


def _about(model: dict[str, Any]) -> str:
    rates = ", ".join(f"{rate:,.2f} images/s by {size}" for size, rate in model["images_per_second"].items())
    return (
        f"one detector at {model['padded_height']}×{model['padded_width']}: {rates}; {model['multiply_adds'] / 1e9:,.1f} G "
        f"multiply-adds an image, {model['share_of_matmul']:.2f} of a matrix product's speed; "
        f"{model['peak_memory_bytes'] / 1e9:,.2f} GB at most"
    )


if __name__ == "__main__":
    sys.exit(main())
