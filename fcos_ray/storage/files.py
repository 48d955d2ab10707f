"""Files: read, create-if-absent, replace, delete. Knows no images and no Parquet."""

from __future__ import annotations

import errno
import io
import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, cast

from fcos_ray.errors import OutputError, StorageError
from fcos_ray.storage.answers import describe, remedy, store_answer
from fcos_ray.storage.connections import OPERATION_SECONDS, deadline, filesystem, is_local, is_s3
from fcos_ray.storage.listing import StoredFile, stat_file
from fcos_ray.storage.retries import STORE_ERRORS, retrying
from fcos_ray.storage.uris import join

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_COPY_BYTES: Final = 4 * 2**20


def read_bytes(uri: str) -> bytes:
    """A whole small file. Raises FileNotFoundError, PermissionError, StorageError."""
    fs, path = filesystem(uri)
    return cast("bytes", retrying(f"reading {uri}", lambda: fs.cat_file(path, **deadline(fs))))


def open_for_reading(uri: str, *, block_bytes: int = 2**20, found: StoredFile | None = None) -> IO[bytes]:
    """A seekable binary file. Raises FileNotFoundError, PermissionError, StorageError, also while reading.

    On S3 every range is a request of its own with a deadline and retries (s3fs's file has no deadline, 2026.9).
    `found` is the file as it was listed, when the caller knows: its size need not be asked for again.
    """
    fs, path = filesystem(uri)
    if is_s3(fs):
        found = found or stat_file(uri)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, f"opening {uri}: no such object")
        return cast("IO[bytes]", io.BufferedReader(_Ranges(fs, path, found), block_bytes))
    return cast("IO[bytes]", retrying(f"opening {uri}", lambda: fs.open(path, "rb")))


class _Ranges(io.RawIOBase):
    """A stored object as a seekable file, one GET per read."""

    def __init__(self, fs: Any, path: str, found: StoredFile) -> None:
        self._fs, self._path, self._found = fs, path, found
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._found.num_bytes}[whence]
        if base + offset < 0:
            raise ValueError(f"seek to {base + offset}")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        start, stop = self._at, min(self._at + len(view), self._found.num_bytes)
        if start >= stop:
            return 0

        def get() -> bytes:
            data = self._fs.cat_file(self._path, start=start, end=stop, timeout=OPERATION_SECONDS)
            if len(data) != stop - start:
                raise OSError(errno.EIO, f"{len(data)} bytes came, {stop - start} were wanted")
            return cast("bytes", data)

        view[: stop - start] = retrying(f"reading {self._found.uri}", get)
        self._at = stop
        return stop - start


def create(uri: str, data: bytes, *, temporary_folder: str | None = None) -> bool:
    """Create a file that appears whole or not at all, and only if it is not there yet.

    True: the file holds `data` (also when an earlier answer was lost and the object turns out to be ours: callers put
    an attempt id into `data`, so equal bytes mean the same writer). False: another writer's file is there; it stays.
    `temporary_folder` is where a local file is prepared (same disk; default: beside it).
    Raises StorageError when it remains unknown, PermissionError and other OSErrors that no retry mends.
    """
    fs, path = filesystem(uri)
    if is_local(fs):
        folder = Path(temporary_folder) if temporary_folder else Path(path).parent
        return retrying(f"creating {uri}", lambda: _create_local(Path(path), data, folder))

    options = deadline(fs)
    if is_s3(fs):
        # One PUT up to 5 GiB: a multipart upload checks the condition late, and Ceph 16 not at all.
        options = {"chunksize": 5 * 2**30, "timeout": OPERATION_SECONDS + len(data) / 2**20}

    def put() -> bool:
        try:
            fs.pipe_file(path, data, mode="create", **options)
        except OSError as error:
            # Ceph and Swift answer the refusal as 412 without the Condition element; s3fs makes that EINVAL.
            if isinstance(error, FileExistsError) or store_answer(error)[0] == 412:
                return _same_bytes(uri, data)
            raise
        return True

    return retrying(f"creating {uri}", put)


def _same_bytes(uri: str, data: bytes) -> bool:
    """With retries of its own: a failed look must not cost the attempts that creating has."""
    found = stat_file(uri)
    return found is not None and found.num_bytes == len(data) and read_bytes(uri) == data


