"""What a Detector accepts: images, devices, settings. Knows the messages, not the model."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from fcos_ray.errors import ConfigError
from fcos_ray.types import Image

DEVICE_TYPES: Final = ("cpu", "cuda")
PRECISIONS: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# torch's names (2.14) of the instructions that compute in a type: two of x86, one of ARM
_NATIVE: Final = {"bf16": ("avx512_bf16", "amx_bf16", "bf16"), "fp16": ("avx512_fp16", "amx_fp16", "fp16_arith")}


def check_image(image: object, index: int) -> Image | Tensor:
    """The image; an array comes back as an Image. Raises ValueError naming what was wanted and what came."""
    if isinstance(image, Tensor):
        if image.ndim == 3 and image.shape[0] == 3 and image.is_floating_point() and image.numel() > 0:
            return image
        got = f"a {str(image.dtype).removeprefix('torch.')} tensor of shape {tuple(image.shape)}"
        raise ValueError(f"images[{index}]: a tensor must be float (3, H, W) in 0–1, as torchvision's, got {got}")
    pixels = image.pixels if isinstance(image, Image) else image
    if not isinstance(pixels, np.ndarray):
        raise ValueError(f"images[{index}] must be an array, an Image or a tensor, got {type(pixels).__name__}")
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
        raise ValueError(
            f"images[{index}]: an array must be RGB uint8 (H, W, 3), got {pixels.dtype} of shape {pixels.shape}"
        )
    return image if isinstance(image, Image) else Image(pixels, pixels.shape[0], pixels.shape[1])


def pick_device(name: str | None) -> torch.device:
    """The device of that name, by default cuda where there is one. Raises ConfigError."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device must be cpu, cuda or cuda:<n>, got {name!r}") from error
    if device.type not in DEVICE_TYPES:
        raise ConfigError(f"device must be cpu, cuda or cuda:<n>, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name} is not there: this process sees {torch.cuda.device_count()} CUDA devices")
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The type of that name. Raises ConfigError for an unknown one, or one that the device does not compute natively."""
    if name not in PRECISIONS:
        raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, got {name!r}")
    if name != "fp32" and not _is_native(name, device):
        raise ConfigError(
            f"precision {name} is not native on {platform.node()}: {_described(device)} would compute it in software. "
            "Use --precision fp32, or nodes that all can"
        )
    return PRECISIONS[name]


def _is_native(name: str, device: torch.device) -> bool:
    if device.type == "cuda":
        # without the flag emulation counts: True on a T4 (torch 2.14)
        return name == "fp16" or torch.cuda.is_bf16_supported(including_emulation=False)
    can = torch.cpu.get_capabilities()
    return any(can.get(instructions, False) for instructions in _NATIVE[name])


def _described(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"its CPU ({torch.cpu.get_capabilities().get('cpu_name', platform.machine())})"


def check_settings(
    *,
    counts: Mapping[str, int | None],
    shares: Mapping[str, float],
    channels: Mapping[str, Sequence[float] | None],
) -> None:
    """Raises ConfigError for a count below 1, a share outside [0, 1], or channels that are not three numbers.

    None stands for the default.
    """
    for name, count in counts.items():
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise ConfigError(f"{name} must be a whole number from 1, got {count!r}")
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ConfigError(f"{name} must lie in [0, 1], got {share!r}")
    for name, values in channels.items():
        if values is None:
            continue
        if len(values) != 3 or not all(math.isfinite(value) for value in values):
            raise ConfigError(f"{name} must be three numbers, for R, G and B, got {values!r}")
        if name == "image_std" and min(values) <= 0:
            raise ConfigError(f"image_std must be above 0, got {values!r}")
