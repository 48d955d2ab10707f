"""What the tests of manifests and plans share: write a manifest, plan it, pin it, read the shards back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fcos_ray import storage
from fcos_ray.inputs.fetch import FetchPolicy
from fcos_ray.inputs.manifests import find_sources
from fcos_ray.inputs.pin import pin
from fcos_ray.inputs.pinned_files import PinnedFile, read_shard
from fcos_ray.inputs.plan import PlanSettings, draft_plan
from fcos_ray.outputs.schema import RESERVED_COLUMNS


@dataclass(frozen=True)
class Planned:
    """A pinned plan, read back shard by shard."""

    columns: dict[str, pa.DataType]
    partitions: tuple[tuple[str, int], ...]
    duplicates_dropped: int
    uris_refused: int
    files: tuple[PinnedFile, ...]
    shards: list[pa.Table]

    @property
    def rows(self) -> pa.Table:
        return pa.concat_tables(self.shards)

    def column(self, name: str) -> list[Any]:
        return self.rows[name].to_pylist()


def plan(*manifests: Path | str, pinned: Path | str, **settings: Any) -> Planned:
    """Plan and pin as a job does; `fetch` may read below the first manifest's folder unless it is given."""
    roots = (str(Path(manifests[0]).parent),) if isinstance(manifests[0], Path) else ()
    settings = {"fetch": FetchPolicy(allow_roots=roots), "reserved_columns": RESERVED_COLUMNS} | settings
    with draft_plan(find_sources([str(m) for m in manifests]), PlanSettings(**settings)) as draft:
        files = pin(draft, str(pinned))
        shards = [read_shard(str(pinned), files, k) for k in range(draft.num_shards)]
        return Planned(
            draft.columns, draft.partitions, draft.num_duplicates_dropped, draft.num_uris_refused, files, shards
        )


def parquet(path: Path, columns: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(columns)), path)
    return path


def text(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(path: Path, *rows: Any) -> Path:
    return text(path, "".join(json.dumps(row) + "\n" for row in rows))


def json_array(path: Path, *rows: Any) -> Path:
    return text(path, json.dumps(rows, indent=1))


def put(uri: str, table: pa.Table) -> str:
    """A Parquet manifest in a store."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    assert storage.create(uri, sink.getvalue().to_pybytes())
    return uri
