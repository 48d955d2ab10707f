"""`import fcos_ray` offers what it says, and costs little."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fcos_ray


@pytest.mark.parametrize("name", fcos_ray.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(fcos_ray, name).__module__.startswith("fcos_ray.")


def test_public_names_are_sorted_and_others_are_refused() -> None:
    assert fcos_ray.__all__ == sorted(fcos_ray.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Detecter'"):
        _ = fcos_ray.Detecter


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("fcos_ray", "torch ray numpy PIL duckdb pyarrow s3fs"),
        ("fcos_ray.config", "torch ray PIL duckdb pyarrow s3fs"),
        ("fcos_ray.inputs.decode", "torch ray duckdb pyarrow s3fs"),  # what the guarded child imports
    ],
)
def test_importing_costs_no_heavy_library(module: str, heavy: str) -> None:
    code = f"import sys, {module}; print(*sorted(set({heavy.split()!r}) & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == ""
