"""Outages: does the store behind a uri answer at all? Knows buckets and folders, not what is read from them."""

from __future__ import annotations

import asyncio
import os
from typing import Final

from fcos_ray import storage

_TRIES: Final = 3  # one may be lost to the ordinary trouble of a busy store
_TIMEOUT_SECONDS: Final = 5.0


async def store_answers(location: storage.Location, *, root: str | None, timeout_seconds: float) -> bool:
    """Whether the bucket, or the local folder `root`, is there to be asked: a denial or an absence is an answer too.

    Three tries of at most 5 seconds (or `timeout_seconds`, when that is less). A store that cannot be asked so counts as
    answering. To be awaited on s3fs's own event loop.
    """
    for attempt in range(_TRIES):
        if attempt:
            await asyncio.sleep(storage.backoff_seconds(attempt))
        try:
            async with asyncio.timeout(min(timeout_seconds, _TIMEOUT_SECONDS)):
                await _ask(location, root)
        except storage.STORE_ERRORS as error:
            if not storage.is_transient(error):
                return True
        else:
            return True
    return False


async def _ask(location: storage.Location, root: str | None) -> None:
    if location.scheme == "s3":
        await storage.s3()._call_s3("head_bucket", Bucket=location.path.partition("/")[0])
    elif root is not None:
        await asyncio.to_thread(os.stat, root)
