"""Commit task: commit_shard in a process of its own on the cluster. Imports little: a short run is over in a few of them."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import ray

from fcos_ray.inputs.pinned_files import PinnedFile, read_shard
from fcos_ray.outputs.commit import ShardTarget, commit_shard


@ray.remote(num_cpus=0, max_retries=3)
def commit_task(target: ShardTarget, shard: int, folder: str, files: Sequence[PinnedFile], results: pa.Table) -> bool:
    """Whether the shard's results became its file; False when another writer was first."""
    return commit_shard(target, shard, pinned=read_shard(folder, files, shard), results=results)
