"""What the peers of tests/benchmarks/peers.py share: the weights' name, the images, and what a turn gives."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import PIL.Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from fcos_ray.types import Detections

WEIGHTS: Final = "random:1"


@dataclass(frozen=True, slots=True)
class End:
    """Of a batch. On Linux time.monotonic() is the machine's: ends of several processes compare."""

    at: float = field(default_factory=time.monotonic)
    images: int = 1
    worker: int = field(default_factory=os.getpid)  # or whatever else works beside others


@dataclass(frozen=True, slots=True)
class Turn:
    """What a peer did with one folder."""

    detections: dict[str, Detections]  # by file name
    steady_seconds: float | None  # per image; None where that could not be told


def steady_seconds(ends: Sequence[End]) -> float | None:
    """Per image; every worker's own rate from its first result to its last, added up. The first only starts its clock.

    One clock for all would count what the other workers had under way when it started.
    """
    rate = 0.0
    for worker in {end.worker for end in ends}:
        first, *rest = sorted((end.at, end.images) for end in ends if end.worker == worker)
        rate += sum(images for _, images in rest) / (rest[-1][0] - first[0]) if rest else 0.0
    return 1 / rate if rate else None


def read_tensor(path: str | Path) -> Tensor:
    """(3, H, W) float in 0–1."""
    return to_tensor(PIL.Image.open(path).convert("RGB"))


def columns(names: Sequence[str], detections: Sequence[Detections]) -> dict[str, list[Any]]:
    """One batch as flat columns that every engine can write, with its end."""
    return {
        "name": list(names),
        "boxes": [d.boxes.ravel() for d in detections],
        "labels": [d.labels for d in detections],
        "scores": [d.scores for d in detections],
        **{key: [value] * len(names) for key, value in asdict(End(images=len(names))).items()},
    }


def from_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Detections]:
    """Detections by file name, of rows written with `columns`."""
    return {
        row["name"]: Detections(
            np.asarray(row["boxes"], dtype=np.float32).reshape(-1, 4),
            np.asarray(row["labels"], dtype=np.int64),
            np.asarray(row["scores"], dtype=np.float32),
        )
        for row in rows
    }


def turn_of(rows: Sequence[Mapping[str, Any]]) -> Turn:
    """The turn whose rows were written with `columns`."""
    return Turn(from_rows(rows), steady_seconds(list({End(row["at"], row["images"], row["worker"]) for row in rows})))


def photographs(folder: Path) -> list[Path]:
    return sorted((folder / "images").glob("*.jpg"))


def as_json(turn: Turn) -> str:
    found = {name: {key: getattr(d, key).tolist() for key in d.__slots__} for name, d in turn.detections.items()}
    return json.dumps({"steady_seconds": turn.steady_seconds, "detections": found})
