"""Every setting of a job, once: names, ranges, meanings. TOML keys, environment variables, flags and --help follow.

Precedence: flag, then `FCOS_RAY_<NAME>`, then the TOML file of --config, then the default.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliSettingsSource,
    CliSuppress,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from fcos_ray.errors import ConfigError

Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Triple = tuple[float, float, float]

ENV_PREFIX = "FCOS_RAY_"
# Settings that change what comes out for an image: written to labelling.json, shared by all runs on an output.
LABELLING_SETTINGS = (
    "min_size", "max_size", "image_mean", "image_std", "score_threshold", "nms_threshold", "max_detections",
    "topk_candidates", "exact_resize", "precision",
)  # fmt: skip
# Settings that, with the sources, make a request: another request on the same output is another run.
REQUEST_SETTINGS = ("partition_by", "columns", "rename", "limit", "drop_duplicates", "refused_uris")


class JobConfig(BaseModel):
    """Frozen, validated settings of one job. Raises ConfigError: which setting, what was wanted, what came."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # What to label, and where the result goes
    manifest: list[str] = Field(
        min_length=1,
        description="Parquet, CSV, TSV, JSON, JSONL or text manifests; paths, s3:// uris, globs; repeatable",
    )
    output: str = Field(min_length=1, description="Folder or s3:// prefix that receives the labels")
    uri_column: Name | None = Field(None, description="Manifest column that holds the uris (default: uri)")
    image_id_column: Name | None = Field(
        None, description="Manifest column of stable names (default: image_id, else uri)"
    )
    partition_by: list[str] = Field(
        [], description="Columns that become Hive partitions; also year:, month: or date:<column of times>, in UTC"
    )
    columns: list[str] | None = Field(None, description="Manifest columns to carry into the output (default: all)")
    rename: dict[str, str] = Field({}, description="Rename manifest columns, old=new, where names clash")
    limit: Positive | None = Field(None, description="Only the first N manifest rows")
    drop_duplicates: bool = Field(False, description="Keep the first row of a doubled image_id instead of refusing")
    refused_uris: Literal["stop", "error"] = Field(
        "stop", description="Uris that may not be read: stop before any work, or make them error rows"
    )
    allow_root: list[str] = Field(
        [], description="Local folders below which images may be read (default: the folder of a local manifest)"
    )
    shard_rows: Annotated[int, Field(ge=1, le=32_768)] | None = Field(
        None, description="Rows per output file (default: rows/500, from 64 to 32,768)"
    )
    max_files: CliSuppress[Positive] = Field(100_000, description="Refuse a plan with more output files than this")

    # The model
    weights: str = Field("COCO_V1", description="COCO_V1, a .pth or .safetensors path or uri, or random:<seed>")
    num_classes: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Classes with background, where the weights file does not say"
    )
    categories: list[str] | None = Field(None, description="Names of the labels, comma-separated, or a file of lines")
    min_size: Positive = Field(800, description="Shorter side of the model's input, pixels")
    max_size: Positive = Field(1333, description="Longer side of the model's input at most, pixels")
    image_mean: CliSuppress[Triple] = Field((0.485, 0.456, 0.406), description="Subtracted per channel, of 0–1 values")
    image_std: CliSuppress[Triple] = Field((0.229, 0.224, 0.225), description="Divided by per channel, of 0–1 values")
    score_threshold: Fraction = Field(0.2, description="Keep detections with a higher score")
    nms_threshold: Fraction = Field(0.6, description="Overlap (IoU) above which the lower score goes")
    max_detections: Positive = Field(100, description="Detections per image at most")
    topk_candidates: CliSuppress[Positive] = Field(1000, description="Candidates per feature level before NMS")
    exact_resize: bool = Field(
        False,
        description="Ship full-size pixels to the detector instead of shrinking on the CPU workers (slower, exact)",
    )
    precision: CliSuppress[Literal["fp32"]] = Field("fp32", description="Arithmetic of the model")

    # The stages
    device: Literal["cpu", "cuda"] | None = Field(
        None, description="Where detectors run (default: cuda where the cluster has GPUs, else cpu)"
    )
    num_detectors: Positive | None = Field(
        None, description="Detectors at most (default: as many as the cluster holds)"
    )
    gpus_per_detector: Annotated[float, Field(ge=0, le=8)] | None = Field(
        None, description="GPUs each detector reserves (default: 1 with --device cuda, else 0)"
    )
    load_cpus: Annotated[float, Field(gt=0)] | None = Field(
        None, description="CPUs the load stage may use at once (default: what detectors leave)"
    )
    max_micro_batch: CliSuppress[Positive | None] = Field(
        None, description="Images of one shape in a forward pass at most (default: 1 on cpu, 16 on cuda)"
    )

    # One image
    fetch_timeout_seconds: CliSuppress[Seconds] = Field(30.0, description="One attempt to read an image")
    fetch_deadline_seconds: CliSuppress[Seconds] = Field(120.0, description="All attempts to read an image")
    fetch_max_attempts: CliSuppress[Annotated[int, Field(ge=1, le=10)]] = Field(
        10, description="Attempts to read an image; only transient failures are tried again"
    )
    fetch_concurrency: CliSuppress[Positive] = Field(32, description="Images one load task fetches at once")
    max_image_bytes: CliSuppress[Positive] = Field(256 * 2**20, description="Larger files become error rows")
    max_pixels: CliSuppress[Positive] = Field(178_956_970, description="Larger images become error rows")
    decode_deadline_seconds: CliSuppress[Seconds] = Field(20.0, description="Decoding one image")
    decode_memory_bytes: CliSuppress[Annotated[int, Field(ge=256 * 2**20)]] = Field(
        2 * 2**30, description="Memory of the process that decodes"
    )

    # The run
    max_transient_fraction: CliSuppress[Fraction] = Field(
        0.1, description="A shard with a larger share of transient errors is not committed but tried later"
    )
    max_rounds: CliSuppress[Positive] = Field(
        5, description="Executions over missing shards without progress, then stop"
    )
    round_wait_seconds: CliSuppress[Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        15.0, description="Wait before the first execution over missing shards; doubles up to 8 times this"
    )
    stall_seconds: CliSuppress[Seconds] = Field(900.0, description="No progress for so long ends an execution")
    max_error_fraction: Fraction | None = Field(None, description="Exit with 3 when more of the rows are errors")
    dry_run: bool = Field(False, description="Plan, print what would be done, and end")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_explain(error)) from error

    @model_validator(mode="after")
    def _sizes_are_ordered(self) -> JobConfig:
        if self.max_size < self.min_size:
            raise ValueError(f"max_size must be at least min_size ({self.min_size}), got {self.max_size}")
        return self

    @model_validator(mode="after")
    def _columns_have_one_name(self) -> JobConfig:
        named = {"uri_column": self.uri_column, "image_id_column": self.image_id_column}
        for setting, column in named.items():
            target = setting.removesuffix("_column")
            clash = next(
                ((old, new) for old, new in self.rename.items() if column and (old == column or new == target)), None
            )
            if clash:
                raise ValueError(f"{setting} {column} and rename {clash[0]}={clash[1]} contradict; give one of them")
        if self.uri_column is not None and self.uri_column == self.image_id_column:
            raise ValueError(f"uri_column and image_id_column are both {self.uri_column}; leave image_id_column out")
        return self

    @property
    def renames(self) -> dict[str, str]:
        """What manifest columns are called from here on: `rename`, uri_column and image_id_column in one."""
        named = {self.uri_column: "uri", self.image_id_column: "image_id"}
        return self.rename | {old: new for old, new in named.items() if old is not None and old != new}

    def labelling_settings(self) -> dict[str, Any]:
        """The settings that change a result, as JSON values."""
        return self.model_dump(mode="json", include=set(LABELLING_SETTINGS))

    def request_settings(self) -> dict[str, Any]:
        """The settings that make a request, as JSON values; however a column was renamed, it is one request."""
        return self.model_dump(mode="json", include=set(REQUEST_SETTINGS)) | {"rename": self.renames}


