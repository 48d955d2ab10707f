"""Every setting of a job, once: names, ranges, meanings. TOML keys, environment variables, flags and --help follow.

settings.py has the precedence and the words for what is wrong.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_settings import CliSuppress

from fcos_ray.settings import Fraction, Positive, Seconds, Settings, Sha256, Triple, load_settings

Select = Literal["new", "changed", "failed", "failed:all", "all"]
Name = Annotated[str, Field(min_length=1)]

# Settings that change what comes out for an image: written to labelling.json, shared by all runs on an output.
LABELLING_SETTINGS = (
    "min_size", "max_size", "image_mean", "image_std", "score_threshold", "nms_threshold", "max_detections",
    "topk_candidates", "exact_resize", "precision",
)  # fmt: skip
# Settings that, with the sources, make a request: another request on the same output is another run.
REQUEST_SETTINGS = (
    "partition_by", "columns", "rename", "limit", "drop_duplicates", "refused_uris", "select", "tombstones",
)  # fmt: skip


class JobConfig(Settings):
    """Label every image of a manifest with torchvision's FCOS on Ray: partitioned Parquet, every row exactly once.

    Killed anywhere, the same command goes on. Settings not shown here (fcos_ray/config.py has them) are flags too.
    """

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
    select: list[Select] = Field(
        ["new", "changed"],
        min_length=1,
        description="What of the manifest to label, given what this output's runs have labelled: new, changed, failed "
        "(transient errors), failed:all (any error), or all",
    )
    check_changed: CliSuppress[bool] = Field(
        False, description="Ask the store whether images changed, one request each, instead of the manifest alone"
    )
    tombstones: CliSuppress[bool] = Field(
        False,
        description="Mark images deleted that were labelled and are no longer in the manifest, which must be whole",
    )
    max_tombstone_fraction: CliSuppress[Fraction] = Field(
        0.1, description="Refuse a manifest in which a larger share of the labelled images is no more"
    )
    allow_root: list[str] = Field(
        [], description="Local folders below which images may be read (default: the folder of a local manifest)"
    )
    allow_http: bool = Field(False, description="Also read http:// and https:// images")
    allow_private_hosts: CliSuppress[bool] = Field(
        False, description="Let http(s) images come from private, loopback and link-local addresses"
    )
    shard_rows: Annotated[int, Field(ge=1, le=32_768)] | None = Field(
        None, description="Rows per output file (default: rows/500, from 64 to 32,768)"
    )
    max_files: CliSuppress[Positive] = Field(100_000, description="Refuse a plan with more output files than this")

    # The model
    weights: str = Field(
        "COCO_V1", description="COCO_V1, a .pth or .safetensors path or uri, sample (drawn shapes), or random:<seed>"
    )
    weights_sha256: CliSuppress[Sha256 | None] = Field(
        None, description="Refuse weights whose file has another hash; nothing is parsed from it before"
    )
    num_classes: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Classes with background, where the weights file does not say"
    )
    categories: list[str] | None = Field(None, description="Names of the labels, comma-separated, or a file of lines")
    min_size: Positive | None = Field(
        None, description="Shorter side of the model's input, pixels (default: as trained, else 800)"
    )
    max_size: Positive | None = Field(
        None, description="Longer side of the model's input at most, pixels (default: as trained, else 1333)"
    )
    image_mean: CliSuppress[Triple | None] = Field(
        None, description="Subtracted per channel, of 0–1 values (default: as trained, else ImageNet's)"
    )
    image_std: CliSuppress[Triple | None] = Field(
        None, description="Divided by per channel, of 0–1 values (default: as trained, else ImageNet's)"
    )
    score_threshold: Fraction = Field(0.2, description="Keep detections with a higher score")
    nms_threshold: Fraction = Field(0.6, description="Overlap (IoU) above which the lower score goes")
    max_detections: Positive = Field(100, description="Detections per image at most")
    topk_candidates: CliSuppress[Positive] = Field(1000, description="Candidates per feature level before NMS")
    exact_resize: bool = Field(
        False,
        description="Ship full-size pixels to the detector instead of shrinking on the CPU workers (slower, exact)",
    )
    fast_decode: CliSuppress[bool] = Field(
        False,
        description="Decode large JPEGs at 1/2, 1/4 or 1/8, never below the model's size: faster, and a little off",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="Arithmetic of the model, for the whole output; a node that cannot do it natively is an error",
    )

    # The stages
    device: Literal["cpu", "cuda"] | None = Field(
        None, description="Where detectors run (default: cuda where the cluster has GPUs, else cpu)"
    )
    num_detectors: Positive | None = Field(
        None, description="Detectors at most (default: as many as the cluster holds)"
    )
    gpus_per_detector: CliSuppress[Annotated[float, Field(ge=0, le=8)] | None] = Field(
        None, description="GPUs each detector reserves (default: 1 with --device cuda, else 0)"
    )
    load_cpus: CliSuppress[Annotated[float, Field(gt=0)] | None] = Field(
        None, description="CPUs the load stage may use at once (default: what detectors leave)"
    )
    max_micro_batch: CliSuppress[Positive | None] = Field(
        None, description="Images of one shape in a forward pass at most (default: 1 on cpu, 16 on cuda)"
    )

    # One image
    fetch_timeout_seconds: CliSuppress[Seconds] = Field(30.0, description="One attempt to read an image")
    fetch_deadline_seconds: CliSuppress[Seconds] = Field(
        120.0, description="All attempts to read an image, before the store is asked whether it answers at all"
    )
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
    if_running: CliSuppress[Literal["join", "wait", "exit"]] = Field(
        "join", description="When another driver is at work on an open run: share the work, wait for it, or end with 0"
    )
    max_transient_fraction: CliSuppress[Fraction] = Field(
        0.1,
        description="A shard with a larger share of transient errors is not committed but tried later; below 1, nor is one "
        "with any row whose store did not answer",
    )
    max_rounds: CliSuppress[Positive] = Field(
        5, description="Executions over missing shards without progress, then stop"
    )
    round_wait_seconds: CliSuppress[Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        15.0, description="Wait before the first execution over missing shards; doubles up to 8 times this"
    )
    stall_seconds: CliSuppress[Seconds] = Field(
        900.0, description="When nothing moves for so long, what is missing is begun again"
    )
    grace_seconds: CliSuppress[Seconds] = Field(
        25.0, description="After SIGTERM or Ctrl-C whole shards are committed; then, or after so long, the process ends"
    )
    max_error_fraction: Fraction | None = Field(None, description="Exit with 3 when more of the rows are errors")
    dry_run: bool = Field(False, description="Plan, print what would be done, and end")
    explain: Name | None = Field(
        None, description="Plan, say why the image with this image_id would be labelled or not, and end"
    )

    @model_validator(mode="after")
    def _sizes_are_ordered(self) -> JobConfig:
        if self.min_size is not None and self.max_size is not None and self.max_size < self.min_size:
            raise ValueError(f"max_size must be at least min_size ({self.min_size}), got {self.max_size}")
        return self

    @model_validator(mode="after")
    def _resizing_is_one_way(self) -> JobConfig:
        if self.exact_resize and self.fast_decode:
            raise ValueError(
                "exact_resize wants every pixel, and fast_decode leaves most of them out; give one of them"
            )
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

    @model_validator(mode="after")
    def _selection_makes_sense(self) -> JobConfig:
        if len(self.select) > 1 and "all" in self.select:
            raise ValueError(f"select all takes the others in, got {', '.join(self.select)}; give it alone")
        if self.check_changed and not {"changed", "all"} & set(self.select):
            raise ValueError(f"check_changed wants changed among select, got {', '.join(self.select)}")
        if self.tombstones and self.limit is not None:
            raise ValueError(f"tombstones wants the whole manifest, got limit {self.limit}; leave one of them out")
        return self

    @property
    def renames(self) -> dict[str, str]:
        """What manifest columns are called from here on: `rename`, uri_column and image_id_column in one."""
        named = {self.uri_column: "uri", self.image_id_column: "image_id"}
        renames = self.rename | {old: new for old, new in named.items() if old is not None}
        return {old: new for old, new in renames.items() if old != new}

    def labelling_settings(self) -> dict[str, Any]:
        """The settings that change a result, as JSON values."""
        # Only where it is on: outputs of before it was a setting go on as they are.
        fast = {"fast_decode": True} if self.fast_decode else {}
        return self.model_dump(mode="json", include=set(LABELLING_SETTINGS)) | fast

    def request_settings(self) -> dict[str, Any]:
        """The settings that make a request, as JSON values; however a column was renamed, it is one request."""
        asked = self.model_dump(mode="json", include=set(REQUEST_SETTINGS))
        return asked | {"rename": self.renames, "select": sorted(set(self.select))}


def load_config(arguments: list[str]) -> JobConfig:
    """The settings of a command line, with environment and TOML behind it. Raises ConfigError; --help exits with 0."""
    return load_settings(JobConfig, arguments, program="jobs/detect.py", env_prefix="FCOS_RAY_")
