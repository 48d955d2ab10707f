"""Contact sheet: boxes are drawn where they lie, error rows and images that are gone are shown as such."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from hashlib import md5
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from fcos_ray.analysis.contact_sheet import draw_contact_sheet
from fcos_ray.errors import OutputError
from tests.analysis.written import write_run

JOB = Path(__file__).resolve().parents[2] / "jobs" / "contact_sheet.py"


@pytest.fixture
def output(tmp_path: Path) -> str:
    """Two grey images of 64×48 with a box of 10×20 pixels, one that is gone since, one that changed, and an error row."""
    names = ["a", "b", "gone", "other", "bad"]
    for name in ("a", "b", "other"):
        sides = (48, 65) if name == "other" else (48, 64)
        PIL.Image.fromarray(np.full((*sides, 3), 128, np.uint8)).save(tmp_path / f"{name}.png")
    manifest = {"image_id": names, "uri": [str(tmp_path / f"{name}.png") for name in names]}
    write_run(str(tmp_path / "out"), 1, manifest, tmp_path, outcomes={"bad": "not_found", "b": [2, 1]})
    return str(tmp_path / "out")


def tiles(path: str, count: int) -> list[np.ndarray]:
    """The pictures of a sheet of one column, without captions."""
    sheet = np.asarray(PIL.Image.open(path))
    return [sheet[8 + 253 * i : 8 + 253 * i + 225, 8:308] for i in range(count)]


def coloured(tile: np.ndarray) -> np.ndarray:
    """Where something is drawn that is not grey."""
    return np.ptp(tile.astype(int), axis=2) > 60


def test_boxes_are_drawn_where_they_lie_at_the_tiles_scale(output: str, tmp_path: Path) -> None:
    picture = str(tmp_path / "sheet.png")
    sheet = draw_contact_sheet(output, picture, num_images=5, num_columns=1)
    assert (sheet.images, sheet.boxes, sheet.errors) == (4, 5, 1)
    shown = sorted(["a", "b", "gone", "other"], key=lambda name: md5(f"{name} 0".encode()).hexdigest())
    tile = dict(zip([*shown, "bad"], tiles(picture, 5), strict=True))
    one, two = coloured(tile["a"]), coloured(tile["b"])
    # xyxy 0, 1, 10, 21 in a tile of 300 / 64 times the size; the label stands above, moved into the tile
    assert one[20:97, 0].all()
    assert one[97, :46].all()
    assert not one[20:95, 3:44].any()
    assert not one[100:].any()
    assert one[:14, 5:40].mean() > 0.5
    assert two.sum() > 1.3 * one.sum()
    for name in ("gone", "other", "bad"):
        assert tile[name][0, 0].tolist() == [214, 214, 210]
        assert (tile[name] == [176, 32, 32]).all(axis=2).any()  # words


def test_boxes_below_a_score_are_left_out(output: str, tmp_path: Path) -> None:
    sheet = draw_contact_sheet(output, str(tmp_path / "s.png"), num_images=5, num_columns=1, min_score=0.8)
    assert sheet.boxes == 4


def test_the_same_seed_shows_the_same_rows_and_errors_are_few(output: str, tmp_path: Path) -> None:
    one, two = (draw_contact_sheet(output, str(tmp_path / n), num_images=2, seed=4) for n in ("1.png", "2.png"))
    assert (one.images, one.errors) == (2, 0)
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()
    assert two.boxes == one.boxes


def test_a_picture_that_is_there_is_not_replaced(output: str, tmp_path: Path) -> None:
    (tmp_path / "sheet.png").write_text("mine")
    with pytest.raises(OutputError, match=r"sheet\.png exists already; wanted the name of a new picture"):
        draw_contact_sheet(output, str(tmp_path / "sheet.png"))
    assert (tmp_path / "sheet.png").read_text() == "mine"


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ("", "a name that ends in .png, got ''"),
        ("sheet.jpg", "a name that ends in .png, got 'sheet.jpg'"),
        ("/proc/sheet.png", "/proc/sheet.png cannot be written: "),
        ("{folder}/a.png/sheet.png", "a.png/sheet.png cannot be written: "),
    ],
)
def test_a_picture_that_cannot_be_is_refused(output: str, tmp_path: Path, picture: str, message: str) -> None:
    with pytest.raises(OutputError, match=re.escape(message)):
        draw_contact_sheet(output, picture.format(folder=tmp_path))


def job(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(JOB), *arguments], capture_output=True, text=True, check=False)


def test_the_script_prints_what_it_drew_and_says_what_is_wrong(output: str, tmp_path: Path) -> None:
    done = job("--output", output, "--picture", str(tmp_path / "s.png"), "--images", "3")
    assert done.returncode == 0, done.stderr
    printed: dict[str, Any] = json.loads(done.stdout)
    assert printed["images"] == 3
    assert PIL.Image.open(tmp_path / "s.png").width == 3 * 308 + 8
    wrong = job("--output", str(tmp_path / "none"), "--picture", str(tmp_path / "t.png"))
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "holds no runs; wanted the --output of a job" in wrong.stderr
    assert not (tmp_path / "t.png").exists()
