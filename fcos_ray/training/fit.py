"""Fit: truth -> weights. One process; every random choice of step k is a function of the seed and k alone.

<output>/recipe.json              what is learnt from what; created first, a training with another recipe is refused
<output>/state-<steps>.pt         model and optimizer after so many steps; only the newest is kept
<output>/weights.safetensors      at the end: the weights, and in their metadata recipe, data and metrics
"""

from __future__ import annotations

import io
import json
import logging
import math
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from fcos_ray import storage
from fcos_ray.errors import ConfigError
from fcos_ray.model.architectures import Weights
from fcos_ray.model.checks import pick_device, pick_precision
from fcos_ray.model.weights import load_weights, save_weights
from fcos_ray.training.config import TrainConfig
from fcos_ray.training.dataset import Batch, Batches, Truth, read_truth
from fcos_ray.training.measure import measure
from fcos_ray.training.model import Start, start_model

log = logging.getLogger(__name__)

LOSSES: Final = ("classification", "bbox_regression", "bbox_ctrness")
_STATE: Final = re.compile(r"state-(\d{9})\.pt")
_LOG_STEPS: Final = 20


@dataclass(frozen=True, slots=True)
class TrainSummary:
    """What a training did. The last line on stdout is this as JSON."""

    weights: str
    steps: int
    losses: dict[str, float]  # means over the last epoch's steps
    metrics: dict[str, float | None]  # mAP and its kin on the validation truth, where one was given
    counts: dict[str, int]  # of the truth: see TruthCounts
    images_skipped: int  # while training, by this process: missing, broken or of another size than the truth says
    wall_seconds: float


@dataclass(slots=True)
class _State:
    """Where a training stands."""

    steps: int = 0
    history: list[dict[str, float]] = field(default_factory=list)  # losses of the last steps, an epoch's at most


def train(config: TrainConfig) -> TrainSummary:
    """Train until the recipe is through, from the last saved state if there is one; finished already: its summary.

    Raises UserError when data, settings or output are wrong.
    """
    started = time.monotonic()
    start = start_model(config)
    read = read_truth(
        config.annotations,
        images=config.images,
        min_box_side=config.min_box_side,
        empty_images=config.empty_images,
    )
    truth = start.labelled(read)
    log.info("%s", truth.counts)
    output = storage.parse_uri(config.output).uri
    said = {"recipe": config.recipe() | dict(start.input), "data_sha256": truth.sha256, "counts": asdict(truth.counts)}
    _claim(output, said)
    weights_uri = storage.join(output, "weights.safetensors")
    skipped = 0
    if not storage.exists(weights_uri):
        fitting = _Fitting(config, start, truth, output)
        skipped = fitting.run()
        trained = fitting.weights(start.label_names(truth))
        metrics = measure(trained, config) if config.val_annotations is not None else {}
        outcome: dict[str, Any] = {"steps": fitting.num_steps, "losses": fitting.last_losses(), "metrics": metrics}
        save_weights(
            weights_uri,
            trained.state,
            architecture=config.architecture,
            categories=trained.categories,
            trained_input=start.input,
            training=said | outcome,
        )
        fitting.forget_states()
    known: Mapping[str, Any] = load_weights(weights_uri).training or {}
    return TrainSummary(
        weights=weights_uri,
        steps=known["steps"],
        losses=known["losses"],
        metrics=known["metrics"],
        counts=asdict(truth.counts),
        images_skipped=skipped,
        wall_seconds=round(time.monotonic() - started, 1),
    )


def _claim(output: str, said: Mapping[str, Any]) -> None:
    """Make the output this training's own. Raises ConfigError naming what differs from the training that has it."""
    uri = storage.join(output, "recipe.json")
    if storage.create(uri, json.dumps(said, indent=2, sort_keys=True).encode()):
        return
    theirs, ours = json.loads(storage.read_bytes(uri)), json.loads(json.dumps(said))
    theirs, ours = {**theirs, **theirs["recipe"]}, {**ours, **ours["recipe"]}
    differing = [
        f"{name}: it has {theirs.get(name)!r}, asked was {ours.get(name)!r}"
        for name in sorted(theirs.keys() | ours.keys())
        if name not in ("recipe", "counts") and theirs.get(name) != ours.get(name)
    ]
    if differing:
        raise ConfigError(
            f"{output} holds another training ({'; '.join(differing)}); use its settings, or another --output"
        )


