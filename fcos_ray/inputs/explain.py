"""Explain: why one image is selected or not, in words. Knows the tables that selection.py makes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Final

import duckdb

from fcos_ray import storage
from fcos_ray.inputs.columns import SAID

_WHY: Final = {
    "new": "is new",
    "changed": "has changed",
    "failed": "failed before, and another try may succeed",
    "failed_for_good": "failed before, and another try would not help",
    "up_to_date": "is up to date",
}
_TAKES: Final = {
    "failed": "failed",
    "failed_for_good": "failed:all",
}  # what to ask for; else the class's own name, or all


def explain(
    connection: duckdb.DuckDBPyConnection,
    image_id: str,
    run_ids: Sequence[str],
    compared: Collection[str],
    taken: Collection[str],
) -> str:
    """What one image is to the history, whether a run would take it, and why.

    `compared` are the content columns that the manifest has, `taken` the classes that are selected.
    """
    shown = _shown(image_id)
    columns = [f"CAST(m.{name} AS VARCHAR) AS now_{name}" for name in compared]
    columns += [f"CAST(k.{prefix}{name} AS VARCHAR) AS {prefix}{name}" for name in compared for prefix in ("", SAID)]
    found = connection.execute(
        f"SELECT {', '.join(['c.class', 'k.run', 'k.status', 'k.error_code', *columns])} FROM planned p "
        "JOIN classes c USING (number) JOIN manifest m ON m.rowid = p.number LEFT JOIN known k ON k.image_id = p.image_id "
        "WHERE p.image_id = $1",
        [image_id],
    ).fetchall()
    if not found:
        there = connection.execute("SELECT min(image_id) FROM planned").fetchall()[0][0]
        return f"image {shown} is not in the manifest, so nothing labels it; its image_ids are such as {_shown(there)}"
    names = ["class", "run", "status", "error_code", *(column.rsplit(" ", 1)[1] for column in columns)]
    row = dict(zip(names, found[0], strict=True))
    name = row["class"]
    before = "no run that counts has it"
    if row["run"] is not None:
        outcome = f"error {row['error_code']}" if row["status"] == "error" else row["status"]
        before = f"its newest row is of run {run_ids[row['run']]} ({outcome})"
    choice = _TAKES.get(name, "all" if name == "up_to_date" else name)
    verdict = "it is selected" if name in taken else f"it is not selected (--select {choice} takes it)"
    return f"image {shown} {_WHY[name]}{_details(row, compared)}; {before}; {verdict}"


def _shown(image_id: str) -> str:
    return repr(storage.without_secrets(image_id))


def _details(row: dict[str, Any], compared: Collection[str]) -> str:
    if row["class"] == "changed":
        tells = [
            f"{name} is {now!r} in the manifest and was {row[name]!r}"
            for name in compared
            if (now := row[f"now_{name}"]) is not None and now not in (row[name], row[SAID + name])
        ]
        return f": {'; '.join(tells)}" if tells else ": its store has something else now (--check-changed)"
    if row["class"] == "up_to_date" and not compared:
        return ": the manifest has no content_ column that would tell a change (--check-changed asks the store)"
    return ""
