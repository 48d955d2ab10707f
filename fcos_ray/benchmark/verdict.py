"""Verdict: what limits a job, in words with what to change. Knows figures, measures nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fcos_ray.layout import Layout


@dataclass(frozen=True, slots=True)
class Capacity:
    """What each side of a job can do, images per second, and what the whole did."""

    detectors: float  # all at once, alone
    load: float  # all load tasks at once, as far as one process alone tells
    job: float | None  # steady state, from the first to the last commit; None when there were too few commits

    @property
    def efficiency(self) -> float | None:
        """Pipeline efficiency: the whole job's steady state ÷ the detectors alone."""
        return None if self.job is None else self.job / self.detectors


def load_capacity(load_seconds: float, layout: Layout) -> float:
    """Images per second of all load tasks, from the seconds of one process per image.

    Beside GPUs each task has a core or more. On a cluster without them tasks share cores with detectors and get what those
    leave, which no figure tells beforehand: the least is what they reserve.
    """
    cores = layout.num_load_tasks * min(1.0, layout.load_cpus)
    return cores / load_seconds


def bottleneck(capacity: Capacity, load_seconds: float, layout: Layout) -> str:
    """What limits the job, and what to change."""
    whole = (
        ""
        if capacity.efficiency is None
        else f" The whole job ran at {capacity.efficiency:.0%} of the detectors alone."
    )
    if layout.device == "cpu":
        share = load_seconds * capacity.detectors / layout.num_detectors
        return (
            f"detect: detectors are on CPUs, {capacity.detectors / layout.num_detectors:,.2f} images/s each; loading takes "
            f"{share:.1%} of a core beside each. More cores, --precision bf16 where they do it natively, or GPUs.{whole}"
        )
    if capacity.load >= capacity.detectors:
        return f"detect: load could feed {capacity.load / capacity.detectors:,.1f} times as many detectors. More GPUs.{whole}"
    wanted = math.ceil(capacity.detectors * load_seconds / layout.num_detectors)
    has = layout.num_load_tasks * layout.load_cpus / layout.num_detectors
    return (
        f"load: each detector wants {wanted} load CPUs and has {has:,.1f}: give {wanted - has:,.1f} more CPUs per detector "
        f"(CPU nodes beside the GPU nodes will do), or smaller images.{whole}"
    )
