"""Dataset: examples -> batches for torchvision's FCOS. Knows images, not the model and not the annotations' format.

What only the files themselves hide is found here: images that are missing, broken or of another size than the truth
says are left out of their batch, which names them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fcos_ray import storage
from fcos_ray.errors import DecodeError
from fcos_ray.inputs.decode import decode
from fcos_ray.training.truth import Example

_GROUP_BATCHES: Final = 32  # batches that are sorted by aspect ratio together: little padding, still a random order


Target = dict[str, Tensor]  # boxes (N, 4) float32 xyxy, labels (N,) int64


@dataclass(frozen=True, slots=True)
class Batch:
    """Images for one step, as torchvision's model takes them, and the images that could not be used."""

    images: list[Tensor]  # uint8 (3, H, W)
    targets: list[Target]
    skipped: tuple[str, ...]  # uri and reason


class Batches:
    """Batch k of a training, for any k: a function of the seed and k alone, so a training goes on where it stopped."""

    def __init__(self, examples: Sequence[Example], *, batch_size: int, horizontal_flip: float, seed: int) -> None:
        self._examples = examples
        self._batch_size = batch_size
        self._horizontal_flip = horizontal_flip
        self._seed = seed
        self._order = lru_cache(maxsize=2)(self._epoch_order)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._examples) // self._batch_size)

    def ahead(self, steps: Sequence[int], *, num_threads: int) -> Iterator[Batch]:
        """The batches of these steps in order, read and decoded ahead in threads (Pillow lets go of the GIL)."""
        with ThreadPoolExecutor(num_threads) as pool:
            pending: deque[Future[Batch]] = deque()
            try:
                for step in steps:
                    pending.append(pool.submit(self.batch, step))
                    if len(pending) > 2 * num_threads:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:  # whoever stops listening does not wait for what was read ahead
                pool.shutdown(wait=False, cancel_futures=True)

    def batch(self, step: int) -> Batch:
        """The batch of one step. Raises StorageError when a store fails after retries."""
        epoch, place = divmod(step, self.steps_per_epoch)
        loaded = [self._load(int(index), epoch) for index in self._order(epoch)[place]]
        usable = [found for found in loaded if not isinstance(found, str)]
        return Batch(
            images=[image for image, _ in usable],
            targets=[target for _, target in usable],
            skipped=tuple(found for found in loaded if isinstance(found, str)),
        )

    def _epoch_order(self, epoch: int) -> list[NDArray[np.int64]]:
        """All images once, in random batches of like aspect ratio."""
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(len(self._examples))
        ratios = np.array([example.width / example.height for example in self._examples])
        group = self._batch_size * _GROUP_BATCHES
        batches = []
        for start in range(0, len(order), group):
            part = order[start : start + group]
            part = part[np.argsort(ratios[part], kind="stable")]
            batches += [part[i : i + self._batch_size] for i in range(0, len(part), self._batch_size)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def _load(self, index: int, epoch: int) -> tuple[Tensor, Target] | str:
        example = self._examples[index]
        try:
            image = decode(storage.read_bytes(example.uri))
        except (DecodeError, storage.InvalidUri, *storage.STORE_ERRORS) as error:  # a StorageError ends the training
            return f"{example.uri}: {storage.describe(error)}"
        if (image.width, image.height) != (example.width, example.height):
            return (
                f"{example.uri}: the truth says {example.width}×{example.height}, "
                f"the image as seen is {image.width}×{image.height}"
            )
        pixels, boxes = torch.from_numpy(image.pixels).permute(2, 0, 1), torch.from_numpy(example.boxes)
        if np.random.default_rng([self._seed, epoch, index]).random() < self._horizontal_flip:
            pixels = pixels.flip(2)
            boxes = torch.stack([image.width - boxes[:, 2], boxes[:, 1], image.width - boxes[:, 0], boxes[:, 3]], dim=1)
        return pixels.contiguous(), {"boxes": boxes, "labels": torch.from_numpy(example.labels)}
