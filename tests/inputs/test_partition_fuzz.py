"""Whatever a partition value is: it comes back from the path equal, by every reader, or is refused; no value steers a path."""

from __future__ import annotations

import tempfile
from pathlib import Path
from urllib.parse import unquote

import duckdb
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from fcos_ray.errors import ManifestError
from tests.inputs.planning import parquet, plan

VALUES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20) | st.sampled_from(
    ["..", ".", "/", "../../etc", "a/b", "a\0b", "\n", "\x7f", "%2F", "%", "a=b", "day=1", "A", "a", "é", "é", "ﬁ",
     " ", "+", "a b ", "~", "\\", "C:", "'", '"', "*", "?", "[x]", "NULL", "01", "1", "1e3", "true", "🦊", "x" * 200,
     "é" * 50, "x" * 300, "/" * 100]
)  # fmt: skip


@given(st.lists(VALUES, min_size=1, max_size=8, unique=True), st.lists(VALUES, min_size=1, max_size=8))
def test_partition_values_come_back_equal_and_stay_within_their_folder(days: list[str], ids: list[str]) -> None:
    ids = [f"{number}{text}" for number, text in enumerate(ids[: len(days)] + days[len(ids) :])]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "labels"
        uris = [f"{number}.jpg" for number in range(len(days))]
        manifest = parquet(Path(folder) / "m.parquet", {"image_id": ids, "uri": uris, "day": days})
        try:
            planned = plan(manifest, pinned=Path(folder) / "pinned", partition_by=("day",))
        except ManifestError as error:
            refusal = str(error)
        else:
            refusal = ""
        event("refused" if refusal else "planned")
        if refusal:
            assert "column 'day' cannot partition" in refusal
            assert "wanted at most 240" in refusal
            return
        for shard in planned.shards:
            [path] = set(shard["__partition"].to_pylist())
            assert path.isascii()
            assert path.isprintable()
            assert path.count("/") == 0, "one key is one folder"
            assert not path.startswith(".")
            assert len(path) <= 240
            [day] = set(shard["day"].to_pylist())
            assert unquote(path.removeprefix("day=")) == day
            file = root / path / "00000000.parquet"
            file.parent.mkdir(parents=True)
            assert file.resolve().is_relative_to(root.resolve())
            pq.write_table(shard.select(["image_id"]), file)
        wanted = dict(zip(ids, days, strict=True))
        hive = pads.partitioning(pa.schema([("day", pa.string())]), flavor="hive")
        read = pads.dataset(root, partitioning=hive).to_table()
        assert dict(zip(read["image_id"].to_pylist(), read["day"].to_pylist(), strict=True)) == wanted
        with duckdb.connect() as connection:
            rows = connection.execute(
                "SELECT image_id, day FROM read_parquet(?, hive_partitioning = true, hive_types_autocast = false)",
                [f"{root}/**/*.parquet"],
            ).fetchall()
        assert dict(rows) == wanted


def test_partitions_that_make_a_path_longer_than_stores_take_are_refused(tmp_path: Path) -> None:
    keys = ("a", "b", "c", "d", "e")
    manifest = parquet(tmp_path / "m.parquet", {"uri": ["x.jpg"], **{key: ["v" * 200] for key in keys}})
    with pytest.raises(ManifestError, match=r"partition columns a, b, c, d, e: a=vvv.* is 1,014 bytes long, wanted at"):
        plan(manifest, pinned=tmp_path / "pinned", partition_by=keys)
    plan(manifest, pinned=tmp_path / "pinned", partition_by=keys[:3])
