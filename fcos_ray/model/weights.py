"""Weights: a name or uri -> parameters and categories, checked against the architecture. Knows files, not devices.

torch is imported where a file holds what only it reads: nothing else here needs the seconds that takes.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import pickle
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from fcos_ray import storage
from fcos_ray.errors import WeightsError
from fcos_ray.model.parameters import (
    DEFAULT_ARCHITECTURE,
    INPUT_SIZES,
    Weights,
    coco_v1,
    parameter_shapes,
    random_state,
)

log = logging.getLogger(__name__)

BACKGROUND: Final = "__background__"  # label 0, in torchvision's spelling
_SAMPLE: Final = Path(__file__).parent / "sample" / "weights.safetensors"  # recipe.toml beside it says how they came
_CLS_LOGITS: Final = "head.classification_head.cls_logits.weight"  # (num_classes, channels, 3, 3)
_METADATA: Final = "fcos_ray"  # key in a safetensors file's metadata: what the weights are, as JSON
# What torch.load raises on files that are no checkpoints, are damaged, or hold more than tensors and containers.
LOAD_ERRORS: Final = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, OverflowError,
)  # fmt: skip
_WANTED: Final = "wanted COCO_V1, sample, random:<seed>, or the path or uri of a .pth, .pt or .safetensors file"
_NO_DETECTOR: Final = (
    "are a classifier's, a backbone that cannot detect yet: train a detector on it "
    "(python jobs/train.py --weights-backbone …), or ask for random:<seed> to run an untrained one"
)


def load_weights(
    spec: str,
    *,
    num_classes: int | None = None,
    categories: Sequence[str] | None = None,
    sha256: str | None = None,
) -> Weights:
    """Load and check weights.

    `spec`: `COCO_V1` (or `DEFAULT`), torchvision's trained model, from the torch.hub cache or the network; `sample`, a
    small model in this package that finds the drawn shapes of sample.py;
    `random:<seed>`, an untrained model for tests that finds dozens of boxes, the same in every process; or the path or
    uri of a `.pth`/`.pt` state dict (or `{"model": state_dict}`) or a `.safetensors` file.
    `num_classes` counts the background, as in torchvision; it is checked against the file.
    `categories` names the labels 1…N-1, or 0…N-1 when the first is the background. Without it: what the file says, else
    COCO's for COCO_V1 and random weights of unsaid size, else class_1, class_2, …
    `sha256` is the hash that the file must have, in hex: nothing is parsed from other bytes.

    Raises WeightsError, and StorageError when a store fails after retries.
    """
    if spec in ("COCO_V1", "DEFAULT"):
        name, given = "COCO_V1", _Given(categories=coco_v1()[1])
        data = _checked(_read_coco(), name, sha256)
        state = _read_torch(data, name)
    elif spec == "sample":
        data, name = _checked(_SAMPLE.read_bytes(), spec, sha256), spec
        state, given = _read_safetensors(data, name)
    elif spec.startswith("random:"):
        if sha256 is not None:
            raise WeightsError(f"weights {spec} are drawn here and have no file whose sha256 could be {sha256}")
        return _random(spec, num_classes, categories)
    elif (suffix := PurePosixPath(spec).suffix) in (".pth", ".pt"):
        data, name, given = _checked(_read_file(spec), spec, sha256), spec, _Given()
        state = _read_torch(data, name)
    elif suffix == ".safetensors":
        data, name = _checked(_read_file(spec), spec, sha256), spec
        state, given = _read_safetensors(data, name)
    elif spec.startswith("IMAGENET"):
        raise WeightsError(f"weights {spec!r} {_NO_DETECTOR}")
    else:
        raise WeightsError(f"weights {storage.without_secrets(spec)!r} are unknown: {_WANTED}")
    if given.training is not None and given.training.get("steps") == 0:
        raise WeightsError(f"weights {name} are untrained (0 steps); train them, or ask for random:<seed> on purpose")
    found = _check_state(state, name, given.architecture)
    if num_classes is not None and num_classes != found:
        raise WeightsError(f"weights {name} have {found} classes with the background, but num_classes is {num_classes}")
    return Weights(
        name=name,
        architecture=given.architecture,
        sha256=hashlib.sha256(data).hexdigest(),
        categories=_complete(categories or given.categories, found, name),
        state={key: _as_float32(value) for key, value in state.items()},
        trained_input=given.trained_input,
        training=given.training,
    )


def save_weights(
    uri: str,
    state: Mapping[str, Any],
    *,
    architecture: str,
    categories: Sequence[str],
    trained_input: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write a `.safetensors` file that explains itself: a state of tensors or arrays, as float32. Equal input gives equal
    bytes. Categories as in `load_weights`.

    `trained_input` holds min_size, max_size, image_mean and image_std as trained with: what detectors take by default.
    `training` says how the weights came about. Both are JSON values.

    Raises WeightsError when the state does not fit the architecture, or another file is already there.
    """
    arrays = {key: _as_float32(value) for key, value in _of_predictions(state).items()}
    names = _complete(categories, _check_state(arrays, uri, architecture), uri)
    said = {
        "architecture": architecture,
        "categories": names,
        "trained_input": dict(trained_input or {}),
        "training": training,
    }
    # under one key: safetensors writes several in any order, and equal weights shall be equal bytes
    metadata = {_METADATA: json.dumps(said, ensure_ascii=False)}
    if not storage.create(uri, safetensors.numpy.save(arrays, metadata)):
        raise WeightsError(f"{uri} exists and holds something else; weights are never overwritten")