class _OutsideConfig(JobConfig, BaseSettings):
    """Label every image of a manifest with torchvision's FCOS on Ray: partitioned Parquet, every row exactly once.

    Killed anywhere, the same command goes on. Settings not shown here (fcos_ray/config.py has them) are flags too.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=ENV_PREFIX,
        cli_prog_name="jobs/detect.py",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_exit_on_error=False,
    )
    config: Path | None = Field(None, description="TOML file with any of these settings (underscores for dashes)")

    def __init__(self, **values: Any) -> None:
        BaseSettings.__init__(self, **values)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the base class names it
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """After the flags: the environment, then the file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


class _HelpFormatter(argparse.HelpFormatter):
    """Without the defaults that say nothing: null, [] and {}."""

    def _expand_help(self, action: argparse.Action) -> str:
        return re.sub(r" \(default: (null|\[\]|\{\})\)$", "", super()._expand_help(action))


def load_config(arguments: list[str]) -> JobConfig:
    """The settings of a command line, with environment and TOML behind it. Raises ConfigError; --help exits with 0."""

    class WithFile(_OutsideConfig):
        __doc__ = _OutsideConfig.__doc__
        model_config = SettingsConfigDict(toml_file=_config_file(arguments))

    flags: CliSettingsSource[Any] = CliSettingsSource(WithFile, formatter_class=_HelpFormatter)
    try:
        outside = CliApp.run(WithFile, cli_args=arguments, cli_settings_source=flags)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error
    except SettingsError as error:
        raise ConfigError(_explain_flags(str(error), arguments)) from error
    return JobConfig(**outside.model_dump(exclude={"config"}))


