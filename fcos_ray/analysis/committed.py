"""Committed: an output -> its runs, their shard files and the columns of these. Knows records and footers, reads no rows.

Which columns partition a run is said by its paths, what type they have by its pinned manifest: a path holds text only,
and a reader who guesses makes 7 of 007.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from fcos_ray import storage
from fcos_ray.errors import OutputError
from fcos_ray.outputs import runs
from fcos_ray.outputs.commit import committed_files, data_folder, is_damage
from fcos_ray.outputs.schema import DATA_SCHEMA

_WAY_OUT: Final = "choose others with columns=[…], or read one run: rows('<run_id>')"
_KEY: Final = re.compile(r"([A-Za-z0-9_-]+)=[^/]+")  # a folder's name; what the plan lets stand in a path


# Arrow types that hold each other's values: within a kind the wider one holds both.
_KINDS: Final = (
    (pa.types.is_integer,),
    (pa.types.is_floating,),
    (pa.types.is_string, pa.types.is_large_string),
    (pa.types.is_binary, pa.types.is_large_binary),
)


@dataclass(frozen=True, slots=True)
class CommittedRun:
    """A pinned run and what it has committed so far."""

    run_id: str
    record: Mapping[str, Any]  # run.json
    success: Mapping[str, Any] | None  # _SUCCESS.json; None while the run is open, or when it was abandoned
    state: runs.State
    files: tuple[storage.StoredFile, ...]
    partition_by: tuple[str, ...]  # in the order of the path
    columns: pa.Schema  # of its rows: the files' own, then the partitions

    @property
    def counts(self) -> bool:
        """Whether its rows are part of the dataset."""
        return self.state not in ("retracted", "purged")


def read_runs(output: str) -> list[CommittedRun]:
    """The pinned runs of an output, oldest first; costs a listing and at most two footers per run.

    Raises OutputError for damaged records and for files that no run writes.
    """
    states = sorted(runs.list_runs(output), key=lambda run: run.run_id)
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda run: _read_run(output, run), states))


def _read_run(output: str, run: runs.RunState) -> CommittedRun:
    run_id = run.run_id
    record, success = runs.read_run(output, run_id), runs.read_success(output, run_id)
    files = tuple(committed_files(output, run_id).values()) if run.state != "purged" else ()
    if not files:
        return CommittedRun(run_id, record, success, run.state, (), (), DATA_SCHEMA)
    partition_by = _partition_keys(storage.join(data_folder(output, run_id), ""), files)
    fields = list(_footer(files[0].uri))
    if partition_by:
        folder = runs.run_folder(output, run_id)
        try:
            pinned = storage.join(folder, record["attempt"], record["files"][0]["name"])
        except (KeyError, IndexError, TypeError) as error:
            raise OutputError(f"{folder}/run.json is damaged: it does not name its pinned files") from error
        types = {field.name: field.type for field in _footer(pinned)}
        # A key that the plan derived and no manifest holds is text, as it stands in the path.
        fields += [pa.field(name, types.get(name, pa.string())) for name in partition_by]
    columns = pa.schema([pa.field(f.name, f.type, f.nullable) for f in fields])
    return CommittedRun(run_id, record, success, run.state, files, partition_by, columns)


def _partition_keys(folder: str, files: Iterable[storage.StoredFile]) -> tuple[str, ...]:
    """The partition columns that the paths below a run's folder name, the same for each."""
    first: tuple[str, tuple[str, ...]] | None = None
    for file in files:
        found = [_KEY.fullmatch(name) for name in file.uri[len(folder) :].split("/")[:-1]]
        keys = tuple(match[1] for match in found if match)
        if len(keys) != len(found):
            raise OutputError(f"{file.uri} was not written by this run; move it away, then open again")
        first = first or (file.uri, keys)
        if first[1] != keys:
            raise OutputError(
                f"{first[0]} and {file.uri} are not partitioned alike, so that one was not written by this run; "
                "move it away, then open again"
            )
    return first[1] if first else ()


def _footer(uri: str) -> pa.Schema:
    def read() -> pa.Schema:
        with storage.open_for_reading(uri) as handle:
            return pq.read_schema(handle)

    try:
        return storage.retrying(f"reading {uri}", read)
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error):
            raise
        raise OutputError(f"{uri} cannot be read: {error}; wanted a Parquet file that a run wrote there") from error


def column_names(found: Sequence[CommittedRun]) -> list[str]:
    """DATA_SCHEMA's, then the newest run's own, then those that only older runs have."""
    own = (name for run in reversed(found) for name in run.columns.names)
    return list(dict.fromkeys([*DATA_SCHEMA.names, *own]))


def pick(columns: Sequence[str] | None, names: Sequence[str]) -> list[str]:
    """The wanted columns in the wanted order; None: all. Raises OutputError for one that is not there."""
    if columns is None:
        return list(names)
    for name in columns:
        if name not in names:
            nearest = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise OutputError(f"no column {name!r} in the output; it has {', '.join(sorted(names))}{hint}")
    return list(dict.fromkeys(columns))


def unite(found: Sequence[CommittedRun], names: Sequence[str]) -> pa.Schema:
    """These columns over all runs that have them.

    A column that has two types becomes the one that holds both without loss: the wider of two integers, floats, strings
    or binaries. Raises OutputError where no type does, and for names that differ in case only.
    """
    for first, second in pairwise(sorted(names, key=str.casefold)):
        if first.casefold() == second.casefold():
            raise OutputError(f"columns {first!r} and {second!r} differ in case only, which DuckDB ignores; {_WAY_OUT}")
    having = [run for run in reversed(found) if run.files]
    return pa.schema([_united(name, having) for name in names])


def _united(name: str, found: Sequence[CommittedRun]) -> pa.Field:
    having = [run for run in found if name in run.columns.names]
    fields = [(run.run_id, run.columns.field(name)) for run in having]
    if not fields:  # no run has committed anything yet
        return DATA_SCHEMA.field(name)
    newest, type_ = fields[0][0], fields[0][1].type
    for run_id, field in fields[1:]:
        wider = _wider(type_, field.type)
        if wider is None:
            raise OutputError(
                f"column {name!r} is {type_} in run {newest} but {field.type} in run {run_id}; wanted one type, or two "
                f"integers, floats, strings or binaries of which one holds both without loss; {_WAY_OUT}"
            )
        type_ = wider
    return pa.field(name, type_, len(having) < len(found) or any(field.nullable for _, field in fields))


def _wider(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The type that holds every value of both; None when there is none."""
    if one == other:
        return one
    if not any(any(is_(one) for is_ in kind) and any(is_(other) for is_ in kind) for kind in _KINDS):
        return None
    if pa.uint64() in (one, other) and not all(pa.types.is_unsigned_integer(t) for t in (one, other)):
        return None  # Arrow 26 would take int64, which does not hold 2**63
    pair = [pa.schema([("x", type_)]) for type_ in (one, other)]
    return pa.unify_schemas(pair, promote_options="permissive").field("x").type
