"""Uris: parse, join, parent. Knows no stores and does no I/O.

A uri is a local path (absolute, or `file://`), `s3://bucket/key`, or any other scheme that fsspec knows. Chained uris
(`simplecache::file:///etc/hostname` reads a local file) never reach fsspec.
"""

from __future__ import annotations

import os
import posixpath
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# A password may hold `/`, as AWS's keys do: where a `:` stands that no port follows, up to the last `@`.
_USERINFO = re.compile(r"(?<=://)(?:[^/:\s]*:(?!\d*(?:/|$))\S*@|[^/]*@)")
_QUERY = re.compile(r"(?i:^https?://[^?#]*[?#])(.*)", re.DOTALL)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}")


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
    # An IPv6 address has "::" in its brackets, and what follows the host of a web uri is nobody's chain.
    chained = "::" in (re.sub(r"\[[^]]*\]", "", head) if scheme in ("http", "https") else uri)
    if "@" in head or chained:
        raise InvalidUri("holds user information or a chained uri")
    if scheme in ("s3", "s3a"):
        if not _BUCKET.fullmatch(head):
            raise InvalidUri("not a bucket name after s3://")
        if "?versionId=" in rest:
            raise InvalidUri("object versions are not read")  # s3fs would cut this off and read the newest
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


def without_userinfo(uri: str) -> str:
    """The uri as it may be shown: `user:password@` is cut out."""
    return _USERINFO.sub("", uri)


def without_secrets(uri: str) -> str:
    """Likewise, and without the query of an http uri, where signatures stand."""
    shown = without_userinfo(uri)  # first: a password may hold a `?`
    match = _QUERY.match(shown)
    return shown[: match.start(1)] + "…" if match else shown


def secret_in(uri: str) -> str | None:
    """What of a uri may be secret, as words after "which"; None when nothing is."""
    if without_userinfo(uri) != uri:
        return "holds user information"
    return "has a query, where signatures stand" if _QUERY.match(uri) else None
