"""Session: a connection to Ray. Knows how Ray is found, started and ended, not what runs on it."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import ray
from ray._private import ray_constants

from fcos_ray.layout import Cluster

# Ray ends processes that were idle for a second where there are more than CPUs, and starts others for the next commit or load
# task, at 2 s of CPU each: 107 -> 90 s of CPU in a job of 500 shards on 2 cores without a model (Ray 2.60).
_KEEP_IDLE: Final = {"idle_worker_killing_time_threshold_ms": 600_000}


@contextmanager
def ray_session() -> Iterator[Cluster]:
    """A connection to Ray: the running one, else the cluster of RAY_ADDRESS, else a local Ray, ended after."""
    ours = not ray.is_initialized()
    if ours:
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        if "RAY_ADDRESS" in os.environ:
            ray.init(log_to_driver=False, logging_level=logging.WARNING)
        else:
            start_local_ray()
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():  # ray.init replaces them
                signal.signal(number, handler)
    try:
        yield describe_cluster()
    finally:
        if ours:
            ray.shutdown()


def start_local_ray(**options: Any) -> None:
    """A Ray of this process alone: it listens on loopback, and only to those who know its token.

    With RAY_AUTH_MODE unset Ray 2.60 turns token authentication on for a Ray it starts; what the user set is kept.
    """
    token_file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    if "RAY_AUTH_TOKEN" not in os.environ and not token_file.is_file():
        # else Ray writes one into the home folder, where the umask decides who may read it
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # it would advise to turn token authentication off
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    # ray.init's _node_ip_address replaces 127.0.0.1 by the machine's address (Ray 2.60). This is what Ray itself uses to
    # stay on loopback where it knows no clusters (macOS); tests look at the sockets.
    several_nodes = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            _system_config=_KEEP_IDLE,
            **options,
        )
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = several_nodes


def describe_cluster() -> Cluster:
    """The CPUs and GPUs that Ray has now."""
    total = ray.cluster_resources()
    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    return Cluster(total.get("CPU", 0.0), total.get("GPU", 0.0), max(nodes, default=0.0), len(nodes))
