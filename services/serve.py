"""`stalewise serve`: what owns a run's buffer and weights, from start to a clean drain.

| loop | waits for | produces | unblocked by | on shutdown |
|---|---|---|---|---|
| server (http_server.py) | requests | answers | callers | stops listening, ends waiting requests, finishes the rest |
| supervisor (workers.py) | the end of a worker | another worker | the kernel | ends all workers |
| housekeeping (housekeeping.py) | ticks | what is due by the clock | the clock | nothing; then Redis is stopped |
"""

import errno
import logging
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager
from pathlib import Path

from buffer.errors import InvalidSettings, StoreUnavailable
from buffer.heap import keep_freed_memory
from buffer.redis_client import RedisClient, check_promises, connect
from buffer.redis_memory import check_memory
from buffer.redis_server import redis_server
from buffer.redis_shards import claim_layout
from services.address import remove_address, write_address
from services.assembly import assemble, take_up
from services.context import ServiceContext
from services.housekeeping import keeping_house
from services.http_server import HttpServer, stopped_by
from services.replay_api import create_app
from services.security import Guard, check_bind
from services.settings import RunConfig, log_settings
from services.workers import Workers

log = logging.getLogger(__name__)


def run_service(config: RunConfig) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises InvalidSettings (a port in use, no token on an open bind, a directory that cannot be written, a Redis that
    promises or holds too little), StoreUnavailable (Redis does not answer, or our own one died) and ChildFailed
    (workers die).
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
        promises = check_promises(client, config.redis)
        check_memory(client, config.table, config.run.name)
        claim_layout(client, config.table, config.run.name)
        context = assemble(config, client, promises)
        take_up(context)
        own_redis = client if service.redis_url is None else None
        try:
            _Service(context, own_redis, url=_url(listener), directory=directory).run(config, redis_url, listener)
        finally:
            remove_address(directory)
    log.info("the service has ended")


class _Service:
    """One run of the service, by this process alone or by workers; this one keeps house in both cases."""

    def __init__(self, context: ServiceContext, own_redis: RedisClient | None, *, url: str, directory: Path) -> None:
        self._context, self._own_redis = context, own_redis
        self._url, self._directory = url, directory
        self._failure: StoreUnavailable | None = None
        self._stop: Callable[[], None] | None = None

    def run(self, config: RunConfig, redis_url: str, listener: socket.socket) -> None:
        """Serve until a signal. Raises StoreUnavailable when our own Redis has died, ChildFailed when workers die."""
        if config.service.workers == 1:
            server = HttpServer(create_app(self._context, Guard(config.service.tokens)), self._context)
            self._stop = server.stop
            with stopped_by(server.stop, signal.SIGTERM, signal.SIGINT):
                server.run_on(listener, on_listening=self._announce, beside=self._keeping_house)
        else:
            workers = Workers(config, redis_url, self._context.promises(), listener)
            self._stop = workers.stop
            with stopped_by(workers.stop, signal.SIGTERM, signal.SIGINT):
                workers.run(on_listening=self._announce, beside=self._keeping_house)
        if self._failure is not None:
            raise self._failure

    def _keeping_house(self) -> AbstractAsyncContextManager[None]:
        return keeping_house(self._context, self._own_redis, fail=self._fail)

    def _fail(self, failure: StoreUnavailable) -> None:
        assert self._stop is not None, "run was called"
        self._failure = failure
        self._stop()

    def _announce(self) -> None:
        write_address(self._directory, self._url)
        log.info("serving on %s", self._url)


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise InvalidSettings(
            f"the run's directory {directory} cannot be written: {error.strerror}", hint="set run.runs_dir"
        ) from error


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
