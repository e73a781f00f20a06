"""Several processes that answer on one listening socket, and the one that starts, replaces and ends them.

| loop | waits for | produces | unblocked by | on shutdown |
|---|---|---|---|---|
| supervisor | the end of a worker, a signal | a new worker | the kernel | lets all drain, kills what does not |
| worker | requests; the end of the supervisor | answers | callers | as a service of one process |

All state is in Redis and on disk, so a request may meet any worker. A connection that a killed worker had taken is
lost, and its client repeats the request; those that no worker has taken yet stay in the queue of the shared socket.
"""

import asyncio
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from buffer.heap import keep_freed_memory
from buffer.redis_client import connect
from services.assembly import assemble
from services.http_server import HttpServer, stopped_by
from services.log_lines import set_up_logging
from services.processes import ChildFailed
from services.replay_api import create_app
from services.security import Guard
from services.settings import RunConfig

log = logging.getLogger(__name__)

MAX_DEATHS = 5
"""Deaths of workers within DEATHS_WITHIN_S that are bad luck; one more is a defect, and the service ends."""
DEATHS_WITHIN_S = 60.0
_KILL_AFTER_S = 5.0
"""Beyond service.drain_s."""


class Workers:
    """The workers of one service. Made and run by the process that owns the listening socket."""

    def __init__(self, config: RunConfig, redis_url: str, promises: Mapping[str, str], listener: socket.socket) -> None:
        self._config, self._listener = config, listener
        self._arguments = (config, redis_url, dict(promises), listener)
        self._processes: list[SpawnProcess] = []
        self._deaths_s: deque[float] = deque(maxlen=MAX_DEATHS + 1)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = asyncio.Event()
        self._stopping = False

    def run(self, *, on_listening: Callable[[], None], beside: Callable[[], AbstractAsyncContextManager[None]]) -> None:
        """Serve until `stop`; `on_listening` is called once all workers answer, `beside` is entered from then on.

        Raises ChildFailed when workers die again and again.
        """
        try:
            asyncio.run(self._run(on_listening, beside))
        finally:
            self._end()

    def stop(self) -> None:
        """Let the workers drain; a second call lets them drop running requests."""
        self._stopping = True
        self._tell_all()
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._changed.set)

    async def _run(
        self, on_listening: Callable[[], None], beside: Callable[[], AbstractAsyncContextManager[None]]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        answering = [self._start() for _ in range(self._config.service.workers)]
        for connection in answering:
            await asyncio.to_thread(_wait_until_told, connection)
        if not self._stopping:
            on_listening()
        async with beside():
            while not self._stopping:
                self._replace_dead()
                await self._changed.wait()
                self._changed.clear()

    def _start(self) -> Connection:
        """Start a worker; the connection returned is told when it answers requests, and closed when it cannot."""
        context = multiprocessing.get_context("spawn")
        answers, tell = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(*self._arguments, tell), name="worker")
        process.start()
        tell.close()
        self._processes.append(process)
        assert self._loop is not None, "run started it"
        self._loop.add_reader(process.sentinel, self._changed.set)
        return answers

    def _replace_dead(self) -> None:
        for process in [process for process in self._processes if process.exitcode is not None]:
            self._forget(process)
            self._deaths_s.append(time.monotonic())
            log.warning("worker %s %s: starting another one", process.pid, _how(process))
            if len(self._deaths_s) > MAX_DEATHS and self._deaths_s[-1] - self._deaths_s[0] < DEATHS_WITHIN_S:
                raise ChildFailed(
                    f"{len(self._deaths_s)} workers died within {DEATHS_WITHIN_S:g} s, the last one {_how(process)}",
                    hint="see the log above; free memory if the kernel killed them",
                )
            self._start().close()

    def _forget(self, process: SpawnProcess) -> None:
        assert self._loop is not None, "run started it"
        self._loop.remove_reader(process.sentinel)
        self._processes.remove(process)

    def _tell_all(self) -> None:
        for process in self._processes:
            if process.exitcode is None:
                process.terminate()

    def _end(self) -> None:
        """Let every worker drain, and kill those that do not."""
        if not self._stopping:
            self._tell_all()
        deadline_s = time.monotonic() + self._config.service.drain_s + _KILL_AFTER_S
        for process in self._processes:
            process.join(max(0.0, deadline_s - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()


def _how(process: SpawnProcess) -> str:
    code = process.exitcode
    return f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"


def _wait_until_told(connection: Connection) -> None:
    with connection:
        try:
            connection.recv_bytes()
        except EOFError:  # it died before: the supervisor sees that, too
            return


def _work(
    config: RunConfig, redis_url: str, promises: Mapping[str, str], listener: socket.socket, tell: Connection
) -> None:
    """Be a worker: answer until SIGTERM, and no longer than the supervisor lives."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the supervisor passes it on in order
    keep_freed_memory()
    set_up_logging(config.log, run_id=config.run.name)
    threading.Thread(target=_end_with_supervisor, daemon=True).start()
    with connect(redis_url) as client:
        context = assemble(config, client, promises)
        server = HttpServer(create_app(context, Guard(config.service.tokens)), context)
        with stopped_by(server.stop, signal.SIGTERM):
            server.run_on(listener, on_listening=lambda: _tell(tell))


def _tell(connection: Connection) -> None:
    with connection:
        try:
            connection.send_bytes(b"answering")
        except BrokenPipeError:  # a replacement: nobody waits for it
            return


def _end_with_supervisor() -> None:
    """End at once when the supervisor was killed: our own Redis ends with it, and the port must be free."""
    supervisor = multiprocessing.parent_process()
    assert supervisor is not None, "only a supervisor starts workers"
    supervisor.join()
    os._exit(1)
