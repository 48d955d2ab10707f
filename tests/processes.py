"""Processes as /proc shows them: what a driver started, and which of it is a load worker or a detector."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

JOBS = Path(__file__).parents[1] / "jobs"


def start_job(name: str, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """`python jobs/<name>.py …` as a user starts it."""
    return subprocess.Popen(
        [sys.executable, str(JOBS / f"{name}.py"), *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def run_job(
    name: str, *arguments: str, environment: dict[str, str] | None = None, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """The same, to its end."""
    with start_job(name, *arguments, environment=environment) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            kill_tree(process.pid)
            out, err = process.communicate()
            raise AssertionError(f"{name} {arguments} did not end within {timeout} s:\n{err[-4000:]}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def call_job(main: Callable[[list[str]], int], *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script's own main in this process: its exit code and what it says, without the second or two of a process's imports.

    For each script another test sees a process end with such a code.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([*arguments])
        except SystemExit as end:  # argparse's way
            code = int(end.code or 0)
    return subprocess.CompletedProcess([main.__module__, *arguments], code, out.getvalue(), err.getvalue())


def descendants(pid: int) -> list[int]:
    """Every living process below this one."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z":
                    parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found, waiting = [], [pid]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found += children
        waiting += children
    return found


def titled(pid: int, words: str) -> list[int]:
    """Descendants whose command line holds these words: Ray writes there what a worker is doing."""
    found = []
    for child in descendants(pid):
        with contextlib.suppress(OSError):
            if words in Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                found.append(child)
    return found


def cpu_seconds(pid: int) -> float:
    """What a process has computed so far; 0 when it is gone."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def is_running(pid: int) -> bool:
    """Whether a thread of a process computes at this moment: not all wait."""
    with contextlib.suppress(OSError):
        threads = Path(f"/proc/{pid}/task").glob("*/stat")
        return any(thread.read_text().rpartition(")")[2].split()[0] == "R" for thread in threads)
    return False


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def kill_tree(pid: int) -> None:
    for child in [*descendants(pid), pid]:
        kill(child)


def wait_until(condition: Callable[[], bool], what: str, *, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout} s for {what}"
        time.sleep(0.05)


def flags(**settings: object) -> Sequence[str]:
    """shard_rows=4 -> --shard-rows 4"""
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def listening(pid: int) -> list[tuple[str, int]]:
    """(address, port) of every TCP socket on which a process listens."""
    inodes = set()
    with contextlib.suppress(OSError):
        for handle in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                target = str(handle.readlink())
                if target.startswith("socket:["):
                    inodes.add(target.removeprefix("socket:[").removesuffix("]"))
    found = []
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, port = fields[1].split(":")
                words = b"".join(bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8))
                found.append((socket.inet_ntop(family, words), int(port, 16)))
    return found
