"""Every uri comes back once, as its bytes or as one typed error, from a real S3 server, a bad network and a local disk."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import pickle
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import s3fs
from fsspec.asyn import get_loop

from fcos_ray import storage
from fcos_ray.errors import FetchError
from fcos_ray.inputs import fetch, outages
from fcos_ray.inputs.fetch import FetchPolicy, fetch_many, reason_to_refuse
from fcos_ray.types import Content
from tests.conftest import s3_environment
from tests.rgw import RgwServer
from tests.s3_faults import Request


def one(uri: str, **policy: object) -> Content | FetchError:
    [(index, result)] = fetch_many([uri], FetchPolicy(**policy))  # type: ignore[arg-type]
    assert index == 0
    return result


def code(result: Content | FetchError) -> str:
    assert isinstance(result, FetchError), "bytes came"
    pickle.loads(pickle.dumps(result))
    assert "\n" not in result.message
    return result.code


def test_hundreds_of_objects_come_back_once_each(s3_bucket: str) -> None:
    bodies = {f"{s3_bucket}/a b/é%{i}?#.jpg": b"%d" % i * (i * 50) for i in range(300)}
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda item: storage.create(*item), bodies.items()))
    uris = [*bodies, f"{s3_bucket}/missing"]
    results = dict(fetch_many(uris, FetchPolicy()))
    assert sorted(results) == list(range(301))
    assert code(results.pop(300)) == "not_found"
    for index, content in results.items():
        assert isinstance(content, Content)
        assert content.data == bodies[uris[index]]
        assert content.etag == hashlib.md5(content.data).hexdigest()
        assert content.sha256 == hashlib.sha256(content.data).hexdigest()
        assert content.attempts == 1
    modified = results[0].last_modified
    assert modified.tzinfo is UTC
    assert abs(datetime.now(UTC) - modified) < timedelta(minutes=5)


def test_what_the_store_denies_or_lacks_is_told_apart(
    s3_server: RgwServer,
    s3_bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    fresh_client: None,
) -> None:
    storage.create(f"{s3_bucket}/x", b"x" * 100)
    assert code(one("s3://no-such-bucket/x")) == "not_found"
    large = one(f"{s3_bucket}/x", max_bytes=99)
    assert code(large) == "too_large"
    assert large.message == "100 bytes, more than 99", "refused by what was announced, before reading"
    assert one(f"{s3_bucket}/x", max_bytes=100).data == b"x" * 100
    for name, value in s3_environment(s3_server, s3_server.stranger).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    denied = one(f"{s3_bucket}/x")
    assert code(denied) == "forbidden"
    assert "AccessDenied" in denied.message
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    s3fs.S3FileSystem.clear_instance_cache()
    wrong = one(f"{s3_bucket}/x")
    assert code(wrong) == "fetch_failed", "the job's credentials are wrong, not the object"
    assert wrong.transient
    assert "wrong-secret" not in wrong.message
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    s3fs.S3FileSystem.clear_instance_cache()
    assert code(one(f"{s3_bucket}/x")) == "fetch_failed"


@pytest.mark.parametrize("trouble", ["503", "truncate", "reset"])
def test_trouble_is_tried_again_and_counted(s3_bucket: str, s3_faults, trouble: str) -> None:
    storage.create(f"{s3_bucket}/x", b"x" * 1000)
    proxy = s3_faults(lambda request: trouble if request.number < 2 else "pass")
    content = one(f"{s3_bucket}/x")
    assert isinstance(content, Content), content
    assert (content.data, proxy.num_requests) == (b"x" * 1000, 3)
    # aiohttp 3.14 itself asks once more when a connection closes without a word.
    assert content.attempts == (2 if trouble == "reset" else 3)


def test_the_byte_cap_holds_when_the_store_announces_no_length(s3_bucket: str, s3_faults) -> None:
    storage.create(f"{s3_bucket}/x", b"x" * 1000)
    s3_faults(lambda _: "no length")
    assert code(one(f"{s3_bucket}/x", max_bytes=999)) == "too_large"
    assert one(f"{s3_bucket}/x", max_bytes=1000).data == b"x" * 1000


def test_an_object_that_fails_while_its_store_answers_is_a_transient_error(s3_bucket: str, s3_faults) -> None:
    proxy = s3_faults(lambda request: "503" if request.verb == "GET" else "pass")
    failed = one(f"{s3_bucket}/x", max_attempts=3)
    assert code(failed) == "fetch_failed"
    assert failed.transient
    assert proxy.requests == {"GET": 3 + 3, "HEAD": 1}, "three more once the store has answered"
    assert "failed 6 times, last: " in failed.message
    assert "slow down" in failed.message


def test_an_object_that_stalls_is_left_within_two_deadlines(s3_bucket: str, s3_faults) -> None:
    proxy = s3_faults(lambda request: "stall" if request.verb == "GET" else "pass")
    storage.s3().connect()  # making the first client takes a second on a busy box
    start = time.monotonic()
    failed = one(f"{s3_bucket}/x", timeout_seconds=0.3, deadline_seconds=1)
    assert time.monotonic() - start < 2 + 3
    assert code(failed) == "fetch_timeout"
    assert proxy.requests["GET"] >= 3


@pytest.mark.parametrize("trouble", ["503", "reset", "stall"])
def test_a_store_that_answers_nothing_is_told_from_a_failing_object(s3_bucket: str, s3_faults, trouble: str) -> None:
    proxy = s3_faults(lambda _: trouble)
    storage.s3().connect()
    start = time.monotonic()
    failed = one(f"{s3_bucket}/x", timeout_seconds=0.3, deadline_seconds=2, max_attempts=2)
    assert time.monotonic() - start < 2 + 5
    assert code(failed) == "store_unavailable"
    assert failed.transient
    assert proxy.requests["HEAD"] >= 3, "one question may be lost to the ordinary trouble of a busy store"


def test_an_outage_that_ends_in_time_is_not_blamed_on_the_object(s3_bucket: str, s3_faults) -> None:
    storage.create(f"{s3_bucket}/x", b"x")
    s3_faults(lambda request: "503" if request.number < 4 else "pass")  # two GETs, two questions
    content = one(f"{s3_bucket}/x", max_attempts=2)
    assert isinstance(content, Content), content
    assert content.attempts == 3


def test_attempts_are_counted_as_made_when_the_deadline_cuts_them_off(s3_bucket: str, s3_faults) -> None:
    storage.create(f"{s3_bucket}/x", b"x")
    gets: list[Request] = []

    def treat(request: Request) -> str:
        gets.extend([request] * (request.verb == "GET"))
        return "stall" if request.verb == "GET" and len(gets) == 1 else "pass"

    s3_faults(treat)
    storage.s3().connect()
    content = one(f"{s3_bucket}/x", timeout_seconds=5, deadline_seconds=1)
    assert isinstance(content, Content), content
    assert content.attempts == 2


def test_a_store_that_denies_the_question_answers(s3_server: RgwServer, s3_bucket: str, s3_faults, monkeypatch) -> None:
    for name, value in s3_environment(s3_server, s3_server.stranger).items():
        monkeypatch.setenv(name, value)
    s3_faults(lambda request: "500" if request.verb == "GET" else "pass")
    assert code(one(f"{s3_bucket}/x", max_attempts=1)) == "fetch_failed"


def test_a_folder_that_is_away_is_told_from_a_failing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(*_: object) -> None:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(fetch, "_read_local", stale)
    policy = {"allow_roots": (str(tmp_path),), "max_attempts": 1}
    assert code(one(str(tmp_path / "x"), **policy)) == "fetch_failed"
    monkeypatch.setattr(outages, "os", SimpleNamespace(stat=stale))
    assert code(one(str(tmp_path / "x"), **policy)) == "store_unavailable"


def test_at_most_concurrency_are_in_flight_or_waiting(s3_bucket: str, s3_faults) -> None:
    storage.create(f"{s3_bucket}/x", b"x")
    proxy = s3_faults(lambda _: "pass")
    results = fetch_many([f"{s3_bucket}/x"] * 20, FetchPolicy(concurrency=3))
    next(results)
    time.sleep(0.5)
    assert proxy.num_requests == 3
    assert len(list(results)) == 19
    assert proxy.num_requests == 20


@pytest.mark.parametrize(("size", "window"), [(1000, 32), (1_000_000, 4)])
def test_a_link_with_latency_is_filled_and_large_images_do_not_pile_up(
    s3_bucket: str, s3_faults, size: int, window: int
) -> None:
    """50 ms before each answer: what bounds a load task then is how many requests are under way."""
    storage.create(f"{s3_bucket}/x", b"x" * size)
    proxy = s3_faults(lambda _: "late", stall_seconds=0.05)
    results = fetch_many([f"{s3_bucket}/x"] * 100, FetchPolicy(held_bytes=4_000_000))
    next(results)
    time.sleep(0.5)
    assert proxy.num_requests == 8, "nothing was known of their sizes"
    for _ in range(50):
        assert isinstance(next(results)[1], Content)
    time.sleep(0.5)
    assert proxy.num_requests == 50 + window  # the last one taken counts until the next is asked for
    assert len(list(results)) == 49


def tasks_on_the_loop() -> int:
    async def count() -> int:
        return len([t for t in asyncio.all_tasks() if "_tracked" in repr(t)])

    return asyncio.run_coroutine_threadsafe(count(), get_loop()).result(5)


def test_closing_early_leaves_nothing_behind(s3_bucket: str, s3_faults, caplog: pytest.LogCaptureFixture) -> None:
    storage.create(f"{s3_bucket}/x", b"x")
    s3_faults(lambda request: "pass" if request.number == 0 else "stall")
    results = fetch_many([f"{s3_bucket}/x"] * 50, FetchPolicy(concurrency=8))
    assert isinstance(next(results)[1], Content)
    assert tasks_on_the_loop() == 7
    start = time.monotonic()
    results.close()
    assert time.monotonic() - start < 2
    assert tasks_on_the_loop() == 0
    gc.collect()
    assert not caplog.records


def test_a_bug_propagates_and_ends_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_read_local", lambda *_: 1 + "1")  # type: ignore[operator]
    with pytest.raises(TypeError):
        list(fetch_many([str(tmp_path / "x")] * 10, FetchPolicy(allow_roots=(str(tmp_path),))))
    assert tasks_on_the_loop() == 0


def test_local_files_below_a_root_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a b%20.jpg"
    file.write_bytes(b"abc")
    os.utime(file, ns=(0, 1_700_000_000_123_456_789))
    content = one(str(file), allow_roots=(str(tmp_path),))
    assert content == Content(
        b"abc", None, datetime(2023, 11, 14, 22, 13, 20, 123456, UTC), hashlib.sha256(b"abc").hexdigest(), 1
    )
    assert one(f"file://{tmp_path}/a%20b%2520.jpg", allow_roots=(str(tmp_path),)) == content
    assert code(one(str(file))) == "uri_refused"
    assert code(one(str(file), allow_roots=(str(tmp_path),), max_bytes=2)) == "too_large"
    assert one(str(file), allow_roots=(str(tmp_path),), max_bytes=3) == content


def test_links_may_not_lead_out_of_the_roots(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "in-secret"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "x").write_bytes(b"x")
    (inside / "link").symlink_to(outside / "x")
    (inside / "folder").symlink_to(outside)
    (inside / "fine").symlink_to("x")
    (tmp_path / "root").symlink_to(inside)
    roots = (str(inside),)
    for uri in ("in/link", "in/folder/x", "in/../in-secret/x", "in-secret/x"):
        assert code(one(str(tmp_path / uri), allow_roots=roots)) == "uri_refused", uri
    assert one(str(inside / "fine"), allow_roots=roots).data == b"x"
    assert one(str(tmp_path / "root" / "x"), allow_roots=(str(tmp_path / "root"),)).data == b"x"


def test_only_regular_files_are_read_and_a_pipe_blocks_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    listener.close()
    (tmp_path / "loop").symlink_to("loop")
    start = time.monotonic()
    expected = {
        "pipe": "not_a_file", "folder": "not_a_file", "socket": "not_a_file",
        "missing": "not_found", "file/x": "not_found", "loop": "fetch_refused", "n" * 300: "fetch_refused",
    }  # fmt: skip
    for name, wanted in expected.items():
        assert code(one(str(tmp_path / name), allow_roots=(str(tmp_path),))) == wanted, name
    assert code(one("/dev/zero", allow_roots=("/dev",))) == "not_a_file"
    assert time.monotonic() - start < 5


def test_an_unreadable_file_is_forbidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(b"x")
    (tmp_path / "x").chmod(0)
    if os.geteuid() == 0:  # root reads everything: say it as the kernel would

        def denied(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("builtins.open", denied)
    assert code(one(str(tmp_path / "x"), allow_roots=(str(tmp_path),))) == "forbidden"


def test_a_stale_handle_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(b"x")
    left = [OSError(116, "Stale file handle"), OSError(5, "Input/output error")]
    real = fetch._read_local

    def flaky(*arguments: object) -> object:
        if left:
            raise left.pop()
        return real(*arguments)

    monkeypatch.setattr(fetch, "_read_local", flaky)
    assert one(str(tmp_path / "x"), allow_roots=(str(tmp_path),)).attempts == 3


@pytest.mark.parametrize(("comes_after", "wanted"), [(1.5, Content), (20, FetchError)])
def test_a_slow_local_file_is_read_once_and_keeps_none_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes_after: float, wanted: type
) -> None:
    for k in range(30):
        (tmp_path / f"{k}").write_bytes(b"%d" % k)
    real, times_read, ended = fetch._read_local, Counter[str](), threading.Event()

    def slow(path: str, *rest: Any) -> object:
        times_read[path] += 1
        if path.endswith("/7"):
            ended.wait(comes_after)
        return real(path, *rest)

    monkeypatch.setattr(fetch, "_read_local", slow)
    uris = [str(tmp_path / f"{k}") for k in range(30)]
    policy = FetchPolicy(allow_roots=(str(tmp_path),), timeout_seconds=2.5, deadline_seconds=3, max_attempts=1)
    try:
        results = list(fetch_many(uris, policy))
    finally:
        ended.set()
    assert [index for index, _ in results][-1] == 7
    assert sorted(index for index, _ in results) == list(range(30))
    assert {index: getattr(content, "data", None) for index, content in results[:-1]} == {
        k: b"%d" % k for k in range(30) if k != 7
    }
    assert isinstance(results[-1][1], wanted)
    assert times_read.pop(uris[7]) == 1 or wanted is FetchError, "its store answers: then it is tried again"
    assert set(times_read.values()) == {1}


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("s3://bucket/key", None),
        ("/data/x.jpg", None),
        ("file:///data/x.jpg", None),
        ("/data/../etc/passwd", "outside the allowed roots"),
        ("file:///data/%2e%2e/etc/passwd", "outside the allowed roots"),
        ("/database/x.jpg", "outside the allowed roots"),
        ("http://host/x", "scheme http is not allowed: --allow-http"),
        ("ftp://host/x", "scheme ftp is not allowed"),
        ("s3://bucket", "malformed: a bucket without a key"),
        ("x.jpg", "malformed: neither an absolute path nor a uri with a scheme"),
        ("simplecache::file:///etc/hostname", "malformed: neither an absolute path nor a uri with a scheme"),
        ("s3://user:hunter2@bucket/key", "malformed: holds user information or a chained uri"),
        ("", "malformed: neither an absolute path nor a uri with a scheme"),
    ],
)
def test_refusals_have_short_reasons_without_the_uri(uri: str, reason: str | None) -> None:
    policy = FetchPolicy(allow_roots=("/data",))
    got = reason_to_refuse(uri, policy)
    if uri.startswith("simplecache"):
        assert got is not None
        assert got.startswith("malformed")
    else:
        assert got == reason
    if got is not None:
        assert code(one(uri, allow_roots=("/data",))) == "uri_refused"


def test_a_policy_is_plain_and_checked() -> None:
    policy = FetchPolicy(allow_roots=("/data",))
    assert pickle.loads(pickle.dumps(policy)) == policy
    with pytest.raises(ValueError, match="allow_schemes may hold s3, file, http, https, got ftp"):
        FetchPolicy(allow_schemes=("s3", "ftp"))
    with pytest.raises(ValueError, match="at least 1"):
        FetchPolicy(concurrency=0)
    assert list(fetch_many([], policy)) == []


def test_a_head_is_read_of_an_image_however_large(tmp_path: Path, s3_bucket: str) -> None:
    (tmp_path / "x").write_bytes(b"0123456789")
    storage.create(f"{s3_bucket}/x", b"0123456789")
    for uri in (str(tmp_path / "x"), f"{s3_bucket}/x"):
        for head_bytes, wanted in [(4, b"0123"), (10, b"0123456789"), (99, b"0123456789")]:
            found = one(uri, allow_roots=(str(tmp_path),), head_bytes=head_bytes, max_bytes=5 if head_bytes < 5 else 10)
            assert isinstance(found, Content)
            assert found.data == wanted