class _Fitting:
    """A model, its optimizer, and the steps from the last saved state to the end."""

    def __init__(self, config: TrainConfig, start: Start, truth: Truth, output: str) -> None:
        self._config, self._output = config, output
        self._device = pick_device(config.device)
        pick_precision(config.precision, self._device)
        self._input = start.input
        torch.manual_seed(config.seed)
        self.model: nn.Module = start.build(start.num_classes(truth))
        self.model.to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model.train()
        self._optimizer = _optimizer(self.model, config)
        self._data = Batches(
            truth.examples,
            batch_size=config.batch_size,
            horizontal_flip=config.horizontal_flip,
            seed=config.seed,
        )
        self.num_steps = config.epochs * self._data.steps_per_epoch
        self._state = _State()

    def run(self) -> int:
        """Take the missing steps. Returns how many images could not be used."""
        self._restore()
        config = self._config
        skipped: set[str] = set()
        began, first = time.monotonic(), self._state.steps
        for batch in self._data.ahead(range(first, self.num_steps), num_threads=config.num_threads):
            for reason in set(batch.skipped) - skipped:
                log.warning("skipped %s", reason)
            skipped |= set(batch.skipped)
            if batch.images:
                self._state.history.append(self._step(batch))
                del self._state.history[: -self._data.steps_per_epoch]
            self._state.steps += 1
            if self._state.steps % _LOG_STEPS == 0:
                rate = (time.monotonic() - began) / (self._state.steps - first)
                log.info(
                    "step %d of %d: %s; %.2f s per step, %.0f s to go",
                    self._state.steps, self.num_steps, _means(self._state.history[-_LOG_STEPS:]),
                    rate, rate * (self.num_steps - self._state.steps),
                )  # fmt: skip
            if self._state.steps % config.save_every_steps == 0 or self._state.steps == self.num_steps:
                self._save()
        return len(skipped)

    def _step(self, batch: Batch) -> dict[str, float]:
        """One forward and backward pass. Raises ManifestError when a loss is no number any more."""
        config, model = self._config, self.model
        step = self._state.steps
        torch.manual_seed(config.seed * 1_000_003 + step)
        factor = float(torch.empty(1).uniform_(*config.scale_jitter))
        transform: Any = model.transform
        transform.min_size = (round(self._input["min_size"] * factor),)
        transform.max_size = round(self._input["max_size"] * factor)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(step, config, self.num_steps)
        images = [image.to(self._device).float().div_(255) for image in batch.images]
        targets = [{name: value.to(self._device) for name, value in target.items()} for target in batch.targets]
        with torch.autocast(self._device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            losses: dict[str, Tensor] = model(images, targets)
        loss = torch.stack([losses[name] for name in LOSSES]).sum()
        if not math.isfinite(float(loss.detach())):
            raise ConfigError(
                f"step {step}: the loss is {float(loss.detach())}; try a lower learning_rate ({config.learning_rate}), "
                f"more warmup_steps ({config.warmup_steps}) or a clip_norm ({config.clip_norm})"
            )
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        self._optimizer.step()
        return {name: float(losses[name].detach()) for name in LOSSES}

    def weights(self, categories: tuple[str, ...]) -> Weights:
        """The model as it is, for a detector."""
        state = {key: value.detach().cpu().numpy() for key, value in self.model.state_dict().items()}
        return Weights(
            name=self._output,
            architecture=self._config.architecture,
            sha256="",
            categories=categories,
            state={key: value for key, value in state.items() if not key.endswith("num_batches_tracked")},
            trained_input=self._input,
        )

    def last_losses(self) -> dict[str, float]:
        return _means(self._state.history[-self._data.steps_per_epoch :])

    def _save(self) -> None:
        buffer = io.BytesIO()
        state = {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "steps": self._state.steps,
            "history": self._state.history,
        }
        torch.save(state, buffer)
        kept = storage.join(self._output, f"state-{self._state.steps:09d}.pt")
        storage.create(kept, buffer.getvalue())
        for uri, _ in self._states():
            if uri != kept:
                storage.delete(uri)

    def _restore(self) -> None:
        states = self._states()
        if not states:
            return
        uri, _ = max(states, key=lambda found: found[1])
        state = torch.load(io.BytesIO(storage.read_bytes(uri)), weights_only=True, map_location=self._device)
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._state = _State(steps=state["steps"], history=state["history"])
        log.info("going on after step %d of %d", self._state.steps, self.num_steps)

    def _states(self) -> list[tuple[str, int]]:
        """Saved states: uri and steps."""
        found = ((file.uri, _STATE.fullmatch(file.uri.rpartition("/")[2])) for file in storage.list_files(self._output))
        return [(uri, int(match[1])) for uri, match in found if match]

    def forget_states(self) -> None:
        for uri, _ in self._states():
            storage.delete(uri)


def learning_rate(step: int, config: TrainConfig, num_steps: int) -> float:
    """A linear rise over warmup_steps, then a cosine to zero (Loshchilov and Hutter 2017, arXiv:1608.03983)."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in learning if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in learning if p.ndim <= 1], "weight_decay": 0.0},  # norms and biases
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate)
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)


def _means(history: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(sum(losses[name] for losses in history) / max(1, len(history)), 4) for name in LOSSES}
