"""What comes over http(s), from real servers on loopback: its bytes, or the code that says what happened."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from fcos_ray import storage
from fcos_ray.errors import FetchError
from fcos_ray.inputs import http
from fcos_ray.inputs.fetch import FetchPolicy, fetch_many
from fcos_ray.types import Content
from tests.web import Site

IMAGE = b"0123456789" * 100
SECRET = "hunter2"
ROOT = Path(__file__).resolve().parents[2]


def policy(**settings: Any) -> FetchPolicy:
    return FetchPolicy(
        **{"allow_schemes": ("http", "https"), "allow_private_hosts": True, "max_attempts": 2} | settings
    )


def one(uri: str, **settings: Any) -> Content | FetchError:
    [(_, result)] = fetch_many([uri], policy(**settings))
    return result


def error(uri: str, **settings: Any) -> FetchError:
    result = one(uri, **settings)
    assert isinstance(result, FetchError), "bytes came"
    assert SECRET not in result.message
    assert "\n" not in result.message
    return result


@pytest.fixture
def site() -> Iterator[Callable[..., Site]]:
    made: list[Site] = []

    def make(tls: ssl.SSLContext | None = None, **pages: Any) -> Site:
        made.append(Site({f"/{name}": answer for name, answer in pages.items()}, tls))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Names and what they lead to: addresses, an EAI error, or one of these per look-up in a list of lists."""
    known: dict[str, Any] = {}
    real = socket.getaddrinfo

    def look_up(host: str, port: int, *rest: Any) -> Any:
        if host not in known:
            return real(host, port, *rest)
        answer = known[host]
        if isinstance(answer, list) and isinstance(answer[0], list):
            answer = answer.pop(0)
        if isinstance(answer, int):
            raise socket.gaierror(answer, "as the resolver says")
        families = {True: socket.AF_INET6, False: socket.AF_INET}
        return [(families[":" in ip], socket.SOCK_STREAM, 6, "", (ip, port)) for ip in answer]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return known


def says(status: int = 200, body: bytes = IMAGE, **headers: str) -> Callable[[web.Request], web.Response]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda _: web.Response(status=status, body=body, headers=named)


