"""Request: a job's settings -> what each room is given. Knows every room's words, runs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fcos_ray import storage
from fcos_ray.config import JobConfig
from fcos_ray.errors import ConfigError
from fcos_ray.inputs.fetch import FetchPolicy
from fcos_ray.inputs.manifests import Source
from fcos_ray.inputs.plan import PlanSettings
from fcos_ray.inputs.selection import SelectSettings
from fcos_ray.layout import Cluster, Layout, plan_layout
from fcos_ray.load import LoadSettings
from fcos_ray.model.parameters import Weights
from fcos_ray.outputs import runs
from fcos_ray.outputs.schema import RESERVED_COLUMNS


def make_request(config: JobConfig, sources: Sequence[Source], labelled_as: Mapping[str, Any]) -> runs.Request:
    """What is asked for, as the records of an output compare it."""
    files = [{"uri": s.uri, "num_bytes": s.num_bytes, "version": s.version} for s in sources]
    digest = runs.request_digest(files, config.request_settings())
    if config.select == ["all"]:
        return runs.Request(digest, labelled_as, "always")
    time_may_mend = config.check_changed or any(choice.startswith("failed") for choice in config.select)
    return runs.Request(digest, labelled_as, "never" if time_may_mend else "unless_changed")


def output_uri(config: JobConfig) -> str:
    """Where the output lies, spelled one way. Raises ConfigError where nothing can be written."""
    try:
        location = storage.parse_uri(config.output)
    except storage.InvalidUri as error:
        raise ConfigError(f"output is not a uri that can be written: {error}") from error
    if location.scheme in ("http", "https", "ftp"):
        raise ConfigError(f"output wanted a folder or an s3:// prefix, got {location.scheme}://, which is read only")
    return location.uri


def labelling(weights: Weights, config: JobConfig) -> dict[str, Any]:
    """What all runs of an output share: labelling.json."""
    return {
        "architecture": weights.architecture,
        "weights": weights.name,
        "weights_sha256": weights.sha256,
        "categories": list(weights.categories),
        "settings": config.labelling_settings(),
    }


def check_no_secrets(config: JobConfig) -> None:
    """Settings are written to run.json and stand in every log: raise ConfigError for uris that hold secrets."""
    named = [("manifest", uri) for uri in config.manifest] + [("output", config.output), ("weights", config.weights)]
    for name, uri in named:
        if what := storage.secret_in(uri):
            raise ConfigError(
                f"{name} wanted a uri without secrets, got {storage.without_secrets(uri)}, which {what}; it would be "
                "written to run.json. Give credentials in the environment, or a copy of the file"
            )


def categories(given: Sequence[str] | None) -> list[str] | None:
    """Names of the labels: as given, or the lines of a file."""
    if given is not None and len(given) == 1 and Path(given[0]).is_file():
        return [line.strip() for line in Path(given[0]).read_text().splitlines() if line.strip()]
    return list(given) if given is not None else None


def fetch_policy(config: JobConfig, sources: Sequence[Source]) -> FetchPolicy:
    """What may be read, and how patiently. Raises ConfigError for a root that is no folder."""
    folders = [storage.parent(s.uri) for s in sources if storage.parse_uri(s.uri).scheme == "file"]
    roots = [Path(root) for root in config.allow_root or dict.fromkeys(folders)]
    if absent := [str(root) for root in roots if not root.is_dir()]:
        raise ConfigError(f"--allow-root {absent[0]}: no such folder")
    return FetchPolicy(
        # Both spellings: uris are held against the root as it was given, and against the real one when they are read.
        allow_roots=tuple(dict.fromkeys(str(p) for root in roots for p in (root.absolute(), root.resolve()))),
        allow_schemes=("s3", "file", *(("http", "https") if config.allow_http else ())),
        allow_private_hosts=config.allow_private_hosts,
        max_bytes=config.max_image_bytes,
        timeout_seconds=config.fetch_timeout_seconds,
        deadline_seconds=config.fetch_deadline_seconds,
        max_attempts=config.fetch_max_attempts,
        concurrency=config.fetch_concurrency,
    )


def plan_settings(config: JobConfig, sizes: Mapping[str, int], fetch_policy: FetchPolicy) -> PlanSettings:
    """`sizes`: min_size and max_size, which the weights may decide."""
    return PlanSettings(
        partition_by=tuple(config.partition_by),
        columns=None if config.columns is None else tuple(config.columns),
        rename=config.renames,
        limit=config.limit,
        drop_duplicates=config.drop_duplicates,
        refused_uris=config.refused_uris,
        shard_rows=config.shard_rows,
        max_files=config.max_files,
        min_size=sizes["min_size"],
        max_size=sizes["max_size"],
        fetch=fetch_policy,
        select=SelectSettings(
            select=tuple(config.select),
            check_changed=config.check_changed,
            tombstones=config.tombstones,
            max_tombstone_fraction=config.max_tombstone_fraction,
            explain=config.explain,
        ),
        reserved_columns=RESERVED_COLUMNS,
    )


def layout_for(config: JobConfig, cluster: Cluster, num_rows: int) -> Layout:
    """What each stage reserves. Raises ConfigError where the cluster lacks what was asked for."""
    return plan_layout(
        cluster,
        num_rows=num_rows,
        device=config.device,
        num_detectors=config.num_detectors,
        gpus_per_detector=config.gpus_per_detector,
        load_cpus=config.load_cpus,
        max_micro_batch=config.max_micro_batch,
    )


def load_settings(
    config: JobConfig, fetch: FetchPolicy, sizes: Mapping[str, int], layout: Layout, *, pinned: Mapping[str, Any]
) -> LoadSettings:
    """`sizes`: as in `plan_settings`. `pinned`: the settings that the run was planned with.

    What makes an image an error row is the run's affair, not that of the command that goes on with it.
    """
    return LoadSettings(
        fetch=replace(fetch, max_bytes=pinned["max_image_bytes"]),
        max_pixels=pinned["max_pixels"],
        decode_deadline_seconds=pinned["decode_deadline_seconds"],
        decode_memory_bytes=pinned["decode_memory_bytes"],
        min_size=sizes["min_size"],
        max_size=sizes["max_size"],
        exact_resize=config.exact_resize,
        fast_decode=config.fast_decode,
        micro_batch=layout.micro_batch,
    )


def detector_options(labelling_settings: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """Detector's arguments beside the weights."""
    loads = ("exact_resize", "fast_decode")
    return {name: value for name, value in labelling_settings.items() if name not in loads} | {
        "device": layout.device,
        "num_threads": layout.detector_threads,
        "max_micro_batch": layout.micro_batch,
    }
