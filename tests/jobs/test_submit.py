"""`ray job submit` end to end: a head with token authentication; manifest, images and output on the S3 server."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fcos_ray import storage
from fcos_ray.sample import write_sample
from tests.corpus import SMALL_MODEL, files_of, manifest_ids, rows_of
from tests.processes import descendants, flags, kill_tree, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
REPOSITORY = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Head:
    """A Ray head node with the job server, on loopback, for those who know the token."""

    def __init__(self, folder: Path) -> None:
        # The agent's port is fixed by default: where another Ray has it, no job is ever taken.
        names = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port")
        ports = {name: free_port() for name in names}
        self.address = f"http://127.0.0.1:{ports['dashboard-port']}"
        programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = {
            **os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "PATH": programs,
        }  # fmt: skip
        command = [
            "ray", "start", "--head", "--block", "--num-cpus=4", "--node-ip-address=127.0.0.1",
            "--dashboard-host=127.0.0.1", f"--temp-dir={folder}", "--disable-usage-stats",
            *(f"--{name}={port}" for name, port in ports.items()),
        ]  # fmt: skip
        self._log = (folder / "head.log").open("w")
        self.process = subprocess.Popen(command, env=self.environment, stdout=self._log, stderr=self._log)

    def ask(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`ray job <words>`."""
        command = ["ray", "job", *words, f"--address={self.address}"]
        if "--" in words:  # options before the entrypoint
            at = words.index("--")
            command = ["ray", "job", *words[:at], f"--address={self.address}", *words[at:]]
        return subprocess.run(
            command, env=self.environment, cwd=REPOSITORY, capture_output=True, text=True, check=check, timeout=300
        )

    def info(self, job_id: str) -> dict[str, Any]:
        """What the job server knows of a job, its driver's real exit code among it."""
        script = (
            "import json, sys; from ray.job_submission import JobSubmissionClient as C; "
            "i = C(sys.argv[1]).get_job_info(sys.argv[2]); "
            "print(json.dumps({'status': str(i.status.value), 'exit_code': i.driver_exit_code}))"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, self.address, job_id],
            env=self.environment, capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        return dict(json.loads(done.stdout.splitlines()[-1]))

    def close(self) -> None:
        kill_tree(self.process.pid)
        self.process.wait(30)
        self._log.close()


@pytest.fixture(scope="module")
def head(s3_server: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = Path("/tmp") / f"fr{secrets.token_hex(3)}"  # Ray's socket paths must stay below 107 characters
    folder.mkdir()
    node = Head(folder)
    try:
        wait_until(lambda: node.ask("list", check=False).returncode == 0, "the job server", timeout=90)
        yield node
    finally:
        node.close()


@pytest.fixture
def corpus(s3_bucket: str, tmp_path: Path) -> str:
    write_sample(tmp_path, num_images=24, seed=9, num_broken=2)
    for path in [tmp_path / "manifest.parquet", *(tmp_path / "images").iterdir()]:
        if path.stat().st_size:
            storage.create(f"{s3_bucket}/corpus/{path.relative_to(tmp_path)}", path.read_bytes())
    return f"{s3_bucket}/corpus/manifest.parquet"


def submit(head: Head, job_id: str, *words: str, wait: bool = True) -> subprocess.CompletedProcess[str]:
    waiting = [] if wait else ["--no-wait"]
    options = ["--submission-id", job_id, "--working-dir", ".", *waiting]
    return head.ask("submit", *options, "--", "python", "jobs/detect.py", *words, check=False)


def test_a_bad_manifest_ends_the_job_with_2(head: Head, s3_bucket: str) -> None:
    submit(head, "bad", *flags(manifest=f"{s3_bucket}/none.parquet", output=f"{s3_bucket}/out", weights="sample"))
    assert head.info("bad") == {"status": "FAILED", "exit_code": 2}
    assert "none.parquet: no such file" in head.ask("logs", "bad").stdout


def test_an_interrupted_job_ends_with_130_and_the_next_submission_labels_the_rest_of_the_bucket(
    head: Head, corpus: str, s3_bucket: str, tmp_path: Path
) -> None:
    out = f"{s3_bucket}/out"
    job = flags(manifest=corpus, output=out, shard_rows=2, **SMALL_MODEL)
    submit(head, "interrupted", *job, wait=False)
    wait_until(lambda: len(files_of(out)) >= 2, "two commits", timeout=200)
    driver = next(
        pid for pid in descendants(head.process.pid)
        if (words := Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"))[1:2] == [b"jobs/detect.py"] and words
    )  # fmt: skip
    os.kill(driver, signal.SIGTERM)
    wait_until(lambda: head.info("interrupted")["status"] in ("FAILED", "STOPPED"), "the end of the job")
    assert head.info("interrupted")["exit_code"] == 130
    kept = files_of(out)
    assert len(kept) < 12
    done = submit(head, "goes-on", *job)
    assert done.returncode == 0, done.stdout + done.stderr
    assert head.info("goes-on") == {"status": "SUCCEEDED", "exit_code": 0}
    [summary] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"state"')]
    assert (summary["state"], summary["rows"]) == ("complete", 24)
    assert kept.items() <= files_of(out).items()
    assert sorted(rows_of(out)) == sorted(manifest_ids(tmp_path / "manifest.parquet"))
