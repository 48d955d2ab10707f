"""Whole: draw, measure every stage, the detectors and the job, and judge. Composes the room's other parts."""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import fcos_ray as fr
from fcos_ray import storage
from fcos_ray.benchmark.fidelity import fast_decode_cost
from fcos_ray.benchmark.null import NullDetector, mean_fill
from fcos_ray.benchmark.photographs import MANIFEST, parse_size, write_photographs
from fcos_ray.benchmark.stages import detectors_alone, measure_stages
from fcos_ray.benchmark.verdict import Capacity, bottleneck
from fcos_ray.errors import ConfigError
from fcos_ray.inputs.manifests import find_sources
from fcos_ray.job import fcos_maker
from fcos_ray.layout import Cluster
from fcos_ray.model.parameters import INPUT_SETTINGS
from fcos_ray.model.weights import load_weights
from fcos_ray.pipeline import MakeDetector
from fcos_ray.request import detector_options, fetch_policy, layout_for, load_settings
from fcos_ray.session import ray_session
from fcos_ray.summary import versions

_STAGE_IMAGES: Final = 16  # in the stages alone
_SHARDS: Final = 20  # of the whole job at most
_MIN_IMAGES: Final = 20
_MIN_SHARD_ROWS: Final = 64  # as small as a job makes them: each commit takes CPU from the detectors


@dataclass(frozen=True, slots=True)
class Asked:
    """What to measure."""

    image_size: str  # <width>x<height>, or mixed
    images: int  # in the whole job
    settings: Mapping[str, Any]  # of the job: weights, precision, device, num_detectors, fast_decode
    null_detector: bool = False  # no model
    cap: int = 16  # images in a micro-batch at most, without a model
    with_sizes: bool = True  # whether the manifest has width and height
    seconds: float = 20.0  # of the detectors alone: their speed drifts by a tenth in a few seconds


def measure(folder: str, asked: Asked) -> dict[str, Any]:
    """Everything that jobs/benchmark.py prints, as JSON. Raises UserError, StorageError, RunStopped."""
    sizes = parse_size(asked.image_size)
    if asked.images < _MIN_IMAGES:
        raise ConfigError(f"--images wanted at least {_MIN_IMAGES}, got {asked.images}")
    place = storage.parse_uri(folder).uri
    config = _config(asked, place)
    loaded = load_weights(config.weights)
    given = loaded.input_settings(**{name: getattr(config, name) for name in INPUT_SETTINGS})
    config = config.model_copy(update=given)
    with ray_session() as cluster:
        if cluster.num_nodes > 1 and storage.parse_uri(place).scheme == "file":
            raise ConfigError(f"the cluster has {cluster.num_nodes} nodes: --folder wanted a prefix that all can read")
        layout = layout_for(config, cluster, asked.images)
        drawn = write_photographs(place, sizes, num_images=asked.images, with_sizes=asked.with_sizes)
        policy = fetch_policy(config, find_sources(config.manifest))
        load = load_settings(config, policy, given, layout, pinned=config.model_dump())
        null: MakeDetector | None = None
        if asked.null_detector:
            size = {"min_size": given["min_size"], "max_size": given["max_size"]}
            null = functools.partial(NullDetector, **size, max_micro_batch=asked.cap)
        make = null or fcos_maker(loaded, detector_options(config.labelling_settings(), layout))
        some = drawn.uris[:_STAGE_IMAGES]
        measured = measure_stages(
            some,
            load,
            make,
            layout,
            seconds=asked.seconds if null is None else 0.5,
            output=storage.join(place, "stages"),
        )
        summary = fr.run(config, make_detector=null)
        # a machine drifts: before the job and after it are held against what was between
        alone = [measured.detectors_alone]
        if null is None:
            alone.append(detectors_alone(some, load, make, layout, seconds=asked.seconds))
        cost = fast_decode_cost(load) if load.fast_decode and null is None else None
    stages = measured.stages
    capacity = Capacity(sum(alone) / len(alone), _steady(summary) if asked.null_detector else summary.images_per_second)
    return {
        "asked": asdict(asked),
        "machine": _machine(cluster),
        "layout": asdict(layout),
        "bytes_per_image": round(drawn.bytes_per_image),
        "stages": asdict(stages),
        "model": None if measured.model is None else asdict(measured.model),
        "images_per_second": {
            "detectors alone": capacity.detectors,
            "whole job, steady": capacity.job,
            "whole job, with start": summary.rows / summary.wall_seconds,
        },
        "detectors alone, before and after": alone,
        "busy": None if asked.null_detector else summary.detectors_busy,
        "efficiency": None if asked.null_detector else capacity.efficiency,
        "fill": _fill(config, asked.cap) if asked.null_detector else None,
        "fast_decode": None if cost is None else asdict(cost),
        "bottleneck": None if asked.null_detector else bottleneck(capacity, stages, load, layout, config.precision),
    }


def _config(asked: Asked, folder: str) -> fr.JobConfig:
    local = storage.parse_uri(folder).scheme == "file"
    return fr.JobConfig(
        manifest=[storage.join(folder, MANIFEST)],
        output=storage.join(folder, "labels"),
        allow_root=[folder] if local else [],
        shard_rows=max(asked.images // _SHARDS, min(_MIN_SHARD_ROWS, asked.images // 4)),
        max_micro_batch=asked.cap if asked.null_detector else None,
        **asked.settings,
    )


def _steady(summary: fr.RunSummary) -> float | None:
    """Images per second after the first shard. Without a model detectors' own clocks say how fast they empty a queue."""
    if summary.startup_seconds is None:
        return None
    return summary.rows * (1 - 1 / summary.shards) / (summary.wall_seconds - summary.startup_seconds)


def _fill(config: fr.JobConfig, cap: int) -> float:
    """Mean fill of the micro-batches, from what the null detector wrote as scores."""
    found = fr.open_dataset(config.output).rows().to_arrow()["scores"].drop_null().to_pylist()
    return mean_fill([scores[0] for scores in found], max_micro_batch=cap)


def _machine(cluster: Cluster) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cluster_cpus": cluster.num_cpus,
        "cluster_gpus": cluster.num_gpus,
        "nodes": cluster.num_nodes,
        "versions": versions(),
        "measured_at": datetime.now(UTC).isoformat(),
    }
