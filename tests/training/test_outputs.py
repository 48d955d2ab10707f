"""A training's output: what stops it, what stays, who may go on, and that nothing unlearnt is called trained."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

import fcos_ray.training.steps as steps
from fcos_ray import storage
from fcos_ray.errors import ConfigError, EvaluationError, ManifestError, OutputError, UserError
from fcos_ray.model.weights import load_weights
from fcos_ray.sample import write_sample
from fcos_ray.training.config import TrainConfig
from fcos_ray.training.fit import train
from fcos_ray.training.states import States


@pytest.fixture(scope="module")
def annotations(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Eight drawn images and their truth."""
    return write_sample(tmp_path_factory.mktemp("truth") / "sample", num_images=8, num_broken=0, seed=5).annotations


def config(annotations: str, output: Path | str, **settings: Any) -> TrainConfig:
    small = {"architecture": "fcos_mobilenet_v3_small_fpn", "min_size": 64, "max_size": 96, "warmup_steps": 1}
    return TrainConfig(annotations=annotations, output=str(output), **small | {"batch_size": 4, "epochs": 1} | settings)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_images_that_are_not_there_stop_the_training_and_the_right_folder_goes_on(
    annotations: str, tmp_path: Path
) -> None:
    wrong = config(annotations, tmp_path / "out", images=str(tmp_path / "wrong"), save_every_steps=1)
    with pytest.raises(ManifestError, match=r"8 of the 8 images seen so far could not be used \(.*Check --images"):
        train(wrong)
    assert names(tmp_path / "out") == ["recipe.json"]
    summary = train(config(annotations, tmp_path / "out"))
    assert (summary.steps, summary.images_skipped) == (2, 0)
    with pytest.raises(ManifestError, match="nothing was learnt: 8 of the 8 images"):
        train(
            config(annotations, tmp_path / "none", images=str(tmp_path / "wrong"), max_skipped_fraction=1.0),
        )


def test_skipped_images_are_remembered_over_a_restart(annotations: str, tmp_path: Path) -> None:
    truth = json.loads(Path(annotations).read_text())
    truth["images"][0]["file_name"] = "line\nbreak.jpg"
    truth["images"][1]["file_name"] = "n" * 300
    truth["images"][2]["file_name"] = f"{truth['images'][3]['file_name']}/below"
    path = Path(annotations).with_name("three_away.json")
    path.write_text(json.dumps(truth))
    asked = config(str(path), tmp_path / "out", epochs=2, max_skipped_fraction=0.8)
    taken: list[bool] = []
    with pytest.raises(KeyboardInterrupt):
        train(asked, stop=lambda: taken.append(True) or len(taken) == 3)  # type: ignore[func-returns-value]
    assert names(tmp_path / "out") == ["recipe.json", "state-000000003.pt"]
    summary = train(asked)
    assert summary.images_skipped == 3
    assert (load_weights(summary.weights).training or {})["images_skipped"] == 3
    assert train(asked).images_skipped == 3
    with pytest.raises(ManifestError, match="3 of the 8 images"):
        train(config(str(path), tmp_path / "strict"))


def test_states_of_another_output_below_are_not_ones_own(tmp_path: Path) -> None:
    outer, inner = States(str(tmp_path)), States(str(tmp_path / "inner"))
    inner.save({"of": "inner"}, steps=9)
    assert outer.newest(device=torch.device("cpu")) is None
    outer.save({"of": "outer"}, steps=3)
    outer.save({"of": "outer"}, steps=12)
    outer.forget()
    assert inner.newest(device=torch.device("cpu")) == {"of": "inner"}


def test_of_two_trainings_the_later_one_deletes_nothing_that_is_newer(tmp_path: Path) -> None:
    first, second = States(str(tmp_path)), States(str(tmp_path))
    first.save({"by": 1}, steps=4)
    first.save({"by": 1}, steps=8)
    second.save({"by": 2}, steps=6)
    assert "state-000000008.pt" in names(tmp_path)
    second.save({"by": 2}, steps=8)
    assert first.newest(device=torch.device("cpu")) == {"by": 1}
    assert names(tmp_path) == ["state-000000006.pt", "state-000000008.pt"]


