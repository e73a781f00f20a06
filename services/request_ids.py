"""Gives each request an id, the caller's if it sent one: returned, in every log line, and in one line per failure."""

import logging
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from buffer.request_id import HEADER, request_scope

log = logging.getLogger(__name__)


class RequestIds:
    """An ASGI middleware. Requests are logged as they end: failures of ours as errors, the rest at debug level."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request under its id."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        with request_scope(given) as request_id:
            await self._serve(scope, receive, send, request_id)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        began_s, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            level = logging.ERROR if status >= 500 else logging.DEBUG
            log.log(level, "%s %s: %d in %.3f s", scope["method"], scope["path"], status, time.monotonic() - began_s)
