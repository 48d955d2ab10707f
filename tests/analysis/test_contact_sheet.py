"""Contact sheet: boxes are drawn where they lie, error rows are shown as such."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest

from fcos_ray.analysis.contact_sheet import draw_contact_sheet
from fcos_ray.errors import OutputError
from fcos_ray.outputs import runs
from fcos_ray.outputs.commit import ShardTarget, commit_shard
from fcos_ray.outputs.schema import RESULT_SCHEMA

LABELLING = {"categories": ["__background__", "cat", "dog"], "settings": {}, "weights_sha256": "0", "weights": "w"}


def grey_jpeg(path: Path, width: int, height: int) -> None:
    PIL.Image.fromarray(np.full((height, width, 3), 128, np.uint8)).save(path)


@pytest.fixture
def output(tmp_path: Path) -> str:
    """Two images, one gone since, and one error row."""
    for name, size in {"a.png": (600, 450), "b.png": (200, 100), "gone.png": (50, 50)}.items():
        grey_jpeg(tmp_path / name, *size)
    found: list[dict[str, Any]] = [
        {"boxes": [[60, 90, 300, 360]], "labels": [1], "scores": [0.9], "width": 600, "height": 450},
        {"boxes": [[0, 0, 200, 100], [5, 5, 9, 9]], "labels": [2, 1], "scores": [0.8, 0.1]},
        {"boxes": [], "labels": [], "scores": []},
        {"error_stage": "decode", "error_code": "corrupt", "error_message": "cut"},
    ]
    results = pa.Table.from_pylist([{"shard": 0, "row": i} | row for i, row in enumerate(found)], RESULT_SCHEMA)
    uris = [str(tmp_path / name) for name in ("a.png", "b.png", "gone.png", "bad.png")]
    pinned = pinned_rows(uris)
    folder = str(tmp_path / "out")
    write_run(folder, pinned, results)
    (tmp_path / "gone.png").unlink()
    return folder
