"""Whole: draw, measure every stage, the detectors and the job, and judge. Composes the room's other parts."""

from __future__ import annotations

import functools
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import fcos_ray as fr
from fcos_ray import storage
from fcos_ray.benchmark.photographs import Photographs, parse_size, write_photographs
from fcos_ray.benchmark.stages import NullDetector, detectors_alone, in_memory, mean_fill, measure_stages
from fcos_ray.benchmark.verdict import Capacity, bottleneck, load_capacity
from fcos_ray.errors import ConfigError
from fcos_ray.inputs.fetch import FetchPolicy
from fcos_ray.layout import Cluster, Layout, plan_layout
from fcos_ray.model.architectures import INPUT_SETTINGS
from fcos_ray.model.detector import Detector
from fcos_ray.model.weights import load_weights
from fcos_ray.pipeline import LoadSettings, MakeDetector
from fcos_ray.session import ray_session
from fcos_ray.summary import versions

_STAGE_IMAGES: Final = 16  # in the stages alone
_ALONE_SECONDS: Final = 20.0  # a detector's speed drifts by a tenth in a few seconds
_SHARDS: Final = 20  # of the whole job: its steady state is from the first commit to the last


def measure(
    folder: str,
    *,
    image_size: str,
    images: int,
    weights: str,
    precision: str,
    device: str | None,
    num_detectors: int | None,
    null_detector: bool,
    cap: int,
    no_sizes: bool,
) -> dict[str, Any]:
    """Everything that jobs/benchmark.py prints, as JSON. Raises UserError, StorageError, RunStopped."""
    sizes = parse_size(image_size)
    if images < _SHARDS:
        raise ConfigError(f"--images wanted at least {_SHARDS}, got {images}")
    loaded = load_weights(weights)
    given = loaded.input_settings(**dict.fromkeys(INPUT_SETTINGS))
    model_size: dict[str, Any] = {"min_size": given["min_size"], "max_size": given["max_size"]}
    place = storage.parse_uri(folder).uri
    with ray_session() as cluster:
        if cluster.num_nodes > 1 and storage.parse_uri(place).scheme == "file":
            raise ConfigError(f"the cluster has {cluster.num_nodes} nodes: --folder wanted a prefix that all can read")
        drawn = write_photographs(place, sizes, num_images=images, with_sizes=not no_sizes)
        config = _config(
            drawn,
            place,
            weights=weights,
            precision=precision,
            device=device,
            num_detectors=num_detectors,
            images=images,
            max_micro_batch=cap if null_detector else None,
        )
        layout = _layout(cluster, config, images)
        load = _load_settings(config, drawn, model_size)
        options: dict[str, Any] = {
            "device": layout.device,
            "precision": precision,
            "num_threads": layout.detector_threads,
        }
        make: MakeDetector = functools.partial(Detector, loaded, **options)
        if null_detector:
            make = functools.partial(NullDetector, **model_size, max_micro_batch=cap)
        some = drawn.uris[:_STAGE_IMAGES]
        detector = None if null_detector else Detector(loaded, **options)
        stages = measure_stages(some, load, detector, output=storage.join(place, "stages"))
        del detector
        alone = detectors_alone(in_memory(some, load), make, layout, seconds=0.5 if null_detector else _ALONE_SECONDS)
        summary = fr.run(config, make_detector=make if null_detector else None)
        fill = _fill(config, cap) if null_detector else None
    capacity = Capacity(alone, load_capacity(stages.load, layout), summary.images_per_second)
    return {
        "asked": {"image_size": image_size, "images": images, "weights": weights, "precision": precision},
        "machine": _machine(cluster),
        "layout": asdict(layout),
        "bytes_per_image": round(drawn.bytes_per_image),
        "stages": asdict(stages),
        "images_per_second": {
            "detectors alone": capacity.detectors, "load alone": capacity.load, "whole job, steady": capacity.job,
            "whole job, with start": summary.rows / summary.wall_seconds,
        },
        "efficiency": None if null_detector else capacity.efficiency,
        "fill": fill,
        "bottleneck": None if null_detector else bottleneck(capacity, stages.load, layout),
    }  # fmt: skip


def _config(drawn: Photographs, folder: str, *, images: int, **settings: Any) -> fr.JobConfig:
    local = storage.parse_uri(folder).scheme == "file"
    return fr.JobConfig(
        manifest=[drawn.manifest],
        output=storage.join(folder, "labels"),
        allow_root=[folder] if local else [],
        shard_rows=max(1, images // _SHARDS),
        **settings,
    )


def _layout(cluster: Cluster, config: fr.JobConfig, num_rows: int) -> Layout:
    return plan_layout(
        cluster,
        num_rows=num_rows,
        device=config.device,
        num_detectors=config.num_detectors,
        gpus_per_detector=config.gpus_per_detector,
        load_cpus=config.load_cpus,
        max_micro_batch=config.max_micro_batch,
    )


def _load_settings(config: fr.JobConfig, drawn: Photographs, model_size: dict[str, Any]) -> LoadSettings:
    return LoadSettings(
        fetch=FetchPolicy(
            allow_roots=(storage.parent(drawn.manifest),) if config.allow_root else (),
            concurrency=config.fetch_concurrency,
        ),
        max_pixels=config.max_pixels,
        decode_deadline_seconds=config.decode_deadline_seconds,
        decode_memory_bytes=config.decode_memory_bytes,
        exact_resize=config.exact_resize,
        **model_size,
    )


def _fill(config: fr.JobConfig, cap: int) -> float:
    """Mean fill of the micro-batches, from what the null detector wrote into its boxes."""
    found = fr.open_dataset(config.output).rows().to_arrow()["boxes"].to_pylist()
    return mean_fill([boxes[0][2] for boxes in found], max_micro_batch=cap)


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
