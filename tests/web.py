"""A web server in a thread, on loopback, for tests to read from."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Callable
from typing import Any

from aiohttp import web


class Site:
    """A web server. `pages`: path -> what answers; `asked`: the requests that came, in order."""

    def __init__(self, pages: dict[str, Callable[[web.Request], Any]], tls: ssl.SSLContext | None = None) -> None:
        self.pages, self.asked = pages, list[web.Request]()
        self.at_once = self.most_at_once = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.port = asyncio.run_coroutine_threadsafe(self._start(tls), self._loop).result(10)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"

    async def _start(self, tls: ssl.SSLContext | None) -> int:
        self._runner = web.ServerRunner(web.Server(self._answer), shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        return int(self._runner.addresses[0][1])

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self.asked.append(request)  # type: ignore[arg-type]
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            made = self.pages[request.path](request)  # type: ignore[arg-type]
            return await made if asyncio.iscoroutine(made) else made
        finally:
            self.at_once -= 1

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
