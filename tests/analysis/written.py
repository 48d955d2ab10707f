"""Outputs to open: of many runs without a model, by the job's own functions; and a detector for what a job writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fcos_ray import storage
from fcos_ray.inputs.fetch import FetchPolicy
from fcos_ray.inputs.manifests import find_sources
from fcos_ray.inputs.pin import pin
from fcos_ray.inputs.pinned_files import read_shard
from fcos_ray.inputs.plan import PlanSettings, draft_plan
from fcos_ray.outputs import runs
from fcos_ray.outputs.audit import audit
from fcos_ray.outputs.commit import ShardTarget, commit_shard
from fcos_ray.outputs.schema import RESERVED_COLUMNS, RESULT_SCHEMA
from fcos_ray.types import Detections, Image

LABELLING: dict[str, Any] = {
    "architecture": "fcos_resnet50_fpn",
    "weights": "random:1",
    "weights_sha256": "f" * 64,
    "categories": ["__background__", "person", "bicycle", "car"],
    "settings": {"score_threshold": 0.2, "max_detections": 100},
}
Outcome = Sequence[int] | str  # labels of the boxes, or an error code of fetch


def write_run(
    output: str,
    number: int,
    manifest: Mapping[str, Any],
    folder: Path,
    *,
    outcomes: Mapping[str, Outcome] | None = None,
    partition_by: Sequence[str] = (),
    shard_rows: int = 2,
    finished: bool = True,
    shards: int | None = None,
) -> str:
    """Run `number` over a manifest of these columns (image_id, …; uris are made up); gives its run_id.

    An image without an outcome has one box, a person's. `shards` are committed, all by default.
    """
    ids = pa.array(manifest["image_id"]).to_pylist()
    uris = pa.array([f"s3://corpus/{i}.jpg" for i in ids], pa.string())
    path = folder / f"manifest-{number}.parquet"
    pq.write_table(pa.table({"uri": uris, **manifest}), path)
    digest = f"{number:08x}" + "0" * 56
    run_id = f"{number:06d}-{digest[:8]}"
    settings = PlanSettings(
        partition_by=tuple(partition_by),
        shard_rows=shard_rows,
        fetch=FetchPolicy(allow_roots=(str(folder),)),
        reserved_columns=RESERVED_COLUMNS,
    )
    sources = find_sources([str(path)])
    pinned_folder = storage.join(runs.run_folder(output, run_id), "manifest-abc")
    with draft_plan(sources, settings) as draft:
        files = pin(draft, pinned_folder)
        num_shards = draft.num_shards
    runs.create_labelling(output, LABELLING)
    record = {
        "run_id": run_id, "request_digest": digest, "sources": [asdict(s) for s in sources], "attempt": "manifest-abc",
        "partition_by": list(partition_by), "files": [asdict(f) for f in files], "num_rows": len(ids),
        "num_shards": num_shards, "duplicates_dropped": 0, "uris_refused": 0,
        "created_at": f"2026-01-{number:02d}T00:00:00+00:00",
    }  # fmt: skip
    runs.create_run(output, run_id, record)
    target = ShardTarget(output, run_id, tuple(partition_by), LABELLING)
    for shard in range(num_shards if shards is None else shards):
        rows = read_shard(pinned_folder, files, shard)
        found = [(outcomes or {}).get(i, [1]) for i in rows["image_id"].to_pylist()]
        results = pa.Table.from_pylist([_result(shard, row, what) for row, what in enumerate(found)], RESULT_SCHEMA)
        assert commit_shard(target, shard, pinned=rows, results=results)
    if finished:
        counts = asdict(audit(target, [rows for file in files for rows in file.shard_rows]))
        runs.create_success(output, run_id, counts | {"finished_at": f"2026-01-{number:02d}T01:00:00+00:00"})
    return run_id


def _result(shard: int, row: int, outcome: Outcome) -> dict[str, Any]:
    if isinstance(outcome, str):
        return {"shard": shard, "row": row, "error_stage": "fetch", "error_code": outcome, "error_message": "no"}
    count = len(outcome)
    return {
        "shard": shard, "row": row, "width": 64, "height": 48, "orientation": 1, "content_sha256": "a" * 64,
        "boxes": [[float(n), 1.0, 10.0 + n, 21.0] for n in range(count)], "labels": list(outcome),
        "scores": [0.875 - n / 8 for n in range(count)], "attempts": 1,
    }  # fmt: skip


class SeveralBoxes:
    """None to three boxes per image, of three classes, that depend on every pixel."""

    def detect(self, images: Sequence[Image]) -> list[Detections]:
        return [self._detect(image) for image in images]

    def _detect(self, image: Image) -> Detections:
        digest = sha256(image.pixels.tobytes()).digest()
        count = digest[0] % 4
        corners = [[0, 0, image.width / (2 + n), image.height / (1 + n)] for n in range(count)]
        labels = np.array([1 + value % 3 for value in digest[1 : 1 + count]], np.int64)
        return Detections(
            np.array(corners, np.float32).reshape(-1, 4), labels, np.array([0.9, 0.85, 0.4][:count], np.float32)
        )