def test_a_state_that_goes_while_it_is_looked_at_gives_way_to_the_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states, other = States(str(tmp_path)), States(str(tmp_path))
    states.save({"steps": 4}, steps=4)
    read = storage.read_bytes

    def while_the_other_goes_on(uri: str) -> bytes:
        if uri.endswith("4.pt"):
            other.save({"steps": 8}, steps=8)
        return read(uri)

    monkeypatch.setattr(storage, "read_bytes", while_the_other_goes_on)
    assert states.newest(device=torch.device("cpu")) == {"steps": 8}


@pytest.mark.parametrize("length", [0, 0.5])
def test_a_damaged_state_is_passed_over_for_an_older_one_or_named(tmp_path: Path, length: float) -> None:
    states = States(str(tmp_path))
    states.save({"steps": torch.arange(4)}, steps=8)
    newest = tmp_path / "state-000000008.pt"
    whole = newest.read_bytes()
    (tmp_path / "state-000000004.pt").write_bytes(whole)
    newest.write_bytes(whole[: int(length * len(whole))])
    assert states.newest(device=torch.device("cpu")) is not None
    (tmp_path / "state-000000004.pt").unlink()
    with pytest.raises(OutputError, match=r"delete .*state-000000008.pt, then the same command begins anew"):
        states.newest(device=torch.device("cpu"))


class Evil:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder / "executed"),)


@pytest.mark.parametrize("protocol", [None, 2], ids=["torch's zip file", "a plain pickle"])
def test_a_state_that_holds_code_is_damaged_and_does_not_run(tmp_path: Path, protocol: int | None) -> None:
    state, path = {"steps": Evil(tmp_path)}, tmp_path / "state-000000008.pt"
    torch.save(state, path) if protocol is None else path.write_bytes(pickle.dumps(state, protocol))
    with pytest.raises(OutputError, match=r"delete .*state-000000008.pt, then the same command begins anew"):
        States(str(tmp_path)).newest(device=torch.device("cpu"))
    assert names(tmp_path) == ["state-000000008.pt"]


def test_a_file_that_is_no_state_is_damaged(tmp_path: Path) -> None:
    torch.save(torch.arange(4), tmp_path / "state-000000008.pt")
    with pytest.raises(OutputError, match=r"delete .*state-000000008.pt"):
        States(str(tmp_path)).newest(device=torch.device("cpu"))


