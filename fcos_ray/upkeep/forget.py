"""Forget: images taken out of everything that was written under an output. The only room that rewrites committed files.

Every Parquet file below detections/ and of every pinned manifest is looked at, the runs' records hold no image. Rows of
other ids go too where they name the same uri: it is the image that is to be forgotten. A file is replaced by one that
lacks the rows, whole or not at all; killed anywhere, the same command goes on, and running it twice changes nothing.
"""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fcos_ray import storage
from fcos_ray.errors import OutputError
from fcos_ray.inputs.columns import PARTITION
from fcos_ray.outputs import runs
from fcos_ray.outputs.commit import METADATA_KEY, ShardCounts, count_outcomes, data_folder, is_damage
from fcos_ray.outputs.index import index_uri
from fcos_ray.outputs.pulse import LIVE_SECONDS, Pulse, at_work

_AT_ONCE: Final = 16  # files in hand
_KEYS: Final = ["image_id", "uri"]


@dataclass(frozen=True, slots=True)
class ForgetSummary:
    """What was taken out, or would be."""

    ids: int  # asked for
    ids_found: int
    rows: int  # committed ones, over all runs
    rows_of_other_ids: int  # of them, those that name a uri of the ids
    files: int  # with such rows: shard files and pinned manifests
    applied: bool

    def describe(self) -> str:
        """For people."""
        done = "took out" if self.applied else "would take out (--apply does it)"
        others = (
            f", {self.rows_of_other_ids:,} of them of other ids with the same uri" if self.rows_of_other_ids else ""
        )
        return (
            f"{done}: {self.rows:,} rows{others}, in {self.files:,} files; {self.ids_found:,} of {self.ids:,} ids are "
            "there. Take them out of the manifests too, or the next run labels them again; a bucket with versioning "
            "keeps old versions"
        )


def read_ids(path: Path) -> list[str]:
    """image_ids of a text file, one a line, or of a Parquet file's column image_id. Raises OutputError."""
    try:
        if path.suffix == ".parquet":
            column = pq.read_table(path, columns=["image_id"])["image_id"]
            found = [str(value) for value in column.drop_null().to_pylist()]
        else:
            found = [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        wanted = "a text file with one image_id a line, or a .parquet file with a column image_id"
        raise OutputError(f"--ids {path} cannot be read: {error}; wanted {wanted}") from error
    if not found:
        raise OutputError(f"--ids {path} holds no image_id")
    return found


def forget(output: str, ids: Iterable[str], *, apply: bool, reason: str | None = None) -> ForgetSummary:
    """Take images out of an output. Without `apply` it is only counted what would go.

    Raises OutputError while a run is open, whose pinned rows are still to be labelled, and while another is at it.
    """
    _require_no_open_run(output)
    wanted = frozenset(ids)
    if not apply:
        found = _find(list(_files(output)), wanted)
        return _summary(found, wanted, applied=False)
    with Pulse(storage.join(output, "forgotten", "at_work")) as pulse:
        if others := [one for one in at_work(pulse.folder) if one.name != pulse.name]:
            raise OutputError(
                f"{others[0].name} forgets here too (its last sign was {others[0].seconds_ago:.0f} s ago); two at once would "
                f"undo each other: let it end. If it was killed, its sign is gone after {LIVE_SECONDS:.0f} s"
            )
        return _apply(output, wanted, reason)


def _require_no_open_run(output: str) -> None:
    states = runs.list_runs(output)
    if not states:
        raise OutputError(f"{storage.without_secrets(output)} holds no runs; wanted the --output of a job")
    if open_runs := [run.run_id for run in states if run.state == "open"]:
        raise OutputError(
            f"run {open_runs[0]} is open, and may write these images again: let it finish, or abandon it first"
        )


def _summary(found: _Found, wanted: Collection[str], *, applied: bool) -> ForgetSummary:
    files = sum(file.kind != "index" for file in found.files)
    return ForgetSummary(len(wanted), len(found.keys.ids), found.rows, found.rows_of_other_ids, files, applied=applied)


def _apply(output: str, wanted: frozenset[str], reason: str | None) -> ForgetSummary:
    """Take out, look again, and so on until nothing is found: a job that was planning may have written meanwhile."""
    # Neither ids nor uris: what was forgotten is to be nowhere, but that it was is to be known. It comes before the first
    # look, so that a job that plans now sees it and pins nothing.
    name = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}"
    record = storage.join(output, "forgotten", name)
    about = {"at": datetime.now(UTC).isoformat(), "ids": len(wanted), "reason": reason}
    storage.create(f"{record}.json", json.dumps(about, indent=1).encode())
    summary, uris = None, frozenset[str]()
    while True:
        for left in _left_behind(output):
            storage.delete(left.uri)
        found = _find(list(_files(output)), wanted, uris)
        summary, uris = summary or _summary(found, wanted, applied=True), found.keys.uris
        if not found.files:
            break
        _take_out(output, found)
    _require_no_open_run(output)  # one that was pinned after the first look; the same command goes on when it is done
    done = {key: value for key, value in asdict(summary).items() if key != "applied"}
    data = json.dumps(done | {"at": datetime.now(UTC).isoformat()}, indent=1).encode()
    storage.create(f"{record}-done.json", data)
    # Whoever made an index of files as they were sees the record and deletes it; who published it before is seen here.
    for file in _find([file for file in _files(output) if file.kind == "index"], wanted, uris).files:
        storage.delete(file.uri)
    return summary


