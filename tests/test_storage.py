"""The door to files keeps one contract on a local disk and on a real S3 server."""

from __future__ import annotations

import asyncio
import errno
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from fcos_ray import storage
from fcos_ray.errors import OutputError, StorageError
from tests.conftest import s3_environment
from tests.rgw import RgwServer
from tests.s3_faults import KINDS, Trouble, spread

ODD_NAMES = [
    "a b.bin",
    "é ü 日本.bin",
    "100%.bin",
    "a%20b.bin",
    "a#b.bin",
    "why?.bin",
    "k=v.bin",
    "a+b&c.bin",
    "[1].bin",
]


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "out")
    return str(request.getfixturevalue("s3_bucket")) + "/out"


@pytest.fixture
def as_stranger(s3_server: RgwServer, monkeypatch: pytest.MonkeyPatch):
    for name, value in s3_environment(s3_server, s3_server.stranger).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


def test_the_first_writer_wins_and_equal_bytes_are_the_same_writer(folder: str) -> None:
    uri = storage.join(folder, "deep", "er", "x.bin")
    assert not storage.exists(uri)
    assert storage.create(uri, b"mine")
    assert storage.exists(uri)
    assert not storage.create(uri, b"theirs")
    assert not storage.create(uri, b"mine, but longer")
    assert storage.create(uri, b"mine"), "a lost answer: the file is ours"
    assert storage.read_bytes(uri) == b"mine"
    assert [f.num_bytes for f in storage.list_files(folder)] == [4]


def test_of_sixteen_racing_writers_exactly_one_wins(folder: str) -> None:
    for number in range(3):
        uri = storage.join(folder, f"{number}.bin")
        together = threading.Barrier(16)

        def race(i: int, uri: str = uri, together: threading.Barrier = together) -> bool:
            together.wait()
            return storage.create(uri, f"writer {i:02d}".encode())

        with ThreadPoolExecutor(16) as pool:
            won = list(pool.map(race, range(16)))
        assert sum(won) == 1
        assert storage.read_bytes(uri) == f"writer {won.index(True):02d}".encode()


def test_a_finished_file_is_published_whole_and_replaced_only_when_asked(folder: str, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.write_bytes(b"ours" * 3_000_000)
    theirs.write_bytes(b"theirs")
    uri = storage.join(folder, "deep", "m.bin")
    assert storage.publish(ours, uri)
    assert not storage.publish(theirs, uri)
    assert storage.read_bytes(uri) == ours.read_bytes()
    assert storage.publish(theirs, uri, overwrite=True)
    assert storage.read_bytes(uri) == b"theirs"
    assert [file.uri for file in storage.list_files(folder)] == [uri]


def test_a_published_file_whose_answer_was_lost_is_ours(s3_bucket: str, tmp_path: Path) -> None:
    (tmp_path / "ours").write_bytes(b"ours" * 2_000_000)
    (tmp_path / "longer").write_bytes(b"ours" * 2_000_001)
    assert storage.publish(tmp_path / "ours", f"{s3_bucket}/m.bin")
    assert storage.publish(tmp_path / "ours", f"{s3_bucket}/m.bin"), "equal bytes: nothing to replace"
    assert not storage.publish(tmp_path / "longer", f"{s3_bucket}/m.bin")


def test_scanning_finds_what_listing_finds_and_names_what_is_missing(folder: str, tmp_path: Path) -> None:
    for name in (*ODD_NAMES, *(f"x=1 %/{name}" for name in ODD_NAMES)):
        assert storage.create(f"{folder}/{name}", b"x")
    scanned = [file for files in storage.scan_files(folder) for file in files]
    assert sorted(scanned, key=lambda file: file.uri) == list(storage.list_files(folder))
    assert all(file.last_modified is not None and file.last_modified.tzinfo is not None for file in scanned)
    if not folder.startswith("s3://"):
        with pytest.raises(FileNotFoundError, match="none"):
            list(storage.scan_files(f"{folder}/none"))


def test_odd_names_are_created_listed_read_and_expanded_as_themselves(folder: str) -> None:
    for name in ODD_NAMES:
        assert storage.create(storage.join(folder, "x=1 %", name), name.encode())
    listed = list(storage.list_files(folder))
    assert [f.uri.rsplit("/", 1)[1] for f in listed] == sorted(ODD_NAMES)
    for file in listed:
        name = file.uri.rsplit("/", 1)[1]
        assert storage.read_bytes(file.uri) == name.encode()
        assert storage.expand(file.uri) == [file]
        with storage.open_for_reading(file.uri) as handle:
            assert handle.read() == name.encode()
    assert storage.list_folders(folder) == ["x=1 %"]
    storage.delete(listed[0].uri)
    storage.delete(listed[0].uri)
    assert len(list(storage.list_files(folder))) == len(ODD_NAMES) - 1


def test_patterns_name_files_at_one_level_or_any(folder: str) -> None:
    for name in ("a.csv", "b.csv", "b.txt", "in/c.csv", "in/deep/d.csv", "on/c.csv"):
        storage.create(storage.join(folder, name), b"x")

    def names(pattern: str) -> list[str]:
        return [f.uri.removeprefix(folder + "/") for f in storage.expand(storage.join(folder, pattern))]

    assert names("*.csv") == ["a.csv", "b.csv"]
    assert names("?n/*.csv") == ["in/c.csv", "on/c.csv"]
    assert names("[a-b].*") == ["a.csv", "b.csv", "b.txt"]
    assert names("**/*.csv") == ["a.csv", "b.csv", "in/c.csv", "in/deep/d.csv", "on/c.csv"]
    assert names("in/**") == ["in/c.csv", "in/deep/d.csv"]
    assert names("in") == names("nothing*") == names("no/such/x.csv") == []


def test_what_is_not_there_lists_as_nothing_and_reads_as_not_found(folder: str) -> None:
    assert list(storage.list_files(folder)) == storage.list_folders(folder) == []
    missing = storage.join(folder, "x.bin")
    for read in (storage.read_bytes, storage.open_for_reading):
        with pytest.raises(FileNotFoundError, match=r"x\.bin"):
            read(missing)


def test_listing_goes_over_many_pages(s3_bucket: str) -> None:
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: storage.create(f"{s3_bucket}/many/{i:05d}", b""), range(1100)))
    storage.s3().call_s3("put_object", Bucket=s3_bucket[5:], Key="many/folder/", Body=b"", timeout=30)
    assert [f.uri for f in storage.list_files(s3_bucket)] == [f"{s3_bucket}/many/{i:05d}" for i in range(1100)]


