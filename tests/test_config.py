"""Every setting has one definition, and says what was wanted when it gets something else."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from pydantic_settings import CliSuppress

from fcos_ray.config import LABELLING_SETTINGS, REQUEST_SETTINGS, JobConfig, load_config
from fcos_ray.errors import ConfigError

NEEDED = ["--manifest", "m.parquet", "--output", "out"]
HIDDEN = [
    name
    for name, field in JobConfig.model_fields.items()
    if any(type(m) is type(CliSuppress[int].__metadata__[0]) for m in field.metadata)  # type: ignore[attr-defined]
]
VALUES: dict[str, tuple[str, Any]] = {  # hidden setting: as a flag, as a value
    "allow_private_hosts": ("", True), "fast_decode": ("", True),
    "max_files": ("5", 5), "image_mean": ("0,0.5,1", (0, 0.5, 1)), "image_std": ("[1,1,1]", (1, 1, 1)),
    "topk_candidates": ("9", 9), "max_micro_batch": ("3", 3),
    "fetch_timeout_seconds": ("1.5", 1.5), "fetch_deadline_seconds": ("2", 2.0), "fetch_max_attempts": ("1", 1),
    "fetch_concurrency": ("4", 4), "max_image_bytes": ("1000", 1000), "max_pixels": ("77", 77),
    "decode_deadline_seconds": ("3", 3.0), "decode_memory_bytes": ("300000000", 300_000_000),
    "max_transient_fraction": ("0.5", 0.5), "max_rounds": ("2", 2), "round_wait_seconds": ("0", 0.0),
    "check_changed": ("", True), "tombstones": ("", True), "max_tombstone_fraction": ("0.5", 0.5),
    "if_running": ("wait", "wait"), "weights_sha256": ("a" * 64, "a" * 64), "gpus_per_detector": ("0.5", 0.5),
    "stall_seconds": ("60", 60.0), "grace_seconds": ("5", 5.0), "load_cpus": ("2", 2.0),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("FCOS_RAY_")]:
        monkeypatch.delenv(name)


def toml(folder: Path, content: str) -> list[str]:
    (folder / "job.toml").write_text(content)
    return [*NEEDED, "--config", str(folder / "job.toml")]


def refusal(arguments: list[str]) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_flag_wins_over_the_environment_over_the_file_over_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_config(NEEDED).score_threshold == 0.2
    arguments = toml(tmp_path, "score_threshold = 0.3\nlimit = 5\n")
    assert load_config(arguments).score_threshold == 0.3
    monkeypatch.setenv("FCOS_RAY_SCORE_THRESHOLD", "0.4")
    assert load_config(arguments).score_threshold == 0.4
    assert load_config([*arguments, "--score-threshold", "0.5"]).score_threshold == 0.5
    assert load_config(arguments).limit == 5


def test_the_file_may_be_named_by_the_environment_and_hold_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "job.toml").write_text(
        'manifest = ["a.csv", "b.csv"]\noutput = "s3://b/o"\npartition_by = ["day"]\nimage_mean = [0, 0, 0]\n'
        'drop_duplicates = true\n[rename]\npath = "uri"\n'
    )
    monkeypatch.setenv("FCOS_RAY_CONFIG", str(tmp_path / "job.toml"))
    config = load_config([])
    assert (config.manifest, config.output, config.rename) == (["a.csv", "b.csv"], "s3://b/o", {"path": "uri"})
    assert (config.partition_by, config.drop_duplicates) == (["day"], True)
    assert load_config(["--no-drop-duplicates", "--manifest", "c.csv"]).drop_duplicates is False


def test_lists_and_renames_are_given_once_each_or_with_commas() -> None:
    config = load_config(
        [*NEEDED, "--manifest", "b,c", "--rename", "a=uri", "--rename", "b=image_id", "--columns", "x,y"]
    )
    assert config.manifest == ["m.parquet", "b", "c"]
    assert config.rename == {"a": "uri", "b": "image_id"}
    assert config.columns == ["x", "y"]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--scoer-threshold", ".5"], "there is no setting --scoer-threshold; did you mean --score-threshold?"),
        (["--score_threshold=.5"], "there is no setting --score_threshold; did you mean --score-threshold?"),
        (["--no-dry-rum"], "there is no setting --no-dry-rum"),
        (["--xyzzy", "1"], "there is no setting --xyzzy; --help lists the settings"),
        (["--score-thresh", ".5"], "did you mean --score-threshold?"),  # no abbreviations: a later flag would change them
        (["--score-threshold", "2"], "score_threshold should be less than or equal to 1, got '2'"),
        (["--score-threshold", "nan"], "score_threshold should be "),
        (["--nms-threshold", "-0.1"], "nms_threshold should be greater than or equal to 0, got '-0.1'"),
        (["--limit", "0"], "limit should be greater than 0, got '0'"),
        (["--limit", "many"], "limit should be a valid integer, unable to parse string as an integer, got 'many'"),
        (["--limit"], "--limit: expected one argument"),
        (["--shard-rows", "32769"], "shard_rows should be less than or equal to 32768, got '32769'"),
        (["--num-classes", "1"], "num_classes should be greater than or equal to 2"),
        (["--device", "tpu"], "device should be 'cpu' or 'cuda', got 'tpu'"),
        (["--refused-uris", "skip"], "refused_uris should be 'stop' or 'error', got 'skip'"),
        (["--fetch-max-attempts", "11"], "fetch_max_attempts should be less than or equal to 10"),
        (["--fetch-timeout-seconds", "inf"], "fetch_timeout_seconds should be a finite number"),
        (["--decode-memory-bytes", "1000"], "decode_memory_bytes should be greater than or equal to 268435456"),
        (["--min-size", "900", "--max-size", "800"], "max_size must be at least min_size (900), got 800"),
        (["--image-mean", "0.1"], "image_mean has too few values, got [0.1]"),
        (["--rename", "a"], "--rename wants old=new"),
        (["--uri-column", "a", "--rename", "a=x"], "uri_column a and rename a=x contradict; give one of them"),
        (["--uri-column", "a", "--rename", "b=uri"], "uri_column a and rename b=uri contradict; give one of them"),
        (["--image-id-column", "a", "--rename", "a=uri"], "image_id_column a and rename a=uri contradict"),
        (["--uri-column", "a", "--image-id-column", "a"], "uri_column and image_id_column are both a; leave image_id"),
        (["--uri-column", ""], "uri_column should have at least 1 character"),
        (["--output", ""], "output should have at least 1 character, got ''"),
        (["stray"], "unrecognized arguments: stray"),
        (["--config", "/no/such.toml"], "--config /no/such.toml cannot be read: No such file or directory"),
    ],
)  # fmt: skip
def test_a_wrong_flag_says_what_was_wanted_and_what_came(arguments: list[str], wanted: str) -> None:
    assert wanted in refusal([*NEEDED, *arguments])


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("scor_threshold = 0.5", "there is no setting scor_threshold; did you mean score_threshold?"),
        ("score-threshold = 0.5", "there is no setting score-threshold; did you mean score_threshold?"),
        ("[model]\nmin_size = 9", "there is no setting model"),
        ("score_threshold = 'high'", "score_threshold should be a valid number, unable to parse string"),
        ("limit = = 5", "job.toml is not TOML: "),
    ],
)
def test_a_wrong_file_says_what_was_wanted_and_what_came(tmp_path: Path, content: str, wanted: str) -> None:
    assert wanted in refusal(toml(tmp_path, content))


def test_a_wrong_list_in_the_environment_says_how_to_write_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FCOS_RAY_PARTITION_BY", "day")
    assert refusal(NEEDED) == """FCOS_RAY_PARTITION_BY wants JSON such as ["a", "b"], got 'day'"""


def test_what_is_missing_is_named_with_its_meaning() -> None:
    message = refusal([])
    assert "manifest is missing: Parquet, CSV" in message
    assert (
        "output is missing: Folder or s3:// prefix that receives the labels (--output, or output = … in TOML)"
        in message
    )


def test_help_lists_every_visible_setting_and_ends_well(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        load_config(["--help"])
    assert end.value.code == 0
    shown = set(re.findall(r"^  --([a-z0-9-]+)", capsys.readouterr().out, re.MULTILINE))
    assert shown == {name.replace("_", "-") for name in JobConfig.model_fields if name not in HIDDEN} | {"config"}
    assert len(shown) <= 30


def test_help_does_not_repeat_defaults_that_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_config(["--help"])
    help_text = capsys.readouterr().out
    assert not re.search(r"default:\s+(null|None|\[\]|\{\})\)", help_text)
    assert "(default: 0.2)" in help_text


def test_every_hidden_setting_is_a_flag_too() -> None:
    assert set(HIDDEN) == set(VALUES)
    for name, (flag, value) in VALUES.items():
        arguments = [f"--{name.replace('_', '-')}", *([flag] if flag else [])]
        assert getattr(load_config([*NEEDED, *arguments]), name) == value


def test_every_setting_has_a_description() -> None:
    for name, field in JobConfig.model_fields.items():
        assert field.description, name
        assert len(field.description) > 10, name


def test_a_config_cannot_be_changed_and_refuses_what_it_does_not_know() -> None:
    config = JobConfig(manifest=["m"], output="o")
    with pytest.raises(ValidationError, match="frozen"):
        config.output = "other"
    with pytest.raises(ConfigError, match="there is no setting scorethreshold; did you mean score_threshold"):
        JobConfig(manifest=["m"], output="o", scorethreshold=0.5)
    with pytest.raises(ConfigError, match="manifest should have at least 1 item"):
        JobConfig(manifest=[], output="o")


def test_a_request_and_a_labelling_share_no_setting_and_are_json() -> None:
    config = JobConfig(manifest=["m"], output="o", rename={"a": "uri"}, image_mean=(0, 0, 0))
    assert config.request_settings().keys() == set(REQUEST_SETTINGS)
    assert config.labelling_settings().keys() == set(LABELLING_SETTINGS)
    assert not set(REQUEST_SETTINGS) & set(LABELLING_SETTINGS)
    assert config.labelling_settings()["image_mean"] == [0.0, 0.0, 0.0]  # as it comes back from labelling.json


def test_a_column_named_by_its_own_flag_is_the_same_request_as_a_rename() -> None:
    by_flag = load_config([*NEEDED, "--uri-column", "path", "--image-id-column", "id", "--rename", "row=line"])
    by_rename = load_config([*NEEDED, "--rename", "path=uri,id=image_id,row=line"])
    assert by_flag.renames == by_rename.renames == {"path": "uri", "id": "image_id", "row": "line"}
    assert by_flag.request_settings() == by_rename.request_settings()
    plain, spelled_out = load_config(NEEDED), load_config([*NEEDED, "--uri-column", "uri"])
    assert plain.request_settings() == spelled_out.request_settings()


def test_flags_and_the_class_give_the_same_config() -> None:
    assert load_config(NEEDED) == JobConfig(manifest=["m.parquet"], output="out")


def test_a_column_renamed_to_its_own_name_is_no_other_request() -> None:
    plain = JobConfig(manifest=["m"], output="o")
    assert JobConfig(manifest=["m"], output="o", rename={"a": "a"}).request_settings() == plain.request_settings()


@pytest.mark.parametrize("uri", ["s3://user:hunter2@bucket/m.parquet", "https://host/m.parquet?token=hunter2"])
def test_a_uri_in_the_wrong_place_is_shown_without_its_secret(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_a_flag, of_another_flag = refusal([*NEEDED, uri]), refusal([*NEEDED, "--limit", uri])
    monkeypatch.setenv("FCOS_RAY_MANIFEST", uri)  # wants JSON
    for message in (without_a_flag, of_another_flag, refusal(["--output", "out"])):
        assert "m.parquet" in message
        assert "hunter2" not in message


CONTRADICTIONS = {
    "--select all,new": "select all takes the others in, got all, new; give it alone",
    "--select new --check-changed": "check_changed wants changed among select, got new",
    "--tombstones --limit 5": "tombstones wants the whole manifest, got limit 5",
    "--select newest": "select",
    "--if-running maybe": "if_running",
}


@pytest.mark.parametrize("arguments", CONTRADICTIONS)
def test_selections_that_contradict_themselves_are_refused(arguments: str) -> None:
    assert CONTRADICTIONS[arguments] in refusal([*NEEDED, *arguments.split()])


def test_the_order_of_a_selection_is_no_other_request() -> None:
    one, other = (load_config([*NEEDED, "--select", text]) for text in ("new,failed", "failed,new,failed"))
    assert one.request_settings() == other.request_settings()
    assert one.request_settings() != load_config(NEEDED).request_settings()


def test_every_pixel_and_a_part_of_them_contradict() -> None:
    with pytest.raises(ConfigError, match="exact_resize wants every pixel, and fast_decode leaves most of them out"):
        JobConfig(manifest=["m.csv"], output="out", exact_resize=True, fast_decode=True)


def test_a_labelling_of_before_fast_decoding_is_the_same_without_it() -> None:
    plain = JobConfig(manifest=["m.csv"], output="out").labelling_settings()
    assert "fast_decode" not in plain
    assert JobConfig(manifest=["m.csv"], output="out", fast_decode=True).labelling_settings() == plain | {
        "fast_decode": True
    }
