"""Job: resolve → plan → pipeline → gather → commit → finish. Composes the rooms; each step's how is in its own room.

An open run is finished first, with its pinned plan; then the request is planned. What is committed is what lies in the
output: the driver holds shard numbers only, and may die at any line here.
"""

from __future__ import annotations

import functools
import logging
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import ray

from fcos_ray import storage
from fcos_ray.config import JobConfig
from fcos_ray.errors import ConfigError, ManifestError, OutputError, StorageError
from fcos_ray.execution import Execution, ExecutionSettings
from fcos_ray.inputs.manifests import find_sources
from fcos_ray.inputs.pin import pin
from fcos_ray.inputs.pinned_files import PinnedFile, read_partitions
from fcos_ray.inputs.plan import Draft, draft_plan
from fcos_ray.inputs.selection import History
from fcos_ray.layout import Layout
from fcos_ray.model.parameters import INPUT_SETTINGS, Weights
from fcos_ray.model.weights import load_weights
from fcos_ray.outputs import runs
from fcos_ray.outputs.audit import audit
from fcos_ray.outputs.index import index_uri
from fcos_ray.outputs.pulse import Pulse, drivers_at_work, drivers_folder
from fcos_ray.outputs.retractions import create_retracted
from fcos_ray.pinned import index_run, pinned_run
from fcos_ray.pipeline import ImageDetector, MakeDetector
from fcos_ray.request import (
    categories,
    check_no_secrets,
    detector_options,
    fetch_policy,
    labelling,
    layout_for,
    load_settings,
    make_request,
    output_uri,
    plan_settings,
)  # fmt: skip
from fcos_ray.session import ray_session
from fcos_ray.summary import RunSummary, summarise, versions

