"""A Ray that we start is for this process alone: loopback, and a token. Its workers stay."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

SESSION = """
import json, os, sys
from pathlib import Path
import ray
from fcos_ray.session import ray_session
from tests.processes import descendants, listening

with ray_session() as cluster:
    address = ray.get_runtime_context().gcs_address
    sockets = sorted({host for pid in [os.getpid(), *descendants(os.getpid())] for host, _ in listening(pid)})
    print(json.dumps({"address": address, "hosts": sockets, "cpus": cluster.num_cpus}), flush=True)
    sys.stdin.readline()
"""

IDLE = """
import os, sys, time
import ray
from fcos_ray.session import ray_session

@ray.remote(num_cpus=0)
def process(seconds):
    time.sleep(seconds)
    return os.getpid()

with ray_session() as cluster:
    pids = set(ray.get([process.remote(1.0) for _ in range(int(cluster.num_cpus) + 3)]))
    time.sleep(6)
    print(cluster.num_cpus, len(pids), sum(os.path.exists(f"/proc/{pid}") for pid in pids))
"""

STRANGER = """
import sys
from ray._raylet import GcsClient
from ray.exceptions import RaySystemError, RpcError, AuthenticationError
try:
    GcsClient(address=sys.argv[1]).internal_kv_keys(b"", namespace=None, timeout=5)
except Exception as error:
    print(type(error).__name__, error)
    sys.exit(3)
"""


def test_a_local_ray_listens_on_loopback_only_and_wants_its_token(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    ours |= {"HOME": str(tmp_path), "PYTHONPATH": str(root)}
    with subprocess.Popen(
        [sys.executable, "-c", SESSION], env=ours, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as session:
        assert session.stdout is not None
        said = json.loads(session.stdout.readline())
        ask = [sys.executable, "-c", STRANGER, said["address"]]
        strangers = [
            subprocess.run(ask, env={**ours, **who}, capture_output=True, text=True, timeout=120)
            for who in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64})
        ]
        session.communicate("end\n", timeout=60)
    assert session.returncode == 0
    assert said["cpus"] >= 1
    assert said["hosts"], "no sockets were seen"
    assert set(said["hosts"]) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    for stranger in strangers:
        assert stranger.returncode == 3, stranger.stdout + stranger.stderr
        assert "Authentication" in stranger.stdout
    assert not list(tmp_path.rglob("auth_token")), "the token stays in this process's environment"


def test_a_local_ray_keeps_its_idle_workers() -> None:
    """By Ray's default those beyond the number of CPUs end after a second, and the next commit starts another."""
    done = subprocess.run([sys.executable, "-c", IDLE], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    cpus, started, alive = map(float, done.stdout.split())
    assert started > cpus
    assert alive == started
