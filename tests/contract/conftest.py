"""One suite for every table: in memory, on a real Redis, one of several shards, and behind HTTP on a real socket.

The promises of a sharded table are those of each shard, so here all ids lie in one of three; what it is to have groups
in all of them is in tests/buffer/test_sharded_table.py.
"""

import itertools
import random
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Protocol

import pytest
import redis

from buffer.connection import ServiceClient
from buffer.memory_table import MemoryTable
from buffer.rate_limiter import RateLimiterSettings
from buffer.redis_client import connect
from buffer.redis_table import RedisTable
from buffer.sharded_table import ShardedTable
from buffer.table import ServedTable, TableSettings
from tests.conftest import Clock
from tests.factories import RUN_ID
from tests.services.live import NO_RETRY, ServedOverHttp, make_context, serving

DEFAULTS = TableSettings()
OPEN = RateLimiterSettings(samples_per_insert=1.0, min_size=1, error_buffer=1e9)
"""A limiter that never blocks a draw of one group."""


class TableFactory(Protocol):
    def __call__(
        self, settings: TableSettings = ..., limiter: RateLimiterSettings = ..., *, latest_version: int = ...
    ) -> ServedTable: ...


class MakeTable:
    """Makes empty tables of one kind, of which `latest_version` is published."""

    def __init__(self, kind: str, client: redis.Redis | None, clock: Clock, directory: Path, stack: ExitStack) -> None:
        self._kind, self._client, self._clock, self._stack = kind, client, clock, stack
        self._directories = (directory / str(number) for number in itertools.count())

    def __call__(
        self, settings: TableSettings = DEFAULTS, limiter: RateLimiterSettings = OPEN, *, latest_version: int = 0
    ) -> ServedTable:
        local = table = self._local(settings, limiter)
        if self._kind == "http":
            context = make_context(next(self._directories), local, table_settings=settings, limiter=limiter)
            url = self._stack.enter_context(serving(context))
            table = ServedOverHttp(self._stack.enter_context(closing(ServiceClient(url, settings=NO_RETRY))), local)
        if latest_version >= 0:
            table.advance_version(latest_version)
        return table

    def _local(self, settings: TableSettings, limiter: RateLimiterSettings) -> ServedTable:
        rng = random.Random(7)
        if self._client is None:
            return MemoryTable(settings, limiter, RUN_ID, clock=self._clock, rng=rng)
        self._client.flushdb()
        shards = [
            RedisTable(self._client, settings, limiter, RUN_ID, shard=shard, clock=self._clock, rng=rng)
            for shard in range(3 if self._kind == "sharded" else 1)
        ]
        return ShardedTable(shards, settings, limiter, rng=rng, place=one_of) if len(shards) > 1 else shards[0]


def one_of(name: str, num_shards: int) -> int:
    """Place everything into one shard that is neither the first nor the last."""
    return num_shards // 2


@pytest.fixture(params=["memory", "redis", "sharded", "http"])
def make_table(request: pytest.FixtureRequest, clock: Clock, tmp_path: Path) -> Iterator[TableFactory]:
    """Return a function that makes an empty table; the table behind HTTP is one on Redis."""
    kind: str = request.param
    with ExitStack() as stack:
        client = None if kind == "memory" else stack.enter_context(connect(request.getfixturevalue("redis_url")))
        yield MakeTable(kind, client, clock, tmp_path, stack)
