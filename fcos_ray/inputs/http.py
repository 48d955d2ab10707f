"""Http: one http(s) uri -> bytes, once. Knows answers and redirects; attempts and deadlines are fetch.py's.

No proxy, no cookie, no credential goes along, and a connection goes to the very address that was checked.
"""

from __future__ import annotations

import asyncio
import atexit
import socket
import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from http import HTTPStatus
from typing import Final
from urllib.parse import urljoin

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

import fcos_ray
from fcos_ray import storage
from fcos_ray.errors import FetchError
from fcos_ray.inputs.hosts import WebAddress, refused_ip, refused_literal, web_address

CONNECTIONS_PER_HOST: Final = 8  # of one process: a job over one site must not look like an attack
_MAX_REDIRECTS: Final = 5
_CHUNK_BYTES: Final = 2**16
_CLOSE_SECONDS: Final = 2.0
_NO_SUCH_HOST: Final = {socket.EAI_NONAME, socket.EAI_NODATA, getattr(socket, "EAI_ADDRFAMILY", socket.EAI_NODATA)}
_FORBIDDEN: Final = {401, 403, 451}
_TRY_AGAIN: Final = {408, 425, 429}
_CUT_OFF: Final = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)


class TryLater(ConnectionError):
    """The host answers that it cannot now. `retry_after_seconds`: when to come back, where it says so."""

    def __init__(self, message: str, retry_after_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


@dataclass(frozen=True, slots=True)
class Answer:
    """What came, and what its headers say of it."""

    data: bytes
    etag: str | None
    last_modified: datetime | None


async def read_http(
    location: storage.Location, *, max_bytes: int, head_bytes: int | None, allow_private: bool
) -> Answer:
    """One GET, redirects followed; only the first `head_bytes` when that is given.

    Raises FetchError for what no retry mends, TryLater and other STORE_ERRORS for the rest. No message holds a uri.
    """
    session = _session(allow_private=allow_private)
    address = web_address(location)
    with _named_errors():
        for _ in range(_MAX_REDIRECTS + 1):
            refused = refused_literal(address, allow_private=allow_private)
            if refused is not None:
                raise FetchError("uri_refused", refused)
            async with session.get(
                _url(address),
                headers={"Range": f"bytes=0-{head_bytes - 1}"} if head_bytes else None,
                allow_redirects=False,
            ) as response:
                if response.status not in (301, 302, 303, 307, 308):
                    return await _read(response, max_bytes=max_bytes, head_bytes=head_bytes)
                address = _redirected(address, response.headers.get("Location"))
    raise FetchError("fetch_refused", f"more than {_MAX_REDIRECTS} redirects")


def _url(address: WebAddress) -> URL:
    path, _, query = address.target.partition("?")
    return URL.build(scheme=address.scheme, authority=address.authority, path=path, query_string=query, encoded=True)


def _redirected(origin: WebAddress, target: str | None) -> WebAddress:
    if not target:
        raise FetchError("fetch_refused", "a redirect to nowhere")
    base = f"{origin.scheme}://{origin.authority}{origin.target}"
    try:
        # urljoin drops tabs and line ends, and reads backslashes its own way: the raw text is looked at first.
        if any(ord(character) <= 32 or character == "\\" for character in target):
            raise storage.InvalidUri("holds white space, a control character or a backslash")
        address = web_address(storage.parse_uri(urljoin(base, target)))
    except ValueError as error:  # InvalidUri, and urljoin's own
        what = error if isinstance(error, storage.InvalidUri) else "malformed"
        raise FetchError("uri_refused", f"redirected to a uri that may not be read: {what}") from None
    if (origin.scheme, address.scheme) == ("https", "http"):
        raise FetchError("uri_refused", "redirected from https to http")
    return address


async def _read(response: aiohttp.ClientResponse, *, max_bytes: int, head_bytes: int | None) -> Answer:
    _check_status(response, ranged=head_bytes is not None)
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise FetchError("fetch_refused", "the answer is encoded, though identity was asked for")
    if head_bytes is None and response.content_length is not None and response.content_length > max_bytes:
        raise FetchError("too_large", f"{response.content_length} bytes, more than {max_bytes}")
    chunks, num_bytes = [], 0
    async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
        chunks.append(chunk)
        num_bytes += len(chunk)
        if head_bytes is not None and num_bytes >= head_bytes:
            break  # a server that knows no Range sends it all; the connection is dropped
        if head_bytes is None and num_bytes > max_bytes:
            raise FetchError("too_large", f"at least {num_bytes} bytes, more than {max_bytes}")
    headers = response.headers
    return Answer(b"".join(chunks)[:head_bytes], _etag(headers.get("ETag")), _date(headers.get("Last-Modified")))


def _check_status(response: aiohttp.ClientResponse, *, ranged: bool) -> None:
    status = response.status
    if status in (200, 203):
        return
    if status == 206 and ranged and response.headers.get("Content-Range", "").startswith("bytes 0-"):
        return
    said = f"{status} {HTTPStatus(status).phrase}" if status in HTTPStatus._value2member_map_ else str(status)
    if status in _TRY_AGAIN or 500 <= status <= 599:
        raise TryLater(said, _retry_after(response.headers.get("Retry-After")))
    code = "not_found" if status in (404, 410) else "forbidden" if status in _FORBIDDEN else "fetch_refused"
    raise FetchError(code, said)


def _retry_after(text: str | None) -> float:
    """Seconds, from seconds or a date; 0 when it says nothing that can be read."""
    if text is None:
        return 0.0
    if text.isascii() and text.isdigit() and len(text) < 10:
        return float(text)
    date = _date(text)
    return max((date - datetime.now(UTC)).total_seconds(), 0.0) if date else 0.0


def _date(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        date = parsedate_to_datetime(text)
        return date.replace(tzinfo=UTC) if date.tzinfo is None else date.astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _etag(text: str | None) -> str | None:
    """Without quotes, as S3's; a weak one keeps its mark. A stranger's bytes must not break the column of strings."""
    if text is None or not (text.isascii() and text.isprintable()):
        return None
    return text if text.startswith("W/") else text.strip('"') or None


@contextmanager
def _named_errors() -> Iterator[None]:
    """aiohttp's errors that no retry mends, and those that repeat the uri, which may be signed."""
    try:
        yield
    except aiohttp.ClientConnectorCertificateError as error:
        why = getattr(error.certificate_error, "verify_message", "") or "not valid for this host"
        raise FetchError("fetch_refused", f"the host's certificate: {why}") from None
    except aiohttp.ClientSSLError as error:
        if isinstance(error.os_error, _CUT_OFF):
            raise TryLater("cut off in the TLS handshake") from None
        raise FetchError("fetch_refused", f"no TLS with this host: {getattr(error.os_error, 'reason', '')}") from None
    except aiohttp.ClientConnectorDNSError as error:
        if error.os_error.errno in _NO_SUCH_HOST:
            raise FetchError("not_found", "no such host") from None
        raise TryLater(f"the host's name is not resolved now: {error.os_error.strerror}") from None
    except (
        aiohttp.ServerDisconnectedError
    ):  # its text repeats the headers that came, a redirect's signed target among them
        raise TryLater("the host hung up") from None
    except aiohttp.ClientPayloadError:
        raise TryLater("the answer broke off") from None
    except aiohttp.ClientResponseError:
        raise FetchError("fetch_refused", "the answer is not proper HTTP") from None
    except aiohttp.InvalidURL:
        raise FetchError("uri_refused", "malformed: not a uri that aiohttp sends") from None


class _Resolver(AbstractResolver):
    """Names -> the addresses that may be used, as numbers: nothing is looked up again between check and connection."""

    def __init__(self, *, allow_private: bool) -> None:
        self._allow_private = allow_private
        # Its own: asyncio's has num_cpus + 4 threads, where local files are read, and dead names hold one for seconds.
        self._threads = ThreadPoolExecutor(32, thread_name_prefix="resolve")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Raises FetchError when every address is refused, OSError when there is none."""
        look_up = partial(socket.getaddrinfo, host, port, family, socket.SOCK_STREAM, 0, socket.AI_ADDRCONFIG)
        found = await asyncio.get_running_loop().run_in_executor(self._threads, look_up)
        allowed: list[ResolveResult] = []
        reasons: list[str] = []
        for its_family, _, protocol, _, (address, *_) in found:
            reason = refused_ip(str(address), allow_private=self._allow_private)
            if reason is not None:
                reasons.append(reason)
                continue
            allowed.append(
                {
                    "hostname": host, "host": str(address), "port": port, "family": its_family, "proto": protocol,
                    "flags": socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
                }
            )  # fmt: skip
        if reasons and not allowed:
            raise FetchError("uri_refused", f"the host's name leads there: {reasons[0]}")
        return allowed

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


_sessions: Final[dict[tuple[asyncio.AbstractEventLoop, bool], aiohttp.ClientSession]] = {}


def _session(*, allow_private: bool) -> aiohttp.ClientSession:
    """One per loop, and none shared between what may reach private hosts and what may not. Called on the loop."""
    key = (asyncio.get_running_loop(), allow_private)
    if key not in _sessions:
        if not _sessions:
            atexit.register(_close_sessions)
        _sessions[key] = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                resolver=_Resolver(allow_private=allow_private),
                use_dns_cache=False,  # each connection is to an address that was looked up and checked for it
                limit=0,  # fetch.py's concurrency bounds the whole
                limit_per_host=CONNECTIONS_PER_HOST,
                keepalive_timeout=2,  # a corpus has thousands of hosts, a process 1,024 files
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": f"fcos_ray/{fcos_ray.__version__}", "Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),  # fetch.py's clocks are the only ones
            auto_decompress=False,
            trust_env=False,
        )
    return _sessions[key]


def _close_sessions() -> None:
    for (loop, _), session in _sessions.items():
        if loop.is_running():
            with suppress(TimeoutError):
                asyncio.run_coroutine_threadsafe(session.close(), loop).result(_CLOSE_SECONDS)
