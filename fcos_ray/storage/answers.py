"""Answers: what an error of a store says, in one line, and what a user can do about it. Knows no files."""

from __future__ import annotations

import errno
import re
from typing import Final

import botocore.exceptions as boto  # type: ignore[import-untyped]

# User information: a password may hold `/`, as AWS's keys do; no port follows its `:`.
_USERINFO: Final = re.compile(r"(?<=://)(?:[^/\s@]+(?=@)|[^/:\s]*:(?!\d*(?:/|\s|$))\S*(?=@))")
_QUERY: Final = re.compile(r"(?i)(https?://[^\s?#]*[?#])\S+")  # where signatures and tokens stand
_BY_S3_CODE: Final = {
    "AccessDenied": "these credentials lack the right: allow s3:ListBucket, s3:GetObject and, for an output, s3:PutObject",
    "403": "these credentials lack the right: allow s3:ListBucket, s3:GetObject and, for an output, s3:PutObject",
    "ExpiredToken": "the credentials have expired: renew them",
    "InvalidAccessKeyId": "the store does not know this access key: check AWS_ACCESS_KEY_ID or AWS_PROFILE",
    "InvalidToken": "the session token is not valid: check AWS_SESSION_TOKEN, or renew the credentials",
    "NoSuchBucket": "there is no such bucket: check its name, or make it first",
    "RequestTimeTooSkewed": "the clock of this machine is wrong: set it",
    "SignatureDoesNotMatch": "the secret key does not fit the access key: check AWS_SECRET_ACCESS_KEY",
}
_BY_ERRNO: Final = {
    errno.EACCES: "this user lacks the right: allow it, or choose another place",
    errno.EPERM: "this user lacks the right: allow it, or choose another place",
    errno.EDQUOT: "the quota is used up: free space there, or choose another place",
    errno.ENOSPC: "the disk is full: free space there, or choose another place",
    errno.EROFS: "it is mounted read-only: choose another place",
    errno.ENOTDIR: "a part of the path is a file: choose another place",
}
_NO_CREDENTIALS: Final = "there are no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
_NO_ANSWER: Final = "check AWS_ENDPOINT_URL and the network"
_UNKNOWN: Final = "check the uri, the network, the credentials and their rights"


def store_answer(error: BaseException | None) -> tuple[int, str]:
    """HTTP status and error code of an S3 answer behind an error; (0, "") when there was none."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return int(status), str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__
    return 0, ""


def cut_secrets(text: str) -> str:
    """A text as it may be shown: the uris that it names have neither user information nor, on the web, a query."""
    return _QUERY.sub(r"\1…", _USERINFO.sub("…", text))  # user information first: a password may hold a `?`


def describe(error: BaseException) -> str:
    """One line about an error of a store, without user information or the query of an address."""
    text = cut_secrets(" ".join(_text(error).split()))[:300]
    if error.__cause__ is not None and text.endswith(describe(error.__cause__)):
        return text  # `retrying` has put in front what was tried
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    _, code = store_answer(error)
    text = str(error)
    return text if code in text else code if text in ("", "None") else f"{code}: {text}"  # Ceph sends codes alone


def remedy(error: BaseException) -> str:
    """One clause of advice."""
    _, code = store_answer(error)
    if code in _BY_S3_CODE:
        return _BY_S3_CODE[code]
    if isinstance(error, (boto.NoCredentialsError, boto.PartialCredentialsError)):
        return _NO_CREDENTIALS
    if isinstance(error, (boto.ConnectionError, boto.HTTPClientError)):
        return _NO_ANSWER
    return _BY_ERRNO.get(getattr(error, "errno", None) or 0, _UNKNOWN)
