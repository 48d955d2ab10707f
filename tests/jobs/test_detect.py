"""`python jobs/detect.py` as a user meets it: exit codes, what stands on stdout, what on stderr."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fcos_ray.sample import write_sample
from jobs import detect
from tests.corpus import SMALL_MODEL, files_of, write_manifest
from tests.processes import call_job, flags, run_job

JOB = pytest.mark.ray  # starts a Ray of its own


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_sample(folder, num_images=12, seed=2, num_broken=3)
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--score-treshold", "0.3"], "there is no setting --score-treshold; did you mean --score-threshold?"),
        (["--score-threshold", "2"], "score_threshold should be less than or equal to 1, got '2'"),
        (["--manifest", "none.parquet"], "none.parquet: no such file"),
        (["--weights", "none.safetensors"], "none.safetensors"),
        (["--weights", "random:x"], "random:x"),
        (["--partition-by", "capturedat"], "no column 'capturedat' in the manifest"),
        (["--output", "http://host/labels"], "http"),
        (["--allow-root", "/no/such/folder"], "--allow-root /no/such/folder: no such folder"),
        (["--config", "none.toml"], "--config none.toml cannot be read"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_ends_with_2(
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    own_signals: None,
    arguments: list[str],
    words: str,
) -> None:
    good = {"manifest": corpus / "manifest.parquet", "output": tmp_path / "out", "weights": "sample"}
    for name in list(good):
        if f"--{name}" in arguments:
            del good[name]
    assert detect.main([*flags(**good), *arguments]) == 2
    said = capsys.readouterr()
    last = said.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert words in last
    assert said.out == ""
    assert not (tmp_path / "out").exists()


def test_a_mistake_ends_the_process_with_2(corpus: Path, tmp_path: Path) -> None:
    done = run_job("detect", *flags(manifest=corpus / "none.parquet", output=tmp_path / "out", weights="sample"))
    assert (done.returncode, done.stdout) == (2, "")
    assert f"error: manifest {corpus}/none.parquet: no such file" in done.stderr


def test_a_dry_run_prints_the_plan_and_writes_nothing(corpus: Path, tmp_path: Path) -> None:
    job = flags(manifest=corpus / "manifest.parquet", output=tmp_path / "out", shard_rows=4, weights="sample")
    done = run_job("detect", *job, "--dry-run")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["state"], summary["rows"], summary["shards"]) == ("planned", 12, 3)
    assert not (tmp_path / "out").exists()


def test_more_errors_than_allowed_end_with_3_after_a_complete_run(
    corpus: Path, tmp_path: Path, own_signals: None, ray_session: Any
) -> None:
    job = [*flags(manifest=corpus / "manifest.parquet", output=tmp_path, **SMALL_MODEL), "--max-error-fraction", "0.1"]
    first = call_job(detect.main, *job)
    assert first.returncode == 3, first.stderr
    summary = json.loads(first.stdout.splitlines()[-1])
    assert (summary["state"], summary["rows"], summary["error"]) == ("complete", 12, 3)
    assert "25.00% of the rows are errors, more than --max-error-fraction 10.00%" in first.stderr
    again = run_job("detect", *job[:-1], "0.3")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["state"] == "nothing_to_do"


@JOB
def test_a_store_that_is_away_ends_with_4_and_commits_nothing(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.parquet", {"uri": [f"s3://bucket-away/{i}.jpg" for i in range(6)]})
    patience = flags(fetch_deadline_seconds=1, max_rounds=1, round_wait_seconds=0)
    nowhere = {
        **os.environ,
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
    }
    job = flags(manifest=manifest, output=tmp_path / "out", **SMALL_MODEL)
    done = run_job("detect", *job, *patience, environment=nowhere)
    assert done.returncode == 4, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("stopped: run 000001-")
    assert "6 rows in 1 shards missing" in last
    assert "the same command goes on" in last
    assert files_of(tmp_path / "out") == {}