@dataclass(frozen=True, slots=True)
class _Given:
    """What a weights file says about itself."""

    architecture: str = DEFAULT_ARCHITECTURE
    categories: tuple[str, ...] | None = None
    trained_input: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] | None = None


def _read_coco() -> bytes:
    import torch

    url, _ = coco_v1()
    name = PurePosixPath(urlsplit(url).path).name
    published = re.search(r"-([0-9a-f]{8,})\.pth$", name)
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # what torch.hub.load_state_dict_from_url(check_hash=True) does; here the bytes are wanted too
            torch.hub.download_url_to_file(url, str(path), published and published[1], progress=False)
        except (OSError, RuntimeError) as error:  # no network; a hash that does not fit
            raise WeightsError(
                f"weights COCO_V1 are not in torch.hub's cache and cannot be downloaded ({storage.describe(error)}). "
                f"Put {url} at {path}, or set TORCH_HOME to a folder whose hub/checkpoints/ holds it"
            ) from error
    data = path.read_bytes()
    if published and not hashlib.sha256(data).hexdigest().startswith(published[1]):
        # torch.hub takes a cached file as it is; so do we, but say so: the output records the file's sha256
        log.warning("%s is not the file torchvision published (its sha256 does not begin with %s)", path, published[1])
    return data


def _read_file(uri: str) -> bytes:
    shown = storage.without_secrets(uri)
    try:
        return storage.read_bytes(uri)
    except FileNotFoundError as error:
        raise WeightsError(f"weights {shown} do not exist: {_WANTED}") from error
    except (storage.InvalidUri, IsADirectoryError, PermissionError) as error:
        raise WeightsError(f"weights {shown} cannot be read: {storage.describe(error)}") from error


def _checked(data: bytes, name: str, wanted: str | None) -> bytes:
    """The bytes, when their hash is the wanted one. Parsers of files that strangers made are not fed before this."""
    found = hashlib.sha256(data).hexdigest()
    if wanted is not None and found != wanted.lower():
        raise WeightsError(
            f"weights {name} have the sha256 {found}, wanted {wanted.lower()}: get the file again, or check the hash"
        )
    return data


def _read_torch(data: bytes, name: str) -> dict[str, Any]:
    import torch

    try:
        loaded = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except LOAD_ERRORS as error:
        reason = str(error).split(". ")[0].split("\n")[0]
        raise WeightsError(f"weights {name} cannot be loaded as a state dict: {reason}") from error
    if isinstance(loaded, dict) and isinstance(loaded.get("model"), dict):
        loaded = loaded["model"]
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise WeightsError(
            f"weights {name} hold no state dict: wanted a dict of tensors or {{'model': such a dict}}, "
            f"got {_sketch(loaded)}"
        )
    return _of_predictions(loaded)


