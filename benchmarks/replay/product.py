"""Our side: a Redis, services of one and two workers on it, its table opened directly, connections of bare bytes."""

import http.client
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import redis

from benchmarks.replay.payloads import RUN_ID
from buffer.codec import bare_record, encode_group
from buffer.rate_limiter import RateLimiterSettings
from buffer.redis_client import connect
from buffer.redis_server import RedisSettings, redis_server
from buffer.redis_table import RedisTable
from buffer.table import TableSettings
from buffer.types import SCHEMA, Group
from buffer.weighting import PriorityWeighting
from buffer.wire import MSGPACK
from services.address import read_address

LIMITER = RateLimiterSettings(min_size=256, error_buffer=1e12)
TABLE = TableSettings(
    capacity_groups=2_000_000,
    capacity_bytes=8 << 30,
    weighting=PriorityWeighting(exponent=1.0),
    max_prompts=2_000_000,
)
_OPTIONS = [
    *("limiter.min_size=256", "limiter.error_buffer=1e12", f"table.capacity_groups={TABLE.capacity_groups}"),
    *(f"table.capacity_bytes={TABLE.capacity_bytes}", 'table.weighting={by = "priority", exponent = 1.0}'),
    *("redis.appendfsync=no", f"run.name={RUN_ID}", "service.port=0"),
]


@dataclass(frozen=True)
class Service:
    """A running service."""

    address: tuple[str, int]
    """Host and port."""
    pid: int
    """Of the process that was started; workers are its children."""


@dataclass
class Product:
    """A run's Redis and what is open on it."""

    client: redis.Redis
    directory: Path
    redis_url: str
    services: dict[int, Service]
    """By the number of API workers."""

    def fresh_table(self, appendfsync: str = "everysec", *, appendonly: bool = True) -> RedisTable:
        """Return an empty table, of which version 0 is published, under this persistence and with an empty file."""
        self.client.config_set("appendonly", "no")
        self.client.flushall()
        table = RedisTable(self.client, TABLE, LIMITER, RUN_ID)
        table.advance_version(0)
        self.persist(appendfsync, appendonly=appendonly)
        return table

    def persist(self, appendfsync: str, *, appendonly: bool = True) -> None:
        """Choose a persistence and wait until it is in force."""
        self.client.config_set("appendfsync", appendfsync)
        self.client.config_set("appendonly", "yes" if appendonly else "no")
        while self.is_rewriting():
            time.sleep(0.02)

    def is_rewriting(self) -> bool:
        """Whether the append-only file is being written anew."""
        info: Any = self.client.info("persistence")
        return bool(info["aof_rewrite_in_progress"] or info["aof_rewrite_scheduled"])


@contextmanager
def product() -> Iterator[Product]:
    """Run Redis and the services."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        directory = Path(name)
        with (
            redis_server(directory / "redis", RedisSettings(appendfsync="no")) as url,
            service(directory / "one", url) as one,
            service(directory / "two", url, "service.workers=2") as two,
            connect(url) as client,
        ):
            yield Product(client, directory, url, {1: one, 2: two})


@contextmanager
def service(runs_dir: Path, redis_url: str, *settings: str, without: Sequence[str] = ()) -> Iterator[Service]:
    """Run a service, without some of its promises (stripped.py)."""
    options = [*_OPTIONS, f"run.runs_dir={runs_dir}", f"service.redis_url={redis_url}", *settings]
    start = ["benchmarks.replay.stripped", ",".join(without)] if without else ["services.cli"]
    started = subprocess.Popen(
        [sys.executable, "-m", *start, "serve", *(part for option in options for part in ("--set", option))],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield Service(_address(runs_dir / RUN_ID), started.pid)
    finally:
        started.terminate()
        started.wait()


def _address(run_directory: Path) -> tuple[str, int]:
    end = time.monotonic() + 120
    while (url := read_address(run_directory)) is None:
        if time.monotonic() > end:
            raise TimeoutError("the service did not start")
        time.sleep(0.05)
    host, _, port = url.removeprefix("http://").rpartition(":")
    return host, int(port)


class Connection:
    """One keep-alive connection with the bytes given: what is measured is the service and not its client."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._http = http.client.HTTPConnection(*address, timeout=60)

    def post(self, path: str, body: bytes, media_type: str = MSGPACK) -> bytes:
        """Return the body of a 200; raise for everything else."""
        self._http.request("POST", path, body, {"Content-Type": media_type, "Accept": media_type})
        response = self._http.getresponse()
        answer = response.read()
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {answer[:300]!r}")
        return answer


def insert_bodies(groups: Sequence[Group], batch: int, media_type: str) -> list[bytes]:
    """Return the bodies of requests that insert so many groups each."""
    batches = [groups[i : i + batch] for i in range(0, len(groups), batch)]
    if media_type == MSGPACK:
        head: bytes = msgpack.packb({"schema": SCHEMA, "groups": None})[:-1]
        pack = msgpack.Packer()
        return [
            head + pack.pack_array_header(len(some)) + b"".join(bare_record(encode_group(group)) for group in some)
            for some in batches
        ]
    return [
        b'{"schema":1,"groups":[' + b",".join(g.model_dump_json().encode() for g in some) + b"]}" for some in batches
    ]


def sample_request(number: int, num_groups: int = 256) -> dict[str, Any]:
    """Return a weighted draw as a plain map."""
    return {
        "num_groups": num_groups,
        "learner_version": 0,
        "request_id": f"r{number}",
        "selector": {"kind": "weighted", "by": "priority"},
    }
