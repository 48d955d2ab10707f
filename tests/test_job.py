"""The whole job on real Ray: every manifest row comes out exactly once, whatever the cut of the work."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import s3fs

import fcos_ray as fr
from fcos_ray.errors import ERROR_CODES, ConfigError, OutputError, RunStopped
from fcos_ray.inputs.decode import decode
from fcos_ray.inputs.shrink import shrink
from fcos_ray.sample import write_sample
from fcos_ray.storage import MAX_ATTEMPTS
from tests.corpus import (
    PixelDetector,
    config,
    detections_of,
    files_of,
    manifest_ids,
    results_of,
    rows_of,
    write_manifest,
)  # fmt: skip
from tests.parity import assert_same_detections
from tests.rgw import RgwServer
from tests.s3_faults import Request

CUTS = {"score_threshold": 0.2, "max_detections": 100}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 drawn images, eight of them broken, each in another way."""
    folder = tmp_path_factory.mktemp("corpus")
    write_sample(folder, num_images=80, seed=3, num_broken=10)
    return folder


@pytest.fixture(scope="module")
def labelled(corpus: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: Any) -> tuple[Path, fr.RunSummary]:
    """The corpus labelled once by FCOS itself, partitioned."""
    output = tmp_path_factory.mktemp("labelled")
    partition_by = ["captured_at", "month:captured_at"]
    summary = fr.run(config(corpus / "manifest.parquet", output, shard_rows=16, partition_by=partition_by))
    return output, summary


def test_every_manifest_row_comes_out_once_with_the_documented_codes(
    corpus: Path, labelled: tuple[Path, fr.RunSummary]
) -> None:
    output, summary = labelled
    rows = rows_of(output)
    manifest = pq.read_table(corpus / "manifest.parquet").to_pylist()
    assert sorted(rows) == sorted(row["image_id"] for row in manifest)
    for wanted in manifest:
        row = rows[wanted["image_id"]]
        assert row["error_code"] == wanted["expected_error"], row["error_message"]
        assert row["status"] == ("error" if wanted["expected_error"] else "ok")
        if row["status"] == "error":
            stage, transient, _ = ERROR_CODES[row["error_code"]]
            assert (row["error_stage"], row["error_transient"]) == (stage, transient)
            assert row["boxes"] is row["labels"] is row["scores"] is None
        else:
            assert (row["width"], row["height"]) == (wanted["width"], wanted["height"])
    codes = Counter(row["expected_error"] for row in manifest if row["expected_error"])
    assert summary.errors_by_code == codes
    assert (summary.rows, summary.ok, summary.error) == (len(manifest), len(manifest) - codes.total(), codes.total())
    assert summary.detections == sum(len(row["boxes"] or []) for row in rows.values())


def test_the_job_finds_what_the_detector_finds_one_image_at_a_time(
    corpus: Path, labelled: tuple[Path, fr.RunSummary]
) -> None:
    rows = rows_of(labelled[0])
    detector = fr.Detector("random:1", min_size=96, max_size=160)
    good = [row for row in rows.values() if row["status"] == "ok"]
    for row in random.Random(1).sample(good, 20):
        image = decode(Path(row["uri"]).read_bytes())
        small = fr.Image(shrink(image.pixels, min_size=96, max_size=160), height=image.height, width=image.width)
        [wanted] = detector([small])
        assert wanted.scores.size, "an empty answer proves nothing"
        assert_same_detections(detections_of(row), wanted, **CUTS)


@pytest.mark.parametrize("num_detectors", [1, 3])
def test_a_shuffled_manifest_cut_otherwise_gives_the_same(
    corpus: Path, labelled: tuple[Path, fr.RunSummary], tmp_path: Path, num_detectors: int
) -> None:
    table = pq.read_table(corpus / "manifest.parquet").drop_columns(["width", "height"])
    order = np.random.default_rng(num_detectors).permutation(table.num_rows)
    shuffled = corpus / f"shuffled-{num_detectors}.parquet"
    pq.write_table(table.take(order), shuffled)
    fr.run(config(shuffled, tmp_path, shard_rows=7, num_detectors=num_detectors, max_micro_batch=4))
    got, wanted = rows_of(tmp_path), rows_of(labelled[0])
    assert got.keys() == wanted.keys()
    for image_id, row in got.items():
        assert row["error_code"] == wanted[image_id]["error_code"]
        if row["status"] == "ok":
            assert_same_detections(detections_of(row), detections_of(wanted[image_id]), **CUTS)


