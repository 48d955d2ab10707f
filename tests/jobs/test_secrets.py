"""Secrets of a job's environment and uris: neither what it says nor what it writes nor Ray's logs hold them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import s3fs
from aiohttp import web

from fcos_ray import storage
from fcos_ray.sample import write_sample
from jobs import audit, detect, evaluate, manifest, train
from tests.conftest import s3_environment
from tests.corpus import SMALL_MODEL, files_of, rows_of, write_manifest
from tests.processes import flags, run_job
from tests.rgw import RgwServer
from tests.web import Site

CANARY = "canary0Secret0Canary"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_sample(folder, num_images=6, seed=2, num_broken=0)
    return folder


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Where the job's Ray keeps its sockets, logs and session."""
    folder = Path("/tmp") / f"fs{secrets.token_hex(3)}"  # Ray's socket paths must stay below 107 characters
    folder.mkdir()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def texts_below(folder: Path) -> Iterator[tuple[Path, bytes]]:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with contextlib.suppress(OSError):
                yield path, path.read_bytes()


def decompressed(data: bytes) -> bytes:
    """Everything a Parquet file holds: its values, and what it says about itself."""
    table = pq.read_table(io.BytesIO(data))
    return json.dumps(table.to_pylist(), default=str).encode() + str(table.schema.metadata).encode()


@pytest.mark.ray
def test_a_job_that_labels_leaves_no_secret_in_its_words_its_output_and_rays_logs(
    corpus: Path, s3_server: RgwServer, s3_bucket: str, ray_folder: Path, tmp_path: Path
) -> None:
    image = next((corpus / "images").iterdir()).read_bytes()
    storage.create(f"{s3_bucket}/images/a.png", image)
    uris = [
        f"{s3_bucket}/images/a.png",
        f"{s3_bucket}/images/none.png",
        f"https://user:{CANARY}@host/x.jpg",
        f"s3://user:{CANARY}@bucket/x",
        f"s3://KEY:{CANARY}/with/slashes@bucket/y",
        f"simplecache::s3://user:{CANARY}@bucket/z",
        f"file://user:{CANARY}@host/x.jpg",
    ]
    storage.create(f"{s3_bucket}/m.parquet", write_manifest(tmp_path / "m.parquet", {"uri": uris}).read_bytes())
    output = f"{s3_bucket}/labels"
    job = flags(manifest=f"{s3_bucket}/m.parquet", output=output, refused_uris="error", **SMALL_MODEL)
    who = {**os.environ, **s3_environment(s3_server, s3_server.owner), "RAY_TMPDIR": str(ray_folder)}
    who["AWS_SESSION_TOKEN"] = CANARY  # Ceph does not ask whose it is
    done = run_job("detect", *job, environment=who)
    assert done.returncode == 0, done.stderr
    assert [row["error_code"] for row in rows_of(output).values()].count(None) == 1
    assert len(rows_of(output)) == 7

    spoken = {"stdout": done.stdout.encode(), "stderr": done.stderr.encode()}
    logs = {str(path): data for path, data in texts_below(ray_folder)}
    assert any("raylet" in name for name in logs), "Ray's logs were not found"
    written = {file.uri: storage.read_bytes(file.uri) for file in storage.list_files(output)}
    assert {uri.rsplit("/", 1)[1] for uri in written} >= {"run.json", "labelling.json", "_SUCCESS.json"}
    inside = {f"values of {uri}": decompressed(data) for uri, data in written.items() if uri.endswith(".parquet")}
    assert len(inside) >= 2, "the pinned manifest and a shard"
    for name, data in (spoken | logs | written | inside).items():
        for secret in (CANARY, s3_server.owner.secret_key):
            assert secret.encode() not in data, f"{secret} stands in {name}"


BAD_STARTS = {
    "a wrong secret key": ({"output": "{bucket}/out"}, {"AWS_SECRET_ACCESS_KEY": CANARY}),
    "no such bucket": ({"output": "s3://no-such-bucket/out"}, {}),
    "a damaged manifest": ({"manifest": "{bucket}/damaged.parquet"}, {}),
    "a manifest with a password": ({"manifest": f"s3://user:{CANARY}@bucket/m.parquet"}, {}),
    "a manifest with a key": ({"manifest": f"s3://KEY:sec/{CANARY}@bucket/m.parquet"}, {}),
    "a signed manifest": ({"manifest": f"https://host/m.parquet?X-Amz-Signature={CANARY}"}, {}),
    "an output with a password": ({"output": f"s3://user:{CANARY}@bucket/out"}, {}),
    "an output with a query": ({"output": f"https://host/out?token={CANARY}"}, {}),
    "weights with a password": ({"weights": f"https://user:{CANARY}@host/w.pth"}, {}),
    "signed weights": ({"weights": f"https://host/w.pth?X-Amz-Signature={CANARY}&name=w.pth"}, {}),
    "uris with passwords": ({"manifest": "{uris}"}, {}),
}


