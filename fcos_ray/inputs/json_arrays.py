"""JSON arrays that cannot be read -> what is wrong, in which row. For error paths only: json_lines.py does the reading."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from typing import IO, Any, Final

import pyarrow as pa

from fcos_ray.errors import ManifestError, StorageError
from fcos_ray.inputs.scans import LINE_BYTES, opened, unreadable

_CHUNK: Final = 2**20  # characters
_SPACE: Final = re.compile(r"[ \t\r\n]*")
_COCO: Final = re.compile(r'"(?:images|annotations)"\s*:\s*\[')
_WANTED: Final = "wanted a JSON array of objects, [ {…}, {…} ]"


def bad_array(uris: Sequence[str]) -> ManifestError | StorageError | None:
    """What is wrong with the first file that is no array of objects; rows count from 0 (DuckDB 2.0 counts otherwise)."""
    for uri in uris:
        row = -1
        try:
            with io.TextIOWrapper(opened(uri), "utf-8-sig") as file:
                text = _Text(file)
                if text.peek() not in ("[", ""):
                    return ManifestError(f"{uri}: {_not_an_array(text, uri)}")
                for row, element in enumerate(_elements(text)):
                    if not isinstance(element, dict):
                        return ManifestError(f"{uri} row {row}: wanted a JSON object, got {json.dumps(element)[:80]}")
        except json.JSONDecodeError as error:
            return ManifestError(f"{uri} row {row + 1} is not JSON: {error.msg}, got {error.doc[error.pos :][:40]!r}")
        except UnicodeDecodeError as error:
            return ManifestError(f"{uri} cannot be read: wanted UTF-8, got byte {error.object[error.start]:#04x}")
        except (pa.ArrowException, OSError, EOFError) as error:
            return unreadable(error, [uri])
    return None


class _Text:
    """A file read a piece at a time; `at` is the place of the next token in `buffer`."""

    def __init__(self, file: IO[str]) -> None:
        self._file, self._decoder = file, json.JSONDecoder()
        self.buffer, self.at = "", 0

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            found = _SPACE.match(self.buffer, self.at)
            assert found is not None
            self.at = found.end()
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self._read_on():
                return ""

    def value(self) -> Any:
        """The JSON value that starts at the place. Raises JSONDecodeError."""
        while True:
            try:
                value, self.at = self._decoder.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError:  # wrong, or cut off by the end of the buffer
                if len(self.buffer) - self.at > LINE_BYTES or not self._read_on():
                    raise
            else:
                return value

    def _read_on(self) -> bool:
        more = self._file.read(_CHUNK)
        self.buffer, self.at = self.buffer[self.at :] + more, 0
        return bool(more)


def _elements(text: _Text) -> Iterator[Any]:
    if not text.peek():
        return
    text.at += 1
    while text.peek() != "]":
        yield text.value()
        if text.peek() == "]":
            break
        if text.peek() != ",":
            raise json.JSONDecodeError("Expecting ',' or ']'", text.buffer, text.at)
        text.at += 1
        if text.peek() == "]":
            raise json.JSONDecodeError("Expecting an object after ','", text.buffer, text.at)
    text.at += 1
    if text.peek():
        raise json.JSONDecodeError("Expecting the end of the file after ']'", text.buffer, text.at)


def _not_an_array(text: _Text, uri: str) -> str:
    head = text.buffer[text.at :]
    if not head.startswith("{"):
        return f"{_WANTED}, got {head[:40]!r}"
    if _COCO.search(head):
        name = uri.rsplit("/", 1)[1]
        return (
            "this looks like a COCO annotations file; its images[] make a manifest: `jq .images "
            f"{name} > manifest.json` in the folder that file_name starts from, then --manifest manifest.json "
            "--uri-column file_name --image-id-column id"
        )
    return f"{_WANTED}, got an object; a file of one object per line is named .jsonl"
