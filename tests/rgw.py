"""A real S3 server for tests: Ceph RGW from Debian, one monitor, one in-memory OSD, on loopback. Knows no project code.

`with RgwServer() as server:` starts it in a temporary folder on free ports and leaves nothing behind.
The daemons run in the foreground as children of this process: no pid files to trust, no zombies, and where util-linux's
setpriv is installed they end with us even when we are killed.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "monmaptool")
START_SECONDS = 120.0  # 6–13 s on an idle box; other suites share the cores

CONF = """\
[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{mon_port}/0
ms bind msgr2 = false
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
run dir = {home}
log file = {home}/$name.log
admin socket = {home}/$name.asok
keyring = {home}/keyring
[mon.a]
mon data = {home}/mon
[osd]
osd data = {home}/osd
osd objectstore = memstore
osd class update on start = false
osd crush update on start = false
memstore device bytes = 4294967296
[client.rgw.test]
rgw frontends = beast endpoint=127.0.0.1:{http_port}
rgw data = {home}/rgw
"""


class ServerNotStarted(RuntimeError):
    """Ceph did not come up; the message ends with the tail of its logs."""


@dataclass(frozen=True, slots=True)
class Credentials:
    access_key: str
    secret_key: str


def missing_programs() -> list[str]:
    """The programs of Debian's ceph-mon, ceph-osd, radosgw that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


class RgwServer:
    """`endpoint`; `owner`, who may do all with its own buckets; `stranger`, who may do nothing with the owner's."""

    def __init__(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="rgw-", dir="/tmp"))  # short: admin sockets allow 107 characters
        self.owner = Credentials("owner", "owner-secret-key")
        self.stranger = Credentials("stranger", "stranger-secret-key")
        self._conf = self.home / "ceph.conf"
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._deadline = 0.0

    def __enter__(self) -> RgwServer:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self._deadline = time.monotonic() + START_SECONDS
        mon_port, http_port = _free_ports(2)
        self.endpoint = f"http://127.0.0.1:{http_port}"
        fsid, osd_id = str(uuid.uuid4()), str(uuid.uuid4())
        for folder in ("mon", "osd", "rgw"):
            (self.home / folder).mkdir()
        self._conf.write_text(CONF.format(fsid=fsid, mon_port=mon_port, http_port=http_port, home=self.home))

        monmap = str(self.home / "monmap")
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v1:127.0.0.1:{mon_port}]", monmap)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap)
        self._spawn("ceph-mon", "-i", "a")
        self._wait("the monitor", lambda: self._succeeds("ceph", "mon", "stat"))
        # A monitor that answers may still not know its own cluster's id, and then refuses (once in a few dozen starts).
        crush = ("ceph", "osd", "crush", "add", "osd.0", "1.0", "host=localhost", "root=default")
        self._wait("the place of the disk", lambda: self._succeeds("ceph", "osd", "new", osd_id, "0"))
        self._wait("the weight of the disk", lambda: self._succeeds(*crush))
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_id)
        self._spawn("ceph-osd", "-i", "0")
        self._spawn("radosgw", "--id", "rgw.test")
        self._wait("the gateway", self._answers)
        for user in (self.owner, self.stranger):
            self._run(
                "radosgw-admin", "user", "create", "--uid", user.access_key, "--display-name", user.access_key,
                "--access-key", user.access_key, "--secret-key", user.secret_key,
            )  # fmt: skip

    def stop(self) -> None:
        """End the daemons, gateway first, and remove the folder."""
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()
        shutil.rmtree(self.home, ignore_errors=True)

    def _spawn(self, *command: str) -> None:
        tether = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        with (self.home / f"{command[0]}.out.log").open("wb") as out:
            daemon = subprocess.Popen(
                [*tether, *command, "-f", "-c", str(self._conf)],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=self.home, start_new_session=True,
            )  # fmt: skip
        self._daemons.append(daemon)

    def _run(self, *command: str) -> None:
        try:
            done = self._call(command)
        except subprocess.TimeoutExpired:
            raise ServerNotStarted(f"{' '.join(command)}: no end\n{self._logs()}") from None
        if done.returncode != 0:
            raise ServerNotStarted(
                f"{' '.join(command)}: exit {done.returncode}\n{done.stderr[-2000:]}\n{self._logs()}"
            )

    def _succeeds(self, *command: str) -> bool:
        try:
            return self._call(command, seconds=10).returncode == 0
        except subprocess.TimeoutExpired:
            return False

    def _call(self, command: tuple[str, ...], seconds: float | None = None) -> subprocess.CompletedProcess[str]:
        program = shutil.which(command[0])
        assert program is not None
        # /usr/bin/ceph is a Python script of the system's python3; a venv's python3 lacks its modules.
        head = ["/usr/bin/python3", program] if command[0] == "ceph" else [program]
        conf = [] if command[0] == "monmaptool" else ["-c", str(self._conf)]
        left = max(1.0, self._deadline - time.monotonic())
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "CEPH_ARGS")}
        # Files, not pipes: a daemon that keeps a pipe's end open would keep subprocess.run waiting.
        with (self.home / "stdout").open("w+") as out, (self.home / "stderr").open("w+") as err:
            code = subprocess.run(
                [*head, *command[1:], *conf], stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                timeout=seconds or left, env=environment, cwd=self.home, check=False, start_new_session=True,
            ).returncode  # fmt: skip
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(command, code, out.read(), err.read())

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.endpoint, timeout=5):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False

    def _wait(self, what: str, ready: Callable[[], bool]) -> None:
        while not ready():
            for daemon in self._daemons:
                if daemon.poll() is not None:
                    raise ServerNotStarted(f"{daemon.args} ended with {daemon.returncode}\n{self._logs()}")
            if time.monotonic() > self._deadline:
                raise ServerNotStarted(f"{what} is not up after {START_SECONDS:.0f} s\n{self._logs()}")
            time.sleep(0.1)

    def _logs(self) -> str:
        tails = [f"--- {p.name}\n{p.read_text(errors='replace')[-1500:]}" for p in sorted(self.home.glob("*.log"))]
        return "\n".join(tails) or "(no logs)"


def _free_ports(count: int) -> list[int]:
    with_sockets = [socket.socket() for _ in range(count)]  # held together, so that they differ
    try:
        for s in with_sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in with_sockets]
    finally:
        for s in with_sockets:
            s.close()