@pytest.mark.parametrize("case", BAD_STARTS)
def test_a_start_that_fails_says_no_secret(
    corpus: Path,
    s3_server: RgwServer,
    s3_bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    fresh_client: None,
    own_signals: None,
    case: str,
) -> None:
    settings, variables = BAD_STARTS[case]
    storage.create(f"{s3_bucket}/damaged.parquet", b"PAR1" + bytes(64) + b"PAR1")
    uris = write_manifest(
        tmp_path / "uris.parquet", {"uri": [f"s3://user:{CANARY}@b/x", f"https://K:s/{CANARY}@h/x.jpg"]}
    )
    job = {"manifest": corpus / "manifest.parquet", "output": tmp_path / "out", "weights": "sample"} | {
        name: value.format(bucket=s3_bucket, uris=uris) for name, value in settings.items()
    }
    with monkeypatch.context() as environment:
        for name, value in ({"AWS_SESSION_TOKEN": CANARY} | variables).items():
            environment.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        code = detect.main([*flags(**job)])
    s3fs.S3FileSystem.clear_instance_cache()
    out, err = capfd.readouterr()
    assert code == 2, err
    said = out + err
    assert len(err.splitlines()[-1]) > 20, "it must say something"
    assert "Traceback" not in said
    assert CANARY not in said
    assert s3_server.owner.secret_key not in said
    assert files_of(s3_bucket) == {}
    assert not (tmp_path / "out").exists()


OTHER_JOBS: dict[str, tuple[Callable[[list[str]], int], dict[str, str]]] = {  # one uri of each is the secret one
    "audit, output": (audit.main, {"output": "{uri}"}),
    "evaluate, output": (evaluate.main, {"output": "{uri}", "annotations": "{truth}"}),
    "evaluate, annotations": (evaluate.main, {"output": "{folder}", "annotations": "{uri}"}),
    "manifest, input": (manifest.main, {"input": "{uri}", "output": "{folder}/m.parquet"}),
    "manifest, output": (manifest.main, {"input": "{folder}", "output": "{uri}"}),
    "train, annotations": (train.main, {"annotations": "{uri}", "output": "{folder}/out"}),
    "train, output": (train.main, {"annotations": "{truth}", "output": "{uri}"}),
    "train, weights": (train.main, {"annotations": "{truth}", "output": "{folder}/out", "weights": "{uri}"}),
    "train, backbone": (train.main, {"annotations": "{truth}", "output": "{folder}/out", "weights_backbone": "{uri}"}),
}


@pytest.fixture(scope="module")
def empty_site() -> Iterator[str]:
    """A web server without a page: what is asked for is not there."""

    def nothing(_request: Any) -> web.Response:
        return web.Response(status=404)

    class Nothing(dict[str, Any]):
        def __missing__(self, _path: str) -> Callable[[Any], web.Response]:
            return nothing

    site = Site(Nothing())
    yield site.url
    site.close()


@pytest.mark.parametrize("case", OTHER_JOBS)
@pytest.mark.parametrize("kind", ["password", "query"])
def test_no_other_job_says_or_writes_the_secret_of_a_uri(
    corpus: Path,
    empty_site: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    own_signals: None,
    case: str,
    kind: str,
) -> None:
    main, settings = OTHER_JOBS[case]
    uri = f"s3://user:{CANARY}@bucket/x.pth" if kind == "password" else f"{empty_site}/x?token={CANARY}&name=w.pth"
    truth = next(corpus.glob("*.json"))
    job = {name: value.format(uri=uri, folder=tmp_path, truth=truth) for name, value in settings.items()}
    code = main([*flags(**job)])
    out, err = capfd.readouterr()
    assert code == 2, err
    assert len(err.splitlines()[-1]) > 20, "it must say something"
    assert CANARY not in out + err
    assert list(tmp_path.iterdir()) == []
