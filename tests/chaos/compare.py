"""Two runs' results side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.corpus import detections_of
from tests.parity import assert_same_detections

_FOUND = ("boxes", "labels", "label_names", "scores")


def assert_same_results(results: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, Mapping[str, Any]]) -> None:
    """Equal but for the last bits, which depend on how many threads a detector has."""
    assert sorted(results) == sorted(wanted)
    for image_id, row in results.items():
        other = wanted[image_id]
        assert {k: v for k, v in row.items() if k not in _FOUND} == {k: v for k, v in other.items() if k not in _FOUND}
        if row["status"] == "ok":
            detections = (detections_of(dict(row)), detections_of(dict(other)))
            assert_same_detections(*detections, score_threshold=0.2, max_detections=100)


def differences(results: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, Mapping[str, Any]]) -> str:
    """The first difference in words; empty when there is none."""
    try:
        assert_same_results(results, wanted)
    except AssertionError as error:
        return str(error)[:1000] or "results differ"
    return ""