def _read_safetensors(data: bytes, name: str) -> tuple[dict[str, Any], _Given]:
    try:
        state = _tensors(data)  # first: it checks the header
        header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
        said = json.loads((header.get("__metadata__") or {}).get(_METADATA, "{}"))
        given = _Given(
            architecture=str(said.get("architecture", DEFAULT_ARCHITECTURE)),
            categories=tuple(str(name) for name in said["categories"]) if "categories" in said else None,
            trained_input=dict(said.get("trained_input", {})),
            training=said.get("training"),
        )
    except (safetensors.SafetensorError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"weights {name} are no safetensors file of ours: {storage.describe(error)}") from error
    return _of_predictions(state), given


def _tensors(data: bytes) -> dict[str, Any]:
    try:
        arrays: dict[str, Any] = safetensors.numpy.load(data)
    except KeyError:  # a type that numpy has not, such as bf16
        from safetensors.torch import load

        arrays = load(data)
    return arrays


def _of_predictions(state: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in state.items() if not str(key).endswith("num_batches_tracked")}


def _as_float32(value: Any) -> NDArray[np.float32]:
    """Of an array, or of a tensor on whichever device."""
    if not isinstance(value, np.ndarray):
        value = value.detach().cpu().float().numpy()
    return np.ascontiguousarray(value, np.float32)


def _check_state(state: Mapping[str, Any], name: str, architecture: str) -> int:
    """The number of classes of a state dict that fits the architecture."""
    if architecture not in INPUT_SIZES:
        raise WeightsError(f"weights {name} are for {architecture!r}, known are: {', '.join(INPUT_SIZES)}")
    if {"fc.weight", "classifier.0.weight"} & state.keys():
        raise WeightsError(f"weights {name} {_NO_DETECTOR}")
    num_classes = state[_CLS_LOGITS].shape[0] if _CLS_LOGITS in state else 2
    wanted = parameter_shapes(architecture, num_classes)
    problems = [
        ("missing", [key for key in wanted if key not in state]),
        ("unexpected", [key for key in state if key not in wanted]),
        (
            "of another shape",
            [
                f"{key} {tuple(state[key].shape)} instead of {shape}"
                for key, shape in wanted.items()
                if key in state and tuple(state[key].shape) != shape
            ],
        ),
    ]
    if any(keys for _, keys in problems):
        listed = "; ".join(f"{len(keys)} {what}: {_first(keys)}" for what, keys in problems if keys)
        raise WeightsError(f"weights {name} do not fit {architecture}: {listed}")
    return num_classes


def _complete(categories: Sequence[str] | None, num_classes: int, name: str) -> tuple[str, ...]:
    """Names of all labels, background first."""
    if categories is None:
        return (BACKGROUND, *(f"class_{label}" for label in range(1, num_classes)))
    if len(categories) == num_classes - 1:
        return (BACKGROUND, *categories)
    if len(categories) == num_classes:
        return tuple(categories)
    raise WeightsError(
        f"weights {name} have {num_classes} classes: wanted {num_classes - 1} categories "
        f"(or {num_classes} with the background first), got {len(categories)}"
    )


def _random(spec: str, num_classes: int | None, categories: Sequence[str] | None) -> Weights:
    seed = spec.removeprefix("random:")
    if not (seed.isascii() and seed.isdigit()):
        raise WeightsError(f"weights {spec!r}: wanted random:<seed> with a whole number from 0, got {seed!r}")
    if num_classes is None:
        if categories is None:
            categories = coco_v1()[1]
        has_background = bool(categories) and categories[0] in (BACKGROUND, "background")
        num_classes = len(categories) + (not has_background)
    if num_classes < 2:
        raise WeightsError(
            f"weights {spec}: wanted num_classes of 2 or more (background and a class), got {num_classes}"
        )
    state = random_state(DEFAULT_ARCHITECTURE, num_classes, int(seed))
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode() + state[key].tobytes())
    return Weights(
        name=spec,
        architecture=DEFAULT_ARCHITECTURE,
        sha256=digest.hexdigest(),
        categories=_complete(categories, num_classes, spec),
        state=state,
    )


def _first(keys: Sequence[str], limit: int = 3) -> str:
    return ", ".join(keys[:limit]) + (", …" if len(keys) > limit else "")


def _sketch(value: object) -> str:
    if isinstance(value, dict):
        return f"a dict with {_first([repr(key) for key in value]) or 'nothing in it'}"
    return f"a {type(value).__name__}"