def test_partitioned_output_opens_in_duckdb_pyarrow_pandas_and_ray(
    corpus: Path, labelled: tuple[Path, fr.RunSummary], ray_session: Any
) -> None:
    import duckdb
    import pandas
    import pyarrow.dataset

    folder = str(labelled[0] / "detections")
    wanted = {
        row["image_id"]: str(row["captured_at"]) for row in pq.read_table(corpus / "manifest.parquet").to_pylist()
    }
    in_duckdb = duckdb.sql(
        f"SELECT image_id, CAST(captured_at AS VARCHAR) FROM read_parquet('{folder}/**/*.parquet', hive_partitioning=true)"
    ).fetchall()
    assert dict(in_duckdb) == wanted
    months = duckdb.sql(f"SELECT image_id, month FROM '{folder}/**/*.parquet'").fetchall()
    assert dict(months) == {image_id: day[:7] for image_id, day in wanted.items()}
    dataset = pyarrow.dataset.dataset(folder, partitioning="hive")
    in_arrow = dataset.to_table(columns=["image_id", "captured_at"]).to_pylist()
    assert {row["image_id"]: row["captured_at"] for row in in_arrow} == wanted
    in_pandas = pandas.read_parquet(folder)
    assert dict(zip(in_pandas["image_id"], in_pandas["captured_at"].astype(str), strict=True)) == wanted
    in_ray = ray_session.data.read_parquet(folder).take_all()
    assert {row["image_id"]: str(row["captured_at"]) for row in in_ray} == wanted
    assert max(len(row["boxes"]) for row in in_ray if row["status"] == "ok") > 0


def test_one_uri_under_two_ids_is_two_rows(corpus: Path, tmp_path: Path, ray_session: Any) -> None:
    uri = next((corpus / "images").glob("*.jpg"))
    manifest = write_manifest(tmp_path / "m.parquet", {"image_id": ["a", "b"], "uri": [str(uri)] * 2})
    fr.run(config(manifest, tmp_path / "out", allow_root=[str(corpus)]), make_detector=PixelDetector)
    results = results_of(tmp_path / "out")
    assert results["a"] == results["b"]
    assert results["a"]["status"] == "ok"


def test_the_same_request_again_is_nothing_to_do_and_a_grown_manifest_a_new_run(
    corpus: Path, tmp_path: Path, ray_session: Any
) -> None:
    manifest = corpus / "grows.parquet"
    table = pq.read_table(corpus / "manifest.parquet")
    pq.write_table(table.slice(0, 20), manifest)
    first = fr.run(config(manifest, tmp_path), make_detector=PixelDetector)
    files = files_of(tmp_path)
    again = fr.run(config(manifest, tmp_path), make_detector=PixelDetector)
    assert (again.state, again.run_id, again.rows, again.ok) == ("nothing_to_do", first.run_id, 20, first.ok)
    assert files_of(tmp_path) == files
    pq.write_table(table.slice(0, 30), manifest)
    second = fr.run(config(manifest, tmp_path), make_detector=PixelDetector)
    assert (second.state, second.rows, second.run_id[:6]) == ("complete", 10, "000002"), "what is new"
    assert second.selection["up_to_date"] + second.selection["failed_for_good"] == 20
    whole = fr.run(config(manifest, tmp_path, select=["all"]), make_detector=PixelDetector)
    assert (whole.state, whole.rows, whole.run_id[:6]) == ("complete", 30, "000003")
    assert files.items() < files_of(tmp_path).items()


def test_other_settings_on_the_same_output_are_refused_by_name(corpus: Path, tmp_path: Path, ray_session: Any) -> None:
    manifest = write_manifest(tmp_path / "m.parquet", {"uri": [str(next((corpus / "images").glob("*.png")))]})
    out = tmp_path / "out"
    fr.run(config(manifest, out, allow_root=[str(corpus)]), make_detector=PixelDetector)
    with pytest.raises(OutputError, match=r"score_threshold: the output has 0\.2, asked was 0\.5.*another --output"):
        fr.run(config(manifest, out, allow_root=[str(corpus)], score_threshold=0.5), make_detector=PixelDetector)
    with pytest.raises(OutputError, match="weights_sha256"):
        fr.run(config(manifest, out, allow_root=[str(corpus)], weights="random:2"), make_detector=PixelDetector)


