"""Listing: which files are there. Reads no bytes of them.

S3 is listed page by page with the store's own calls, not with fsspec's find, glob and isfile: those take an error in
the middle of a walk for "nothing there" (fsspec 2026.9), and hold ten million objects before the first comes out.
"""

from __future__ import annotations

import os
import posixpath
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from fcos_ray.storage.connections import OPERATION_SECONDS, filesystem, is_local, is_s3
from fcos_ray.storage.retries import retrying
from fcos_ray.storage.uris import Location, join, parse_uri

_EPOCH = datetime.fromtimestamp(0, UTC)
_MAGIC = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One listed file."""

    uri: str
    num_bytes: int
    version: str  # etag, or modification time: changes when the content does
    last_modified: datetime | None = None  # UTC; None where the store does not say


def exists(uri: str) -> bool:
    """Whether a file is there. Raises PermissionError, StorageError: not knowing is not absence."""
    return stat_file(uri) is not None


def list_files(folder: str) -> Iterator[StoredFile]:
    """Every file below a folder, ordered by uri; none when there is no such folder.

    Links to files are files; linked folders are not entered. Raises FileNotFoundError for a missing bucket.
    """
    fs, path = filesystem(folder)
    base = path.rstrip("/") + "/"
    if is_s3(fs):
        for page in s3_pages(fs, base):
            yield from s3_files(base, page)
        return
    found = retrying(f"listing {folder}", lambda: list(_walk(fs, base)))
    yield from sorted(found, key=lambda file: file.uri)


def list_folders(folder: str) -> list[str]:
    """Names of the folders directly below a folder; none when there is no such folder."""
    return sorted(_children(folder)[1])


def list_names(folder: str) -> set[str]:
    """Names of the files directly in a folder; none when there is no such folder."""
    return {posixpath.basename(file.uri) for file in _children(folder)[0]}


def expand(pattern: str) -> list[StoredFile]:
    """The files a pattern (`*`, `?`, `[…]`, and `**` for any depth) or a plain uri names, in order. Empty when none.

    A file whose name is the pattern itself comes first: listed names with `[` or `?` in them read back as themselves.
    """
    found = stat_file(pattern)
    if found is not None:
        return [found]
    location = parse_uri(pattern)
    parts = location.path.split("/")
    depth = next((i for i, part in enumerate(parts) if _MAGIC.search(part)), None)
    if depth is None or (location.scheme != "file" and depth == 0):
        return []
    base = Location(location.scheme, "/".join(parts[:depth]) or "/").uri
    return sorted(_matching(base, parts[depth:]), key=lambda file: file.uri)


def _matching(folder: str, parts: list[str]) -> Iterator[StoredFile]:
    if parts[0] == "**":
        start = len(join(folder, ""))
        yield from (file for file in list_files(folder) if _fits(file.uri[start:].split("/"), parts))
        return
    files, folders = _children(folder)
    if len(parts) == 1:
        yield from (file for file in files if fnmatchcase(posixpath.basename(file.uri), parts[0]))
        return
    for name in folders:
        if fnmatchcase(name, parts[0]):
            yield from _matching(join(folder, name), parts[1:])


def _fits(names: list[str], parts: list[str]) -> bool:
    if not parts:
        return not names
    if parts[0] == "**":  # any number of folders, also none
        return any(_fits(names[i:], parts[1:]) for i in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], parts[0]) and _fits(names[1:], parts[1:])


def _children(folder: str) -> tuple[list[StoredFile], list[str]]:
    """Files and names of folders directly below a folder."""
    fs, path = filesystem(folder)
    base = path.rstrip("/") + "/"
    if is_s3(fs):
        pages = list(s3_pages(fs, base, Delimiter="/"))
        names = [p["Prefix"].rstrip("/").rpartition("/")[2] for page in pages for p in page.get("CommonPrefixes", [])]
        return [file for page in pages for file in s3_files(base, page)], names
    files, folders = retrying(f"listing {folder}", lambda: _entries(fs, base))
    return files, [posixpath.basename(f) for f in folders]


def s3_pages(fs: Any, base: str, **options: str) -> Iterator[dict[str, Any]]:
    bucket, _, prefix = base.partition("/")
    more: dict[str, str] = {}
    while True:
        query = {"Bucket": bucket, "Prefix": prefix, **options, **more}
        call = partial(fs.call_s3, "list_objects_v2", **query, timeout=OPERATION_SECONDS)
        page = retrying(f"listing s3://{base}", call)
        yield page
        if not page.get("IsTruncated"):
            return
        more = {"ContinuationToken": page["NextContinuationToken"]}


def s3_files(base: str, page: dict[str, Any]) -> Iterator[StoredFile]:
    bucket = base.split("/", 1)[0]
    for entry in page.get("Contents", []):
        if not entry["Key"].endswith("/"):  # consoles make empty objects of that name and call them folders
            uri = Location("s3", f"{bucket}/{entry['Key']}").uri
            yield StoredFile(uri, entry["Size"], entry["ETag"].strip('"'), _whole_seconds(entry["LastModified"]))


def _whole_seconds(time: datetime) -> datetime:
    """As HEAD and GET say it; Ceph lists with fractions."""
    return time.astimezone(UTC).replace(microsecond=0)


def _walk(fs: Any, folder: str) -> Iterator[StoredFile]:
    files, folders = _entries(fs, folder)
    yield from files
    for name in folders:
        yield from _walk(fs, name)


def _entries(fs: Any, folder: str) -> tuple[list[StoredFile], list[str]]:
    """Files, and paths of folders, directly below one; nothing when it is gone."""
    files: list[StoredFile] = []
    folders: list[str] = []
    try:
        if not is_local(fs):
            for info in fs.ls(folder, detail=True):
                if info["type"] == "directory":
                    folders.append(info["name"].rstrip("/"))
                elif info["type"] == "file":
                    files.append(_stored(fs, info))
            return files, folders
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.is_file():
                    with suppress(FileNotFoundError):
                        files += filter(None, [stored_local(entry.path)])
    except (FileNotFoundError, NotADirectoryError):
        return [], []
    return files, folders


def stat_file(uri: str) -> StoredFile | None:
    """One file, or None when there is none of that name."""
    fs, path = filesystem(uri)

    def look() -> StoredFile | None:
        if is_local(fs):
            return stored_local(path)
        if is_s3(fs):
            bucket, _, key = path.partition("/")
            if not key or key.endswith("/"):
                return None
            head = fs.call_s3("head_object", Bucket=bucket, Key=key, timeout=OPERATION_SECONDS)
            uri, etag = Location("s3", path).uri, head["ETag"].strip('"')
            return StoredFile(uri, int(head["ContentLength"]), etag, _whole_seconds(head["LastModified"]))
        info = fs.info(path)
        return _stored(fs, info) if info["type"] == "file" else None

    try:
        return retrying(f"looking for {uri}", look)
    except (FileNotFoundError, NotADirectoryError):
        return None


def stored_local(path: str) -> StoredFile | None:
    status = os.stat(path)  # noqa: PTH116 - hundreds of thousands of calls: Path.stat is slower
    if not stat.S_ISREG(status.st_mode):
        return None
    modified = _EPOCH + timedelta(microseconds=status.st_mtime_ns // 1000)
    return StoredFile(path, status.st_size, str(status.st_mtime_ns), modified)


def _stored(fs: Any, info: dict[str, Any]) -> StoredFile:
    version = info.get("ETag") or info.get("mtime") or info.get("LastModified") or info.get("created") or ""
    return StoredFile(str(fs.unstrip_protocol(info["name"])), int(info["size"] or 0), str(version).strip('"'))