def _config_file(arguments: list[str]) -> Path | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", type=Path, default=os.environ.get(f"{ENV_PREFIX}CONFIG"))
    try:
        path: Path | None = parser.parse_known_args(arguments)[0].config
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from error
    if path is None:
        return None
    try:
        tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not TOML: {error}") from error
    return path


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"]).split(".")[0]
        if problem["type"] == "extra_forbidden":
            lines.append(_unknown(name))
        elif problem["type"] == "missing" and len(problem["loc"]) == 1:
            field = JobConfig.model_fields[name]
            lines.append(f"{name} is missing: {field.description} (--{name.replace('_', '-')}, or {name} = … in TOML)")
        else:
            message = re.sub(r"^(Value error,|Input|String|List) ", "", problem["msg"])
            if problem["type"] == "missing":  # within a setting that holds several values
                message = "has too few values"
            lines.append(f"{name} {message}, got {problem['input']!r}" if name else message)
    return "; ".join(dict.fromkeys(lines))


def _explain_flags(message: str, arguments: list[str]) -> str:
    known = {f"--{name.replace('_', '-')}" for name in _OutsideConfig.model_fields}
    for argument in arguments:
        flag = argument.split("=")[0]
        if flag.startswith("--") and flag not in known and flag.replace("--no-", "--", 1) not in known:
            return _unknown(flag.removeprefix("--"), flag=True)
    if found := re.search(r"Parsing error encountered for (\w+)", message):
        shape = "old=new" if found[1] == "rename" else "values with commas between, or a JSON list"
        return f"--{found[1].replace('_', '-')} wants {shape}"
    if found := re.search(r'value for field "(\w+)" from source "EnvSettingsSource"', message):
        name = f"{ENV_PREFIX}{found[1].upper()}"
        shape = '{"old": "new"}' if found[1] == "rename" else '["a", "b"]'
        return f"{name} wants JSON such as {shape}, got {os.environ.get(name)!r}"
    return message.removeprefix("error parsing CLI: ")


def _unknown(name: str, *, flag: bool = False) -> str:
    """Words for a setting that is not there; `name` as it was written, without the dashes before a flag."""
    known = [field.replace("_", "-") if flag else field for field in _OutsideConfig.model_fields]
    dashes = "--" if flag else ""
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {dashes}{nearest[0]}?" if nearest else "; --help lists the settings"
    return f"there is no setting {dashes}{name}{hint}"
