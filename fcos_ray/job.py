"""Job: resolve → plan → pipeline → gather → commit → finish. Composes the rooms; each step's how is in its own room.

An open run is finished first, with its pinned plan; then the request is planned. What is committed is what lies in the
output: the driver holds shard numbers only, and may die at any line here.
"""

from __future__ import annotations

import functools
import logging
import platform
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import ray

import fcos_ray
from fcos_ray import storage
from fcos_ray.config import JobConfig
from fcos_ray.errors import ConfigError, ManifestError, OutputError, StorageError
from fcos_ray.execution import Execution, ExecutionSettings, ExecutionStats
from fcos_ray.inputs.fetch import FetchPolicy
from fcos_ray.inputs.manifests import Source, find_sources
from fcos_ray.inputs.pin import pin, read_partitions
from fcos_ray.inputs.plan import Draft, PlanSettings, draft_plan
from fcos_ray.layout import Cluster, Layout, plan_layout
from fcos_ray.model.architectures import INPUT_SETTINGS, Weights
from fcos_ray.model.detector import Detector
from fcos_ray.model.weights import load_weights
from fcos_ray.outputs import runs
from fcos_ray.outputs.audit import audit
from fcos_ray.outputs.commit import ShardCounts
from fcos_ray.outputs.schema import RESERVED_COLUMNS
from fcos_ray.pinned import pinned_run
from fcos_ray.pipeline import ImageDetector, LoadSettings, MakeDetector
from fcos_ray.session import ray_session

