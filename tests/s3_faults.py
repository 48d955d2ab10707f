"""A bad object store for tests: a proxy before the real one, failing as stores and networks do. Knows no project code.

`with S3Faults(endpoint, treat) as proxy:` asks `treat` about each request what becomes of it; `Trouble` is a `treat` that
throws dice. One request per connection. The Host header passes unchanged, so what clients sign for the proxy holds behind it.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qs, urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials as Keys

from tests.rgw import Credentials

VERBS: Final = ("GET", "LIST", "HEAD", "PUT", "DELETE")
# What may become of a request of each verb, besides "pass" and, where a test asks for it, "no length".
_ANY: Final = ("503", "500", "reset", "cut", "stall")
KINDS: Final = {
    "GET": (*_ANY, "truncate"), "LIST": (*_ANY, "truncate"), "HEAD": _ANY, "PUT": (*_ANY, "409", "lost"), "DELETE": _ANY,
}  # fmt: skip
_REFUSALS: Final = {
    "503": (503, "SlowDown", "slow down"),
    "500": (500, "InternalError", "we encountered an internal error"),
    "409": (409, "ConditionalRequestConflict", "another request is under way"),
}
_BURST: Final = (1, 2, 3, 4, 5)  # lengths of bursts of 503, each as likely
_LINGER: Final = struct.pack("ii", 1, 0)  # closing sends RST


@dataclass(frozen=True, slots=True)
class Request:
    """A request as the proxy sees it."""

    number: int  # counted over all, from 0
    verb: str  # as in VERBS; POST stays POST
    target: str  # path and query, as sent
    head: bytes
    body: bytes


Treat = Callable[[Request], str]


class Trouble:
    """Throws seeded dice for every request: `rates[verb][kind]` is the share of the verb's requests that a kind strikes.

    503 comes in bursts of 1 to 5 requests of its verb.
    """

    def __init__(self, rates: Mapping[str, Mapping[str, float]], *, seed: int) -> None:
        assert all(set(kinds) <= set(KINDS[verb]) and sum(kinds.values()) <= 1 for verb, kinds in rates.items())
        self._chances = {verb: _chances(kinds) for verb, kinds in rates.items()}
        self._dice = random.Random(seed)
        self._slow: Counter[str] = Counter()  # requests left of each verb's burst

    def __call__(self, request: Request) -> str:
        verb, chances = request.verb, self._chances.get(request.verb, {})
        if self._slow[verb]:
            self._slow[verb] -= 1
            return "503"
        [kind] = self._dice.choices([*chances, "pass"], [*chances.values(), 1 - sum(chances.values())])
        if kind == "503":
            self._slow[verb] = self._dice.choice(_BURST) - 1
        return kind


def _chances(rates: Mapping[str, float]) -> dict[str, float]:
    """Shares of all requests -> chances of one throw, which decides about a whole burst when it is 503."""
    mean, slow = sum(_BURST) / len(_BURST), rates.get("503", 0.0)
    burst = slow / (mean - (mean - 1) * slow)
    requests_per_throw = mean * burst + (1 - burst)
    return {kind: burst if kind == "503" else rate * requests_per_throw for kind, rate in rates.items()}


def spread(rate: float, *, stalls: float) -> dict[str, dict[str, float]]:
    """`rate` of every verb's requests fail, each kind as often; but only `stalls` of them stall, for that costs time."""
    rates = {}
    for verb, kinds in KINDS.items():
        others = [kind for kind in kinds if kind != "stall"]
        rates[verb] = {kind: (rate - stalls) / len(others) for kind in others} | {"stall": stalls}
    return rates


