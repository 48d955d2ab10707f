"""The whole job beside what else people run: `python -m tests.benchmarks.peers --images 400 --others 100 --json peers.json`.

The same drawn photographs and weights for every peer (tests/benchmarks/peer.py says how each is written). In each round
every peer labels the same images in turn, or the first of them (`--others`: a loop's images take equally long, and the
slowest peers would take hours), so that a machine that drifts drifts for all. A turn is a process of its own; its steady
state is from each worker's first result to its last, added up, its total from the command's start to its end.
Every peer's detections are held against the plain loop's. Exit code 1 when a peer fails or finds something else.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np

from fcos_ray.benchmark.photographs import write_photographs
from tests.benchmarks.turns import photographs

ROOT: Final = Path(__file__).resolve().parents[2]
LABELS: Final = {
    "plain": "plain torchvision loop, fp32",
    "dataloader": "DataLoader, batches of 4, fp32",
    "ray-data": "Ray Data as its examples do it, batches of 4, fp32",
    "spark": "Spark predict_batch_udf, batches of 4, fp32",
    "openvino-fp32": "OpenVINO, fp32",
    "openvino-bf16": "OpenVINO, bf16",
    "fcos_ray-fp32": "fcos_ray, fp32",
    "fcos_ray-bf16": "fcos_ray, bf16",
}
NEEDS: Final = {"spark": ("pyspark", "pandas"), "openvino-fp32": ("openvino",), "openvino-bf16": ("openvino",)}
# Of the plain loop's detections, those that must be found again. bf16 moves an untrained model's near-ties.
LEAST_FOUND: Final = {"fp32": 0.99, "bf16": 0.8}
Found = Mapping[str, Mapping[str, list[Any]]]  # file name -> boxes, labels, scores


@dataclass(frozen=True, slots=True)
class Turn:
    """A peer's turn as seen from outside."""

    images: int
    seconds: float  # per image, from the command's start to its end
    steady_seconds: float | None  # per image
    found_again: float | None  # share of detections with a partner in the plain loop's; None where that did not run


@dataclass(frozen=True, slots=True)
class Row:
    """A peer in the table. Ratios: how many times as fast as the plain loop, over the rounds."""

    peer: str
    turns: tuple[Turn, ...]
    trouble: str | None  # why there are no figures, or none that count
    times_steady: tuple[float, float, float] | None = None  # median, least, most
    times_total: float | None = (
        None  # None where the plain loop labelled other numbers of images: start-up weighs differently
    )


def absent(peer: str) -> str | None:
    """What is missing to run a peer."""
    missing = [name for name in NEEDS.get(peer, ()) if importlib.util.find_spec(name) is None]
    if peer == "spark" and shutil.which("java") is None:
        missing.append("java")
    return f"not installed: {', '.join(missing)}" if missing else None


