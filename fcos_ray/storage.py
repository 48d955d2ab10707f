"""The one door to files: uri -> filesystem, list, read, create-if-absent. Knows no images and no Parquet.

A uri is a local path (absolute, or `file://`), `s3://bucket/key`, or for manifests and outputs any other scheme that
fsspec knows. Chained uris (`simplecache::file:///etc/hostname` reads a local file) never reach fsspec.
"""

from __future__ import annotations

import errno
import os
import posixpath
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, TypeVar, cast
from urllib.parse import unquote

import fsspec
from fsspec.exceptions import FSTimeoutError

from fcos_ray.errors import StorageError

T = TypeVar("T")

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}")

# One try: connect_timeout bounds the handshake, read_timeout each silence on the socket. botocore's own retries are off
# (max_attempts 0) and s3fs's are one: the callers here retry with a deadline, and count.
S3_CONFIG: Final[dict[str, Any]] = {
    "connect_timeout": 10,
    "read_timeout": 30,
    "retries": {"max_attempts": 0},
    "max_pool_connections": 128,
}
OPERATION_SECONDS: Final = 120.0  # deadline of one try of one operation, whatever the sockets say (s3fs has hung for hours)
MAX_ATTEMPTS: Final = 8

_TRANSIENT_ERRNO: Final = {
    errno.EAGAIN, errno.EBUSY, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.EINTR,
    errno.EIO, errno.ENETDOWN, errno.ENETUNREACH, errno.EPIPE, errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT,
}  # fmt: skip
# Codes that s3fs maps to PermissionError or EINVAL although they are the store's or the clock's trouble, not the object's.
_TRANSIENT_S3_CODES: Final = {"ExpiredToken", "RequestTimeTooSkewed", "IncompleteBody", "TokenRefreshRequired", "BadDigest"}


class InvalidUri(ValueError):
    """A uri that no library gets to see. The message does not repeat the uri: it may hold a password."""


@dataclass(frozen=True, slots=True)
class Location:
    """A parsed uri."""

    scheme: str  # "file", "s3", …
    path: str  # an absolute path, or bucket/key

    @property
    def uri(self) -> str:
        """The one spelling used in plans and output: a plain absolute path for local files."""
        return self.path if self.scheme == "file" else f"{self.scheme}://{self.path}"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One listed file."""

    uri: str
    num_bytes: int
    version: str  # etag, or modification time: changes when the content does


def parse_uri(uri: str) -> Location:
    """Parse strictly. A string without a scheme is a local path, made absolute against the working directory.

    Raises InvalidUri.
    """
    if not uri or _CONTROL.search(uri):
        raise InvalidUri("empty" if not uri else "holds a control character")
    match = _SCHEME.match(uri)
    if match is None:
        if "::" in uri.split("/", 1)[0]:
            raise InvalidUri("chained uris are not read")
        return Location("file", os.path.normpath(Path.cwd() / uri))
    scheme, rest = match[1].lower(), uri[match.end() :]
    if scheme == "file":
        if not rest.startswith("/"):
            raise InvalidUri("file:// wants an absolute path: file:///…")
        path = unquote(rest)
        if _CONTROL.search(path):
            raise InvalidUri("holds a control character")
        return Location("file", os.path.normpath(path))
    head = rest.split("/", 1)[0]
    if "@" in head or "::" in uri:
        raise InvalidUri("holds user information or a chained uri")
    if scheme in ("s3", "s3a"):
        if not _BUCKET.fullmatch(head):
            raise InvalidUri("not a bucket name after s3://")
        return Location("s3", rest)
    if not head:
        raise InvalidUri(f"nothing after {scheme}://")
    return Location(scheme, rest)


def join(base: str, *parts: str) -> str:
    """`base/part/part`, for uris and paths alike."""
    return "/".join([base.rstrip("/"), *parts])


def parent(uri: str) -> str:
    """The folder a file lies in."""
    location = parse_uri(uri)
    return Location(location.scheme, posixpath.dirname(location.path)).uri


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec filesystem of a uri, and the path within it. Raises InvalidUri for a scheme fsspec does not know."""
    location = parse_uri(uri)
    if location.scheme == "file":
        return fsspec.filesystem("file"), location.path
    if location.scheme == "s3":
        return s3(), location.path
    try:
        fs = fsspec.filesystem(location.scheme)
    except (ValueError, ImportError) as error:
        raise InvalidUri(f"{location.scheme}:// cannot be opened: {error}") from error
    return fs, cast("str", fs._strip_protocol(location.uri))