def _take_out(output: str, found: _Found) -> None:
    for file in found.files:
        if file.kind == "index":
            storage.delete(file.uri)  # made again when it is needed
    touched = [file for file in found.files if file.kind != "index"]
    # Rows of other ids first: only the ids' own rows tell which uris are to go, should this be killed between the two.
    of_others = [file for file in touched if found.files[file]]
    with ThreadPoolExecutor(4) as pool:  # each has a whole file in hand
        list(pool.map(lambda file: _rewrite(output, file, found.keys, others_only=True), of_others))
        list(pool.map(lambda file: _rewrite(output, file, found.keys), touched))


@dataclass(frozen=True, slots=True)
class _File:
    uri: str
    run_id: str
    kind: Literal["shard", "pinned", "index"]


def _files(output: str) -> Iterator[_File]:
    for run_id in runs.list_run_folders(output):
        for found in storage.list_files(data_folder(output, run_id)):
            yield _File(found.uri, run_id, "shard")
        folder = runs.run_folder(output, run_id)
        for name in storage.list_folders(folder):
            if name.startswith("manifest-"):
                for found in storage.list_files(storage.join(folder, name)):
                    yield _File(found.uri, run_id, "pinned")
        if storage.exists(index_uri(output, run_id)):
            yield _File(index_uri(output, run_id), run_id, "index")


def _left_behind(output: str) -> Iterator[storage.StoredFile]:
    """Halves of files that commits, plans, indexes and this command left when they were killed."""
    for run_id in runs.list_run_folders(output):
        yield from storage.list_files(runs.temporary_folder(output, run_id))


@dataclass(frozen=True, slots=True)
class _Keys:
    """What is to go."""

    ids: frozenset[str]  # those asked for that were found
    uris: frozenset[str]

    def mask(self, table: pa.Table, *, others_only: bool = False) -> pa.ChunkedArray:
        """Which rows are to go, or those of them that only their uri names."""
        ours, same_uri = _is_in(table["image_id"], self.ids), _is_in(table["uri"], self.uris)
        return pc.and_not(same_uri, ours) if others_only else pc.or_(ours, same_uri)


def _is_in(column: pa.ChunkedArray, values: Collection[str]) -> pa.ChunkedArray:
    return pc.fill_null(pc.is_in(column, pa.array(sorted(values), pa.string())), False)


@dataclass(frozen=True, slots=True)
class _Found:
    """What is to go, and where it is."""

    keys: _Keys
    files: dict[_File, bool]  # those with such rows: whether some of them are of other ids
    rows: int
    rows_of_other_ids: int


