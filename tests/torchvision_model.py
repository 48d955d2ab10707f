"""torchvision's own fcos_resnet50_fpn with given weights: what the project's detector is held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from fcos_ray.model.parameters import Weights


def torchvision_model(
    weights: Weights, norm_layer: Callable[..., nn.Module] = FrozenBatchNorm2d, **settings: Any
) -> FCOS:
    """In eval mode; by default built as torchvision does for trained weights. `settings` are FCOS's own."""
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50",
        weights=None,
        norm_layer=norm_layer,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    model = FCOS(backbone, weights.num_classes, **settings).eval()
    # not strict: BatchNorm2d counts batches, which no weights do
    model.load_state_dict({key: torch.tensor(value) for key, value in weights.state.items()}, strict=False)
    return model
