"""A job over a list of web images next to local ones: every row comes out once, and hosts are asked no more than allowed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from aiohttp import web

import fcos_ray as fr
from fcos_ray.errors import ConfigError, ManifestError
from fcos_ray.sample import write_sample
from tests.corpus import PixelDetector, config, results_of, rows_of, write_manifest
from tests.web import Site

WEB = {"allow_http": True, "allow_private_hosts": True, "max_transient_fraction": 1.0, "fetch_max_attempts": 2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_sample(folder, num_images=8, seed=5, num_broken=0)
    return folder


@pytest.fixture(scope="module")
def site(corpus: Path) -> Iterator[Site]:
    """The corpus on the web, and pages where something is wrong."""
    images = {path.name: path.read_bytes() for path in (corpus / "images").iterdir()}
    pages: dict[str, Any] = {f"/{name}": lambda r: web.Response(body=images[r.path[1:]]) for name in images}
    pages["/gone"] = lambda _: web.Response(status=404)
    pages["/busy"] = lambda _: web.Response(status=503)
    pages["/page"] = lambda _: web.Response(text="<html>404</html>")
    pages["/metadata"] = lambda _: web.Response(status=302, headers={"Location": "http://169.254.169.254/"})
    served = Site(pages)
    yield served
    served.close()


def test_web_images_come_out_as_the_same_files_do_from_a_disk(
    corpus: Path, site: Site, tmp_path: Path, ray_session: Any
) -> None:
    names = sorted(path.name for path in (corpus / "images").iterdir())
    bad = {"gone": "not_found", "busy": "fetch_failed", "page": "unknown_format", "metadata": "uri_refused"}
    uris = {f"web-{name}": f"{site.url}/{name}?sig=x#top" for name in names}
    uris |= {f"disk-{name}": f"{corpus}/images/{name}" for name in names}
    uris |= {name: f"{site.url}/{name}" for name in bad}
    manifest = write_manifest(tmp_path / "m.parquet", {"image_id": list(uris), "uri": list(uris.values())})
    summary = fr.run(
        config(manifest, tmp_path / "out", allow_root=[str(corpus)], shard_rows=5, **WEB), make_detector=PixelDetector
    )
    assert summary.errors_by_code == dict.fromkeys(bad.values(), 1)
    rows, results = rows_of(tmp_path / "out"), results_of(tmp_path / "out")
    assert {image_id: row["uri"] for image_id, row in rows.items()} == uris
    assert {name: rows[name]["error_code"] for name in bad} == bad
    for name in names:
        assert results[f"web-{name}"] | {"uri": ""} == results[f"disk-{name}"] | {"uri": ""}


def test_without_leave_the_plan_stops_and_an_open_run_is_not_finished(
    corpus: Path, site: Site, tmp_path: Path, ray_session: Any
) -> None:
    class Breaks(PixelDetector):
        def detect(self, images: Any) -> Any:
            raise RuntimeError("a bug")

    name = pq.read_table(corpus / "manifest.parquet")["uri"][0].as_py().rpartition("/")[2]
    manifest = write_manifest(tmp_path / "m.parquet", {"uri": [f"{site.url}/{name}"]})
    out, asked = tmp_path / "out", len(site.asked)
    with pytest.raises(ManifestError, match="1 scheme http is not allowed: --allow-http"):
        fr.run(config(manifest, out), make_detector=PixelDetector)
    with pytest.raises(ManifestError, match="1 private address: --allow-private-hosts"):
        fr.run(config(manifest, out, allow_http=True), make_detector=PixelDetector)
    assert len(site.asked) == asked
    with pytest.raises(RuntimeError, match="a bug"):
        fr.run(config(manifest, out, **WEB), make_detector=Breaks)
    with pytest.raises(ConfigError, match=r"reads http\(s\) images; to finish it, add --allow-http$"):
        fr.run(config(manifest, out), make_detector=PixelDetector)
    with pytest.raises(ConfigError, match=r"images from private hosts; to finish it, add --allow-private-hosts$"):
        fr.run(config(manifest, out, allow_http=True), make_detector=PixelDetector)
    assert fr.run(config(manifest, out, **WEB), make_detector=PixelDetector).ok == 1
