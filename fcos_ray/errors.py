"""Every error this project raises on purpose.

FcosRayError
├── UserError              what the user gave is wrong (settings, manifest, weights, output, truth): say so and end (exit 2)
│   ├── ConfigError
│   ├── ManifestError
│   ├── WeightsError
│   ├── OutputError
│   └── EvaluationError
├── ImageError             one image failed: `load.py` or `pipeline.py` turns it into an error row
│   ├── FetchError
│   ├── DecodeError
│   └── DetectError
├── StageStalled           nothing moved through the stages; another execution may do better
├── WorkerError            a process on some node could not do its work; nothing is known to be wrong with the request
├── StorageError           a store did not do what was asked, after retries; the request itself is not known to be wrong
└── RunStopped             rows are missing, the same command goes on (exit 4)
"""

from __future__ import annotations

from typing import ClassVar, Final, Literal

Stage = Literal["fetch", "decode", "detect"]

# code -> (stage, transient, meaning). A closed list: README prints it, tests hold every error row against it.
ERROR_CODES: Final[dict[str, tuple[Stage, bool, str]]] = {
    "uri_refused": ("fetch", False, "the uri may not be read under the settings (scheme, root, host, or malformed)"),
    "not_found": ("fetch", False, "no such object or file"),
    "forbidden": ("fetch", False, "the store denies reading it"),
    "not_a_file": ("fetch", False, "a folder, device or pipe"),
    "too_large": ("fetch", False, "more bytes than max_image_bytes"),
    "fetch_refused": ("fetch", False, "the store answers that it will not do this, and trying again changes nothing"),
    "fetch_timeout": ("fetch", True, "not read within fetch_deadline_seconds, while the store answered"),
    "fetch_failed": ("fetch", True, "every attempt at it failed, while the store answered"),
    "store_unavailable": ("fetch", True, "its store did not answer; committed only if max_transient_fraction is 1"),
    "empty": ("decode", False, "zero bytes"),
    "unknown_format": ("decode", False, "not a JPEG, PNG, WEBP, GIF, BMP or TIFF file"),
    "corrupt": ("decode", False, "truncated or damaged"),
    "too_many_pixels": ("decode", False, "more pixels than max_pixels"),
    "decode_timeout": ("decode", False, "not decoded within decode_deadline_seconds"),
    "decode_memory": ("decode", False, "decoding needs more than decode_memory_bytes"),
    "decode_crash": ("decode", False, "the decoder's process died"),
    "image_too_thin": ("detect", False, "a side would be resized to zero pixels; torchvision raises on it too"),
    "out_of_memory": ("detect", False, "the device's memory does not hold this image alone"),
}


class FcosRayError(Exception):
    """Base of everything raised on purpose."""


class UserError(FcosRayError):
    """Something the user gave is wrong. The message says what was wanted, what came and what to do."""


class ConfigError(UserError):
    """A setting is unknown or out of range."""


class ManifestError(UserError):
    """A manifest cannot be read or cannot be planned."""


class WeightsError(UserError):
    """Weights cannot be found, or do not fit the model."""


class OutputError(UserError):
    """The output cannot be written, or belongs to another labelling."""


class EvaluationError(UserError):
    """The truth cannot be read, or does not fit what a job wrote."""


class ImageError(FcosRayError):
    """One image failed. `code` is a key of ERROR_CODES that belongs to the class's stage."""

    stage: ClassVar[Stage]

    def __init__(self, code: str, message: str) -> None:
        assert ERROR_CODES[code][0] == self.stage, f"{code} is no {self.stage} code"
        super().__init__(code, message)  # both, so that pickling restores it
        self.code = code
        self.message = message

    @property
    def transient(self) -> bool:
        """A later run may succeed."""
        return ERROR_CODES[self.code][1]

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class FetchError(ImageError):
    stage = "fetch"


class DecodeError(ImageError):
    stage = "decode"


class DetectError(ImageError):
    stage = "detect"


class StorageError(FcosRayError):
    """A store failed after retries. Nothing was lost: what was to be written is not known to exist."""


class StageStalled(FcosRayError):
    """Nothing moved through the stages for too long. The message says who had which images."""


class WorkerError(FcosRayError):
    """A process on some node could not do its work: short of memory, say. Another try, elsewhere, may."""


class RunStopped(FcosRayError):
    """The run ends with rows missing. The same command goes on where it stopped."""
