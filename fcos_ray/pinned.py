"""Pinned: a run's record -> its plan, a pure function from shard number to rows. Knows run.json's words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from fcos_ray import storage
from fcos_ray.inputs.pinned_files import PinnedFile, read_shard
from fcos_ray.outputs.commit import ShardTarget
from fcos_ray.outputs.index import ensure_index
from fcos_ray.outputs.runs import run_folder


@dataclass(frozen=True, slots=True)
class PinnedRun:
    """A run's plan."""

    target: ShardTarget
    folder: str  # of the pinned manifest
    files: tuple[PinnedFile, ...]

    @property
    def shard_rows(self) -> list[int]:
        return [rows for file in self.files for rows in file.shard_rows]


def pinned_run(output: str, record: Mapping[str, Any], labelling: Mapping[str, Any]) -> PinnedRun:
    """The plan that run.json names. Raises KeyError or TypeError for a record that names none."""
    run_id = record["run_id"]
    return PinnedRun(
        target=ShardTarget(output, run_id, tuple(record["partition_by"]), labelling),
        folder=storage.join(run_folder(output, run_id), record["attempt"]),
        files=tuple(PinnedFile(f["name"], f["first_shard"], tuple(f["shard_rows"])) for f in record["files"]),
    )


def index_run(run: PinnedRun, *, may_grow: bool = False, scratch: str | None = None) -> storage.StoredFile:
    """The index of a run that is finished or abandoned, made when it is missing: see outputs/index.py."""

    def read_pinned(shard: int) -> pa.Table:
        return read_shard(run.folder, run.files, shard)

    return ensure_index(run.target.output, run.target.run_id, read_pinned, may_grow=may_grow, scratch=scratch)
