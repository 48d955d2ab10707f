"""The README is true: its commands run, its tables are the code's. `python tests/test_readme.py` writes the settings table."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fcos_ray.config import JobConfig
from fcos_ray.errors import ERROR_CODES
from fcos_ray.settings import settings_table

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
_BLOCK = re.compile(r"(?:<!-- (?P<mark>[^\n]*) -->\n)?```(?P<language>bash|python)\n(?P<code>.*?)```", re.DOTALL)
_SETTINGS = re.compile(r"(<!-- settings -->\n).*?(\n<!-- /settings -->)", re.DOTALL)


def blocks() -> list[re.Match[str]]:
    return list(_BLOCK.finditer(README.read_text()))


def test_every_command_is_run_here_or_says_what_it_needs() -> None:
    marks = [block["mark"] or "" for block in blocks()]
    assert len(marks) > 8
    assert all(mark == "run" or mark.startswith("needs: ") for mark in marks), marks
    assert marks.count("run") >= 4


def test_every_script_and_make_target_it_names_is_there() -> None:
    text = README.read_text()
    scripts = set(re.findall(r"\bjobs/\w+\.py", text))
    assert scripts >= {f"jobs/{path.name}" for path in (ROOT / "jobs").glob("*.py")} - {"jobs/demo.py"}
    assert all((ROOT / script).exists() for script in scripts)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make ([a-z-]+)", text, re.MULTILINE)) <= targets
    assert not [link for link in re.findall(r"\]\((?!http)([^)#]+)", text) if not (ROOT / link).exists()]


def test_every_module_stands_in_the_annotated_tree() -> None:
    tree = README.read_text().split("## Finding the way")[1]
    for path in (ROOT / "fcos_ray").rglob("*.py"):
        if path.name != "__init__.py" and path.parent.name != "storage":
            assert path.name in tree, path


def test_what_the_security_page_names_is_there() -> None:
    named = re.findall(r"`((?:fcos_ray|tests)/[\w/]+\.py)`", (ROOT / "SECURITY.md").read_text())
    assert len(named) > 15
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_settings_table_is_the_definitions() -> None:
    assert _SETTINGS.sub(_with_table, README.read_text()) == README.read_text(), "make readme writes it"


def _with_table(found: re.Match[str]) -> str:
    return f"{found[1]}{settings_table(JobConfig)}{found[2]}"


def test_the_error_codes_are_the_closed_list() -> None:
    rows = re.findall(r"^\| (\w+) \| (fetch|decode|detect) \| (yes|no) \| (.*) \|$", README.read_text(), re.MULTILINE)
    assert {code: (stage, transient == "yes", words) for code, stage, transient, words in rows} == ERROR_CODES


@pytest.mark.ray
def test_its_commands_run_as_they_stand(tmp_path: Path) -> None:
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    for block in blocks():
        if block["mark"] != "run":
            continue
        command = ["bash", "-euxo", "pipefail", "-c", block["code"]]
        if block["language"] == "python":
            (tmp_path / "example.py").write_text(block["code"])
            command = [sys.executable, "example.py"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block['code']}\n{done.stderr[-3000:]}"
    made = ("labels/labelling.json", "curves.png", "sheet.png", "images.parquet", "trained/weights.safetensors")
    assert all((tmp_path / "out" / name).exists() for name in made)


if __name__ == "__main__":
    README.write_text(_SETTINGS.sub(_with_table, README.read_text()))
