"""A service for a test: the app on a real socket in a thread, or the real `stalewise serve` process."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

import uvicorn

from buffer.client import HttpTable, HttpWeightStore
from buffer.connection import ClientSettings, ServiceClient
from buffer.memory_table import MemoryTable
from buffer.rate_limiter import RateLimiterSettings
from buffer.table import ServedTable, TableSettings
from buffer.types import PolicyVersion
from buffer.weights.directory_store import DirectoryWeightStore
from buffer.weights.store import ServedWeightStore
from buffer.wire import StoreStatus
from services.address import read_address
from services.context import ServiceContext, ServiceSettings
from services.evaluations import BoardEvaluations
from services.history import MemoryHistory
from services.presence import MemoryBoard, Presence
from services.replay_api import create_app
from services.security import Guard
from services.token_text import TokenTextReader
from services.trained_ring import MemoryTrainedRing
from tests.factories import PAYLOAD, RUN_ID, make_manifest

DEMO_MODEL = Path(__file__).parents[2] / "models" / "running-sums"
SERVICE, TABLE, LIMITER = ServiceSettings(), TableSettings(), RateLimiterSettings(min_size=1)
NO_RETRY = ClientSettings(retry_budget_s=0.0, read_timeout_s=20.0)


def make_context(
    directory: Path,
    table: ServedTable | None = None,
    *,
    settings: ServiceSettings = SERVICE,
    table_settings: TableSettings = TABLE,
    limiter: RateLimiterSettings = LIMITER,
    weights: ServedWeightStore | None = None,
) -> ServiceContext:
    """Return the collaborators of a service whose state is this process and `directory`."""
    weights = weights or DirectoryWeightStore(directory / "weights")
    return ServiceContext(
        run_id=RUN_ID,
        settings=settings,
        table=table or MemoryTable(table_settings, limiter, RUN_ID),
        table_settings=table_settings,
        limiter_settings=limiter,
        weights=weights,
        presence=Presence(MemoryBoard()),
        history=MemoryHistory(),
        trained=MemoryTrainedRing(),
        token_texts=TokenTextReader(DEMO_MODEL).texts,
        store=lambda: StoreStatus(memory_bytes=1, memory_limit_bytes=0, disk_free_bytes=2, disk_total_bytes=3),
        evaluations=BoardEvaluations(MemoryBoard(), weights),
        promises=lambda: {"appendfsync": "never: this is memory"},
    )


@contextmanager
def serving(context: ServiceContext) -> Iterator[str]:
    """Serve the app on a free loopback port from a thread of this process; yield its URL."""
    app = create_app(context, Guard(context.settings.tokens))
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, ws="none", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="service")
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        context.closing.set()
        server.should_exit = True
        thread.join()


class PublishingTable(HttpTable):
    """An HttpTable whose version advances as in life: by publishing weights."""

    def __init__(self, client: ServiceClient) -> None:
        super().__init__(client)
        self._weights = HttpWeightStore(client)

    def advance_version(self, version: PolicyVersion) -> None:
        latest = self._weights.latest()
        if latest is None or latest.version < version:
            self._weights.put_blob(sha256(PAYLOAD).hexdigest(), [PAYLOAD])
            self._weights.publish(make_manifest(version))
        super().advance_version(version)


class ServedOverHttp(PublishingTable):
    """A table behind HTTP, with what its service does to it at its own time done when a test says so."""

    def __init__(self, client: ServiceClient, served: ServedTable) -> None:
        super().__init__(client)
        self.tidy, self.count_malformed = served.tidy, served.count_malformed
        self.insert_encoded, self.sample_encoded = served.insert_encoded, served.sample_encoded


class ServeProcess:
    """The real `stalewise serve`, with its own Redis, in a directory of its own."""

    def __init__(self, runs_dir: Path, *settings: str, name: str = RUN_ID) -> None:
        self.directory = runs_dir / name
        self.log_path = runs_dir / "service.log"
        options = [f"run.runs_dir={runs_dir}", f"run.name={name}", "service.port=0", *settings]
        self.arguments = ["serve", *(part for option in options for part in ("--set", option))]
        self.process = self._start()

    def _start(self) -> "subprocess.Popen[bytes]":
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            return subprocess.Popen([sys.executable, "-m", "services.cli", *self.arguments], stdout=log, stderr=log)

    def restart(self) -> None:
        """Start it again after it ended."""
        self.process.wait(10)
        self.process = self._start()

    def wait_until_ready(self) -> str:
        """Return the URL once it answers."""
        deadline_s = time.monotonic() + 60
        while (url := read_address(self.directory)) is None or self.process.poll() is not None:
            assert self.process.poll() is None, self.log_path.read_text()
            assert time.monotonic() < deadline_s, self.log_path.read_text()
            time.sleep(0.02)
        return url

    def stop(self) -> int:
        """Ask it to drain, and return its exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(30)


def workers_of(serve: ServeProcess) -> set[int]:
    """Return the processes that the service spawned to answer requests."""
    workers = set()
    for pid in Path(f"/proc/{serve.process.pid}/task/{serve.process.pid}/children").read_text().split():
        with suppress(OSError):  # it ended
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                workers.add(int(pid))
    return workers


def redis_pid(directory: Path) -> int:
    """Return the Redis whose working directory this is."""
    wanted = os.fspath((directory / "redis").resolve())
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and os.readlink(entry / "cwd") == wanted:
                return int(entry.name)
        except OSError:
            continue  # it ended, or it is not ours
    raise AssertionError(f"no process works in {wanted}")


def stalewise(*arguments: str, timeout_s: float = 60.0) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end."""
    command: Sequence[str] = [sys.executable, "-m", "services.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