logger = logging.getLogger("fcos_ray")


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What a job did. The last line on stdout is this as JSON."""

    state: Literal["complete", "nothing_to_do", "planned"]
    output: str
    run_id: str
    rows: int
    shards: int
    ok: int = 0
    error: int = 0
    errors_by_code: dict[str, int] = field(default_factory=dict)
    detections: int = 0
    duplicates_dropped: int = 0
    uris_refused: int = 0
    images_per_second: float | None = None  # steady state of this process: from its first to its last commit
    wall_seconds: float = 0.0
    startup_seconds: float | None = None  # until the first commit
    retries: int = 0  # fetch attempts beyond the first
    seconds: dict[str, float] = field(default_factory=dict)  # per stage, summed over images, restarts included

    @property
    def error_fraction(self) -> float:
        return self.error / self.rows if self.rows else 0.0


def run(config: JobConfig, *, make_detector: MakeDetector | None = None) -> RunSummary:
    """Label what the manifests name; come back when every row is in the output, audited.

    `make_detector` replaces FCOS (benchmarks without a model). Raises UserError when something asked for is wrong,
    RunStopped when rows are missing and the same call will go on.
    """
    try:
        return _run(config, make_detector)
    except storage.STORE_ERRORS as error:  # of the driver's own listing, reading and creating
        if storage.is_transient(error):
            raise StorageError(f"{storage.describe(error)}: {storage.remedy(error)}") from error
        raise OutputError(
            f"{storage.describe(error)}: {storage.remedy(error)}. Wanted to read the manifest, and to list, read and create "
            f"under {config.output}"
        ) from error


def _run(config: JobConfig, make_detector: MakeDetector | None) -> RunSummary:
    started = time.monotonic()
    job = _Job(config, make_detector)
    while True:
        job.look()
        decision = job.resolve()
        match decision:
            case runs.Refuse(differences):
                raise OutputError(_explain_refusal(job.output, differences))
            case runs.Nothing(run_id):
                logger.info("nothing to do: run %s has labelled these sources, its error rows included", run_id)
                return job.summary_of_finished(run_id, started)
            case runs.Resume(run_id):
                record = runs.read_run(job.output, run_id)
                logger.info("run %s is open: going on with its pinned plan", run_id)
                if config.dry_run:
                    return job.planned(run_id, rows=record["num_rows"], shards=record["num_shards"], started=started)
                storage.probe_create_if_absent(job.output)
            case runs.New(run_id):
                if not config.dry_run:  # before the plan, which may take long
                    storage.probe_create_if_absent(job.output)
                with draft_plan(job.sources, job.plan_settings) as draft:
                    if config.dry_run:
                        return job.planned(run_id, rows=draft.num_rows, shards=draft.num_shards, started=started)
                    pinned = job.pin(draft, run_id)
                if pinned is None:  # somebody else pinned a run meanwhile
                    continue
                record = pinned
        summary = job.label(record, started)
        if record["request_digest"] == job.request.digest:
            return summary


def _explain_refusal(output: str, differences: Sequence[tuple[str, Any, Any]]) -> str:
    named = "; ".join(f"{name}: the output has {ours!r}, asked was {asked!r}" for name, ours, asked in differences)
    return f"{output} holds another labelling ({named}). Use the same settings, or another --output"


class _Job:
    """The request, resolved against files and weights, and the steps on it."""

    def __init__(self, config: JobConfig, make_detector: MakeDetector | None) -> None:
        self._make_detector = make_detector
        _check_no_secrets(config)
        try:
            location = storage.parse_uri(config.output)
        except storage.InvalidUri as error:
            raise ConfigError(f"output is not a uri that can be written: {error}") from error
        if location.scheme in ("http", "https", "ftp"):
            raise ConfigError(
                f"output wanted a folder or an s3:// prefix, got {location.scheme}://, which is read only"
            )
        self.output = location.uri
        find_sources(config.manifest)  # a typo is said before the weights are read
        self._weights = load_weights(
            config.weights,
            num_classes=config.num_classes,
            categories=_categories(config.categories),
            sha256=config.weights_sha256,
        )
        # What the weights decide where no setting does: it is recorded as if it had been set.
        asked = {name: getattr(config, name) for name in INPUT_SETTINGS}
        self._input = self._weights.input_settings(**asked)
        self.config = config.model_copy(update=self._input)

    def look(self) -> None:
        """Take the manifests as they are now: finishing an open run may have taken hours."""
        config = self.config
        self.sources = find_sources(config.manifest)
        sources = [{"uri": s.uri, "num_bytes": s.num_bytes, "version": s.version} for s in self.sources]
        self.request = runs.Request(
            runs.request_digest(sources, config.request_settings()), _labelling(self._weights, config)
        )
        self.fetch_policy = _fetch_policy(config, self.sources)
        self.plan_settings = _plan_settings(config, self._input, self.fetch_policy)

    def resolve(self) -> runs.Decision:
        """What is to be done on the output as it is now."""
        existing = runs.list_runs(self.output)
        labelling = runs.read_labelling(self.output)
        if existing and labelling is None:
            raise OutputError(f"{self.output}/labelling.json is gone, so nobody knows what made its runs; put it back")
        return runs.resolve(existing, labelling, self.request)

    def planned(self, run_id: str, *, rows: int, shards: int, started: float) -> RunSummary:
        seconds = round(time.monotonic() - started, 3)
        return RunSummary("planned", self.output, run_id, rows=rows, shards=shards, wall_seconds=seconds)

    def pin(self, draft: Draft, run_id: str) -> dict[str, Any] | None:
        """Write the plan down; the record that counts is the one whose run.json came first.

        None when another run came while this one was planned: what to do has to be asked again.
        """
        attempt = f"manifest-{uuid.uuid4().hex[:12]}"
        files = pin(draft, storage.join(runs.run_folder(self.output, run_id), attempt))
        if find_sources(self.config.manifest) != self.sources:
            raise ManifestError(f"{self.sources[0].uri} or another manifest changed while it was read; run again")
        runs.create_labelling(self.output, self.request.labelling)
        if self.resolve() != runs.New(run_id):
            return None
        record = {
            "run_id": run_id,
            "request_digest": self.request.digest,
            "sources": [asdict(source) for source in self.sources],
            "settings": self.config.model_dump(mode="json"),
            "partition_by": [key.name for key in draft.keys],  # what stands in paths; settings have what was asked
            "allow_roots": list(self.fetch_policy.allow_roots),
            "attempt": attempt,
            "files": [asdict(file) for file in files],
            "num_rows": draft.num_rows,
            "num_shards": draft.num_shards,
            "duplicates_dropped": draft.num_duplicates_dropped,
            "uris_refused": draft.num_uris_refused,
            "created_at": datetime.now(UTC).isoformat(),
        }
        kept = runs.create_run(self.output, run_id, record)
        logger.info(
            "run %s: %s rows in %s shards, %d duplicates dropped, %d uris refused",
            run_id, f"{kept['num_rows']:,}", f"{kept['num_shards']:,}",
            kept["duplicates_dropped"], kept["uris_refused"],
        )  # fmt: skip
        return kept

    def label(self, record: Mapping[str, Any], started: float) -> RunSummary:
        """Label a pinned run's missing shards, audit, and mark it finished."""
        self._check_allowed(record)
        pinned = pinned_run(self.output, record, self.request.labelling)
        with ray_session() as cluster:
            layout = self._layout(cluster, record["num_rows"])
            logger.info("%s", layout.describe())
            if cluster.num_nodes > 1 and storage.parse_uri(self.output).scheme == "file":
                logger.warning("the cluster has %d nodes: %s must be one shared disk", cluster.num_nodes, self.output)
            execution = Execution(
                pinned,
                layout=layout,
                load=self._load_settings(record["settings"]),
                make_detector=self._make_detector or self._fcos(layout),
                settings=ExecutionSettings(
                    max_transient_fraction=self.config.max_transient_fraction,
                    max_rounds=self.config.max_rounds,
                    round_wait_seconds=self.config.round_wait_seconds,
                    stall_seconds=self.config.stall_seconds,
                    grace_seconds=self.config.grace_seconds,
                ),
            )
            stats = execution.label()
        if stats.num_discarded:
            logger.info("%d shards were committed first by another writer", stats.num_discarded)
        partitions = read_partitions(pinned.folder, pinned.files) if pinned.target.partition_by else None
        counts = audit(pinned.target, pinned.shard_rows, partitions=partitions)
        summary = _summarise(self.output, record, counts, stats, started)
        about = {"layout": asdict(layout), "versions": _versions(), "finished_at": datetime.now(UTC).isoformat()}
        runs.create_success(self.output, record["run_id"], asdict(summary) | about)
        return summary

    def _check_allowed(self, record: Mapping[str, Any]) -> None:
        """An open run was planned to read from these places; without them its rows would become error rows now."""
        mine = [Path(root) for root in self.fetch_policy.allow_roots]
        lost = [r for r in record["allow_roots"] if not any(Path(r).is_relative_to(root) for root in mine)]
        if lost:
            flags = " ".join(f"--allow-root {root}" for root in dict.fromkeys([*lost, *map(str, mine)]))
            raise ConfigError(
                f"run {record['run_id']} is open and reads images below {lost[0]}; to finish it, add {flags}"
            )
        places = {"allow_http": "http(s) images", "allow_private_hosts": "http(s) images from private hosts"}
        for setting, images in places.items():
            if record["settings"].get(setting) and not getattr(self.config, setting):
                flag = "--" + setting.replace("_", "-")
                raise ConfigError(f"run {record['run_id']} is open and reads {images}; to finish it, add {flag}")

    def _layout(self, cluster: Cluster, num_rows: int) -> Layout:
        config = self.config
        return plan_layout(
            cluster,
            num_rows=num_rows,
            device=config.device,
            num_detectors=config.num_detectors,
            gpus_per_detector=config.gpus_per_detector,
            load_cpus=config.load_cpus,
        )

    def _fcos(self, layout: Layout) -> MakeDetector:
        settings = {name: value for name, value in self.request.labelling["settings"].items() if name != "exact_resize"}
        options = settings | {
            "device": layout.device,
            "num_threads": layout.detector_threads,
            "max_micro_batch": self.config.max_micro_batch,
        }
        return functools.partial(_make_fcos, ray.put(self._weights), options)

    def _load_settings(self, pinned: Mapping[str, Any]) -> LoadSettings:
        """What makes an image an error row is the run's affair, not that of the command that goes on with it."""
        config = self.config
        return LoadSettings(
            fetch=replace(self.fetch_policy, max_bytes=pinned["max_image_bytes"]),
            max_pixels=pinned["max_pixels"],
            decode_deadline_seconds=pinned["decode_deadline_seconds"],
            decode_memory_bytes=pinned["decode_memory_bytes"],
            min_size=self._input["min_size"],
            max_size=self._input["max_size"],
            exact_resize=config.exact_resize,
        )

    def summary_of_finished(self, run_id: str, started: float) -> RunSummary:
        """The summary of a run that needs nothing more."""
        success = runs.read_success(self.output, run_id) or {}
        kept = {name: success[name] for name in RunSummary.__dataclass_fields__ if name in success}
        return RunSummary(**kept | {"state": "nothing_to_do", "wall_seconds": round(time.monotonic() - started, 3)})


