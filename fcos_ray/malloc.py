"""Malloc: what a process of ours does with memory that it has freed. Knows glibc; another C library is left as it is."""

from __future__ import annotations

import ctypes
from typing import Final

# <malloc.h>
_TRIM_THRESHOLD: Final = -1
_MMAP_THRESHOLD: Final = -3
_LARGEST: Final = 2**30  # in fp32, what a detector's first convolution finds takes 69 MB
_LARGEST_OF_OLD: Final = 32 * 2**20  # older versions refuse more
_NEVER: Final = -1


def keep_memory() -> None:
    """From here on this process keeps what it frees, for those that soon want as much again.

    By default glibc (2.36, torch 2.14) gives large pieces back to the kernel, which zeroes them for the next image: 13,600
    pages an image in bf16 and 39,000 to 53,000 in fp32, or none, as it happens. A job in bf16 labels 1.07 times as many (a
    Xeon with AMX, three times in turns). Of threads beside the main one glibc still gives back pieces of more than 64 MB.
    """
    if tell := getattr(ctypes.CDLL(None), "mallopt", None):
        if not tell(_MMAP_THRESHOLD, _LARGEST):
            tell(_MMAP_THRESHOLD, _LARGEST_OF_OLD)
        tell(_TRIM_THRESHOLD, _NEVER)


def trim_memory() -> None:
    """Give back freed memory, of which glibc keeps more and more. It takes some ms."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
