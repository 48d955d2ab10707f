"""Label image corpora of any size with torchvision's FCOS on Ray.

Names are loaded on first use: the guarded decode child imports this package and must not pay for torch or Ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fcos_ray.config import JobConfig
    from fcos_ray.inputs.decode import decode
    from fcos_ray.job import RunSummary, run
    from fcos_ray.model.detector import Detector
    from fcos_ray.types import Detections, Image

_HOME = {
    "Detections": "fcos_ray.types",
    "Detector": "fcos_ray.model.detector",
    "Image": "fcos_ray.types",
    "JobConfig": "fcos_ray.config",
    "RunSummary": "fcos_ray.job",
    "decode": "fcos_ray.inputs.decode",
    "run": "fcos_ray.job",
}

__all__ = ["Detections", "Detector", "Image", "JobConfig", "RunSummary", "decode", "run"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fcos_ray' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
