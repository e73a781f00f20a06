"""One suite for every table: in memory, on a real Redis, and behind the HTTP service."""

import itertools
import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import pytest

from buffer.client import ServiceClient
from buffer.memory_table import MemoryTable
from buffer.rate_limiter import RateLimiterSettings
from buffer.redis_server import connect
from buffer.redis_table import RedisTable
from buffer.table import ReplayTable, TableSettings
from tests.conftest import Clock
from tests.factories import RUN_ID
from tests.services.live import NO_RETRY, PublishingTable, make_context, serving

DEFAULTS = TableSettings()
OPEN = RateLimiterSettings(samples_per_insert=1.0, min_size=1, error_buffer=1e9)
"""A limiter that never blocks a draw of one group."""


class TableFactory(Protocol):
    def __call__(
        self, settings: TableSettings = ..., limiter: RateLimiterSettings = ..., *, latest_version: int = ...
    ) -> ReplayTable: ...


@pytest.fixture(params=["memory", "redis", "http"])
def make_table(request: pytest.FixtureRequest, clock: Clock, tmp_path: Path) -> Iterator[TableFactory]:
    """Return a function that makes an empty table, of which `latest_version` is published."""
    kind: str = request.param
    client = connect(request.getfixturevalue("redis_url")) if kind == "redis" else None
    open_services, numbers = ExitStack(), itertools.count()

    def make(
        settings: TableSettings = DEFAULTS, limiter: RateLimiterSettings = OPEN, *, latest_version: int = 0
    ) -> ReplayTable:
        table: ReplayTable
        rng = random.Random(7)
        if client is None:
            table = MemoryTable(settings, limiter, RUN_ID, clock=clock, rng=rng)
        else:
            client.flushdb()
            table = RedisTable(client, settings, limiter, RUN_ID, clock=clock, rng=rng)
        if kind == "http":
            context = make_context(tmp_path / str(next(numbers)), table, table_settings=settings, limiter=limiter)
            service = ServiceClient(open_services.enter_context(serving(context)), settings=NO_RETRY)
            open_services.callback(service.close)
            table = PublishingTable(service)
        if latest_version >= 0:
            table.advance_version(latest_version)
        return table

    with open_services:
        yield make
    if client is not None:
        client.flushdb()
        client.close()
