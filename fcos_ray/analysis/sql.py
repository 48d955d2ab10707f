"""Sql: committed runs -> what stands after FROM. Knows DuckDB's SQL, no connection and no format.

A partition's value is taken from the file's name and cast to the type it had in the manifest. DuckDB's own reading of
Hive paths guesses types, refuses files whose keys differ, and takes `x=1` in the path of the output for a column (2.0);
filters on what is computed from the name still leave out files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fcos_ray import storage
from fcos_ray.analysis.committed import CommittedRun
from fcos_ray.inputs.partitions import HIVE_NULL
from fcos_ray.inputs.scans import FILE, literal, quote, uri_list

_RUN: Final = "__run"  # number of a run in the order of ids
# What the plan lets partition.
_SQL_TYPES: Final = {
    "string": "VARCHAR", "large_string": "VARCHAR", "bool": "BOOLEAN", "date32[day]": "DATE",
    "int8": "TINYINT", "int16": "SMALLINT", "int32": "INTEGER", "int64": "BIGINT",
    "uint8": "UTINYINT", "uint16": "USMALLINT", "uint32": "UINTEGER", "uint64": "UBIGINT",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scans:
    """Runs that have files, oldest first, and where DuckDB finds these: None on a local disk."""

    runs: tuple[CommittedRun, ...]
    listed: storage.ListedFiles | None

    def all_rows(self, names: Sequence[str]) -> str:
        """Every row of every run: these columns, null where a run has none, and _RUN."""
        return f"({' UNION ALL BY NAME '.join(self._scan(n, names) for n in range(len(self.runs)))})"

    def newest_rows(self, names: Sequence[str]) -> str:
        """Per image_id the row of the newest run that has one; an id is unique within a run.

        Ids are joined, not ranked with their rows: boxes need not wait in a sort.
        """
        if len(self.runs) == 1:
            return self.all_rows(names)
        rows = self.all_rows([*names, "image_id"])
        ids = self.all_rows(["image_id"])
        newest = f"(SELECT image_id, max({_RUN}) AS {_RUN} FROM {ids} GROUP BY image_id)"
        return f"(FROM {rows} SEMI JOIN {newest} USING (image_id, {_RUN}))"

    def _scan(self, number: int, names: Sequence[str]) -> str:
        run = self.runs[number]
        present = [_column(run, name) for name in dict.fromkeys(names) if name in run.columns.names]
        files = f"read_parquet({self._names(run)}, hive_partitioning = false, filename = {literal(FILE)})"
        return f"SELECT {', '.join([*present, f'{number}::INTEGER AS {_RUN}'])} FROM {files}"

    def _names(self, run: CommittedRun) -> str:
        if self.listed is None:
            return uri_list([file.uri for file in run.files])
        return f"[{', '.join(literal(self.listed.uri(file)) for file in run.files)}]"


def _column(run: CommittedRun, name: str) -> str:
    if name not in run.partition_by:
        return quote(name)
    folders = "".join(f"/{key}=([^/]*)" for key in run.partition_by)
    place = run.partition_by.index(name) + 1
    # A tombstone whose image had other partition columns stands in Hive's null.
    found = f"nullif(regexp_extract({FILE}, {literal(f'{folders}/[^/]*$')}, {place}), {literal(HIVE_NULL)})"
    text = f"url_decode({found})"
    return f"CAST({text} AS {_SQL_TYPES[str(run.columns.field(name).type)]}) AS {quote(name)}"