def test_parquet_is_read_through_the_door(folder: str) -> None:
    table = pa.table({"x": range(200_000)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=50_000)
    uri = storage.join(folder, "x.parquet")
    storage.create(uri, sink.getvalue().to_pybytes())
    with storage.open_for_reading(uri, block_bytes=4096) as file:
        parquet = pq.ParquetFile(file)
        assert parquet.read_row_group(2).equals(table.slice(100_000, 50_000))
        assert parquet.read().equals(table)


def test_a_missing_bucket_is_named(s3_server: RgwServer) -> None:
    uri = "s3://no-such-bucket/a/x.bin"
    assert not storage.exists(uri)
    for call in (
        lambda: storage.create(uri, b"x"),
        lambda: list(storage.list_files("s3://no-such-bucket/a")),
        lambda: storage.read_bytes(uri),
        lambda: storage.expand("s3://no-such-bucket/*"),
    ):
        with pytest.raises(FileNotFoundError, match="s3://no-such-bucket"):
            call()


def test_a_denied_store_is_named_and_not_taken_for_empty(s3_bucket_of_owner: str) -> None:
    uri = f"{s3_bucket_of_owner}/x.bin"
    for call in (
        lambda: storage.create(uri, b"x"),
        lambda: storage.exists(uri),
        lambda: storage.read_bytes(uri),
        lambda: list(storage.list_files(s3_bucket_of_owner)),
        lambda: storage.expand(f"{s3_bucket_of_owner}/*"),
    ):
        with pytest.raises(PermissionError, match=s3_bucket_of_owner):
            call()
    with pytest.raises(
        OutputError, match=rf"{s3_bucket_of_owner}.*these credentials lack the right: allow s3:ListBucket"
    ):
        storage.probe_create_if_absent(s3_bucket_of_owner)


@pytest.fixture
def s3_bucket_of_owner(s3_bucket: str, as_stranger: None) -> str:
    return s3_bucket


def test_the_probe_passes_and_leaves_nothing(folder: str) -> None:
    storage.probe_create_if_absent(f"{folder}/a/b")
    assert list(storage.list_files(folder)) == []
    assert storage.list_folders(folder) == []


def test_the_probe_finds_a_store_that_ignores_the_condition(s3_server: RgwServer, s3_bucket: str, s3_faults) -> None:
    s3_faults(lambda _: "pass", unconditional=s3_server.owner)
    with pytest.raises(OutputError, match="ignores If-None-Match"):
        storage.probe_create_if_absent(s3_bucket)


def test_the_probe_names_a_missing_bucket(s3_server: RgwServer) -> None:
    with pytest.raises(OutputError, match=r"no-such-bucket.*make that bucket or folder first"):
        storage.probe_create_if_absent("s3://no-such-bucket/out")


def test_a_lost_answer_is_ours_on_s3(s3_bucket: str, s3_faults) -> None:
    treatment = {"PUT": ["lost"], "HEAD": ["503", "reset"], "GET": ["500", "truncate"]}
    proxy = s3_faults(lambda request: treatment[request.verb].pop(0) if treatment[request.verb] else "pass")
    assert storage.create(f"{s3_bucket}/x", b"attempt 1")
    assert sum(proxy.injected.values()) == 5
    assert proxy.requests["PUT"] == 2, "trouble while looking whose file it is costs no attempt to create"


def test_everything_gets_through_a_store_that_fails_three_times_in_ten(
    s3_bucket: str, s3_faults, tmp_path: Path
) -> None:
    proxy = s3_faults(Trouble(spread(0.3, stalls=0), seed=1))
    names = [f"{s3_bucket}/deep/{number:02}" for number in range(24)]
    (tmp_path / "x").write_bytes(b"published")

    def work(uri: str) -> None:
        assert storage.create(uri, uri.encode())
        assert not storage.create(uri, b"another's")
        assert storage.read_bytes(uri) == uri.encode()
        with storage.open_for_reading(uri, block_bytes=8) as file:
            assert file.read() == uri.encode()
        assert storage.publish(tmp_path / "x", f"{uri}.x")
        storage.delete(f"{uri}.x")

    with ThreadPoolExecutor(24) as pool:
        list(pool.map(work, names))
    assert [file.uri for file in storage.list_files(s3_bucket)] == names
    assert [file.uri for file in storage.expand(f"{s3_bucket}/*/?0")] == [names[0], names[10], names[20]]
    storage.probe_create_if_absent(s3_bucket)
    kinds = {kind for verb in ("GET", "HEAD", "PUT") for kind in KINDS[verb] if kind != "stall"}
    for number in range(200):  # threads deal the throws out: a kind may not have had its turn
        if kinds <= {kind for _, kind in proxy.injected}:
            break
        work(f"{s3_bucket}/more/{number:03}")
    assert kinds <= {kind for _, kind in proxy.injected}, proxy.report()
    for verb in ("GET", "HEAD", "PUT"):
        injected = sum(count for (of, _), count in proxy.injected.items() if of == verb)
        # Threads decide which request gets which throw, and 503 comes in bursts: 20 to 50 % were seen for 30.
        assert injected > 0.1 * proxy.requests[verb], proxy.report()


def test_a_local_crash_before_the_link_leaves_only_a_temporary_file(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        os.link = lambda *_: os._exit(9)  # type: ignore[assignment]
        storage.create(str(tmp_path / "out" / "x.bin"), b"x" * 1000, temporary_folder=str(tmp_path / "tmp"))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert list((tmp_path / "out").iterdir()) == []
    assert [p.suffix for p in (tmp_path / "tmp").iterdir()] == [".tmp"]


def test_local_files_and_their_folders_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(str(Path(f"/proc/self/fd/{fd}").readlink())), real(fd)))
    storage.create(str(tmp_path / "new" / "x.bin"), b"x")
    assert str(tmp_path) in synced
    assert synced[-1] == str(tmp_path / "new")
    assert any(name.endswith(".tmp") for name in synced)


