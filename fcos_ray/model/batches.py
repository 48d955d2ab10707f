"""Batches: groups of images that may share a forward pass. Knows shapes, neither pixels nor models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fcos_ray.sizes import Shape


def micro_batches(
    shapes: Sequence[Shape], *, max_images: int, lowered: Mapping[Shape, int] | None = None
) -> list[list[int]]:
    """Indices of `shapes`, grouped by equal padded shape and cut to at most `max_images` each.

    `lowered` holds smaller limits for single shapes. Groups stand in order of first appearance, indices ascend: the
    same input gives the same plan.
    """
    groups: dict[Shape, list[int]] = {}
    for index, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(index)
    plan = []
    for shape, indices in groups.items():
        limit = min(max_images, (lowered or {}).get(shape, max_images))
        plan += [indices[start : start + limit] for start in range(0, len(indices), limit)]
    return plan
