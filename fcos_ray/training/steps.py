"""Steps: batches -> a model that has learnt. Every random choice of step k is a function of the seed and k alone."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from fcos_ray.errors import ConfigError, ManifestError
from fcos_ray.model.checks import pick_device, pick_precision
from fcos_ray.model.parameters import Weights
from fcos_ray.training.config import TrainConfig
from fcos_ray.training.dataset import Batch, Batches
from fcos_ray.training.model import Start
from fcos_ray.training.states import States
from fcos_ray.training.truth import Truth

log = logging.getLogger(__name__)

LOSSES: Final = ("classification", "bbox_regression", "bbox_ctrness")
_LOG_STEPS: Final = 20
_FEWEST_SEEN: Final = 50  # images, or all there are: a share of fewer says little


@dataclass(slots=True)
class _Progress:
    """Where a training stands."""

    steps: int = 0
    images: int = 0  # looked at, skipped ones included
    skipped: list[str] = field(default_factory=list)  # uri and reason, each once
    history: list[dict[str, float]] = field(default_factory=list)  # losses of the last steps, an epoch's at most


class Fitting:
    """A model, its optimizer, and the steps from the last saved state to the end.

    Raises UserError when settings do not fit the model or the device. Nothing is written before `run`.
    """

    def __init__(self, config: TrainConfig, start: Start, truth: Truth) -> None:
        self._config, self._start, self._truth = config, start, truth
        self._device = pick_device(config.device)
        pick_precision(config.precision, self._device)
        torch.manual_seed(config.seed)
        self.model: nn.Module = start.build(truth)
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
        if config.warmup_steps >= self.num_steps:
            log.warning(
                "warmup_steps (%d) reach the end: the learning rate never falls in %d steps",
                config.warmup_steps,
                self.num_steps,
            )
        self._progress = _Progress()

    def run(self, states: States, *, stop: Callable[[], bool]) -> None:
        """Take the missing steps. `stop` is asked after each; True saves the state and raises KeyboardInterrupt.

        Raises ConfigError when a loss is no number any more, ManifestError when too many images cannot be used,
        OutputError, StorageError.
        """
        self._restore(states)
        progress, steps_per_epoch = self._progress, self._data.steps_per_epoch
        began, first = time.monotonic(), progress.steps
        for batch in self._data.ahead(range(first, self.num_steps), num_threads=self._config.num_threads):
            self._count(batch)
            if batch.images:
                progress.history.append(self._step(batch))
                del progress.history[:-steps_per_epoch]
            progress.steps += 1
            if progress.steps % _LOG_STEPS == 0:
                rate = (time.monotonic() - began) / (progress.steps - first)
                log.info(
                    "step %d of %d: %s; %.2f s per step, %.0f s to go",
                    progress.steps, self.num_steps, _means(progress.history[-_LOG_STEPS:]),
                    rate, rate * (self.num_steps - progress.steps),
                )  # fmt: skip
            stopping = stop()
            if stopping or progress.steps % self._config.save_every_steps == 0 or progress.steps == self.num_steps:
                self._save(states)
            if stopping:
                raise KeyboardInterrupt

    def weights(self) -> Weights:
        """The model as it is, for a detector. Raises ConfigError when a value in it is no number any more."""
        state = {key: value.detach().cpu() for key, value in self.model.state_dict().items()}
        broken = [key for key, value in state.items() if not bool(torch.isfinite(value).all())]
        if broken:
            raise self._diverged(f"{len(broken)} of the weights are not finite ({broken[0]})")
        return Weights(
            name=self._config.output,
            architecture=self._config.architecture,
            sha256="",
            categories=self._start.label_names(self._truth),
            state={key: value.numpy() for key, value in state.items() if not key.endswith("num_batches_tracked")},
            trained_input=self._start.input,
        )

    def outcome(self) -> dict[str, Any]:
        """Steps, mean losses of the last epoch's steps, and how many images could not be used."""
        progress = self._progress
        if not progress.history:
            raise ManifestError(f"nothing was learnt: {self._words_for_skipped()}")
        return {"steps": progress.steps, "losses": _means(progress.history), "images_skipped": len(progress.skipped)}

    def _count(self, batch: Batch) -> None:
        """Keep account of images that cannot be used. Raises ManifestError when they are too many."""
        progress = self._progress
        for reason in sorted(set(batch.skipped) - set(progress.skipped)):
            log.warning("skipped %s", reason)
            progress.skipped.append(reason)
        progress.images += len(batch.images) + len(batch.skipped)
        enough = progress.images >= min(_FEWEST_SEEN, len(self._truth.examples))
        if enough and self._skips_too_many():
            raise ManifestError(self._words_for_skipped())

    def _skips_too_many(self) -> bool:
        seen = min(self._progress.images, len(self._truth.examples))
        return len(self._progress.skipped) > self._config.max_skipped_fraction * seen

    def _words_for_skipped(self) -> str:
        skipped, seen = self._progress.skipped, min(self._progress.images, len(self._truth.examples))
        return (
            f"{len(skipped)} of the {seen} images seen so far could not be used ({'; '.join(skipped[:3])}). Check --images "
            f"({self._config.images or 'the folder of the annotations'}) and the files, or allow more with "
            f"--max-skipped-fraction ({self._config.max_skipped_fraction}); the same command goes on from the last saved state"
        )

    def _step(self, batch: Batch) -> dict[str, float]:
        """One forward and backward pass: the losses. Raises ConfigError when one is no number any more."""
        config, model = self._config, self.model
        step = self._progress.steps
        torch.manual_seed(config.seed * 1_000_003 + step)
        factor = float(torch.empty(1).uniform_(*config.scale_jitter))
        transform: Any = model.transform
        transform.min_size = (round(self._start.input["min_size"] * factor),)
        transform.max_size = round(self._start.input["max_size"] * factor)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(step, config, self.num_steps)
        images = [image.to(self._device).float().div_(255) for image in batch.images]
        targets = [{name: value.to(self._device) for name, value in target.items()} for target in batch.targets]
        with torch.autocast(self._device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            losses: dict[str, Tensor] = model(images, targets)
        loss = torch.stack([losses[name] for name in LOSSES]).sum()
        if not math.isfinite(float(loss.detach())):
            raise self._diverged(f"step {step}: the loss is {float(loss.detach())}")
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        self._optimizer.step()
        return {name: float(losses[name].detach()) for name in LOSSES}

    def _diverged(self, what: str) -> ConfigError:
        config = self._config
        return ConfigError(
            f"{what}; try a lower learning_rate ({config.learning_rate}), more warmup_steps ({config.warmup_steps}) or a "
            f"clip_norm ({config.clip_norm}), and another --output: {config.output} belongs to this recipe"
        )

    def _save(self, states: States) -> None:
        if self._skips_too_many():
            return  # not a state to go on from, once the images are there
        state = {"model": self.model.state_dict(), "optimizer": self._optimizer.state_dict()}
        states.save(state | {"progress": asdict(self._progress)}, steps=self._progress.steps)

    def _restore(self, states: States) -> None:
        state = states.newest(device=self._device)
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._progress = _Progress(**state["progress"])
        log.info("going on after step %d of %d", self._progress.steps, self.num_steps)


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
