"""A Ray cluster of several nodes in a process of its own, told what to do over pipes; drivers connect by RAY_ADDRESS."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import TracebackType
from typing import Any


class RayCluster:
    """Nodes are dictionaries of `ray.cluster_utils.Cluster.add_node` arguments; the first is the head."""

    def __init__(self, *nodes: dict[str, Any]) -> None:
        self._nodes = nodes

    def __enter__(self) -> RayCluster:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for node in self._nodes:
            self.add(**node)
        self.address = self._ask({"address": True})
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    @property
    def pid(self) -> int:
        """Whose descendants all nodes and workers are."""
        return self._process.pid

    @property
    def environment(self) -> dict[str, str]:
        """For drivers."""
        return {**os.environ, "RAY_ADDRESS": self.address}

    def add(self, **node: Any) -> int:
        """Start a node; gives its number."""
        return int(self._ask({"add": node}))

    def kill(self, number: int) -> None:
        """A node gone without a word."""
        self._ask({"kill": number})

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("answer: "):
                return json.loads(line.removeprefix("answer: "))
        raise AssertionError(f"the cluster's process ended with {self._process.wait()}")


def _serve() -> None:
    from ray.cluster_utils import Cluster

    # A killed node is noticed after 3 s; Ray's own default is half a minute.
    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}
    cluster = Cluster()
    nodes = []
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any = None
        if "add" in request:
            first = {} if nodes else {"_system_config": quick, "include_dashboard": False}
            nodes.append(cluster.add_node(**first, **request["add"]))
            answer = len(nodes) - 1
        elif "kill" in request:
            cluster.remove_node(nodes[request["kill"]], allow_graceful=False)
        else:
            answer = cluster.address
        print("answer: " + json.dumps(answer), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    _serve()
