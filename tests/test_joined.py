"""Two drivers on one run: they begin at different ends, and stop when they meet."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import fcos_ray as fr
from fcos_ray import execution, job
from fcos_ray.errors import RunStopped
from fcos_ray.outputs import runs
from fcos_ray.outputs.pulse import Pulse, drivers_folder
from fcos_ray.sample import write_sample
from fcos_ray.types import Image
from fcos_ray.upkeep.marks import abandon
from tests.corpus import PixelDetector, config, rows_of
from tests.nights import Crash, run_night, write_night


def test_a_second_driver_begins_at_the_other_end_and_both_end_when_they_meet(
    tmp_path: Path, ray_session: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The other driver is a thread that commits shard after shard from the front, as it would."""
    write_sample(tmp_path / "corpus", num_images=60, seed=3, num_broken=0)
    manifest, output = tmp_path / "corpus" / "manifest.parquet", tmp_path / "out"
    with pytest.raises(Crash):
        run_night(manifest, output, crash_after=0, shard_rows=2, weights="random:1")
    [run] = runs.list_runs(str(output))
    monkeypatch.setattr(execution, "_LOOK_SECONDS", 0.5)
    log = tmp_path / "detected"

    class SlowDetector(PixelDetector):
        """Half a second an image, and a line in a file for each."""

        def detect(self, images: Sequence[Image]) -> Any:
            with log.open("a") as file:
                file.writelines("image\n" for _ in images)
            time.sleep(0.5 * len(images))
            return super().detect(images)

    def other() -> None:
        while not list((output / "detections").rglob("*.parquet")):  # ours has begun, at its end
            time.sleep(0.05)
        run_night(manifest, output, alone=False, shard_rows=2, weights="random:1")

    caplog.set_level("INFO", logger="fcos_ray")
    thread = threading.Thread(target=other)
    with Pulse(drivers_folder(str(output), run.run_id)) as pulse:
        thread.start()
        summary = fr.run(config(manifest, output, shard_rows=2), make_detector=SlowDetector)
        assert f"at work on run {run.run_id} too: {pulse.name}" in caplog.text
    thread.join()
    assert (summary.state, summary.rows) == ("complete", 60)
    assert len(rows_of(output)) == 60
    assert len(log.read_text().splitlines()) < 60, "what the other had committed was not labelled again"
    first = min((output / "detections").rglob("*.parquet"), key=lambda file: file.stat().st_mtime_ns)
    assert int(first.stem) > 15, "the last shards first"


def test_who_is_told_to_wait_waits_until_nobody_is_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = str(tmp_path / "out")
    manifest = write_night(tmp_path / "m.parquet", {f"i{n}": "1" for n in range(6)})
    with pytest.raises(Crash):
        run_night(manifest, output, crash_after=1)
    [run] = runs.list_runs(output)
    monkeypatch.setattr(job, "_WAIT_SECONDS", 0.05)
    summaries: list[fr.RunSummary] = []
    with Pulse(drivers_folder(output, run.run_id)):
        left = run_night(manifest, output, if_running="exit")
        assert (left.state, left.run_id, left.rows) == ("running", run.run_id, 6)
        waiting = threading.Thread(target=lambda: summaries.append(run_night(manifest, output, if_running="wait")))
        waiting.start()
        waiting.join(1.0)
        assert waiting.is_alive()
        assert runs.list_runs(output)[0].state == "open"
    waiting.join()
    assert (summaries[0].state, summaries[0].rows) == ("complete", 6)


def test_a_driver_ends_when_its_run_is_abandoned_and_what_it_had_committed_is_in_the_index(
    tmp_path: Path, ray_session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sample(tmp_path / "corpus", num_images=40, seed=3, num_broken=0)
    manifest, output = tmp_path / "corpus" / "manifest.parquet", str(tmp_path / "out")
    monkeypatch.setattr(execution, "_LOOK_SECONDS", 0.5)

    class SlowDetector(PixelDetector):
        def detect(self, images: Sequence[Image]) -> Any:
            time.sleep(0.3 * len(images))
            return super().detect(images)

    def close() -> None:
        while not list((tmp_path / "out" / "detections").rglob("*.parquet")):
            time.sleep(0.05)
        abandon(output, runs.list_runs(output)[0].run_id, force=True)

    closing = threading.Thread(target=close)
    closing.start()
    with pytest.raises(
        RunStopped, match=r"run 000001-\w+ was abandoned meanwhile; the same command labels what it lacks"
    ):
        # one detector, ten blocks: several would be done with everything before the first look
        fr.run(config(manifest, output, shard_rows=2, num_detectors=1), make_detector=SlowDetector)
    closing.join()
    before = len(rows_of(Path(output)))
    assert 0 < before < 40
    again = run_night(manifest, output, shard_rows=2, weights="random:1")
    assert (again.rows, again.selection["up_to_date"]) == (40 - before, before)


def test_an_abandoned_run_that_grew_is_indexed_again(tmp_path: Path) -> None:
    """A driver that slept while its run was abandoned and indexed commits one more shard when it wakes."""
    output = str(tmp_path / "out")
    manifest = write_night(tmp_path / "m.parquet", {f"i{n}": "1" for n in range(9)})
    with pytest.raises(Crash):
        run_night(manifest, output, crash_after=2)
    [run] = runs.list_runs(output)
    late = max((tmp_path / "out" / "detections").rglob("*.parquet"))
    data = late.read_bytes()
    late.unlink()
    abandon(output, run.run_id)
    assert run_night(manifest, output, dry_run=True).selection["up_to_date"] == 3
    write_night(manifest, {f"i{n}": "1" for n in range(3)})
    assert run_night(manifest, output).state == "nothing_to_do", "the index is there now"
    late.write_bytes(data)
    write_night(manifest, {f"i{n}": "1" for n in range(6)})
    assert run_night(manifest, output).state == "nothing_to_do"
