"""Label image corpora of any size with torchvision's FCOS on Ray.

Names are loaded on first use (`__init__.pyi` tells type checkers about them): the guarded decode child imports this
package and must not pay for torch or Ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Detections": "fcos_ray.types",
    "Detector": "fcos_ray.model.detector",
    "Image": "fcos_ray.types",
    "JobConfig": "fcos_ray.config",
    "LabelDataset": "fcos_ray.analysis.dataset",
    "RunSummary": "fcos_ray.summary",
    "decode": "fcos_ray.inputs.decode",
    "open_dataset": "fcos_ray.analysis.dataset",
    "run": "fcos_ray.job",
}

__version__ = "0.1.0"
__all__ = [
    "Detections",
    "Detector",
    "Image",
    "JobConfig",
    "LabelDataset",
    "RunSummary",
    "decode",
    "open_dataset",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fcos_ray' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
