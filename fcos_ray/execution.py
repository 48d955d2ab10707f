"""Execution: the missing shards of a pinned run -> committed files. Knows Ray and retries; no manifests, no models.

An execution that ends early (a stall, a frozen node, a store that is away) is started again over what is missing, in the
same process, as long as it makes progress. What is missing is asked of the output each time, never remembered.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.exceptions import RayError, RayTaskError

from fcos_ray import storage
from fcos_ray.commit_task import commit_task
from fcos_ray.errors import RunStopped, StageStalled, StorageError, UserError, WorkerError
from fcos_ray.layout import Layout
from fcos_ray.load import LoadSettings
from fcos_ray.outputs import runs
from fcos_ray.outputs.commit import list_committed
from fcos_ray.outputs.gather import Gather, WholeShard
from fcos_ray.outputs.pulse import drivers_at_work
from fcos_ray.pinned import PinnedRun
from fcos_ray.pipeline import MakeDetector, Stages, result_rows
from fcos_ray.progress import RunProgress

logger = logging.getLogger("fcos_ray")
_LOOK_SECONDS: Final = 30.0  # between looks whether the run is still open and others have done the rest: listings
_TRIM_COMMITS: Final = 10  # between two times that freed memory is given back, which takes some ms
# Ray Data's loggers that tell of every execution that it ended, and that our setting of no progress bars was followed.
_CHATTY: Final = ("ray.data._internal.execution.streaming_executor", "ray.data._internal.progress")
# A disk that waiting does not mend: the run stops at once instead of labelling what cannot be kept.
_DISK_ERRNO: Final = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_ANSI: Final = re.compile(r"\x1b\[[0-9;]*m")  # Ray colours its messages; what happened stands at their end


@dataclass(frozen=True, slots=True)
class ExecutionSettings:
    """How patient to be."""

    max_transient_fraction: float
    max_rounds: int
    round_wait_seconds: float
    stall_seconds: float
    grace_seconds: float


@dataclass(slots=True)
class ExecutionStats:
    """What this process did."""

    num_detectors: int = 1  # at most at a time
    num_commits: int = 0  # that ended well
    num_discarded: int = 0  # of them: shards that another writer committed first
    first_commit: float | None = None  # time.monotonic()
    clocks: dict[str, DetectorClock] = field(default_factory=dict)  # by detector

    def count_block(self, rows: pa.Table) -> None:
        """A block of results has come. Its detector says when it was done: the driver gets blocks in bursts, asked ahead.

        Rows without detect_seconds are errors that no detector saw.
        """
        num_images = pc.count(rows["detect_seconds"]).as_py()
        if not num_images:
            return
        done, name = (rows[column][0].as_py() for column in ("detected_at", "detected_by"))
        seconds = pc.sum(rows["detect_seconds"]).as_py()
        self.clocks.setdefault(name, DetectorClock(done, done)).count(num_images, seconds, done)

    @property
    def images_per_second(self) -> float | None:
        """What each detector did from its first image to its last, added up: without the start of processes. None without any.

        One clock for all would count what was under way when it began, and who had nothing left before it ended. Not from the
        first block's end: until then load tasks run ahead on the detectors' cores, and what is loaded by then costs nothing
        later (12-megapixel images, 2 cores: 0.91 to 1.07 of the detectors alone; from the first image 0.79 and 0.82).
        """
        timed, seconds = self._timed()
        if not seconds:
            return None
        mean = sum(clock.num_images for clock in timed) / seconds
        return mean * min(self.num_detectors, len(timed))  # one that died and its successor are not two

    @property
    def busy(self) -> float | None:
        """Share of the same time in which detectors held images. None where none did."""
        timed, seconds = self._timed()
        return sum(clock.busy_seconds for clock in timed) / seconds if seconds else None

    def _timed(self) -> tuple[list[DetectorClock], float]:
        """Detectors that took time, and their seconds from the first image to the last, added up."""
        timed = [clock for clock in self.clocks.values() if clock.last > clock.first]
        return timed, sum((clock.last - clock.first).total_seconds() for clock in timed)


@dataclass(slots=True)
class DetectorClock:
    """When one detector began its first image and was done with its last, and what was between."""

    first: datetime
    last: datetime
    num_images: int = 0
    busy_seconds: float = 0.0

    def count(self, num_images: int, seconds: float, done: datetime) -> None:
        """Another block, which may have been done before the others; it took `seconds`."""
        self.first, self.last = min(self.first, done - timedelta(seconds=seconds)), max(self.last, done)
        self.num_images += num_images
        self.busy_seconds += seconds


class Execution:
    """Labels the missing shards of one run."""

    def __init__(
        self,
        run: PinnedRun,
        *,
        layout: Layout,
        load: LoadSettings,
        make_detector: MakeDetector,
        settings: ExecutionSettings,
        name: str = "",
    ) -> None:
        """`name` is this driver's, by which others on the run see it (outputs/pulse.py)."""
        self._run = run
        self._name = name
        self._place: int | None = None  # among the drivers on the run, once it was looked
        self._shard_rows = run.shard_rows
        self._stages = Stages(run.folder, run.files, load, make_detector, layout)
        self._settings = settings
        self._commits: dict[ray.ObjectRef[bool], WholeShard] = {}
        self._progress: RunProgress | None = None
        self._next_look = time.monotonic() + _LOOK_SECONDS
        self.stats = ExecutionStats(layout.num_detectors)
        _set_up_ray_data(settings)

    def label(self) -> ExecutionStats:
        """Come back when every shard is committed. Raises RunStopped when rounds end without progress."""
        missing = self._ordered(self._missing())
        done = sum(self._shard_rows) - sum(self._shard_rows[shard] for shard in missing)
        idle, wait = 0, self._settings.round_wait_seconds
        with RunProgress(num_rows=sum(self._shard_rows), done=done) as self._progress:
            while missing:
                trouble = self._round(missing)
                still_missing = self._ordered(self._missing())
                idle = 0 if len(still_missing) < len(missing) else idle + 1
                missing = still_missing
                if missing and idle >= self._settings.max_rounds:
                    raise RunStopped(self._why_stopped(missing, trouble))
                if missing:
                    logger.warning("%d shards are missing (%s); again in %.0f s", len(missing), trouble, wait)
                    time.sleep(wait)
                    wait = min(wait * 2, 8 * self._settings.round_wait_seconds)
        return self.stats

    def _missing(self) -> list[int]:
        """As the output says. In an outage it is asked as often as rounds are begun: guessing would label shards again."""
        wait, asked = self._settings.round_wait_seconds, 0
        target = self._run.target
        while True:
            try:
                committed = list_committed(target.output, target.run_id)
                self._require_open()
            except StorageError as error:
                asked += 1
                if asked == self._settings.max_rounds:
                    raise
                logger.warning("%s; again in %.0f s", error, wait)
                time.sleep(wait)
                wait = min(wait * 2, 8 * self._settings.round_wait_seconds)
            else:
                return [shard for shard in range(len(self._shard_rows)) if shard not in committed]

    def _require_open(self) -> None:
        """Raises RunStopped when somebody has closed the run: what it lacks is for the next one."""
        target = self._run.target
        state = runs.require_run(target.output, target.run_id).state
        if state not in ("open", "finished"):
            raise RunStopped(
                f"run {target.run_id} was {state} meanwhile; the same command labels what it lacks in a new run"
            )

    def _ordered(self, shards: list[int]) -> list[int]:
        """Drivers on one run begin at different ends, so that they meet instead of doing everything twice.

        Each chooses once, by its place among those it found: who was there first goes on from the front.
        """
        others = self._others()
        if others:
            logger.info("at work on run %s too: %s", self._run.target.run_id, ", ".join(others))
        if self._place is None:
            self._place = sum(other < self._name for other in others)
        return shards if self._place == 0 else shards[::-1] if self._place == 1 else random.sample(shards, len(shards))

    def _others(self) -> list[str]:
        """Other drivers on this run; in an outage none are known."""
        target = self._run.target
        try:
            found = drivers_at_work(target.output, target.run_id)
        except (*storage.STORE_ERRORS, StorageError):
            return []
        return [driver.name for driver in found if driver.name != self._name]

    def _all_done_elsewhere(self) -> bool:
        """Whether other drivers have committed what this one still labels. Asked now and then.

        Raises RunStopped when somebody has closed the run.
        """
        if time.monotonic() < self._next_look:
            return False
        self._next_look = time.monotonic() + _LOOK_SECONDS
        if self._others():
            return not self._missing()
        with suppress(*storage.STORE_ERRORS, StorageError):
            self._require_open()
        return False

    def _why_stopped(self, missing: Sequence[int], trouble: str) -> str:
        rows = sum(self._shard_rows[shard] for shard in missing)
        return (
            f"run {self._run.target.run_id} stopped with {rows:,} rows in {len(missing):,} shards missing (such as "
            f"shard {missing[0]}): {trouble}. Nothing is lost; the same command goes on"
        )

    def _round(self, missing: Sequence[int]) -> str:
        """One execution over the missing shards. Says what kept it from committing all of them."""
        gather = Gather({shard: self._shard_rows[shard] for shard in missing})
        files = ray.put(self._run.files)
        set_aside: Counter[str] = Counter()
        trouble = ""
        try:
            with closing(result_rows(missing, self._stages)) as results:
                for rows in results:
                    self.stats.count_block(rows)
                    for whole in gather.add(rows):
                        if whole.may_commit(max_transient_fraction=self._settings.max_transient_fraction):
                            self._submit(whole, files)
                        else:
                            set_aside += whole.errors_by_code
                    trouble = self._reap(leave=self._stages.layout.num_commits) or trouble
                    if self._all_done_elsewhere():
                        break
        except RayError as error:
            trouble = _restartable(error)
        except StageStalled as error:
            trouble = f"--stall-seconds {self._settings.stall_seconds:g}: {error}"
        except KeyboardInterrupt:
            self._commit_what_is_whole()
            raise
        trouble = self._reap(leave=0) or trouble
        aside = self._why_set_aside(set_aside) if set_aside else ""
        return "; ".join(filter(None, [trouble, aside])) or "the execution ended early"

    def _why_set_aside(self, errors_by_code: Counter[str]) -> str:
        codes = ", ".join(f"{count:,} {code}" for code, count in errors_by_code.most_common())
        return (
            f"shards with more than {self._settings.max_transient_fraction:.0%} transient errors, or any row whose "
            f"store did not answer, are not committed ({codes}; --max-transient-fraction 1 commits them as error rows)"
        )

    def _submit(self, whole: WholeShard, files: ray.ObjectRef[Any]) -> None:
        reference = commit_task.remote(self._run.target, whole.shard, self._run.folder, files, whole.rows)
        self._commits[reference] = WholeShard(whole.shard, whole.rows.select(["error_code"]))  # for counting

    def _commit_what_is_whole(self) -> None:
        """After an interruption: whole shards are on their way; wait for them, and start nothing new."""
        before = len(self._commits)
        if before:
            logger.warning("interrupted: committing %d whole shards", before)
            self._reap(leave=0, patience_seconds=self._settings.grace_seconds)
            logger.warning("interrupted: %d of them are committed", before - len(self._commits))

    def _reap(self, *, leave: int, patience_seconds: float | None = None) -> str:
        """Collect finished commits, waiting until at most `leave` are under way. Says what went wrong, if anything."""
        trouble = ""
        while self._commits:
            patience = self._settings.stall_seconds if patience_seconds is None else patience_seconds
            seconds = patience if len(self._commits) > leave else 0
            finished, _ = ray.wait(list(self._commits), num_returns=1, timeout=seconds)
            if not finished and seconds and patience_seconds is None:
                shards = ", ".join(str(whole.shard) for whole in list(self._commits.values())[:5])
                raise RunStopped(
                    f"no commit has ended for {seconds:.0f} s (--stall-seconds), under way are those of shards {shards}. "
                    "Nothing is lost; the same command goes on"
                )
            if not finished:
                break
            whole = self._commits.pop(finished[0])
            try:
                created = ray.get(finished[0])
            except RayError as error:
                trouble = _restartable(error)
            else:
                self._count(whole, created=created)
        if self._progress:
            self._progress.tick()
        return trouble

    def _count(self, whole: WholeShard, *, created: bool) -> None:
        rows = whole.rows.num_rows
        self.stats.num_commits += 1
        if not created:
            self.stats.num_discarded += 1
        self.stats.first_commit = self.stats.first_commit or time.monotonic()
        if self._progress:
            self._progress.add(rows=rows, errors=rows - whole.rows["error_code"].null_count)
        if self.stats.num_commits % _TRIM_COMMITS == 0:
            _trim_memory()


