"""Uvicorn with our signals: it drains, says so to requests that wait, and returns to its caller."""

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from services.context import ServiceContext

_KEEP_ALIVE_S = 75
"""Longer than any client keeps an idle connection, so that the client closes it and no request meets a closed one."""


class _Uvicorn(uvicorn.Server):
    """Uvicorn without its signal handlers, which would kill the process after the drain."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave the signals to HttpServer."""
        yield


@asynccontextmanager
async def _nothing() -> AsyncIterator[None]:
    yield


class HttpServer:
    """Answers requests on a bound socket, in this process, until told to stop."""

    def __init__(self, app: ASGIApp, context: ServiceContext) -> None:
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                app,
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=round(context.settings.drain_s),
            )
        )
        self._closing = context.closing

    def run_on(
        self,
        listener: socket.socket,
        *,
        on_listening: Callable[[], None],
        beside: Callable[[], AbstractAsyncContextManager[None]] = _nothing,
    ) -> None:
        """Serve until `stop`; `on_listening` is called once requests are answered, `beside` is entered from then on."""
        asyncio.run(self._serve(listener, on_listening, beside))

    def stop(self) -> None:
        """Drain; a second call drops running requests."""
        self._uvicorn.force_exit = self._closing.is_set()
        self._closing.set()
        self._uvicorn.should_exit = True

    async def _serve(
        self,
        listener: socket.socket,
        on_listening: Callable[[], None],
        beside: Callable[[], AbstractAsyncContextManager[None]],
    ) -> None:
        serving = asyncio.create_task(self._uvicorn.serve([listener]))
        while not self._uvicorn.started:
            if serving.done():
                await serving  # it raises what went wrong
                return
            await asyncio.sleep(0.01)
        on_listening()
        async with beside():
            await serving


@contextmanager
def stopped_by(stop: Callable[[], None], *numbers: signal.Signals) -> Iterator[None]:
    """Call `stop` at each of these signals within this block."""

    def handle(number: int, frame: FrameType | None) -> None:
        stop()

    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