def s3() -> Any:
    """The S3 filesystem. Endpoint, region and credentials come from the usual AWS variables and files."""
    fs = fsspec.filesystem("s3", config_kwargs=S3_CONFIG, use_listings_cache=False, max_concurrency=1)
    fs.retries = 1
    return fs


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: a timeout, a broken connection, a 5xx, a 409 — not a refusal or an absence."""
    code = _s3_code(error)
    if code in _TRANSIENT_S3_CODES:
        return True
    if isinstance(error, (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)):
        return False
    if isinstance(error, (TimeoutError, FSTimeoutError, ConnectionError)):
        return True
    if isinstance(error, OSError):
        # s3fs wraps codes it does not know (502, 504, a proxy's words) in EIO.
        return error.errno in _TRANSIENT_ERRNO
    # botocore's and aiohttp's connection errors, without importing either here.
    return type(error).__module__.split(".")[0] in ("aiohttp", "aiobotocore") or (
        type(error).__module__ == "botocore.exceptions" and type(error).__name__ in _BOTOCORE_TRANSIENT
    )


_BOTOCORE_TRANSIENT: Final = {
    "ConnectionClosedError", "ConnectTimeoutError", "EndpointConnectionError", "HTTPClientError", "IncompleteReadError",
    "ReadTimeoutError", "ResponseStreamingError", "ProxyConnectionError", "ConnectionError", "ResponseParserError",
}  # fmt: skip


def _s3_code(error: BaseException) -> str | None:
    response = getattr(error.__cause__, "response", None)
    return response.get("Error", {}).get("Code") if isinstance(response, dict) else None


def backoff_seconds(attempt: int, *, base: float = 0.2, cap: float = 10.0) -> float:
    """Full jitter: a random wait below min(cap, base · 2^attempt), so that many clients do not come back together."""
    return random.uniform(0, min(cap, base * 2**attempt))  # noqa: S311


def retrying(what: str, call: Callable[[], T], *, max_attempts: int = MAX_ATTEMPTS) -> T:
    """Run `call`, again on transient errors. Raises the permanent error, or StorageError when the attempts are used up."""
    for attempt in range(max_attempts):
        try:
            return call()
        except Exception as error:  # noqa: BLE001 - sorted by is_transient: three libraries' errors have no common base
            if not is_transient(error):
                raise
            last = error
        time.sleep(backoff_seconds(attempt))
    raise StorageError(f"{what}: failed {max_attempts} times, last: {describe(last)}") from last


def describe(error: BaseException) -> str:
    """One line about an error of a store."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def exists(uri: str) -> bool:
    """Whether a file is there."""
    fs, path = filesystem(uri)
    return bool(retrying(f"looking for {uri}", lambda: fs.isfile(path)))


def read_bytes(uri: str) -> bytes:
    """A whole small file. Raises FileNotFoundError, PermissionError, StorageError."""
    fs, path = filesystem(uri)
    return cast("bytes", retrying(f"reading {uri}", lambda: fs.cat_file(path, **_deadline(fs))))


def open_for_reading(uri: str, *, block_bytes: int = 2**20) -> IO[bytes]:
    """A seekable binary file."""
    fs, path = filesystem(uri)
    options = {} if _is_local(fs) else {"block_size": block_bytes, "cache_type": "readahead"}
    return cast("IO[bytes]", retrying(f"opening {uri}", lambda: fs.open(path, "rb", **options)))


