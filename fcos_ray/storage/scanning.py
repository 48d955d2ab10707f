"""Scanning: every file of a large folder, many parts listed at once, in no order. Memory does not grow with the folder.

A part is an iterator of steps; a step gives some files, and parts that were found on the way. Only as many steps run
ahead as there are threads, and new parts come before old ones, so that little waits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from fcos_ray.storage.connections import filesystem, is_local, is_s3
from fcos_ray.storage.listing import StoredFile, s3_files, s3_pages, stored_local
from fcos_ray.storage.retries import retrying
from fcos_ray.storage.uris import InvalidUri

_STEP_FILES: Final = 1000  # as a page of S3
_FLAT_PAGES: Final = 10  # of a bucket listed one after the other, before it is worth cutting
_RANGES: Final = 64  # of keys, at most, that a bucket is cut into: each may read a page too much
_LEVELS: Final = 8  # of folders, that are looked through for places to cut
_PAGES: Final = 20  # of each of these folders


@dataclass(frozen=True, slots=True)
class _Step:
    files: list[StoredFile]
    parts: list[Iterator[_Step]] = field(default_factory=list)


def scan_files(folder: str, *, num_threads: int = 16) -> Iterator[list[StoredFile]]:
    """Every file below a local folder or an S3 prefix once, in batches, in no order.

    Links to files are files; linked folders are not entered. Raises FileNotFoundError for a missing folder or bucket,
    NotADirectoryError, PermissionError and StorageError: a listing that cannot be whole is none.
    """
    fs, path = filesystem(folder)
    base = path.rstrip("/") + "/"
    with ThreadPoolExecutor(num_threads) as pool:
        if is_local(fs):
            yield from _scan(pool, [_local_part(base)], num_threads)
        elif is_s3(fs):
            for number, page in enumerate(s3_pages(fs, base), start=1):
                yield list(s3_files(base, page))
                # a store may answer an empty page in the middle: over delete markers, say
                if number >= _FLAT_PAGES and page.get("IsTruncated") and page.get("Contents"):
                    cuts = _cuts(pool, fs, base, page["Contents"][-1]["Key"])
                    yield from _scan(pool, [_s3_part(fs, base, *cut) for cut in cuts], num_threads)
                    return
        else:
            raise InvalidUri("only local folders and s3:// are scanned")


def _scan(pool: ThreadPoolExecutor, waiting: list[Iterator[_Step]], num_threads: int) -> Iterator[list[StoredFile]]:
    running: dict[Future[_Step | None], Iterator[_Step]] = {}
    while waiting or running:
        while waiting and len(running) < num_threads:
            part = waiting.pop()
            running[pool.submit(next, part, None)] = part
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            part, step = running.pop(future), future.result()
            if step is not None:
                waiting += [part, *step.parts]
                if step.files:
                    yield step.files


def _local_part(folder: str) -> Iterator[_Step]:
    """A folder's own files, and a part for each folder in it."""
    files: list[StoredFile] = []
    parts: list[Iterator[_Step]] = []
    with retrying(f"listing {folder}", partial(os.scandir, folder)) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                parts.append(_local_subfolder(entry.path))
            elif entry.is_file():
                with suppress(FileNotFoundError):
                    files += filter(None, [stored_local(entry.path)])
            if len(files) + len(parts) >= _STEP_FILES:
                yield _Step(files, parts)
                files, parts = [], []
    yield _Step(files, parts)


def _local_subfolder(folder: str) -> Iterator[_Step]:
    with suppress(FileNotFoundError, NotADirectoryError):  # gone since it was seen
        yield from _local_part(folder)


def _s3_part(fs: Any, base: str, after: str, up_to: str | None) -> Iterator[_Step]:
    """The keys behind `after`, up to and with `up_to`."""
    bucket = base.split("/", 1)[0]
    for page in s3_pages(fs, base, StartAfter=after):
        files = list(s3_files(base, page))
        if up_to is not None and page.get("Contents", []) and page["Contents"][-1]["Key"] > up_to:
            yield _Step([file for file in files if file.uri <= f"s3://{bucket}/{up_to}"])
            return
        yield _Step(files)


def _cuts(pool: ThreadPoolExecutor, fs: Any, base: str, after: str) -> list[tuple[str, str | None]]:
    """Ranges that cover the keys behind `after`: (behind this key, up to this one). S3 lists in the order of UTF-8 bytes.

    Cut at folders, level by level until there are enough: a request per folder would be slow for a million of them.
    """
    found: list[str] = []
    level = [base]
    for _ in range(_LEVELS):
        level = [f for folders in pool.map(partial(_s3_folders, fs), level) for f in folders]
        found += level
        if not level or len(found) >= _RANGES:
            break
    keys = sorted(key for folder in found if (key := folder.split("/", 1)[1]) > after)
    keys = keys[:: -(-len(keys) // _RANGES) or 1]
    return list(zip([after, *keys], [*keys, None], strict=True))


def _s3_folders(fs: Any, base: str) -> list[str]:
    """The folders directly below a prefix, as bucket/prefix/; not all, when they are many or lie among many files."""
    bucket = base.split("/", 1)[0]
    folders: list[str] = []
    for number, page in enumerate(s3_pages(fs, base, Delimiter="/"), start=1):
        found = [f"{bucket}/{entry['Prefix']}" for entry in page.get("CommonPrefixes", [])]
        folders += found
        if not found or number == _PAGES:
            break
    return folders
