"""`python jobs/manifest.py` as a user meets it, and `jobs/detect.py` taking what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fcos_ray.sample import write_sample
from jobs import detect, manifest
from tests.processes import call_job, flags, run_job


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_sample(folder, num_images=10, seed=2, num_broken=0)
    (folder / "images/tiny.jpg").write_bytes(b"")
    return folder


def test_a_corpus_is_listed_and_the_last_line_sums_it_up(corpus: Path, tmp_path: Path, own_signals: None) -> None:
    output = tmp_path / "m.parquet"
    done = run_job("manifest", *flags(input=corpus, output=output), "--probe-size", "--exclude", "*.webp")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    rows = pq.read_table(output).to_pylist()
    assert summary.pop("seconds") > 0
    assert summary == {
        "output": str(output), "rows": len(rows), "bytes": sum(row["content_bytes"] for row in rows),
        "skipped": 13 - len(rows), "refused": 0, "unprobed": 1,
    }  # fmt: skip
    assert [row["image_id"] for row in rows if row["width"] is None] == ["images/tiny.jpg"]
    planned = call_job(
        detect.main, *flags(manifest=output, output=tmp_path / "out", weights="sample", allow_root=corpus), "--dry-run",
        "--partition-by", "date:content_last_modified",
    )  # fmt: skip
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout.splitlines()[-1])["rows"] == len(rows)


def test_tonight_replaces_last_night_only_when_told(corpus: Path, tmp_path: Path) -> None:
    arguments = flags(input=corpus, output=tmp_path / "m.parquet")
    assert call_job(manifest.main, *arguments).returncode == 0
    second = run_job("manifest", *arguments)
    assert (second.returncode, second.stdout) == (2, "")
    assert "--overwrite replaces it" in second.stderr.splitlines()[-1]
    assert call_job(manifest.main, *arguments, "--overwrite").returncode == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input": "none"}, "none: there is no such folder or bucket"),
        ({"input": "https://host/x"}, "wanted a local folder or an s3:// prefix"),
        ({"output": "m.csv"}, "wanted a name that ends in .parquet"),
        ({"include": "*.xyz"}, "none of its 13 files fits --include and --exclude; wanted *.xyz"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_ends_with_2(
    corpus: Path, tmp_path: Path, change: dict[str, str], words: str
) -> None:
    done = call_job(manifest.main, *flags(**{"input": corpus, "output": tmp_path / "m.parquet"} | change))
    assert (done.returncode, done.stdout) == (2, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert words in last
    assert not list(tmp_path.iterdir())
