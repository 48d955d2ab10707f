"""Progress: what a watcher sees while shards are committed. A bar on a terminal, a line every 10 s elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger("fcos_ray")
LINE_SECONDS: Final = 10.0


class RunProgress:
    """Counts rows as they are committed or set down as done before. A context manager."""

    def __init__(self, *, num_rows: int, done: int) -> None:
        self._num_rows = num_rows
        self._done = self._done_before = done
        self._errors = 0
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("labelling"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]:.1f} images/s, {task.fields[errors]} errors"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("", total=num_rows, completed=done, rate=0.0, errors=0)

    def __enter__(self) -> RunProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def add(self, *, rows: int, errors: int) -> None:
        """A shard was committed."""
        self._done += rows
        self._errors += errors
        self.tick()

    def tick(self) -> None:
        """Show the state if it is time to."""
        now = time.monotonic()
        rate = (self._done - self._done_before) / max(now - self._started, 1e-9)
        if self._bar:
            self._bar.update(self._task, completed=self._done, rate=rate, errors=self._errors)
        elif now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            left = f", about {(self._num_rows - self._done) / rate:,.0f} s left" if rate else ""
            logger.info(
                "%s of %s rows (%.1f %%), %.1f images/s, %s errors%s",
                f"{self._done:,}", f"{self._num_rows:,}", 100 * self._done / max(self._num_rows, 1), rate,
                f"{self._errors:,}", left,
            )  # fmt: skip