def test_weights_that_another_training_wrote_first_count(
    annotations: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(annotations, tmp_path / "out")
    other = load_weights(train(config(annotations, tmp_path / "other", seed=1)).weights)
    outcome = steps.Fitting.outcome

    def let_the_other_finish(fitting: steps.Fitting) -> dict[str, Any]:
        os.link(tmp_path / "other" / "weights.safetensors", tmp_path / "out" / "weights.safetensors")
        return outcome(fitting)

    monkeypatch.setattr(steps.Fitting, "outcome", let_the_other_finish)
    summary = train(asked)
    assert load_weights(summary.weights).sha256 == other.sha256
    assert names(tmp_path / "out") == ["recipe.json", "weights.safetensors"]


def test_states_left_beside_finished_weights_are_deleted(annotations: str, tmp_path: Path) -> None:
    asked = config(annotations, tmp_path / "out")
    train(asked)
    (tmp_path / "out" / "state-000000001.pt").write_bytes(b"left")
    train(asked)
    assert names(tmp_path / "out") == ["recipe.json", "weights.safetensors"]


@pytest.mark.parametrize("output", ["s3://B!/x", "{tmp}/file/below", "/proc/x"])
def test_outputs_that_cannot_be_are_refused(annotations: str, tmp_path: Path, output: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"output|Wanted to list, read and create"):
        train(config(annotations, output.replace("{tmp}", str(tmp_path))))


def test_validation_is_looked_at_before_the_first_step(annotations: str, tmp_path: Path) -> None:
    truth = json.loads(Path(annotations).read_text())
    bad = tmp_path / "bad.json"
    for broken, message in (
        (truth | {"annotations": [{**truth["annotations"][0], "image_id": 999}]}, "image_id 999 is not in images"),
        (
            truth | {"categories": [{**c, "name": f"{c['name']}s"} for c in truth["categories"]]},
            "none of its categories",
        ),
    ):
        bad.write_text(json.dumps(broken))
        with pytest.raises(EvaluationError, match=message):
            train(config(annotations, tmp_path / "out", val_annotations=str(bad)))
    assert not (tmp_path / "out").exists()


def test_finished_weights_are_measured_when_they_had_not_been(annotations: str, tmp_path: Path) -> None:
    first = train(config(annotations, tmp_path / "out"))
    assert first.metrics == {}
    written = Path(first.weights).read_bytes()
    again = train(config(annotations, tmp_path / "out", val_annotations=annotations, score_threshold=0.0))
    assert set(again.metrics) == {"mean_ap", "ap50", "ap75", "ar_100"}
    assert Path(first.weights).read_bytes() == written


def test_what_bodes_ill_is_warned_of(annotations: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(config(annotations, tmp_path / "out", warmup_steps=2))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2
    assert warnings[0].startswith("training from nothing (no weights, no weights_backbone)")
    assert warnings[1] == "warmup_steps (2) reach the end: the learning rate never falls in 2 steps"


def test_a_very_thin_image_does_not_end_the_training(annotations: str, tmp_path: Path) -> None:
    truth = json.loads(Path(annotations).read_text())
    truth["images"].append({"id": 99, "file_name": "thin.png", "width": 400, "height": 1})
    path = Path(annotations).with_name("thin.json")
    PIL.Image.new("RGB", (400, 1)).save(path.with_suffix(".png"))
    path.write_text(json.dumps(truth))
    assert train(config(str(path), tmp_path / "out", scale_jitter=(0.5, 1.0))).counts["too_thin"] == 1


def test_weights_that_are_not_finite_are_not_written(
    annotations: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = steps.Fitting.run

    def spoil(fitting: steps.Fitting, *args: Any, **more: Any) -> None:
        run(fitting, *args, **more)
        next(iter(fitting.model.parameters())).data[0] = float("inf")

    monkeypatch.setattr(steps.Fitting, "run", spoil)
    with pytest.raises(ConfigError, match=r"1 of the weights are not finite .* another --output"):
        train(config(annotations, tmp_path / "out"))
    assert not (tmp_path / "out" / "weights.safetensors").exists()


def test_weights_to_start_from_are_told_by_their_bytes_not_their_path(annotations: str, tmp_path: Path) -> None:
    made = Path(train(config(annotations, tmp_path / "made")).weights)
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(made.read_bytes())
    train(config(annotations, tmp_path / "out", weights=str(made)))
    train(config(annotations, tmp_path / "out", weights=str(moved)))
    other = train(config(annotations, tmp_path / "other", seed=3)).weights
    moved.write_bytes(Path(other).read_bytes())
    with pytest.raises(UserError, match="weights_sha256: it has"):
        train(config(annotations, tmp_path / "out", weights=str(moved)))


@pytest.mark.parametrize("secret", ["https://user:hunter2@host/w.pth", "https://host/w?token=hunter2&name=w.pth"])
def test_weights_whose_uri_holds_a_secret_are_refused_before_the_recipe_is_written(
    annotations: str, tmp_path: Path, secret: str
) -> None:
    with pytest.raises(
        ConfigError, match=r"weights wanted a uri without secrets, got https://host/w.*recipe\.json"
    ) as refused:
        train(config(annotations, tmp_path / "out", weights=secret))
    assert "hunter2" not in str(refused.value)
    assert not (tmp_path / "out").exists()
