"""Fit: settings -> weights, and whose an output is. Knows the order of things, not what a step does. One process.

<output>/recipe.json              what is learnt from what; created first, a training with another recipe is refused
<output>/state-<steps>.pt         model and optimizer after so many steps; only the newest is kept
<output>/weights.safetensors      at the end: the weights, and in their metadata recipe, data and metrics
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fcos_ray import storage
from fcos_ray.errors import ConfigError, OutputError, StorageError, WeightsError
from fcos_ray.model.weights import load_weights, save_weights
from fcos_ray.training.config import TrainConfig
from fcos_ray.training.measure import Validation, measure, read_validation
from fcos_ray.training.model import Start, start_model
from fcos_ray.training.states import States
from fcos_ray.training.steps import Fitting
from fcos_ray.training.truth import Truth, read_truth

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainSummary:
    """What a training did. The last line on stdout is this as JSON."""

    weights: str
    steps: int
    losses: dict[str, float]  # means over the last epoch's steps
    metrics: dict[str, float | None]  # mAP and its kin on the validation truth, where one was given
    counts: dict[str, int]  # of the truth: see TruthCounts
    images_skipped: int  # while training: missing, broken or of another size than the truth says
    wall_seconds: float  # of this call


def train(config: TrainConfig, *, stop: Callable[[], bool] = lambda: False) -> TrainSummary:
    """Train until the recipe is through, from the last saved state if there is one; finished already: its summary.

    `stop` is asked after each step, and while measuring after each image: True saves and raises KeyboardInterrupt.
    Raises UserError when data, settings or output are wrong, StorageError when a store fails after retries; the same
    call goes on from the last saved state.
    """
    try:
        return _Training(config).run(stop)
    except storage.InvalidUri as error:
        raise OutputError(f"the output {storage.without_secrets(config.output)} is no path or uri: {error}") from error
    except storage.STORE_ERRORS as error:  # of looking into the output and writing there
        if storage.is_transient(error):
            raise StorageError(storage.describe(error)) from error
        raise OutputError(
            f"{storage.describe(error)}. Wanted to list, read and create under {storage.without_secrets(config.output)}; "
            "check the uri, the credentials and their rights"
        ) from error


def _check_no_secret(config: TrainConfig) -> None:
    """Raise ConfigError where the recipe would hold a secret: it goes into recipe.json, and with the weights to everybody."""
    if config.weights is not None and (what := storage.secret_in(config.weights)):
        raise ConfigError(
            f"weights wanted a uri without secrets, got {storage.without_secrets(config.weights)}, which {what}; it would "
            "be written to recipe.json and into the new weights. Give credentials in the environment, or a copy of the file"
        )


def _writable(output: str) -> str:
    """The one spelling of the output. Raises InvalidUri, ConfigError."""
    location = storage.parse_uri(output)
    if location.scheme in ("http", "https", "ftp"):
        raise ConfigError(f"output wanted a folder or an s3:// prefix, got {location.scheme}://, which is read only")
    return location.uri


class _Training:
    """Everything is read and checked before the output is claimed: what is refused leaves nothing behind."""

    def __init__(self, config: TrainConfig) -> None:
        self._started = time.monotonic()
        self._config = config
        _check_no_secret(config)
        self._output = _writable(config.output)
        self._weights = storage.join(self._output, "weights.safetensors")
        self._states = States(self._output)
        self._start: Start = start_model(config)
        self._truth: Truth = self._start.labelled(
            read_truth(
                config.annotations,
                images=config.images,
                min_box_side=config.min_box_side,
                empty_images=config.empty_images,
                smallest_input=self._start.smallest_input(),
            )
        )
        log.info("%s", self._truth.counts)
        self._validation: Validation | None = None
        if config.val_annotations is not None:
            categories = self._start.label_names(self._truth)
            self._validation = read_validation(config.val_annotations, images=config.val_images, categories=categories)
        self._said = {
            "recipe": config.recipe() | dict(self._start.input),
            "weights_sha256": self._start.weights.sha256 if self._start.weights is not None else None,
            "data_sha256": self._truth.sha256,
            "counts": asdict(self._truth.counts),
        }

    def run(self, stop: Callable[[], bool]) -> TrainSummary:
        if storage.exists(self._weights):
            self._claim()
        else:
            fitting = Fitting(self._config, self._start, self._truth)
            storage.probe_create_if_absent(self._output)
            self._claim()
            fitting.run(self._states, stop=stop)
            self._finish(fitting, stop)
        self._states.forget()
        return self._summary(stop)

    def _claim(self) -> None:
        """Make the output this training's own. Raises ConfigError naming what differs from the training that has it."""
        uri = storage.join(self._output, "recipe.json")
        if storage.create(uri, json.dumps(self._said, indent=2, sort_keys=True).encode()):
            return
        try:
            theirs, ours = json.loads(storage.read_bytes(uri)), json.loads(json.dumps(self._said))
            theirs, ours = {**theirs, **theirs["recipe"]}, {**ours, **ours["recipe"]}
        except (ValueError, TypeError, KeyError) as error:
            raise OutputError(f"{uri} is damaged ({storage.describe(error)}); use another --output") from error
        differing = [
            f"{name}: it has {theirs.get(name)!r}, asked was {ours.get(name)!r}"
            for name in sorted(theirs.keys() | ours.keys())
            # weights may lie elsewhere now: their sha256 tells
            if name not in ("recipe", "counts", "weights") and theirs.get(name) != ours.get(name)
        ]
        if differing:
            raise ConfigError(
                f"{self._output} holds another training ({'; '.join(differing)}); use its settings, or another --output"
            )

    def _finish(self, fitting: Fitting, stop: Callable[[], bool]) -> None:
        """Measure and write the weights, unless another training on this output was first."""
        trained, outcome = fitting.weights(), fitting.outcome()
        metrics = measure(trained, self._validation, self._config, stop=stop) if self._validation is not None else {}
        try:
            save_weights(
                self._weights,
                trained.state,
                architecture=trained.architecture,
                categories=trained.categories,
                trained_input=trained.trained_input,
                training=self._said | outcome | {"metrics": metrics},
            )
        except WeightsError:
            if not storage.exists(self._weights):
                raise
            log.warning(
                "%s is there already: another training on this output came first, its weights count", self._weights
            )

    def _summary(self, stop: Callable[[], bool]) -> TrainSummary:
        """What the weights in the output say of themselves."""
        weights = load_weights(self._weights)
        known: Mapping[str, Any] = weights.training or {}
        metrics = known["metrics"]
        if self._validation is not None and not metrics:
            log.info(
                "the weights were not measured when they were made: measuring now; %s stays as it is", self._weights
            )
            metrics = measure(weights, self._validation, self._config, stop=stop)
        return TrainSummary(
            weights=self._weights,
            steps=known["steps"],
            losses=known["losses"],
            metrics=metrics,
            counts=asdict(self._truth.counts),
            images_skipped=known["images_skipped"],
            wall_seconds=round(time.monotonic() - self._started, 1),
        )
