"""Layout: settings and a cluster's size -> what each stage reserves. Pure arithmetic; knows neither Ray nor models.

Every stage gets another share of a CPU on purpose: Ray Data fuses neighbours whose resources are equal, and a fused
load-and-detect would decode on the GPU's one actor (Ray 2.60). On a machine without GPUs the shares of one CPU add up
to one, so that even a single CPU runs all stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from fcos_ray.errors import ConfigError
from fcos_ray.sizes import MAX_MICRO_BATCH

READ_CPUS: Final = 0.05
LOAD_CPUS_BESIDE_CPU_DETECTORS: Final = 0.25
DETECT_CPUS_PER_CORE: Final = 0.7
LOAD_CPUS_BESIDE_GPUS: Final = 1.0  # decoding fills a core
DETECT_CPUS_BESIDE_GPUS: Final = 0.5
MAX_COMMITS: Final = 8
CPUS_PER_COMMIT: Final = 4  # a commit reserves nothing, but each at a time is a process to start: 2 s of CPU


@dataclass(frozen=True, slots=True)
class Cluster:
    """What Ray says it has."""

    num_cpus: float
    num_gpus: float
    largest_node_cpus: float
    num_nodes: int = 1


@dataclass(frozen=True, slots=True)
class Layout:
    """What one task or actor of each stage reserves, and how many there may be."""

    device: Literal["cpu", "cuda"]
    num_detectors: int
    detector_cpus: float
    detector_gpus: float
    detector_threads: int | None  # None: torch decides
    load_cpus: float
    num_load_tasks: int
    load_rows: int  # images per load task
    micro_batch: int = 1  # images of one padded shape in a forward pass, at most
    num_commits: int = 2  # at a time, at most

    @property
    def num_read_tasks(self) -> int:
        """Reading pinned rows is thousands of times faster than loading them.

        Each task is one more process to start, which keeps its share of a CPU while it waits (read_ahead.py).
        """
        return max(1, min(8, self.num_load_tasks // 16))

    def describe(self) -> str:
        """One line for the log."""
        gpus = f", {self.detector_gpus:g} GPU each" if self.detector_gpus else ""
        return (
            f"device {self.device}: up to {self.num_detectors} detectors ({self.detector_cpus:g} CPU each{gpus}), "
            f"up to {self.num_load_tasks} load tasks ({self.load_cpus:g} CPU each) of {self.load_rows} images"
        )


def plan_layout(
    cluster: Cluster,
    *,
    num_rows: int,
    device: Literal["cpu", "cuda"] | None,
    num_detectors: int | None,
    gpus_per_detector: float | None,
    load_cpus: float | None,
    max_micro_batch: int | None = None,
) -> Layout:
    """Share out a cluster. `load_cpus` are all the CPUs that loading may use at once.

    Raises ConfigError when cuda was asked for and there is no GPU, or not enough for one detector.
    """
    chosen = device or ("cuda" if cluster.num_gpus > 0 else "cpu")
    gpus = gpus_per_detector if gpus_per_detector is not None else (1.0 if chosen == "cuda" else 0.0)
    if chosen == "cuda" and gpus <= 0:
        raise ConfigError(f"gpus_per_detector must be above 0 with device cuda, got {gpus:g}")
    if gpus > cluster.num_gpus:
        raise ConfigError(
            f"wanted {gpus:g} GPU per detector ({'--device cuda' if chosen == 'cuda' else '--gpus-per-detector'}), but "
            f"the cluster has {cluster.num_gpus:g} GPUs and {cluster.num_cpus:g} CPUs; add GPU nodes, or use --device cpu"
        )
    if gpus:
        detector_cpus, threads, share = DETECT_CPUS_BESIDE_GPUS, None, LOAD_CPUS_BESIDE_GPUS
        # Detectors that take the last CPU wait for ever for what nobody loads: 8 GPUs beside 2 CPUs feed one.
        fed = int((cluster.num_cpus - share - READ_CPUS) / detector_cpus)
        detectors = max(1, min(int(cluster.num_gpus / gpus + 1e-9), fed))
        detectors = min(detectors, num_detectors or detectors)
    else:
        detectors = max(1, min(num_detectors or int(cluster.num_cpus), int(cluster.num_cpus)))
        # One thread per detector and one detector per core is fastest (15 % over one two-thread process, torch 2.14).
        cores = max(1, min(int(cluster.num_cpus / detectors), int(cluster.largest_node_cpus)))
        detector_cpus, threads, share = DETECT_CPUS_PER_CORE * cores, cores, LOAD_CPUS_BESIDE_CPU_DETECTORS
    left = max(cluster.num_cpus - detectors * detector_cpus - READ_CPUS, READ_CPUS)
    share = min(share, left, load_cpus or share)
    load_tasks = max(1, int(min(left, load_cpus or left) / share + 1e-9))
    # Ray Data looks every 0.1 s which tasks have ended: beside tasks of 512 thumbnails, of 0.33 s, a quarter of all room for
    # load tasks was empty (1,024: 2,250 -> 2,600 images/s). But each task should still find a peer to work beside, and 1,024
    # photographs of 12 Mpx take a core more than a minute, which is done again where a worker dies. A task orders its images
    # by shape: 512 of mixed sizes fill micro-batches of 16 by half and more.
    micro_batch = max_micro_batch or MAX_MICRO_BATCH[chosen]
    load_rows = max(4, min(max(128, 64 * micro_batch), -(-num_rows // (4 * load_tasks))))
    commits = max(2, min(MAX_COMMITS, int(cluster.num_cpus / CPUS_PER_COMMIT)))
    return Layout(chosen, detectors, detector_cpus, gpus, threads, share, load_tasks, load_rows, micro_batch, commits)