def _make_fcos(weights: ray.ObjectRef[Weights], options: Mapping[str, Any]) -> ImageDetector:
    # The weights come through Ray's object store: one copy per node, none per detector.
    return Detector(ray.get(weights), **options)


def _labelling(weights: Weights, config: JobConfig) -> dict[str, Any]:
    """What all runs of an output share: labelling.json."""
    return {
        "architecture": weights.architecture,
        "weights": weights.name,
        "weights_sha256": weights.sha256,
        "categories": list(weights.categories),
        "settings": config.labelling_settings(),
    }


def _check_no_secrets(config: JobConfig) -> None:
    """Settings are written to run.json and stand in every log: raise ConfigError for uris that hold secrets."""
    named = [("manifest", uri) for uri in config.manifest] + [("output", config.output), ("weights", config.weights)]
    for name, uri in named:
        if what := storage.secret_in(uri):
            raise ConfigError(
                f"{name} wanted a uri without secrets, got {storage.without_secrets(uri)}, which {what}; it would be "
                "written to run.json. Give credentials in the environment, or a copy of the file"
            )


def _categories(given: Sequence[str] | None) -> list[str] | None:
    if given is not None and len(given) == 1 and Path(given[0]).is_file():
        return [line.strip() for line in Path(given[0]).read_text().splitlines() if line.strip()]
    return list(given) if given is not None else None


