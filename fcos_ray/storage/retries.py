"""Retries: which errors of a store are worth another try, and how long to wait. Knows no files and no images."""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable
from typing import Final, TypeVar

import aiohttp
import botocore.exceptions as boto  # type: ignore[import-untyped]
from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]
from fsspec.exceptions import FSTimeoutError

from fcos_ray.errors import StorageError
from fcos_ray.storage.answers import cut_secrets, describe, remedy, store_answer

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
                text = f"{cut_secrets(what)}: {describe(error)}"
                # One argument for s3fs's errors, which come without errno; two for the system's.
                raise type(error)(*([error.errno, text] if error.errno else [text])) from error
            last = error
        if attempt + 1 < max_attempts:
            time.sleep(backoff_seconds(attempt))
    raise StorageError(
        f"{cut_secrets(what)}: failed {max_attempts} times, last: {describe(last)}; {remedy(last)}"
    ) from last