def test_a_run_that_broke_is_finished_first_and_its_files_stay(corpus: Path, tmp_path: Path, ray_session: Any) -> None:
    marker = tmp_path / "broken"
    marker.touch()

    class BreaksLater(PixelDetector):
        """Fails on its third call for as long as the marker is there: a bug, not a bad image."""

        calls = 0

        def detect(self, images: Any) -> Any:
            self.calls += 1
            if self.calls > 2 and marker.exists():
                raise RuntimeError("a bug")
            return super().detect(images)

    out = tmp_path / "out"
    settings = config(corpus / "manifest.parquet", out, shard_rows=4)
    with pytest.raises(RuntimeError, match="a bug"):
        fr.run(settings, make_detector=BreaksLater)
    before = files_of(out)
    assert not list((out / "runs").glob("*/_SUCCESS.json"))
    # The manifest grows meanwhile: the open run is finished with its own plan, then the new one is planned.
    marker.unlink()
    grown = corpus / "grown.parquet"
    table = pq.read_table(corpus / "manifest.parquet")
    pq.write_table(table.slice(0, 70), grown)
    summary = fr.run(config(grown, out, shard_rows=4, select=["all"]), make_detector=BreaksLater)
    assert summary.run_id.startswith("000002-")
    assert before.items() <= files_of(out).items()
    assert len(list((out / "runs").glob("*/_SUCCESS.json"))) == 2
    first_run = [row for row in rows_of(out).values() if row["run_id"].startswith("000001")]
    assert {row["image_id"] for row in first_run} <= set(manifest_ids(corpus / "manifest.parquet"))


def test_an_outage_is_not_data_and_the_run_stops_resumably(
    corpus: Path, tmp_path: Path, s3_bucket: str, ray_session: Any
) -> None:
    from fcos_ray import storage

    names = [row["uri"] for row in pq.read_table(corpus / "manifest.parquet").to_pylist() if not row["expected_error"]]
    for name in names[:12]:
        storage.create(f"{s3_bucket}/{name}", (corpus / name).read_bytes())
    manifest = write_manifest(tmp_path / "m.parquet", {"uri": [f"{s3_bucket}/{name}" for name in names[:12]]})
    out = tmp_path / "out"
    away = {"fetch_deadline_seconds": 0.0001, "max_rounds": 2, "round_wait_seconds": 0.1}
    with pytest.raises(RunStopped, match=r"12 rows.*fetch_timeout.*the same command goes on"):
        fr.run(config(manifest, out, **away), make_detector=PixelDetector)
    assert files_of(out) == {}
    summary = fr.run(config(manifest, out), make_detector=PixelDetector)
    assert (summary.ok, summary.run_id[:6]) == (12, "000001")


def test_an_output_that_cannot_be_listed_for_a_while_is_waited_for(
    corpus: Path, s3_bucket: str, s3_faults: Any, monkeypatch: pytest.MonkeyPatch, ray_session: Any
) -> None:
    monkeypatch.setattr("fcos_ray.storage.retries.backoff_seconds", lambda _: 0.0)
    listings: list[str] = []

    def treat(request: Request) -> str:
        if request.verb == "LIST" and "detections" in request.target:
            listings.append(request.target)
        return "503" if request.verb == "LIST" and 2 <= len(listings) < 2 + MAX_ATTEMPTS else "pass"

    s3_faults(treat)  # before the driver; the workers of this Ray were started without
    settings = config(corpus / "manifest.parquet", f"{s3_bucket}/out", shard_rows=40, round_wait_seconds=0.1)
    summary = fr.run(settings, make_detector=PixelDetector)
    assert (summary.rows, summary.shards) == (80, 2)
    assert len(listings) > 2 + MAX_ATTEMPTS


def test_a_job_wholly_on_s3_gives_what_the_local_one_gives(
    corpus: Path, labelled: tuple[Path, fr.RunSummary], s3_bucket: str, ray_session: Any
) -> None:
    from fcos_ray import storage

    for path in [corpus / "manifest.parquet", *sorted((corpus / "images").iterdir())]:
        if path.stat().st_size:
            storage.create(f"{s3_bucket}/corpus/{path.relative_to(corpus)}", path.read_bytes())
        else:
            storage.filesystem(s3_bucket)[0].pipe_file(f"{s3_bucket}/corpus/{path.relative_to(corpus)}", b"")
    out = f"{s3_bucket}/out"
    summary = fr.run(config(f"{s3_bucket}/corpus/manifest.parquet", out, shard_rows=16), make_detector=PixelDetector)
    local, remote = rows_of(labelled[0]), rows_of(out)
    assert remote.keys() == local.keys()
    for image_id, row in remote.items():
        for name in ("status", "error_code", "width", "height", "content_sha256", "content_bytes"):
            assert row[name] == local[image_id][name], (image_id, name)
        if row["error_code"] != "not_found":
            assert row["content_etag"]
            assert row["content_last_modified"]
    assert summary.errors_by_code == labelled[1].errors_by_code