async def drip(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range(400):
        await response.write(b"x")
        await asyncio.sleep(0.05)
    return response


def in_turn(*answers: Callable[[web.Request], Any]) -> Callable[[web.Request], Any]:
    left = list(answers)
    return lambda request: (left.pop(0) if len(left) > 1 else left[0])(request)


async def truncated(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(IMAGE[:10])
    assert request.transport is not None
    request.transport.close()
    return response


async def of_unknown_length(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(IMAGE)
    return response


# ---- what comes


def test_bytes_come_with_what_the_headers_say(site: Callable[..., Site]) -> None:
    x = site(x=says(ETag='"v1"', Last_Modified="Tue, 14 Nov 2023 22:13:20 GMT"))
    digest = hashlib.sha256(IMAGE).hexdigest()
    content = one(f"{x.url}/x?sig={SECRET}#top")
    assert content == Content(IMAGE, "v1", datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC), digest, 1)
    assert x.asked[0].raw_path == f"/x?sig={SECRET}"


@pytest.mark.parametrize(
    ("header", "etag"),
    [('W/"a"', 'W/"a"'), ("bare", "bare"), ('""', None), ("\udce9", None), ("a\tb", None)],
)
def test_an_etag_is_kept_only_where_it_can_be_a_string(site: Callable[..., Site], header: str, etag: str) -> None:
    content = one(f"{site(x=says(ETag=header, Last_Modified='yesterday')).url}/x")
    assert isinstance(content, Content)
    assert (content.etag, content.last_modified) == (etag, None)


def test_a_request_carries_nothing_of_ours(
    site: Callable[..., Site], names: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names["host.test"] = ["127.0.0.1"]
    (tmp_path / "netrc").write_text(f"machine host.test login me password {SECRET}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    x = site(x=says(Set_Cookie="a=b; Path=/"))
    for _ in range(2):
        assert isinstance(one(f"http://host.test:{x.port}/x"), Content)
    headers = x.asked[1].headers
    assert headers["Accept-Encoding"] == "identity"
    assert headers["User-Agent"].startswith("fcos_ray/")
    assert set(headers) == {"Host", "User-Agent", "Accept", "Accept-Encoding"}


def test_a_redirect_is_followed_by_what_it_says(site: Callable[..., Site]) -> None:
    there = site(z=says())
    x = site(a=says(302, Location="d/../b?q=1"), **{"é": says(308, Location=f"{there.url}/z#fragment")})
    x.pages["/b"] = says(307, Location=f"//127.0.0.1:{x.port}/é")
    content = one(f"{x.url}/a")
    assert isinstance(content, Content), content
    assert content.data == IMAGE
    assert [request.raw_path for request in x.asked] == ["/a", "/b?q=1", "/%C3%A9"]


def test_five_redirects_are_followed_and_not_six(site: Callable[..., Site]) -> None:
    x = site(**{f"p{i}": says(302, Location=f"p{i + 1}") for i in range(6)}, p6=says(), loop=says(301, Location="loop"))
    assert isinstance(one(f"{x.url}/p1"), Content)
    assert error(f"{x.url}/p0").code == "fetch_refused"
    x.asked.clear()
    assert error(f"{x.url}/loop").message == "more than 5 redirects"
    assert len(x.asked) == 6


@pytest.mark.parametrize(
    "target",
    [
        "file:///etc/passwd", "/\\127.0.0.1/x", "s3://bucket/key", "ftp://127.0.0.1/x", "gopher://127.0.0.1/x",
        "data:image/png;base64,AA", f"http://me:{SECRET}@127.0.0.1/x", "http://169.254.169.254/latest/meta-data/",
        "http://2130706433/x", "http://[::ffff:a9fe:a9fe]/",
        "http://0.0.0.0/x", "http://bücher.example/x", "http://host/a b", "http://[::1", "http://a\tb/x",
        "simplecache::http://127.0.0.1/x",
    ],
)  # fmt: skip
def test_a_redirect_leads_nowhere_that_a_uri_may_not(site: Callable[..., Site], target: str) -> None:
    assert error(f"{site(x=says(302, Location=target)).url}/x?sig={SECRET}").code == "uri_refused"


def test_a_redirect_out_of_tls_or_to_nowhere_is_refused(site: Callable[..., Site]) -> None:
    secure = http.web_address(storage.parse_uri("https://host/x"))
    with pytest.raises(FetchError, match="uri_refused: redirected from https to http"):
        http._redirected(secure, "http://host/x")
    assert http._redirected(secure, "//other/y").scheme == "https"
    assert error(f"{site(x=says(302)).url}/x").message == "a redirect to nowhere"


# ---- what does not come


@pytest.mark.parametrize(
    ("status", "code"),
    [
        *[(status, "not_found") for status in (404, 410)],
        *[(status, "forbidden") for status in (401, 403, 451)],
        *[(status, "fetch_failed") for status in (408, 425, 429, 500, 502, 503, 504, 520, 599)],
        *[(status, "fetch_refused") for status in (202, 204, 206, 300, 304, 305, 400, 402, 405, 407, 409, 416, 418, 499, 999)],
    ],
)  # fmt: skip
def test_every_answer_has_its_code_and_only_trouble_is_tried_again(
    site: Callable[..., Site], status: int, code: str
) -> None:
    x = site(x=says(status, b""))
    refused = error(f"{x.url}/x?sig={SECRET}")
    assert refused.code == code
    assert str(status) in refused.message
    assert len(x.asked) == (2 if code == "fetch_failed" else 1)


def test_a_host_that_asks_to_wait_is_waited_for_within_the_deadline(site: Callable[..., Site]) -> None:
    x = site(x=in_turn(says(429, b"", Retry_After="1"), says()), far=says(503, b"", Retry_After="3600"))
    start = time.monotonic()
    content = one(f"{x.url}/x")
    assert isinstance(content, Content)
    assert content.attempts == 2
    assert 1 <= time.monotonic() - start < 3
    refused = error(f"{x.url}/far")
    assert refused.code == "fetch_failed"
    assert "asks to come back in 3600 s, after the deadline" in refused.message
    assert time.monotonic() - start < 5


def test_retry_after_is_seconds_or_a_date_or_nothing() -> None:
    assert http._retry_after("7") == 7
    assert http._retry_after("Tue, 14 Nov 2023 22:13:20 GMT") == 0
    assert http._retry_after("Fri, 31 Dec 9999 23:59:59 GMT") > 3e9
    for text in (None, "soon", "-1", "1.5", "²", "9" * 400):
        assert http._retry_after(text) == 0


def test_a_truncated_body_is_tried_again(site: Callable[..., Site]) -> None:
    x = site(x=in_turn(truncated, says()), always=truncated)
    content = one(f"{x.url}/x")
    assert isinstance(content, Content)
    assert (content.data, content.attempts) == (IMAGE, 2)
    assert error(f"{x.url}/always?sig={SECRET}").code == "fetch_failed"


def test_the_byte_cap_holds_whatever_the_server_announces(site: Callable[..., Site]) -> None:
    x = site(x=says(), unknown=of_unknown_length, endless=drip)
    announced = error(f"{x.url}/x", max_bytes=999)
    assert (announced.code, announced.message) == ("too_large", "1000 bytes, more than 999")
    assert error(f"{x.url}/unknown", max_bytes=999).message == "at least 1000 bytes, more than 999"
    assert error(f"{x.url}/endless", max_bytes=5).code == "too_large"
    for name in ("x", "unknown"):
        assert one(f"{x.url}/{name}", max_bytes=1000).data == IMAGE


def test_a_head_is_read_whether_or_not_the_server_knows_ranges(site: Callable[..., Site]) -> None:
    def ranged(request: web.Request) -> web.Response:
        part = request.http_range
        return web.Response(status=206, body=IMAGE[part], headers={"Content-Range": f"bytes 0-{part.stop - 1}/1000"})

    x = site(x=says(), ranged=ranged, middle=says(206, Content_Range="bytes 5-8/1000"), endless=drip)
    for name in ("x", "ranged"):
        assert one(f"{x.url}/{name}", head_bytes=7, max_bytes=10).data == IMAGE[:7]
    assert x.asked[0].headers["Range"] == "bytes=0-6"
    assert one(f"{x.url}/endless", head_bytes=3, timeout_seconds=5).data == b"xxx"
    assert error(f"{x.url}/middle", head_bytes=7).code == "fetch_refused"


def test_a_server_that_drips_ends_with_the_deadline(site: Callable[..., Site]) -> None:
    x = site(x=drip)
    start = time.monotonic()
    late = error(f"{x.url}/x?sig={SECRET}", timeout_seconds=0.5, deadline_seconds=1.2, max_attempts=10)
    assert late.code == "fetch_timeout"
    assert time.monotonic() - start < 3
    assert len(x.asked) >= 2


@pytest.mark.parametrize("encoding", ["gzip", "br", "x-none"])
def test_an_encoded_answer_is_refused_unread(site: Callable[..., Site], encoding: str) -> None:
    refused = error(f"{site(x=says(Content_Encoding=encoding)).url}/x")
    assert (refused.code, refused.message) == ("fetch_refused", "the answer is encoded, though identity was asked for")


def test_what_does_not_speak_http_is_refused_and_what_hangs_up_is_tried_again() -> None:
    for said, code in ((b"SSH-2.0-OpenSSH_9.6\r\n", "fetch_refused"), (b"", "fetch_failed")):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            threading.Thread(target=_say, args=(listener, said), daemon=True).start()
            assert error(f"http://127.0.0.1:{listener.getsockname()[1]}/x?sig={SECRET}").code == code


def _say(listener: socket.socket, said: bytes) -> None:
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        with client:
            client.recv(65536)
            client.sendall(said)


def test_a_closed_port_is_tried_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    closed = error(f"http://127.0.0.1:{port}/x?sig={SECRET}")
    assert (closed.code, closed.transient) == ("fetch_failed", True)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    """A certificate of our own making, for the right address."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2", "-nodes"]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "certificate.pem")]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", *names, *files]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    return context


def test_a_certificate_that_nobody_vouches_for_is_refused(
    site: Callable[..., Site], certificate: ssl.SSLContext
) -> None:
    x = site(certificate, x=says())
    refused = error(f"{x.url}/x?sig={SECRET}")
    assert (refused.code, refused.message) == ("fetch_refused", "the host's certificate: self-signed certificate")
    assert not x.asked
    plain = site(x=says())
    assert error(f"https://127.0.0.1:{plain.port}/x").code == "fetch_refused"


# ---- which hosts


def test_without_leave_a_private_host_never_hears_of_us(site: Callable[..., Site], names: dict[str, Any]) -> None:
    x = site(x=says())
    names["inside.test"] = ["127.0.0.1"]
    names["mapped.test"] = ["::ffff:127.0.0.1", "64:ff9b::7f00:1"]
    for host in ("127.0.0.1", "inside.test", "mapped.test", "localhost"):
        refused = error(f"http://{host}:{x.port}/x", allow_private_hosts=False)
        assert refused.code == "uri_refused", host
        assert "private address: --allow-private-hosts" in refused.message
    assert not x.asked
    for host in ("127.0.0.1", "inside.test", "localhost"):
        assert isinstance(one(f"http://{host}:{x.port}/x"), Content)
    names["metadata.test"] = ["169.254.169.254", "168.63.129.16"]
    assert "metadata service" in error(f"http://metadata.test:{x.port}/x").message


def test_of_a_hosts_addresses_only_the_allowed_are_used(names: dict[str, Any]) -> None:
    names["mixed.test"] = ["10.0.0.1", "8.8.8.8", "::1", "2606:4700::1111", "169.254.169.254"]

    async def resolve(*, allow_private: bool) -> list[str]:
        resolver = http._Resolver(allow_private=allow_private)
        found = await resolver.resolve("mixed.test", 80)
        await resolver.close()
        assert all(each["flags"] & socket.AI_NUMERICHOST for each in found)
        return [each["host"] for each in found]

    assert asyncio.run(resolve(allow_private=False)) == ["8.8.8.8", "2606:4700::1111"]
    assert asyncio.run(resolve(allow_private=True)) == ["10.0.0.1", "8.8.8.8", "::1", "2606:4700::1111"]


def test_a_name_that_changes_its_mind_changes_nothing_for_a_connection_already_checked(
    site: Callable[..., Site], names: dict[str, Any]
) -> None:
    x = site(x=says(Connection="close"))
    names["rebind.test"] = [["127.0.0.1"], ["169.254.169.254"]]
    assert isinstance(one(f"http://rebind.test:{x.port}/x"), Content)
    assert names["rebind.test"] == [["169.254.169.254"]], "one look-up for the check and the connection"
    names["rebind.test"].append(["127.0.0.1"])
    assert error(f"http://rebind.test:{x.port}/x").code == "uri_refused", "and each connection has its own check"
    assert len(x.asked) == 1


def test_a_redirect_to_a_name_is_checked_as_any_other(site: Callable[..., Site], names: dict[str, Any]) -> None:
    names["metadata.test"] = ["169.254.169.254"]
    names["gone.test"] = socket.EAI_NONAME
    x = site(a=says(302, Location="http://metadata.test/x"), b=says(302, Location="http://gone.test/x"))
    assert error(f"{x.url}/a").code == "uri_refused"
    assert error(f"{x.url}/b").code == "not_found"


@pytest.mark.parametrize(
    ("answer", "code", "message"),
    [
        (socket.EAI_NONAME, "not_found", "no such host"),
        (socket.EAI_NODATA, "not_found", "no such host"),
        (socket.EAI_AGAIN, "fetch_failed", "as the resolver says"),
        (socket.EAI_FAIL, "fetch_failed", "as the resolver says"),
    ],
)
def test_a_host_that_is_no_more_is_not_an_outage(names: dict[str, Any], answer: int, code: str, message: str) -> None:
    names["dead.test"] = answer
    refused = error(f"http://dead.test/x?sig={SECRET}")
    assert refused.code == code
    assert message in refused.message


def test_one_host_sees_few_connections_of_a_process(site: Callable[..., Site]) -> None:
    async def slow(_: web.Request) -> web.Response:
        await asyncio.sleep(0.1)
        return web.Response(body=IMAGE)

    x = site(x=slow)
    results = list(fetch_many([f"{x.url}/x"] * 40, policy(concurrency=32)))
    assert all(isinstance(result, Content) for _, result in results)
    assert x.most_at_once == http.CONNECTIONS_PER_HOST


def test_a_process_that_read_the_web_ends_without_a_word(site: Callable[..., Site]) -> None:
    x = site(x=says())
    code = f"""
from fcos_ray.inputs.fetch import FetchPolicy, fetch_many
policy = FetchPolicy(allow_schemes=("http",), allow_private_hosts=True)
print([len(content.data) for _, content in fetch_many(["{x.url}/x"] * 3, policy)])
"""
    command = [sys.executable, "-X", "dev", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[1000, 1000, 1000]"
    assert "nclosed" not in done.stderr, done.stderr
    assert "never" not in done.stderr, done.stderr


def test_what_a_host_sent_before_it_hung_up_is_not_repeated() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(4096)
                    connection.sendall(f"HTTP/1.1 302 x\r\nLocation: /x?sig={SECRET}\r\n".encode())

        thread = threading.Thread(target=hang_up)
        thread.start()
        try:
            failed = error(f"http://127.0.0.1:{server.getsockname()[1]}/")
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(10)
    assert (failed.code, "hung up" in failed.message) == ("fetch_failed", True)
