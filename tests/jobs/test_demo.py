"""The demo: one command from nothing to a labelled, measured, queried corpus and a picture of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest

DEMO = Path(__file__).resolve().parents[2] / "jobs" / "demo.py"


@pytest.mark.ray
def test_the_demo_labels_measures_asks_and_shows(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "labelling.json").write_text("of the demo before")
    done = subprocess.run(
        [sys.executable, str(DEMO), "--folder", str(tmp_path), "--images", "24"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{") and line.endswith("}")]
    summary = next(found for found in printed if "run_id" in found)
    assert (summary["state"], summary["rows"], summary["error"]) == ("complete", 24, 1)
    assert next(found["mean_ap"] for found in printed if "mean_ap" in found) > 0.6
    assert "mean_score" in done.stdout
    assert "circle" in done.stdout
    assert PIL.Image.open(tmp_path / "demo" / "contact-sheet.png").width > 1000
    commands = [line for line in done.stderr.splitlines() if line.startswith("$ python jobs/")]
    assert len(commands) == 4


@pytest.mark.parametrize("name", ["demo", "demo-images"])
def test_a_folder_that_is_no_demos_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.tex").write_text("years")
    done = subprocess.run(
        [sys.executable, str(DEMO), "--folder", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{tmp_path / name} is there and no demo's; choose another --folder" in done.stderr
    assert (tmp_path / name / "thesis.tex").read_text() == "years"
