"""Verdict: what limits a job, in words with what to change. Knows figures, measures nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fcos_ray.benchmark.stages import StageSeconds
from fcos_ray.layout import Layout
from fcos_ray.load import LoadSettings


@dataclass(frozen=True, slots=True)
class Capacity:
    """Images per second."""

    detectors: float  # all of the layout's at once, alone: mean of before and after the job
    job: float | None  # the whole job's steady state; None when no detector held an image

    @property
    def efficiency(self) -> float | None:
        """Pipeline efficiency: the whole job's steady state ÷ the detectors alone."""
        return None if self.job is None else self.job / self.detectors


def bottleneck(capacity: Capacity, stages: StageSeconds, load: LoadSettings, layout: Layout, precision: str) -> str:
    """What limits the job, and what to change."""
    each = capacity.detectors / layout.num_detectors
    ran = (
        ""
        if capacity.efficiency is None
        else f" The whole job ran at {capacity.efficiency:.0%} of the detectors alone."
    )
    wanted = stages.load * each  # load CPUs that keep one detector busy
    if layout.device == "cpu":
        return _on_cpus(each, wanted, stages, load, precision) + ran
    has = layout.num_load_tasks * layout.load_cpus / layout.num_detectors
    if wanted <= has:
        return f"detect: there is load for {has / wanted:,.1f} times as many detectors. More GPUs.{ran}"
    return (
        f"{_worst(stages)}: each detector wants {math.ceil(wanted)} load CPUs and has {has:,.1f}. Give "
        f"{math.ceil(wanted - has)} more per detector (CPU nodes beside the GPU nodes will do){_remedy(stages, load)}.{ran}"
    )


def _on_cpus(each: float, wanted: float, stages: StageSeconds, load: LoadSettings, precision: str) -> str:
    share = wanted / (1 + wanted)  # of a core that detects and loads in turns
    if share > 0.5:
        return f"{_worst(stages)}: loading takes {share:.0%} of the cores' time. More cores{_remedy(stages, load)}."
    faster = ", --precision bf16 where they do it natively," if precision != "bf16" else ""
    return (
        f"detect: {each:,.2f} images/s of each detector alone; loading takes {share:.1%} of the cores' time. "
        f"More cores{faster} or GPUs."
    )


def _worst(stages: StageSeconds) -> str:
    """The part of loading that takes longest."""
    parts = {"fetch": stages.fetch, "decode": stages.decode, "shrink": stages.shrink}
    return max(parts, key=lambda name: parts[name])


def _remedy(stages: StageSeconds, load: LoadSettings) -> str:
    """What else helps, after a list's last entry."""
    worst = _worst(stages)
    if worst == "fetch":
        return ", a store nearer to the cluster, or a higher --fetch-concurrency"
    shrinks = stages.shrink > 0.01 * stages.decode  # else it is a comparison of two sizes: microseconds
    return ", or --fast-decode" if shrinks and not load.fast_decode and not load.exact_resize else ""
