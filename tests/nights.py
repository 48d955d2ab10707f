"""Nights of one output without Ray: the job itself, but for the stages, which answer what the test says."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq

import fcos_ray as fr
from fcos_ray import job
from fcos_ray.execution import ExecutionStats
from fcos_ray.inputs.pinned_files import read_shard
from fcos_ray.layout import Cluster
from fcos_ray.model.weights import load_weights
from fcos_ray.outputs.commit import commit_shard, list_committed
from fcos_ray.outputs.schema import RESULT_SCHEMA
from fcos_ray.pinned import PinnedRun
from tests.corpus import PixelDetector, config

Outcome = Callable[[str], str]  # image_id -> "ok", or an error code of fetch


class Crash(Exception):
    """The driver is gone."""


_load_weights = functools.cache(load_weights)


def result(shard: int, row: int, image_id: str, etag: str | None, outcome: str) -> dict[str, Any]:
    """A row as the stages give it: the boxes are the version's number, so that a stale one shows."""
    if outcome != "ok":
        return {"shard": shard, "row": row, "error_stage": "fetch", "error_code": outcome, "error_message": "no"}
    return {
        "shard": shard, "row": row, "width": 64, "height": 48, "orientation": 1, "content_sha256": "a" * 64,
        "content_etag": etag, "boxes": [[0.0, 0.0, 1.0 + len(image_id), 1.0 + int(etag or 0)]], "labels": [1],
        "scores": [0.5], "attempts": 1,
    }  # fmt: skip


class _Labels:
    """Execution without Ray."""

    def __init__(self, run: PinnedRun, outcome: Outcome, crash_after: int | None, alone: bool) -> None:
        self._run, self._outcome, self._crash_after, self._alone = run, outcome, crash_after, alone

    def label(self) -> ExecutionStats:
        target = self._run.target
        committed = list_committed(target.output, target.run_id)
        missing = [shard for shard in range(len(self._run.shard_rows)) if shard not in committed]
        for done, shard in enumerate(missing):
            if done == self._crash_after:
                raise Crash
            rows = read_shard(self._run.folder, self._run.files, shard)
            created = commit_shard(target, shard, pinned=rows, results=self._results(shard, rows))
            assert created or not self._alone
        return ExecutionStats()

    def _results(self, shard: int, rows: pa.Table) -> pa.Table:
        etags = rows["content_etag"].to_pylist() if "content_etag" in rows.column_names else [None] * rows.num_rows
        pairs = zip(rows["image_id"].to_pylist(), rows["__deleted"].to_pylist(), etags, strict=True)
        found = [
            {"shard": shard, "row": row} if deleted else result(shard, row, i, etag, self._outcome(i))
            for row, (i, deleted, etag) in enumerate(pairs)
        ]
        return pa.Table.from_pylist(found, RESULT_SCHEMA)


@contextmanager
def _no_cluster() -> Iterator[Cluster]:
    yield Cluster(4, 0, 4)


def write_night(path: Path, etags: Mapping[str, str | None], **columns: Any) -> Path:
    """A manifest of these images."""
    uris = [f"s3://corpus/{i}.jpg" for i in etags]
    table = {"image_id": pa.array(list(etags), pa.string()), "uri": pa.array(uris, pa.string())}
    pq.write_table(pa.table(table | {"content_etag": pa.array(list(etags.values()), pa.string())} | columns), path)
    return path


def run_night(
    manifest: Path,
    output: Path | str,
    *,
    outcome: Outcome = lambda _: "ok",
    crash_after: int | None = None,
    alone: bool = True,
    **settings: Any,
) -> fr.RunSummary:
    """What `fr.run` does, Ray aside. Raises Crash after so many shards. `alone`: nobody else commits this run's shards."""
    asked = config(manifest, output, **{"weights": "sample", "shard_rows": 3, **settings})
    execution = lambda run, **_: _Labels(run, outcome, crash_after, alone)  # noqa: E731
    with (
        mock.patch.object(job, "Execution", execution),
        mock.patch.object(job, "ray_session", _no_cluster),
        mock.patch.object(job, "load_weights", lambda name, **_: _load_weights(name)),
    ):
        return fr.run(asked, make_detector=PixelDetector)
