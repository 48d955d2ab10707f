"""Connections: uri -> filesystem, with timeouts that bound. Knows no retries and no file formats."""

from __future__ import annotations

from typing import Any, Final, cast

import fsspec

from fcos_ray.storage.uris import InvalidUri, parse_uri

# One try: connect_timeout bounds the handshake, read_timeout each silence on the socket. botocore's own retries are off
# (max_attempts 0) and s3fs's are one: the callers here retry with a deadline, and count.
S3_CONFIG: Final[dict[str, Any]] = {
    "connect_timeout": 10,
    "read_timeout": 30,
    "retries": {"max_attempts": 0},
    "max_pool_connections": 128,
}
OPERATION_SECONDS: Final = (
    120.0  # deadline of one try of one operation, whatever the sockets say (s3fs has hung for hours)
)


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


def is_local(fs: Any) -> bool:
    return "file" in ([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)


def is_s3(fs: Any) -> bool:
    return "s3" in ([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)


def deadline(fs: Any) -> dict[str, float]:
    """fsspec's synchronous wrappers of asynchronous filesystems take a `timeout` for the whole operation."""
    return {"timeout": OPERATION_SECONDS} if getattr(fs, "async_impl", False) else {}
