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
    (tmp_path / "demo" / "of-the-demo-before").touch()
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
    assert not (tmp_path / "demo" / "of-the-demo-before").exists()
    commands = [line for line in done.stderr.splitlines() if line.startswith("$ python jobs/")]
    assert len(commands) == 4