class S3Faults:
    """The proxy. `url` is where it listens; `injected` and `requests` count; `down` resets everything while it is true."""

    def __init__(
        self, endpoint: str, treat: Treat, *, stall_seconds: float = 35.0, unconditional: Credentials | None = None
    ) -> None:
        """`unconditional`: ignore If-None-Match, as some stores do; the user whose signature is made anew for that."""
        self._upstream = urlsplit(endpoint)
        self._treat, self._stall_seconds, self._user = treat, stall_seconds, unconditional
        self.down = False
        self.requests: Counter[str] = Counter()  # verb -> number
        self.injected: Counter[tuple[str, str]] = Counter()  # (verb, kind) -> number; kind "down" in an outage
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="s3-faults", daemon=True)

    def __enter__(self) -> S3Faults:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    @property
    def num_requests(self) -> int:
        return self.requests.total()

    def report(self) -> str:
        """Injected and all requests, per verb and kind, in one line each."""
        lines = []
        for verb, total in sorted(self.requests.items()):
            kinds = {kind: count for (of, kind), count in sorted(self.injected.items()) if of == verb}
            named = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
            lines.append(f"{verb:6} {sum(kinds.values()):6,} of {total:7,} requests: {named}")
        return "\n".join(lines)

    async def _start(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, sock=self._listener)

    async def _stop(self) -> None:
        self._server.close()
        serving = asyncio.all_tasks() - {asyncio.current_task()}
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = await self._read(reader, writer)
            if request is not None:
                await self._answer(request, writer)
        except (OSError, asyncio.IncompleteReadError):  # the client, or the server behind, went away
            pass
        except asyncio.CancelledError:  # the end of this proxy
            pass
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request | None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return None
        fields = _fields(head)
        assert "transfer-encoding" not in fields, "a body without length is not proxied"
        if fields.get("expect") == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(int(fields.get("content-length", 0)))
        method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
        verb = "LIST" if method == "GET" and "list-type" in parse_qs(urlsplit(target).query) else method
        request = Request(self.num_requests, verb, target, head, body)
        self.requests[verb] += 1
        return request

    async def _answer(self, request: Request, writer: asyncio.StreamWriter) -> None:
        kind = "down" if self.down else self._treat(request)
        if kind != "pass":
            self.injected[request.verb, kind] += 1
        if kind in ("down", "reset"):
            _reset(writer)
        elif kind in _REFUSALS:
            writer.write(_refusal(request.verb, *_REFUSALS[kind]))
        elif kind == "stall":
            await asyncio.sleep(self._stall_seconds)
        else:
            if kind == "late":
                await asyncio.sleep(self._stall_seconds)
            answer = await self._forward(request)
            head, _, body = answer.partition(b"\r\n\r\n")
            if kind == "truncate":  # all but the end, and a proper goodbye
                answer = answer[: -min(10, len(body))] if body else head
            elif kind == "no length":
                answer = answer.replace(b"Content-Length:", b"X-Length:")
            elif kind in ("cut", "lost"):
                writer.write(b"" if kind == "lost" else answer[: len(answer) // 2])
                with suppress(OSError):
                    await writer.drain()
                _reset(writer)
                return
            writer.write(answer)
        with suppress(OSError):
            await writer.drain()

    async def _forward(self, request: Request) -> bytes:
        """The store's whole answer."""
        head = self._without_condition(request) if self._user else request.head
        head = b"\r\n".join(
            line for line in head.split(b"\r\n") if not line.lower().startswith((b"expect:", b"connection:"))
        )
        reader, writer = await asyncio.open_connection(self._upstream.hostname, self._upstream.port, limit=2**20)
        try:
            writer.write(head.removesuffix(b"\r\n") + b"Connection: close\r\n\r\n" + request.body)
            await writer.drain()
            return await reader.read()
        finally:
            writer.close()

    def _without_condition(self, request: Request) -> bytes:
        """The request's head with no If-None-Match, signed again: the signature covered it."""
        fields = _fields(request.head)
        if fields.pop("if-none-match", None) is None:
            return request.head
        kept = {name: value for name, value in fields.items() if name not in ("authorization", "x-amz-date", "expect")}
        again = AWSRequest("PUT", f"http://{fields['host']}{request.target}", data=request.body, headers=kept)
        S3SigV4Auth(Keys(self._user.access_key, self._user.secret_key), "s3", "us-east-1").add_auth(again)
        lines = [f"PUT {request.target} HTTP/1.1", *(f"{name}: {value}" for name, value in again.headers.items())]
        return "\r\n".join([*lines, "", ""]).encode()


def _fields(head: bytes) -> dict[str, str]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}


def _refusal(verb: str, status: int, code: str, message: str) -> bytes:
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode() if verb != "HEAD" else b""
    return b"HTTP/1.1 %d X\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


def _reset(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)
    writer.transport.abort()
