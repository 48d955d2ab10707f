"""Retries: which errors of a store are worth another try, and how long to wait. Knows no files and no images."""

from __future__ import annotations

import errno
import random
import re
import time
from collections.abc import Callable
from typing import Final, TypeVar

import aiohttp
import botocore.exceptions as boto  # type: ignore[import-untyped]
from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]
from fsspec.exceptions import FSTimeoutError

from fcos_ray.errors import StorageError

T = TypeVar("T")

# At 30 % of requests failing 8 attempts give up on one operation in 15,000, and a large run has more; 12 on one in two
# million. Where every attempt is refused at once, 12 last half a minute.
MAX_ATTEMPTS: Final = 12
# Everything a store can answer with. What is not in here is a bug and propagates.
STORE_ERRORS: Final = (
    OSError, FSTimeoutError, boto.BotoCoreError, boto.ClientError, ResponseParserError, aiohttp.ClientError,
)  # fmt: skip
_TRANSIENT_CLIENT_ERRORS: Final = (
    boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, boto.FlexibleChecksumError,
    ResponseParserError, aiohttp.ClientError,
)  # fmt: skip
_TRANSIENT_ERRNO: Final = {
    errno.EAGAIN, errno.EBUSY, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH,
    errno.EINTR, errno.EIO, errno.ENETDOWN, errno.ENETUNREACH, errno.EPIPE, errno.EREMOTEIO, errno.ESTALE,
    errno.ETIMEDOUT,
}  # fmt: skip
_TRANSIENT_STATUS: Final = {408, 409, 425, 429, 500, 502, 503, 504}
# Codes that come with a 400 or 403 although they are the store's or the clock's trouble, not the object's.
_TRANSIENT_S3_CODES: Final = {
    "BadDigest", "ExpiredToken", "IncompleteBody", "RequestTimeout", "RequestTimeTooSkewed", "SlowDown", "Throttling",
    "ThrottlingException", "TokenRefreshRequired", "XAmzContentSHA256Mismatch",
}  # fmt: skip
_SECRET = re.compile(r"(?<=://)[^/\s@]+(?=@)|(?<=[?&])(?:X-Amz-|AWSAccessKeyId|Signature)[^\s&\"']*")


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: a timeout, a broken connection, a 5xx, a 409 — not a refusal or an absence."""
    status, code = store_answer(error)
    if status:  # s3fs makes EIO of codes it does not know: the status says more than its errno
        return status in _TRANSIENT_STATUS or code in _TRANSIENT_S3_CODES
    if isinstance(error, _TRANSIENT_CLIENT_ERRORS):
        return True
    if isinstance(error, OSError):
        return isinstance(error, (TimeoutError, ConnectionError)) or error.errno in _TRANSIENT_ERRNO
    return isinstance(error, FSTimeoutError)


def store_answer(error: BaseException | None) -> tuple[int, str]:
    """HTTP status and error code of an S3 answer behind an error; (0, "") when there was none."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return int(status), str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__
    return 0, ""


def backoff_seconds(attempt: int, *, base: float = 0.2, cap: float = 10.0) -> float:
    """Full jitter: a random wait below min(cap, base · 2^attempt), so that many clients do not come back together."""
    return random.uniform(0, min(cap, base * 2**attempt))


def retrying(what: str, call: Callable[[], T], *, max_attempts: int = MAX_ATTEMPTS) -> T:
    """Run `call`, again on transient errors. Raises the permanent error, or StorageError when the attempts are used up.

    `what` names the uri: a permanent OSError keeps its type and gets it into its text.
    """
    for attempt in range(max_attempts):
        try:
            return call()
        except STORE_ERRORS as error:
            if not is_transient(error):
                if not isinstance(error, OSError) or type(error).__module__ != "builtins":
                    raise
                text = f"{what}: {describe(error)}"
                # One argument for s3fs's errors, which come without errno; two for the system's.
                raise type(error)(*([error.errno, text] if error.errno else [text])) from error
            last = error
        if attempt + 1 < max_attempts:
            time.sleep(backoff_seconds(attempt))
    raise StorageError(f"{what}: failed {max_attempts} times, last: {describe(last)}") from last


def describe(error: BaseException) -> str:
    """One line about an error of a store, without user information or signatures of an address."""
    text = _SECRET.sub("…", " ".join(str(error).split()))[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
