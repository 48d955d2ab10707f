"""Listed files as an fsspec filesystem, for libraries that want one. Knows what was listed, and no file formats.

What was listed is there, with the size it had; nothing else is. DuckDB asks fsspec for existence, size and age of every
file of every query: with s3fs each is a request, without deadline and one after the other (DuckDB 2.0, s3fs 2026.9).
"""

from __future__ import annotations

import errno
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import IO, Any

from fsspec import AbstractFileSystem

from fcos_ray.storage.files import open_for_reading
from fcos_ray.storage.listing import StoredFile
from fcos_ray.storage.uris import parse_uri


class ListedFiles(AbstractFileSystem):  # type: ignore[misc]  # fsspec is untyped
    """Reads the given files, which do not change any more.

    Its scheme is its own, so that it hides no other filesystem; or the files', so that they keep their names.
    """

    cachable = False

    def __init__(self, files: Iterable[StoredFile], *, scheme: str | None = None) -> None:
        super().__init__()
        self.protocol = scheme or f"listed-{uuid.uuid4().hex[:12]}"
        self._files = {parse_uri(file.uri).path: file for file in files}

    def uri(self, file: StoredFile) -> str:
        """The file's name in this filesystem."""
        return f"{self.protocol}://{parse_uri(file.uri).path}"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.split("://", 1)[-1]

    def _open(self, path: str, mode: str = "rb", **_: Any) -> IO[bytes]:
        assert mode == "rb", f"{path} is not written here"
        found = self._find(path)
        return open_for_reading(found.uri, found=found)

    def _find(self, path: str) -> StoredFile:
        try:
            return self._files[self._strip_protocol(path)]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, f"{path} was not listed") from None

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        found = self._find(path)
        return {"name": self._strip_protocol(path), "size": found.num_bytes, "type": "file"}

    def exists(self, path: str, **_: Any) -> bool:
        return self._strip_protocol(path) in self._files

    def glob(self, path: str, **_: Any) -> list[str]:
        """The path itself, when it was listed: nothing in it is a pattern."""
        return [self._strip_protocol(path)] if self.exists(path) else []

    def modified(self, path: str) -> datetime:
        """One time for all: what was committed stays as it is."""
        self._find(path)
        return datetime.fromtimestamp(0, UTC)
