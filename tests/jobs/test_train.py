"""`python jobs/train.py` as a user meets it: exit codes, a signal in the middle, an output and images in S3."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from fcos_ray import storage
from fcos_ray.sample import write_sample
from jobs import train
from tests.processes import call_job, flags, kill_tree, run_job, start_job, wait_until

SMALL = flags(architecture="fcos_mobilenet_v3_small_fpn", min_size=64, max_size=96, warmup_steps=1, batch_size=4)


@pytest.fixture(scope="module")
def annotations(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Eight drawn images and their truth."""
    return write_sample(tmp_path_factory.mktemp("truth") / "sample", num_images=8, num_broken=0, seed=5).annotations


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--learning-rat", "1"], "did you mean --learning-rate?"),
        (["--annotations", "none.json"], "none.json: there is no such file"),
        (["--output", "s3://B!/x"], "the output s3://B!/x is no path or uri"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_ends_with_2(
    annotations: str, tmp_path: Path, own_signals: None, arguments: list[str], words: str
) -> None:
    good = {"annotations": annotations, "output": tmp_path / "out"}
    given = {name: value for name, value in good.items() if f"--{name}" not in arguments}
    done = call_job(train.main, *flags(**given), *SMALL, *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert words in done.stderr.splitlines()[-1]
    assert done.stdout == ""


def test_sigterm_saves_the_step_ends_with_130_and_the_same_command_finishes(annotations: str, tmp_path: Path) -> None:
    job = [*flags(annotations=annotations, output=tmp_path / "out", epochs=30, save_every_steps=10_000), *SMALL]
    process = start_job("train", *job)
    try:
        wait_until((tmp_path / "out" / "recipe.json").exists, "the claim")
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    finally:
        kill_tree(process.pid)
    assert process.returncode == 130, err
    assert out == ""
    assert "interrupted: the same command goes on" in err
    [state] = (tmp_path / "out").glob("state-*.pt")
    assert 0 < int(state.stem.removeprefix("state-")) < 60
    done = run_job("train", *job)
    assert done.returncode == 0, done.stderr
    assert f"going on after step {int(state.stem.removeprefix('state-'))} of 60" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 60
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["recipe.json", "weights.safetensors"]


def test_truth_images_and_output_may_lie_in_s3(annotations: str, s3_bucket: str) -> None:
    folder = Path(annotations).parent
    for path in [Path(annotations), *(folder / "images").iterdir()]:
        storage.create(storage.join(s3_bucket, "truth", str(path.relative_to(folder))), path.read_bytes())
    job = flags(annotations=f"{s3_bucket}/truth/annotations.json", output=f"{s3_bucket}/out", epochs=1)
    done = run_job("train", *job, *SMALL)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["steps"], summary["images_skipped"]) == (2, 0)
    left = [file.uri.removeprefix(f"{s3_bucket}/out/") for file in storage.list_files(f"{s3_bucket}/out")]
    assert left == ["recipe.json", "weights.safetensors"]
