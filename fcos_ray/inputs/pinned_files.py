"""Pinned files: a shard's number -> its rows. Knows row groups; what pins them (pin.py) is not imported by who reads them.

Every worker reads, and only the driver pins: DuckDB and the planner are 0.2 s of each process's start.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq

from fcos_ray import storage
from fcos_ray.inputs.columns import DELETED, PARTITION


@dataclass(frozen=True, slots=True)
class PinnedFile:
    """One file of a pinned manifest: its row groups are the shards first_shard, first_shard + 1, …"""

    name: str
    first_shard: int
    shard_rows: tuple[int, ...]


def read_shard(folder: str, files: Sequence[PinnedFile], shard: int) -> pa.Table:
    """The pinned rows of one shard, in order. Plans of before there were tombstones have none."""
    file = next(f for f in files if f.first_shard <= shard < f.first_shard + len(f.shard_rows))

    def read() -> pa.Table:
        with storage.open_for_reading(storage.join(folder, file.name)) as handle:
            return pq.ParquetFile(handle).read_row_group(shard - file.first_shard)

    rows = cast("pa.Table", storage.retrying(f"reading shard {shard}", read))
    return rows if DELETED in rows.column_names else rows.append_column(DELETED, pa.repeat(False, rows.num_rows))


def read_partitions(folder: str, files: Sequence[PinnedFile]) -> list[str]:
    """For each shard in order the folder below its run's that it goes to (`site=a/day=1`); "" where it is not partitioned."""

    def read(file: PinnedFile) -> list[str]:
        with storage.open_for_reading(storage.join(folder, file.name)) as handle:
            parquet = pq.ParquetFile(handle)
            groups = (parquet.read_row_group(i, columns=[PARTITION]) for i in range(len(file.shard_rows)))
            return [group[PARTITION][0].as_py() for group in groups]

    def retried(file: PinnedFile) -> list[str]:
        return storage.retrying(f"reading partitions of {file.name}", lambda: read(file))

    with ThreadPoolExecutor(16) as pool:
        return [partition for found in pool.map(retried, files) for partition in found]
