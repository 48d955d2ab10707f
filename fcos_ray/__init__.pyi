from fcos_ray.analysis.dataset import LabelDataset as LabelDataset
from fcos_ray.analysis.dataset import open_dataset as open_dataset
from fcos_ray.config import JobConfig as JobConfig
from fcos_ray.inputs.decode import decode as decode
from fcos_ray.job import run as run
from fcos_ray.model.detector import Detector as Detector
from fcos_ray.summary import RunSummary as RunSummary
from fcos_ray.types import Detections as Detections
from fcos_ray.types import Image as Image

__version__: str
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