def _create_local(path: Path, data: bytes, temporary_folder: Path) -> bool:
    _make_folder(temporary_folder)
    _make_folder(path.parent)
    temporary = temporary_folder / f"{uuid.uuid4().hex}.tmp"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            if path.stat().st_size != len(data) or path.read_bytes() != data:
                return False
        _fsync_folder(path.parent)
        return True
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def replace(uri: str, data: bytes, *, temporary_folder: str | None = None) -> None:
    """Write a small file, over the one that may be there: readers see the old one or the new one, whole.

    For what says how things stand; what counts is created, never replaced. `temporary_folder` and errors as in `create`.
    """
    fs, path = filesystem(uri)
    if is_local(fs):
        folder = Path(temporary_folder) if temporary_folder else Path(path).parent
        retrying(f"writing {uri}", lambda: _replace_local(Path(path), data, folder))
    else:
        retrying(f"writing {uri}", lambda: fs.pipe_file(path, data, **deadline(fs)))


def _replace_local(path: Path, data: bytes, temporary_folder: Path) -> None:
    _make_folder(temporary_folder)
    _make_folder(path.parent)
    temporary = temporary_folder / f".{uuid.uuid4().hex}.tmp"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _fsync_folder(path.parent)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def publish(path: Path, uri: str, *, overwrite: bool = False, temporary_folder: str | None = None) -> bool:
    """Make a finished local file appear under `uri`, whole or not at all. False: a file is there already, and stays.

    For files too large for `create`: flat in memory. In a store, above 128 MiB, two writers at once may both be told
    True (a multipart upload checks late, and Ceph 16 not at all). `temporary_folder` and errors as in `create`.
    """
    fs, target = filesystem(uri)
    if is_local(fs):
        folder = Path(temporary_folder) if temporary_folder else Path(target).parent
        return retrying(f"creating {uri}", lambda: _publish_local(path, Path(target), folder, overwrite=overwrite))
    if not overwrite and stat_file(uri) is not None:
        return _same_file(path, uri)

    def put() -> bool:
        options = {"timeout": OPERATION_SECONDS + path.stat().st_size / 2**20} if is_s3(fs) else {}
        try:
            fs.put_file(str(path), target, mode="overwrite" if overwrite else "create", **options)
        except OSError as error:
            if isinstance(error, FileExistsError) or store_answer(error)[0] == 412:
                return _same_file(path, uri)
            raise
        return True

    return retrying(f"creating {uri}", put)


def _same_file(path: Path, uri: str) -> bool:
    with path.open("rb") as ours, open_for_reading(uri, block_bytes=_COPY_BYTES) as theirs:
        while chunk := ours.read(_COPY_BYTES):
            if theirs.read(len(chunk)) != chunk:
                return False
        return not theirs.read(1)


def _publish_local(path: Path, target: Path, temporary_folder: Path, *, overwrite: bool) -> bool:
    _make_folder(temporary_folder)
    _make_folder(target.parent)
    temporary = temporary_folder / f".{uuid.uuid4().hex}.tmp"
    try:
        with path.open("rb") as data, temporary.open("xb") as file:
            shutil.copyfileobj(data, file, _COPY_BYTES)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            temporary.replace(target)
        else:
            try:
                os.link(temporary, target)
            except FileExistsError:
                return False
        _fsync_folder(target.parent)
        return True
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def _make_folder(folder: Path) -> None:
    """mkdir -p whose new folders survive a power cut."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _fsync_folder(folder.parent)


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
        retrying(f"deleting {uri}", lambda: fs.rm_file(path, **deadline(fs)))


def probe_create_if_absent(folder: str) -> None:
    """Require that `folder` can be written and that a second writer is refused. Raises OutputError, StorageError.

    It finds a store that ignores the condition; not one that checks it but lets two racing writers through.
    """
    fs, path = filesystem(folder)
    new_folders = [p for p in (Path(path), *Path(path).parents) if not p.exists()] if is_local(fs) else []
    probe = join(folder, f".probe-{uuid.uuid4().hex}")
    wanted = f"the output {folder} must let this job create files"
    try:
        created = create(probe, b"first")
        created_again = create(probe, b"second")
        kept = read_bytes(probe)
    except STORE_ERRORS as error:
        advice = "make that bucket or folder first" if isinstance(error, FileNotFoundError) else remedy(error)
        raise OutputError(f"{wanted}: {advice} ({describe(error)})") from error
    finally:
        with suppress(*STORE_ERRORS, StorageError):  # a store may allow writing and not deleting
            delete(probe)
        with suppress(OSError):
            for new in new_folders:  # a job that ends before its first file leaves no empty output behind
                new.rmdir()
    if not created or created_again or kept != b"first":
        raise OutputError(
            f"{wanted} only if absent: a second create of {probe} was to be refused, but the store took it. It ignores "
            "If-None-Match, so shards could be overwritten: choose a store that honours it (AWS S3, Ceph, a local disk)"
        )