def take_turn(peer: str, folder: Path, reference: Found | None) -> tuple[Turn, Found]:
    """Raises RuntimeError when the peer fails, leaves images out, or finds something else than `reference`."""
    result = folder / f"{peer}.json"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "tests.benchmarks.peer", peer, str(folder), str(result)]
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    seconds = time.monotonic() - started
    shutil.rmtree(folder / "labels", ignore_errors=True)
    if done.returncode:
        raise RuntimeError(f"failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    answer = json.loads(result.read_text())
    found: Found = answer["detections"]
    names = {path.name for path in (folder / "images").glob("*.jpg")}
    if found.keys() != names:
        raise RuntimeError(f"failed: {len(found)} images labelled, {len(names)} wanted")
    share = None if reference is None else found_again(found, reference)
    if share is not None and share < LEAST_FOUND["bf16" if peer.endswith("bf16") else "fp32"]:
        raise RuntimeError(f"failed: finds {share:.1%} of what the plain loop does")
    return Turn(len(names), seconds / len(names), answer["steady_seconds"], share), found


def found_again(found: Found, reference: Found) -> float:
    """Share of the detections of either that have a partner in the other: same label, every coordinate within 2 px.

    Not by IoU: FCOS keeps boxes of zero area, which overlap nothing, themselves included.
    """
    partners = wanted = 0
    for name, theirs in reference.items():
        for some, others in ((theirs, found[name]), (found[name], theirs)):
            boxes, labels = np.asarray(others["boxes"], np.float32).reshape(-1, 4), np.asarray(others["labels"])
            for box, label in zip(some["boxes"], some["labels"], strict=True):
                apart = np.abs(boxes[labels == label] - np.asarray(box, np.float32)).max(axis=1)
                partners += bool((apart <= 2).any())
                wanted += 1
    return partners / wanted if wanted else 1.0


def run_rounds(peers: Sequence[str], rounds: Sequence[tuple[Path, Path]]) -> dict[str, Row]:
    """Every peer in turn in every round: the job in its first folder, others in its second. Who fails has no further turn."""
    turns: dict[str, list[Turn]] = {peer: [] for peer in peers}
    trouble = {peer: why for peer in peers if (why := absent(peer))}
    for number, (folder, others) in enumerate(rounds):
        reference: Found | None = None
        for peer in peers:
            if peer in trouble:
                continue
            try:
                turn, found = take_turn(peer, folder if peer.startswith("fcos_ray") else others, reference)
            except RuntimeError as error:
                trouble[peer] = str(error)
                continue
            reference = found if peer == "plain" else reference
            turns[peer].append(turn)
            print(f"round {number + 1}/{len(rounds)}  {peer}: {asdict(turn)}", file=sys.stderr, flush=True)
    rows = {peer: Row(peer, tuple(turns[peer]), trouble.get(peer)) for peer in peers}
    return {peer: _with_ratios(row, rows.get("plain")) for peer, row in rows.items()}


def _with_ratios(row: Row, plain: Row | None) -> Row:
    if row.trouble or plain is None or plain.trouble:
        return row
    pairs = list(zip(plain.turns, row.turns, strict=True))
    steady = [p.steady_seconds / t.steady_seconds for p, t in pairs if p.steady_seconds and t.steady_seconds]
    return replace(
        row,
        times_steady=(statistics.median(steady), min(steady), max(steady)) if steady else None,
        times_total=statistics.median(p.seconds / t.seconds for p, t in pairs)
        if all(p.images == t.images for p, t in pairs)
        else None,
    )


def table(rows: Mapping[str, Row]) -> str:
    lines = [
        "| | images | seconds per image, steady | times the plain loop (least–most) | with start-up | times | found again |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        if row.trouble:
            lines.append(f"| {LABELS[row.peer]} | {row.trouble} | | | | | |")
            continue
        steady = [turn.steady_seconds for turn in row.turns if turn.steady_seconds]
        shares = [turn.found_again for turn in row.turns if turn.found_again is not None]
        cells = [
            LABELS[row.peer],
            f"{sum(turn.images for turn in row.turns)}",
            f"{statistics.median(steady):.3f}" if steady else "too few results",
            "{:.2f} ({:.2f}–{:.2f})".format(*row.times_steady) if row.times_steady else "",
            f"{statistics.median(turn.seconds for turn in row.turns):.3f}",
            f"{row.times_total:.2f}" if row.times_total else "",
            f"{min(shares):.1%}" if shares else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def about(options: argparse.Namespace) -> dict[str, Any]:
    """Machine, versions, date and command."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
    packages = {"torch": "torch", "torchvision": "torchvision", "ray": "ray", "pillow": "PIL"}
    packages |= {"openvino": "openvino", "pyspark": "pyspark"}
    return {
        "machine": f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name, module in packages.items() if importlib.util.find_spec(module)},
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["python", "-m", "tests.benchmarks.peers", *sys.argv[1:]]),
        "load_before": os.getloadavg()[0],
        "images": options.images,
        "others": options.others,
        "rounds": options.rounds,
    }


def _draw(place: Path, number: int, options: argparse.Namespace) -> tuple[Path, Path]:
    """A round's share of the images, and the first of them, in folders of their own."""
    share, first = (
        total // options.rounds + (number < total % options.rounds) for total in (options.images, options.others)
    )
    write_photographs(str(place / "all"), [(640, 480)], num_images=share)
    (place / "some" / "images").mkdir(parents=True)
    for path in photographs(place / "all")[:first]:
        (place / "some" / "images" / path.name).hardlink_to(path)
    return place / "all", place / "some"


def _options() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--others", type=int, help="images for all but fcos_ray (default: the same)")
    parser.add_argument("--rounds", type=int, default=4, help="the images are shared out among them")
    parser.add_argument("--peers", default=",".join(LABELS), help="comma-separated; ratios need plain among them")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    peers = options.peers.split(",")
    if unknown := set(peers) - LABELS.keys():
        parser.error(f"--peers wanted some of {', '.join(LABELS)}, got {', '.join(sorted(unknown))}")
    options.others = options.images if options.others is None else options.others
    if not 1 <= options.rounds <= options.others <= options.images:
        parser.error(
            f"wanted --rounds ≤ --others ≤ --images, got {options.rounds}, {options.others} and {options.images}"
        )
    return options, sorted(peers, key=lambda peer: peer != "plain")  # the others are held against it


def main() -> None:
    options, peers = _options()
    facts = about(options)
    with tempfile.TemporaryDirectory(prefix="fcos_ray-peers-") as place:
        rounds = [_draw(Path(place, f"{number:03d}"), number, options) for number in range(options.rounds)]
        rows = run_rounds(peers, rounds)
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    print(table(rows))
    print(f"\n{facts['machine']}; {versions}; {facts['date']}; load {facts['load_before']:.1f}; `{facts['command']}`")
    if options.json:
        options.json.write_text(json.dumps(facts | {"rows": [asdict(row) for row in rows.values()]}, indent=1))
    if any(row.trouble and absent(row.peer) is None for row in rows.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
