"""Every stage finds room on every cluster, and none is fused with its neighbour."""

from __future__ import annotations

from typing import Any

import pytest

from fcos_ray.errors import ConfigError
from fcos_ray.layout import READ_CPUS, Cluster, Layout, plan_layout

ASKED: dict[str, Any] = {
    "num_rows": 10_000,
    "device": None,
    "num_detectors": None,
    "gpus_per_detector": None,
    "load_cpus": None,
}


def layout(cpus: float, gpus: float = 0, *, largest: float | None = None, **asked: Any) -> Layout:
    return plan_layout(Cluster(cpus, gpus, largest or cpus), **(ASKED | asked))


CPU_ONLY = [
    layout(cpus, **asked) for cpus in (1, 2, 3, 4, 16, 64) for asked in ({}, {"num_detectors": 1}, {"load_cpus": 0.5})
]
WITH_GPUS = [
    layout(cpus, gpus, **asked)
    for cpus in (1, 2, 4, 16, 64)
    for gpus in (1, 2, 8)
    for asked in ({}, {"num_detectors": 1}, {"gpus_per_detector": 0.25}, {"load_cpus": 0.5})
]


def reserved(found: Layout) -> float:
    """CPUs of all detectors, one load task and one reader."""
    return found.num_detectors * found.detector_cpus + found.load_cpus + READ_CPUS


@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 16, 64])
@pytest.mark.parametrize(
    "asked", [{}, {"num_detectors": 1}, {"num_detectors": 1000}, {"load_cpus": 0.1}, {"load_cpus": 99.0}]
)
def test_without_gpus_all_stages_run_at_once(cpus: int, asked: dict[str, Any]) -> None:
    found = layout(cpus, **asked)
    assert reserved(found) <= cpus + 1e-9
    assert found.num_detectors * found.detector_cpus + found.num_load_tasks * found.load_cpus <= cpus + 1e-9
    assert (found.device, found.detector_gpus) == ("cpu", 0)


@pytest.mark.parametrize("cpus", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("gpus", [1, 2, 8])
@pytest.mark.parametrize(
    "asked", [{}, {"gpus_per_detector": 0.25}, {"num_detectors": 3}, {"gpus_per_detector": 1.0, "load_cpus": 0.5}]
)
def test_beside_gpus_detectors_leave_room_to_load(cpus: int, gpus: int, asked: dict[str, Any]) -> None:
    found = layout(cpus, gpus, **asked)
    assert reserved(found) <= cpus + 1e-9
    assert found.num_detectors * found.detector_gpus <= gpus + 1e-9
    assert found.num_detectors >= 1
    assert (found.device, found.detector_threads) == ("cuda", None)


@pytest.mark.parametrize("found", CPU_ONLY + WITH_GPUS)
def test_load_and_detect_never_reserve_the_same(found: Layout) -> None:
    """Ray Data fuses neighbours whose resources are equal."""
    assert (found.load_cpus, 0) != (found.detector_cpus, found.detector_gpus)
    assert min(found.load_cpus, found.detector_cpus, found.num_load_tasks, found.load_rows) > 0


def test_a_core_of_its_own_for_every_detector() -> None:
    found = layout(4)
    assert (found.num_detectors, found.detector_threads, found.num_load_tasks) == (4, 1, 4)


def test_fewer_detectors_take_more_cores_but_not_more_than_a_node_has() -> None:
    assert layout(8, num_detectors=2).detector_threads == 4
    assert layout(8, num_detectors=1, largest=4).detector_threads == 4


@pytest.mark.parametrize(("share", "wanted"), [(None, 2), (1.0, 2), (0.5, 4), (0.3, 6), (0.1, 20), (2.0, 1)])
def test_gpus_may_be_shared_or_joined(share: float | None, wanted: int) -> None:
    found = layout(64, 2, gpus_per_detector=share)
    assert (found.num_detectors, found.detector_gpus) == (wanted, share or 1.0)


def test_there_are_no_more_detectors_than_asked_for() -> None:
    assert layout(64, 8, num_detectors=3).num_detectors == 3
    assert layout(64, num_detectors=3).num_detectors == 3


def test_loading_takes_no_more_than_it_may() -> None:
    found = layout(64, 1, load_cpus=3.0)
    assert found.num_load_tasks * found.load_cpus == 3.0
    assert layout(64, 1).num_load_tasks == 63


def test_a_cluster_with_gpus_can_be_told_not_to_use_them() -> None:
    found = layout(4, 2, device="cpu")
    assert (found.device, found.detector_gpus, found.num_detectors) == ("cpu", 0, 4)


@pytest.mark.parametrize(
    ("gpus", "asked", "wanted"),
    [
        (0, {"device": "cuda"}, r"wanted 1 GPU per detector \(--device cuda\), but the cluster has 0 GPUs and 4 CPUs"),
        (1, {"gpus_per_detector": 2.0}, r"wanted 2 GPU per detector .* the cluster has 1 GPUs"),
        (0, {"gpus_per_detector": 0.5}, r"wanted 0.5 GPU per detector \(--gpus-per-detector\)"),
        (1, {"device": "cuda", "gpus_per_detector": 0.0}, r"gpus_per_detector must be above 0 with device cuda, got 0"),
    ],
)
def test_gpus_that_are_not_there_are_an_error(gpus: int, asked: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        layout(4, gpus, **asked)


@pytest.mark.parametrize(("rows", "wanted"), [(1, 4), (100, 7), (1_000_000, 128)])
def test_load_tasks_are_small_for_small_jobs(rows: int, wanted: int) -> None:
    assert layout(4, num_rows=rows).load_rows == wanted


def test_load_tasks_are_large_where_micro_batches_are() -> None:
    many = 1_000_000
    assert layout(4, 1, num_rows=many).load_rows == layout(4, num_rows=many, max_micro_batch=16).load_rows == 1024


def test_a_layout_describes_itself_in_one_line() -> None:
    assert layout(4).describe() == (
        "device cpu: up to 4 detectors (0.7 CPU each), up to 4 load tasks (0.25 CPU each) of 128 images"
    )
    assert "0.5 GPU each" in layout(8, 1, gpus_per_detector=0.5).describe()


@pytest.mark.parametrize(("cpus", "commits"), [(1, 2), (2, 2), (8, 2), (16, 4), (64, 8)])
def test_few_cores_start_few_processes_for_commits(cpus: int, commits: int) -> None:
    assert layout(cpus).num_commits == layout(cpus, 1).num_commits == commits


def test_few_readers_hold_a_share_of_a_cpu_while_they_wait() -> None:
    assert [layout(cpus).num_read_tasks for cpus in (1, 2, 16)] == [1, 1, 1]
    assert [layout(cpus, 4).num_read_tasks for cpus in (64, 4096)] == [3, 8]