def _fetch_policy(config: JobConfig, sources: Sequence[Source]) -> FetchPolicy:
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


def _plan_settings(config: JobConfig, sizes: Mapping[str, int], fetch_policy: FetchPolicy) -> PlanSettings:
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
        reserved_columns=RESERVED_COLUMNS,
    )


def _summarise(
    output: str, record: Mapping[str, Any], counts: ShardCounts, stats: ExecutionStats, started: float
) -> RunSummary:
    rate = stats.images_per_second
    return RunSummary(
        state="complete",
        output=output,
        run_id=record["run_id"],
        rows=counts.rows,
        shards=record["num_shards"],
        ok=counts.ok,
        error=counts.error,
        errors_by_code=counts.errors_by_code,
        detections=counts.detections,
        duplicates_dropped=record["duplicates_dropped"],
        uris_refused=record["uris_refused"],
        images_per_second=None if rate is None else round(rate, 3),
        wall_seconds=round(time.monotonic() - started, 3),
        startup_seconds=None if stats.first_commit is None else round(stats.first_commit - started, 3),
        retries=counts.retries,
        seconds={stage: round(seconds, 3) for stage, seconds in counts.seconds.items()},
    )


def _versions() -> dict[str, str]:
    names = ("torch", "torchvision", "ray", "pyarrow", "pillow", "duckdb")
    ours = {"fcos_ray": fcos_ray.__version__, "python": platform.python_version()}
    return ours | {name: version(name) for name in names}
