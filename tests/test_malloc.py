"""Memory that is freed: kept, or given back. Told by the pages that the kernel has to fill."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from fcos_ray.job import fcos_maker
from fcos_ray.model.weights import load_weights

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")

_PAGES = 100 * 2**20 // resource.getpagesize()
_FAULTS = """
import resource
import numpy as np
{before}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(100 * 2**20, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
{then}
print(faults())
"""


def faults(*, before: str = "", then: str = "") -> int:
    """Of the second 100 MB that a process takes and frees."""
    program = _FAULTS.format(before=before, then=then)
    return int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)


def test_kept_memory_is_taken_again_without_the_kernel() -> None:
    keep = "from fcos_ray.malloc import keep_memory; keep_memory()"
    assert faults() > _PAGES / 600, "by default it is the kernel's, in pages of up to 2 MB"
    assert faults(before=keep) < _PAGES / 600 / 4


def test_trimmed_memory_goes_back_to_the_kernel() -> None:
    keep = "from fcos_ray.malloc import keep_memory, trim_memory; keep_memory()"
    assert faults(before=keep, then="trim_memory()") > _PAGES / 600


def test_a_detectors_process_keeps_its_memory(ray_session: Any) -> None:
    make = fcos_maker(load_weights("sample"), {"device": "cpu"})

    @ray_session.remote(max_calls=1)
    def faults_beside_a_detector() -> int:
        make()
        found = []
        for _ in range(2):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            np.ones(100 * 2**20, np.uint8)
            found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        return found[1]

    assert ray_session.get(faults_beside_a_detector.remote()) < _PAGES / 600 / 4
