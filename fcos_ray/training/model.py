"""Model: settings -> a torchvision FCOS in training mode, from nothing, from a backbone's weights or from a detector's.

As torchvision's `fcos_resnet50_fpn(weights, weights_backbone, trainable_backbone_layers, num_classes, progress)` builds
it: BatchNorm2d and every layer learning from nothing; FrozenBatchNorm2d and the last stages learning from weights.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import WeightsEnum
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d

from fcos_ray import storage
from fcos_ray.errors import ConfigError, WeightsError
from fcos_ray.model.architectures import ARCHITECTURES, Architecture, train_layers
from fcos_ray.model.parameters import INPUT_SETTINGS, Weights, input_settings
from fcos_ray.model.weights import BACKGROUND, load_weights
from fcos_ray.training.config import TrainConfig
from fcos_ray.training.truth import Truth

log = logging.getLogger(__name__)

_LABEL_LAYER = tuple(f"head.classification_head.cls_logits.{part}" for part in ("weight", "bias"))
_SPARE = "N/A"  # name of a class that nothing is labelled with; torchvision's word
_TRAINED_LAYERS = 3  # torchvision's default of trainable_backbone_layers


@dataclass(frozen=True, slots=True)
class Start:
    """Where a training begins: a way to build the model, and what its labels mean."""

    config: TrainConfig
    architecture: Architecture
    weights: Weights | None
    backbone: WeightsEnum | None
    input: Mapping[str, Any]  # min_size, max_size, image_mean, image_std

    def labelled(self, truth: Truth) -> Truth:
        """The truth with the labels of the weights it starts from, where these know all of its categories.

        With another num_classes, or a category that they do not know, labels stay the truth's own: the classification
        layer is made anew.
        """
        known = self.weights.categories[1:] if self.weights is not None else ()
        if self.config.num_classes not in (None, len(known) + 1) or not set(truth.categories) <= set(known):
            return truth
        return truth.relabelled(known)

    def num_classes(self, truth: Truth) -> int:
        """Classes with background. Raises ConfigError when the truth has more than were asked for."""
        needed = len(truth.categories) + 1
        wanted = self.config.num_classes or needed
        if wanted < needed:
            raise ConfigError(
                f"num_classes must be at least {needed} (the truth's categories and background), got {wanted}"
            )
        return wanted

    def label_names(self, truth: Truth) -> tuple[str, ...]:
        spare = self.num_classes(truth) - 1 - len(truth.categories)
        return (BACKGROUND, *truth.categories, *(_SPARE for _ in range(spare)))

    def smallest_input(self) -> dict[str, int]:
        """min_size and max_size under the smallest factor of scale_jitter."""
        return {name: round(self.input[name] * self.config.scale_jitter[0]) for name in ("min_size", "max_size")}

    def build(self, truth: Truth) -> nn.Module:
        """The model for the labels of `truth`, on the CPU. New values come from torch's generator.

        Raises WeightsError when the backbone's weights cannot be had, ConfigError when num_classes is too small.
        """
        config = self.config
        pretrained = self.weights is not None or self.backbone is not None
        if not pretrained:
            log.warning("training from nothing (no weights, no weights_backbone): that takes many images and epochs")
        try:
            model = self.architecture.build(
                self.num_classes(truth),
                norm_layer=FrozenBatchNorm2d if pretrained else nn.BatchNorm2d,
                weights_backbone=self.backbone,
                progress=config.progress,
                **self.input,
                center_sampling_radius=config.center_sampling_radius,
            )
        except (OSError, RuntimeError, EOFError, UnpicklingError) as error:  # of a download, or of a damaged file
            if self.backbone is None:
                raise
            raise WeightsError(
                f"weights_backbone {config.weights_backbone} cannot be downloaded to torch.hub's cache or loaded from it "
                f"({storage.describe(error)}). Put {self.backbone.url} into {torch.hub.get_dir()}/checkpoints"
            ) from error
        if self.weights is not None:
            _load(model, self.weights, without=() if self._keeps_labels(truth) else _LABEL_LAYER)
            self._say_what_is_new(truth)
        generator: Any = model.anchor_generator
        generator.register_forward_pre_hook(_fp32_stand_ins)
        train_layers(model, config.architecture, self._num_layers(pretrained))
        return model

    def _keeps_labels(self, truth: Truth) -> bool:
        known = self.weights.categories if self.weights is not None else ()
        return truth.categories == known[1:] and self.num_classes(truth) == len(known)

    def _say_what_is_new(self, truth: Truth) -> None:
        assert self.weights is not None
        if self._keeps_labels(truth):
            return
        lacking = [name for name in truth.categories if name not in self.weights.categories]
        named = ", ".join(lacking[:5]) + (f" and {len(lacking) - 5} more" if len(lacking) > 5 else "")
        why = f"they lack {named}" if lacking else f"they have {self.weights.num_classes} classes"
        log.warning("weights %s: the classification layer is made anew, since %s", self.weights.name, why)

    def _num_layers(self, pretrained: bool) -> int:
        wanted, there = self.config.trainable_backbone_layers, len(self.architecture.stages)
        if not pretrained:
            if wanted not in (None, there):
                log.warning("trainable_backbone_layers %s: without weights every layer has to learn", wanted)
            return there
        return _TRAINED_LAYERS if wanted is None else wanted


def start_model(config: TrainConfig) -> Start:
    """Look up what a training starts from. Raises ConfigError and WeightsError."""
    architecture = ARCHITECTURES.get(config.architecture)
    if architecture is None:
        raise ConfigError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {config.architecture!r}")
    if (config.trainable_backbone_layers or 0) > len(architecture.stages):
        raise ConfigError(
            f"trainable_backbone_layers must be 0 to {len(architecture.stages)} for {config.architecture}, "
            f"got {config.trainable_backbone_layers}"
        )
    weights = load_weights(config.weights, sha256=config.weights_sha256) if config.weights is not None else None
    if weights is not None and weights.architecture != config.architecture:
        raise ConfigError(
            f"weights {weights.name} are for {weights.architecture}, architecture is {config.architecture}; "
            f"give --architecture {weights.architecture}"
        )
    asked = {name: getattr(config, name) for name in INPUT_SETTINGS}
    sizes = input_settings(config.architecture, weights.trained_input if weights else {}, asked)
    return Start(config, architecture, weights, _backbone(config.weights_backbone, architecture), sizes)


def _backbone(name: str | None, architecture: Architecture) -> WeightsEnum | None:
    if name is None:
        return None
    try:
        found: WeightsEnum = architecture.backbone_weights[name]
    except KeyError as error:
        known = ", ".join(architecture.backbone_weights.__members__)
        raise ConfigError(f"weights_backbone must be one of {known}, got {storage.without_secrets(name)!r}") from error
    return found


def _load(model: nn.Module, weights: Weights, *, without: Sequence[str]) -> None:
    state = {key: torch.tensor(value) for key, value in weights.state.items() if key not in without}
    model.load_state_dict(state, strict=False)  # weights are checked when they are loaded: only `without` is missing


def _fp32_stand_ins(_generator: nn.Module, inputs: tuple[ImageList, list[Tensor]]) -> tuple[ImageList, list[Tensor]]:
    """Anchors take shape and type from the features, and bf16 counts pixels in eights above 1024."""
    images, features = inputs
    pixel = images.tensors.new_empty((), dtype=torch.float32)
    return images, [pixel.expand(level.shape) for level in features]