def test_an_open_run_is_not_finished_under_roots_that_would_make_its_rows_errors(
    corpus: Path, tmp_path: Path, ray_session: Any
) -> None:
    class Breaks(PixelDetector):
        def detect(self, images: Any) -> Any:
            raise RuntimeError("a bug")

    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="a bug"):
        fr.run(config(corpus / "manifest.parquet", out, limit=10), make_detector=Breaks)
    elsewhere = write_manifest(tmp_path / "m.parquet", {"uri": ["x.jpg"]})
    with pytest.raises(ConfigError, match=f"is open and reads images below {corpus}; to finish it, add --allow-root"):
        fr.run(config(elsewhere, out), make_detector=PixelDetector)
    both = [str(corpus), str(tmp_path)]
    summary = fr.run(config(elsewhere, out, allow_root=both), make_detector=PixelDetector)
    assert summary.errors_by_code == {"not_found": 1}
    assert len(rows_of(out)) == 11


def test_missing_and_denied_objects_and_a_doubled_uri_are_rows_like_all_others(
    corpus: Path, tmp_path: Path, s3_server: RgwServer, s3_bucket: str, ray_session: Any
) -> None:
    from fcos_ray import storage

    image = next((corpus / "images").glob("*.png")).read_bytes()
    storage.create(f"{s3_bucket}/here.png", image)
    stranger = s3fs.S3FileSystem(
        key=s3_server.stranger.access_key, secret=s3_server.stranger.secret_key, endpoint_url=s3_server.endpoint
    )
    theirs = f"{s3_bucket.removeprefix('s3://')}-theirs"
    stranger.call_s3("create_bucket", Bucket=theirs)
    stranger.pipe_file(f"{theirs}/denied.png", image)
    uris = [f"{s3_bucket}/here.png", f"{s3_bucket}/here.png", f"{s3_bucket}/none.png", f"s3://{theirs}/denied.png"]
    manifest = write_manifest(tmp_path / "m.parquet", {"image_id": ["a", "b", "c", "d"], "uri": uris})
    summary = fr.run(config(manifest, tmp_path / "out"), make_detector=PixelDetector)
    rows = rows_of(tmp_path / "out")
    assert {i: row["error_code"] for i, row in rows.items()} == {
        "a": None, "b": None, "c": "not_found", "d": "forbidden"
    }  # fmt: skip
    assert not any(row["error_transient"] for row in rows.values())
    assert (summary.rows, summary.ok, summary.errors_by_code) == (4, 2, {"not_found": 1, "forbidden": 1})


def test_the_records_explain_the_run(corpus: Path, labelled: tuple[Path, fr.RunSummary]) -> None:
    output, summary = labelled
    labelling = json.loads((output / "labelling.json").read_text())
    assert labelling["settings"]["min_size"] == 96
    assert len(labelling["categories"]) == 91
    run = json.loads((output / "runs" / summary.run_id / "run.json").read_text())
    assert run["sources"][0]["uri"] == str(corpus / "manifest.parquet")
    assert run["partition_by"] == ["captured_at", "month"]
    success = json.loads((output / "runs" / summary.run_id / "_SUCCESS.json").read_text())
    assert success["rows"] == summary.rows
    assert success["versions"]["ray"].startswith("2.")
    assert set(summary.seconds) == {"fetch", "decode", "detect"}
    assert min(summary.seconds.values()) > 0


def test_cuda_without_a_gpu_is_an_error_not_a_cpu_run(corpus: Path, tmp_path: Path, ray_session: Any) -> None:
    with pytest.raises(ConfigError, match=r"1 GPU per detector.*0 GPUs.*--device cpu"):
        fr.run(config(corpus / "manifest.parquet", tmp_path, device="cuda"), make_detector=PixelDetector)


def test_a_dry_run_writes_nothing(corpus: Path, tmp_path: Path) -> None:
    summary = fr.run(config(corpus / "manifest.parquet", tmp_path / "out", dry_run=True))
    assert (summary.state, summary.rows) == ("planned", 80)
    assert not (tmp_path / "out").exists()
