"""Places that cannot be read or written: said at the start, with the uri and what to do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import s3fs

import fcos_ray as fr
from fcos_ray import storage
from fcos_ray.errors import FcosRayError, OutputError, StorageError
from fcos_ray.sample import write_sample
from tests.conftest import s3_environment
from tests.corpus import config
from tests.disks import mounted
from tests.processes import flags, run_job
from tests.rgw import RgwServer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_sample(folder, num_images=12, seed=2, num_broken=0)
    return folder


def refusal(corpus: Path, output: Path | str) -> FcosRayError:
    """What a job on this output ends with. No Ray runs here: it must end before one is started."""
    with pytest.raises((OutputError, StorageError)) as caught:
        fr.run(config(corpus / "manifest.parquet", output, weights="sample"))
    print(f"{type(caught.value).__name__}: {caught.value}")
    return caught.value


# Local disks


def test_a_read_only_output_is_said(corpus: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "ro") as disk:
        error = refusal(corpus, disk / "labels")
    assert isinstance(error, OutputError)
    assert f"the output {disk}/labels must let this job create files: it is mounted read-only" in str(error)


def test_a_full_disk_is_said(corpus: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=64k") as disk:
        (disk / "ballast").write_bytes(bytes(64 * 1024))
        error = refusal(corpus, disk / "labels")
    assert f"the output {disk}/labels must let this job create files: the disk is full: free space there" in str(error)


def test_a_file_in_the_way_is_said(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert f"{tmp_path}/file" in (words := str(refusal(corpus, tmp_path / "file" / "labels")))
    assert "a part of the path is a file" in words


# Object stores


@pytest.fixture
def environment(s3_server: RgwServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets variables for the S3 clients that are made from now on."""

    def set_variables(**variables: str | None) -> None:
        for name, value in variables.items():
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()

    yield set_variables
    monkeypatch.undo()
    s3fs.S3FileSystem.clear_instance_cache()


SECRET = "canary-secret-key"
BAD_KEYS = [
    (
        {"AWS_ACCESS_KEY_ID": "nobody"},
        "the store does not know this access key: check AWS_ACCESS_KEY_ID or AWS_PROFILE",
    ),
    ({"AWS_SECRET_ACCESS_KEY": SECRET}, "the secret key does not fit the access key: check AWS_SECRET_ACCESS_KEY"),
    ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "there are no credentials: set AWS_ACCESS_KEY_ID"),
]


@pytest.mark.parametrize(("variables", "words"), BAD_KEYS, ids=["unknown key", "wrong secret", "no key"])
def test_wrong_keys_are_said(
    corpus: Path, s3_bucket: str, environment: Callable[..., None], variables: dict[str, str | None], words: str
) -> None:
    environment(**variables)
    error = refusal(corpus, f"{s3_bucket}/labels")
    assert isinstance(error, OutputError)
    assert words in str(error)
    assert f"{s3_bucket}/labels" in str(error)
    assert SECRET not in str(error)


def test_a_missing_bucket_is_said(corpus: Path, s3_server: RgwServer) -> None:
    error = refusal(corpus, "s3://no-such-bucket/labels")
    assert isinstance(error, OutputError)
    assert "s3://no-such-bucket/labels" in str(error)
    assert "there is no such bucket: check its name, or make it first" in str(error)


def test_a_bucket_that_may_only_be_read_is_said(
    corpus: Path, s3_bucket: str, s3_server: RgwServer, environment: Callable[..., None]
) -> None:
    storage.s3().call_s3("put_bucket_acl", Bucket=s3_bucket.removeprefix("s3://"), ACL="public-read", timeout=30)
    environment(**s3_environment(s3_server, s3_server.stranger))
    error = refusal(corpus, f"{s3_bucket}/labels")
    assert isinstance(error, OutputError)
    assert f"the output {s3_bucket}/labels must let this job create files: these credentials lack the right" in str(
        error
    )
    assert "s3:PutObject" in str(error)


EXPIRED = b"""<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message><RequestId>1</RequestId></Error>"""


@contextlib.contextmanager
def answering(status: str, body: bytes) -> Iterator[str]:
    """A server that has one answer to everything, as AWS words it (Ceph's tokens last a quarter of an hour at least)."""
    loop = asyncio.new_event_loop()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
            writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)
            await writer.drain()
        writer.close()

    server = loop.run_until_complete(asyncio.start_server(answer, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture(scope="module")
def given_up(corpus: Path, s3_server: RgwServer) -> dict[str, CompletedProcess[str]]:
    """Jobs that ask again for half a minute, as many times as a user's: both at once."""
    job = flags(manifest=corpus / "manifest.parquet", output="s3://labels/corpus", weights="sample")
    with answering("400 Bad Request", EXPIRED) as endpoint, ThreadPoolExecutor() as pool:
        variables = {
            "expired credentials": {"AWS_ENDPOINT_URL": endpoint, "AWS_SESSION_TOKEN": SECRET},
            "an endpoint where nobody is": {"AWS_ENDPOINT_URL": f"http://user:{SECRET}@127.0.0.1:1"},
        }
        running = {
            name: pool.submit(run_job, "detect", *job, environment=os.environ | changed)
            for name, changed in variables.items()
        }
        return {name: job.result() for name, job in running.items()}


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("expired credentials", "the credentials have expired: renew them"),
        ("an endpoint where nobody is", "check AWS_ENDPOINT_URL and the network"),
    ],
)
def test_what_may_pass_is_waited_for_and_said(
    given_up: dict[str, CompletedProcess[str]], case: str, words: str
) -> None:
    done = given_up[case]
    assert done.returncode == 4, "credentials may be renewed, a store may come back: the same command goes on"
    last = done.stderr.splitlines()[-1]
    assert last.startswith("stopped: ")
    assert f"failed {storage.MAX_ATTEMPTS} times" in last
    assert "s3://labels/corpus" in last
    assert words in last
    assert SECRET not in done.stdout + done.stderr


def test_nothing_is_left_of_a_start_that_failed(corpus: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "m.csv"
    manifest.write_text("image_id,uri\n1,a.jpg\n1,b.jpg\n")
    with pytest.raises(FcosRayError):
        fr.run(config(manifest, tmp_path / "labels", weights="sample"))
    assert list(tmp_path.iterdir()) == [manifest]
