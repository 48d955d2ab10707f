"""Manifest, images and output in a store that fails: every row once, the undisturbed results, no outage among the rows.

CHAOS_IMAGES=2000 makes it long: as many images, an outage of two minutes, the deadlines that a user has. Else the outage lasts
until reads of images have given up: not by the clock, for a machine may be slow.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import s3fs

from fcos_ray import storage
from fcos_ray.errors import ERROR_CODES
from fcos_ray.sample import write_sample
from jobs import detect
from tests.corpus import manifest_ids, results_of, rows_of
from tests.processes import call_job, flags, run_job, start_job, wait_until
from tests.rgw import RgwServer
from tests.s3_faults import Request, S3Faults, Trouble, spread

NUM_IMAGES = int(os.environ.get("CHAOS_IMAGES", "120"))
LONG = NUM_IMAGES >= 1000
OUTAGE_SECONDS = 120 if LONG else 0
QUESTIONS = (
    9  # three for each read that gave up; at most four load tasks read at once, so one of them has had all three
)
JOB_SECONDS = 3600 if LONG else 600
pytestmark = [pytest.mark.chaos, pytest.mark.s3, pytest.mark.timeout(2 * JOB_SECONDS)]

SMALL = {"weights": "sample", "num_detectors": 1, "load_cpus": 0.5, "round_wait_seconds": 1}


@pytest.fixture(scope="module")
def bucket(s3_server: RgwServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bucket with a corpus; some of its files are broken."""
    s3fs.S3FileSystem.clear_instance_cache()
    storage.s3().call_s3("create_bucket", Bucket="chaos", timeout=30)
    folder = tmp_path_factory.mktemp("corpus")
    write_sample(folder, num_images=NUM_IMAGES, seed=21, num_broken=8)
    paths = [folder / "manifest.parquet", *(folder / "images").iterdir()]
    with ThreadPoolExecutor(16) as pool:
        assert all(
            pool.map(lambda path: storage.create(f"s3://chaos/{path.relative_to(folder)}", path.read_bytes()), paths)
        )
    return "s3://chaos"


def arguments(bucket: str, name: str, **settings: object) -> list[str]:
    job = {"manifest": f"{bucket}/manifest.parquet", "output": f"{bucket}/{name}", "shard_rows": NUM_IMAGES // 10}
    return [*flags(**job | SMALL | settings)]


@pytest.fixture(scope="module")
def undisturbed(bucket: str, s3_server: RgwServer) -> dict[str, dict[str, Any]]:
    done = run_job("detect", *arguments(bucket, "undisturbed"), timeout=JOB_SECONDS)
    assert done.returncode == 0, done.stderr
    results = results_of(f"{bucket}/undisturbed")
    assert sorted(results) == sorted(manifest_ids(f"{bucket}/manifest.parquet"))
    return results


def through(proxy: S3Faults) -> dict[str, str]:
    """A child's environment."""
    return os.environ | {"AWS_ENDPOINT_URL": proxy.url}


def assert_whole(output: str, wanted: dict[str, dict[str, Any]]) -> None:
    results = results_of(output)
    assert results == wanted, "equal to the bit: one machine, as many threads, one micro-batch size"
    transient = [
        row["error_code"] for row in results.values() if row["error_code"] and ERROR_CODES[row["error_code"]][1]
    ]
    assert not transient
    assert len({(row["run_id"], row["shard"], row["row"]) for row in rows_of(output).values()}) == len(wanted)


@pytest.mark.parametrize("percent", [20, 30] if LONG else [30])
def test_a_job_goes_on_in_a_store_that_fails(
    bucket: str, undisturbed: dict[str, dict[str, Any]], s3_server: RgwServer, percent: int
) -> None:
    with S3Faults(s3_server.endpoint, Trouble(spread(percent / 100, stalls=0.002), seed=percent)) as proxy:
        job = arguments(bucket, f"failing-{percent}", fetch_timeout_seconds=5)
        done = run_job("detect", *job, environment=through(proxy), timeout=JOB_SECONDS)
    print(f"{percent} % of requests fail:\n{proxy.report()}\n{done.stderr}")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    print({name: summary[name] for name in ("rows", "ok", "error", "retries", "wall_seconds", "images_per_second")})
    assert_whole(f"{bucket}/failing-{percent}", undisturbed)
    assert (summary["rows"], summary["retries"] > 0) == (NUM_IMAGES, True)
    assert proxy.injected.total() > proxy.num_requests * percent / 100 * 0.7


def test_an_outage_in_mid_run_leaves_no_rows_behind(
    bucket: str, undisturbed: dict[str, dict[str, Any]], s3_server: RgwServer
) -> None:
    # Few images at once: only few rows of the shards under way fail, a smaller share than --max-transient-fraction.
    patience = {} if LONG else {"fetch_deadline_seconds": 3}
    job = arguments(bucket, "outage", shard_rows=NUM_IMAGES // 2, fetch_concurrency=1, **patience)
    images: list[str] = []
    questions: list[str] = []  # whether the store answers at all, asked after a read has given up
    is_down = False

    def treat(request: Request) -> str:
        nonlocal is_down
        if request.verb == "GET" and "/images/" in request.target:
            images.append(request.target)
            is_down = is_down or len(images) == NUM_IMAGES // 4
        if is_down and request.verb == "HEAD" and request.target.partition("?")[0].strip("/") == "chaos":
            questions.append(request.target)
        return "down" if is_down else "pass"

    with S3Faults(s3_server.endpoint, treat) as proxy, start_job("detect", *job, environment=through(proxy)) as driver:
        wait_until(lambda: is_down or driver.poll() is not None, "the outage", timeout=JOB_SECONDS)
        assert driver.poll() is None, driver.communicate()
        began = time.monotonic()
        wait_until(lambda: len(questions) >= QUESTIONS or driver.poll() is not None, "reads that gave up", timeout=300)
        time.sleep(OUTAGE_SECONDS)
        is_down = False
        print(f"{time.monotonic() - began:.0f} s without a store")
        _, err = driver.communicate(timeout=JOB_SECONDS)
        print(f"{proxy.report()}\n{err}")
        assert driver.returncode in (0, 4), err
        assert "store_unavailable" in err, "rows failed, and their shards were set aside"
        if driver.returncode == 4:
            assert "the same command goes on" in err
            done = run_job("detect", *job, environment=through(proxy), timeout=JOB_SECONDS)
            assert done.returncode == 0, done.stderr
    assert_whole(f"{bucket}/outage", undisturbed)


def test_a_store_that_ignores_the_condition_is_refused_before_any_work(
    bucket: str, s3_server: RgwServer, s3_faults: Callable[..., S3Faults], own_signals: None
) -> None:
    s3_faults(lambda _: "pass", unconditional=s3_server.owner)
    done = call_job(detect.main, *arguments(bucket, "unconditional"))
    assert done.returncode == 2, done.stderr
    assert "It ignores If-None-Match" in done.stderr
    assert list(storage.list_files(f"{bucket}/unconditional")) == []
