"""The rooms and their doors: imports run one way, and heavy libraries stay where they belong (DESIGN §2)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "fcos_ray"
MODULES = {
    ".".join(["fcos_ray", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
BASE = ("fcos_ray.errors", "fcos_ray.types", "fcos_ray.sizes", "fcos_ray.storage")
ROOMS = ("inputs", "model", "outputs", "storage")
AT_HOME = {  # library: where it may be imported
    "torch": ("model", "training"),
    "torchvision": ("model", "training"),
    "PIL": ("inputs.decode", "sample", "analysis.contact_sheet", "benchmark.photographs"),
    "duckdb": (
        "analysis",
        "inputs.explain",
        "inputs.formats",
        "inputs.json_lines",
        "inputs.listing",
        "inputs.manifests",
        "inputs.plan",
        "inputs.pin",
        "inputs.scans",
        "inputs.selection",
        "outputs.index",
    ),
    "ray": (
        "pipeline",
        "read_ahead",
        "block_stats",
        "roll",
        "execution",
        "commit_task",
        "session",
        "job",
        "analysis.rows",
        "benchmark.stages",
        "benchmark.fidelity",
    ),
    "aiohttp": ("storage.retries", "inputs.http"),
    "fsspec": ("storage", "inputs.fetch"),
    "pydantic": ("settings", "config", "training.config"),
    "faster_coco_eval": ("analysis.coco_metric",),
    "matplotlib": ("analysis.curves",),
}


def imported(path: Path) -> set[str]:
    """Every module a file imports, also within functions, but not for type checking only."""
    tree = ast.parse(path.read_text())
    typing_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


IMPORTED = {name: imported(path) for name, path in MODULES.items()}


def is_in(name: str, homes: tuple[str, ...]) -> bool:
    return any(name == home or name.startswith(f"{home}.") for home in homes)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_themselves_and_the_base_only(room: str) -> None:
    allowed = (f"fcos_ray.{room}", *BASE)
    members = {name: found for name, found in IMPORTED.items() if is_in(name, (f"fcos_ray.{room}",))}
    assert members
    for name, found in members.items():
        ours = {other for other in found if other.startswith("fcos_ray.")}
        assert not {o for o in ours if not is_in(o, allowed)}, name


@pytest.mark.parametrize("library", AT_HOME)
def test_libraries_stay_in_their_rooms(library: str) -> None:
    homes = tuple(f"fcos_ray.{home}" for home in AT_HOME[library])
    users = {name for name, found in IMPORTED.items() if any(is_in(other, (library,)) for other in found)}
    assert users
    assert not {name for name in users if not is_in(name, homes)}


def test_config_is_read_at_the_top_only() -> None:
    users = {name for name, found in IMPORTED.items() if any(is_in(o, ("fcos_ray.config",)) for o in found)}
    assert users <= {"fcos_ray.pipeline", "fcos_ray.job", "fcos_ray.request"}


def test_analysis_never_runs_the_model() -> None:
    members = {name: found for name, found in IMPORTED.items() if is_in(name, ("fcos_ray.analysis",))}
    assert members
    allowed = ("fcos_ray.analysis", "fcos_ray.inputs", "fcos_ray.outputs", "fcos_ray.pinned", *BASE)
    for name, found in members.items():
        assert not {o for o in found if o.startswith("fcos_ray.") and not is_in(o, allowed)}, name


def test_errors_and_types_import_nothing_of_ours() -> None:
    for name in ("fcos_ray.errors", "fcos_ray.types"):
        assert not {other for other in IMPORTED[name] if other.startswith("fcos_ray")}


def test_there_are_no_cycles() -> None:
    graph = {name: {other for other in found if other in MODULES and other != name} for name, found in IMPORTED.items()}
    while free := {name for name, needs in graph.items() if not needs & graph.keys()}:
        graph = {name: needs for name, needs in graph.items() if name not in free}
    assert not {name: needs & graph.keys() for name, needs in graph.items()}
