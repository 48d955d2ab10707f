"""Every setting of a training, once: names, ranges, meanings. Flags, TOML, environment and --help follow (settings.py)."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fcos_ray.settings import Fraction, Positive, Settings, Sha256, Triple, load_settings

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

# Settings that may differ when a training goes on: they change where and how it runs and is measured, not what it learns.
FREE_SETTINGS = (
    "output", "weights_sha256", "annotations", "images", "val_annotations", "val_images", "device", "num_threads",
    "save_every_steps", "progress", "max_skipped_fraction", "score_threshold", "nms_threshold", "max_detections",
    "topk_candidates",
)  # fmt: skip


class TrainConfig(Settings):
    """Train an FCOS on COCO-format truth: torchvision's model in training mode, its three losses, one process.

    Killed anywhere, the same command goes on from the last saved state.
    """

    # What to learn from, and where the weights go
    annotations: str = Field(min_length=1, description="COCO-format JSON: images, annotations, categories")
    images: str | None = Field(
        None, min_length=1, description="Folder or prefix of its file names (default: where the JSON lies)"
    )
    output: str = Field(min_length=1, description="Folder or s3:// prefix: saved states, then weights.safetensors")
    val_annotations: str | None = Field(None, min_length=1, description="COCO-format JSON to measure mAP on at the end")
    val_images: str | None = Field(
        None, min_length=1, description="Folder or prefix of its file names (default: likewise)"
    )
    empty_images: Literal["keep", "drop"] = Field("keep", description="Images without a box: background, or left out")
    max_skipped_fraction: Fraction = Field(0.1, description="Stop when more of the images cannot be used")
    min_box_side: NotNegative = Field(1.0, description="Boxes with a shorter side are left out, pixels")

    # The model
    architecture: str = Field("fcos_resnet50_fpn", description="fcos_resnet50_fpn or fcos_mobilenet_v3_small_fpn")
    weights: str | None = Field(None, description="Start from these: COCO_V1, a .pth or .safetensors path or uri")
    weights_sha256: Sha256 | None = Field(
        None, description="Refuse weights whose file has another hash; nothing is parsed from it before"
    )
    weights_backbone: str | None = Field(
        None, description="Start from this backbone: IMAGENET1K_V1 (or another name of torchvision's), without weights"
    )
    trainable_backbone_layers: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Backbone stages that learn, from the last (default: 3 of pretrained ones, else all)"
    )
    num_classes: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Classes with background (default: the truth's categories and one)"
    )
    progress: bool = Field(True, description="Show the progress of a download")
    min_size: Positive | None = Field(None, description="Shorter side of the input, pixels (default: architecture's)")
    max_size: Positive | None = Field(None, description="Longer side at most, pixels (default: architecture's)")
    image_mean: Triple | None = Field(None, description="Subtracted per channel, of 0–1 values (default: ImageNet's)")
    image_std: Triple | None = Field(None, description="Divided by per channel, of 0–1 values (default: ImageNet's)")
    center_sampling_radius: Rate = Field(1.5, description="Places this many strides from a box's centre are positive")
    score_threshold: Fraction = Field(0.2, description="For measuring: keep detections with a higher score")
    nms_threshold: Fraction = Field(0.6, description="For measuring: overlap above which the lower score goes")
    max_detections: Positive = Field(100, description="For measuring: detections per image at most")
    topk_candidates: Positive = Field(1000, description="For measuring: candidates per level before NMS")

    # The recipe
    epochs: Positive = Field(12, description="Times every image is seen")
    batch_size: Positive = Field(8, description="Images per step")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="SGD with momentum, or AdamW")
    learning_rate: Rate = Field(0.005, description="At its highest, after the warm-up")
    momentum: Fraction = Field(0.9, description="Of SGD")
    weight_decay: NotNegative = Field(1e-4, description="Not applied to norms and biases")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(500, description="Steps of linear rise; then a cosine to zero")
    clip_norm: Rate | None = Field(None, description="Longest gradient; longer ones are cut")
    horizontal_flip: Fraction = Field(0.5, description="Probability that an image is mirrored")
    scale_jitter: tuple[Rate, Rate] = Field((1.0, 1.0), description="Range of the factor on min_size and max_size")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="Arithmetic of the forward pass (bf16: autocast)")
    seed: Annotated[int, Field(ge=0, le=2**31)] = Field(
        0, description="Same seed, same data, same machine: same weights"
    )

    # The process
    device: Literal["cpu", "cuda"] | None = Field(None, description="Default: cuda where there is one, else cpu")
    num_threads: Positive = Field(2, description="Threads that read and decode images ahead")
    save_every_steps: Positive = Field(200, description="Steps between saved states")

    @model_validator(mode="after")
    def _fits_together(self) -> TrainConfig:
        if self.weights is not None and self.weights_backbone is not None:
            raise ValueError("weights and weights_backbone exclude each other: weights hold a backbone already")
        if self.weights_sha256 is not None and self.weights is None:
            raise ValueError("weights_sha256 is the hash of weights; give weights too, or leave it out")
        if self.scale_jitter[0] > self.scale_jitter[1]:
            raise ValueError(f"scale_jitter wants the smaller factor first, got {self.scale_jitter}")
        if self.min_size is not None and self.max_size is not None and self.max_size < self.min_size:
            raise ValueError(f"max_size must be at least min_size ({self.min_size}), got {self.max_size}")
        for name in ("image_mean", "image_std"):
            values = getattr(self, name) or (1.0,)
            if not all(math.isfinite(value) for value in values):
                raise ValueError(f"{name} must be three numbers, for R, G and B, got {values!r}")
            if name == "image_std" and min(values) <= 0:
                raise ValueError(f"image_std must be above 0, got {values!r}")
        return self

    def recipe(self) -> dict[str, Any]:
        """The settings that change what is learnt, as JSON values."""
        return self.model_dump(mode="json", exclude=set(FREE_SETTINGS))


def load_train_config(arguments: list[str]) -> TrainConfig:
    """The settings of a command line, with environment and TOML behind it. Raises ConfigError; --help exits with 0."""
    return load_settings(TrainConfig, arguments, program="jobs/train.py", env_prefix="FCOS_RAY_TRAIN_")