logger = logging.getLogger("fcos_ray")
_WAIT_SECONDS: Final = 10.0  # between two looks whether another driver is still at work


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
        if config.explain is not None and not isinstance(decision, runs.Refuse):
            return job.explain(decision, started)
        match decision:
            case runs.Refuse(differences):
                raise OutputError(_explain_refusal(job.output, differences))
            case runs.Nothing(run_id):
                logger.info("nothing to do: run %s has labelled these sources, its error rows included", run_id)
                return job.summary_of_finished(run_id, started)
            case runs.Resume(run_id):
                record = runs.read_run(job.output, run_id)
                if config.dry_run:
                    return job.planned(run_id, rows=record["num_rows"], shards=record["num_shards"], started=started)
                if config.if_running != "join" and (others := drivers_at_work(job.output, run_id)):
                    logger.info("run %s is open, and at work on it is %s", run_id, others[0].name)
                    if config.if_running == "exit":
                        return job.running(record, started)
                    time.sleep(_WAIT_SECONDS)
                    continue
                logger.info("run %s is open: going on with its pinned plan", run_id)
                storage.probe_create_if_absent(job.output)
            case runs.New(run_id):
                if not config.dry_run:  # before the plan, which may take long
                    storage.probe_create_if_absent(job.output)
                with job.draft() as draft:
                    logger.info("%s", draft.selection.describe())
                    if config.dry_run:
                        return job.planned_draft(run_id, draft, started)
                    if not draft.num_rows:
                        return job.nothing_selected(draft, started)
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
        check_no_secrets(config)
        self.output = output_uri(config)
        find_sources(config.manifest)  # a typo is said before the weights are read
        self._weights = load_weights(
            config.weights,
            num_classes=config.num_classes,
            categories=categories(config.categories),
            sha256=config.weights_sha256,
        )
        # What the weights decide where no setting does: it is recorded as if it had been set.
        asked = {name: getattr(config, name) for name in INPUT_SETTINGS}
        self._input = self._weights.input_settings(**asked)
        self.config = config.model_copy(update=self._input)

    def look(self) -> None:
        """Take manifests and output as they are now: finishing an open run may have taken hours."""
        self.sources = find_sources(self.config.manifest)
        self.request = make_request(self.config, self.sources, labelling(self._weights, self.config))
        self.fetch_policy = fetch_policy(self.config, self.sources)
        self.existing = runs.read_existing(self.output)

    def resolve(self) -> runs.Decision:
        """What is to be done on the output as it was when it was looked at."""
        labelled_as = runs.read_labelling(self.output)
        if self.existing.runs and labelled_as is None:
            raise OutputError(f"{self.output}/labelling.json is gone, so nobody knows what made its runs; put it back")
        return runs.resolve(self.existing, labelled_as, self.request)

    @contextmanager
    def draft(self) -> Iterator[Draft]:
        """What of the manifests is to be labelled, given what the output's runs have labelled."""
        changes_nothing = self.config.dry_run or self.config.explain is not None
        settings = plan_settings(self.config, self._input, self.fetch_policy)
        with tempfile.TemporaryDirectory(prefix="fcos_ray-history-") as folder:
            history = self._history(scratch=folder if changes_nothing else None)
            with draft_plan(self.sources, settings, history) as draft:
                yield draft

    def _history(self, *, scratch: str | None) -> History:
        """The indexes of the runs that count; one that is missing is made."""
        counting = self.existing.history
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(lambda run: storage.stat_file(index_uri(self.output, run.run_id)), counting))
        made = [
            file if file is not None and run.state == "finished" else self._index(run, scratch)
            for run, file in zip(counting, found, strict=True)
        ]
        return History(tuple(run.run_id for run in counting), tuple(made))

    def _index(self, run: runs.RunState, scratch: str | None) -> storage.StoredFile:
        if run.state == "finished":
            logger.info("run %s has no index: making it from its shard files", run.run_id)
        pinned = pinned_run(self.output, runs.read_run(self.output, run.run_id), self.request.labelling)
        return index_run(pinned, may_grow=run.state == "abandoned", scratch=scratch)

    def explain(self, decision: runs.Decision, started: float) -> RunSummary:
        """Say why one image would be labelled or not."""
        if isinstance(decision, runs.Resume):
            logger.info("run %s is open: it is finished first; what follows is as of before it", decision.run_id)
        with self.draft() as draft:
            logger.info("%s", draft.selection.explanation)
            return self.planned_draft("", draft, started)

    def planned(self, run_id: str, *, rows: int, shards: int, started: float) -> RunSummary:
        seconds = round(time.monotonic() - started, 3)
        return RunSummary("planned", self.output, run_id, rows=rows, shards=shards, wall_seconds=seconds)

    def planned_draft(self, run_id: str, draft: Draft, started: float) -> RunSummary:
        planned = self.planned(run_id, rows=draft.num_rows, shards=draft.num_shards, started=started)
        return replace(planned, selection=draft.selection.counts(), explanation=draft.selection.explanation)

    def nothing_selected(self, draft: Draft, started: float) -> RunSummary:
        """The summary of a plan without rows: no run is made of it."""
        last = self.existing.history[-1].run_id if self.existing.history else ""
        return replace(self.planned_draft(last, draft, started), state="nothing_to_do")

    def running(self, record: Mapping[str, Any], started: float) -> RunSummary:
        """The summary of a run that another driver is at work on."""
        about = self.planned(record["run_id"], rows=record["num_rows"], shards=record["num_shards"], started=started)
        return replace(about, state="running")

    def pin(self, draft: Draft, run_id: str) -> dict[str, Any] | None:
        """Write the plan down, and the run's record, which counts when it came first.

        None when another run came while this one was planned: what to do has to be asked again.
        """
        attempt = f"manifest-{uuid.uuid4().hex[:12]}"
        folder = storage.join(runs.run_folder(self.output, run_id), attempt)
        files = pin(draft, folder, temporary_folder=runs.temporary_folder(self.output, run_id))
        kept = self._pin(draft, run_id, attempt, files)
        if kept is None:  # nobody will ask for these files; what they name may have been forgotten meanwhile
            for file in files:
                storage.delete(storage.join(folder, file.name))
        return kept

    def _pin(self, draft: Draft, run_id: str, attempt: str, files: Sequence[PinnedFile]) -> dict[str, Any] | None:
        if find_sources(self.config.manifest) != self.sources:
            raise ManifestError(f"{self.sources[0].uri} or another manifest changed while it was read; run again")
        runs.create_labelling(self.output, self.request.labelling)
        create_retracted(self.output)
        planned_against = self.existing
        self.existing = runs.read_existing(self.output)
        if self.existing.history != planned_against.history or self.existing.forgotten != planned_against.forgotten:
            return None
        if self.resolve() != runs.New(run_id) or not runs.claim_number(self.output, run_id):
            return None
        record = {
            "run_id": run_id,
            "request_digest": self.request.digest,
            "history": runs.history_digest(self.existing.history, self.existing.forgotten),
            "selection": draft.selection.counts(),
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
        if kept["attempt"] != attempt:  # another driver of the same request
            return None
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
        # At work from here: starting Ray may take long, and who comes meanwhile is to know.
        with Pulse(drivers_folder(self.output, record["run_id"])) as pulse, ray_session() as cluster:
            layout = layout_for(self.config, cluster, record["num_rows"])
            logger.info("%s", layout.describe())
            if cluster.num_nodes > 1 and storage.parse_uri(self.output).scheme == "file":
                logger.warning("the cluster has %d nodes: %s must be one shared disk", cluster.num_nodes, self.output)
            execution = Execution(
                pinned,
                layout=layout,
                load=load_settings(self.config, self.fetch_policy, self._input, layout, pinned=record["settings"]),
                make_detector=self._make_detector or self._fcos(layout),
                settings=ExecutionSettings(
                    max_transient_fraction=self.config.max_transient_fraction,
                    max_rounds=self.config.max_rounds,
                    round_wait_seconds=self.config.round_wait_seconds,
                    stall_seconds=self.config.stall_seconds,
                    grace_seconds=self.config.grace_seconds,
                ),
                name=pulse.name,
            )
            stats = execution.label()
        if stats.num_discarded:
            logger.info("%d shards were committed first by another writer", stats.num_discarded)
        partitions = read_partitions(pinned.folder, pinned.files) if pinned.target.partition_by else None
        counts = audit(pinned.target, pinned.shard_rows, partitions=partitions)
        summary = summarise(self.output, record, counts, stats, started)
        about = {"layout": asdict(layout), "versions": versions(), "finished_at": datetime.now(UTC).isoformat()}
        runs.create_success(self.output, record["run_id"], asdict(summary) | about)
        index_run(pinned, may_grow=True)  # it may have been abandoned, and indexed, before its last shards came
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

    def _fcos(self, layout: Layout) -> MakeDetector:
        return fcos_maker(self._weights, detector_options(self.request.labelling["settings"], layout))

    def summary_of_finished(self, run_id: str, started: float) -> RunSummary:
        """The summary of a run that needs nothing more."""
        success = runs.read_success(self.output, run_id) or {}
        kept = {name: success[name] for name in RunSummary.__dataclass_fields__ if name in success}
        return RunSummary(**kept | {"state": "nothing_to_do", "wall_seconds": round(time.monotonic() - started, 3)})


def fcos_maker(weights: Weights, options: Mapping[str, Any]) -> MakeDetector:
    """What builds FCOS in its actor. The weights go through Ray's object store: one copy per node, none per detector."""
    return functools.partial(_make_fcos, ray.put(weights), options)


def _make_fcos(weights: ray.ObjectRef[Weights], options: Mapping[str, Any]) -> ImageDetector:
    from fcos_ray.model.detector import Detector  # torch, which only the actors need

    return Detector(ray.get(weights), **options)