def _trim_memory() -> None:
    """Give back freed memory, of which glibc keeps more and more; other C libraries have no such call."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _set_up_ray_data(settings: ExecutionSettings) -> None:
    # Ray 2.60's default, RATE_BASED, grants an execution no more than what it asked for ten seconds ago. Where loading is
    # the limit that is too little: one load task on two cores, which have room for two, and without a model 1,420 images/s
    # instead of 2,040.
    os.environ.setdefault("RAY_DATA_CLUSTER_AUTOSCALER", "V2")
    context = ray.data.DataContext.get_current()
    context.execution_no_progress_timeout_s = settings.stall_seconds
    # It advises twice a minute to reserve what a worker takes; what an image may take is bounded in the load stage
    context.issue_detectors_config.high_memory_detector_config.detection_time_interval_s = -1
    context.raise_original_map_exception = True  # else a stage's error arrives without its class
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)


def _restartable(error: BaseException) -> str:
    """What an execution ended with, in words, when another one may do better; raises it when none will."""
    cause: BaseException = error
    while isinstance(cause, RayTaskError):
        cause = cause.cause
    if isinstance(cause, UserError):
        raise cause from error
    if isinstance(cause, OSError) and cause.errno in _DISK_ERRNO:
        raise RunStopped(
            f"{storage.describe(cause)}: {storage.remedy(cause)}. Nothing is lost; then the same command goes on"
        ) from error
    # An OSError is a node's or a store's trouble: no memory for a child, a right that was taken away for a while.
    if isinstance(error, RayTaskError) and not isinstance(cause, (StorageError, WorkerError, OSError, RayError)):
        raise error  # a bug: the same rows would raise it again
    words = " ".join(_ANSI.sub("", str(cause)).split())
    return f"{type(cause).__name__}: …{words[-300:]}" if len(words) > 300 else f"{type(cause).__name__}: {words}"