def _find(files: list[_File], wanted: Collection[str], known_uris: Collection[str] = ()) -> _Found:
    """Two passes over two columns: the ids' uris, then every row that has one of either."""
    ids: set[str] = set()
    uris = set(known_uris)
    for _, table in _read_keys(files):
        found = table.filter(_is_in(table["image_id"], wanted))
        ids.update(found["image_id"].to_pylist())
        uris.update(found["uri"].to_pylist())
    keys = _Keys(frozenset(ids), frozenset(uris))
    touched: dict[_File, bool] = {}
    rows = others = 0
    for file, table in _read_keys(files) if uris else ():
        found = table.filter(keys.mask(table))
        num_others = found.num_rows - (pc.sum(_is_in(found["image_id"], ids)).as_py() or 0)
        if found.num_rows:
            touched[file] = num_others > 0
        if file.kind == "shard":
            rows, others = rows + found.num_rows, others + num_others
    return _Found(keys, touched, rows, others)


def _read_keys(files: list[_File]) -> Iterator[tuple[_File, pa.Table]]:
    def read(file: _File) -> pa.Table:
        with _damage_named(file.uri), storage.open_for_reading(file.uri) as handle:
            return pq.ParquetFile(handle).read(columns=_KEYS)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for start in range(0, len(files), _AT_ONCE):
            some = files[start : start + _AT_ONCE]
            tables = pool.map(lambda f: storage.retrying(f"reading {f.uri}", lambda: read(f)), some)
            yield from zip(some, tables, strict=True)


@contextmanager
def _damage_named(uri: str) -> Iterator[None]:
    """A file that cannot be read may hold what is to be forgotten: nothing is claimed then."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error):
            raise
        raise OutputError(
            f"{uri} cannot be read: {error}; it may hold what is to be forgotten: move it away first"
        ) from error


def _rewrite(output: str, file: _File, keys: _Keys, *, others_only: bool = False) -> None:
    with storage.open_for_reading(file.uri) as handle:
        parquet = pq.ParquetFile(handle)
        if file.kind == "pinned":
            groups = [parquet.read_row_group(number) for number in range(parquet.num_row_groups)]
            data = _blanked(groups, [keys.mask(group, others_only=others_only) for group in groups])
        else:
            table = parquet.read()
            data = _without(table, keys.mask(table, others_only=others_only))
    # Not beside the file: what a kill leaves there would be taken for a shard.
    storage.replace(file.uri, data, temporary_folder=runs.temporary_folder(output, file.run_id))


def _without(table: pa.Table, gone: pa.ChunkedArray) -> bytes:
    """A shard file without the rows; its metadata counts what is left, and how many are gone."""
    kept = table.filter(pc.invert(gone))
    metadata = dict(table.schema.metadata or {})
    about = json.loads(metadata[METADATA_KEY])
    before = ShardCounts(**about["counts"])
    counts = replace(count_outcomes(kept), retries=before.retries, seconds=before.seconds)
    forgotten = about.get("forgotten", 0) + table.num_rows - kept.num_rows
    metadata[METADATA_KEY] = json.dumps(about | {"counts": asdict(counts), "forgotten": forgotten}).encode()
    sink = io.BytesIO()
    pq.write_table(kept.replace_schema_metadata(metadata), sink, compression="zstd")
    return sink.getvalue()


def _blanked(groups: list[pa.Table], gone: list[pa.ChunkedArray]) -> bytes:
    """A pinned manifest in which the rows hold nothing but their partition: row groups and places stay, as the plan says."""
    schema = pa.schema([f if f.name == PARTITION else f.with_nullable(True) for f in groups[0].schema])
    sink = io.BytesIO()
    # As inputs/pin.py writes it: a row group is a shard, and statistics would hold an id or two.
    with pq.ParquetWriter(sink, schema, compression="zstd", write_statistics=False) as writer:
        for group, rows in zip(groups, gone, strict=True):
            places = pc.if_else(rows, None, pa.array(range(group.num_rows), pa.int64()))
            columns = [group[f.name] if f.name == PARTITION else group[f.name].take(places) for f in schema]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=max(group.num_rows, 1))
    return sink.getvalue()
