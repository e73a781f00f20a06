"""`stalewise serve`: one process that owns a run's buffer and weights, from start to a clean drain.

| loop | waits for | produces | unblocked by | on shutdown |
|---|---|---|---|---|
| server | requests | answers | callers | stops listening, ends waiting requests, finishes the rest, stops Redis |
| janitor (janitor.py) | a tick | removals of what is overdue | the clock | nothing |
| history (history.py) | a tick | a point of the charts | the clock | nothing |
"""

import asyncio
import errno
import logging
import signal
import socket
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType

import redis
import uvicorn
from starlette.types import ASGIApp

from buffer.errors import InvalidSettings, StoreUnavailable
from buffer.heap import keep_freed_memory
from buffer.redis_scripts import shard_prefix
from buffer.redis_server import check_promises, connect, redis_server
from buffer.redis_shards import claim_shards, open_table
from buffer.weights.directory_store import DirectoryWeightStore
from services.address import remove_address, write_address
from services.context import ServiceContext
from services.evaluations import BoardEvaluations
from services.history import RedisHistory, keep_history, observe
from services.janitor import keep_tidy
from services.presence import Presence, RedisBoard
from services.replay_api import create_app
from services.security import Guard, check_bind
from services.settings import RunConfig, log_settings
from services.stats import service_stats, store_status
from services.token_text import TokenTextReader
from services.trained_ring import RedisTrainedRing

log = logging.getLogger(__name__)

_KEEP_ALIVE_S = 75
"""Longer than any client keeps an idle connection, so that the client closes it and no request meets a closed one."""
_REDIS_CHECK_S = 1.0
_REDIS_DEAD_AFTER = 3
"""Failed checks in a row after which our own Redis is dead; a supervisor then starts service and Redis anew."""


def run_service(config: RunConfig) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises InvalidSettings (a port in use, no token on an open bind, a directory that cannot be written, a Redis that
    promises too little) and StoreUnavailable (Redis does not answer, or our own one died).
    """
    keep_freed_memory()
    service, directory = config.service, config.run.directory
    check_bind(service.host, service.tokens)
    log_settings(config)
    with ExitStack() as stack:
        listener = stack.enter_context(_listener(service.host, service.port))
        _make_directory(directory)
        redis_url = service.redis_url or stack.enter_context(redis_server(directory / "redis", config.redis))
        client = stack.enter_context(connect(redis_url))
        context = _context(config, client)
        server = _Server(
            create_app(context, Guard(service.tokens)),
            context=context,
            redis_client=client if service.redis_url is None else None,
        )
        url = _url(listener)
        with server.stopped_by_signals():
            server.run_on(listener, on_listening=lambda: _announce(directory, url))
        remove_address(directory)
        server.raise_failure()
    log.info("the service has ended")


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise InvalidSettings(
            f"the run's directory {directory} cannot be written: {error.strerror}", hint="set run.runs_dir"
        ) from error


def _context(config: RunConfig, client: redis.Redis) -> ServiceContext:
    run_id = config.run.name
    promises = check_promises(client, config.redis)
    claim_shards(client, config.table.shards, run_id)
    table = open_table(client, config.table, config.limiter, run_id)
    weights = DirectoryWeightStore(config.run.directory / "weights", settings=config.weights)
    latest = weights.latest()
    if latest is not None:
        if latest.run_id != run_id:
            raise InvalidSettings(
                f"{config.run.directory} holds weights of run {latest.run_id}, not {run_id}",
                hint="set run.name or run.runs_dir",
            )
        table.advance_version(latest.version)  # a service that died between manifest and table
    first = shard_prefix(run_id, 0)
    return ServiceContext(
        run_id=run_id,
        settings=config.service,
        table=table,
        table_settings=config.table,
        limiter_settings=config.limiter,
        weights=weights,
        presence=Presence(RedisBoard(client, key=first + "presence")),
        history=RedisHistory(client, prefix=first + "history:"),
        trained=RedisTrainedRing(client, prefix=first + "trained:"),
        token_texts=TokenTextReader(config.run.model).texts,
        store=partial(store_status, client, config.run.directory),
        evaluations=BoardEvaluations(RedisBoard(client, key=first + "evaluations"), weights),
        promises=lambda: promises,
    )


class _Uvicorn(uvicorn.Server):
    """Uvicorn without its signal handlers, which would kill the process after the drain."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave the signals to _Server."""
        yield


class _Server:
    """Uvicorn with our signals: it drains, says so to requests that wait, and returns to its caller."""

    def __init__(self, app: ASGIApp, *, context: ServiceContext, redis_client: "redis.Redis | None") -> None:
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
        self._context = context
        self._closing = context.closing
        self._redis = redis_client
        self._failure: StoreUnavailable | None = None

    def run_on(self, listener: socket.socket, *, on_listening: Callable[[], None]) -> None:
        """Serve on a bound socket until told to stop; `on_listening` is called once requests are answered."""
        asyncio.run(self._serve(listener, on_listening))

    def raise_failure(self) -> None:
        """Raise what ended the service, if not a signal."""
        if self._failure is not None:
            raise self._failure

    @contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """Drain at SIGTERM or SIGINT within this block; drop running requests at the second one."""
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._uvicorn.force_exit = self._closing.is_set()
        self._closing.set()
        self._uvicorn.should_exit = True

    async def _serve(self, listener: socket.socket, on_listening: Callable[[], None]) -> None:
        serving = asyncio.create_task(self._uvicorn.serve([listener]))
        while not self._uvicorn.started:
            if serving.done():
                return await serving  # it raises what went wrong
            await asyncio.sleep(0.01)
        on_listening()
        watching = asyncio.create_task(self._watch_redis())
        tick_s = self._context.settings.janitor_tick_s
        context = self._context
        remembering = asyncio.create_task(keep_history(context.history, lambda: observe(service_stats(context))))
        tidying = asyncio.create_task(keep_tidy(self._context.table, tick_s=tick_s))
        try:
            await serving
        finally:
            watching.cancel()
            tidying.cancel()
            remembering.cancel()

    async def _watch_redis(self) -> None:
        """End the service when our own Redis has died: nobody else would start it again."""
        failures = 0
        while self._redis is not None:
            await asyncio.sleep(_REDIS_CHECK_S)
            try:
                await asyncio.to_thread(self._redis.ping)
                failures = 0
            except redis.exceptions.TimeoutError:
                continue  # busy is not dead
            except redis.exceptions.ConnectionError as error:
                failures += 1
                if failures == _REDIS_DEAD_AFTER:
                    self._failure = StoreUnavailable(f"our own Redis has died: {error}", hint="start the service again")
                    self._closing.set()
                    self._uvicorn.should_exit = True
                    return


def _announce(directory: Path, url: str) -> None:
    write_address(directory, url)
    log.info("serving on %s", url)


@contextmanager
def _listener(host: str, port: int) -> Iterator[socket.socket]:
    """Yield a bound socket. Raises InvalidSettings when the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InvalidSettings(
            f"service.host={host}: {error.strerror}", hint="give an address of this machine"
        ) from error
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(2048)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise InvalidSettings(
                    f"port {port} of {host} is in use",
                    hint="stop what uses it, or set service.port to another one; 0 takes a free one",
                ) from error
            raise InvalidSettings(f"cannot listen on port {port} of {host}: {error.strerror}") from error
        yield listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