def test_an_error_in_the_middle_of_a_local_walk_is_no_short_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").touch()
    real = os.scandir

    def broken(path: str) -> object:
        if str(path).rstrip("/").endswith("/a"):
            raise PermissionError(13, "denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", broken)
    with pytest.raises(PermissionError, match=str(tmp_path)):
        list(storage.list_files(str(tmp_path)))


def test_links_to_files_are_listed_and_linked_folders_are_not_entered(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("x")
    (tmp_path / "broken").symlink_to("nothing")
    (tmp_path / "loop").symlink_to(".")
    assert [(Path(f.uri).name, f.num_bytes) for f in storage.list_files(str(tmp_path))] == [("link", 3), ("x", 3)]


def test_one_operation_is_bounded(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fs = storage.s3()

    async def hanging(*_: object, **__: object) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr(fs, "_call_s3", hanging)
    monkeypatch.setattr("fcos_ray.storage.files.OPERATION_SECONDS", 0.2)
    monkeypatch.setattr("fcos_ray.storage.retries.backoff_seconds", lambda _: 0.0)
    with pytest.raises(StorageError, match="failed 12 times"):
        storage.create(f"{s3_bucket}/x", b"x")


def test_the_client_has_the_timeouts_and_retries_asked_for(s3_server: RgwServer) -> None:
    fs = storage.s3()
    fs.connect()
    config = fs.s3.meta.config
    assert (config.connect_timeout, config.read_timeout, config.max_pool_connections) == (10, 30, 128)
    assert config.retries["total_max_attempts"] == 1
    assert (fs.retries, fs.s3.meta.endpoint_url) == (1, s3_server.endpoint)
    assert storage.s3() is fs


def test_permanent_errors_keep_their_type_and_bugs_propagate() -> None:
    def failing(error: Exception) -> object:
        raise error

    with pytest.raises(PermissionError, match=r"writing s3://b/k: .*denied"):
        storage.retrying("writing s3://b/k", lambda: failing(PermissionError("denied")))
    with pytest.raises(TypeError, match=r"^bug$"):
        storage.retrying("x", lambda: failing(TypeError("bug")))


def test_transient_errors_are_tried_again_a_bounded_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcos_ray.storage.retries.backoff_seconds", lambda _: 0.0)
    left = [TimeoutError("a"), ConnectionResetError("b"), aiohttp.ClientPayloadError("c")]
    calls: list[int] = []

    def call() -> str:
        calls.append(1)
        if left:
            raise left.pop()
        return "done"

    assert storage.retrying("x", call) == "done"
    assert len(calls) == 4
    with pytest.raises(StorageError, match="failed 3 times, last: TimeoutError"):
        storage.retrying("x", lambda: _raise(TimeoutError()), max_attempts=3)


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    "uri",
    [
        "", "a\nb", "s3://", "s3:///key", "s3://user:hunter2@bucket/key", "simplecache::file:///etc/hostname",
        "s3://bucket/a::file:///x", "file://host/x", "file:///a%0Ab", "https://user:hunter2@host/x", "s3://B!/x",
        "s3://bucket/key?versionId=hunter2",
    ],
)  # fmt: skip
def test_malformed_uris_are_refused_without_repeating_them(uri: str) -> None:
    with pytest.raises(storage.InvalidUri) as caught:
        storage.filesystem(uri)
    assert "hunter2" not in str(caught.value)


def test_messages_hold_no_credentials() -> None:
    error = OSError("https://me:hunter2@host/x?X-Amz-Signature=hunter2&X-Amz-Credential=hunter2 failed")
    assert "hunter2" not in storage.describe(error)
    assert storage.without_userinfo("s3://me:hunter2@b/k") == "s3://b/k"


def test_locations_have_one_spelling() -> None:
    assert storage.parse_uri("file:///a/../b%20c").uri == "/b c"
    assert storage.parse_uri("S3A://bucket/a b?").uri == "s3://bucket/a b?"
    assert storage.parent("s3://bucket/a/b") == "s3://bucket/a"
    assert pickle.loads(pickle.dumps(storage.parse_uri("/x"))) == storage.Location("file", "/x")


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "no"), ConnectionResetError(errno.ECONNRESET, "gone")])
def test_an_operation_that_fails_is_named_without_the_secrets_of_its_uri(error: OSError) -> None:
    def fail() -> None:
        raise error

    with pytest.raises((PermissionError, StorageError)) as failed:
        storage.retrying("reading https://host/a.json?token=hunter2", fail, max_attempts=1)
    assert "reading https://host/a.json?…: " in str(failed.value)
    assert "hunter2" not in str(failed.value)


def test_only_what_may_be_secret_is_cut_out_of_a_text() -> None:
    said = "S3 said no to s3://bucket/a?b and HTTPS://h:80/x?sig=hunter2, http://u:hunter2@h/y#hunter2 of [a@b.c]"
    assert storage.cut_secrets(said) == "S3 said no to s3://bucket/a?b and HTTPS://h:80/x?… http://…@h/y#… of [a@b.c]"