def list_files(folder: str) -> Iterator[StoredFile]:
    """Every file below a folder; none when there is no such folder."""
    fs, path = filesystem(folder)
    try:
        found = retrying(f"listing {folder}", lambda: fs.find(path, detail=True))
    except FileNotFoundError:
        return
    scheme = parse_uri(folder).scheme
    for name in sorted(found):
        if found[name].get("type") == "file" and name.startswith(path.rstrip("/") + "/"):
            yield _stored(scheme, found[name])


def list_folders(folder: str) -> list[str]:
    """Names of the folders directly below a folder; none when there is no such folder."""
    fs, path = filesystem(folder)
    try:
        entries = retrying(f"listing {folder}", lambda: fs.ls(path, detail=True))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(posixpath.basename(e["name"].rstrip("/")) for e in entries if e["type"] == "directory")


def expand(pattern: str) -> list[StoredFile]:
    """The files a pattern (`*`, `?`, `[…]`, `**`) or a plain uri names, in order. Empty when there are none."""
    fs, path = filesystem(pattern)
    scheme = parse_uri(pattern).scheme
    if any(c in path for c in "*?[") and not retrying(f"looking for {pattern}", lambda: fs.isfile(path)):
        found = retrying(f"expanding {pattern}", lambda: fs.glob(path, detail=True))
        return [_stored(scheme, found[name]) for name in sorted(found) if found[name]["type"] == "file"]
    try:
        info = retrying(f"looking for {pattern}", lambda: fs.info(path))
    except FileNotFoundError:
        return []
    return [_stored(scheme, info)] if info["type"] == "file" else []


def _stored(scheme: str, info: dict[str, Any]) -> StoredFile:
    version = info.get("ETag") or info.get("mtime") or info.get("LastModified") or info.get("last_modified") or ""
    return StoredFile(Location(scheme, info["name"]).uri, int(info["size"] or 0), str(version).strip('"'))


def create(uri: str, data: bytes, *, temporary_folder: str | None = None) -> bool:
    """Create a file that appears whole or not at all, and only if it is not there yet.

    True: the file holds `data` (also when an earlier answer was lost and the object turns out to be ours: callers put an
    attempt id into `data`, so equal bytes mean the same writer). False: another writer's file is there; it stays.
    `temporary_folder` is where a local file is prepared (same disk; default: beside it).
    Raises StorageError when it remains unknown, PermissionError and other OSErrors that no retry mends.
    """
    fs, path = filesystem(uri)
    if _is_local(fs):
        return _create_local(Path(path), data, Path(temporary_folder) if temporary_folder else Path(path).parent)

    def put() -> bool:
        try:
            fs.pipe_file(path, data, mode="create", **_deadline(fs))
        except FileExistsError:
            return _same_bytes(fs, path, data)
        except OSError as error:
            # Ceph and Swift answer the refusal as 412 without the Condition element; s3fs makes that EINVAL.
            if error.errno == errno.EINVAL and fs.isfile(path):
                return _same_bytes(fs, path, data)
            raise
        return True

    return retrying(f"creating {uri}", put)


def _same_bytes(fs: Any, path: str, data: bytes) -> bool:
    return int(fs.info(path)["size"]) == len(data) and fs.cat_file(path, **_deadline(fs)) == data


def _create_local(path: Path, data: bytes, temporary_folder: Path) -> bool:
    temporary_folder.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_folder / f"{uuid.uuid4().hex}.tmp"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return path.read_bytes() == data
        _fsync_folder(path.parent)
        return True
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def delete(uri: str) -> None:
    """Remove one file, if it is there. Only for files that nothing counts on."""
    fs, path = filesystem(uri)
    with suppress(FileNotFoundError):
        retrying(f"deleting {uri}", lambda: fs.rm_file(path))


def _is_local(fs: Any) -> bool:
    return "file" in ([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)


def _deadline(fs: Any) -> dict[str, float]:
    """fsspec's synchronous wrappers of asynchronous filesystems take a `timeout` for the whole operation."""
    return {"timeout": OPERATION_SECONDS} if getattr(fs, "async_impl", False) else {}
